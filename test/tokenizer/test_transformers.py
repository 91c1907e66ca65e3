"""Towers and connectors against transformers' own PaliGemma and SmolVLM, of several small shapes, in LeRobot's layout."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("transformers")
import checkpoints  # noqa: E402
import lerobot_checkpoints  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.double()).norm() / expected.double().norm())


def shapes(kind: str, seed: int) -> dict[str, int]:
    """A configuration drawn from `seed`."""
    generator = np.random.default_rng(seed)
    common = {"blocks": int(generator.integers(1, 4)), "hidden": int(generator.integers(40, 300)), "seed": seed}
    common["out"] = 8 * int(generator.integers(2, 9))
    if kind == "pi05":
        return common | {"width": 72 * int(generator.integers(1, 4)), "image_size": 14 * int(generator.integers(2, 8))}
    shuffle = int(generator.integers(2, 5))
    side = shuffle * int(generator.integers(1, 5))
    return common | {"width": 64 * int(generator.integers(1, 4)), "image_size": 16 * side, "shuffle": shuffle}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["pi05", "smolvla"])
def test_features_and_tokens_are_those_of_transformers(kind, seed, device, tmp_path):
    chosen = shapes(kind, seed)
    model = (lerobot_checkpoints.paligemma if kind == "pi05" else lerobot_checkpoints.smolvlm)(**chosen)
    tensors = lerobot_checkpoints.vision_tensors(kind, model, with_vision_model=bool(seed % 2))
    folder = lerobot_checkpoints.write(tmp_path / kind, kind, tensors, chosen["image_size"])
    tokenizer = VisualTokenizer.load(folder, device=device, compute_dtype="float32")
    pixel_values = tokenizer.preprocess([checkpoints.image(seed), checkpoints.image(seed + 1, 60, 40)])
    output = tokenizer.encode(pixel_values, features=True)
    features, tokens = lerobot_checkpoints.computed(model, pixel_values[0].cpu())
    assert output.features.shape == features.shape and output.tokens.shape == tokens.shape
    assert relative_error(output.features, features) < 1e-5
    assert relative_error(output.tokens, tokens) < 1e-5
    rows, columns = tokenizer.grid
    assert rows * columns == tokens.shape[1] == tokenizer.tokens_per_view


def test_images_of_another_size_than_the_positions_were_trained_at(tmp_path):
    """SmolVLM buckets positions; PaliGemma takes none but its own size, and that is said."""
    model = lerobot_checkpoints.smolvlm(image_size=128, shuffle=2)
    tensors = lerobot_checkpoints.vision_tensors("smolvla", model)
    for size in (96, 192, 160):
        folder = lerobot_checkpoints.write(tmp_path / str(size), "smolvla", tensors, size)
        tokenizer = VisualTokenizer.load(folder, device="cpu", compute_dtype="float32")
        pixel_values = tokenizer.preprocess([checkpoints.image()])
        _, tokens = lerobot_checkpoints.computed(model, pixel_values[0])
        assert relative_error(tokenizer.encode(pixel_values).tokens, tokens) < 1e-5
    tensors = lerobot_checkpoints.vision_tensors("pi05", lerobot_checkpoints.paligemma(image_size=56))
    folder = lerobot_checkpoints.write(tmp_path / "pi05", "pi05", tensors, 84)
    with pytest.raises(ValueError, match="position embeddings are for 4 × 4 patches"):
        VisualTokenizer.load(folder)
