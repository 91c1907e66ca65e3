"""MCAP storage files, through the `mcap` library's records."""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Collection, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import lz4.frame
import mcap.records
import zstandard
from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode

from vla_perception.sources.bags.storage import (
    DEFINITION_LIMIT,
    MCAP_MAGIC,
    MESSAGE_LIMIT,
    QOS_LIMIT,
    TEXTS_LIMIT,
    Channel,
    FileError,
    Source,
    Stored,
    encoding_of,
    in_time_order,
    ros_type,
    type_hash_of,
)

#: Bytes of a chunk, and of all chunks that are open at once because their times overlap.
CHUNK_LIMIT = 512 << 20
OPEN_CHUNKS_LIMIT = 1 << 30
#: Bytes that are made room for before a chunk is expanded; rosbag2's chunks are smaller.
_ROOM = 1 << 24
#: Bytes of any other record that is read (a schema, the statistics, …), and number of chunks of a file.
RECORD_LIMIT = 16 << 20
CHUNKS_LIMIT = 2_000_000


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
        self._room = TEXTS_LIMIT  # of QoS and definitions
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
            sources: list[Source] = [
                (chunk[0], partial(opened.read, file, chunk[2], wanted, start))
                for chunk in self._chunks
                if chunk[1] >= start and (not chunk[3] or not chunk[3].isdisjoint(wanted))
            ]
            if self._loose[0]:
                sources.append((0, partial(self._loose_messages, file, wanted, start)))
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
        schemas: dict[int, tuple[str, str]] = {}
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
        self._room = TEXTS_LIMIT
        schemas: dict[int, tuple[str, str]] = {}
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

    def _define(self, opcode: int, data: bytes | memoryview, schemas: dict[int, tuple[str, str]]) -> None:
        if opcode == Opcode.SCHEMA:
            schema = parse(mcap.records.Schema, data)
            known = schemas.get(schema.id)  # repeated in each chunk
            schemas[schema.id] = schema.name, known[1] if known else self._definition(schema)
            return
        channel = parse(mcap.records.Channel, data)
        if channel.id not in self.channels:
            qos = channel.metadata.get("offered_qos_profiles", "")
            name, definition = schemas.get(channel.schema_id, ("", ""))
            self.channels[channel.id] = Channel(
                channel.topic,
                ros_type(name),
                encoding_of(channel.message_encoding),
                offered_qos=qos if self._may_keep(len(qos), QOS_LIMIT) else "",
                definition=definition,
                type_hash=type_hash_of(channel.metadata.get("topic_type_hash")),
            )

    def _definition(self, schema: mcap.records.Schema) -> str:
        known = schema.encoding in ("ros2msg", "ros2idl") and self._may_keep(len(schema.data), DEFINITION_LIMIT)
        return schema.data.decode(errors="replace") if known else ""

    def _may_keep(self, size: int, limit: int) -> bool:
        fits = size <= min(limit, self._room)
        self._room -= size if fits else 0
        return fits

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
    limits: dict[int, int] = {Opcode.CHUNK: CHUNK_LIMIT, Opcode.MESSAGE: MESSAGE_LIMIT}
    limit = limits.get(opcode, RECORD_LIMIT)
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


def parse(kind: Any, data: bytes | memoryview) -> Any:
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
        content = _unpacked(chunk.data, size + 1)
    elif chunk.compression == "lz4":
        buffer, rest = bytearray(), chunk.data
        while rest and len(buffer) <= size:  # one frame after the other
            frame = lz4.frame.LZ4FrameDecompressor()
            buffer += frame.decompress(rest, max_length=size + 1 - len(buffer))
            rest = frame.unused_data
        content = memoryview(buffer)
    elif not chunk.compression:
        content = memoryview(chunk.data)
    else:
        raise FileError(f"its chunks are compressed as {chunk.compression!r}; known are zstd and lz4")
    if len(content) != size:
        raise ValueError(f"a chunk does not have the {size} bytes that it says")
    if chunk.uncompressed_crc and zlib.crc32(content) != chunk.uncompressed_crc:
        raise ValueError("a chunk does not have the checksum that it says")
    return content


def _unpacked(data: bytes, limit: int) -> memoryview:
    """The first `limit` bytes of zstd frames. Room is made for what is there, not for what the file says."""
    buffer, filled = bytearray(min(limit, _ROOM)), 0
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as stream:
        while True:
            with memoryview(buffer)[filled:] as room:
                count = stream.readinto(room)
            filled += count
            if not count or filled == limit:
                return memoryview(buffer)[:filled]
            if filled == len(buffer):
                buffer += bytes(min(limit - filled, filled))
