"""Miniature policies that LeRobot's own classes saved: tokens are the embeddings of LeRobot's own run.

The files in test/data/lerobot/policies come from make_lerobot_policy.py (test/data/README.md). Embeddings are what
`embed_image` gave, so before SmolVLA's `embed_prefix` multiplies them by the square root of their width.
"""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")
from parity import relative_error

from vla_perception.tokenizer import VisualTokenizer

POLICIES = Path(__file__).parents[1] / "data/lerobot/policies"
VERSIONS = ("0.4.4", "0.6.1")


@pytest.mark.parametrize("kind", ["smolvla", "pi05"])
@pytest.mark.parametrize("version", VERSIONS)
def test_tokens_are_the_embeddings_of_lerobots_own_run(kind, version):
    # What LeRobot 0.4 pads images of π0.5 with that are not square, as these are.
    transforms = ["resize_with_pad_lerobot_0_4"] if (kind, version) == ("pi05", "0.4.4") else []
    tokenizer, expected, tokens = computed(kind, version, transforms)
    assert len(tokens) < len(expected) or kind == "pi05", "SmolVLA has an empty camera"
    for view, reference in enumerate(expected):
        found = tokens[view] if view < len(tokens) else tokenizer.encode_empty().tokens[0].numpy()
        assert found.shape == reference.shape
        assert relative_error(found, reference) < 1e-5


def test_lerobot_0_4_and_later_ones_feed_other_images_to_pi05():
    """Otherwise the transform above would prove nothing."""
    for version, transforms in (("0.4.4", []), ("0.6.1", ["resize_with_pad_lerobot_0_4"])):
        _, expected, tokens = computed("pi05", version, transforms)
        assert relative_error(tokens, expected) > 0.1


def computed(kind: str, version: str, transforms: list[str]) -> tuple[VisualTokenizer, np.ndarray, np.ndarray]:
    """The tokenizer, LeRobot's embeddings, and the tokenizer's of the same images: [views, tokens, channels]."""
    tokenizer = VisualTokenizer.load(
        POLICIES / kind, device="cpu", compute_dtype="float32", image_transforms=transforms
    )
    with np.load(POLICIES / kind / f"reference-{version}.npz") as reference:
        images, expected = list(reference["images"]), reference["embeddings"]
    return tokenizer, expected, tokenizer(images).tokens.numpy()
