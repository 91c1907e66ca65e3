"""Tokens as colors: their first three principal components as red, green and blue. NumPy only.

A basis is fitted once and then applied to every frame, so that a color keeps its meaning from frame to frame::

    basis = PrincipalComponents.fit(tokens)          # tokens: float32 [n, channels], of one or several images
    colors = basis.rgb(tokens).reshape(rows, cols, 3)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

# Percentiles of the fitted tokens that become 0 and 255. The extremes are left out because ViTs have a few
# tokens of very large norm, which would leave everything else grey.
LOW, HIGH = 1.0, 99.0
#: Tokens with larger values count as not finite: sums of their squares would be.
LARGEST = 1e15


@dataclass(frozen=True)
class PrincipalComponents:
    """Three directions in token space and the range of each that is shown.

    mean: float32 [channels]; axes: float32 [3, channels], orthonormal, most variance first (an axis that the
    fitted tokens do not have, for want of rank, is all zeros); low, high: float32 [3], the projections that
    become 0 and 255.
    """

    mean: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, tokens: np.ndarray, like: PrincipalComponents | None = None) -> PrincipalComponents:
        """The basis of `tokens` [n, channels] (any float dtype; rows with NaN, infinity or beyond LARGEST are left out).

        Signs are fixed by rule, so the same tokens give the same colors on every run. With `like`, order and
        signs of the axes are those that agree best with that earlier basis instead.
        Raises ValueError if `tokens` has another shape or no finite row.
        """
        rows = _rows(tokens)
        rows = rows[_usable(rows)]
        if len(rows) == 0:
            raise ValueError("no finite token to fit principal components to")
        mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        axes = _leading_axes(rows - mean)
        axes = _fixed_signs(axes) if like is None else _aligned(axes, like.axes)
        projected = (rows - mean) @ axes.T
        low, high = np.percentile(projected, [LOW, HIGH], axis=0).astype(np.float32)
        return cls(mean, axes, low, high)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def project(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [n, 3]: the tokens' coordinates along the three axes. ValueError on another channel count."""
        rows = _rows(tokens)
        if rows.shape[1] != self.channels:
            raise ValueError(f"tokens of {rows.shape[1]} channels, but the basis was fitted to {self.channels}")
        return (rows - self.mean) @ self.axes.T

    def rgb(self, tokens: np.ndarray) -> np.ndarray:
        """uint8 [n, 3]: one color per token. Tokens that are not finite, or beyond LARGEST, come out black."""
        rows = _rows(tokens)
        usable = _usable(rows)
        projected = self.project(rows if usable.all() else np.where(usable[:, None], rows, 0))
        span = self.high - self.low
        flat = span <= 1e-6 * max(float(span.max()), 1e-30)
        shown = (projected - self.low) / np.where(flat, 1, span)
        shown[:, flat] = 0.5  # nothing varies along this axis: middle grey rather than amplified noise
        shown[~usable] = 0
        return np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)


def _rows(tokens: np.ndarray) -> np.ndarray:
    rows = np.asarray(tokens)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"expected tokens of shape [n, channels], got {rows.shape}")
    return rows.astype(np.float32, copy=False)


def _usable(rows: np.ndarray) -> np.ndarray:
    """bool [n]: rows that can be computed with."""
    return (np.abs(rows) <= LARGEST).all(axis=1)  # NaN is not


def _leading_axes(centred: np.ndarray) -> np.ndarray:
    """float32 [3, channels]: leading right singular vectors, through the smaller of the two Gram matrices."""
    count, channels = centred.shape
    wide = count < channels
    gram = centred @ centred.T if wide else centred.T @ centred
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    values, vectors = values[::-1][:3], vectors[:, ::-1][:, :3]
    axes = vectors.T @ centred if wide else vectors.T
    norms = np.linalg.norm(axes, axis=1, keepdims=True)
    present = values > 1e-7 * max(float(values[0]), 1e-30)
    result = np.zeros((3, channels), np.float32)
    result[: len(axes)] = np.where(present[:, None], axes / np.where(norms > 0, norms, 1), 0)
    return result


def _fixed_signs(axes: np.ndarray) -> np.ndarray:
    """Each axis turned so that its largest entry is positive: an eigenvector's own sign is arbitrary."""
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return axes * np.where(largest < 0, np.float32(-1), np.float32(1))


def _aligned(axes: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The axes in the order and with the signs that agree best with `reference` [3, channels]."""
    if axes.shape != reference.shape:
        raise ValueError(f"tokens of {axes.shape[1]} channels, but `like` was fitted to {reference.shape[1]}")
    cosines = reference @ axes.T
    order = list(max(permutations(range(3)), key=lambda p: sum(abs(cosines[i, j]) for i, j in enumerate(p))))
    signs = np.where(cosines[range(3), order] < 0, np.float32(-1), np.float32(1))
    return axes[order] * signs[:, None]
