"""PIL's antialiased resize as integers: which source pixels each pixel is summed from, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

#: Weights are in units of 2 to the power of minus this.
PRECISION_BITS = 22


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
            weights[pixel, tap] = int(value * (1 << PRECISION_BITS) + math.copysign(0.5, value))
        indices[pixel] = np.minimum(first + np.arange(taps), length - 1)
    return indices, weights


def square_taps(length: int, target: int, interpolation: int, side: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """`resampling_taps` of the `side` pixels that begin at `offset` of the `target` ones; all weights are 0 beyond them."""
    if length == target:  # PIL leaves out this pass
        indices, weights = np.arange(length)[:, None], np.full((length, 1), 1 << PRECISION_BITS, np.int32)
    else:
        indices, weights = resampling_taps(length, target, interpolation)
    pixels = np.arange(offset, offset + side)
    inside = np.clip(pixels, 0, target - 1)
    return indices[inside], np.where((inside == pixels)[:, None], weights[inside], 0).astype(np.int32)
