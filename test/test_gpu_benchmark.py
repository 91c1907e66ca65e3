"""The GPU's measurement kit runs from end to end, on fakes."""

import json
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import fake_cublaslt  # noqa: E402
import fake_cuda  # noqa: E402
from ros_harness import ROOT  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer, cublaslt, tuned_products  # noqa: E402
from vla_perception.tokenizer.cuda_graphs import CudaGraphs  # noqa: E402


@pytest.fixture
def kit(monkeypatch, tmp_path):
    """benchmarks/gpu.py, for a CPU that passes for a GPU, with little to do."""
    fake_cuda.install(monkeypatch)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    import gpu

    def load(model, dtype=None):
        tokenizer = VisualTokenizer.load(
            model, device="cpu", compute_dtype="float32", image_size=[28, 32], runtime="eager"
        )
        tokenizer._runtime = CudaGraphs(tokenizer.network, torch.device("cpu"), torch.float32)
        tokenizer._runtime.kernels = tuned_products.use(tokenizer.network)
        return tokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(tuned_products.TOLERANCES, torch.float32, 1e-4)
    monkeypatch.setattr(cublaslt, "open_library", lambda device: fake_cublaslt.FakeLt())
    for name, value in {
        "DEVICE": torch.device("cpu"),
        "DTYPE": torch.float32,
        "ROUNDS": 1,
        "REPEAT": 1,
        "PACED_ROUNDS": 1,
        "load": load,
        "SIZES": ((2, 48, 64),),
        "VARIANT_VIEWS": (1,),
        "ROTATED_WEIGHTS": 1000,
        "SEARCH_SECONDS": 5.0,
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu.gpu_preprocess, "SIZES", ((48, 64), (64, 96)))
    monkeypatch.setattr(gpu.gpu_preprocess, "LIBERO_SIZES", ((32, 32), (48, 64)))
    monkeypatch.setattr(gpu.gpu_variants, "ATTENTION_BLOCKS", ((16, 16, 1, 1),))
    with fake_cuda.one_thread():
        yield gpu


def test_every_question_is_answered(kit, tmp_path, capsys, monkeypatch):
    """Triton's kernels are not among what the fakes can record: they run, and take what the test says."""
    graph_us = kit.graph_us

    def timed(action):
        if "_kernel_actions" not in action.__qualname__:
            return graph_us(action)
        action()
        return 1.0

    monkeypatch.setattr(kit, "graph_us", timed)
    file = tmp_path / "gpu.json"
    kit.main(["--model", "tiny-random", "--json", str(file)])
    answers, printed = json.loads(file.read_text()), capsys.readouterr()
    assert not printed.err
    assert "| 2 view(s) of 64 x 48 | " in printed.out and "| 1 view(s), one stream | " in printed.out
    assert list(answers) == ["versions", "start", *kit.QUESTIONS]
    assert not [label for rows in answers.values() for label, row in rows.items() if "error" in str(row).lower()], (
        answers
    )
    assert set(answers["latency"]) >= {"2 view(s) of 64 x 48"}
    assert all(0 < row["end_to_end_ms"]["p50"] for size, row in answers["latency"].items() if "view" in size)
    assert answers["baseline"]["1 view(s)"]["ratio"] > 0
    assert len(answers["preprocess"]) == 12 and all(row.get("equal", True) for row in answers["preprocess"].values())
    as_it_is = answers["variants"]["1 view(s), as it is"]
    assert as_it_is["replay_us"] > 0 and as_it_is["relative_l2"] < 1e-5 and as_it_is["same_bits"]
    assert all(not row["fallback"] for row in answers["variants"].values())
    assert {answers["variants"][f"1 view(s), {label}"]["bits_of_as_it_is"] for label in ("as it is", "one stream")} == {
        True
    }
    assert answers["kernels"] and all(isinstance(value, float) for value in answers["kernels"].values())
    assert {"patch K=592", "dinov2 mlp.fc2", "projector fc1"} <= answers["products"].keys()
    assert {f"{dtype}, {views} view(s)" for dtype in ("bfloat16", "float8") for views in (1, 4)} < answers[
        "float8"
    ].keys()
    assert (
        answers["float8"]["float8, 4 view(s)"]["relative_l2"] < 1e-5
        and answers["float8"]["float8, 4 view(s)"]["replay_us"] > 0
    )
    tuned = answers["tuned"]["1 view(s)"]
    assert tuned["before_replay_us"] > 0 and tuned["after_replay_us"] > 0 and tuned["relative_l2_to_before"] < 1e-5
    assert tuned["same_bits_again"] and tuned["same_bits_at_another_start"]
    assert answers["tuned"]["1 view(s), search"]["tried"] > 0 and not (tmp_path / "cache").exists()
    assert answers["start"]["model"] == "tiny-random" and answers["versions"]["device"] == "a fake"


def test_a_question_that_fails_is_reported_and_the_others_are_asked(kit, tmp_path, capsys, monkeypatch):
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(kit.Kit, "products", lambda self: 1 / 0)
    kit.main(["--model", "tiny-random", "--json", str(file), "products", "profile", "--seconds", "900"])
    answers = json.loads(file.read_text())
    assert answers["products"] == {"error": "ZeroDivisionError: division by zero"}
    assert "error" not in answers["profile"]
    assert "products: ZeroDivisionError" in capsys.readouterr().err


def test_an_unknown_question_is_refused(kit, capsys):
    with pytest.raises(SystemExit):
        kit.main(["speed"])
    assert "unknown: speed; choose among latency, " in capsys.readouterr().err
