"""What goes from the server to the page in one binary message of the web socket: a JSON header and arrays behind it.

4 bytes     length of the header, little-endian
header      JSON in UTF-8; its `blobs` is a list of [offset, length], counted from the end of the header
blobs       each begins at a multiple of 4 bytes of the message, as JavaScript's typed arrays want it
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np


class Blobs:
    """Collects arrays and files for one message; `add` gives the number that the header names one by."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._places: list[tuple[int, int]] = []
        self._end = 0

    def add(self, data: bytes | np.ndarray) -> int:
        """Takes bytes, uint8 or float32."""
        data = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
        self._places.append((self._end, len(data)))
        padding = -len(data) % 4
        self._parts += [data, bytes(padding)]
        self._end += len(data) + padding
        return len(self._places) - 1

    def pack(self, header: Mapping[str, object]) -> bytes:
        """The message. ValueError if the header holds NaN or infinity, which JSON does not know."""
        text = json.dumps({**header, "blobs": self._places}, allow_nan=False).encode()
        text += b" " * (-(4 + len(text)) % 4)
        return b"".join([len(text).to_bytes(4, "little"), text, *self._parts])


def unpack(message: bytes) -> tuple[dict[str, object], list[bytes]]:
    """Header and blobs again."""
    length = int.from_bytes(message[:4], "little")
    header = json.loads(message[4 : 4 + length])
    start = 4 + length
    return header, [message[start + offset : start + offset + size] for offset, size in header["blobs"]]
