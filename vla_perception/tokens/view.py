"""`View`: where the tokens of one view come from, and the map from its source image's pixels to patches. NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from vla_perception.tokens import codec

#: Pixels.
_WITHIN_PIXEL = 1e-6


@dataclass(frozen=True)
class View:
    """Where the tokens of one view come from.

    Attributes:
        camera: its name in the tokenizer's configuration.
        frame_id, stamp_ns: the image's header; nanoseconds since the epoch of its clock.
        height, width: size of the source image in pixels.
        affine: six floats, row-major 2 × 3: source pixel (x, y, 1) → (column, row) on the grid. Pixel i covers
            [i, i + 1), token j covers [j, j + 1).
        valid: false where no image could be had and the tokens are to be ignored.
        roi: region of interest (left, top, right, bottom) in pixels: the part of the source image that was left for the
            encoders when it was cropped; None: all of it. The message calls it ``seen``.

    Raises:
        ValueError: a name of more than 1000 characters, or a stamp beyond the 32 bits that a message has for seconds.
    """

    camera: str
    frame_id: str
    stamp_ns: int
    height: int
    width: int
    affine: tuple[float, ...]
    valid: bool = True
    roi: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        codec.string(self.camera)
        codec.string(self.frame_id)
        if not -(2**31) <= self.stamp_ns // 10**9 < 2**31:
            raise ValueError(f"a stamp of {codec.brief(self.stamp_ns)} ns is beyond what a message can hold")

    def to_metadata(self) -> dict[str, object]:
        """The view's entry in the metadata."""
        entry: dict[str, object] = {
            "camera": self.camera,
            "frame_id": self.frame_id,
            "stamp": {"sec": self.stamp_ns // 10**9, "nanosec": self.stamp_ns % 10**9},
            "height": self.height,
            "width": self.width,
            "affine": list(self.affine),
            "valid": self.valid,
        }
        return entry if self.roi is None else entry | {"seen": list(self.roi)}

    @classmethod
    def from_metadata(cls, entry: Mapping) -> View:
        """Reads what `to_metadata` made; KeyError, TypeError, ValueError for anything else."""
        camera, frame_id, stamp = entry["camera"], entry["frame_id"], entry["stamp"]
        sec, nanosec = codec.whole_number(stamp["sec"], -(2**31), 2**31), codec.whole_number(stamp["nanosec"], 0, 10**9)
        return cls(
            camera=camera,
            frame_id=frame_id,
            stamp_ns=sec * 10**9 + nanosec,
            height=codec.whole_number(entry["height"]),
            width=codec.whole_number(entry["width"]),
            affine=codec.affine_map(entry["affine"]),
            valid=codec.boolean(entry["valid"]),
            roi=codec.rectangle(entry["seen"]) if "seen" in entry else None,
        )

    def on_finer_grid(self, k: int) -> View:
        """The view on a grid of k × k patches for each one, as features have before `VisualTokens.pixel_shuffle`."""
        return replace(self, affine=tuple(k * value for value in self.affine))

    def patch_at(self, x: np.ndarray | float, y: np.ndarray | float, grid: tuple[int, int]) -> np.ndarray:
        """Index on the grid, row by row, of the patch that sees each position of the source image; −1 where none does.

        No patch sees what was cropped away (by `roi` or by the resize), nor what lies outside the image or the grid.
        Positions on the border between patches belong to the patch to the right of and below it in the source image,
        whichever way the image was turned.

        Args:
            x, y: pixels of the source image; pixel i covers [i, i + 1), its centre is i + 0.5. Arrays broadcast, and
                x [width] with y [height, 1] costs least.
            grid: (rows, columns), `VisualTokens.grid`. A cls token before it is not counted.

        Returns:
            intp, of the shape that x and y broadcast to.
        """
        a, b, c, d, e, f = self.affine
        left, top, right, bottom = self.roi or (0, 0, self.width, self.height)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        inside_x, inside_y = x + _WITHIN_PIXEL, y + _WITHIN_PIXEL
        # Without a quarter turn a column depends on x alone and a row on y alone: then these stay one-dimensional.
        with np.errstate(invalid="ignore"):
            column = np.floor(a * inside_x + b * inside_y + c if b else a * inside_x + c)
            row = np.floor(d * inside_x + e * inside_y + f if d else e * inside_y + f)
        # Cropped pixels may have a place on the grid, where a letterbox puts its padding: hence the roi.
        column_seen = (column >= 0) & (column < grid[1]) & (left <= x) & (x < right)
        row_seen = (row >= 0) & (row < grid[0]) & (top <= y) & (y < bottom)
        nowhere = -grid[0] * grid[1]
        start = np.where(row_seen, row * grid[1], nowhere).astype(np.intp)
        return np.maximum(start + np.where(column_seen, column, nowhere).astype(np.intp), -1)
