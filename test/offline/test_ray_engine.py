"""A run on a local Ray of two workers, of which one is killed while it works."""

import os
from functools import partial
from types import SimpleNamespace

import pytest

ray = pytest.importorskip("ray")
for package in ("torch", "av", "pyarrow", "rosbags", "mcap"):
    pytest.importorskip(package)
import pixel_tokenizer  # noqa: E402
from offline_runs import DATASET, ROOT, contents, tokenize  # noqa: E402
from pixel_tokenizer import PixelTokenizer, killed_once  # noqa: E402
from recorded import write_images  # noqa: E402

from vla_perception import cli  # noqa: E402
from vla_perception.offline import command, ray_engine, run, run_index  # noqa: E402
from vla_perception.offline.recordings import Selection, open_recordings  # noqa: E402


@pytest.fixture(scope="module")
def local_ray():
    paths = os.pathsep.join([str(ROOT / "test/support"), str(ROOT)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield
    ray.shutdown()


def on_ray(load, sources, out):
    settings = run.RunSettings(out, Selection())
    recordings = open_recordings(sources, settings.selection)
    announced = []
    index, statistics = ray_engine.tokenize(load, sources, recordings, settings, workers=2, announce=announced.append)
    assert announced == [run.expected_bytes(recordings, PixelTokenizer(), settings)]
    return index, statistics


def test_the_result_is_that_of_one_process_although_a_worker_was_killed(tmp_path, local_ray):
    import torch

    sources = [DATASET, write_images(tmp_path / "shots", 12)]
    (tmp_path / "shots/image_3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker of one core has
    try:
        tokenize(tmp_path / "alone", sources)
    finally:
        torch.set_num_threads(before)
    marker = tmp_path / "killed"
    index, statistics = on_ray(partial(killed_once, marker), sources, tmp_path / "shared")
    assert marker.exists(), "no worker was killed"
    assert index["complete"] and not index["failed"] and index["totals"]["frames"] == 25 + 18 + 31 + 11
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert statistics.frame_sets >= 25 + 18 + 31 + 11 - 5, "all but what the killed one had done"


def test_the_disk_need_is_said_before_anything_is_written(tmp_path, local_ray, monkeypatch, capsys):
    """The sentence of a single process, from the sizes that the workers' model has."""
    out, seen = tmp_path / "tokens", []
    real = command._disk_need

    def disk_need(*arguments):
        seen.append([path.name for path in out.iterdir()])
        return real(*arguments)

    monkeypatch.setattr(command, "_disk_need", disk_need)
    monkeypatch.setattr(command, "_load_in_worker", pixel_tokenizer.load)
    arguments = [str(DATASET), "--model", "tiny-random", "--episodes", "0,1", "--out", str(out)]
    assert cli.main(["tokenize", *arguments, "--engine", "ray", "--workers", "2"]) == 0
    told = capsys.readouterr().err
    assert told.count("2 recordings with about 43 frame sets: their tokens take about 0.00 GB; ") == 1
    assert "GB are free in" in told and seen == [[]]


def test_workers_that_differ_are_refused():
    """Without Ray: what the workers would say of themselves, one of them on another device."""
    index = run_index.build(PixelTokenizer().metadata(), {"device": "cuda"}, {"gpu": "H100"})
    other = run_index.build(PixelTokenizer().metadata(), {"device": "cuda"}, {"gpu": "A100"})

    def actor(built):
        return SimpleNamespace(**{name: SimpleNamespace(remote=lambda: built) for name in ("begin", "built")})

    ray = SimpleNamespace(get=lambda answers: answers)
    assert ray_engine._begun(ray, [actor(index), actor(dict(index))]) == index
    with pytest.raises(run_index.RunIndexError, match='not compute the same bits: environment.gpu: "H100", now "A100"'):
        ray_engine._begun(ray, [actor(index), actor(other)])
