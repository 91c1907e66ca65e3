"""From what a user names to recordings, and from recordings to frame sets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from vla_perception.images.streams import MAX_PIXELS
from vla_perception.printable import error_text, printable

#: Characters of a recording's name.
_MAX_NAME = 100


class SourceError(ValueError):
    """A source that cannot be read as what it seems to be; the text says what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(error_text(text))  # it quotes names of any content


class DamagedError(SourceError):
    """A source that is what it seems to be, and damaged."""


class FrameError(ValueError):
    """One frame that cannot be read, while those after it may be."""


@dataclass(frozen=True)
class FrameSet:
    """One image per camera.

    Attributes:
        ordinal: its place among all frame sets of the recording, from 0, also of those that are left out.
        time_ns: when it was recorded, nanoseconds of the recording's clock.
        timestamp: seconds since the recording's first frame, as the dataset says it where it is one.
        stamps_ns, frame_ids: of each camera's image, as a message's header has them.
        images: gives uint8 RGB [height, width, 3] per camera; ValueError or OSError if one cannot be read.
        values: what was recorded beside the images, such as the action: name → array.
    """

    ordinal: int
    time_ns: int
    timestamp: float
    stamps_ns: tuple[int, ...]
    frame_ids: tuple[str, ...]
    images: Callable[[], Sequence[np.ndarray]]
    values: Mapping[str, np.ndarray] = field(default_factory=dict)


class Recording(Protocol):
    """What becomes one token file.

    Attributes:
        name: of that file, without its suffix; may have one folder in front.
        kind: ``bag``, ``images``, ``video`` or ``lerobot``.
        source: what the user named.
        files: what is read, for digests.
        cameras: names of the views, in their order.
        seconds: how long it is; 0 where that is not known.
        details: what else the index says about it, as JSON.
        problems: filled while `frame_sets` runs: what could not be made a frame set at all.
    """

    name: str
    kind: str
    source: str
    files: list[Path]
    cameras: tuple[str, ...]
    seconds: float
    details: dict[str, object]
    problems: Problems

    def expected_sets(self) -> int:
        """About how many frame sets there are."""
        ...

    def frame_sets(self) -> Iterator[FrameSet]:
        """All frame sets in order, each time from the beginning; ValueError or OSError where the recording breaks off."""
        ...


class Problems:
    """What was damaged: how many, and the first reasons."""

    SHOWN = 20

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.shown) < self.SHOWN:
            self.shown.append(printable(text)[:300])

    def clear(self) -> None:
        self.count = 0
        self.shown.clear()


@dataclass(frozen=True)
class Selection:
    """Which part of the sources is wanted, and how cameras are matched; the names are those of the command's options.

    Attributes:
        cameras: (name, topic or key or subfolder, "" to look for it) per view; empty: all that there are.
        values: name → ``TOPIC:FIELD``, of bags.
        every: of the frame sets, each so many-th.
        rate: at most so many frame sets per second of the recording; 0: all.
        episodes: of datasets; None: all.
        sync_policy, sync_slop_sec, max_age_sec: as the node's parameters.
        image_rate: frames per second that a folder of images is taken for.
    """

    cameras: tuple[tuple[str, str], ...] = ()
    values: tuple[tuple[str, str], ...] = ()
    every: int = 1
    rate: float = 0.0
    episodes: frozenset[int] | None = None
    sync_policy: str = "approximate"
    sync_slop_sec: float = 0.05
    max_age_sec: float = 0.5
    image_rate: float = 1.0
    max_image_pixels: int = MAX_PIXELS

    def settings(self) -> dict[str, object]:
        """What the index says of it, as JSON."""
        return {
            "cameras": [f"{name}={where}" if where else name for name, where in self.cameras],
            "values": [f"{name}={where}" for name, where in self.values],
            **{
                name: getattr(self, name)
                for name in ("every", "rate", "sync_policy", "sync_slop_sec", "max_age_sec", "image_rate")
            },
            "max_image_pixels": self.max_image_pixels,
        }


def parse_cameras(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``["front=/camera/color/image_raw", "wrist"]`` → (name, where) pairs. ValueError if they make no sense."""
    return _named("--cameras", texts, "NAME or NAME=TOPIC, NAME=KEY, NAME=FOLDER", "camera")


def parse_values(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``["action=/arm/command:position"]`` → (name, where) pairs. ValueError if they make no sense."""
    pairs = _named("--values", texts, "NAME=TOPIC[:FIELD]", "value")
    for text, (_, where) in zip(texts, pairs):
        if not where:
            raise ValueError(f"--values {text!r}: expected NAME=TOPIC[:FIELD]")
    return pairs


def _named(option: str, texts: Sequence[str], expected: str, what: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in texts:
        name, _, where = text.partition("=")
        if not name or len(name) > 200:
            raise ValueError(f"{option} {text!r}: expected {expected}")
        pairs.append((name, where))
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"{option} names one {what} twice: {' '.join(names)}")
    return tuple(pairs)


def parse_episodes(text: str) -> frozenset[int]:
    """``0,2,5-9`` → numbers."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if match is None:
            raise ValueError(f"--episodes {text!r}: expected numbers and ranges such as 0,2,5-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > 10_000_000:
            raise ValueError(f"--episodes {text!r}: {part} is not a range")
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def open_recordings(
    sources: Sequence[str | Path], selection: Selection, damaged: list[dict[str, str]] | None = None
) -> list[Recording]:
    """The recordings of all sources, with different names, in the order of the sources.

    Args:
        damaged: takes what is damaged (name, source, error), which is an error where not given.

    Raises:
        SourceError: one of them is nothing that can be read, or lacks what was asked for.
    """
    from vla_perception.offline import bag_recordings, image_recordings, lerobot, video_recordings

    recordings: list[Recording] = []
    images: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        kind = _kind(path)
        if kind == "image":
            images.append(path)
            continue
        try:
            if kind == "images":
                recordings.append(image_recordings.open_folder(path, selection))
            elif kind == "video":
                recordings.append(video_recordings.VideoRecording(path, selection))
            elif kind == "lerobot":
                recordings += lerobot.episodes(path, selection)
            else:
                recordings.append(bag_recordings.BagRecording(path, selection))
        except DamagedError as error:
            if damaged is None:
                raise
            damaged.append({"name": safe_name(path.stem), "source": str(path), "error": str(error)[:500]})
    if images:
        recordings.append(image_recordings.ImageRecording("images", str(images[0].parent), images, selection))
    if not recordings and damaged:
        raise DamagedError(damaged[0]["error"])
    if selection.episodes is not None and not any(recording.kind == "lerobot" for recording in recordings):
        raise SourceError("--episodes selects episodes of LeRobot datasets, and no source is one")
    if selection.values and not any(recording.kind == "bag" for recording in recordings):
        raise SourceError(
            "--values names topics of bags, and no source is a bag; a dataset's values come by themselves"
        )
    _tell_apart(recordings)
    return recordings


def check_topics(recordings: Sequence[Recording], topics: Sequence[str]) -> None:
    """SourceError where a bag lacks one of the topics that are to be copied, or no recording is a bag."""
    from vla_perception.offline.bag_recordings import BagRecording

    bags = [recording for recording in recordings if isinstance(recording, BagRecording)]
    if not bags:
        raise SourceError("--copy-topics names topics of bags, and no source is a bag")
    for bag in bags:
        absent = [topic for topic in topics if f"/{topic.lstrip('/')}" not in bag.recorded_topics]
        if absent:
            raise SourceError(f"{bag.source} has no {absent[0]} to copy; it has {', '.join(bag.recorded_topics)}")


def _kind(path: Path) -> str:
    """What a path is: image, images, video, lerobot or bag. By its content for folders, by its suffix for files."""
    from vla_perception.offline.image_recordings import SUFFIXES as IMAGES
    from vla_perception.offline.video_recordings import SUFFIXES as VIDEOS

    if not path.exists():
        raise SourceError(f"there is no {path}")
    if path.is_dir():
        if (path / "meta" / "info.json").is_file():
            return "lerobot"
        names = [entry.name.lower().removesuffix(".zstd") for entry in path.iterdir()]
        if "metadata.yaml" in names or any(name.endswith((".mcap", ".db3")) for name in names):
            return "bag"
        folders = [entry for entry in path.iterdir() if entry.is_dir()]
        if any(Path(name).suffix in IMAGES for name in names) or any(
            Path(entry.name.lower()).suffix in IMAGES for folder in folders for entry in folder.iterdir()
        ):
            return "images"
        videos = sorted(name for name in names if Path(name).suffix in VIDEOS)
        raise SourceError(
            f"{path} holds neither images nor a bag nor a LeRobot dataset"
            + (f", but videos: name them themselves, as {path / videos[0]}" if videos else "")
            + (": name what lies in it, such as one of its folders" if folders and not videos else "")
        )
    suffix = Path(path.name.lower().removesuffix(".zstd")).suffix
    if suffix in IMAGES:
        return "image"
    if suffix in VIDEOS:
        return "video"
    if suffix in (".mcap", ".db3"):
        return "bag"
    raise SourceError(
        f"{path} is not an image, a recording or a folder of them; read are images ({' '.join(sorted(IMAGES))}), "
        f"videos ({' '.join(sorted(VIDEOS))}), bags (.mcap .db3), folders of images, and LeRobot datasets"
    )


def safe_name(text: str) -> str:
    """Part of a file name that any system takes, from a name of any content."""
    name = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("._")[:_MAX_NAME]
    return name or "recording"


def _tell_apart(recordings: Sequence[Recording]) -> None:
    """Puts the parent folder's name in front where two recordings have the same name."""
    names = Counter(recording.name for recording in recordings)
    for recording in recordings:
        if names[recording.name] > 1:
            recording.name = f"{safe_name(Path(recording.source).resolve().parent.name)}/{recording.name}"
    names = Counter(recording.name for recording in recordings)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        sources = [recording.source for recording in recordings if recording.name == twice[0]]
        raise SourceError(
            f"{' and '.join(sources)} would be written into the same file {twice[0]}: give them in two runs, each "
            "with its own --out"
        )


def selected(recording: Recording, selection: Selection) -> Iterator[FrameSet]:
    """The frame sets that `every` and `rate` leave."""
    last_slot: int | None = None
    first_ns: int | None = None
    for frames in recording.frame_sets():
        if frames.ordinal % selection.every:
            continue
        if selection.rate > 0:
            # The first in each period of the rate's grid, which begins with the first frame; half a microsecond is
            # granted to stamps that were rounded.
            first_ns = frames.stamps_ns[0] if first_ns is None else first_ns
            slot = int((frames.stamps_ns[0] - first_ns + 500) * selection.rate // 10**9)
            if last_slot is not None and slot == last_slot:
                continue
            last_slot = slot
        yield frames


def expected_sets(recording: Recording, selection: Selection) -> int:
    """About how many frame sets `selected` gives."""
    count = -(-recording.expected_sets() // selection.every)
    at_rate = int(recording.seconds * selection.rate) + 1
    return min(count, at_rate) if selection.rate and recording.seconds else count
