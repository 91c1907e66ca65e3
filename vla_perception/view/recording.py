"""The feed of a recording: its messages in the order of their times, read when a page asks for one. No ROS."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from vla_perception.tokens import VisualTokens
from vla_perception.view.recorded import BagFrames, ComputedFrames, Frames, TokenFileFrames
from vla_perception.view.snapshot import Snapshot

#: Snapshots that are kept, of all recordings: a page asks again when it changes what is painted.
KEPT = 16
#: Token files or bags of a folder that are listed.
MAX_FILES = 500


class RecordingFeed:
    """A `Feed` of one or several recordings, by their names; a context manager."""

    is_recording = True

    def __init__(self, frames: Sequence[Frames], title: str) -> None:
        self._frames = {one.name: one for one in frames}
        self._kept: OrderedDict[tuple[str, int], Snapshot] = OrderedDict()
        self._reading = threading.Lock()
        self.title = title

    def __enter__(self) -> RecordingFeed:
        return self

    def __exit__(self, *_exception: object) -> None:
        for frames in self._frames.values():
            frames.close()

    def times(self, topic: str) -> Sequence[float]:
        return self._frames[topic].times if topic in self._frames else ()

    def snapshot(self, topic: str, index: int) -> Snapshot | None:
        frames = self._frames.get(topic)
        if frames is None or not 0 <= index < len(frames.times):
            return None
        with self._reading:
            if (topic, index) not in self._kept:
                tokens, images = frames.read(index)
                self._kept[topic, index] = Snapshot(topic, tokens, images, self._before(frames, index))
            self._kept.move_to_end((topic, index))
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[topic, index]

    def _before(self, frames: Frames, index: int) -> VisualTokens | None:
        """The message before; of what is computed, only where it was shown."""
        if (kept := self._kept.get((frames.name, index - 1))) is not None:
            return kept.tokens
        return frames.read(index - 1)[0] if index and frames.is_quick else None

    def tokenizers(self) -> list[dict[str, object]]:
        return [self._summary(name) for name in self._frames]

    def _summary(self, topic: str) -> dict[str, object]:
        facts = self._facts(topic)
        return {
            "topic": topic,
            "node": "",
            "gone": False,
            "silent_sec": None,
            "state": "recording",
            "warns": False,
            **{key: facts.get(key, "") for key in ("model", "weights", "fingerprint")},
        }

    def details(self, topic: str) -> dict[str, object] | None:
        if topic not in self._frames:
            return None
        return self._summary(topic) | {
            "facts": self._facts(topic),
            "cameras": [],
            "timing": {},
            "problem": "",
            "reception": {"transport": "recording", "received": 0, "lost": 0, "gaps": 0, "restarts": 0, "rejected": 0},
            "out_hz": None,
            "age_ms": None,
            "events": [],
        }

    def _facts(self, topic: str) -> dict[str, str]:
        """Of a message that was read already: this is asked for ten times a second."""
        kept = next((kept for (of, _), kept in tuple(self._kept.items()) if of == topic), None)
        return {} if kept is None else kept.facts

    def samples(self, topic: str) -> list[dict[str, object]]:
        return []

    def log_after(self, number: int) -> list[dict[str, object]]:
        return []

    def acquire(self, topic: str) -> None: ...

    def release(self, topic: str) -> None: ...

    def control(self, topic: str, action: str) -> str:
        raise ValueError("a recording cannot be controlled")


def open_recording(path: Path, model: str | None = None) -> RecordingFeed:
    """The feed of a bag, a video, a folder of images, or of token files.

    Args:
        model: encodes what holds no tokens: whatever `VisualTokenizer.load` takes.

    Raises:
        ValueError, OSError: it cannot be read, or holds nothing to show.
    """
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"there is no {path}")
    files = sorted(path.rglob("*.safetensors"))[:MAX_FILES] if path.is_dir() else [path]
    if files and all(file.suffix == ".safetensors" for file in files):
        if model is not None:
            raise ValueError(f"{path} holds tokens already: leave --model out")
        names = {file: str(file.relative_to(path)) if path.is_dir() else file.name for file in files}
        return RecordingFeed([TokenFileFrames(file, name) for file, name in names.items()], path.name)
    if model is not None:
        return RecordingFeed(ComputedFrames.open(path, model), f"{path.name}, encoded by {model}")
    if path.is_dir() and not (path / "metadata.yaml").exists():
        bags = [file.parent for file in sorted(path.rglob("metadata.yaml"))[:MAX_FILES]]
        if bags:  # a run of `tokenize --format mcap`
            opened = [frames for bag in bags for frames in BagFrames.open(bag, str(bag.relative_to(path)))]
            return RecordingFeed(opened, path.name)
    return RecordingFeed(BagFrames.open(path), path.name)
