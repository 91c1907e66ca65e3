"""What can be shown of a recording: token messages of a bag, token files, or what a model computes. No ROS."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vla_perception.sources.bags import (
    COMPRESSED_IMAGE,
    Bag,
    BagError,
    BagMessage,
    compressed_format,
    header_stamp_ns,
)
from vla_perception.sources.bags.cdr import read_compressed_image, read_image
from vla_perception.tokens import VisualTokens
from vla_perception.tokens.message import FORMAT
from vla_perception.view.snapshot import ImageHistory, LazyImage, PageImage, encode_rgb, page_image

if TYPE_CHECKING:
    from vla_perception.offline.recordings import FrameSet, Recording
    from vla_perception.tokenizer import VisualTokenizer

#: Seconds before a token message in which its images are looked for: longer than any encoding takes.
LOOK_BACK_SEC = 5.0
Images = tuple[LazyImage | None, ...]


class Frames(Protocol):
    """The messages of one recording.

    Attributes:
        name: what the list of tokenizers calls it.
        times: seconds from the recording's begin, one per message.
        is_quick: whether any of them is read at once.
    """

    name: str
    times: Sequence[float]
    is_quick: bool

    def read(self, index: int) -> tuple[VisualTokens, Images]:
        """ValueError or OSError where it cannot be read."""
        ...

    def close(self) -> None: ...


class BagFrames:
    """The token messages of one topic of a bag, with the images that were recorded beside them.

    Without any beside them, a bag of `tokenize --format mcap` shows those of its source.
    """

    is_quick = True

    def __init__(self, path: Path, topic: str, name: str) -> None:
        self.name = name
        self._topic = topic
        self._bag = Bag(path)
        self._cameras = self._bag.image_topics()
        self._times_ns = [message.time_ns for message in self._bag.messages([topic])]
        self.times: Sequence[float] = [(time_ns - self._times_ns[0]) / 1e9 for time_ns in self._times_ns]
        self._source: _SourceImages | None = None
        if not self._cameras:
            from vla_perception.offline.run_index import bag_entry

            with contextlib.suppress(ValueError, OSError):  # the bag is a file, or the entry is damaged
                entry = bag_entry(path.parent, path.name)
                self._source = None if entry is None else _SourceImages(entry)

    @classmethod
    def open(cls, path: Path, prefix: str = "") -> list[BagFrames]:
        """One for each topic of tokens, called prefix and topic. ValueError where there is none."""
        try:
            with Bag(path) as bag:
                topics = [
                    name
                    for name, topic in bag.topics.items()
                    if topic.type == COMPRESSED_IMAGE and topic.messages and _holds_tokens(bag, name)
                ]
        except BagError as error:
            if path.is_dir() and not (path / "metadata.yaml").exists() or path.suffix not in (".mcap", ".db3", ""):
                raise ValueError(f"{path} holds no tokens; --model MODEL encodes its images") from error
            raise
        if not topics:
            raise ValueError(f"{path} holds no token messages; --model MODEL encodes its images")
        return [cls(path, topic, f"{prefix}{topic}") for topic in topics]

    def close(self) -> None:
        self._bag.close()

    def read(self, index: int) -> tuple[VisualTokens, Images]:
        time_ns = self._times_ns[index]
        first = index
        while first and self._times_ns[first - 1] == time_ns:
            first -= 1  # messages may share a time
        skip, history, tokens = index - first, ImageHistory(), None
        for message in self._bag.messages([self._topic, *self._cameras], time_ns - int(LOOK_BACK_SEC * 1e9)):
            if message.topic != self._topic:
                with contextlib.suppress(ValueError):  # too short for a header: that image is left out
                    history.add(message.topic, header_stamp_ns(message.cdr), message.cdr)
            elif message.time_ns == time_ns:
                if not skip:
                    tokens = VisualTokens.from_bytes(read_compressed_image(message.cdr).data)
                    break
                skip -= 1
        if tokens is None:
            raise ValueError(f"{self._bag.path} lacks a message of {self._topic} that it had before")
        if self._source is not None:
            return tokens, self._source.of(tokens)
        types = {topic: self._bag.topics[topic].type for topic in self._cameras}
        images = tuple(
            None if match is None else LazyImage(partial(_recorded_image, types[match[0]], match[2]), match[1])
            for match in history.match(tokens.views, self._cameras)
        )
        return tokens, images


def _holds_tokens(bag: Bag, topic: str) -> bool:
    message: BagMessage | None = next(bag.messages([topic]), None)
    return message is not None and compressed_format(message.cdr) == FORMAT


def _recorded_image(kind: str, cdr: bytes) -> PageImage:
    return page_image(read_compressed_image(cdr) if kind == COMPRESSED_IMAGE else read_image(cdr))


class _FrameSets:
    """Frame sets of a recording by their place; going back reads it from its begin."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._sets: Iterator[FrameSet] | None = None
        self._last: FrameSet | None = None
        self._at = -1

    def get(self, index: int) -> FrameSet:
        """ValueError where the recording has no such frame set."""
        return self._until(lambda frames, at: at >= index, index < self._at)

    def of_stamp(self, stamp_ns: int) -> FrameSet:
        """The one whose first image has this stamp. ValueError where there is none."""
        behind = self._last is not None and self._last.stamps_ns[0] > stamp_ns
        frames = self._until(lambda frames, at: frames.stamps_ns[0] >= stamp_ns, behind)
        if frames.stamps_ns[0] != stamp_ns:
            raise ValueError(f"{self._recording.source} has no image of {stamp_ns} ns")
        return frames

    def _until(self, reached: Callable[[FrameSet, int], bool], begin_anew: bool) -> FrameSet:
        if self._sets is None or begin_anew:
            self._sets, self._last, self._at = self._recording.frame_sets(), None, -1
        while self._last is None or not reached(self._last, self._at):
            self._last = next(self._sets, None)
            self._at += 1
            if self._last is None:
                self._sets = None
                raise ValueError(f"{self._recording.source} ends before that frame")
        return self._last


class _SourceImages:
    """The images of tokens that `vla-perception tokenize` wrote, where their source still lies where it was.

    Args:
        recording: what the file or the index says of it.
    """

    def __init__(self, recording: Mapping) -> None:
        self._source, self._name = str(recording.get("source", "")), str(recording.get("name", ""))
        self._sets: _FrameSets | None = None
        self._cameras: tuple[str, ...] | None = None

    def of(self, tokens: VisualTokens) -> Images:
        if self._cameras is None:
            self._cameras = self._open()
        if self._sets is None or self._cameras != tuple(view.camera for view in tokens.views):
            return (None,) * len(tokens.views)
        sets = self._sets

        def make(view: int) -> PageImage:
            return encode_rgb(np.asarray(sets.of_stamp(tokens.stamp_ns).images()[view]))

        return tuple(LazyImage(partial(make, view), of.stamp_ns) for view, of in enumerate(tokens.views))

    def _open(self) -> tuple[str, ...]:
        """The cameras; none where the source is not there."""
        if not self._source:
            return ()
        from vla_perception.offline.recordings import Selection, open_recordings

        try:
            for recording in open_recordings([self._source], Selection()):
                if recording.name.rpartition("/")[2] == self._name.rpartition("/")[2]:
                    self._sets = _FrameSets(recording)
                    return tuple(recording.cameras)
        except (ValueError, OSError, ImportError):
            pass  # moved since, or of a kind that a library is missing for: the tokens alone are shown
        return ()


class TokenFileFrames:
    """A file that `vla-perception tokenize` or "Save message" wrote."""

    is_quick = True

    def __init__(self, path: Path, name: str) -> None:
        from vla_perception.offline.token_file import TokenFile

        self.name = name
        self._file = TokenFile(path)
        first = float(self._file.timestamps[0])
        self.times: Sequence[float] = [float(seconds) - first for seconds in self._file.timestamps]
        recording = self._file.metadata.get("recording")
        self._images = _SourceImages(recording if isinstance(recording, Mapping) else {})

    def close(self) -> None:
        self._file.close()

    def read(self, index: int) -> tuple[VisualTokens, Images]:
        tokens = self._file.frame(index)
        return tokens, self._images.of(tokens)


class ComputedFrames:
    """What a model makes of a recording's images, when they are looked at."""

    is_quick = False

    def __init__(self, recording: Recording, tokenizer: VisualTokenizer) -> None:
        self.name = recording.name
        self._sets = _FrameSets(recording)
        self._cameras = recording.cameras
        self._tokenizer = tokenizer
        # Of a video or a dataset's episode, whose frames would all have to be decoded.
        rate = recording.details.get("rate_hz") or recording.details.get("fps")
        if isinstance(rate, float) and rate > 0:
            self.times: Sequence[float] = [index / rate for index in range(recording.expected_sets())]
        else:
            self.times = [frames.timestamp for frames in recording.frame_sets()]

    @classmethod
    def open(cls, path: Path, model: str) -> list[ComputedFrames]:
        """One per recording in a path."""
        from vla_perception import startup
        from vla_perception.offline.recordings import Selection, open_recordings
        from vla_perception.tokenizer.checkpoints.open import check_model

        check_model(model)
        recordings = open_recordings([path], Selection())
        with startup.Progress() as progress:
            progress(f"loading {model}", begins=True)
            with startup.imports():
                from vla_perception.tokenizer.tokenizer import VisualTokenizer
            tokenizer = VisualTokenizer.load(model)
        return [cls(recording, tokenizer) for recording in recordings]

    def close(self) -> None: ...

    def read(self, index: int) -> tuple[VisualTokens, Images]:
        from vla_perception.tokens.local import tokenize

        frames = self._sets.get(index)
        images = [np.asarray(image) for image in frames.images()]
        tokens = tokenize(
            self._tokenizer,
            dict(zip(self._cameras, images)),
            sequence=index,
            features=self._tokenizer.config.projector != "none",
        )
        views = tuple(
            replace(view, stamp_ns=stamp_ns, frame_id=frame_id)
            for view, stamp_ns, frame_id in zip(tokens.views, frames.stamps_ns, frames.frame_ids)
        )
        shown = tuple(
            LazyImage(lambda image=image: encode_rgb(image), stamp_ns)  # type: ignore[misc]
            for image, stamp_ns in zip(images, frames.stamps_ns)
        )
        return replace(tokens, views=views), shown
