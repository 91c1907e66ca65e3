"""Images as people have them → uint8 RGB arrays [height, width, 3], which all else here takes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

#: One image: a uint8 array [height, width, 3] RGB; a uint8 tensor [3, height, width] or [height, width, 3]; Pillow's; a
#: path of an image file.
ImageLike = np.ndarray | torch.Tensor | Image.Image | str | os.PathLike
#: Pillow's modes whose values lie within 0–255.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


def as_images(images: ImageLike | Sequence[ImageLike]) -> Sequence[np.ndarray]:
    """One image, several, or a batch in one array or tensor → one array for each; arrays are taken as they are.

    Files are opened by Pillow, as OpenVLA opens its images: without EXIF rotation, grey as RGB, alpha dropped.
    (`vla_perception.sources.image_files.read` also refuses damage that Pillow fills with grey.)

    Raises:
        ValueError: anything else, with what to do; OSError for a file that cannot be read.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [_as_array(images)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim <= 3:
        return [_as_array(images)]
    if isinstance(images, (np.ndarray, torch.Tensor, Sequence)):
        return [image if isinstance(image, np.ndarray) else _as_array(image) for image in images]
    raise ValueError(f"{type(images).__name__} holds no images; pass one, or a list of them: {_KINDS}")


def check_image(image: np.ndarray) -> np.ndarray:
    """`image` itself, if it is a uint8 [height, width, 3] array; ValueError with advice otherwise."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"an image must be a uint8 NumPy array, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise ValueError(_not_uint8(str(image.dtype), "(image * 255).round().astype(np.uint8)"))
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        turned = "; image.transpose(1, 2, 0) brings the channels to the end" if image.shape[:1] == (3,) else ""
        raise ValueError(f"an image must have the shape [height, width, 3] (RGB), got {list(image.shape)}{turned}")
    return image


_KINDS = (
    "a uint8 array [height, width, 3], a uint8 tensor [3, height, width] or [height, width, 3], a Pillow image, or the "
    "path of an image file"
)


def _as_array(image: ImageLike) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, torch.Tensor):
        return _of_tensor(image)
    if isinstance(image, (str, os.PathLike)):
        with Image.open(image) as opened:
            return _of_pillow(opened, f"{os.fspath(image)}: ")
    if isinstance(image, Image.Image):
        return _of_pillow(image, "")
    raise ValueError(f"an image cannot be a {type(image).__name__}; pass {_KINDS}")


def _of_tensor(image: torch.Tensor) -> np.ndarray:
    if image.dtype != torch.uint8:
        raise ValueError(_not_uint8(str(image.dtype).removeprefix("torch."), "(image * 255).round().to(torch.uint8)"))
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]):
        raise ValueError(
            f"an image must have the shape [3, height, width] or [height, width, 3] (RGB), got {list(image.shape)}"
        )
    pixels = image.detach().cpu().numpy()
    return pixels if image.shape[2] == 3 else pixels.transpose(1, 2, 0)


def _of_pillow(image: Image.Image, where: str) -> np.ndarray:
    if image.mode not in _MODES:
        raise ValueError(
            f"{where}an image of Pillow's mode {image.mode} has values beyond 0–255, whose white level is not known; "
            "scale it to 8 bits first"
        )
    return np.asarray(image.convert("RGB"))


def _not_uint8(dtype: str, convert: str) -> str:
    return (
        f"an image must be uint8 (0–255), got {dtype}: models were trained on images that were resized as uint8, and what "
        f"was normalised or scaled already gives other tokens. If it holds 0 to 1, {convert} makes it uint8"
    )
