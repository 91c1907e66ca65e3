"""Rosbag2 recordings, read without ROS: MCAP and SQLite, through the `rosbags` library.

    with Bag("examples/sample_bag") as bag:
        for message in bag.messages(bag.camera_topics()):
            message.topic, message.type, message.time_ns, message.cdr

Messages come as the CDR bytes that were recorded. `header_stamp_ns`, `with_header_stamp` and `compressed_format`
look into those bytes without knowing the message type's definition.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from rosbags.rosbag2 import Reader

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"

# What the `format` of a token message of any schema version starts with.
TOKEN_FORMAT_PREFIX = "safetensors; vla_tokens/"


class BagError(ValueError):
    """The path is no bag that can be read, or the bag lacks what was asked for; the text says what to do."""


@dataclass(frozen=True)
class BagTopic:
    """A topic of a bag: its name, message type ("sensor_msgs/msg/Image") and number of messages."""

    name: str
    type: str
    messages: int


@dataclass(frozen=True)
class BagMessage:
    """A recorded message: when it was recorded (ns since the epoch) and its CDR bytes with encapsulation header."""

    topic: str
    type: str
    time_ns: int
    cdr: bytes


class Bag:
    """A bag, open for reading: a folder with `metadata.yaml`, a single `.mcap` or a single `.db3` file.

    Attributes:
        path: where it is.
        topics: dict name → BagTopic, sorted by name.
        start_ns, end_ns: time of the first and the last message, ns since the epoch (0 if there is none).

    A context manager; `close` does the same. Raises BagError where the path is missing, no bag, or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not str(path):
            raise BagError("no bag given: name a folder with metadata.yaml, an .mcap or a .db3 file")
        if not self.path.exists():
            raise BagError(f"no bag at {self.path}: there is no such file or folder")
        try:
            self._reader = Reader(_readable(self.path))
            self._reader.open()
        except BagError:
            raise
        except Exception as error:  # on damaged files, whatever its parsers below raise comes through
            raise BagError(_damaged(self.path, error)) from error
        # A topic recorded with several types (rare, but legal) counts as its first type's.
        self._connections = {}
        topics: dict[str, BagTopic] = {}
        for connection in self._reader.connections:
            known = topics.get(connection.topic)
            if known is not None and known.type != connection.msgtype:
                continue
            messages = connection.msgcount + (known.messages if known else 0)
            topics[connection.topic] = BagTopic(connection.topic, connection.msgtype, messages)
            self._connections.setdefault(connection.topic, []).append(connection)
        self.topics = dict(sorted(topics.items()))
        empty = self._reader.message_count == 0
        self.start_ns = 0 if empty else self._reader.start_time
        self.end_ns = 0 if empty else self._reader.end_time - 1  # rosbags' end is behind the last message

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._reader.is_open:
            self._reader.close()

    @property
    def seconds(self) -> float:
        """From the first message to the last."""
        return (self.end_ns - self.start_ns) / 1e9

    def image_topics(self) -> list[str]:
        """Topics with pictures, found by type: Image and CompressedImage, sorted.

        Token messages are CompressedImage too: a topic whose first message says so in its `format` is left out,
        and so are topics without messages.
        """
        found = []
        for topic in self.topics.values():
            if topic.messages and (
                topic.type == IMAGE or (topic.type == COMPRESSED_IMAGE and not self._has_tokens(topic.name))
            ):
                found.append(topic.name)
        return found

    def camera_topics(self) -> list[str]:
        """What cameras published: `image_topics` and their CameraInfo, sorted by name."""
        infos = [topic.name for topic in self.topics.values() if topic.type == CAMERA_INFO and topic.messages]
        return sorted(self.image_topics() + infos)

    def messages(self, topics: Collection[str] | None = None, start_ns: int | None = None) -> Iterator[BagMessage]:
        """Messages in the order of their recording, of all topics or of `topics`, at or after `start_ns`.

        Raises BagError at once on a topic that the bag lacks (the text lists those it has), and while iterating
        if the file turns out to be damaged.
        """
        wanted = list(self.topics) if topics is None else list(topics)
        absent = [topic for topic in wanted if topic not in self.topics]
        if absent:
            raise BagError(f"no topic {', '.join(absent)} in {self.path}; it has {self._listing()}")
        return self._messages([c for topic in wanted for c in self._connections[topic]], start_ns)

    def _messages(self, connections: list, start_ns: int | None) -> Iterator[BagMessage]:
        if not connections:  # rosbags takes an empty list for all of them
            return
        messages = self._reader.messages(connections, start=start_ns)
        while True:
            # Only the read is guarded: an exception of the caller's is none of the bag's.
            try:
                connection, time_ns, cdr = next(messages)
            except StopIteration:
                return
            except Exception as error:
                raise BagError(_damaged(self.path, error)) from error
            yield BagMessage(connection.topic, connection.msgtype, time_ns, bytes(cdr))

    def _has_tokens(self, topic: str) -> bool:
        first = next(self.messages([topic]), None)
        return first is not None and compressed_format(first.cdr).startswith(TOKEN_FORMAT_PREFIX)

    def _listing(self) -> str:
        if not self.topics:
            return "no topics"
        return ", ".join(f"{topic.name} ({topic.type})" for topic in self.topics.values())


def _readable(path: Path) -> Path:
    """The path that rosbags takes: the folder or the file itself. BagError with advice on anything else."""
    if path.is_dir():
        if (path / "metadata.yaml").exists():
            return path
        files = sorted(file for file in path.iterdir() if file.suffix in (".mcap", ".db3"))
        if len(files) == 1:  # a recording that was cut off before metadata.yaml was written
            return files[0]
        if files:
            raise BagError(
                f"{path} has {len(files)} recordings but no metadata.yaml: "
                f"`ros2 bag reindex {path}` writes it, or name one of the files"
            )
        raise BagError(f"{path} is not a bag: it has neither metadata.yaml nor an .mcap or .db3 file")
    if path.name == "metadata.yaml":
        return path.parent
    if path.suffix not in (".mcap", ".db3"):
        raise BagError(
            f"{path} is not a bag: expected a folder with metadata.yaml, an .mcap or a .db3 file"
            + (" (ROS 1 bags are converted by `rosbags-convert`)" if path.suffix == ".bag" else "")
        )
    if path.stat().st_size == 0:
        raise BagError(f"{path} is not a bag: the file is empty")
    return path


def _damaged(path: Path, error: Exception) -> str:
    said = str(error).rstrip(".") or type(error).__name__
    return (
        f"cannot read the bag at {path}: {said}. If the recording or a copy of it was cut off, `mcap recover` "
        "(MCAP) or `ros2 bag reindex` (SQLite) may save what is there"
    )


def header_stamp_ns(cdr: bytes) -> int:
    """The stamp (ns) of a message whose first field is a std_msgs/Header. ValueError on bytes too short for it."""
    order = _byte_order(cdr)
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", cdr, 4)
    return seconds * 1_000_000_000 + nanoseconds


def with_header_stamp(cdr: bytes, stamp_ns: int) -> bytes:
    """The message with another stamp (ns since the epoch) in its header, which must be its first field.

    Everything else stays as it is, byte for byte. ValueError on bytes too short for a header.
    """
    order = _byte_order(cdr)
    return cdr[:4] + struct.pack(f"{order}iI", *divmod(stamp_ns, 1_000_000_000)) + cdr[12:]


def compressed_format(cdr: bytes) -> str:
    """The `format` of a serialised CompressedImage; "" if the bytes are not one."""
    try:
        order = _byte_order(cdr)
        (length,) = struct.unpack_from(f"{order}I", cdr, 12)
        position = 16 + length
        position += -(position - 4) % 4  # CDR aligns relative to the end of its 4 bytes of encapsulation
        (length,) = struct.unpack_from(f"{order}I", cdr, position)
        return cdr[position + 4 : position + 4 + length].rstrip(b"\0").decode()
    except (ValueError, struct.error):
        return ""


def _byte_order(cdr: bytes) -> str:
    """ "<" or ">": the second byte of the encapsulation says which."""
    if len(cdr) < 12:
        raise ValueError(f"{len(cdr)} bytes are too few for a message with a header")
    return "<" if cdr[1] & 1 else ">"
