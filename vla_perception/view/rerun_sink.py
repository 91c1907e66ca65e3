"""What a page shows, sent to a Rerun viewer or into its file: images, colors over them, rates, latencies, log.

rerun-sdk is not in any extra (764 MB installed): `pip install rerun-sdk`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vla_perception.tokens import View
from vla_perception.view.analysis import Palette, Patches, has_patches, spaces
from vla_perception.view.session import Feed
from vla_perception.view.snapshot import MAX_SHOWN_PIXELS, Snapshot
from vla_perception.visualization.overlay import overlay

_LEVELS = {"warning": "WARN", "error": "ERROR", "fatal": "CRITICAL"}


class RerunSink:
    """Sends to the viewer that it starts, or into `file`.

    Raises:
        ValueError: rerun-sdk is not installed, or its viewer cannot be started.
    """

    def __init__(self, file: Path | None = None) -> None:
        try:
            import rerun
        except ImportError as error:
            raise ValueError(f"{error}; pip install rerun-sdk") from error
        self._rerun: Any = rerun
        self._palette = Palette()
        self._line = 0
        rerun.init("vla_perception")
        if file is not None:
            rerun.save(file)
        else:
            try:
                rerun.spawn()
            except Exception as error:  # noqa: BLE001 - whatever keeps it from starting
                raise ValueError(f"Rerun's viewer does not start: {error}") from error

    def run(self, feed: Feed, hz: float, *, rounds: Iterable[int] | None = None) -> None:
        """Sends what is new of every tokenizer, until Ctrl-C, or so often as `rounds` has numbers."""
        acquired: set[str] = set()
        last: dict[str, Snapshot] = {}
        try:
            for number in itertools.repeat(0) if rounds is None else rounds:
                for tokenizer in feed.tokenizers():
                    topic = str(tokenizer["topic"])
                    if topic not in acquired:
                        feed.acquire(topic)
                        acquired.add(topic)
                    times = feed.times(topic)
                    if times and number >= len(times):
                        continue
                    snapshot = feed.snapshot(topic, number)
                    if snapshot is not None and snapshot is not last.get(topic):
                        last[topic] = snapshot
                        self.send(snapshot)
                    self._send_health(feed, topic)
                self._send_log(feed)
                time.sleep(1 / hz)
        finally:
            for topic in acquired:
                feed.release(topic)

    def send(self, snapshot: Snapshot) -> None:
        """One message, at its views' stamps."""
        rerun, tokens = self._rerun, snapshot.tokens
        for index, (view, lazy) in enumerate(zip(tokens.views, snapshot.images)):
            rerun.set_time("stamp", timestamp=np.datetime64(view.stamp_ns, "ns"))
            image = lazy.get() if lazy is not None else None
            path = [snapshot.topic.strip("/"), view.camera]
            if image is not None:
                encoded = rerun.EncodedImage(contents=image.data, media_type=image.kind)
                rerun.log(rerun.new_entity_path([*path, "image"]), encoded)
            if not has_patches(tokens) or not view.valid:
                continue
            for space in spaces(tokens):
                patches = Patches(tokens, space)
                colors = self._palette.colors(tokens, space, patches)[index].reshape(*tokens.grid, 3)
                painted = overlay(colors, view, size=_shown_size(view))
                rerun.log(rerun.new_entity_path([*path, space]), rerun.Image(painted))

    def _send_health(self, feed: Feed, topic: str) -> None:
        rerun = self._rerun
        samples = feed.samples(topic)
        if not samples:
            return
        rerun.set_time("time", timestamp=time.time())
        for name, value in samples[-1].items():
            if name not in ("time", "ago_sec") and isinstance(value, (int, float)):
                rerun.log(rerun.new_entity_path([topic.strip("/"), "health", name]), rerun.Scalars([value]))

    def _send_log(self, feed: Feed) -> None:
        rerun = self._rerun
        for line in feed.log_after(self._line):
            self._line = int(line["number"])  # type: ignore[call-overload]
            rerun.set_time("time", timestamp=float(line["stamp_sec"]))  # type: ignore[arg-type]
            text = f"{line['node']}: {line['text']}"
            rerun.log("log", rerun.TextLog(text, level=_LEVELS.get(str(line["level"]), "WARN")))


def _shown_size(view: View) -> tuple[int, int]:
    """(height, width) in which a view is painted, with no more pixels than are of use."""
    pixels = max(1, view.height) * max(1, view.width)
    scale = min(1.0, (MAX_SHOWN_PIXELS / pixels) ** 0.5)
    return max(1, min(4096, round(view.height * scale))), max(1, min(4096, round(view.width * scale)))
