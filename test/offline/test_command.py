"""The command `vla-perception tokenize` into a folder: its options, what it says, and how it ends."""

import errno
import json
import sys

import pytest

for package in ("torch", "timm", "tqdm", "av", "pyarrow", "rosbags", "mcap"):
    pytest.importorskip(package)
from offline_runs import tokenize as run_offline  # noqa: E402
from offline_runs import write_drive  # noqa: E402
from pixel_tokenizer import PixelTokenizer  # noqa: E402
from recorded import write_images  # noqa: E402

from vla_perception import cli  # noqa: E402
from vla_perception.offline import command, token_file_writer  # noqa: E402
from vla_perception.offline.token_file import TokenFile  # noqa: E402


@pytest.fixture
def tokenize(tmp_path, monkeypatch, capsys):
    """Runs the command with a stand-in for the model; gives its exit code, output and errors."""
    monkeypatch.setattr(command, "load", lambda given, choices: PixelTokenizer())

    def run(*arguments, out=tmp_path / "out"):
        code = cli.main(["tokenize", *map(str, arguments), "--model", "tiny-random", "--out", str(out)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_bag_with_its_values(tmp_path, tokenize):
    drive = write_drive(tmp_path / "drive")
    options = ["--cameras", "eye=/wrist/image_raw", "front", "--values", "action=/command", "--dtype", "float32"]
    code, said, told = tokenize(drive, *options, "--every", 2)
    assert code == 0 and "2 frame sets in 1 recordings" in said and "fingerprint abababababab" in said
    assert "about 2 frame sets: their tokens take about" in told and "GB are free" in told
    with TokenFile(tmp_path / "out/drive.safetensors") as file:
        assert (
            file.cameras == ("eye", "front")
            and file.dtype == "float32"
            and file.values["action"].tolist() == [[0], [4]]
        )
    settings = json.loads((tmp_path / "out/index.json").read_text())["settings"]
    assert settings["cameras"] == ["eye=/wrist/image_raw", "front"] and settings["every"] == 2


def test_damaged_recordings_are_named_and_end_with_1(tmp_path, tokenize):
    broken = write_images(tmp_path / "broken", 2)
    for file in broken.iterdir():
        file.write_bytes(b"\x89PNG\r\n\x1a\n")
    bad = tmp_path / "bad.mcap"
    bad.write_bytes(b"\x89MCAP0\r\n" + bytes(100))
    code, said, told = tokenize(broken, bad, write_images(tmp_path / "shots", 2))
    assert code == 1 and "2 recordings could not be read" in said and "broken: left out" in told
    assert "bad.mcap: left out" in told
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["complete"] and [entry["name"] for entry in index["failed"]] == ["bad", "broken"]
    code, _, told = tokenize(bad, tmp_path / "shots", "--on-error", "stop", out=tmp_path / "strict")
    assert code == 1 and "bad.mcap" in told and not (tmp_path / "strict").exists()


def test_it_says_how_to_go_on(tmp_path, tokenize, monkeypatch):
    shots = write_images(tmp_path / "shots", 3)
    real = token_file_writer._write

    def full(file, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_file_writer, "_write", full)
    code, _, told = tokenize(shots)
    assert code == 1 and "no space left; with more of it the same command goes on from here" in told
    monkeypatch.setattr(token_file_writer, "_write", real)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load", lambda given, choices: PixelTokenizer(interrupt))
    code, _, told = tokenize(shots)
    assert code == 130 and "the same command goes on from here" in told


def test_without_tqdm_it_says_what_brings_it(tmp_path, tokenize, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    code, _, told = tokenize(write_images(tmp_path / "shots", 1))
    assert code == 1 and "pip install '.[offline]'" in told and "tokenizer]" not in told


def test_what_an_earlier_run_did_is_no_part_of_the_rate():
    bar = command._bar(1000)
    bar.found(900)
    bar.update(10)
    state = bar.format_dict
    assert (state["n"], state["initial"], state["total"]) == (910, 900, 1000)
    assert "[00:10<01:30,  1.00 " in bar.format_meter(**state | {"elapsed": 10.0, "rate": None}), "10 in 10 s, 90 left"
    bar.close()


@pytest.mark.parametrize(
    "options, text",
    [
        (["--output", "features"], "--projector none"),
        (["--copy-topics"], "--copy-topics needs --format mcap"),
        (["--copy-topics", "/tf", "--format", "mcap"], "no source is a bag"),
        (["--workers", "2"], "need --engine ray"),
        (["--rate", "-1"], "above 0"),
        (["--rate", "inf"], "above 0"),
        (["--image-rate", "inf"], "above 0"),
        (["--episodes", "1"], "no source is one"),
        (["--values", "action=/command"], "no source is a bag"),
        (["--values", "action"], "--values 'action': expected NAME=TOPIC"),
        (["--values", "a=/x", "a=/y"], "--values names one value twice"),
        (["--cameras", "a", "a"], "one camera twice"),
        (["--cameras", "a", "b"], "has no folder a"),
    ],
)
def test_options_that_make_no_sense(tmp_path, tokenize, options, text):
    code, _, told = tokenize(write_images(tmp_path / "shots", 1), *options)
    assert code == 1 and text in told and not (tmp_path / "out").exists()


def test_topics_to_copy_are_looked_for_before_anything_is_computed(tmp_path, tokenize):
    drive = write_drive(tmp_path / "drive")
    code, _, told = tokenize(drive, "--format", "mcap", "--copy-topics", "command", "/tf")
    assert code == 1 and "has no /tf to copy; it has /command, /front" in told and not (tmp_path / "out").exists()
    assert tokenize(drive, "--format", "mcap", "--copy-topics", "command")[0] == 0


def test_a_file_in_the_place_of_the_folder(tmp_path, tokenize):
    (tmp_path / "file").write_text("")
    code, _, told = tokenize(write_images(tmp_path / "shots", 1), out=tmp_path / "file")
    assert code == 1 and "is a file: name a folder" in told


def test_a_model_with_film_needs_a_condition(tmp_path):
    import numpy as np

    class WithFilm(PixelTokenizer):
        condition_channels = 3

        def set_condition(self, vector):
            self.condition = bytes(vector.astype(np.uint8)).hex() * 10 + "abcd"

    with pytest.raises(
        ValueError, match="--condition FILE.npy with the mean of the instruction's embeddings, 3 numbers"
    ):
        command._set_condition(WithFilm(), None)
    tokenizer = WithFilm()
    np.save(tmp_path / "condition.npy", np.array([1.0, 2.0, 3.0]))
    command._set_condition(tokenizer, tmp_path / "condition.npy")
    index, _ = run_offline(tmp_path / "out", [write_images(tmp_path / "shots", 2)], tokenizer)
    assert index["settings"]["condition"] == tokenizer.condition
    with TokenFile(tmp_path / "out/shots.safetensors") as file:
        assert file.frame(1).condition == tokenizer.condition
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        command._set_condition(WithFilm(), tmp_path / "objects.npy")


def test_options_of_runs_are_refused_for_a_single_file(tmp_path, tokenize):
    for recording in (write_drive(tmp_path / "drive"), tmp_path / "clip.mp4"):
        code, _, told = tokenize(recording, out=tmp_path / "tokens.safetensors")
        assert code == 1 and "FILE.safetensors is for those alone; give --out FOLDER" in told
    image = write_images(tmp_path / "shots", 1) / "image_0.png"
    for option, name in (
        (["--every", "2"], "--every"),
        (["--dtype", "float16"], "--dtype"),
        (["--batch", "4"], "--batch"),
    ):
        code, _, told = tokenize(image, *option, out=tmp_path / "tokens.safetensors")
        assert code == 1 and f"{name} is for --out FOLDER" in told
