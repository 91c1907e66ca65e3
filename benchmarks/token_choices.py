"""What a choice of tokens keeps: how exactly a linear layer reads an object's position from them, and what a projector mixes.

    python benchmarks/token_choices.py                                  # the preset `tiny-random`, random weights
    python benchmarks/token_choices.py --model openvla/openvla-7b
    python benchmarks/token_choices.py --figure docs/images/choices.png

A disc lies at random places on a photograph. From the tokens of one part of the images a ridge regression learns
where it is, and tells it for the other part; the error is in pixels of a 224 × 224 image. With random weights this
says what the architecture lets through, and nothing of what training adds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from vla_perception.cli import add_placement  # noqa: E402
from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokenizer.projector import Projector  # noqa: E402
from vla_perception.tokenizer.weights import random_weight  # noqa: E402

SIDE, RADIUS, MARGIN = 224, 13, 20


def image(x: float, y: float, brightness: float = 1.0) -> np.ndarray:
    """uint8 [224, 224, 3]: a blue disc around (x, y) on a photograph."""
    table = Image.fromarray(skimage.data.coffee()[40:360, 140:460]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    ImageDraw.Draw(table).ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), fill=(36, 92, 200))
    return np.clip(np.asarray(table) * brightness, 0, 255).astype(np.uint8)


def read_out(train: np.ndarray, places: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression in its dual form, its strength chosen by leaving one out: float [images, 2] for `test`."""
    centre, mean = train.mean(0), places.mean(0)
    train, test = train - centre, test - centre
    gram = train @ train.T
    values, vectors = np.linalg.eigh(gram)
    best = None
    for strength in np.trace(gram) / len(gram) * 10.0 ** np.arange(-8, 5):
        inverse = (vectors / (values.clip(0) + strength)) @ vectors.T
        weights = inverse @ (places - mean)
        error = float(np.square(weights / np.diag(inverse)[:, None]).sum())
        if best is None or error < best[0]:
            best = (error, weights)
    return test @ (train.T @ best[1]) + mean


def pooled(patches: np.ndarray, grid: tuple[int, int], k: int) -> np.ndarray:
    """[images, tokens, channels] → k × k neighbours averaged."""
    rows, columns = grid
    split = patches.reshape(len(patches), rows // k, k, columns // k, k, -1)
    return split.mean((2, 4)).reshape(len(patches), rows // k * (columns // k), -1)


def mixing(kind: str, first: np.ndarray, second: np.ndarray, split: int) -> float:
    """How much of a change of tokens is owed to both encoders together, and not to one plus the other.

    Args:
        first, second: [tokens, channels] features of two images; the first `split` channels are one encoder's.
    """
    projector = Projector(kind, first.shape[1], first.shape[1]).eval()
    shapes = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    projector.load_state_dict({name: random_weight(f"projector.{name}", shape, 0) for name, shape in shapes.items()})

    def tokens(left: np.ndarray, right: np.ndarray) -> torch.Tensor:
        joined = np.concatenate([left[:, :split], right[:, split:]], axis=1)
        with torch.inference_mode():
            return projector(torch.from_numpy(joined))

    both, neither = tokens(second, second), tokens(first, first)
    together = both - tokens(second, first) - tokens(first, second) + neither
    return float(together.norm() / (both - neither).norm())


def figure(path: Path, encode, grid: tuple[int, int]) -> None:
    """Two images that differ in where the disc is, and how much every token changed."""
    images = [image(70, 90), image(150, 150)]
    before, after = encode(images)
    cells: list[tuple[str, Image.Image]] = [
        ("before", Image.fromarray(images[0])),
        ("after", Image.fromarray(images[1])),
    ]
    for k in (1, 2, 7):
        change = np.linalg.norm(pooled(after[None, 1:] - before[None, 1:], grid, k)[0], axis=-1)
        cells.append((f"{len(change)} patch tokens" + (f" (pool {k})" if k > 1 else ""), _heat(change, grid[0] // k)))
    cells.append(("1 cls token", _heat(np.ones(1), 1)))
    gap, top = 10, 26
    sheet = Image.new("RGB", (gap + len(cells) * (SIDE + gap), SIDE + top + gap), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for index, (label, cell) in enumerate(cells):
        pen.text((gap + index * (SIDE + gap), 6), label, (28, 30, 34), ImageFont.load_default(15))
        sheet.paste(cell, (gap + index * (SIDE + gap), top))
    sheet.save(path, optimize=True)
    print(path)


def _heat(change: np.ndarray, side: int) -> Image.Image:
    share = (change / change.max()).reshape(side, side, 1)
    colors = (1 - share) * np.array([247, 247, 250]) + share * np.array([178, 24, 43])
    return Image.fromarray(colors.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-random")
    add_placement(parser)
    parser.add_argument("--images", type=int, default=1000, help="a quarter of them is told, not learned")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw what changes when the disc moves, and end")
    options = parser.parse_args()

    tokenizer = VisualTokenizer.load(
        options.model,
        device=options.device,
        compute_dtype=options.compute_dtype,
        projector="none",
        token_strategy="cls+patch",
    )
    encoders, grid = tokenizer.metadata()["encoders"], tokenizer.grid

    def encode(images) -> np.ndarray:
        parts = [tokenizer(images[start : start + 16]).tokens for start in range(0, len(images), 16)]
        return torch.cat(parts).float().cpu().numpy()

    if options.figure:
        return figure(options.figure, encode, grid)
    random = np.random.default_rng(0)
    places = random.uniform(MARGIN, SIDE - MARGIN, (options.images, 2))
    tokens = encode([image(x, y, random.uniform(0.8, 1.1)) for x, y in places])
    learned = options.images * 3 // 4

    print(
        f"{tokenizer.model}, {tokenizer.weights} weights; {learned} images learned, {options.images - learned} told\n"
    )
    print("| encoders | tokens | numbers | error, median | error, 90 % |\n| --- | --- | ---: | ---: | ---: |")
    channels = {"+".join(encoder["name"] for encoder in encoders): (0, tokens.shape[-1])}
    channels |= {encoder["name"]: tuple(encoder["channels"]) for encoder in encoders}
    for name, (start, stop) in channels.items():
        part = tokens[..., start:stop]
        rows = {"cls": part[:, :1], f"patch, {grid[0] * grid[1]}": part[:, 1:]}
        for k in (2, 7, 14):
            if grid[0] % k == grid[1] % k == 0:
                rows[f"patch, pool {k}, {grid[0] * grid[1] // k**2}"] = pooled(part[:, 1:], grid, k)
        for label, values in rows.items():
            flat = values.reshape(len(values), -1).astype(np.float64)
            off = np.linalg.norm(read_out(flat[:learned], places[:learned], flat[learned:]) - places[learned:], axis=1)
            print(f"| {name} | {label} | {flat.shape[1]} | {np.median(off):.1f} px | {np.quantile(off, 0.9):.1f} px |")
    blind = np.linalg.norm(places[learned:] - places[:learned].mean(0), axis=1)
    print(f"| – | none: the middle | 0 | {np.median(blind):.1f} px | {np.quantile(blind, 0.9):.1f} px |")
    if len(encoders) == 2:
        print(
            "\n| projector (random weights) | share of a token's change owed to both encoders together |\n| --- | ---: |"
        )
        for kind in ("linear", "gelu-mlp", "fused-gelu-mlp"):
            share = mixing(kind, tokens[0, 1:], tokens[1, 1:], encoders[0]["channels"][1])
            print(f"| {kind} | {100 * share:.4f} % |")


if __name__ == "__main__":
    main()
