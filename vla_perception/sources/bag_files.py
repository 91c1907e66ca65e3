"""The storage files of a rosbag2 recording: MCAP through the `mcap` library, SQLite through Python's own.

Both give the same: which topics a file holds, how often, from when to when, and its messages in the order of their
recording. Nothing that a file says of itself is taken for memory: records, chunks and messages have limits, and what
is compressed is expanded only as far as it says.

Why not `rosbags` (0.11): it refuses MCAP files without a profile or with a channel that is not ROS 2's, passes over
chunks that have no message index, and expands a chunk before it looks at its size; of SQLite it refuses files for what
playing them does not need, as QoS that it cannot parse, or types whose definition the recorder did not find.
"""

from __future__ import annotations

import heapq
import logging
import re
import shutil
import sqlite3
import struct
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import lz4.frame
import mcap.records
import zstandard
from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode

_log = logging.getLogger(__name__)

MCAP_MAGIC = b"\x89MCAP0\r\n"
SQLITE_MAGIC = b"SQLite format 3\0"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

#: Bytes of one message: more than a raw image of 64 Mpixel with four channels.
MESSAGE_LIMIT = 300 << 20
#: Bytes of a chunk, and of all chunks that are open at once because their times overlap.
CHUNK_LIMIT = 512 << 20
OPEN_CHUNKS_LIMIT = 1 << 30
#: Bytes of any other record that is read (a schema, the statistics, …), and number of chunks of a file.
RECORD_LIMIT = 16 << 20
CHUNKS_LIMIT = 2_000_000
#: Characters of a topic's name, and of its type, in SQLite.
NAME_LIMIT = 1 << 16
#: Bytes that copying or decompressing a file leaves free on the disk.
DISK_RESERVE = 1 << 30

MAX_NS = 2**63 - 1

#: (time in ns, topic, type, bytes as they were stored)
Stored = tuple[int, str, str, bytes]


class FileError(ValueError):
    """The file is sound but cannot be read here, or it says something that is not so; the text says what to do."""


@dataclass
class Channel:
    """A topic of one file: name, message type, encoding of its messages ("cdr"), and how many the file says it has."""

    topic: str
    type: str
    encoding: str
    messages: int = 0


class McapFile:
    """The index of an MCAP file: from its summary, or by reading the file through where that has none.

    Attributes: channels (by id), start_ns and end_ns of the first and the last message (None if there is none).
    Raises FileError, and on damaged files whatever `struct` and `mcap` do.
    """

    def __init__(self, path: Path):
        self.path = path
        self.channels: dict[int, Channel] = {}
        self.start_ns: int | None = None
        self.end_ns: int | None = None
        # Chunks: start and end in ns, where in the file, and the channels in it (empty: not known).
        self._chunks: list[tuple[int, int, int, frozenset[int]]] = []
        # Messages outside of chunks: time in ns and where in the file.
        self._loose = (array("Q"), array("Q"))
        with path.open("rb") as file:
            summary_start = self._check_ends(file)
            if not (summary_start and self._read_summary(file, summary_start)):
                self._scan(file)
        # Chunks without messages may say that they begin and end at zero.
        times = [time for *span, _, inside in self._chunks if inside or any(span) for time in span]
        times += [min(self._loose[0]), max(self._loose[0])] if self._loose[0] else []
        if times and any(channel.messages for channel in self.channels.values()):
            self.start_ns, self.end_ns = min(times), max(times)

    def messages(self, topics: Collection[str], start_ns: int | None) -> Iterator[Stored]:
        """Messages of `topics` at or after `start_ns`, by time. Reads chunk by chunk."""
        wanted = {key: channel for key, channel in self.channels.items() if channel.topic in topics}
        start = start_ns or 0
        with self.path.open("rb") as file:
            opened = OpenChunks(self.path)
            sources = [
                (chunk[0], lambda chunk=chunk: opened.read(file, chunk[2], wanted, start))
                for chunk in self._chunks
                if chunk[1] >= start and (not chunk[3] or not chunk[3].isdisjoint(wanted))
            ]
            if self._loose[0]:
                sources.append((0, lambda: self._loose_messages(file, wanted, start)))
            yield from in_time_order(sources)

    def _check_ends(self, file: BinaryIO) -> int:
        """Where the summary begins; 0 if there is none."""
        if file.read(8) != MCAP_MAGIC:
            raise FileError("it does not begin as an MCAP file")
        _, opcode, size = next(records(file), (0, 0, 0))
        header = parse(mcap.records.Header, body(file, opcode, size)) if opcode == Opcode.HEADER else None
        if header is not None and header.profile == "ros1":
            raise FileError("it holds ROS 1 messages: `rosbags-convert` makes a ROS 2 bag of it")
        size = file.seek(0, 2)
        if size < 37 + 17:
            raise ValueError("the file is too short")
        file.seek(-37, 2)
        end = file.read(37)
        if end[29:] != MCAP_MAGIC or end[:9] != struct.pack("<BQ", Opcode.FOOTER, 20):
            raise ValueError("the end of the file is missing")
        summary_start = parse(mcap.records.Footer, end[9:29]).summary_start
        if summary_start and not 8 < summary_start <= size - 37:
            raise ValueError("its summary is not where it says")
        return summary_start

    def _read_summary(self, file: BinaryIO, summary_start: int) -> bool:
        """Whether the summary has all that is needed, and agrees with itself."""
        schemas: dict[int, str] = {}
        chunks: dict[int, tuple[int, int, int, frozenset[int]]] = {}
        known: dict[frozenset[int], frozenset[int]] = {}
        statistics = None
        file.seek(summary_start)
        for _, opcode, size in records(file):
            if opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                self._define(opcode, body(file, opcode, size), schemas)
            elif opcode == Opcode.CHUNK_INDEX:
                index = parse(mcap.records.ChunkIndex, body(file, opcode, size))
                inside = frozenset(index.message_index_offsets)
                # By its place: an index that names one chunk a million times has one.
                chunks[index.chunk_start_offset] = (
                    index.message_start_time,
                    index.message_end_time,
                    index.chunk_start_offset,
                    known.setdefault(inside, inside),
                )
                if len(chunks) > CHUNKS_LIMIT:
                    raise FileError(f"it has more than {CHUNKS_LIMIT} chunks")
            elif opcode == Opcode.STATISTICS:
                statistics = parse(mcap.records.Statistics, body(file, opcode, size))
            elif opcode == Opcode.FOOTER:
                break
        if statistics is None or not chunks:
            return False
        counts = statistics.channel_message_counts
        if not statistics.message_count or statistics.message_count != sum(counts.values()):
            return False
        counted = {key for key, messages in counts.items() if messages}
        indexed = set().union(*known)
        if not counted <= set(self.channels) or (all(known) and counted != indexed):
            return False
        for key in counted:
            self.channels[key].messages = counts[key]
        self._chunks = sorted(chunks.values(), key=lambda chunk: (chunk[0], chunk[2]))
        return True

    def _scan(self, file: BinaryIO) -> None:
        """Reads the whole file, for what is in it."""
        self.channels.clear()
        schemas: dict[int, str] = {}
        file.seek(8)
        for position, opcode, size in records(file):
            if opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                self._define(opcode, body(file, opcode, size), schemas)
            elif opcode == Opcode.MESSAGE:
                key, _, time_ns, _ = struct.unpack("<HIQQ", file.read(22))
                self._count(key)
                self._loose[0].append(time_ns)
                self._loose[1].append(position)
            elif opcode == Opcode.CHUNK:
                data = expanded(body(file, opcode, size))
                times, inside = [], set()
                for inner, opcode_inside, size_inside in inner_records(data):
                    if opcode_inside in (Opcode.SCHEMA, Opcode.CHANNEL):
                        self._define(opcode_inside, data[inner : inner + size_inside], schemas)
                    elif opcode_inside == Opcode.MESSAGE:
                        key, _, time_ns, _ = struct.unpack_from("<HIQQ", data, inner)
                        self._count(key)
                        inside.add(key)
                        times.append(time_ns)
                if times:
                    self._chunks.append((min(times), max(times), position, frozenset(inside)))
            elif opcode in (Opcode.DATA_END, Opcode.FOOTER):
                break
        else:
            raise ValueError("a record goes beyond the end of the file")
        self._chunks.sort(key=lambda chunk: (chunk[0], chunk[2]))

    def _define(self, opcode: int, data: bytes, schemas: dict[int, str]) -> None:
        if opcode == Opcode.SCHEMA:
            schema = parse(mcap.records.Schema, data)
            schemas[schema.id] = schema.name
            return
        channel = parse(mcap.records.Channel, data)
        if channel.id not in self.channels:
            self.channels[channel.id] = Channel(
                channel.topic, ros_type(schemas.get(channel.schema_id, "")), encoding_of(channel.message_encoding)
            )

    def _count(self, key: int) -> None:
        if key not in self.channels:
            raise ValueError(f"a message belongs to channel {key}, which is not described")
        self.channels[key].messages += 1

    def _loose_messages(self, file: BinaryIO, wanted: dict[int, Channel], start: int) -> Iterator[Stored]:
        times, positions = self._loose
        for index in sorted(range(len(times)), key=times.__getitem__):
            if times[index] < start:
                continue
            file.seek(positions[index])
            opcode, size = struct.unpack("<BQ", file.read(9))
            (key,) = struct.unpack("<H", file.read(2))
            if key in wanted:
                file.seek(positions[index] + 9)
                data = body(file, opcode, size)
                yield times[index], wanted[key].topic, wanted[key].type, data[22:]


class OpenChunks:
    """Reads chunks, and holds the sum of those that are open at once below a limit."""

    def __init__(self, path: Path):
        self._path = path
        self._bytes = 0

    def read(self, file: BinaryIO, position: int, wanted: dict[int, Channel], start: int) -> Iterator[Stored]:
        file.seek(position)
        opcode, size = struct.unpack("<BQ", file.read(9))
        if opcode != Opcode.CHUNK:
            raise ValueError(f"there is no chunk at byte {position}, where the index has one")
        data = expanded(body(file, opcode, size), OPEN_CHUNKS_LIMIT - self._bytes)
        self._bytes += len(data)
        try:
            found = []
            for inner, opcode, size in inner_records(data):
                if opcode == Opcode.MESSAGE:
                    key, _, time_ns, _ = struct.unpack_from("<HIQQ", data, inner)
                    if key in wanted and time_ns >= start:
                        found.append((time_ns, inner, size, key))
            found.sort(key=lambda entry: entry[0])
            for time_ns, inner, size, key in found:
                yield time_ns, wanted[key].topic, wanted[key].type, bytes(data[inner + 22 : inner + size])
        finally:
            self._bytes -= len(data)


class SqliteFile:
    """The index of a `.db3` file; see McapFile. `scratch()` gives a folder for a copy, where one is needed.

    Only topics and messages are read, which all of rosbag2's schema versions have alike.
    """

    def __init__(self, path: Path, scratch: Callable[[], Path]):
        self.path = path
        beside = [path.with_name(path.name + suffix) for suffix in ("-wal", "-journal")]
        beside = [file for file in beside if file.is_file() and file.stat().st_size]
        # The file is read as it lies there. What its recorder had not yet moved into it is in the files beside it.
        self._readable = self._copied(beside, scratch) if beside else path
        with closing(self._opened()) as database:
            (pages,), (page,) = (database.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
            if pages * page > self._readable.stat().st_size:  # SQLite takes zeros for what is missing of the last page
                raise ValueError("the end of the file is missing")
            _check_tables(database)
            counts = {
                key: rest
                for key, *rest in database.execute(
                    "SELECT topic_id, count(*), min(timestamp), max(timestamp) FROM messages GROUP BY topic_id"
                )
            }
            topics = database.execute("SELECT id, name, type, serialization_format FROM topics ORDER BY id").fetchall()
        self.channels = {
            key: Channel(name, kind, encoding_of(encoding), counts[key][0] if key in counts else 0)
            for key, name, kind, encoding in topics
        }
        spans = [span for key, (_, *span) in counts.items() if key in self.channels]
        self.start_ns = min((start for start, _ in spans), default=None)
        self.end_ns = max((end for _, end in spans), default=None)

    def messages(self, topics: Collection[str], start_ns: int | None) -> Iterator[Stored]:
        """Messages of `topics` at or after `start_ns`, by time."""
        wanted = {key: channel for key, channel in self.channels.items() if channel.topic in topics}
        start = -(2**63) if start_ns is None else min(start_ns, MAX_NS)
        with closing(self._opened()) as database:
            rows = database.execute(
                f"SELECT topic_id, timestamp, data FROM messages WHERE topic_id IN ({', '.join('?' * len(wanted))}) "
                "AND timestamp >= ? ORDER BY timestamp, id",
                (*wanted, start),
            )
            for key, time_ns, data in rows:
                yield time_ns, wanted[key].topic, wanted[key].type, data

    def _opened(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{quote(str(self._readable))}?immutable=1", uri=True, check_same_thread=False)

    def _copied(self, beside: list[Path], scratch: Callable[[], Path]) -> Path:
        """A copy, with what lies beside the file in it."""
        folder = scratch()
        names = " and ".join(file.name for file in (self.path, *beside))
        _log.warning("%s: a copy of %s is made in %s, and read", self.path, names, folder)
        require_room(folder, sum(file.stat().st_size for file in (self.path, *beside)), f"a copy of {names}")
        for file in (self.path, *beside):
            shutil.copyfile(file, folder / file.name)
        copy = folder / self.path.name
        with closing(sqlite3.connect(copy)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            database.execute("PRAGMA journal_mode=DELETE").fetchall()
        return copy


def _check_tables(database: sqlite3.Connection) -> None:
    """FileError where it is not a recording."""
    tables = database.execute("SELECT name, type, rootpage FROM sqlite_master").fetchall()
    # A view may be without end, and so may what a generated column expands to.
    plain = {name for name, kind, page in tables if kind == "table" and page}
    for name in ("topics", "messages"):
        if name not in plain:
            raise FileError(f"it is not a rosbag2 recording: it has no table {name}")
        if any(column[6] for column in database.execute(f"PRAGMA table_xinfo({name})")):
            raise FileError(f"it is not a rosbag2 recording: {name} is not a plain table")
    texts = ("name", "type", "serialization_format")
    (odd,) = database.execute(
        "SELECT count(*) FROM topics WHERE "
        + " OR ".join(f"typeof({column}) <> 'text' OR length({column}) > {NAME_LIMIT}" for column in texts)
    ).fetchone()
    if odd:
        raise FileError(f"{odd} of its topics have a name, type or format that is not a text, or a long one")
    (odd,) = database.execute(
        "SELECT count(*) FROM messages WHERE typeof(timestamp) <> 'integer' OR typeof(data) <> 'blob' "
        f"OR length(data) > {MESSAGE_LIMIT}"
    ).fetchone()
    if odd:
        raise FileError(f"{odd} of its messages are not bytes with a time, or over {MESSAGE_LIMIT >> 20} MiB")


def in_time_order(sources: list[tuple[int, Callable[[], Iterator]]]) -> Iterator:
    """Items of several sources by their first element, a time. A source is opened when its start has come."""
    waiting = sorted(sources, key=lambda source: source[0], reverse=True)
    numbers = count()
    heap: list[tuple[int, int, tuple, Iterator]] = []
    while waiting or heap:
        while waiting and (not heap or waiting[-1][0] <= heap[0][0]):
            iterator = waiting.pop()[1]()
            item = next(iterator, None)
            if item is not None:
                heapq.heappush(heap, (item[0], next(numbers), item, iterator))
        if not heap:
            continue
        _, number, item, iterator = heap[0]
        yield item
        item = next(iterator, None)
        if item is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (item[0], number, item, iterator))


def encoding_of(said: str) -> str:
    """ "cdr", also where it is said in capitals or not at all; each message is looked at when it is read."""
    return said.strip().lower() or "cdr"


def ros_type(name: str) -> str:
    """ "sensor_msgs/msg/Image" for that, for ROS 1's way ("sensor_msgs/Image"), and for DDS' way to write it."""
    if dds := re.fullmatch(r"(\w+)::msg::dds_::(\w+)_", name):
        return f"{dds[1]}/msg/{dds[2]}"
    return name.replace("/", "/msg/") if name.count("/") == 1 else name


# MCAP's records


def records(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """(position, opcode, size) of each record from where the file is; its body is read from the file, or skipped."""
    end = file.seek(0, 1)
    while head := file.read(9):
        position, (opcode, size) = end, struct.unpack("<BQ", head)
        if not opcode:  # no record; in a file of zeros there would be one every 9 bytes
            raise ValueError(f"there is no record at byte {position}")
        end = position + 9 + size
        yield position, opcode, size
        file.seek(end)


def body(file: BinaryIO, opcode: int, size: int) -> bytes:
    """The record's body, read from where the file is."""
    limit = {Opcode.CHUNK: CHUNK_LIMIT, Opcode.MESSAGE: MESSAGE_LIMIT}.get(opcode, RECORD_LIMIT)
    if size > limit:
        raise FileError(f"a record of {size} bytes is over the limit of {limit >> 20} MiB")
    data = file.read(size)
    if len(data) != size:
        raise ValueError("the file ends within a record")
    return data


def inner_records(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """(where its body begins, opcode, size) of each record in a chunk."""
    position = 0
    while position < len(data):
        opcode, size = struct.unpack_from("<BQ", data, position)
        position += 9
        if position + size > len(data):
            raise ValueError("a chunk ends within a record")
        if opcode == Opcode.MESSAGE and not 22 <= size <= MESSAGE_LIMIT + 22:
            raise FileError(f"a message of {size} bytes is over the limit of {MESSAGE_LIMIT >> 20} MiB")
        yield position, opcode, size
        position += size


def parse(kind: type, data: bytes):
    """A record of the `mcap` library from its body."""
    return kind.read(ReadDataStream(BytesIO(data)))


def expanded(data: bytes, room: int = CHUNK_LIMIT) -> memoryview:
    """What a chunk's body holds, no more than it says it does. `room`: bytes that other open chunks leave to it."""
    chunk = parse(mcap.records.Chunk, data)
    size = chunk.uncompressed_size
    if size > CHUNK_LIMIT:
        raise FileError(f"a chunk of {size} bytes is over the limit of {CHUNK_LIMIT >> 20} MiB")
    if size > room:
        raise FileError(f"chunks of more than {OPEN_CHUNKS_LIMIT >> 20} MiB overlap in time: `mcap sort` orders them")
    if chunk.compression == "zstd":
        content = bytearray(size + 1)
        with zstandard.ZstdDecompressor().stream_reader(chunk.data, read_across_frames=True) as stream:
            content = memoryview(content)[: stream.readinto(content)]
    elif chunk.compression == "lz4":
        content, rest = bytearray(), chunk.data
        while rest and len(content) <= size:  # one frame after the other
            frame = lz4.frame.LZ4FrameDecompressor()
            content += frame.decompress(rest, max_length=size + 1 - len(content))
            rest = frame.unused_data
        content = memoryview(content)
    elif not chunk.compression:
        content = memoryview(chunk.data)
    else:
        raise FileError(f"its chunks are compressed as {chunk.compression!r}; known are zstd and lz4")
    if len(content) != size:
        raise ValueError(f"a chunk does not have the {size} bytes that it says")
    if chunk.uncompressed_crc and zlib.crc32(content) != chunk.uncompressed_crc:
        raise ValueError("a chunk does not have the checksum that it says")
    return content


def decompressed(data: bytes, limit: int) -> bytes:
    """The content of a zstd frame of at most `limit` bytes; no more than that is made. ValueError where it is not whole."""
    said, blocks, size = zstandard.frame_content_size(data), [], 0
    if said > limit:
        raise ValueError(f"{said} bytes are over the limit of {limit >> 20} MiB")
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as stream:
        while size <= limit and (block := stream.read(1 << 20)):
            blocks.append(block)
            size += len(block)
    if size > limit or said not in (-1, size):
        raise ValueError(f"{size} bytes came, and {said} were said")
    return b"".join(blocks)


# Files on the disk


def require_room(folder: Path, size: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if size + DISK_RESERVE > free:
        raise FileError(
            f"{what} takes {size / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: "
            "make room, or set TMPDIR to a folder that has it"
        )


def decompress_file(path: Path, target: Path) -> None:
    """Expands a zstd file, until the disk has no room left."""
    require_room(target.parent, path.stat().st_size, f"{path.name}, decompressed,")
    room = shutil.disk_usage(target.parent).free - DISK_RESERVE
    with path.open("rb") as source, target.open("wb") as out:
        with zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True) as stream:
            while block := stream.read(1 << 20):
                room -= len(block)
                if room < 0:
                    raise FileError(
                        f"{path.name}, decompressed, does not fit into {target.parent}: make room, or set TMPDIR"
                    )
                out.write(block)
