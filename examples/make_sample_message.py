"""Writes examples/sample_message.safetensors, the data of one token message, and .json, what a reader finds in it.

    python examples/make_sample_message.py [FOLDER]

For authors of readers in other languages: two views of 2 × 3 patch tokens behind a cls token, in bfloat16, with
the encoders' features; the second view had no image. Needs NumPy; the same bytes on every machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from vla_perception.fingerprint_inputs import fingerprint
from vla_perception.tokens import FORMAT, View, VisualTokens

FOLDER = Path(__file__).resolve().parent
CHANNELS = 4
ENCODERS = (
    {"name": "dinov2", "timm_id": "vit_example", "layer": 1, "channels": [0, 3], "image_size": 42, "patch_size": 14},
    {"name": "siglip", "timm_id": "vit_example", "layer": 1, "channels": [3, 5], "image_size": 42, "patch_size": 14},
)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 → uint16 words of bfloat16; every value here is exact in it."""
    words = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert np.array_equal((words.astype(np.uint32) << 16).view(np.float32), values)
    return words


def sample() -> VisualTokens:
    """Token values count up from −4 in sixteenths, feature values from 0 in eighths."""
    tokens = (np.arange(2 * 7 * CHANNELS, dtype=np.float32) / 16 - 4).reshape(2, 7, CHANNELS)
    features = (np.arange(2 * 7 * 5, dtype=np.float32) / 8).reshape(2, 7, 5)
    inputs = {"settings": {"pool": 1, "prepare": ["crop"], "projector": "linear"}, "weights": "5a" * 32}
    front = View(
        camera="front",
        frame_id="front_optical",
        stamp_ns=1_700_000_000_123_456_789,
        height=480,
        width=640,
        affine=(0.006, 0.0, -0.42, 0.0, 0.005, -0.2),
        roi=(70.0, 40.0, 570.0, 440.0),
    )
    wrist = View(
        "wrist «名»", "wrist_optical", 1_700_000_000_100_000_000, 480, 640, (0.0, -0.005, 2.4, 0.004, 0.0, 0.0), False
    )
    return VisualTokens(
        data=bfloat16(tokens),
        dtype="bfloat16",
        views=(front, wrist),
        sequence=42,
        model="sample",
        weights="checkpoint",
        fingerprint=fingerprint(inputs),
        compute_dtype="float32",
        grid=(2, 3),
        token_strategy="cls+patch",
        pool=1,
        encoders=ENCODERS,
        projector="linear",
        features=bfloat16(features),
        fingerprint_inputs=inputs,
    )


def expected(tokens: VisualTokens) -> dict[str, object]:
    """What a reader of the sample must find. Sums are over a view's values in their order; weights are 0, 1, 2 …"""
    views = []
    for index, view in enumerate(tokens.views):
        values = tokens.float32()[index].astype(np.float64).ravel()
        views.append(
            {
                "camera": view.camera,
                "frame_id": view.frame_id,
                "sec": view.stamp_ns // 10**9,
                "nanosec": view.stamp_ns % 10**9,
                "valid": view.valid,
                "affine": view.affine,
                "seen": view.roi,
                "sum": values.sum(),
                "weighted": values @ np.arange(values.size),
                "token_of_pixels": [[x, y, tokens.token_at(x, y, index)] for x, y in ((320, 240), (100, 50), (5, 5))],
            }
        )
    return {
        "format": FORMAT,
        "bytes": len(tokens.to_bytes()),
        "shape": tokens.shape,
        "dtype": "BF16",
        "sequence": tokens.sequence,
        "fingerprint": tokens.fingerprint,
        "grid": tokens.grid,
        "token_strategy": tokens.token_strategy,
        "views": views,
        "tokens": tokens.float32().tolist(),
        "features": tokens.features_float32().tolist(),
    }


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    tokens = sample()
    tokens.save(folder / "sample_message.safetensors")
    text = json.dumps(expected(tokens), indent=1, ensure_ascii=False)
    (folder / "sample_message.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
