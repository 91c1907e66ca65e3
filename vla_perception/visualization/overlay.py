"""Token colors laid over the image that the tokens come from. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_perception.tokens import View

#: Pixels that are painted at a time: what is needed meanwhile is several times as large as they are.
_AT_A_TIME = 1 << 18


def overlay(
    colors: np.ndarray,
    view: View,
    image: np.ndarray | None = None,
    opacity: float = 0.6,
    *,
    size: tuple[int, int] | None = None,
    background: int = 0,
) -> np.ndarray:
    """uint8 RGB [height, width, 3]: every pixel in the color of the token that sees it.

    Args:
        colors: uint8 [rows, columns, 3], one per patch of the grid.
        view: where the patches lie in the source image. What no token sees (cropped away, or beyond the grid) keeps
            the image, or is `background` without one.
        image: uint8 [height, width, 3] to lay the colors over; without one they are opaque.
        opacity: 0 to 1, of the colors over an image.
        size: (height, width) of the result, which the view is scaled to; the source image's unless given.
        background: grey level.
    """
    grid = colors.shape[:2]
    height, width = size or (view.height, view.width)
    # One more color, at -1, for the pixels that no token sees.
    painted = np.full((grid[0] * grid[1] + 1, 3), background, np.uint8)
    painted[:-1] = colors.reshape(-1, 3)
    share = np.full((len(painted), 1), round(opacity * 256), np.uint16)
    share[-1] = 0
    result = np.empty((height, width, 3), np.uint8)
    x = (np.arange(width) + 0.5) * (view.width / width)
    step = max(1, _AT_A_TIME // width)
    for top in range(0, height, step):
        rows = np.arange(top, min(height, top + step))
        patch = view.patch_at(x, (rows[:, None] + 0.5) * (view.height / height), grid)
        color = painted[patch]
        if image is not None:
            part = share[patch]
            color = (image[rows[0] : rows[-1] + 1] * (256 - part) + color * part + 128) >> 8
        result[rows[0] : rows[-1] + 1] = color
    return result


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
