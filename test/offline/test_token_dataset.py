"""TokenDataset: which frames an item has, and that it reads no others."""

import json
import pickle
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for package in ("pyarrow", "av", "rosbags"):
    pytest.importorskip(package)
from offline_runs import DATASET, bfloat16, tokenize  # noqa: E402
from pixel_tokenizer import PixelTokenizer, cells  # noqa: E402
from recorded import numbered_image, write_images  # noqa: E402

from vla_perception.offline.token_dataset import TokenDataset  # noqa: E402
from vla_perception.tokens.buffer import FingerprintMismatchError  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two episodes of 4 and 3 frames, 2 per second."""
    from vla_perception.offline.recordings import Selection

    root = tmp_path_factory.mktemp("run")
    sources = [write_images(root / "a", 4), write_images(root / "b", 3, first=10)]
    tokenize(root / "tokens", sources, selection=Selection(image_rate=2.0))
    return root / "tokens"


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    """The LeRobot dataset's episodes of 25, 18 and 31 frames."""
    out = tmp_path_factory.mktemp("robot")
    tokenize(out, [DATASET])
    return out


def words(item):
    return item["tokens"].view(torch.int16).numpy().view(np.uint16)


def expected(*numbers):
    return bfloat16([[cells(numbered_image(number))] for number in numbers])


def test_frames_of_all_episodes_one_after_the_other(folder):
    dataset = TokenDataset(folder)
    assert len(dataset) == 7 and isinstance(dataset, torch.utils.data.Dataset)
    assert [episode.name for episode in dataset.episodes] == ["a", "b"] and dataset.cameras == ("front",)
    for index, number in enumerate([0, 1, 2, 3, 10, 11, 12]):
        item = dataset[index]
        assert item["tokens"].dtype == torch.bfloat16
        np.testing.assert_array_equal(words(item), expected(number)[0])
    assert (int(dataset[5]["episode"]), int(dataset[5]["frame"])) == (1, 1)
    assert dataset.place(-1) == (1, 2) and list(dataset.indices(1)) == [4, 5, 6]
    with pytest.raises(IndexError):
        dataset[7]


def test_history_stays_within_the_episode_and_is_padded(folder):
    repeat, zeros = TokenDataset(folder, history=3), TokenDataset(folder, history=3, padding="zeros")
    np.testing.assert_array_equal(words(repeat[4]), expected(10, 10, 10))
    np.testing.assert_array_equal(words(repeat[5]), expected(10, 10, 11))
    np.testing.assert_array_equal(words(repeat[6]), expected(10, 11, 12))
    assert repeat[5]["is_pad"].tolist() == [True, False, False]
    assert not words(zeros[4])[:2].any() and words(zeros[4])[2].any()
    with pytest.raises(ValueError, match="padding is 'mirror'"):
        TokenDataset(folder, padding="mirror")


def test_by_time(folder):
    dataset = TokenDataset(folder)
    assert [dataset.at(1, seconds) for seconds in (-1.0, 0.0, 0.49, 0.5, 0.7, 99.0)] == [4, 4, 4, 5, 5, 6]


def test_values_and_what_comes_after(robot):
    dataset = TokenDataset(robot, values=["action"], horizon={"action": 4})
    item, last = dataset[10], dataset[24]
    actions = dataset.file(0).values["action"]
    np.testing.assert_array_equal(item["action"].numpy(), actions[10:14])
    np.testing.assert_array_equal(last["action"].numpy(), actions[[24] * 4])
    assert last["action_is_pad"].tolist() == [False, True, True, True]
    assert set(TokenDataset(robot)[0]) >= {"action", "observation.state", "episode_index", "task_index"}
    with pytest.raises(ValueError, match="has no 'gripper'; it has action"):
        TokenDataset(robot, values=["gripper"])
    with pytest.raises(ValueError, match="horizon of 'state'"):
        TokenDataset(robot, values=["action"], horizon={"state": 3})


def test_workers_of_a_data_loader_give_the_same(robot):
    dataset = TokenDataset(robot, history=2, values=["action"])
    dataset[0]  # a file is open when it is sent to the workers
    loaders = [
        torch.utils.data.DataLoader(dataset, batch_size=20, num_workers=workers, multiprocessing_context=context)
        for workers, context in ((0, None), (2, "fork"))
    ]
    for alone, shared in zip(*loaders, strict=True):
        assert alone["tokens"].shape[1:] == (2, 2, 6, 6)
        for name in alone:
            assert torch.equal(alone[name], shared[name]), name


def test_numpy_without_torch(folder):
    import ml_dtypes
    from blocked_imports import run_without

    item = TokenDataset(folder, history=2, as_numpy=True)[5]
    assert item["tokens"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(item["tokens"].view(np.uint16), expected(10, 11))
    run_without(
        "torch|torchvision|timm|cv2|PIL|av|pyarrow|rosbags|mcap|tqdm|rclpy",
        f"""
        from vla_perception.offline.token_dataset import TokenDataset
        item = TokenDataset({str(folder)!r}, history=2)[5]
        assert item["tokens"].shape == (2, 1, 6, 6) and item["tokens"].dtype.name == "bfloat16"
        """,
    )


@pytest.mark.parametrize("entry", [["a"], {"name": 3}, {"file": "../a.safetensors"}, {"file": "/a.safetensors"}])
def test_an_index_leads_to_files_of_its_folder_alone(folder, tmp_path, entry):
    changed = shutil.copytree(folder, tmp_path / "changed")
    index = json.loads((changed / "index.json").read_text())
    index["recordings"][0] = index["recordings"][0] | entry if isinstance(entry, dict) else entry
    (changed / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no name, or a file outside of the run's folder"):
        TokenDataset(changed)


def test_an_index_whose_file_is_gone_says_so(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b.safetensors is in the index .* not there \(1 of 2 files\)"):
        TokenDataset(tmp_path / "run")


def test_another_fingerprint_is_refused(folder, tmp_path):
    assert len(TokenDataset(folder, expect_fingerprint=PixelTokenizer.fingerprint[:8])) == 7
    with pytest.raises(FingerprintMismatchError, match="expected cdcdcdcd"):
        TokenDataset(folder, expect_fingerprint="cd" * 32)
    other = PixelTokenizer()
    other.fingerprint = "cd" * 32
    tokenize(tmp_path / "other", [write_images(tmp_path / "c", 2)], other)
    with pytest.raises(FingerprintMismatchError):
        TokenDataset([folder / "a.safetensors", tmp_path / "other/c.safetensors"])
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(tmp_path / "other/c.safetensors", mixed / "a.safetensors")
    with pytest.raises(FingerprintMismatchError, match="the file was put there from another run"):
        TokenDataset(mixed)


def test_an_item_reads_its_own_bytes_alone(tmp_path):
    """Of a file of 400 MB whose pages are not there yet, by the process's own counts of what it touched."""
    from vla_perception.offline.recordings import FrameSet
    from vla_perception.offline.token_file_writer import Geometry, Layout, TokenFileWriter

    (tmp_path / "source").write_bytes(b"")
    layout = Layout(
        PixelTokenizer().metadata() | {"projector": "linear"}, ("front",), (1, 6, 1 << 17), "bfloat16", {"name": "big"}
    )
    writer = TokenFileWriter(tmp_path / "big.safetensors", layout, [tmp_path / "source"])
    geometry = [Geometry(24, 36, (1 / 12, 0.0, 0.0, 0.0, 1 / 12, 0.0), None)]
    for index in range(256):
        tokens = np.full(layout.shape, index, np.uint16)
        writer.add(FrameSet(index, index, float(index), (index,), ("",), list), geometry, tokens)
    writer.finish({})
    dataset = TokenDataset([tmp_path / "big.safetensors"], as_numpy=True)

    def resident():
        with open("/proc/self/smaps") as file:
            entries = file.read().split("big.safetensors\n")[1:]
        return sum(int(entry.split("Rss:")[1].split()[0]) for entry in entries) << 10

    before = resident()
    assert dataset[200]["tokens"].view(np.uint16)[0, 0, 0] == 200
    assert 0 < resident() - before < 3 * layout.frame_bytes


def test_a_dataset_pickles_small(robot):
    dataset = TokenDataset(robot)
    dataset[0]
    assert len(pickle.dumps(dataset)) < 20_000
