"""What both kinds of storage files have in common: limits, order of time, compressed files.

A storage file says which topics it holds, how often, from when to when, and gives its messages in the order of their
recording. Nothing that a file says of itself is taken for memory: records, chunks and messages have limits, and what
is compressed is expanded only as far as it says.

Why not `rosbags` (0.11): it refuses MCAP files without a profile or with a channel that is not ROS 2's, passes over
chunks that have no message index, and expands a chunk before it looks at its size; of SQLite it refuses files for what
playing them does not need, as QoS that it cannot parse, or types whose definition the recorder did not find.
"""

from __future__ import annotations

import heapq
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

MCAP_MAGIC = b"\x89MCAP0\r\n"
SQLITE_MAGIC = b"SQLite format 3\0"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

#: Bytes of one message: more than a raw image of 64 Mpixel with four channels.
MESSAGE_LIMIT = 300 << 20
#: Bytes of a topic's name, and of its type, in SQLite.
NAME_LIMIT = 1 << 16
#: Bytes (in MCAP characters) of what is said about a topic's QoS; more is none.
QOS_LIMIT = 1 << 14
#: Bytes of a message type's definition; more is none.
DEFINITION_LIMIT = 1 << 18
#: Bytes of QoS and definitions together that are kept of a file, and of a bag.
TEXTS_LIMIT = 1 << 24
#: Bytes that copying or decompressing a file leaves free on the disk.
DISK_RESERVE = 1 << 30

MAX_NS = 2**63 - 1

#: (time in ns, topic, type, bytes as they were stored)
Stored = tuple[int, str, str, bytes]
#: (time in ns of its first message, what opens it): messages by time
Source = tuple[int, Callable[[], Iterator[Stored]]]


class FileError(ValueError):
    """The file is sound but cannot be read here, or it says something that is not so; the text says what to do."""


@dataclass
class Channel:
    """A topic of one file: name, message type, encoding of its messages ("cdr"), and how many the file says it has.

    offered_qos, definition, type_hash: see `BagTopic`.
    """

    topic: str
    type: str
    encoding: str
    messages: int = 0
    offered_qos: str = ""
    definition: str = ""
    type_hash: str = ""


class StorageFile(Protocol):
    """The index of one storage file.

    Attributes: channels (by id), start_ns and end_ns of the first and the last message (None if there is none).
    """

    channels: dict[int, Channel]
    start_ns: int | None
    end_ns: int | None

    def messages(self, topics: Collection[str], start_ns: int | None) -> Iterator[Stored]:
        """Messages of `topics` at or after `start_ns`, by time."""


def in_time_order(sources: list[Source]) -> Iterator[Stored]:
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


def type_hash_of(said: object) -> str:
    """A type's hash as REP 2011 has it, or nothing."""
    return said if isinstance(said, str) and re.fullmatch("RIHS01_[0-9a-f]{64}", said) else ""


def ros_type(name: str) -> str:
    """ "sensor_msgs/msg/Image" for that, for ROS 1's way ("sensor_msgs/Image"), and for DDS' way to write it."""
    if dds := re.fullmatch(r"(\w+)::msg::dds_::(\w+)_", name):
        return f"{dds[1]}/msg/{dds[2]}"
    return name.replace("/", "/msg/") if name.count("/") == 1 else name


def decompressed(data: bytes, limit: int) -> bytes:
    """The content of a zstd frame of at most `limit` bytes; no more than that is made. ValueError where it is not whole."""
    import zstandard

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
    import zstandard

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
