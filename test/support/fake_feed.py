"""A feed for the page without ROS: token messages of random values, put in by a test."""

from __future__ import annotations

import time

import numpy as np

from vla_perception.tokens import View, VisualTokens
from vla_perception.view.health import LogBook, Status, TokenizerHealth
from vla_perception.view.snapshot import LazyImage, Snapshot, encode_rgb

GRID, HEIGHT, WIDTH = (6, 8), 120, 160
ENCODERS = ({"name": "dinov2", "channels": [0, 12]}, {"name": "siglip", "channels": [12, 20]})


def random_tokens(
    sequence=0, cameras=("front", "wrist"), *, seed=None, features=True, channels=16, grid=GRID, **changes
) -> VisualTokens:
    rng = np.random.default_rng(sequence if seed is None else seed)
    patches = grid[0] * grid[1]
    affine = (grid[1] / WIDTH, 0.0, 0.0, 0.0, grid[0] / HEIGHT, 0.0)
    stamp_ns = time.time_ns()
    values = {
        "data": rng.normal(size=(len(cameras), patches, channels)).astype(np.float32),
        "features": rng.normal(size=(len(cameras), patches, 20)).astype(np.float32) if features else None,
        "dtype": "float32",
        "views": tuple(View(name, f"{name}_optical", stamp_ns, HEIGHT, WIDTH, affine) for name in cameras),
        "sequence": sequence,
        "model": "test",
        "weights": "checkpoint",
        "fingerprint": "ab" * 32,
        "compute_dtype": "float32",
        "grid": grid,
        "token_strategy": "patch",
        "pool": 1,
        "encoders": ENCODERS,
        "projector": "linear",
    }
    return VisualTokens(**values | changes)


def snapshot_of(tokens: VisualTokens, topic="/tokens", before=None) -> Snapshot:
    pixels = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    images = tuple(LazyImage(lambda: encode_rgb(pixels), view.stamp_ns) for view in tokens.views)
    return Snapshot(topic, tokens, images, before)


class FakeFeed:
    """One tokenizer whose messages and diagnostics a test gives."""

    is_recording = False

    def __init__(self, topic="/tokens") -> None:
        self.title, self.topic = "a test", topic
        self.changed = lambda: None
        self.health = TokenizerHealth(topic, "/visual_tokenizer")
        self.log = LogBook()
        self.latest: Snapshot | None = None
        self.readers: list[str] = []
        self.actions: list[tuple[str, str]] = []

    def publish(self, tokens: VisualTokens) -> None:
        before = self.latest.tokens if self.latest is not None else None
        self.latest = snapshot_of(tokens, self.topic, before)
        self.changed()

    def diagnose(self, **values: str) -> None:
        model = {"model": "test", "token_messages": "1", **values}
        self.health.on_statuses([Status("visual_tokenizer: model", 0, "active", model)], time.monotonic())

    def times(self, topic):
        return ()

    def tokenizers(self):
        return [self.health.summary(time.monotonic())]

    def details(self, topic):
        return self.health.details(time.monotonic()) if topic == self.topic else None

    def samples(self, topic):
        return list(self.health.samples)

    def log_after(self, number):
        return self.log.after(number)

    def snapshot(self, topic, index):
        return self.latest if topic == self.topic else None

    def acquire(self, topic):
        self.readers.append(topic)

    def release(self, topic):
        self.readers.remove(topic)

    def control(self, topic, action):
        self.actions.append((topic, action))
        return f"{action}: done"
