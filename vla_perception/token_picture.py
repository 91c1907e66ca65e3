"""Token colours laid over the picture that the tokens come from. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def overlay(
    colours: np.ndarray,
    affine: Sequence[float],
    height: int,
    width: int,
    picture: np.ndarray | None = None,
    opacity: float = 0.6,
) -> np.ndarray:
    """uint8 [height, width, 3] RGB: every patch of the grid painted where it lies in the source picture.

    colours: uint8 [rows, columns, 3]. affine: six floats, row-major 2 x 3, source pixel (x, y, 1) -> (column, row).
    picture: uint8 [height, width, 3]; without one the colours are opaque on black. Pixels that no token sees keep
    the picture.
    """
    rows, columns = colours.shape[:2]
    index = _patch_of_pixel(tuple(affine), height, width, rows, columns)
    # One more colour for the pixels of no patch (index -1).
    painted = np.concatenate([colours.reshape(-1, 3), np.zeros((1, 3), np.uint8)])[index]
    if picture is None:
        return painted
    share = np.where(index >= 0, round(opacity * 256), 0).astype(np.uint16)[:, :, None]
    return ((picture * (256 - share) + painted * share + 128) >> 8).astype(np.uint8)


@lru_cache(maxsize=8)
def _patch_of_pixel(affine: tuple, height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """int32 [height, width]: index of the patch that a pixel's centre lies in, -1 outside the grid."""
    a, b, c, d, e, f = affine
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    column, row = np.floor(a * x + b * y + c), np.floor(d * x + e * y + f)
    inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    return np.where(inside, row * columns + column, -1).astype(np.int32)


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [h, w, 3]: pictures next to each other, all at the first one's height (nearest pixel, aspect kept)."""
    height = pictures[0].shape[0]
    return np.concatenate([_at_height(picture, height) for picture in pictures], axis=1)


def _at_height(picture: np.ndarray, height: int) -> np.ndarray:
    if picture.shape[0] == height:
        return picture
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    rows = (np.arange(height) + 0.5) * picture.shape[0] // height
    columns = (np.arange(width) + 0.5) * picture.shape[1] // width
    return picture[rows.astype(int)[:, None], columns.astype(int)]
