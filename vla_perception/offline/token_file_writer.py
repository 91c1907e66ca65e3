"""Writing a token file frame by frame, in bounded memory, so that an interrupted run goes on with the same bytes.

While it is being written there are two files. ``NAME.safetensors.part``: room for the header, then the tokens of frame
after frame. ``NAME.journal``: a JSON line per frame set, written after its tokens, with all that goes into the other
tensors, and the tokens' CRC-32. Whatever interrupts this, the journal's lines up to the first that is torn, or whose
tokens are not there, are what was done. At the end the other tensors follow the tokens, the header is put in its place,
and the file gets its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_perception.offline.recordings import FrameSet, SourceError
from vla_perception.offline.token_file import COLUMNS, STORED, VALUES
from vla_perception.tokens.codec import DTYPES, METADATA_KEY, SCHEMA

_BLOCK = 4096
#: Bytes of the header beyond what is known at the start: digests, damaged frames, names of frames.
_ROOM = 32 << 10
#: Different frame_ids of a recording, and their characters in all: a camera has one.
_FRAME_IDS, _FRAME_ID_CHARACTERS = 256, 4096
#: Characters of reasons for damaged frames that are kept.
_REASONS = 6000
#: Rows that are gathered before they are written.
_ROWS = 4096

_json = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


@dataclass(frozen=True)
class Layout:
    """What a token file's frames have in common.

    Attributes:
        model: `VisualTokenizer.metadata()`.
        cameras: names of the views.
        shape: (views, tokens per view, channels).
        dtype: of the tokens.
        recording: what is known of the recording at the start, as JSON.
        batch: frame sets that are encoded together: an interrupted run goes on at the beginning of such a block.
    """

    model: Mapping[str, object]
    cameras: tuple[str, ...]
    shape: tuple[int, int, int]
    dtype: str
    recording: Mapping[str, object]
    batch: int = 1

    @property
    def frame_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1].itemsize


@dataclass(frozen=True)
class Geometry:
    """Where a view's tokens lie: size of the image in pixels, map to the grid, region of interest (None: all of it)."""

    height: int
    width: int
    affine: tuple[float, ...]
    roi: tuple[float, ...] | None


class BusyError(OSError):
    """Another process is writing the file."""


class TokenFileWriter:
    """Writes one token file; goes on where an earlier one with the same `layout` and sources was interrupted.

    Attributes:
        path: the file, once it is finished.
        done: frame sets that need not come again, counted as `add` and `skip` do.
        frames: those of them that have tokens.
        is_finished: the file was there already.

    Raises:
        SourceError: the file is there, of another source.
        BusyError: another process is writing it.
        OSError: nothing can be written there.
    """

    def __init__(self, path: Path, layout: Layout, sources: Sequence[Path]) -> None:
        self.path = path
        self.layout = layout
        self.done = self.frames = self.damaged = 0
        self.reasons: list[str] = []
        self._values: dict[str, tuple[str, list[int]]] | None = None
        self._frame_ids: dict[str, int] = {}
        self._part, self._journal_path = path.with_name(f"{path.name}.part"), path.with_name(f"{path.stem}.journal")
        self._journal: int | None = None
        self._file: int | None = None
        self._begun = [f"{source}" for source in sources], [_identity(source) for source in sources]
        self._header_bytes = -(-(len(self._header(0, {}, room=True)) + _ROOM) // _BLOCK) * _BLOCK
        self.is_finished = self._finished_before()
        if self.is_finished:
            self._tidy()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BusyError(f"{self.path.name} is being written by another process") from error
            raise
        self.is_finished = self._finished_before()  # by another process, meanwhile
        if self.is_finished:
            self._tidy()
            self.close()
            return
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._recover()

    def _finished_before(self) -> bool:
        """Whether the file is there, of these sources as far as their size shows."""
        from vla_perception.offline.token_file import TokenFile

        if not self.path.is_file():
            return False
        with TokenFile(self.path) as file:
            recording = file.metadata.get("recording")
            said = recording.get("source_bytes") if isinstance(recording, dict) else None
            self.frames = len(file)
        if said != self.source_bytes:
            raise SourceError(
                f"{self.path} was made of a source of {said} bytes, which has {self.source_bytes} now: delete it, or "
                "choose another --out"
            )
        return True

    @property
    def source_bytes(self) -> int:
        return sum(size for size, _ in self._begun[1])

    # Going on

    def _recover(self) -> None:
        """Takes what the journal and the tokens have in common; all of it, or none where they are of other settings."""
        assert self._journal is not None and self._file is not None
        first = {
            "journal": 1,
            "layout": [
                self.layout.model.get("fingerprint"),
                self.layout.model.get("condition"),
                self.layout.cameras,
                self.layout.shape,
                self.layout.dtype,
            ],
            "recording": self.layout.recording,
            "batch": self.layout.batch,
            "sources": self._begun,
        }
        line = f"{_json(first)}\n".encode()
        kept = len(line)
        if os.pread(self._journal, kept, 0) == line:
            kept = self._replay(kept)
        else:
            os.ftruncate(self._journal, 0)
            os.pwrite(self._journal, line, 0)
        os.ftruncate(self._journal, kept)
        os.lseek(self._journal, kept, os.SEEK_SET)
        os.ftruncate(self._file, self._header_bytes + self.frames * self.layout.frame_bytes)

    def _replay(self, start: int) -> int:
        """Counts what was done; returns where in the journal that ends."""
        batch = self.layout.batch
        kept = self._state(start)
        for entry, end in self._entries(start):
            if not self._is_there(entry):
                break
            try:
                self._count(entry)
            except (KeyError, TypeError, ValueError):
                break
            if self.done % batch == 0:
                kept = self._state(end)
        end, self.done, self.frames, self.damaged, reasons, self._values, frame_ids = kept
        self.reasons, self._frame_ids = list(reasons), dict(frame_ids)
        return end

    def _state(self, end: int) -> tuple:
        reasons, frame_ids = tuple(self.reasons), tuple(self._frame_ids.items())
        return end, self.done, self.frames, self.damaged, reasons, self._values, frame_ids

    def _entries(self, start: int) -> Iterator[tuple[dict, int]]:
        """(entry, where its line ends) of the journal, up to the first line that is none."""
        with self._journal_path.open("rb") as file:
            file.seek(start)
            for line in file:
                start += len(line)
                try:
                    entry = json.loads(line)
                except ValueError:
                    return
                if not line.endswith(b"\n") or not isinstance(entry, dict):
                    return
                yield entry, start

    def _is_there(self, entry: dict) -> bool:
        """Whether the tokens of an entry are in the file."""
        if "skipped" in entry:
            return True
        assert self._file is not None
        size = self.layout.frame_bytes
        data = os.pread(self._file, size, self._header_bytes + self.frames * size)
        return len(data) == size and zlib.crc32(data) == entry.get("crc32")

    # Writing

    def add(self, frames: FrameSet, geometry: Sequence[Geometry], words: np.ndarray) -> None:
        """The tokens of the next frame set, [views, tokens, channels] of the dtype's words.

        Raises:
            ValueError: what was recorded beside it is of another shape than before; `skip` it.
        """
        assert self._file is not None
        self._check(frames)
        data = np.ascontiguousarray(words).view(np.uint8).reshape(-1).data
        if len(data) != self.layout.frame_bytes:
            raise AssertionError(f"{len(data)} bytes of tokens, not {self.layout.frame_bytes}")
        _write(self._file, data, self._header_bytes + self.frames * len(data))
        self._log(
            {
                "times_ns": frames.time_ns,
                "timestamps": frames.timestamp,
                "stamps_ns": frames.stamps_ns,
                "frame_ids": frames.frame_ids,
                "sizes": [[view.height, view.width] for view in geometry],
                "affines": [view.affine for view in geometry],
                "rois": [view.roi or (0.0, 0.0, 0.0, 0.0) for view in geometry],
                "crc32": zlib.crc32(data),
                "values": {
                    name: [str(value.dtype.str), list(value.shape), value.ravel().tolist()]
                    for name, value in frames.values.items()
                },
            }
        )

    def skip(self, reason: str) -> None:
        """The next frame set has no tokens, for that reason."""
        self._log({"skipped": reason[:300]})

    def _check(self, frames: FrameSet) -> None:
        shapes = {name: (value.dtype.str, list(value.shape)) for name, value in frames.values.items()}
        if self._values is None:
            self._values = shapes
            if len(self._header(0, {}, room=True)) > self._header_bytes - _ROOM // 2:
                raise SourceError(
                    f"{self.path.name}: {len(shapes)} values have too long names to be stored beside tokens"
                )
        if shapes != self._values:
            odd = next(name for name in sorted({*shapes, *self._values}) if shapes.get(name) != self._values.get(name))
            raise ValueError(f"{odd} is {shapes.get(odd)}, and was {self._values.get(odd)} before")
        names = {*self._frame_ids, *frames.frame_ids}
        if len(names) > _FRAME_IDS or sum(map(len, names)) > _FRAME_ID_CHARACTERS:
            raise ValueError("its images have too many different frame_ids")

    def _log(self, entry: dict) -> None:
        assert self._journal is not None
        _write(self._journal, f"{_json(entry)}\n".encode(), None)
        self._count(entry)

    def _count(self, entry: dict) -> None:
        self.done += 1
        if "skipped" in entry:
            self.damaged += 1
            if sum(map(len, self.reasons)) + len(entry["skipped"]) < _REASONS:
                self.reasons.append(entry["skipped"])
            return
        self.frames += 1
        self._values = {name: (dtype, shape) for name, (dtype, shape, _) in entry["values"].items()}
        for name in entry["frame_ids"]:
            self._frame_ids.setdefault(name, len(self._frame_ids))

    def finish(self, recording: Mapping[str, object]) -> None:
        """Completes the file. `recording`: what the index says about it; counts of frames are added here.

        Raises:
            SourceError: it has no frame at all.
        """
        assert self._file is not None
        if not self.frames:
            reason = f": {self.reasons[0]}" if self.reasons else ""
            self.discard()
            raise SourceError(f"no frame set of it could be encoded{reason}")
        header = self._header(self.frames, recording)
        offsets = self._write_columns()
        assert offsets == self._end(), "the header and the columns must agree"
        _write(self._file, (self._header_bytes - 8).to_bytes(8, "little") + header.ljust(self._header_bytes - 8), 0)
        os.ftruncate(self._file, self._header_bytes + offsets)
        os.fsync(self._file)
        os.replace(self._part, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._tidy()
        self.close()

    def discard(self) -> None:
        """Takes away what is not finished."""
        self._tidy()
        self.close()

    def _tidy(self) -> None:
        self._part.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        for file in (self._file, self._journal):
            if file is not None:
                os.close(file)
        self._file = self._journal = None

    def _columns(self) -> Iterator[tuple[str, np.dtype, tuple[int, ...]]]:
        """Name, dtype and shape behind [frames] of the tensors behind the tokens, the widest types first."""
        views = self.layout.shape[0]
        columns = [
            (name, np.dtype(kind), tuple(views if length == "V" else int(length) for length in tail))
            for name, (kind, tail) in COLUMNS.items()
        ]
        columns += [
            (f"{VALUES}{name}", np.dtype(kind), tuple(shape))
            for name, (kind, shape) in sorted((self._values or {}).items())
        ]
        yield from sorted(columns, key=lambda column: -column[1].itemsize)

    def _end(self) -> int:
        row = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self._columns())
        return self.frames * (self.layout.frame_bytes + row)

    def _header(self, frames: int, recording: Mapping[str, object], *, room: bool = False) -> bytes:
        views, tokens, channels = self.layout.shape
        metadata = {
            **self.layout.model,
            "schema": SCHEMA,
            "cameras": self.layout.cameras,
            "frame_ids": list(self._frame_ids),
            "recording": {
                **self.layout.recording,
                **recording,
                "source_bytes": self.source_bytes,
                "frames": frames,
                "frames_skipped": self.damaged,
                "skipped_because": self.reasons,
            },
        }
        header: dict[str, object] = {"__metadata__": {METADATA_KEY: _json(metadata)}}
        end = frames * self.layout.frame_bytes
        header["tokens"] = {
            "data_offsets": [0, end],
            "dtype": DTYPES[self.layout.dtype][0],
            "shape": [frames, views, tokens, channels],
        }
        for name, dtype, shape in self._columns():
            start, end = end, end + frames * dtype.itemsize * math.prod(shape)
            header[name] = {"data_offsets": [start, end], "dtype": STORED[dtype.str], "shape": [frames, *shape]}
        text = _json(header).encode()
        if not room and len(text) > self._header_bytes - 8:
            raise SourceError(f"{self.path.name}: its description takes {len(text)} bytes, more than there is room for")
        return text

    def _write_columns(self) -> int:
        """Puts the other tensors behind the tokens, some rows at a time; returns where they end in the payload."""
        assert self._file is not None
        places, end = {}, self.frames * self.layout.frame_bytes
        for name, dtype, shape in self._columns():
            places[name] = end
            end += self.frames * dtype.itemsize * math.prod(shape)
        rows: list[dict] = []
        written = 0
        start = len(os.pread(self._journal, 1 << 24, 0).split(b"\n", 1)[0]) + 1  # type: ignore[arg-type]
        for entry, _ in self._entries(start):
            if "skipped" not in entry:
                rows.append(entry | {"sequence": written + len(rows)})
            if len(rows) == _ROWS:
                self._write_rows(rows, places, written)
                written += len(rows)
                rows = []
        self._write_rows(rows, places, written)
        if written + len(rows) != self.frames:
            raise AssertionError(f"{written + len(rows)} rows in the journal for {self.frames} frames")
        return end

    def _write_rows(self, rows: Sequence[dict], places: Mapping[str, int], before: int) -> None:
        for name, dtype, shape in self._columns():
            values = np.array([self._cell(name, row) for row in rows], dtype).reshape(len(rows), *shape)
            offset = self._header_bytes + places[name] + before * dtype.itemsize * math.prod(shape)
            _write(self._file, values.tobytes(), offset)  # type: ignore[arg-type]

    def _cell(self, name: str, row: Mapping) -> object:
        if name.startswith(VALUES):
            return row["values"][name.removeprefix(VALUES)][2]
        if name == "heights":
            return [height for height, _ in row["sizes"]]
        if name == "widths":
            return [width for _, width in row["sizes"]]
        if name == "frame_ids":
            return [self._frame_ids[text] for text in row["frame_ids"]]
        return row[name]


def _identity(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change in ns): another one of either is another file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _write(file: int, data: bytes | memoryview, offset: int | None) -> None:
    """All of it: at `offset`, or at the file's position."""
    view = memoryview(data).cast("B")
    while len(view):
        count = os.write(file, view) if offset is None else os.pwrite(file, view, offset)
        view = view[count:]
        offset = None if offset is None else offset + count
