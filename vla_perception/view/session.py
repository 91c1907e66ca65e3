"""One open page: what it shows, and what it is sent. No sockets, no ROS, no clock."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vla_perception.tokens import VisualTokens
from vla_perception.view.analysis import JOINED, Palette, Patches, Pin, has_patches, spaces
from vla_perception.view.snapshot import Snapshot
from vla_perception.view.wire import Blobs

#: What is painted over the images.
MODES = ("colors", "similarity", "norm", "change", "image")
MAX_HZ = 60.0
#: Characters of a message from the page, and of a name in one.
MAX_MESSAGE, MAX_NAME = 1 << 14, 1000
#: Spaces of a message that are shown.
MAX_SPACES = 16


class Feed(Protocol):
    """Where snapshots come from. All methods may be called from any thread.

    Attributes:
        is_recording: whether snapshots are chosen by their index, and nothing comes by itself.
        title: what it is, for people.
    """

    is_recording: bool
    title: str

    def times(self, topic: str) -> Sequence[float]:
        """Seconds from a recording's begin to each of its snapshots; empty where it is live."""

    def tokenizers(self) -> list[dict[str, object]]:
        """`TokenizerHealth.summary` of each, the first one being that which a page begins with."""

    def details(self, topic: str) -> dict[str, object] | None:
        """`TokenizerHealth.details`, or None where there is no such tokenizer."""

    def samples(self, topic: str) -> list[dict[str, object]]:
        """Points of the curves, oldest first, with `ago_sec` of each."""

    def log_after(self, number: int) -> list[dict[str, object]]:
        """`LogBook.after`."""

    def snapshot(self, topic: str, index: int) -> Snapshot | None:
        """The latest one, or that of a recording at `index`."""

    def acquire(self, topic: str) -> None:
        """A page shows this tokenizer from here on, until it calls `release`."""

    def release(self, topic: str) -> None: ...

    def control(self, topic: str, action: str) -> str:
        """Does `activate`, `deactivate` or `encode`, and says what came of it. ValueError if that is not possible."""


@dataclass
class _Shown:
    """What the page shows now."""

    snapshot: Snapshot
    patches: dict[str, Patches] = field(default_factory=dict)
    before: dict[str, Patches] = field(default_factory=dict)

    def of(self, space: str) -> Patches:
        if space not in self.patches:
            self.patches[space] = Patches(self.snapshot.tokens, space)
        return self.patches[space]


class Session:
    """State of one page. Not for several threads at once.

    Args:
        feed: what it shows.
        palette: of all pages; a color means the same everywhere.
        hz: frames per second at most.

    Attributes:
        topic: of the tokenizer that is shown, empty for none.
        mode: one of `MODES`.
        paused: whether the page keeps what it shows.
        visible: whether the page is in view.
        hz: as the page has set it.
        index: of a recording.
        hidden: spaces that are not computed for it.
    """

    def __init__(self, feed: Feed, palette: Palette, hz: float) -> None:
        self._feed = feed
        self._palette = palette
        self.topic = ""
        self.mode = "colors"
        self.paused = False
        self.visible = True
        self._wants = False
        self.hz = hz
        self.index = 0
        self.hidden = frozenset({JOINED})
        self._shown: _Shown | None = None
        self._pin: Pin | None = None
        self._hold = False
        self._touched: _Shown | None = None  # what was shown when that place was pinned

    # From the page

    def receive(self, text: str) -> list[bytes]:
        """Takes in one message of the page and gives the answers. ValueError for what is none."""
        message = parse_message(text)
        handler = {
            "select": self._on_select,
            "visible": self._on_visible,
            "mode": self._on_mode,
            "pause": self._on_pause,
            "hz": self._on_hz,
            "hide": self._on_hide,
            "touch": self._on_touch,
            "untouch": self._on_untouch,
            "refit": self._on_refit,
            "seek": self._on_seek,
        }.get(str(message.get("type")))
        if handler is None:
            raise ValueError(f"unknown message {str(message.get('type'))[:100]!r}")
        try:
            return handler(message)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a message of the page lacks something: {error}") from error

    def _on_select(self, message: Mapping[str, object]) -> list[bytes]:
        self.select(_name(message["topic"]))
        return []

    def select(self, topic: str) -> None:
        """Shows another tokenizer; an empty topic: none."""
        if topic == self.topic:
            return
        self._want(False)
        self.topic, self._shown, self.index = topic, None, 0
        self._forget_pin()
        self._want(self.visible)

    def _on_visible(self, message: Mapping[str, object]) -> list[bytes]:
        """A page in a hidden tab wants no tokens."""
        visible = message["visible"] is True
        self._want(visible)
        self.visible = visible
        return []

    def _want(self, wanted: bool) -> None:
        if wanted != self._wants and self.topic:
            (self._feed.acquire if wanted else self._feed.release)(self.topic)
        self._wants = wanted and bool(self.topic)

    def _on_mode(self, message: Mapping[str, object]) -> list[bytes]:
        mode = message["mode"]
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}")
        self.mode = str(mode)
        return self._layers_again()

    def _on_pause(self, message: Mapping[str, object]) -> list[bytes]:
        self.paused = message["paused"] is True
        return []

    def _on_hz(self, message: Mapping[str, object]) -> list[bytes]:
        self.hz = min(max(_finite(message["hz"]), 0.1), MAX_HZ)
        return []

    def _on_hide(self, message: Mapping[str, object]) -> list[bytes]:
        names = message["spaces"]
        if not isinstance(names, list) or len(names) > MAX_SPACES:
            raise ValueError("spaces must be a short list of names")
        self.hidden = frozenset(map(_name, names))
        return self._layers_again()

    def _on_touch(self, message: Mapping[str, object]) -> list[bytes]:
        box = message["box"]
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError("box must be left, top, right, bottom")
        left, top, right, bottom = map(_finite, box)
        self._forget_pin()
        self._pin = Pin(_name(message["camera"]), (left, top, max(left, right), max(top, bottom)))
        self._hold = message["hold"] is True
        self._touched = self._shown if self._hold else None
        return self._layers_again()

    def _on_untouch(self, _message: Mapping[str, object]) -> list[bytes]:
        self._forget_pin()
        return self._layers_again()

    def _on_refit(self, _message: Mapping[str, object]) -> list[bytes]:
        self._palette.refit()
        return self._layers_again()

    def _on_seek(self, message: Mapping[str, object]) -> list[bytes]:
        index = int(_finite(message["index"]))
        if not 0 <= index < len(self._feed.times(self.topic)):
            raise ValueError(f"there is no message {index} in this recording")
        self.index = index
        return []

    def _forget_pin(self) -> None:
        self._pin, self._hold, self._touched = None, False, None

    # To the page

    @property
    def shown(self) -> Snapshot | None:
        return None if self._shown is None else self._shown.snapshot

    @property
    def touched(self) -> Snapshot | None:
        """The one that was shown when a place was pinned, to which later ones are compared; None without a pin."""
        return None if self._touched is None else self._touched.snapshot

    def next_frame(self) -> bytes | None:
        """The latest snapshot, or that at `index`, as a frame; None if the page shows it already, or is paused."""
        snapshot = self._feed.snapshot(self.topic, self.index)
        if snapshot is None or snapshot is self.shown or (self.paused and not self._feed.is_recording):
            return None
        return self.frame(snapshot)

    def frame(self, snapshot: Snapshot) -> bytes:
        """The message with images and layers of a snapshot, which is shown from here on."""
        shown = _Shown(snapshot)
        if self._shown is not None and self._shown.snapshot.tokens is snapshot.before:
            shown.before = self._shown.patches
        self._shown = shown
        blobs = Blobs()
        tokens = snapshot.tokens
        views = []
        for view, lazy in zip(tokens.views, snapshot.images):
            image = lazy.get() if lazy is not None else None
            views.append(
                {
                    "camera": view.camera,
                    "stamp_ms": view.stamp_ns / 1e6,
                    "width": view.width,
                    "height": view.height,
                    "affine": view.affine,
                    "roi": view.roi,
                    "valid": view.valid,
                    "image": None if image is None else blobs.add(image.data),
                    "image_kind": None if image is None else image.kind,
                    "image_late_ms": None if lazy is None else (lazy.stamp_ns - view.stamp_ns) / 1e6,
                }
            )
        header = {
            "type": "frame",
            "topic": snapshot.topic,
            "index": self.index,
            "sequence": tokens.sequence,
            "grid": tokens.grid if has_patches(tokens) else None,
            "first": _first_patch(tokens),
            "model": tokens.model,
            "weights": tokens.weights,
            "projector": tokens.projector,
            "views": views,
        }
        return blobs.pack(header | self._layers(shown, blobs))

    def _layers_again(self) -> list[bytes]:
        """Only what is painted over the images that the page shows already."""
        if self._shown is None:
            return []
        blobs = Blobs()
        tokens = self._shown.snapshot.tokens
        header = {"type": "layers", "topic": self._shown.snapshot.topic, "sequence": tokens.sequence}
        return [blobs.pack(header | self._layers(self._shown, blobs))]

    def _layers(self, shown: _Shown, blobs: Blobs) -> dict[str, object]:
        tokens = shown.snapshot.tokens
        layers = []
        there = spaces(tokens)[:MAX_SPACES] if has_patches(tokens) else ()
        for space in there:
            if space in self.hidden:
                continue
            patches = shown.of(space)
            layer: dict[str, object] = {"space": space, "norms": blobs.add(patches.norms)}
            if self.mode == "colors":
                layer["colors"] = blobs.add(self._palette.colors(tokens, space, patches))
            elif self.mode == "change":
                change = patches.change(self._before(shown, space))
                layer["change"] = None if change is None else blobs.add(change.astype(np.float32))
            elif self.mode == "similarity":
                reference = self._reference(shown, space)
                if reference is not None:
                    layer["similarity"] = blobs.add(patches.similarity(reference).astype(np.float32))
            layers.append(layer)
        return {"mode": self.mode, "spaces": there, "layers": layers, "pin": self._pin_told(shown)}

    @staticmethod
    def _before(shown: _Shown, space: str) -> Patches | None:
        """The patches of the message before the one that is shown; None where nothing can be compared."""
        before = shown.snapshot.before
        if space not in shown.before and before is not None:
            if before.fingerprint == shown.snapshot.tokens.fingerprint and space in spaces(before):
                shown.before[space] = Patches(before, space)
        return shown.before.get(space)

    def _origin(self, shown: _Shown) -> _Shown:
        """Where the vector that patches are compared to comes from: what was touched, if it is pinned; else this."""
        if not self._hold:
            return shown
        fingerprint = shown.snapshot.tokens.fingerprint
        if self._touched is None or self._touched.snapshot.tokens.fingerprint != fingerprint:
            self._touched = shown  # vectors of another model cannot be compared
        return self._touched

    def _reference(self, shown: _Shown, space: str) -> np.ndarray | None:
        """The vector that patches are compared to; None where nothing was touched, or no patch lies there."""
        if self._pin is None:
            return None
        origin = self._origin(shown)
        tokens = origin.snapshot.tokens
        pinned = self._pin.patches(tokens)
        if not pinned or space not in spaces(tokens):
            return None
        return origin.of(space).mean(tokens.cameras.index(self._pin.camera), pinned)

    def _pin_told(self, shown: _Shown) -> dict[str, object] | None:
        if self._pin is None:
            return None
        return {
            "camera": self._pin.camera,
            "box": self._pin.box,
            "patches": self._pin.patches(shown.snapshot.tokens),
            "hold": self._hold,
            "sequence": self._origin(shown).snapshot.tokens.sequence,
        }


def parse_message(text: str) -> dict[str, object]:
    """A message of the page. ValueError for what is none."""
    if len(text) > MAX_MESSAGE:
        raise ValueError("a message of the page is too long")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a message of the page is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ValueError("a message of the page is not an object")
    return message


def _first_patch(tokens: VisualTokens) -> int:
    """Tokens of a view before the first one that lies on the grid."""
    return tokens.shape[1] - tokens.grid[0] * tokens.grid[1] if has_patches(tokens) else 0


def _name(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise ValueError("a name must be a short text")
    return value


def _finite(value: object) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:  # JSON's whole numbers have any number of digits
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("a number must be finite")
    return number
