"""Rosbag2 recordings, read without ROS: MCAP and SQLite.

    with Bag("examples/sample_bag") as bag:
        for message in bag.messages(bag.camera_topics()):
            message.topic, message.type, message.time_ns, message.cdr

Messages come as the CDR bytes that were recorded. `header_stamp_ns`, `with_header_stamp`, `compressed_format` and
`image_encoding` look into those bytes without knowing the message type's definition.

What counts is what the storage files hold. `metadata.yaml` says which files there are and how they are compressed;
where its topics, counts or QoS differ from the files, the files are right, and a warning names what differs.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from vla_perception.printable import printable

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"

# What the `format` of a token message of any schema version starts with.
TOKEN_FORMAT_PREFIX = "safetensors;"

#: Encodings of sensor_msgs/image_encodings with a color or a brightness in them. 16UC1, 32FC1 (depth), 32SC1 (labels)
#: and the like have none.
CAMERA_ENCODING = re.compile(
    r"(rgb|bgr|rgba|bgra|mono)(8|16)|8UC[134]|16UC[34]|bayer_[rgb]{4}(8|16)"
    r"|yuv422(_yuy2)?|uyvy|yuyv|yuv420|i420|nv\d\d",
    re.IGNORECASE,
)
#: Topics that are looked into for a camera's images; a recorded robot has some tens.
IMAGE_TOPICS_LIMIT = 500
#: Messages of a topic that are looked at for their encoding, if the first ones are empty.
LOOKED_AT = 5
#: Bytes of a metadata.yaml: some thousand topics.
METADATA_LIMIT = 8 << 20

_log = logging.getLogger(__name__)


class BagError(ValueError):
    """The path is no bag that can be read, or the bag lacks what was asked for; the text says what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))  # it quotes names of any content


class _NothingThere(BagError):
    """Messages that a file says it has are not in it."""


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
        topics: dict name → BagTopic, sorted by name; those whose messages are not CDR are left out.
        start_ns, end_ns: time of the first and the last message, ns since the epoch (0 if there is none).

    A context manager; `close` does the same. Raises BagError where the path is missing, no bag, or damaged, or a
    library is missing. What is odd but can be read is a warning of the logger `vla_perception.sources.bags`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path))
        if not str(path):
            raise BagError("no bag given: name a folder with metadata.yaml, an .mcap or a .db3 file")
        if not self.path.exists():
            raise BagError(f"no bag at {self.path}: there is no such file or folder")
        try:
            from vla_perception.sources import bag_files
        except ImportError as error:
            raise BagError(
                f"{error} in {sys.executable}; bags are read with the package mcap: pip install mcap"
            ) from error
        self._library = bag_files
        self._scratch: list[tempfile.TemporaryDirectory] = []
        self._warned: set[str] = set()
        try:
            paths, claimed = self._storage_files()
            self._files = [self._open(file) for file in paths]
        except BaseException:
            self.close()
            raise
        self.topics, self._not_cdr = self._merged_topics()
        self._compare(claimed)
        starts = [file.start_ns for file in self._files if file.start_ns is not None]
        self.start_ns = min(starts, default=0)
        self.end_ns = max((file.end_ns for file in self._files if file.end_ns is not None), default=0)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for folder in self._scratch:
            folder.cleanup()
        self._scratch.clear()

    @property
    def seconds(self) -> float:
        """From the first message to the last."""
        return (self.end_ns - self.start_ns) / 1e9

    def image_topics(self) -> list[str]:
        """Topics with a camera's images, sorted: Image and CompressedImage by type, and by what was recorded.

        Depth, labels and token messages have those types too: a topic whose first messages say so in their `encoding`
        or `format` is left out, and so are topics without messages. Raises BagError as `messages` does.
        """
        topics = [topic for topic in self.topics.values() if topic.type in (IMAGE, COMPRESSED_IMAGE) and topic.messages]
        if len(topics) > IMAGE_TOPICS_LIMIT:
            raise BagError(f"{self.path} has {len(topics)} image topics: name those to play")
        return [topic.name for topic in topics if self._is_camera(topic)]

    def camera_topics(self) -> list[str]:
        """What cameras published: `image_topics` and CameraInfo, sorted by name."""
        infos = [topic.name for topic in self.topics.values() if topic.type == CAMERA_INFO and topic.messages]
        return sorted(self.image_topics() + infos)

    def messages(self, topics: Collection[str] | None = None, start_ns: int | None = None) -> Iterator[BagMessage]:
        """Messages in the order of their recording, of all topics or of `topics`, at or after `start_ns`.

        Raises BagError at once on a topic that the bag lacks (the text lists those it has), and while iterating
        if the file turns out to be damaged, or a topic of which it says that there are messages has none.
        """
        wanted = list(self.topics) if topics is None else list(topics)
        absent = [topic for topic in wanted if topic not in self.topics]
        if absent:
            raise BagError(f"no topic {', '.join(absent)} in {self.path}; it has {self._listing()}")
        return self._messages(frozenset(wanted), start_ns)

    def _messages(self, topics: frozenset[str], start_ns: int | None) -> Iterator[BagMessage]:
        counts, skipped = dict.fromkeys(topics, 0), dict.fromkeys(topics, 0)
        sources = [
            (file.start_ns, lambda file=file: file.messages(topics, start_ns))
            for file in self._files
            if file.start_ns is not None
        ]
        stored = self._library.in_time_order(sources)
        while True:
            # Only the read is guarded: an exception of the caller's is none of the bag's.
            try:
                time_ns, topic, kind, data = next(stored)
            except StopIteration:
                break
            except Exception as error:
                raise self._error(self.path, error) from error
            if kind != self.topics[topic].type:
                continue  # recorded with several types (rare, but legal): it counts as that of most messages
            data = self._cdr(data)
            counts[topic] += 1
            if data is None:
                skipped[topic] += 1
            else:
                yield BagMessage(topic, kind, time_ns, data)
        self._check_counts(counts, skipped, complete=start_ns is None)

    def _cdr(self, data: bytes) -> bytes | None:
        """The message: decompressed where the recorder compressed each (nothing but metadata.yaml tells). None if bad."""
        if data[:4] == self._library.ZSTD_MAGIC:
            try:
                data = self._library.decompressed(data, self._library.MESSAGE_LIMIT)
            except Exception:  # the library's own errors, of a frame that is damaged
                return None
        # The encapsulation header: a representation below 0x0100 (of CDR: 0 and 1; XCDR2: 6 to 11), and two bytes more.
        return data if len(data) >= 4 and data[0] == 0 and data[1] < 12 else None

    def _check_counts(self, counts: dict[str, int], skipped: dict[str, int], *, complete: bool) -> None:
        for topic, bad in skipped.items():
            if bad and bad == counts[topic]:
                raise _NothingThere(
                    f"none of the {bad} messages of {topic} in {self.path} is CDR, or zstd with CDR in it"
                )
            if bad:
                self._warn(f"{bad} of {counts[topic]} messages of {topic} are not CDR and were skipped")
        for topic, found in counts.items():
            claimed = self.topics[topic].messages
            if complete and not found and claimed:
                raise _NothingThere(f"{self.path} says that it has {claimed} messages of {topic}, and holds none")
            if complete and found != claimed:
                self._warn(f"it says that it has {claimed} messages of {topic}, and holds {found}")

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            _log.warning("%s: %s", self.path, text)

    # Cameras

    def _is_camera(self, topic: BagTopic) -> bool:
        try:
            for message in islice(self.messages([topic.name]), LOOKED_AT):
                verdict = is_camera_image(message)
                if verdict is not None:
                    return verdict
        except _NothingThere as error:
            self._warn(str(error))
        return False

    # Files

    def _storage_files(self) -> tuple[list[Path], dict]:
        """The storage files, expanded where they are compressed, and what metadata.yaml says (nothing without one)."""
        path = self.path.parent if self.path.name == "metadata.yaml" else self.path
        claimed: dict = {}
        if path.is_dir():
            if (path / "metadata.yaml").exists():
                claimed = _read_metadata(path / "metadata.yaml")
            files = _listed_files(path, claimed)
            listed = {file.name.removesuffix(".zstd") for file in files}
            unlisted = [file.name for file in _storage_in(path) if file.name.removesuffix(".zstd") not in listed]
            if unlisted:
                self._warn(
                    f"{', '.join(unlisted)}, not listed in metadata.yaml: left out (`ros2 bag reindex` lists all)"
                )
        else:
            files = [_checked_name(path)]
        empty = [file for file in files if file.stat().st_size == 0]
        if len(empty) == len(files):
            raise BagError(f"{files[0]} is not a bag: the file is empty")
        for file in empty:  # the recorder was killed just after it had begun the file
            self._warn(f"{file.name} is empty")
        return [file for file in files if file not in empty], claimed

    def _folder(self) -> Path:
        self._scratch.append(tempfile.TemporaryDirectory(prefix="vla_perception_bag_"))
        return Path(self._scratch[-1].name)

    def _open(self, path: Path):
        library = self._library
        try:
            magic = _first_bytes(path)
            if magic[:4] == library.ZSTD_MAGIC:  # --compression-mode file
                target = self._folder() / path.name.removesuffix(".zstd")
                library.decompress_file(path, target)
                path, magic = target, _first_bytes(target)
            # By what it is: `ros2 bag reindex` of Humble leaves metadata.yaml's storage_identifier empty.
            if magic[:8] == library.MCAP_MAGIC:
                return library.McapFile(path)
            if magic == library.SQLITE_MAGIC:
                return library.SqliteFile(path, self._folder)
            raise ValueError("it begins neither as an MCAP nor as an SQLite file")
        except Exception as error:  # on damaged files, whatever the libraries raise comes through
            raise self._error(path, error) from error

    def _error(self, path: Path, error: Exception) -> BagError:
        said = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, MemoryError):
            said = "it takes more memory than there is"
        if isinstance(error, (self._library.FileError, OSError, MemoryError)):
            return BagError(f"cannot read the bag at {path}: {said}")
        return BagError(
            f"cannot read the bag at {path}: {said}. If the recording or a copy of it was cut off, `mcap recover` "
            "(MCAP) or `ros2 bag reindex` (SQLite) may save what is there"
        )

    def _merged_topics(self) -> tuple[dict[str, BagTopic], dict[str, str]]:
        """The topics of all files, and those that are not CDR with their encoding."""
        counts: dict[str, dict[str, int]] = {}
        others: dict[str, str] = {}
        for file in self._files:
            for channel in file.channels.values():
                if channel.encoding != "cdr":
                    others[channel.topic] = channel.encoding
                    continue
                kinds = counts.setdefault(channel.topic, {})
                kinds[channel.type] = kinds.get(channel.type, 0) + channel.messages
        topics: dict[str, BagTopic] = {}
        for topic, kinds in counts.items():
            kind = max(kinds, key=kinds.__getitem__)
            topics[topic] = BagTopic(topic, kind, kinds[kind])
            left = [f"{messages} as {other}" for other, messages in kinds.items() if messages and other != kind]
            if left:
                self._warn(f"{topic} was recorded as {kind}, and {', '.join(left)}, which are left out")
        others = {topic: encoding for topic, encoding in others.items() if topic not in topics}
        return dict(sorted(topics.items())), others

    def _compare(self, claimed: dict) -> None:
        """Warns of what metadata.yaml says and the files do not hold."""
        for name, kind, messages in _claimed_topics(claimed):
            if name in self._not_cdr:
                continue
            topic = self.topics.get(name)
            if topic is None or (messages and not topic.messages):
                if messages:
                    self._warn(f"metadata.yaml says that {name} has {messages} messages; the recording has none of it")
            elif kind != topic.type:
                self._warn(f"metadata.yaml says that {name} is {kind}; it was recorded as {topic.type}")

    def _listing(self) -> str:
        listed = ", ".join(f"{topic.name} ({topic.type})" for topic in self.topics.values()) or "no topics"
        if self._not_cdr:
            others = ", ".join(f"{topic} ({encoding})" for topic, encoding in self._not_cdr.items())
            listed += f", and as other than CDR, which cannot be played, {others}"
        return listed


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _is_storage(path: Path) -> bool:
    return path.name.lower().removesuffix(".zstd").endswith((".mcap", ".db3")) and path.is_file()


def _checked_name(path: Path) -> Path:
    """The file itself. BagError with advice where its name is not that of a recording."""
    if _is_storage(path):
        return path
    raise BagError(
        f"{path} is not a bag: expected a folder with metadata.yaml, an .mcap or a .db3 file"
        + (" (ROS 1 bags are converted by `rosbags-convert`)" if path.suffix == ".bag" else "")
    )


def _listed_files(folder: Path, claimed: dict) -> list[Path]:
    """The storage files of a folder, in the order of metadata.yaml. BagError with advice where they are not there."""
    there = _storage_in(folder)
    listed = claimed.get("relative_file_paths")
    # Never outside of the folder, and each once. Until Foxy the paths began with the folder's name.
    names = [PurePosixPath(name).name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    names = list({name.removesuffix(".zstd"): _as_it_lies(folder, name) for name in names if name}.values())
    if names:
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise BagError(
                f"{folder}: metadata.yaml lists {', '.join(absent)}, not there: copy what is missing, play the files "
                f"that are there by name, or move them into a folder of their own and `ros2 bag reindex` it"
            )
        return [folder / name for name in names]
    if len(there) == 1 or (there and claimed):  # a recording that was cut off before metadata.yaml was written
        return there
    if there:
        raise BagError(
            f"{folder} has {len(there)} recordings but no metadata.yaml: "
            f"`ros2 bag reindex {folder}` writes it, or name one of the files"
        )
    if claimed:
        raise BagError(f"cannot read the bag at {folder}: metadata.yaml lists no files, and there are none")
    raise BagError(f"{folder} is not a bag: it has neither metadata.yaml nor an .mcap or .db3 file")


def _storage_in(folder: Path) -> list[Path]:
    """A folder's storage files. Of one that lies there compressed and expanded, the expanded one."""
    there = sorted(filter(_is_storage, folder.iterdir()))
    return [file for file in there if file.suffix != ".zstd" or file.with_suffix("") not in there]


def _as_it_lies(folder: Path, name: str) -> str:
    """The name, with or without .zstd: the recorder may have been killed before it compressed, or somebody expanded it."""
    other = name.removesuffix(".zstd") if name.endswith(".zstd") else f"{name}.zstd"
    return other if (folder / other).is_file() and not (folder / name).is_file() else name


def _read_metadata(path: Path) -> dict:
    """`rosbag2_bagfile_information`. BagError where the file has none."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        def flatten_mapping(self, node):
            """Leaves `<<` as it is, which is an error then: a few of them in each other would fill the memory."""

    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        if path.stat().st_size > METADATA_LIMIT:
            raise ValueError(f"it is larger than {METADATA_LIMIT >> 20} MiB")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
        information = content["rosbag2_bagfile_information"]
        if not isinstance(information, dict):
            raise ValueError("rosbag2_bagfile_information is not a mapping")
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise BagError(
            f"cannot read the bag at {path.parent}: metadata.yaml: {said}. Without the file a single recording is "
            "played as it is, and `ros2 bag reindex` writes a new one"
        ) from error
    return information


def _claimed_topics(claimed: dict) -> Iterator[tuple[str, str, int]]:
    """(name, type, messages) of each topic that metadata.yaml lists; what is not written as it should be is left out."""
    topics = claimed.get("topics_with_message_count")
    for entry in topics if isinstance(topics, list) else []:
        try:
            name, kind = entry["topic_metadata"]["name"], entry["topic_metadata"]["type"]
            if isinstance(name, str) and isinstance(kind, str):  # as text, nested aliases would be without end
                yield name, kind, _whole(entry["message_count"])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue


def _whole(value: Any) -> int:
    """A count, also where YAML has read it as text ("10", 1e5, 0x10, 1_000)."""
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            value = float(value)
    value = int(value)
    if not 0 <= value < 2**64:
        raise ValueError("no count")
    return value


def is_camera_image(message: BagMessage) -> bool | None:
    """Whether an Image or CompressedImage is a camera's, by its encoding; None if it does not say."""
    if message.type == IMAGE:
        encoding = image_encoding(message.cdr)
        return bool(CAMERA_ENCODING.fullmatch(encoding.strip())) if encoding.strip() else None
    if message.type != COMPRESSED_IMAGE:
        return False
    said = compressed_format(message.cdr)
    first = said.split(";")[0].strip()
    if said.startswith(TOKEN_FORMAT_PREFIX) or "compresseddepth" in said.lower():
        return False
    if CAMERA_ENCODING.fullmatch(first):  # "bgr8; jpeg compressed bgr8"
        return True
    if re.fullmatch(r"(8|16|32|64)[USF]C\d+", first, re.IGNORECASE):  # "16UC1; png compressed 16UC1"
        return False
    data = _compressed_data(message.cdr)
    if data[:4] == b"\x89PNG":  # 16 bits of grey: depth, unless the format has said mono16
        return len(data) > 25 and not (data[24] == 16 and data[25] == 0)
    if data[:2] == b"\xff\xd8":
        return True
    return (first.lower() in ("jpeg", "jpg", "png", "")) if data else None


def header_stamp_ns(cdr: bytes) -> int:
    """The stamp (ns) of a message whose first field is a std_msgs/Header. ValueError on bytes too short for it."""
    order = _byte_order(cdr)
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", cdr, 4)
    return seconds * 1_000_000_000 + nanoseconds


def with_header_stamp(cdr: bytes, stamp_ns: int) -> bytes:
    """The message with another stamp (ns since the epoch) in its header, which must be its first field.

    Everything else stays as it is, byte for byte. ValueError on bytes too short for a header, and on a stamp whose
    seconds do not fit into the 32 bits that the message has for them (until 2038).
    """
    order = _byte_order(cdr)
    if not -(2**31) <= stamp_ns // 1_000_000_000 < 2**31:
        raise ValueError(f"a header cannot hold the stamp {stamp_ns} ns: its seconds have 32 bits")
    return cdr[:4] + struct.pack(f"{order}iI", *divmod(stamp_ns, 1_000_000_000)) + cdr[12:]


def compressed_format(cdr: bytes) -> str:
    """The `format` of a serialised CompressedImage; "" if the bytes are not one."""
    try:
        return _string(cdr, _string(cdr, 12)[1])[0]
    except (ValueError, struct.error):
        return ""


def image_encoding(cdr: bytes) -> str:
    """The `encoding` of a serialised Image; "" if the bytes are not one."""
    try:
        return _string(cdr, _aligned(_string(cdr, 12)[1]) + 8)[0]  # behind frame_id, height and width
    except (ValueError, struct.error):
        return ""


def _compressed_data(cdr: bytes) -> bytes:
    """The first bytes of a serialised CompressedImage's `data`; none if the bytes are not one."""
    try:
        start = _aligned(_string(cdr, _string(cdr, 12)[1])[1]) + 4
        return cdr[start : start + 32]
    except (ValueError, struct.error):
        return b""


def _string(cdr: bytes, position: int) -> tuple[str, int]:
    """The string whose length is at `position`, or at the next aligned place, and where it ends."""
    position = _aligned(position)
    (length,) = struct.unpack_from(f"{_byte_order(cdr)}I", cdr, position)
    end = position + 4 + length
    return cdr[position + 4 : end].rstrip(b"\0").decode(), end


def _aligned(position: int) -> int:
    return position + -(position - 4) % 4  # CDR aligns relative to the end of its 4 bytes of encapsulation


def _byte_order(cdr: bytes) -> str:
    """ "<" or ">": the second byte of the encapsulation says which."""
    if len(cdr) < 12:
        raise ValueError(f"{len(cdr)} bytes are too few for a message with a header")
    return "<" if cdr[1] & 1 else ">"
