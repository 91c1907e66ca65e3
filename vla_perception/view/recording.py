"""The feed of a recording: its messages in the order of their times, read when a page asks for one. No ROS."""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

from vla_perception.images import decode
from vla_perception.sources.bags import COMPRESSED_IMAGE, Bag, BagMessage, compressed_format, header_stamp_ns
from vla_perception.tokens import FORMAT, VisualTokens
from vla_perception.view.snapshot import ImageHistory, LazyImage, PageImage, Snapshot, encode_rgb, stream_kind

#: Snapshots that are kept: a page asks again when it changes what is painted.
KEPT = 16
#: Seconds before a token message in which its images are looked for: longer than any encoding takes.
LOOK_BACK_SEC = 5.0


class Frames(Protocol):
    """The messages of a recording.

    Attributes:
        title: what it is, for people.
        topic: of the tokens, or what names them.
        times: seconds from the recording's begin, one per message.
    """

    title: str
    topic: str
    times: Sequence[float]

    def read(self, index: int) -> Snapshot:
        """ValueError or OSError where it cannot be read."""
        ...

    def close(self) -> None: ...


class RecordingFeed:
    """A `Feed` of one recording; a context manager."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._kept: OrderedDict[int, Snapshot] = OrderedDict()
        self._reading = threading.Lock()
        self.title, self.times = frames.title, frames.times

    def __enter__(self) -> RecordingFeed:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._frames.close()

    def snapshot(self, topic: str, index: int) -> Snapshot | None:
        if topic != self._frames.topic or not 0 <= index < len(self.times):
            return None
        with self._reading:
            if index not in self._kept:
                self._kept[index] = self._frames.read(index)
            self._kept.move_to_end(index)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[index]

    def tokenizers(self) -> list[dict[str, object]]:
        facts = self._facts()
        return [
            {
                "topic": self._frames.topic,
                "node": "",
                "gone": False,
                "silent_sec": None,
                "state": "recording",
                "warns": False,
                **{key: facts.get(key, "") for key in ("model", "weights", "fingerprint")},
            }
        ]

    def details(self, topic: str) -> dict[str, object] | None:
        if topic != self._frames.topic:
            return None
        return self.tokenizers()[0] | {
            "facts": self._facts(),
            "cameras": [],
            "timing": {},
            "reception": {"transport": "recording", "received": 0, "lost": 0, "gaps": 0, "restarts": 0, "rejected": 0},
            "out_hz": None,
            "age_ms": None,
            "events": [],
        }

    def _facts(self) -> dict[str, str]:
        """Of a message that was read already: this is asked for ten times a second."""
        kept = next(iter(tuple(self._kept.values())), None)
        if kept is None:
            return {}
        names = ("model", "weights", "fingerprint", "compute_dtype", "dtype", "projector", "token_strategy")
        return {name: str(getattr(kept.tokens, name)) for name in names}

    def samples(self, topic: str) -> list[dict[str, object]]:
        return []

    def log_after(self, number: int) -> list[dict[str, object]]:
        return []

    def acquire(self, topic: str) -> None: ...

    def release(self, topic: str) -> None: ...

    def control(self, topic: str, action: str) -> str:
        raise ValueError("a recording cannot be controlled")


def open_recording(path: Path, model: str | None = None) -> RecordingFeed:
    """The feed of a bag, a video, a folder of images, or a file of tokens.

    Args:
        model: encodes what holds no tokens.

    Raises:
        ValueError, OSError: it cannot be read, or holds nothing to show.
    """
    return RecordingFeed(BagFrames(path))


class BagFrames:
    """The token messages of a bag, with the images that were recorded beside them."""

    def __init__(self, path: Path) -> None:
        self._bag = Bag(path)
        counts = {
            name: topic.messages
            for name, topic in self._bag.topics.items()
            if topic.type == COMPRESSED_IMAGE and topic.messages and self._holds_tokens(name)
        }
        if not counts:
            self._bag.close()
            raise ValueError(f"{path} holds no token messages; give --model MODEL to encode its images")
        self.topic = max(counts, key=counts.__getitem__)
        self._cameras = self._bag.image_topics()
        self._times_ns = [message.time_ns for message in self._bag.messages([self.topic])]
        self.times: Sequence[float] = [(time_ns - self._times_ns[0]) / 1e9 for time_ns in self._times_ns]
        self.title = f"{path.name}, {self.topic}"

    def close(self) -> None:
        self._bag.close()

    def _holds_tokens(self, topic: str) -> bool:
        message = next(self._bag.messages([topic]), None)
        return message is not None and compressed_format(message.cdr) == FORMAT

    def read(self, index: int) -> Snapshot:
        time_ns = self._times_ns[index]
        # Messages may share a time; those of the topic are counted.
        before_ns = self._times_ns[index - 1] if index else time_ns
        skipped = self._times_ns[:index].count(time_ns) if before_ns == time_ns else 0
        history, before, tokens = ImageHistory(), None, None
        types = {topic: self._bag.topics[topic].type for topic in self._cameras}
        for message in self._bag.messages([self.topic, *self._cameras], time_ns - int(LOOK_BACK_SEC * 1e9)):
            if message.time_ns > time_ns:
                break
            if message.topic != self.topic:
                history.add(message.topic, header_stamp_ns(message.cdr), message.cdr)
                continue
            if message.time_ns == time_ns and not skipped:
                tokens = _tokens(message)
                break
            skipped -= message.time_ns == time_ns
            before = message
        if tokens is None:
            raise ValueError(f"{self._bag.path} lacks a message of {self.topic} that it had before")
        images = tuple(
            None if match is None else LazyImage(_image(types[match[0]], match[2]), match[1])
            for match in history.match(tokens.views, self._cameras)
        )
        return Snapshot(self.topic, tokens, images, None if before is None else _tokens(before))


def _tokens(message: BagMessage) -> VisualTokens:
    return VisualTokens.from_bytes(_Cdr(message.cdr).compressed_image().data)


def _image(kind: str, cdr: bytes) -> Callable[[], PageImage]:
    def make() -> PageImage:
        reader = _Cdr(cdr)
        if kind != COMPRESSED_IMAGE:
            return encode_rgb(decode.image_to_rgb(reader.image()))
        message = reader.compressed_image()
        stream = bytes(message.data)
        if (of := stream_kind(message.format, stream)) is not None:
            return PageImage(of, stream)
        return encode_rgb(decode.compressed_to_rgb(message))

    return make


class _Cdr:
    """Reads the two image messages out of their CDR bytes. ValueError where these are too short."""

    def __init__(self, cdr: bytes) -> None:
        self._data = memoryview(cdr)
        self._order = "<" if len(cdr) > 1 and cdr[1] & 1 else ">"
        self._at = 12  # behind the encapsulation and the stamp
        self._sequence()  # frame_id

    def compressed_image(self) -> SimpleNamespace:
        format = str(self._sequence()[:-1], "utf-8", "replace")
        return SimpleNamespace(format=format, data=self._sequence())

    def image(self) -> SimpleNamespace:
        height, width = self._number(), self._number()
        encoding = str(self._sequence()[:-1], "utf-8", "replace")
        is_bigendian = self._data[self._at]
        self._at += 1
        step = self._number()
        return SimpleNamespace(
            height=height, width=width, encoding=encoding, is_bigendian=is_bigendian, step=step, data=self._sequence()
        )

    def _number(self) -> int:
        self._at += -(self._at - 4) % 4
        try:
            (value,) = struct.unpack_from(f"{self._order}I", self._data, self._at)
        except struct.error:
            raise ValueError("a message ends too early") from None
        self._at += 4
        return value

    def _sequence(self) -> memoryview:
        """A string with its zero, or a sequence of bytes."""
        length = self._number()
        part = self._data[self._at : self._at + length]
        if len(part) < length:
            raise ValueError("a message ends too early")
        self._at += length
        return part
