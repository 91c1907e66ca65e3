"""Runs of `vla-perception tokenize` in a test, with a stand-in for the tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pixel_tokenizer import PixelTokenizer
from recorded import numbered_image, write_bag

from vla_perception.offline import run
from vla_perception.offline.recordings import Selection, open_recordings

ROOT = Path(__file__).resolve().parents[2]
#: Written by LeRobot itself: 3 episodes of 25, 18 and 31 frames, two cameras, state and action.
DATASET = ROOT / "test/data/lerobot/moving_crops"
MS = 1_000_000


def tokenize(out, sources, tokenizer=None, *, selection=None, report=lambda _: None, **changes):
    """A whole run; returns its index and statistics."""
    tokenizer = tokenizer or PixelTokenizer()
    settings = run.RunSettings(out, selection or Selection(), **changes)
    recordings = open_recordings(sources, settings.selection)
    index = run.begin(settings, tokenizer, recordings)
    failed, statistics = run.encode_recordings(recordings, tokenizer, settings, report=report)
    return run.end(settings, index, recordings, failed), statistics


def contents(folder):
    """Relative path → bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def bfloat16(values):
    """The upper half of float32, rounded to nearest, ties to even: as words."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_drive(path):
    """A bag of four frame sets of two cameras, and of eight commands."""
    frames = []
    for index in range(4):
        frames.append(("/front/image_raw", 10**9 + index * 100 * MS, numbered_image(index)))
        frames.append(("/wrist/image_raw", 10**9 + (index * 100 + 10) * MS, numbered_image(50 + index)))
    return write_bag(path, frames, values=[("/command", 10**9 + index * 50 * MS, [index]) for index in range(8)])
