"""`vla-perception bench`: what it times, compares and writes. How long anything takes is not tested."""

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
import checkpoints  # noqa: E402

from vla_perception import baseline, bench, cli  # noqa: E402
from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokenizer import tokenizer as tokenizer_module  # noqa: E402
from vla_perception.tokenizer.presets import PRESETS  # noqa: E402

RATES = {"flop_per_s": 1e12, "bytes_per_s": 1e10}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What the chip can do is not measured, and preprocessing is repeated a few times only."""
    monkeypatch.setattr(bench, "_rates", lambda device, dtype: RATES)
    monkeypatch.setattr(bench, "_PREPROCESS_ROUNDS", 2)


def test_json_holds_what_was_measured(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = [
        "bench",
        "--model",
        "tiny-random",
        "--views",
        "2,1",
        "--baseline",
        "--seconds",
        "0",
        "--json",
        str(file),
    ]
    assert cli.main(arguments) == 0
    report = json.loads(file.read_text())
    assert report["views"] == 2 and set(report["by_views"]) == {"1", "2"}
    assert report["versions"]["torch"] == torch.__version__ and report["device"]
    for result in report["by_views"].values():
        assert result["rounds"] == bench._MIN_ROUNDS
        stages = result["stages_ms"]
        whole = ["preprocess", "dinov2", "siglip", "project", "encode_and_project", "end_to_end"]
        assert list(stages) == list(result["baseline_stages_ms"]) == whole
        for values in stages.values():
            assert 0 < values["p50"] <= values["p95"] <= values["p99"]
        assert result["ratio_to_baseline"] > 0 and result["end_to_end_ratio"] > 0
        assert result["preprocess"]["identical"] is True
        assert result["agreement"]["relative_l2"] < 1e-4 and result["agreement"]["cosine"] > 0.9999
        assert result["floor_ms"] == max(result["flop"] / 1e9, result["weight_bytes"] / 1e7)
        assert report["by_views"]["2"]["flop"] == pytest.approx(2 * report["by_views"]["1"]["flop"])
    for key, value in report["by_views"]["2"].items():
        assert report[key] == value  # the first number of views is at the top level, too
    assert "random weights" in capsys.readouterr().out


def test_work_is_counted_as_published():
    """405 GFLOP and 759 million weights for one image: DINOv2 158, SigLIP 211, projector 36."""

    class Whole:
        config, compute_dtype = PRESETS["openvla-7b"], "bfloat16"

    flops, weight_bytes = bench._work(Whole, 1)
    assert flops / 1e9 == pytest.approx(405, abs=1) and weight_bytes / 2 == pytest.approx(759e6, rel=0.002)


def test_the_baseline_is_what_prismatic_computes(tmp_path):
    """Against the tests' own reference, which knows nothing of this package."""
    models, weights = checkpoints.towers(), checkpoints.projector(384 + 96)
    path = checkpoints.write(tmp_path / "model", checkpoints.openvla_tensors(models, weights))
    for exact in (False, True):
        reference = baseline.ReferenceModel(VisualTokenizer.load(path), torch.float32, exact=exact)
        pixel_values = reference.preprocess([checkpoints.image(), checkpoints.image(1)])
        assert [len(tower.blocks) for tower in reference._towers] == [len(model.blocks) for model in models]
        expected = checkpoints.reference(models, weights, pixel_values)[1]
        torch.testing.assert_close(reference.encode(pixel_values), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"layer": -1}, {"final_norm": True}, {"film": 8}])
def test_a_model_that_the_baseline_does_not_compute_is_refused(change, capsys, monkeypatch):
    """π0's and SmolVLA's take other blocks; FiLM's need a condition."""
    config = PRESETS["tiny-random"]
    changed = replace(config, encoders=tuple(replace(encoder, **change) for encoder in config.encoders))
    monkeypatch.setattr(tokenizer_module, "PRESETS", {**PRESETS, "tiny-random": changed})
    assert cli.main(["bench", "--model", "tiny-random", "--seconds", "0"]) == 1
    assert "no baseline for tiny-random" in capsys.readouterr().err


def test_tokens_that_differ_are_an_error(tmp_path, capsys, monkeypatch):
    exact = bench.OptimizedModel.encode

    def slightly_off(self, pixel_values, mark=None):
        return exact(self, pixel_values, mark) * 1.001

    monkeypatch.setattr(bench.OptimizedModel, "encode", slightly_off)
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--model", "tiny-random", "--seconds", "0", "--json", str(file)]) == 1
    agreement = json.loads(file.read_text())["agreement"]
    assert agreement["within_tolerance"] is False and agreement["relative_l2"] == pytest.approx(1e-3, rel=0.01)
    assert "not those of the baseline" in capsys.readouterr().err


def test_pixel_values_that_differ_are_an_error(capsys, monkeypatch):
    exact = baseline._torchvision_pixels
    monkeypatch.setattr(
        baseline, "_torchvision_pixels", lambda *arguments: exact(*arguments).index_fill_(2, torch.tensor([0]), 0.5)
    )
    monkeypatch.setitem(baseline.TOLERANCES, "float32", 10.0)
    assert cli.main(["bench", "--model", "tiny-random", "--seconds", "0", "--baseline"]) == 1
    assert "not those of PIL and torchvision" in capsys.readouterr().err


def test_distance_is_relative_and_finds_the_worst_token():
    exact = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    found = torch.tensor([[[3.0, 4.0], [5.0, 0.0]]])
    error, cosine = baseline.distance(found, exact)
    assert error == pytest.approx(np.sqrt(50) / np.sqrt(50)) and cosine == pytest.approx(0.0)


@pytest.mark.parametrize("views", ["0", "one", "1,-2"])
def test_numbers_of_views_that_cannot_be(views, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--model", "tiny-random", "--views", views])
    assert "--views" in capsys.readouterr().err


@pytest.mark.gpu
def test_device_events_and_graphs_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    report = bench.run("tiny-random", device="cuda", views=[1, 2], baseline=True, seconds=0)
    assert report["runtime"] == "graph" and report["compute_dtype"] == "bfloat16"
    assert report["preprocess"]["identical"] and report["agreement"]["within_tolerance"]
    assert list(report["stages_ms"]) == ["preprocess", "encode_and_project", "end_to_end"]
