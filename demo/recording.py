"""What the demo plays: a bag's cameras and their images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo import DemoError
from vla_perception.sources.bags import Bag, BagMessage, common_transport

IMAGES_LIMIT = 1 << 30  # bytes


@dataclass(frozen=True)
class Recording:
    """The cameras of a bag, in the order of their views.

    Attributes:
        path, seconds: of the bag.
        transport: image transport that every camera was recorded with, "raw" or "compressed".
        bases: camera -> base topic, which the tokenizer's `<camera>/image_raw` is remapped to.
        recorded: camera -> the topic in the bag.
        topics: camera -> the topic that the tokenizer subscribes to, and the player publishes.
        images: camera -> its messages, in the order of the bag.
    """

    path: Path
    seconds: float
    transport: str
    bases: Mapping[str, str]
    recorded: Mapping[str, str]
    topics: Mapping[str, str]
    images: Mapping[str, list[BagMessage]]

    @classmethod
    def read(cls, bag: Bag) -> Recording:
        """Raises BagError without cameras, DemoError if the images take more memory than a demo should."""
        cameras = bag.cameras()
        try:
            transport = common_transport(cameras.values())
        except ValueError as error:
            raise DemoError(f"{bag.path}: {error}") from error
        bases = {name: camera.topic for name, camera in cameras.items()}
        recorded = {name: camera.topics[transport] for name, camera in cameras.items()}
        suffix = "/compressed" if transport == "compressed" else ""
        topics = {name: base + suffix for name, base in bases.items()}
        return cls(bag.path.resolve(), bag.seconds, transport, bases, recorded, topics, _images(bag, recorded))


def _images(bag: Bag, recorded: Mapping[str, str]) -> dict[str, list[BagMessage]]:
    images: dict[str, list[BagMessage]] = {name: [] for name in recorded}
    names = {topic: name for name, topic in recorded.items()}
    size = 0
    for message in bag.messages(list(names)):
        size += len(message.cdr)
        if size > IMAGES_LIMIT:
            raise DemoError(
                f"{bag.path} has more than {IMAGES_LIMIT >> 20} MiB of images, which the demo keeps in memory: choose a "
                "shorter bag, or play this one with replay_bag.launch.py"
            )
        images[names[message.topic]].append(message)
    return images
