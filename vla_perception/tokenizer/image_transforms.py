"""What was done to frames before the model saw them, in training or evaluation: a short chain of steps per camera.

| step | what it does | whose |
| --- | --- | --- |
| ``rotate180`` | turns the image upside down | LIBERO |
| ``crop:x,y,width,height`` | cuts out a rectangle, in pixels | – |
| ``jpeg``, ``jpeg:QUALITY`` | to JPEG and back as TensorFlow does it, at quality 95 by default | RLDS data sets |
| ``lanczos3``, ``lanczos3:S`` | to S × S as ``tf.image.resize(method="lanczos3", antialias=True)`` does it | OpenVLA's evaluations |
| ``center_crop_tf``, ``…:S`` | the middle 90 % of the area to S × S by ``tf.image.crop_and_resize`` | OpenVLA, OpenVLA-OFT |
| ``center_crop_pil`` | the middle 90 % of the area in whole pixels, back to its size by PIL's bilinear | MiniVLA |
| ``resize_with_pad_…`` | not a step: how the image is resized after all steps, in the place of the model's own way (resize_with_pad.py) | π0, SmolVLA |

S is the encoders' image size where they share one. The two centre crops differ by up to tens of levels. A step that
is for one camera alone has its name before it: ``wrist=crop:80,0,480,480``.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from PIL import Image

from vla_perception import kept_threads
from vla_perception.options import IMAGE_TRANSFORMS, RESIZE_WITH_PAD

#: Row-major 2 × 3 map of image coordinates, in which pixel i covers [i, i + 1).
Affine = tuple[float, float, float, float, float, float]
#: Steps that only look at an image differently.
VIEWS = ("rotate180", "crop")
#: Bytes of an image from which on its JPEG round trip is worth a thread.
_LARGE = 1 << 19
_MAX_SIZE = 4096
#: Side of OpenVLA's centre crop: the square root of 0.9 of the area, in float32 as TensorFlow computes it.
_CROP_SIDE = np.sqrt(np.float32(0.9))


@dataclass(frozen=True)
class Step:
    """One step: `run` changes an image, `map` says where its pixels go.

    Attributes:
        text: how it is written, with all numbers; part of the fingerprint.
        run: uint8 [height, width, 3] → the same of another size.
        map: (height, width) of what comes in → (affine map, height, width of what goes out).
        size: S, for a step that `image_transforms_gpu` can do as well, with the same bits.
    """

    text: str
    run: Callable[[np.ndarray], np.ndarray]
    map: Callable[[int, int], tuple[Affine, int, int]]
    size: int = 0

    @property
    def name(self) -> str:
        return self.text.partition(":")[0]


def parse_chains(
    image_transforms: Sequence[str] | Mapping[str, Sequence[str]], image_sizes: Sequence[int]
) -> Mapping[str, tuple[str, ...]]:
    """Steps as they are configured → camera → its chain, checked and written out; ``""`` is for cameras not named.

    Args:
        image_transforms: steps in their order, ``camera=step`` where one is for that camera alone; or camera → steps.
        image_sizes: of the encoders, for steps that go to S × S.

    Raises:
        ValueError: an unknown step or a number that makes no sense.
        ImportError: a step needs a library that is missing; says which.
    """
    if isinstance(image_transforms, Mapping):
        chains = {
            camera: [steps] if isinstance(steps, str) else list(steps) for camera, steps in image_transforms.items()
        }
    else:
        steps = [image_transforms] if isinstance(image_transforms, str) else image_transforms
        split = [(camera, step) for camera, _, step in (f"={step}".rpartition("=") for step in steps)]
        pairs = [(camera.removeprefix("="), step) for camera, step in split]
        chains = {
            camera: [step for of, step in pairs if of in ("", camera)] for camera in dict.fromkeys(["", *dict(pairs)])
        }
    written = {
        camera: tuple(step if step in RESIZE_WITH_PAD else parse_step(step, image_sizes).text for step in steps if step)
        for camera, steps in chains.items()
    }
    return MappingProxyType(written if any(written.values()) else {})


def split_resize(chains: Mapping[str, tuple[str, ...]]) -> tuple[Mapping[str, tuple[str, ...]], str]:
    """The chains without the ``resize_with_pad_…`` that they end with, and its name; empty if there is none.

    Raises:
        ValueError: something follows it, or it is not the same for all cameras: they are encoded as one batch.
    """
    last = {chain[-1] if chain else "" for chain in chains.values()}
    resize = next(iter(last & set(RESIZE_WITH_PAD)), "")
    for chain in chains.values():
        early = next((step for step in chain[:-1] if step in RESIZE_WITH_PAD), None)
        if early:
            raise ValueError(f"image transform {early} resizes to what the encoder takes, so it must be the last one")
    if resize and last != {resize}:
        raise ValueError(f"image transform {resize} must be the last one of all cameras: they are resized in one way")
    if not resize:
        return chains, ""
    left = {camera: chain[:-1] for camera, chain in chains.items()}
    return MappingProxyType(left if any(left.values()) else {}), resize


def parse_step(text: str, image_sizes: Sequence[int] = ()) -> Step:
    """One step as it is written in a configuration; ValueError with advice."""
    name, _, argument = text.partition(":")
    if name == "rotate180" and not argument:
        return Step(name, lambda image: image[::-1, ::-1], _map_rotate180)
    if name == "crop":
        numbers = _numbers(text, argument, 4)
        return Step(text, lambda image: _crop(image, *numbers), lambda h, w: _map_crop(h, w, *numbers))
    if name == "jpeg":
        (quality,) = _numbers(text, argument or "95", 1)
        if not 1 <= quality <= 100:
            raise ValueError(f"image transform {text!r}: JPEG's quality is 1 to 100")
        _simplejpeg()
        return Step(f"jpeg:{quality}", lambda image: _jpeg(image, quality), _map_identity)
    if name in ("lanczos3", "center_crop_tf"):
        size = _size(text, argument, image_sizes)
        if name == "lanczos3":
            return Step(
                f"lanczos3:{size}",
                lambda image: resize_lanczos3(image, size),
                lambda h, w: ((size / w, 0.0, 0.0, 0.0, size / h, 0.0), size, size),
                size,
            )
        return Step(
            f"center_crop_tf:{size}",
            lambda image: crop_and_resize(image, size),
            lambda h, w: _map_crop_and_resize(h, w, size),
            size,
        )
    if name == "center_crop_pil" and not argument:
        return Step(name, _center_crop_pil, _map_center_crop_pil)
    raise ValueError(f"unknown image transform {text!r}; choose from {', '.join(IMAGE_TRANSFORMS)}")


class ImageTransforms:
    """The chains of all cameras, ready to run.

    Args:
        chains: as `parse_chains` gives them.
    """

    def __init__(self, chains: Mapping[str, Sequence[str]]) -> None:
        self._chains = {camera: [parse_step(step) for step in steps] for camera, steps in chains.items()}

    def __bool__(self) -> bool:
        return bool(self._chains)

    def image(self, image: np.ndarray, camera: str | None = None) -> np.ndarray:
        """uint8 [height, width, 3] → the image that the model is to see."""
        return self._run(image, self._chain(camera))

    def images(self, images: Sequence[np.ndarray], cameras: Sequence[str | None]) -> list[np.ndarray]:
        """`image` of each, side by side."""
        return _side_by_side(self._run, images, [self._chain(camera) for camera in cameras])

    def images_on_host(
        self, images: Sequence[np.ndarray], cameras: Sequence[str | None]
    ) -> tuple[list[np.ndarray], list[tuple[Step, ...]]]:
        """Images after those steps that the host has to do, and of each the steps that are left for a device."""
        on_host: list[list[Step]] = []
        left: list[tuple[Step, ...]] = []
        for camera in cameras:
            chain = self._chain(camera)
            first = len(chain)
            while first and chain[first - 1].size:
                first -= 1
            on_host.append(chain[:first])
            left.append(tuple(chain[first:]))
        begun = _side_by_side(self._run, images, on_host)
        for image, steps in zip(begun, left):
            height, width = image.shape[:2]
            for step in steps:
                _, height, width = step.map(height, width)  # refuses an image that is too small
        return begun, left

    @staticmethod
    def _run(image: np.ndarray, chain: Sequence[Step]) -> np.ndarray:
        for step in chain:
            image = step.run(image)
        return image

    def affine(self, height: int, width: int, camera: str | None = None) -> tuple[Affine, int, int]:
        """Map from the source image's pixels to the transformed one's, and that one's height and width."""
        whole: Affine = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        for step in self._chain(camera):
            affine, height, width = step.map(height, width)
            whole = compose(affine, whole)
        return whole, height, width

    def _chain(self, camera: str | None) -> list[Step]:
        if camera in self._chains:
            return self._chains[camera]
        if camera is None and set(self._chains) - {""}:
            raise ValueError(
                f"images are transformed differently per camera ({', '.join(filter(None, self._chains))}): say which "
                "camera each comes from"
            )
        return self._chains.get("", [])


def _side_by_side(
    run: Callable[[np.ndarray, Sequence[Step]], np.ndarray],
    images: Sequence[np.ndarray],
    chains: Sequence[Sequence[Step]],
) -> list[np.ndarray]:
    """`run` of each pair, in threads where that is worth it: PIL, NumPy and simplejpeg let go of the interpreter."""
    working = sum(
        any(step.name not in VIEWS and (step.name != "jpeg" or image.size >= _LARGE) for step in chain)
        for image, chain in zip(images, chains)
    )
    if working < 2 or (os.cpu_count() or 1) < 2:
        return [run(image, chain) for image, chain in zip(images, chains)]
    return list(kept_threads.pool("image_transforms", working).map(run, images, chains))


def compose(outer: Sequence[float], inner: Sequence[float]) -> Affine:
    """The map that does `inner`, then `outer`."""
    a, b, c, d, e, f = outer
    p, q, r, s, t, u = inner
    return (a * p + b * s, a * q + b * t, a * r + b * u + c, d * p + e * s, d * q + e * t, d * r + e * u + f)


def resize_lanczos3(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [height, width, 3] → uint8 [size, size, 3], rounded as OpenVLA's evaluation code does it."""
    values = _apply(image, *lanczos3_taps(image.shape[0], size))
    values = _apply(values.swapaxes(0, 1), *lanczos3_taps(image.shape[1], size)).swapaxes(0, 1)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def crop_and_resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [height, width, 3] → the middle 90 % of its area as uint8 [size, size, 3].

    ``tf.image.crop_and_resize`` between two ``convert_image_dtype``, in float32: bilinear without antialiasing, and
    the corner pixels' centres of the crop fall on those of the result.
    """
    top, bottom, down = crop_samples(image.shape[0], size)
    left, right, across = crop_samples(image.shape[1], size)
    across, down = across[None, :, None], down[:, None, None]

    def row(index: np.ndarray) -> np.ndarray:
        pixels = image[index] * np.float32(1 / 255)  # only the rows that are needed: a large image is not copied
        return pixels[:, left] + (pixels[:, right] - pixels[:, left]) * across

    above = row(top)
    mixed = above + (row(bottom) - above) * down
    return (np.clip(mixed, 0, 1) * np.float32(255.5)).astype(np.uint8)


def _numbers(text: str, argument: str, count: int) -> tuple[int, ...]:
    parts = argument.split(",")
    if len(parts) != count or not all(part.strip().isdecimal() and len(part) < 8 for part in parts):
        wanted = "x,y,width,height in pixels" if count == 4 else "one whole number"
        raise ValueError(f"image transform {text!r}: {wanted} must follow the colon")
    return tuple(int(part) for part in parts)


def _size(text: str, argument: str, image_sizes: Sequence[int]) -> int:
    if not argument and len(set(image_sizes)) != 1:
        raise ValueError(
            f"image transform {text!r}: the encoders take images of {', '.join(map(str, image_sizes))} pixels, so say "
            f"which size, as in {text}:224"
        )
    (size,) = _numbers(text, argument, 1) if argument else (image_sizes[0],)
    if not 2 <= size <= _MAX_SIZE:
        raise ValueError(f"image transform {text!r}: a size within 2 and {_MAX_SIZE} is needed")
    return size


def _map_identity(height: int, width: int) -> tuple[Affine, int, int]:
    return (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), height, width


def _map_rotate180(height: int, width: int) -> tuple[Affine, int, int]:
    return (-1.0, 0.0, float(width), 0.0, -1.0, float(height)), height, width


def _crop(image: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    _map_crop(image.shape[0], image.shape[1], x, y, width, height)
    return image[y : y + height, x : x + width]


def _map_crop(
    source_height: int, source_width: int, x: int, y: int, width: int, height: int
) -> tuple[Affine, int, int]:
    if width < 1 or height < 1 or x + width > source_width or y + height > source_height:
        raise ValueError(
            f"image transform crop:{x},{y},{width},{height} does not lie within an image of {source_width} × {source_height}"
        )
    return (1.0, 0.0, -float(x), 0.0, 1.0, -float(y)), height, width


def _simplejpeg():
    try:
        import simplejpeg
    except ImportError as error:
        raise ImportError("the image transform jpeg needs simplejpeg: pip install simplejpeg") from error
    return simplejpeg


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    # What TensorFlow's encode_jpeg does by default: 4:2:0, baseline.
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    # TensorFlow decodes with the fast inverse transform, up to 16 levels from the accurate one, which is all that PIL
    # and OpenCV have.
    return _simplejpeg().decode_jpeg(buffer.getvalue(), "RGB", fastdct=True, fastupsample=False)


@lru_cache(maxsize=32)
def lanczos3_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """First source index of every output [target], and weights [target, taps], as TensorFlow's ScaleAndTranslate."""
    one = np.float32(1)
    inverse = one / (np.float32(target) / np.float32(source))
    scale = max(inverse, one)
    radius = np.float32(3) * scale
    centres = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * inverse
    first = np.clip(np.ceil(centres - radius - np.float32(0.5)), 0, source - 1).astype(np.int64)
    last = np.clip(np.floor(centres + radius - np.float32(0.5)), 0, source - 1).astype(np.int64)
    index = first[:, None] + np.arange(int((last - first).max()) + 1)
    x = np.abs((index.astype(np.float32) + np.float32(0.5) - centres[:, None]) * (one / scale))
    pi = np.float32(math.pi)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.float32(3) * _sin(pi * x) * _sin(pi * x / np.float32(3)) / (pi * pi * x * x)
    weights = np.where(x <= np.float32(1e-3), one, weights)
    weights = np.where((x > 3) | (index > last[:, None]), np.float32(0), weights).astype(np.float32)
    total = np.zeros(target, np.float32)
    for tap in range(weights.shape[1]):
        total += weights[:, tap]
    return first, weights * (one / total)[:, None]


def _sin(x: np.ndarray) -> np.ndarray:
    # As the C library rounds it: NumPy's own float32 sine is up to 1.5 units in the last place off.
    return np.sin(x.astype(np.float64)).astype(np.float32)


def _apply(values: np.ndarray, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """uint8 or float32 [source, …] → float32 [target, …]: the taps added one after the other, as TensorFlow adds them."""
    last = values.shape[0] - 1
    result = np.zeros((len(first), *values.shape[1:]), np.float32)
    for tap in range(weights.shape[1]):
        result += values[np.minimum(first + tap, last)] * weights[:, tap, None, None]
    return result


def _crop_box() -> tuple[np.float32, np.float32]:
    offset = (np.float32(1) - _CROP_SIDE) / np.float32(2)
    return offset, offset + _CROP_SIDE


@lru_cache(maxsize=32)
def crop_samples(source: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per output index: the source index before it, the one after it, and the weight of the latter."""
    begin, end = _crop_box()
    step = (end - begin) * np.float32(source - 1) / np.float32(size - 1)
    at = begin * np.float32(source - 1) + np.arange(size, dtype=np.float32) * step
    before = np.floor(at)
    return before.astype(np.int64), np.ceil(at).astype(np.int64), at - before


def _map_crop_and_resize(height: int, width: int, size: int) -> tuple[Affine, int, int]:
    begin, end = (float(edge) for edge in _crop_box())
    if min(height, width) < 2:
        raise ValueError(
            f"image transform center_crop_tf needs an image of at least 2 × 2 pixels, got {width} × {height}"
        )
    scale_x, scale_y = ((size - 1) / ((end - begin) * (length - 1)) for length in (width, height))
    return (
        (
            scale_x,
            0.0,
            0.5 - scale_x * (begin * (width - 1) + 0.5),
            0.0,
            scale_y,
            0.5 - scale_y * (begin * (height - 1) + 0.5),
        ),
        size,
        size,
    )


def _pil_crop(length: int) -> tuple[int, int]:
    """(first pixel, number of pixels) of MiniVLA's centre crop."""
    kept = int(math.sqrt(0.9) * length)
    return int((length - kept) / 2), kept


def _center_crop_pil(image: np.ndarray) -> np.ndarray:
    _, height, width = _map_center_crop_pil(*image.shape[:2])
    (top, rows), (left, columns) = _pil_crop(height), _pil_crop(width)
    cropped = np.ascontiguousarray(image[top : top + rows, left : left + columns])
    return np.asarray(Image.fromarray(cropped).resize((width, height), Image.Resampling.BILINEAR))


def _map_center_crop_pil(height: int, width: int) -> tuple[Affine, int, int]:
    (top, rows), (left, columns) = _pil_crop(height), _pil_crop(width)
    if rows < 1 or columns < 1:
        raise ValueError(f"image transform center_crop_pil leaves nothing of an image of {width} × {height}")
    scale_x, scale_y = width / columns, height / rows
    return (scale_x, 0.0, -left * scale_x, 0.0, scale_y, -top * scale_y), height, width
