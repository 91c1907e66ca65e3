"""The full-size openvla-7b layout, loaded and run, against results of OpenVLA's own code (test/data/README.md)."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import skimage.data  # noqa: E402
from parity import DATA, formula_checkpoint, loading, relative_error  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402

VISION_PARAMETERS = 759_000_000


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    """The reference checkpoint (1.6 GB)."""
    return formula_checkpoint("openvla-7b", "make_checkpoint.py")


@pytest.fixture(scope="module")
def reference():
    return np.load(DATA / "openvla-7b.npz")


@pytest.fixture(scope="module")
def outputs(checkpoint):
    """Both images as one batch of two views, in float32."""
    tokenizer = VisualTokenizer.from_checkpoint(checkpoint)
    pixel_values = tokenizer.preprocess([skimage.data.astronaut(), skimage.data.coffee()])
    return tokenizer, pixel_values, tokenizer.encode(pixel_values, features=True)


@pytest.mark.parametrize("view, name", [(0, "astronaut"), (1, "coffee")])
def test_agrees_with_openvla(outputs, reference, view, name):
    tokenizer, pixel_values, output = outputs
    stacked = torch.cat([pixels[view] for pixels in pixel_values]).numpy()
    np.testing.assert_array_equal(stacked[:, ::8, ::8], reference[f"{name}.pixel_values"])

    rows = reference[f"{name}.rows"]
    for kind in ("features", "tokens"):
        values = getattr(output, kind)[view].numpy()
        assert relative_error(values[rows], reference[f"{name}.{kind}"]) < 1e-4
        norms = np.linalg.norm(values, axis=-1)
        np.testing.assert_allclose(norms, reference[f"{name}.{kind}_norm"], rtol=1e-4)


def test_shape_and_metadata(outputs):
    tokenizer, _, output = outputs
    assert output.tokens.shape == (2, 256, 4096)
    assert output.features.shape == (2, 256, 2176)
    assert tokenizer.grid == (16, 16)
    metadata = tokenizer.metadata()
    assert [(e["name"], e["layer"], e["channels"]) for e in metadata["encoders"]] == [
        ("dinov2", 22, [0, 1024]),
        ("siglip", 25, [1024, 2176]),
    ]
    assert tokenizer.weights == "checkpoint"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_memory_while_loading_and_fingerprint_of_every_dtype(checkpoint, outputs, tmp_path):
    fingerprints = {outputs[0].fingerprint}
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        facts = loading(checkpoint, dtype, tmp_path)
        fingerprints.add(facts["fingerprint"])
        assert facts["growth"] < VISION_PARAMETERS * size + 0.5e9
    assert len(fingerprints) == 1
