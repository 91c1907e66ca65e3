"""Resizing without distortion, the rest black: as π0 and SmolVLA are fed.

All scale by one ratio to ``int(size / ratio)`` and differ in how, and in the padding. On the same image
they give different tokens, so each has a name:

| name | whose | interpolation | padding |
| --- | --- | --- | --- |
| ``resize_with_pad_pil`` | openpi's client and server | PIL's bilinear, antialiased, on uint8 | centered |
| ``resize_with_pad_torch`` | π0 in LeRobot from 0.5 on, openpi's PyTorch | float32, not antialiased, clamped | centered |
| ``resize_with_pad_jax`` | openpi's JAX model | ``jax.image.resize``: float32, antialiased, clamped | centered |
| ``resize_with_pad_top_left`` | SmolVLA in LeRobot | float32, not antialiased | left and top |
| ``resize_with_pad_lerobot_0_4`` | π0 in LeRobot 0.4 | as ``…_torch`` | centered, -3 in the place of black |

Sources: openpi's ``openpi_client.image_tools`` and ``openpi.shared.image_tools``, LeRobot's
``lerobot.policies.common.vla_utils``; of LeRobot 0.4, ``lerobot.policies.pi0.modeling_pi0``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from vla_perception.options import RESIZE_WITH_PAD

BY_PIL, BY_TORCH, BY_JAX, TOP_LEFT, LEROBOT_0_4 = RESIZE_WITH_PAD


class Placement(NamedTuple):
    """Where a resized image lies in the square, in pixels."""

    rows: int
    columns: int
    top: int
    left: int


def placement(height: int, width: int, side: int, strategy: str) -> Placement:
    """Where an image of height × width lies in side × side; ValueError if nothing of it would be left."""
    ratio = max(width / side, height / side)
    rows, columns = int(height / ratio), int(width / ratio)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"an image of {width} × {height} pixels is too narrow: scaled to fit {side} × {side}, its short side would have "
            "no pixel; cut out a part first (image transform crop)"
        )
    if strategy == TOP_LEFT:
        return Placement(rows, columns, side - rows, side - columns)
    return Placement(rows, columns, (side - rows) // 2, (side - columns) // 2)


def resize_pil(image: Image.Image, side: int) -> Image.Image:
    """``resize_with_pad_pil`` of an RGB image."""
    if image.size == (side, side):
        return image
    rows, columns, top, left = placement(image.height, image.width, side, BY_PIL)
    square = Image.new("RGB", (side, side), 0)
    square.paste(image.resize((columns, rows), Image.Resampling.BILINEAR), (left, top))
    return square


class FloatResize:
    """One of the resizes in float32, for images of one size, on one device.

    Its constants live as long as it does, so a CUDA graph that holds on to it may read them.

    Args:
        strategy: one of `RESIZE_WITH_PAD` but PIL's.
        height, width: of the images.
    """

    def __init__(self, strategy: str, height: int, width: int, side: int, device: torch.device) -> None:
        self._strategy = strategy
        self._side = side
        self._placement = placement(height, width, side, strategy)
        self._is_identity = (height, width) == (side, side)
        # A tensor: a quotient by a number is the product with its reciprocal on CUDA, which rounds to something else.
        # Copied, as all constants here, and not filled: they are there, for any stream, when this returns.
        self._largest = torch.full((1,), 255.0, device="cpu").to(device)
        if strategy == BY_JAX:
            self._down, self._across = (
                torch.from_numpy(jax_linear_weights(source, target).astype(np.float64)).to(device)
                for source, target in ((height, self._placement.rows), (width, self._placement.columns))
            )
        elif not self._is_identity:
            self._rows = _LinearTaps(height, self._placement.rows, device)
            self._columns = _LinearTaps(width, self._placement.columns, device)

    def __call__(self, planes: torch.Tensor) -> torch.Tensor:
        """uint8 [views, 3, height, width] → float32 [views, 3, side, side] from -1 to 1, padding apart."""
        if self._strategy == BY_JAX:  # openpi scales to -1 … 1 before
            return self._padded(self._resized_as_jax(self._scaled(planes).mul_(2.0).sub_(1.0)), -1.0)
        if self._is_identity:
            return self._scaled(planes).mul_(2.0).sub_(1.0)
        upper, lower = (self._between_columns(planes.index_select(-2, row)) for row in self._rows.indices)
        values = self._rows.mix(upper, lower, -2)
        if self._strategy in (BY_TORCH, LEROBOT_0_4):
            values = values.clamp_(0.0, 1.0)
        # LeRobot 0.4 pads with the black of images from -1 to 1 before it scales them to that.
        return self._padded(values, -1.0 if self._strategy == LEROBOT_0_4 else 0.0).mul_(2.0).sub_(1.0)

    def _scaled(self, levels: torch.Tensor) -> torch.Tensor:
        """uint8 → float32 from 0 to 1."""
        return levels.to(torch.float32).div_(self._largest)

    def _between_columns(self, levels: torch.Tensor) -> torch.Tensor:
        """uint8 rows of the source → float32 from 0 to 1, as wide as the resized image."""
        # Picked as bytes: fewer pixels than the source has are scaled.
        first, second = (self._scaled(levels.index_select(-1, column)) for column in self._columns.indices)
        return self._columns.mix(first, second, -1)

    def _resized_as_jax(self, values: torch.Tensor) -> torch.Tensor:
        # In float64, rounded once: JAX's own sums are in float32, in an order that depends on the machine.
        values = self._down.T @ values.double() @ self._across
        return values.float().clamp_(-1.0, 1.0)

    def _padded(self, values: torch.Tensor, value: float) -> torch.Tensor:
        rows, columns, top, left = self._placement
        around = (left, self._side - columns - left, top, self._side - rows - top)
        return functional.pad(values, around, value=value)


class _LinearTaps:
    """Where each pixel of the resized axis lies between two of the source, and in which shares.

    The arithmetic of ``torch.nn.functional.interpolate`` (bilinear, not antialiased) on a CPU with several threads, bit
    for bit: it is what policies were trained with. PyTorch itself takes another path in one thread, for channels-last
    images and on CUDA, whose coordinates differ by up to 7e-5 of the image's range.
    """

    def __init__(self, source: int, target: int, device: torch.device) -> None:
        scale = np.float32(source) / np.float32(target)
        positions = np.maximum(scale * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
        first = np.minimum(positions.astype(np.int64), source - 1)
        second = np.minimum(first + 1, source - 1)
        share = np.clip(positions - first.astype(np.float32), 0, 1).astype(np.float32)
        self.indices = torch.from_numpy(first).to(device), torch.from_numpy(second).to(device)
        # Of the first neighbor in float64, in which its product is exact.
        self._shares = torch.from_numpy(1 - share).to(device, torch.float64), torch.from_numpy(share).to(device)

    def mix(self, first: torch.Tensor, second: torch.Tensor, axis: int) -> torch.Tensor:
        """The two neighbors of each pixel by their shares: one product is rounded, the other one fused with the sum."""
        share_of_first, share_of_second = (share if axis == -1 else share[:, None] for share in self._shares)
        return (first.double() * share_of_first + (second * share_of_second).double()).float()


@lru_cache(maxsize=16)
def jax_linear_weights(source: int, target: int) -> np.ndarray:
    """float32 [source, target]: what ``jax.image.resize(method="linear")`` multiplies with along one axis."""
    if source == target:  # such an axis is left alone
        return np.eye(source, dtype=np.float32)
    # Python's float64 until it meets an array, as in jax's compute_weight_mat; XLA rounds product and difference once.
    inverse = 1.0 / (target / source)
    centers = np.arange(target, dtype=np.float32) + np.float32(0.5)
    samples = (centers.astype(np.float64) * float(np.float32(inverse)) - 0.5).astype(np.float32)
    distances = np.abs(samples[None, :] - np.arange(source, dtype=np.float32)[:, None]) / np.float32(max(inverse, 1.0))
    weights = np.maximum(np.float32(0), np.float32(1) - distances)
    totals = weights.sum(axis=0, keepdims=True, dtype=np.float32)
    return (weights / totals).astype(np.float32)
