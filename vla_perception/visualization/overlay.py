"""Token colors laid over the image that the tokens come from. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Pixels that are painted at a time: what is needed meanwhile is several times as large as they are.
_AT_A_TIME = 1 << 18


def overlay(
    colors: np.ndarray,
    affine: Sequence[float],
    height: int,
    width: int,
    image: np.ndarray | None = None,
    opacity: float = 0.6,
) -> np.ndarray:
    """uint8 [height, width, 3] RGB: every patch of the grid painted where it lies in the source image.

    colors: uint8 [rows, columns, 3]. affine: six floats, row-major 2 x 3, source pixel (x, y, 1) -> (column, row).
    image: uint8 [height, width, 3]; without one the colors are opaque on black. Pixels that no token sees keep
    the image.
    """
    rows, columns = colors.shape[:2]
    # One more row and column for the pixels of no patch.
    painted = np.zeros((rows + 1, columns + 1, 3), np.uint8)
    painted[:rows, :columns] = colors
    share = np.zeros((rows + 1, columns + 1, 1), np.uint16)
    share[:rows, :columns] = round(opacity * 256)
    result = np.empty((height, width, 3), np.uint8)
    step = max(1, _AT_A_TIME // width)
    for top in range(0, height, step):
        block = slice(top, min(height, top + step))
        row, column = _patch_of_pixel(affine, np.arange(block.start, block.stop), width, rows, columns)
        color = painted[row, column]
        if image is not None:
            part = share[row, column]
            color = (image[block] * (256 - part) + color * part + 128) >> 8
        result[block] = color
    return result


def _patch_of_pixel(
    affine: Sequence[float], lines: np.ndarray, width: int, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the patch that a pixel's centre lies in, (rows, columns) outside the grid.

    Integers that broadcast to [lines, width]: [lines, 1] and [1, width] unless the grid is turned by 90 degrees.
    """
    a, b, c, d, e, f = affine
    x, y = np.arange(width)[None] + 0.5, lines[:, None] + 0.5
    column = np.floor(a * x + b * y + c if b else a * x + c)
    row = np.floor(d * x + e * y + f if d else e * y + f)
    return (
        np.where((row >= 0) & (row < rows), row, rows).astype(np.intp),
        np.where((column >= 0) & (column < columns), column, columns).astype(np.intp),
    )


def side_by_side_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of what `side_by_side` makes of images of these heights and widths."""
    height = sizes[0][0]
    return height, sum(_width_at(height, *size) for size in sizes)


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [h, w, 3]: images next to each other, all at the first one's height (nearest pixel, aspect kept)."""
    if len(images) == 1:
        return images[0]
    height = images[0].shape[0]
    return np.concatenate([_at_height(image, height) for image in images], axis=1)


def _width_at(height: int, of_height: int, of_width: int) -> int:
    return max(1, round(of_width * height / of_height))


def _at_height(image: np.ndarray, height: int) -> np.ndarray:
    if image.shape[0] == height:
        return image
    width = _width_at(height, *image.shape[:2])
    rows = (np.arange(height) + 0.5) * image.shape[0] // height
    columns = (np.arange(width) + 0.5) * image.shape[1] // width
    return image[rows.astype(int)[:, None], columns.astype(int)]
