"""Frames of LeRobot datasets against LeRobot's own reader, value by value, where LeRobot is installed.

By both decoders that LeRobot has: PyAV, and torchcodec where FFmpeg's libraries are found. `pytest -s` prints what was
compared.
"""

import os
from importlib.metadata import version

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for package in ("av", "pyarrow"):
    pytest.importorskip(package)
pytest.importorskip("lerobot", reason="an environment with LeRobot: test/data/README.md")
os.environ["HF_HUB_OFFLINE"] = "1"
import lerobot_datasets  # noqa: E402
from offline_runs import DATASET  # noqa: E402

from vla_perception.offline.recordings import Selection, open_recordings  # noqa: E402


@pytest.fixture(scope="module", params=["moving_crops", *lerobot_datasets.KINDS])
def dataset(request, tmp_path_factory):
    """The folder of a dataset; the first one is in the repository."""
    if request.param == "moving_crops":
        return DATASET
    return lerobot_datasets.write(tmp_path_factory.mktemp("datasets") / request.param, request.param)


def ours(dataset):
    """index → (frame set, its images by LeRobot's keys, the episode)."""
    found = {}
    for recording in open_recordings([dataset], Selection()):
        keys = recording.details["keys"]
        for frames in recording.frame_sets():
            images = dict(zip((keys[camera] for camera in recording.cameras), frames.images()))
            found[int(frames.values["index"])] = frames, images, recording
    return found


def reason_against(backend: str) -> str:
    """Why a decoder of LeRobot's cannot be used here; empty if it can."""
    try:
        if backend == "torchcodec":
            import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"torchcodec does not load, it takes FFmpeg's libraries: {str(error).splitlines()[0]}"
    return ""


@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
def test_every_frame_and_number_is_lerobots(dataset, backend):
    if reason := reason_against(backend):
        pytest.skip(reason)
    found, expected = ours(dataset), lerobot_datasets.items(dataset, backend)
    assert sorted(found) == list(range(len(expected))) and len(expected) > 30
    images_seen = 0
    for index, item in enumerate(expected):
        frames, images, recording = found[index]
        for key, image in images.items():
            values = torch.from_numpy(image).permute(2, 0, 1).type(torch.float32) / 255
            assert torch.equal(values, item[key]), (index, key)
            images_seen += 1
        for name, value in frames.values.items():
            np.testing.assert_array_equal(value, item[name].numpy(), err_msg=name)
        assert {"action", "observation.state", "episode_index", "frame_index"} <= set(frames.values)
        assert np.float32(frames.timestamp) == item["timestamp"].numpy()
        assert recording.details["tasks"] == [item["task"]]
    assert images_seen == 2 * len(expected)
    versions = ", ".join(f"{name} {version(name)}" for name in ("lerobot", "av", "torchcodec", "datasets"))
    print(f"\n{dataset.name}, {backend} ({versions}): {images_seen} images without a difference")


def test_the_same_frames_stay_apart(dataset):
    """Neighboring frames differ, or a frame off by one would not be seen."""
    found = ours(dataset)
    for index in range(1, len(found)):
        if found[index][2] is found[index - 1][2]:
            for key, image in found[index][1].items():
                before = found[index - 1][1][key]
                assert np.abs(image.astype(int) - before).max() > 10 or np.array_equal(image, before)
