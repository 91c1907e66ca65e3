"""Figures of token messages: camera images beside what encoders and projector make of them, as colors. Needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vla_perception.tokens import VisualTokens
from vla_perception.visualization.overlay import overlay
from vla_perception.visualization.principal_components import PrincipalComponents

CELL_WIDTH = 288
GAP = 8
BACKGROUND, UNSEEN, INK, FAINT = (255, 255, 255), 232, (28, 30, 34), (110, 114, 122)
LABELS = {"dinov2": "DINOv2", "siglip": "SigLIP"}

_TOP, _LABEL_HEIGHT = 114, 26


@dataclass(frozen=True)
class Moment:
    """A token message with the images that it came from: uint8 RGB [height, width, 3], one per view."""

    seconds: float
    tokens: VisualTokens
    images: Sequence[np.ndarray]


@dataclass(frozen=True)
class _Column:
    """A column of the figure: its label, and per moment and view uint8 [rows, columns, 3]."""

    label: str
    colors: list[list[np.ndarray]]


def draw_moments(moments: Sequence[Moment], path: Path) -> None:
    """Writes a PNG: a row per moment and view; columns: the image, each encoder alone, the projected tokens.

    Colors are the first three principal components, fitted per column to everything that is shown in it, so that
    within a column the same color means the same direction in token space. Without features in the messages the
    encoders' columns are left out; what no token sees (cropped off, or beyond the grid) is light grey. ValueError
    without moments.
    """
    if not moments:
        raise ValueError("no moment to draw")
    first = moments[0].tokens
    columns = _columns(moments)
    heights = [round(CELL_WIDTH * view.height / view.width) for view in first.views]
    width = GAP + (1 + len(columns)) * (CELL_WIDTH + GAP)
    height = _TOP + len(moments) * sum(h + _LABEL_HEIGHT for h in heights) + GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    _write_heading(pen, first, ["Camera", *(column.label for column in columns)])
    y = _TOP
    for row, moment in enumerate(moments):
        for index, view in enumerate(moment.tokens.views):
            size = (heights[index], CELL_WIDTH)
            cells = [Image.fromarray(moment.images[index]).resize(size[::-1], Image.Resampling.LANCZOS)]
            for column in columns:
                colors = column.colors[row][index]
                finer = view.on_finer_grid(len(colors) // moment.tokens.grid[0])
                painted = overlay(colors, finer, size=size, background=UNSEEN)
                cells.append(Image.fromarray(painted))
            for place, cell in enumerate(cells):
                sheet.paste(cell, (GAP + place * (CELL_WIDTH + GAP), y))
            y += size[0]
            pen.text((GAP, y + 3), f"{view.camera} · {moment.seconds:.1f} s", FAINT, _font(14))
            y += _LABEL_HEIGHT
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _write_heading(pen: ImageDraw.ImageDraw, tokens: VisualTokens, labels: Sequence[str]) -> None:
    weights = "random weights" if tokens.weights == "random" else "trained weights"
    pen.text((GAP, 10), f"Visual tokens of “{tokens.model}”, {weights}", INK, _font(22))
    notes = [
        f"{tokens.grid[0]} by {tokens.grid[1]} tokens per view, received over DDS in {tokens.dtype}. "
        "Color: the first three principal components of each column."
    ]
    if tokens.weights == "random":
        notes.append("With random weights, colors show what the encoders tell apart; they mean nothing yet.")
    for line, note in enumerate(notes):
        pen.text((GAP, 40 + 20 * line), note, FAINT, _font(14))
    for column, label in enumerate(labels):
        pen.text((GAP + column * (CELL_WIDTH + GAP), 88), label, INK, _font(15))


def _columns(moments: Sequence[Moment]) -> list[_Column]:
    columns = []
    if all(moment.tokens.features is not None for moment in moments):
        for encoder in moments[0].tokens.encoders:
            name = str(encoder["name"])
            values = [m.tokens.features_float32()[..., m.tokens.encoder_channels(name)] for m in moments]
            columns.append(_column(LABELS.get(name, name) + " alone", moments, values))
    columns.append(_column("Projected tokens", moments, [m.tokens.float32() for m in moments]))
    return columns


def _column(label: str, moments: Sequence[Moment], values: Sequence[np.ndarray]) -> _Column:
    """values: float32 [views, tokens, channels] per moment."""
    grids = [moment.tokens.as_grid(value) for moment, value in zip(moments, values)]
    channels = grids[0].shape[-1]
    basis = PrincipalComponents.fit(np.concatenate([grid.reshape(-1, channels) for grid in grids]))
    colors = [[basis.rgb(view.reshape(-1, channels)).reshape(*view.shape[:2], 3) for view in grid] for grid in grids]
    return _Column(f"{label} · {channels} channels", colors)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
