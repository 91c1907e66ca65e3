"""`Bag`: a recording's topics, and its messages in the order of their recording."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from vla_perception.sources.bags.cameras import BagCamera, find_cameras, is_camera_image
from vla_perception.sources.bags.contents import (
    CAMERA_INFO,
    COMPRESSED_IMAGE,
    IMAGE,
    BagError,
    BagMessage,
    BagTopic,
    missing_library,
)
from vla_perception.sources.bags.folder import claimed_topics, first_bytes, storage_files
from vla_perception.sources.bags.sqlite_file import SqliteFile
from vla_perception.sources.bags.storage import (
    MCAP_MAGIC,
    MESSAGE_LIMIT,
    SQLITE_MAGIC,
    TEXTS_LIMIT,
    ZSTD_MAGIC,
    FileError,
    Source,
    StorageFile,
    decompress_file,
    decompressed,
    in_time_order,
)

#: Topics that are looked into for a camera's images; a recorded robot has some tens.
IMAGE_TOPICS_LIMIT = 500
#: Messages of a topic that are looked at for their encoding, if the first ones are empty.
LOOKED_AT = 5

_log = logging.getLogger("vla_perception.sources.bags")


class _NothingThere(BagError):
    """Messages that a file says it has are not in it."""


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
        self._scratch: list[tempfile.TemporaryDirectory] = []
        self._warned: set[str] = set()
        try:
            paths, claimed = self._storage_files()
            self._qos: dict[tuple[str, str], str] = {}
            self._definitions: dict[str, str] = {}
            self._files = [self._without_texts(self._open(file)) for file in paths]
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
        or `format` is left out, and so are topics without messages. They are looked at once. Raises BagError as
        `messages` does.
        """
        return list(self._image_topics)

    @cached_property
    def _image_topics(self) -> tuple[str, ...]:
        topics = [topic for topic in self.topics.values() if topic.type in (IMAGE, COMPRESSED_IMAGE) and topic.messages]
        if len(topics) > IMAGE_TOPICS_LIMIT:
            raise BagError(f"{self.path} has {len(topics)} image topics: name those to play")
        return tuple(topic.name for topic in topics if self._is_camera(topic))

    def camera_topics(self) -> list[str]:
        """What cameras published: `image_topics` and CameraInfo, sorted by name."""
        infos = [topic.name for topic in self.topics.values() if topic.type == CAMERA_INFO and topic.messages]
        return sorted(self.image_topics() + infos)

    def cameras(self, wanted: Mapping[str, str] | None = None) -> dict[str, BagCamera]:
        """The cameras that were recorded, by name; see `find_cameras`. Raises BagError if there is none, or not that."""
        types = {name: self.topics[name].type for name in self.camera_topics()}
        try:
            return find_cameras(types, wanted)
        except ValueError as error:
            raise BagError(f"{self.path}: {error}") from error

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
        sources: list[Source] = [
            (file.start_ns, partial(file.messages, topics, start_ns))
            for file in self._files
            if file.start_ns is not None
        ]
        stored = in_time_order(sources)
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
            cdr = self._cdr(data)
            counts[topic] += 1
            if cdr is None:
                skipped[topic] += 1
            else:
                yield BagMessage(topic, kind, time_ns, cdr)
        self._check_counts(counts, skipped, complete=start_ns is None)

    def _cdr(self, data: bytes) -> bytes | None:
        """The message: decompressed where the recorder compressed each (nothing but metadata.yaml tells). None if bad."""
        if data[:4] == ZSTD_MAGIC:
            try:
                data = decompressed(data, MESSAGE_LIMIT)
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
        files, unlisted, claimed = storage_files(self.path)
        if unlisted:
            self._warn(f"{', '.join(unlisted)}, not listed in metadata.yaml: left out (`ros2 bag reindex` lists all)")
        empty = [file for file in files if file.stat().st_size == 0]
        if len(empty) == len(files):
            raise BagError(f"{files[0]} is not a bag: the file is empty")
        for file in empty:  # the recorder was killed just after it had begun the file
            self._warn(f"{file.name} is empty")
        return [file for file in files if file not in empty], claimed

    def _folder(self) -> Path:
        self._scratch.append(tempfile.TemporaryDirectory(prefix="vla_perception_bag_"))
        return Path(self._scratch[-1].name)

    def _open(self, path: Path) -> StorageFile:
        try:
            magic = first_bytes(path)
            if magic[:4] == ZSTD_MAGIC:  # --compression-mode file
                target = self._folder() / path.name.removesuffix(".zstd")
                decompress_file(path, target)
                path, magic = target, first_bytes(target)
            # By what it is: `ros2 bag reindex` of Humble leaves metadata.yaml's storage_identifier empty.
            if magic[:8] == MCAP_MAGIC:
                from vla_perception.sources.bags.mcap_file import McapFile

                return McapFile(path)
            if magic == SQLITE_MAGIC:
                return SqliteFile(path, self._folder)
            raise ValueError("it begins neither as an MCAP nor as an SQLite file")
        except Exception as error:  # on damaged files, whatever the libraries raise comes through
            raise self._error(path, error) from error

    def _without_texts(self, file: StorageFile) -> StorageFile:
        """Takes what it says of QoS and types, of all files no more than of one: a split recording repeats it in each."""
        room = TEXTS_LIMIT - sum(len(text) for known in (self._qos, self._definitions) for text in known.values())
        for channel in file.channels.values():
            if (key := (channel.topic, channel.type)) not in self._qos and 0 < len(channel.offered_qos) <= room:
                self._qos[key] = channel.offered_qos
                room -= len(channel.offered_qos)
            if channel.type not in self._definitions and 0 < len(channel.definition) <= room:
                self._definitions[channel.type] = channel.definition
                room -= len(channel.definition)
            channel.offered_qos = channel.definition = ""
        return file

    def _error(self, path: Path, error: Exception) -> BagError:
        if isinstance(error, ImportError):
            return missing_library(error)
        said = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, MemoryError):
            said = "it takes more memory than there is"
        if isinstance(error, (FileError, OSError, MemoryError)):
            return BagError(f"cannot read the bag at {path}: {said}")
        return BagError(
            f"cannot read the bag at {path}: {said}. If the recording or a copy of it was cut off, `mcap recover` "
            "(MCAP) or `ros2 bag reindex` (SQLite) may save what is there"
        )

    def _merged_topics(self) -> tuple[dict[str, BagTopic], dict[str, str]]:
        """The topics of all files, and those that are not CDR with their encoding."""
        counts: dict[str, dict[str, int]] = {}
        hashes: dict[tuple[str, str], str] = {}
        others: dict[str, str] = {}
        for file in self._files:
            for channel in file.channels.values():
                if channel.encoding != "cdr":
                    others[channel.topic] = channel.encoding
                    continue
                kinds = counts.setdefault(channel.topic, {})
                kinds[channel.type] = kinds.get(channel.type, 0) + channel.messages
                key = channel.topic, channel.type
                hashes[key] = hashes.get(key) or channel.type_hash
        topics: dict[str, BagTopic] = {}
        for topic, kinds in counts.items():
            kind = max(kinds, key=kinds.__getitem__)
            qos, definition = self._qos.get((topic, kind), ""), self._definitions.get(kind, "")
            topics[topic] = BagTopic(topic, kind, kinds[kind], qos, definition, hashes[topic, kind])
            left = [f"{messages} as {other}" for other, messages in kinds.items() if messages and other != kind]
            if left:
                self._warn(f"{topic} was recorded as {kind}, and {', '.join(left)}, which are left out")
        others = {topic: encoding for topic, encoding in others.items() if topic not in topics}
        return dict(sorted(topics.items())), others

    def _compare(self, claimed: dict) -> None:
        """Warns of what metadata.yaml says and the files do not hold."""
        for name, kind, messages in claimed_topics(claimed):
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
