"""A token message with the camera images that it came from, and those images as a browser reads them. No ROS."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_perception.images.decode import decode_image
from vla_perception.images.streams import MAX_PIXELS, check_size
from vla_perception.tokens import View, VisualTokens

#: Larger images are thinned out before they are made a JPEG; those that are streams already go as they are.
MAX_SHOWN_PIXELS = 1 << 20
JPEG_QUALITY = 85
#: An image whose stamp is this far from a view's still serves where the exact one is not there.
NEAR_NS = 200_000_000
#: Images that wait for their tokens, of all cameras together: bytes, and of one camera: how many.
HISTORY_BYTES = 128 << 20
HISTORY = 120


@dataclass(frozen=True)
class PageImage:
    """An image as the browser gets it: the bytes of a file, and its type (``image/jpeg``)."""

    kind: str
    data: bytes


class LazyImage:
    """An image that is decoded when a page shows it, once.

    Args:
        make: gives it; raises ValueError or OSError where it cannot be read.
        stamp_ns: when it was taken.
    """

    def __init__(self, make: Callable[[], PageImage], stamp_ns: int) -> None:
        self.stamp_ns = stamp_ns
        self._make: Callable[[], PageImage] | None = make
        self._image: PageImage | None = None
        self._making = threading.Lock()

    def get(self) -> PageImage | None:
        """The image; None if it cannot be read."""
        with self._making:
            if self._make is not None:
                try:
                    self._image = self._make()
                except (ValueError, OSError, ImportError):
                    self._image = None  # the tokenizer counts and reports it
                self._make = None
            return self._image


@dataclass(frozen=True)
class Snapshot:
    """One token message and its images, None where there is none. `topic` names the tokenizer."""

    topic: str
    tokens: VisualTokens
    images: tuple[LazyImage | None, ...]
    before: VisualTokens | None = field(default=None, repr=False)

    @property
    def facts(self) -> dict[str, str]:
        """What the message says about the tokenizer."""
        names = ("model", "weights", "fingerprint", "compute_dtype", "dtype", "projector", "token_strategy")
        return {name: getattr(self.tokens, name) for name in names}


def page_image(message: Any) -> PageImage:
    """An image message, any object with the fields of Image or CompressedImage. ValueError if it cannot be read."""
    if not hasattr(message, "encoding"):
        stream = bytes(message.data)
        if (kind := stream_kind(message.format, stream)) is not None:
            return PageImage(kind, stream)
    return encode_rgb(decode_image(message))


def encode_rgb(rgb: np.ndarray) -> PageImage:
    """A JPEG of uint8 [height, width, 3], thinned out where it is large."""
    import simplejpeg

    step = 1
    while rgb.shape[0] * rgb.shape[1] > MAX_SHOWN_PIXELS * step * step:
        step += 1
    pixels = np.ascontiguousarray(rgb[::step, ::step])
    return PageImage(
        "image/jpeg", simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, colorspace="RGB", colorsubsampling="422")
    )


def stream_kind(format: str, data: bytes) -> str | None:
    """The type of a compressed image that a browser shows as it is, by its first bytes; None for others.

    None as well where the format says that its samples are not what is to be seen (a Bayer pattern, 16 bits).
    """
    if "bayer" in format or "16" in format:
        return None
    if data[:3] == b"\xff\xd8\xff":
        return "image/jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 24:
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        check_size(width, height, MAX_PIXELS)
        return "image/png"
    return None


class ImageHistory:
    """The last images of each camera topic as they came, until the tokens of one of them arrive. By one thread."""

    def __init__(self) -> None:
        self._images: dict[str, deque[tuple[int, bytes]]] = {}

    def add(self, topic: str, stamp_ns: int, data: bytes) -> None:
        images = self._images.setdefault(topic, deque(maxlen=HISTORY))
        images.append((stamp_ns, data))
        most = HISTORY_BYTES // len(self._images)
        size = sum(len(kept) for _, kept in images)
        while size > most and len(images) > 1:
            size -= len(images.popleft()[1])

    def forget(self, topic: str) -> None:
        self._images.pop(topic, None)

    def find(self, topic: str, stamp_ns: int) -> tuple[int, bytes] | None:
        """(stamp, bytes) of the topic's image whose stamp is nearest, if it is within `NEAR_NS`."""
        images = self._images.get(topic, ())
        found = min(images, key=lambda image: abs(image[0] - stamp_ns), default=None)
        return found if found is not None and abs(found[0] - stamp_ns) <= NEAR_NS else None

    def match(self, views: Sequence[View], topics: Iterable[str]) -> list[tuple[str, int, bytes] | None]:
        """For each view its image: (topic, stamp, bytes), or None.

        A topic that is called after the camera (``…/front/image_raw``) is the camera's. A camera whose topic was remapped
        gets the one, of those that are left, with an image of exactly its stamp.
        """
        left = list(topics)
        found: list[tuple[str, int, bytes] | None] = [None] * len(views)
        unnamed = []
        for index, view in enumerate(views):
            ending = f"/{view.camera.strip('/')}/image_raw"
            own = next((topic for topic in left if topic.removesuffix("/compressed").endswith(ending)), None)
            if own is None:
                unnamed.append(index)
                continue
            left.remove(own)
            image = self.find(own, view.stamp_ns)
            found[index] = None if image is None else (own, *image)
        for index in unnamed:
            for topic in left:
                image = self.find(topic, views[index].stamp_ns)
                if image is not None and image[0] == views[index].stamp_ns:
                    found[index] = (topic, *image)
                    left.remove(topic)
                    break
        return found
