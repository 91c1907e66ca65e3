"""Parts of a file on a server, over connections that break: HTTP range requests with huggingface_hub's client."""

from __future__ import annotations

import importlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.files import header_length, parse_header

log = logging.getLogger(__name__)

#: First byte, and the one after the last.
Span = tuple[int, int]
#: Bytes between two spans that are rather fetched and dropped than left out with a separate request.
GAP = 1 << 20
#: Seconds before another try, and so how many tries without a single new byte there are.
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
_TIMEOUT = 30.0
_CHUNK = 1 << 20
_FIRST = 1 << 16
_PASSING = (408, 429, 500, 502, 503, 504)


class LocalFile:
    """A safetensors file on disk, read as `RemoteFile` reads one on a server."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    def header(self) -> tuple[dict[str, dict], int]:
        with open(self._path, "rb") as stream:
            size = self._path.stat().st_size
            length = header_length(stream.read(8), size)
            return parse_header(stream.read(length), size - 8 - length), 8 + length

    def read(self, spans: Sequence[Span]) -> Iterator[bytes]:
        with open(self._path, "rb") as stream:
            for start, stop in spans:
                stream.seek(start)
                while start < stop:
                    data = stream.read(min(_CHUNK, stop - start))
                    if not data:
                        raise CheckpointError(f"{self._path} became shorter while it was read")
                    start += len(data)
                    yield data


class RemoteFile:
    """A safetensors file on a server.

    A connection that breaks is taken up again where it broke. A server that refuses ranges and sends whole files is
    read from the beginning, and what is not wanted is dropped; this is said in a warning, because it takes longer.

    Attributes:
        name: for messages.
        size: bytes of the whole file, None before anything was read.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.size: int | None = None
        self._url = url
        self._ranges = True

    def header(self) -> tuple[dict[str, dict], int]:
        """The checked entries of its header, and the byte at which tensors begin.

        Raises:
            CheckpointError: it has none, or none that can be; also whatever `read` raises.
        """
        start = b"".join(self.read([(0, _FIRST)]))
        assert self.size is not None
        length = header_length(start, self.size)
        if length > len(start) - 8:
            start += b"".join(self.read([(len(start), 8 + length)]))
        return parse_header(start[8 : 8 + length], self.size - 8 - length), 8 + length

    def read(self, spans: Sequence[Span]) -> Iterator[bytes]:
        """The bytes of spans in ascending order, one after the other, in pieces; what is beyond the end is left out.

        Raises:
            CheckpointError: the server answers with something else than was asked for.
            Exception: those of huggingface_hub and its HTTP client, once `PAUSES` tries in a row brought nothing.
        """
        left = [span for span in spans if span[0] < span[1]]
        failures = 0
        while left:
            before = list(left)
            try:
                yield from self._attempt(left)
                if left == before:
                    raise _broken(f"{self.name}: the server sent nothing of what was asked for")
            except transport_error() as error:
                failures = failures + 1 if left == before else 1
                if failures > len(PAUSES):
                    raise
                log.info("%s: %s; trying again", self.name, error or type(error).__name__)
                time.sleep(PAUSES[failures - 1])

    def _attempt(self, left: list[Span]) -> Iterator[bytes]:
        """Reads until all is there or the connection ends; takes what was read out of `left`."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        while left:
            start, stop = left[0][0], _joined(left)
            headers = build_hf_headers() | {"Accept-Encoding": "identity"}
            if self._ranges:
                headers["Range"] = f"bytes={start}-{stop - 1}"
            with get_session().stream("GET", self._url, headers=headers, timeout=_TIMEOUT) as response:
                if response.status_code in _PASSING:
                    raise _broken(f"the server answers {response.status_code}")
                hf_raise_for_status(response)
                at = self._begin(response, start)
                size = self.size if self.size is not None else stop
                left[:] = [(first, min(last, size)) for first, last in left if first < size]
                # As it arrives: what waits for a larger piece is lost when the connection breaks.
                for data in response.iter_bytes():
                    yield from _take(left, data, at)
                    at += len(data)
                    if not left or (self._ranges and at >= stop):
                        break
                else:
                    if left and left[0][0] < min(stop, size):
                        raise _broken(f"the connection ended at byte {at}")

    def _begin(self, response, start: int) -> int:
        """Checks what the server says it sends; returns the position of its first byte."""
        if response.status_code == 206:
            said = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", said.strip())
            if match is None or int(match.group(1)) != start:
                raise CheckpointError(f"{self.name}: asked for bytes from {start} on, the server sends {said!r}")
            size = int(match.group(3))
        else:
            if self._ranges:
                log.warning(
                    "%s: the server (or a proxy on the way) sends whole files instead of parts; it is read from its "
                    "beginning, and what is not of the vision part is dropped",
                    self.name,
                )
                self._ranges = False
            start, said = 0, response.headers.get("Content-Length", "")
            if not re.fullmatch(r"\d{1,18}", said):
                raise CheckpointError(f"{self.name}: the server does not say how long the file is")
            size = int(said)
        if self.size not in (None, size):
            raise CheckpointError(f"{self.name} had {self.size} bytes and has {size} now; try again")
        self.size = size
        return start


def transport_error() -> type[Exception]:
    """What huggingface_hub's HTTP client raises when a connection fails: httpx in its version 1, httpx2 in 2."""
    from huggingface_hub.utils import get_session

    return importlib.import_module(type(get_session()).__module__.partition(".")[0]).TransportError


def _broken(reason: str) -> Exception:
    return transport_error()(reason)


def _joined(spans: Sequence[Span]) -> int:
    """Where a request that begins with the first span ends: neighbours come in one."""
    stop = spans[0][1]
    for start, end in spans[1:]:
        if start - stop > GAP:
            break
        stop = end
    return stop


def _take(left: list[Span], data: bytes, at: int) -> Iterator[bytes]:
    """What of `data`, which lies at byte `at`, belongs to the spans; takes it out of them."""
    end = at + len(data)
    while left and left[0][0] < end:
        start, stop = left[0]
        until = min(stop, end)
        if until == stop:
            left.pop(0)
        else:
            left[0] = (until, stop)
        yield data[start - at : until - at]
