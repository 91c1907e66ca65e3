"""uint8 RGB images → each encoder's ``pixel_values``, bit-identical to what the model's own processor computes.

What π0 and SmolVLA are fed is in resize_with_pad.py. OpenVLA's: the reference is ``PrismaticImageProcessor`` of openvla: PIL resize with antialiasing, torchvision's centre
crop, ``to_tensor``, ``normalize``. No other antialiased resize gives PIL's values, so PIL does it here; the
normalisation of a uint8 has 256 results per channel, so it is a table, built with torch's own float32
operations and therefore exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import PIL
import torch
from PIL import Image

from vla_perception import kept_threads
from vla_perception.options import RESIZE_WITH_PAD
from vla_perception.tokenizer.config import FLOAT_RESIZES, EncoderConfig
from vla_perception.tokenizer.image_inputs import check_image
from vla_perception.tokenizer.image_transforms import Step
from vla_perception.tokenizer.resize_with_pad import BY_PIL, FloatResize, placement, resize_pil

#: Pixels of a padded or scaled image; PIL takes 4 bytes for each.
_MAX_PIXELS = 1 << 28
#: How many times longer than wide an image may be that is scaled to its short side.
_MAX_RATIO = 256


def check_pillow() -> None:
    """Refuses a Pillow whose resize gives other values than models were trained on.

    Raises:
        ImportError: it is 13.0 or newer, which resizes tall images along the columns first; says what to install.
    """
    if int(PIL.__version__.split(".")[0]) >= 13:
        raise ImportError(
            f"Pillow {PIL.__version__} resizes tall images to other pixel values than models were trained on, so tokens "
            "would be wrong: pip install 'pillow<13'"
        )


def resized_size(height: int, width: int, config: EncoderConfig) -> tuple[int, int]:
    """(height, width) that the image (padded already, for ``letterbox``) is scaled to; ValueError if it is a strip."""
    side = config.image_size
    if config.resize_strategy == "resize-naive":
        return side, side
    ratio = max(height, width) / min(height, width)
    if ratio > _MAX_RATIO or side * side * ratio > _MAX_PIXELS:
        raise ValueError(f"an image of {width} × {height} pixels is too narrow to be scaled to a short side of {side}")
    # torchvision: the short side becomes `side`, the long one is truncated.
    long_side = int(side * max(height, width) / min(height, width))
    return (long_side, side) if height >= width else (side, long_side)


def crop_offset(length: int, side: int) -> int:
    """First row or column of torchvision's centre crop (Python's round: half to even)."""
    return int(round((length - side) / 2.0))


def square_window(height: int, width: int, config: EncoderConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) that the image (padded already, for ``letterbox``) is scaled to, and where the encoder's square begins.

    (top, left) of the square in the scaled image: what lies outside is cropped; what the square has beyond it is black.
    """
    side = config.image_size
    if config.resize_strategy in RESIZE_WITH_PAD:
        rows, columns, top, left = placement(height, width, side, config.resize_strategy)
        return (rows, columns), (-top, -left)
    new_height, new_width = resized_size(height, width, config)
    return (new_height, new_width), (crop_offset(new_height, side), crop_offset(new_width, side))


def letterbox_padding(height: int, width: int) -> tuple[int, int]:
    """Rows above and below, columns left and right, as OpenVLA's ``letterbox_pad_transform`` adds them.

    ValueError if that would make an image which fills the memory.
    """
    longest = max(height, width)
    if longest * longest > _MAX_PIXELS:
        raise ValueError(f"an image of {width} × {height} pixels is too long to be padded to a square")
    return int((longest - height) / 2), int((longest - width) / 2)


def resize(image: np.ndarray, config: EncoderConfig) -> np.ndarray:
    """uint8 [height, width, 3] → uint8 [image_size, image_size, 3] by the encoder's resize strategy."""
    pil = _to_pil(image)
    if config.resize_strategy == BY_PIL:
        return np.asarray(resize_pil(pil, config.image_size))
    if config.resize_strategy == "letterbox":
        top, left = letterbox_padding(pil.height, pil.width)
        padded = Image.new("RGB", (pil.width + 2 * left, pil.height + 2 * top), config.fill)
        padded.paste(pil, (left, top))
        pil = padded
    height, width = resized_size(pil.height, pil.width, config)
    if (pil.height, pil.width) != (height, width):
        pil = pil.resize((width, height), Image.Resampling(config.interpolation))
    side = config.image_size
    top, left = crop_offset(height, side), crop_offset(width, side)
    return np.asarray(pil)[top : top + side, left : left + side]


def _resize_float(image: np.ndarray, config: EncoderConfig) -> np.ndarray:
    """uint8 [height, width, 3] → float32 [3, side, side] from -1 to 1, by one of `FLOAT_RESIZES`."""
    way = _float_resize(config.resize_strategy, *image.shape[:2], config.image_size)
    return way(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None])[0].numpy()


@lru_cache(maxsize=16)
def _float_resize(strategy: str, height: int, width: int, side: int) -> FloatResize:
    return FloatResize(strategy, height, width, side, torch.device("cpu"))


def _to_pil(image: np.ndarray) -> Image.Image:
    bgr = image[:, :, ::-1]
    if bgr.flags.c_contiguous:  # a view of a BGR image, as cameras and JPEG give it: PIL reads that as fast as RGB
        return Image.frombuffer("RGB", image.shape[1::-1], bgr, "raw", "BGR", 0, 1)
    return Image.fromarray(np.ascontiguousarray(image))


def normalization_table(config: EncoderConfig) -> np.ndarray:
    """float32 [3, 256]: the normalised value of every uint8 level in every channel."""
    # Named, since a caller may have set another default device.
    levels = torch.arange(256, dtype=torch.uint8, device="cpu").to(torch.float32).div(255).repeat(3, 1)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device="cpu")[:, None] for values in (config.mean, config.std)
    )
    return levels.sub_(mean).div_(std).numpy()


def source_to_grid(height: int, width: int, config: EncoderConfig, patch_size: int) -> tuple[float, ...]:
    """Affine map from source pixels to the token grid, row-major 2 × 3.

    (x, y) in pixels, pixel i covering [i, i + 1), goes to (column, row), token j covering [j, j + 1).
    """
    top, left = (0, 0)
    if config.resize_strategy == "letterbox":
        top, left = letterbox_padding(height, width)
    padded_height, padded_width = height + 2 * top, width + 2 * left
    (new_height, new_width), (crop_y, crop_x) = square_window(padded_height, padded_width, config)
    scale_x, scale_y = new_width / padded_width, new_height / padded_height
    return (
        scale_x / patch_size,
        0.0,
        (left * scale_x - crop_x) / patch_size,
        0.0,
        scale_y / patch_size,
        (top * scale_y - crop_y) / patch_size,
    )


class Preprocessor:
    """Images → one float32 tensor per encoder.

    Args:
        encoders: in the order in which tensors are returned.

    Raises:
        ImportError: see `check_pillow`.
    """

    def __init__(self, encoders: Sequence[EncoderConfig]) -> None:
        check_pillow()
        self._encoders = tuple(encoders)
        self._tables = [normalization_table(config) for config in encoders]
        geometries = [config.geometry for config in encoders]
        # Encoders that share a resize, by their indices.
        self._sharing = [
            [index for index, other in enumerate(geometries) if other == geometry]
            for geometry in dict.fromkeys(geometries)
        ]
        if torch.get_num_threads() > 1:
            kept_threads.pool("preprocess", torch.get_num_threads())  # whose threads start here

    def __call__(
        self, images: Sequence[np.ndarray], steps: Sequence[tuple[Step, ...]] | None = None
    ) -> list[torch.Tensor]:
        """uint8 [height, width, 3] images of any sizes → per encoder float32 [views, 3, side, side].

        `steps` is None: image transforms can only be left to a `DevicePreprocessor`.
        """
        if isinstance(images, np.ndarray) and images.ndim == 3:
            images = [images]
        if len(images) == 0:
            raise ValueError("no image given; pass at least one uint8 [height, width, 3] array")
        for image in images:
            check_image(image)
        outputs = [
            np.empty((len(images), 3, config.image_size, config.image_size), np.float32) for config in self._encoders
        ]

        def fill(task: tuple[int, list[int]]) -> None:
            view, sharing = task
            pixels = resize(images[view], self._encoders[sharing[0]])
            for encoder in sharing:
                for channel in range(3):
                    table, output = self._tables[encoder][channel], outputs[encoder][view, channel]
                    np.take(table, pixels[:, :, channel], out=output, mode="clip")

        def fill_in_float(task: tuple[int, list[int]]) -> None:
            view, sharing = task
            values = _resize_float(images[view], self._encoders[sharing[0]])
            for encoder in sharing:
                outputs[encoder][view] = values

        tasks: list[tuple[int, list[int]]] = []
        float_tasks: list[tuple[int, list[int]]] = []
        for sharing in self._sharing:
            in_float = self._encoders[sharing[0]].resize_strategy in FLOAT_RESIZES
            (float_tasks if in_float else tasks).extend((view, sharing) for view in range(len(images)))
        # PIL and NumPy let go of the interpreter while they compute.
        threads = torch.get_num_threads()
        if min(len(tasks), threads) > 1:
            list(kept_threads.pool("preprocess", threads).map(fill, tasks))
        else:
            for task in tasks:
                fill(task)
        # PyTorch has threads for each operation, in each thread that calls it.
        if float_tasks and kept_threads.is_forked():
            list(kept_threads.pool("preprocess_in_float", 1).map(fill_in_float, float_tasks))
        else:
            for task in float_tasks:
                fill_in_float(task)
        return [torch.from_numpy(output) for output in outputs]
