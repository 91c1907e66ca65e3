"""`out/demo/tokens.png`: camera images beside what the encoders and the projector make of them, as colors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vla_perception.tokens import View, VisualTokens
from vla_perception.visualization.principal_components import PrincipalComponents

CELL_WIDTH = 288
GAP = 8
BACKGROUND, INK, FAINT = (255, 255, 255), (28, 30, 34), (110, 114, 122)


@dataclass(frozen=True)
class Moment:
    """A token message with the images that it came from: uint8 RGB [height, width, 3], one per view."""

    seconds: float
    tokens: VisualTokens
    images: Sequence[np.ndarray]


def draw(moments: Sequence[Moment], path: Path) -> None:
    """Writes the PNG: a row per moment and view; columns: the image, each encoder alone, the projected tokens.

    Colors are the first three principal components, fitted per column to everything that is shown in it, so that
    within a column the same color means the same direction in token space. Without features in the messages the
    encoders' columns are left out. ValueError without moments.
    """
    if not moments:
        raise ValueError("no moment to draw")
    first = moments[0].tokens
    columns = [(encoder["name"], _encoder_tokens(moments, str(encoder["name"]))) for encoder in first.encoders]
    columns = [(LABELS.get(str(name), str(name)) + " alone", values) for name, values in columns if values is not None]
    columns.append(("Projected tokens", [_rows(m.tokens, m.tokens.float32()) for m in moments]))
    colored = []
    for label, values in columns:
        basis = PrincipalComponents.fit(np.concatenate([rows for views in values for rows in views]))
        colors = [[basis.rgb(rows) for rows in views] for views in values]
        colored.append((f"{label} · {values[0][0].shape[1]} channels", colors))

    heights = [round(CELL_WIDTH * view.height / view.width) for view in first.views]
    top, label_height = 114, 26
    width = GAP + (1 + len(colored)) * (CELL_WIDTH + GAP)
    height = top + len(moments) * sum(h + label_height for h in heights) + GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    weights = "random weights" if first.weights == "random" else "trained weights"
    pen.text((GAP, 10), f"Visual tokens of “{first.model}”, {weights}", INK, _font(22))
    notes = [
        f"{first.grid[0]} by {first.grid[1]} tokens per view, received over DDS in {first.dtype}. "
        "Color: the first three principal components of each column."
    ]
    if first.weights == "random":
        notes.append("With random weights, colors show what the encoders tell apart; they mean nothing yet.")
    for line, note in enumerate(notes):
        pen.text((GAP, 40 + 20 * line), note, FAINT, _font(14))
    for column, label in enumerate(["Camera", *(label for label, _ in colored)]):
        pen.text((GAP + column * (CELL_WIDTH + GAP), 88), label, INK, _font(15))

    y = top
    for row, moment in enumerate(moments):
        for index, view in enumerate(moment.tokens.views):
            size = (CELL_WIDTH, heights[index])
            pasted = [Image.fromarray(moment.images[index]).resize(size, Image.Resampling.LANCZOS)]
            pasted += [
                Image.fromarray(over_image(colors[row][index], moment.tokens.grid, view, size)) for _, colors in colored
            ]
            for column, cell in enumerate(pasted):
                sheet.paste(cell, (GAP + column * (CELL_WIDTH + GAP), y))
            y += size[1]
            pen.text((GAP, y + 3), f"{view.camera} · {moment.seconds:.1f} s", FAINT, _font(14))
            y += label_height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


LABELS = {"dinov2": "DINOv2", "siglip": "SigLIP"}


def over_image(colors: np.ndarray, grid: tuple[int, int], view: View, size: tuple[int, int]) -> np.ndarray:
    """uint8 RGB [height, width, 3]: every pixel of the image, scaled to `size` (width, height), in its token's color.

    colors: uint8 [rows · columns, 3]. What no token sees (cropped off, or beyond the grid) is light grey.
    """
    rows, columns = grid
    a, b, c, d, e, f = view.affine
    x, y = np.meshgrid(
        (np.arange(size[0]) + 0.5) * view.width / size[0], (np.arange(size[1]) + 0.5) * view.height / size[1]
    )
    column = np.floor(a * x + b * y + c).astype(int)
    row = np.floor(d * x + e * y + f).astype(int)
    seen = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    image = np.full((size[1], size[0], 3), 232, np.uint8)
    image[seen] = colors.reshape(rows, columns, 3)[row[seen], column[seen]]
    return image


def _encoder_tokens(moments: Sequence[Moment], encoder: str) -> list[list[np.ndarray]] | None:
    if any(moment.tokens.features is None for moment in moments):
        return None
    return [_rows(m.tokens, m.tokens.features_float32()[..., m.tokens.encoder_channels(encoder)]) for m in moments]


def _rows(tokens: VisualTokens, values: np.ndarray) -> list[np.ndarray]:
    """Per view, the patch tokens row by row: float32 [rows · columns, channels]."""
    return [view.reshape(-1, view.shape[-1]) for view in tokens.as_grid(values)]


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
