"""uint8 RGB pictures → each encoder's ``pixel_values`` on the device, bit-identical to `preprocess`.

A picture crosses to the device once, as the bytes it is. PIL resizes 8-bit pictures in exact integer arithmetic
(``Resample.c``): weights of 22 fractional bits, one pass along the rows and one along the columns, each rounded and
clipped to 8 bits. So the same sums over the same weights give the same pixels on any device. They are int32 here, as
in PIL, and not matrix products: float64 is as exact and slow on most devices, and float32 in two halves is exact only
as long as nobody allows TF32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from vla_perception.tokenizer.preprocess import (
    check_image,
    check_pillow,
    crop_offset,
    letterbox_padding,
    normalisation_table,
    resized_size,
)
from vla_perception.tokenizer.presets import EncoderConfig

_PRECISION_BITS = 22
#: Products of one pass that are in memory at a time, 4 bytes each.
_MAX_PRODUCTS = 1 << 25


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _lanczos(x: float) -> float:
    def sinc(x: float) -> float:
        return math.sin(x * math.pi) / (x * math.pi) if x != 0.0 else 1.0

    return sinc(x) * sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


#: PIL's number of a filter → (its function, its support in pixels).
FILTERS: dict[int, tuple[Callable[[float], float], float]] = {
    1: (_lanczos, 3.0),
    2: (_bilinear, 1.0),
    3: (_bicubic, 2.0),
}


def resampling_taps(length: int, target: int, interpolation: int) -> tuple[np.ndarray, np.ndarray]:
    """What each of `target` pixels is summed from when PIL resizes `length` pixels.

    Returns:
        indices int64 [target, taps] of source pixels, and their weights int32 [target, taps] in units of 2⁻²²;
        unused taps have weight 0. Computed in PIL's own order of operations (``precompute_coeffs``).
    """
    function, support = FILTERS[interpolation]
    scale = length / target
    stretch = max(scale, 1.0)
    support *= stretch
    taps = math.ceil(support) * 2 + 1
    indices = np.zeros((target, taps), np.int64)
    weights = np.zeros((target, taps), np.int32)
    for pixel in range(target):
        centre = (pixel + 0.5) * scale
        first = max(0, int(centre - support + 0.5))
        count = min(length, int(centre + support + 0.5)) - first
        values = [function((first + tap - centre + 0.5) * (1.0 / stretch)) for tap in range(count)]
        total = 0.0
        for value in values:
            total += value
        for tap, value in enumerate(values):
            if total != 0.0:
                value /= total
            weights[pixel, tap] = int(value * (1 << _PRECISION_BITS) + math.copysign(0.5, value))
        indices[pixel] = np.minimum(first + np.arange(taps), length - 1)
    return indices, weights


class DevicePreprocessor:
    """Pictures → one float32 tensor per encoder, computed on `device`; the same values as `preprocess.Preprocessor`.

    Args:
        encoders: in the order in which tensors are returned; their interpolations must be among `FILTERS`.

    Raises:
        ImportError: see `check_pillow`; what is accepted must not depend on the device.
    """

    def __init__(self, encoders: Sequence[EncoderConfig], device: torch.device) -> None:
        check_pillow()
        self._encoders = tuple(encoders)
        self._device = device
        self._tables = [torch.from_numpy(normalisation_table(config)).to(device) for config in encoders]
        self._fills = {
            config.fill: torch.tensor(config.fill, dtype=torch.uint8, device=device).view(1, 3, 1, 1)
            for config in encoders
            if config.resize_strategy == "letterbox"
        }
        self._channels = torch.arange(3, device=device).view(3, 1, 1)
        # Cameras have few sizes; whoever sends many pays for the weights again.
        self._taps = functools.lru_cache(maxsize=64)(self._make_taps)

    def __call__(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """uint8 [height, width, 3] pictures of any sizes → per encoder float32 [views, 3, side, side].

        On a GPU the result may still be being computed on the current stream; `images` are no longer needed.
        """
        if isinstance(images, np.ndarray) and images.ndim == 3:
            images = [images]
        if len(images) == 0:
            raise ValueError("no image given; pass at least one uint8 [height, width, 3] array")
        groups: dict[tuple[int, ...], list[int]] = {}
        for view, image in enumerate(images):
            groups.setdefault(check_image(image).shape, []).append(view)
        parts: list[list[torch.Tensor]] = [[] for _ in self._encoders]
        for views in groups.values():
            planes = self._upload([images[view] for view in views])
            shared: dict[tuple, torch.Tensor] = {}
            for config, table, part in zip(self._encoders, self._tables, parts):
                if config.geometry not in shared:
                    shared[config.geometry] = self.resize(planes, config).long()
                part.append(table[self._channels, shared[config.geometry]])
        if len(groups) == 1:
            return [part[0] for part in parts]
        order = [view for views in groups.values() for view in views]
        back = torch.tensor(np.argsort(order), device=self._device)
        return [torch.cat(part)[back] for part in parts]

    def resize(self, planes: torch.Tensor, config: EncoderConfig) -> torch.Tensor:
        """uint8 [views, 3, height, width] → uint8 [views, 3, image_size, image_size] by the encoder's strategy."""
        height, width = planes.shape[2:]
        if config.resize_strategy == "letterbox":
            top, left = letterbox_padding(height, width)
            padded = self._fills[config.fill].expand(len(planes), 3, height + 2 * top, width + 2 * left).contiguous()
            padded[:, :, top : top + height, left : left + width] = planes
            planes, height, width = padded, height + 2 * top, width + 2 * left
        new_height, new_width = resized_size(height, width, config)
        for dim, target in ((3, new_width), (2, new_height)):
            planes = self._resample(planes, dim, target, config)
        return planes

    def _upload(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Pictures of one size → uint8 [views, 3, height, width] on the device."""
        # From pinned memory the copy runs beside the host. The allocator gives a pinned block out again only when
        # the copies that were queued from it are done.
        host = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        # Views of BGR pictures, as cameras and JPEG give them, are turned there: NumPy copies reversed ones slowly.
        reversed_channels = all(image.strides[2] < 0 for image in images)
        for row, image in zip(host.numpy(), images):
            row[...] = image[:, :, ::-1] if reversed_channels else image
        planes = host.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return planes.flip(1) if reversed_channels else planes

    def _make_taps(
        self, dim: int, length: int, target: int, interpolation: int, side: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Taps of the `side` pixels that the centre crop leaves of `target`, on the device.

        Indices are flat; weights are [taps, side] along the columns, [side, taps, 1] along the rows.
        """
        offset = crop_offset(target, side)
        indices, weights = (
            torch.from_numpy(taps[offset : offset + side]) for taps in resampling_taps(length, target, interpolation)
        )
        if dim == 3:  # the taps come before the columns, so that neighbouring sums read neighbouring bytes
            indices, weights = indices.T, weights.T
        else:
            weights = weights[:, :, None]
        return indices.reshape(-1).to(self._device), weights.contiguous().to(self._device)

    def _resample(self, planes: torch.Tensor, dim: int, target: int, config: EncoderConfig) -> torch.Tensor:
        """One pass of PIL's resize, and of the centre crop, along dimension 2 or 3 of uint8 planes."""
        length, side = planes.shape[dim], config.image_size
        if length == target:
            return planes.narrow(dim, crop_offset(target, side), side)
        indices, weights = self._taps(dim, length, target, config.interpolation, side)
        taps = len(indices) // side
        other = 5 - dim
        step = max(1, _MAX_PRODUCTS // (planes.shape[0] * 3 * side * taps))
        passes = []
        for part in planes.split(step, other):
            picked = part.index_select(dim, indices)
            picked = picked.unflatten(dim, (taps, side) if dim == 3 else (side, taps))
            sums = (picked * weights).sum(3, dtype=torch.int32)
            passes.append(sums.add_(1 << (_PRECISION_BITS - 1)).bitwise_right_shift_(_PRECISION_BITS).clamp_(0, 255))
        return (passes[0] if len(passes) == 1 else torch.cat(passes, other)).to(torch.uint8)
