"""Token files: all tokens of a recording in one safetensors file (docs/offline.md), read by memory map.

    with TokenFile("tokens/episode_000000.safetensors") as file:
        file.tokens          # [frames, views, tokens, channels], mapped: indexing reads what is indexed
        file.frame(12)       # VisualTokens, as the node would have sent them
        file.values["action"]

A token message that was saved as a file opens, too, as a file of one frame. Nothing in a file is trusted: every offset
and shape is checked against the bytes that are there. Needs NumPy; ml_dtypes for `tokens` and `read` on bfloat16.
"""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vla_perception.tokens import codec
from vla_perception.tokens.codec import TokenFormatError
from vla_perception.tokens.view import View
from vla_perception.tokens.visual_tokens import VisualTokens, model_fields

#: Of a tensor's name in front of what was recorded beside the images.
VALUES = "values."
#: Per-frame tensors: name → dtype, and shape behind [frames], where V is the number of views.
COLUMNS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "times_ns": ("<i8", ()),
    "timestamps": ("<f8", ()),
    "sequence": ("<i8", ()),
    "stamps_ns": ("<i8", ("V",)),
    "affines": ("<f8", ("V", 6)),
    "rois": ("<f8", ("V", 4)),
    "heights": ("<i4", ("V",)),
    "widths": ("<i4", ("V",)),
    "frame_ids": ("<i4", ("V",)),
    "crc32": ("<u4", ()),
}
#: safetensors' names of NumPy's dtypes.
STORED = {"<i8": "I64", "<i4": "I32", "<u4": "U32", "<f8": "F64", "<f4": "F32", "|b1": "BOOL"}
_FROM_STORED = {code: np.dtype(dtype) for dtype, code in STORED.items()}


class TokenFile:
    """One recording's tokens. A context manager; `close` does the same. Pickles as its path.

    Attributes:
        path: where it is.
        metadata: the model's keys of a token message (docs/wire_format.md), and ``recording``: where the tokens come from.
        cameras: names of the views.
        dtype: of the tokens: ``bfloat16``, ``float16`` or ``float32``.
        shape: (frames, views, tokens per view, channels).
        stamps_ns: int64 [frames, views], of the images.
        times_ns: int64 [frames], when each frame set was recorded.
        timestamps: float64 [frames], seconds since the recording's first frame, or as the dataset says.
        sequence: int64 [frames], counts up by one.
        values: name → [frames, …], what was recorded beside the images.

    Raises:
        TokenFormatError: it is not a token file, or a damaged one.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 8:
                raise TokenFormatError(f"{self.path} is too short for a token file")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Frames are asked for here and there: what lies behind them is not wanted with them.
        self._map.madvise(mmap.MADV_RANDOM)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data
        try:
            self._open(memoryview(self._map))
        except TokenFormatError as error:
            raise TokenFormatError(f"{self.path}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise TokenFormatError(f"{self.path} is not a token file, or a damaged one: {error}") from error

    def _open(self, data: memoryview) -> None:
        header, payload = codec.split(data)
        codec.check_layout(header, len(payload))
        self.metadata: dict = codec.metadata_of(header)
        self._message: VisualTokens | None = None
        if len(header["tokens"]["shape"]) == 3:
            self._open_message(data)
            return
        self._fields = model_fields(self.metadata)
        self.cameras = tuple(str(camera) for camera in self.metadata["cameras"])
        self._frame_names = [str(name) for name in self.metadata["frame_ids"]]
        self._words, self.dtype = codec.tensor(header["tokens"], payload, "tokens")
        self.shape: tuple[int, ...] = self._words.shape
        if self._words.ndim != 4 or 0 in self.shape or self.shape[1] != len(self.cameras):
            raise TokenFormatError(
                f"tokens {list(self.shape)} are not [frames, {len(self.cameras)} views, tokens, channels]"
            )
        columns = {
            name: self._column(header[name], payload, name, kind, tail) for name, (kind, tail) in COLUMNS.items()
        }
        self._place(columns)
        self.values = {
            name.removeprefix(VALUES): self._column(header[name], payload, name)
            for name in header
            if name.startswith(VALUES)
        }

    def _place(self, columns: Mapping[str, np.ndarray]) -> None:
        self.stamps_ns, self.times_ns = columns["stamps_ns"], columns["times_ns"]
        self.timestamps, self.sequence = columns["timestamps"], columns["sequence"]
        self._affines, self._rois, self._crc32 = columns["affines"], columns["rois"], columns["crc32"]
        self._heights, self._widths, self._frame_ids = columns["heights"], columns["widths"], columns["frame_ids"]
        if self._frame_ids.min() < 0 or self._frame_ids.max() >= len(self._frame_names):
            raise TokenFormatError("it refers to a frame_id that it does not name")

    def _open_message(self, data: memoryview) -> None:
        """A token message in a file: one frame."""
        message = VisualTokens.from_bytes(data)
        self._message = message
        self.cameras, self.dtype, self._words = message.cameras, message.dtype, message.data[None]
        self.shape = self._words.shape
        self.stamps_ns = np.array([message.stamps_ns], np.int64)
        self.times_ns = self.stamps_ns[:, 0]
        self.timestamps = np.zeros(1)
        self.sequence = np.array([message.sequence], np.int64)
        self.values = {}

    def _column(
        self,
        entry: Mapping,
        payload: memoryview,
        name: str,
        kind: str | None = None,
        tail: Sequence[str | int] = (),
    ) -> np.ndarray:
        """[frames, …], a copy: it may lie unaligned."""
        dtype = _FROM_STORED.get(entry["dtype"])
        if dtype is None or (kind is not None and dtype != np.dtype(kind)):
            raise TokenFormatError(f"{name} is stored as {codec.brief(entry['dtype'])}")
        values = _array(payload, entry, dtype)
        shape = [self.shape[1] if length == "V" else length for length in tail]
        if not values.ndim or len(values) != self.shape[0] or (kind is not None and list(values.shape[1:]) != shape):
            raise TokenFormatError(f"{name} {list(values.shape)} does not go with tokens {list(self.shape)}")
        return values.copy()

    def __len__(self) -> int:
        """Frames."""
        return self.shape[0]

    @property
    def fingerprint(self) -> str:
        return str(self.metadata["fingerprint"])

    @property
    def tokens(self) -> np.ndarray:
        """[frames, views, tokens, channels] of the mapped file, read-only; bfloat16 as ml_dtypes' bfloat16."""
        return codec.typed(self._words, self.dtype)

    @property
    def words(self) -> np.ndarray:
        """`tokens`, where bfloat16 is uint16: the bits as they are stored."""
        return self._words

    def read(self, start: int, stop: int) -> np.ndarray:
        """`tokens` of some frames, [stop − start, views, tokens, channels], in separate memory."""
        found = self.tokens[start:stop]
        if found.size and self._message is None:
            # All of it in one request, where single pages would be asked for one by one.
            begin = found.ctypes.data - self._address
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, begin + found.nbytes - page)
        return found.copy()

    def frame(self, index: int) -> VisualTokens:
        """The message that the node would have sent; its arrays are of the mapped file.

        Raises:
            IndexError: no such frame.
            TokenFormatError: what is stored of it is no message: a stamp that is none, a part of an image beyond it.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        if self._message is not None:
            return self._message
        try:
            return VisualTokens(
                data=self._words[index],
                dtype=self.dtype,
                views=tuple(self._view(index, view) for view in range(len(self.cameras))),
                sequence=int(self.sequence[index]),
                **self._fields,
            )
        except ValueError as error:
            raise TokenFormatError(f"{self.path}: frame {index}: {error}") from None

    def _view(self, index: int, view: int) -> View:
        roi = self._rois[index, view].tolist()
        return View(
            self.cameras[view],
            self._frame_names[self._frame_ids[index, view]],
            int(self.stamps_ns[index, view]),
            int(self._heights[index, view]),
            int(self._widths[index, view]),
            codec.affine_map(self._affines[index, view].tolist()),
            roi=codec.rectangle(roi) if any(roi) else None,
        )

    def is_sound(self, index: int) -> bool:
        """Whether a frame's bytes are those that were written, by their CRC-32."""
        if self._message is not None:
            return True  # a message has none
        return zlib.crc32(self._words[index].data) == self._crc32[index]

    def close(self) -> None:
        """Arrays that were handed out stay usable; the file is let go with the last of them."""
        self._words, self._message = np.empty(0, self._words.dtype), None

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        return TokenFile, (str(self.path),)


def _array(payload: memoryview, entry: Mapping, dtype: np.dtype) -> np.ndarray:
    """The tensor of a header's entry; ValueError where it does not fit its bytes."""
    start, stop = entry["data_offsets"]
    shape = [int(length) for length in entry["shape"]]
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError(f"a tensor {shape} of {dtype} does not fit its {stop - start} bytes")
    return np.frombuffer(payload[start:stop], dtype).reshape(shape)
