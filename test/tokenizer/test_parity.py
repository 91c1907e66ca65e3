"""The full-size openvla-7b layout, loaded and run, against results of OpenVLA's own code (test/data/README.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import skimage.data  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
VISION_PARAMETERS = 759_000_000


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The reference checkpoint (1.6 GB), written once into a cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "vla_perception-test" / "openvla-7b-formula"
    if not (folder / "preprocessor_config.json").is_file():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        subprocess.run([sys.executable, DATA / "make_checkpoint.py", partial], check=True)
        try:
            partial.rename(folder)
        except OSError:  # another run was quicker
            for file in partial.iterdir():
                file.unlink()
            partial.rmdir()
    return folder


@pytest.fixture(scope="session")
def reference():
    return np.load(DATA / "openvla-7b.npz")


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="session")
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


# The child sets its own cache folder, so the digest is computed in one run and found in the other.
_LOADER = """
import json, sys, time, threading
import torch
from vla_perception.tokenizer import VisualTokenizer

def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))

before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        done.wait(0.005)
thread = threading.Thread(target=watch); thread.start()
tokenizer = VisualTokenizer.from_checkpoint(sys.argv[1], compute_dtype=sys.argv[2])
done.set(); thread.join()
print(json.dumps({"growth": max(peak, anonymous()) - before, "fingerprint": tokenizer.fingerprint}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_memory_while_loading_and_fingerprint_of_every_dtype(checkpoint, outputs, tmp_path):
    fingerprints = {outputs[0].fingerprint}
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        result = subprocess.run(
            [sys.executable, "-c", _LOADER, checkpoint, dtype],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        facts = json.loads(result.stdout)
        fingerprints.add(facts["fingerprint"])
        assert facts["growth"] < VISION_PARAMETERS * size + 0.5e9
    assert len(fingerprints) == 1
