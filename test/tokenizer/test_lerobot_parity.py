"""The full-size layouts of π0.5 and SmolVLA, loaded and run, against results of LeRobot's and transformers' own code."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import skimage.data  # noqa: E402
from parity import DATA, formula_checkpoint, loading, relative_error  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402

#: Numbers of π0.5's tower and connector.
PARAMETERS = 414_803_696
IMAGES = ("astronaut", "coffee")
WAYS = [("pi05", "lerobot"), ("pi05", "openpi"), ("smolvla", "lerobot")]


def checkpoint(kind: str) -> Path:
    """The reference checkpoint (0.83 and 0.2 GB)."""
    return formula_checkpoint(kind, "make_lerobot_checkpoint.py", kind)


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def computed(request):
    """One way to resize: the tokenizer, and both images as one batch of two views, in float32."""
    kind, way = request.param
    transforms = ["resize_with_pad_pil"] if way == "openpi" else []
    tokenizer = VisualTokenizer.load(checkpoint(kind), compute_dtype="float32", image_transforms=transforms)
    pixel_values = tokenizer.preprocess([getattr(skimage.data, name)() for name in IMAGES])
    return kind, way, tokenizer, pixel_values[0], tokenizer.encode(pixel_values, features=True)


def test_agrees_with_lerobot_and_transformers(computed):
    kind, way, _, pixel_values, output = computed
    reference = np.load(DATA / f"{kind}.npz")
    for view, name in enumerate(IMAGES):
        expected = {key: reference[f"{name}.{way}.{key}"] for key in ("pixel_values", "rows", "feature_rows")}
        found = pixel_values[view].numpy()[:, ::8, ::8]
        np.testing.assert_allclose(found, expected["pixel_values"], rtol=0, atol=2.0**-23)
        for part, rows in (("features", expected["feature_rows"]), ("tokens", expected["rows"])):
            values = getattr(output, part)[view].numpy()
            assert relative_error(values[rows], reference[f"{name}.{way}.{part}"]) < 1e-4
            norms = np.linalg.norm(values, axis=-1)
            np.testing.assert_allclose(norms, reference[f"{name}.{way}.{part}_norm"], rtol=1e-4)


def test_shape_and_metadata(computed):
    kind, _, tokenizer, _, output = computed
    metadata = tokenizer.metadata()
    encoder = metadata["encoders"][0]
    if kind == "pi05":
        assert output.tokens.shape == (2, 256, 2048) and tokenizer.grid == (16, 16)
        assert (encoder["layer"], encoder["final_norm"], encoder["channels"]) == (26, True, [0, 1152])
        assert "base_0_rgb, left_wrist_0_rgb, right_wrist_0_rgb" in tokenizer.notes[0]
    else:
        assert output.tokens.shape == (2, 64, 960) and tokenizer.grid == (8, 8)
        assert (encoder["layer"], encoder["final_norm"], encoder["channels"]) == (11, True, [0, 768])
        assert (metadata["projector"], metadata["pixel_shuffle"]) == ("pixel-shuffle-linear", 4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_memory_while_loading_and_fingerprint_of_every_dtype(tmp_path):
    fingerprints = set()
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        facts = loading(checkpoint("pi05"), dtype, tmp_path)
        fingerprints.add(facts["fingerprint"])
        assert facts["growth"] < PARAMETERS * size + 0.5e9
    assert len(fingerprints) == 1
