#!/usr/bin/env python3
"""Write resize_with_pad.npz: what openpi's and LeRobot's own functions make of images of odd sizes.

The functions are copied from openpi (commit 15a9616: `openpi_client.image_tools`, `openpi.shared.image_tools`) and LeRobot
(commit 7427f31: `lerobot.policies.common.vla_utils`), without what they do for batches, other dtypes and other methods.
Runs with jax 0.10, torch 2 and Pillow 11:

    python make_resize_with_pad.py
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

#: (height, width, side): wide, tall, square, enlarged, of the encoder's size in one dimension or both, odd rests.
SIZES = [
    (480, 640, 224),
    (400, 600, 224),
    (97, 31, 224),
    (5, 3, 224),
    (1000, 37, 224),
    (33, 720, 224),
    (224, 100, 224),
    (225, 223, 224),
    (224, 224, 224),
    (251, 512, 512),
    (512, 301, 512),
    (480, 640, 512),
]
#: Every that many rows and columns one is kept.
STRIDE = 13


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10007 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized_size(height: int, width: int, side: int) -> tuple[int, int]:
    ratio = max(width / side, height / side)
    return int(height / ratio), int(width / ratio)


def openpi_client(pixels: np.ndarray, side: int) -> np.ndarray:
    if pixels.shape[:2] == (side, side):
        return pixels
    rows, columns = resized_size(*pixels.shape[:2], side)
    resized = Image.fromarray(pixels).resize((columns, rows), resample=Image.BILINEAR)
    square = Image.new(resized.mode, (side, side), 0)
    square.paste(resized, (max(0, int((side - columns) / 2)), max(0, int((side - rows) / 2))))
    return np.asarray(square)


@functools.partial(jax.jit, static_argnums=(1,))
def openpi_jax(images: jax.Array, side: int) -> jax.Array:
    rows, columns = resized_size(*images.shape[1:3], side)
    resized = jax.image.resize(
        images, (images.shape[0], rows, columns, images.shape[3]), method=jax.image.ResizeMethod.LINEAR
    ).clip(-1.0, 1.0)
    top, odd_row = divmod(side - rows, 2)
    left, odd_column = divmod(side - columns, 2)
    around = ((0, 0), (top, top + odd_row), (left, left + odd_column), (0, 0))
    return jnp.pad(resized, around, constant_values=-1.0)


def lerobot_pi(images: torch.Tensor, side: int) -> torch.Tensor:
    rows, columns = resized_size(*images.shape[2:], side)
    resized = functional.interpolate(images, size=(rows, columns), mode="bilinear", align_corners=False).clamp(0.0, 1.0)
    top, odd_row = divmod(side - rows, 2)
    left, odd_column = divmod(side - columns, 2)
    return functional.pad(resized, (left, left + odd_column, top, top + odd_row), mode="constant", value=0.0)


def lerobot_smolvla(images: torch.Tensor, side: int) -> torch.Tensor:
    if images.shape[2:] == (side, side):
        return images
    rows, columns = resized_size(*images.shape[2:], side)
    resized = functional.interpolate(images, size=(rows, columns), mode="bilinear", align_corners=False)
    return functional.pad(resized, (max(0, side - columns), 0, max(0, side - rows), 0), value=0)


def main() -> None:
    results = {}
    for height, width, side in SIZES:
        pixels = image(height, width)
        unit = (torch.from_numpy(pixels).type(torch.float32) / 255).permute(2, 0, 1).contiguous()[None]
        kept = {
            "pil": openpi_client(pixels, side),
            "jax": np.asarray(openpi_jax(pixels[None].astype(np.float32) / 255.0 * 2.0 - 1.0, side))[0],
            "torch": (lerobot_pi(unit, side) * 2.0 - 1.0)[0].permute(1, 2, 0).numpy(),
            "top_left": (lerobot_smolvla(unit, side) * 2.0 - 1.0)[0].permute(1, 2, 0).numpy(),
        }
        for way, values in kept.items():
            results[f"{height}x{width}-{side}.{way}"] = values[::STRIDE, ::STRIDE]
    np.savez_compressed(Path(__file__).with_name("resize_with_pad.npz"), **results)


if __name__ == "__main__":
    main()
