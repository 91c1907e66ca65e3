"""vla-perception verify: stored against stored, damaged, of other settings, and against the running node."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

for package in ("torch", "rosbags", "mcap", "tqdm", "av", "pyarrow"):
    pytest.importorskip(package)
from offline_runs import ROOT, bfloat16, tokenize, write_drive  # noqa: E402
from pixel_tokenizer import PixelTokenizer  # noqa: E402
from recorded import write_images  # noqa: E402

from vla_perception import cli  # noqa: E402
from vla_perception.offline import verify  # noqa: E402
from vla_perception.sources.bags import Bag  # noqa: E402


@pytest.fixture
def drive(tmp_path):
    return write_drive(tmp_path / "drive")


class Shifted(PixelTokenizer):
    """Tokens that are off by one step of bfloat16 in one place."""

    def encode(self, pixel_values, features=False):
        output = super().encode(pixel_values, features)
        output.tokens[0, 0, 0] *= 1 + 2**-7
        return output


def test_a_run_alone(tmp_path, drive, capsys):
    tokenize(tmp_path / "out", [drive])
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    assert "4 of 4 frames are sound" in capsys.readouterr().out
    path = tmp_path / "out/drive.safetensors"
    content = bytearray(path.read_bytes())
    content[int.from_bytes(content[:8], "little") + 8 + 5] ^= 1
    path.write_bytes(content)
    assert cli.main(["verify", str(path)]) == 1
    assert "frame 0: its bytes are not those that were written" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["model"].pop("fingerprint"),
        lambda index: index["recordings"][0].pop("frames"),
        lambda index: index["recordings"][0].update(frames={}),
        lambda index: index["recordings"][0].pop("file"),
    ],
)
def test_an_index_that_lacks_something_is_said(tmp_path, drive, capsys, change):
    index = tokenize(tmp_path / "out", [drive])[0]
    change(index)
    (tmp_path / "out/index.json").write_text(json.dumps(index))
    assert cli.main(["verify", str(tmp_path / "out")]) == 1
    assert "index.json is not the index of a run" in capsys.readouterr().err


def test_names_of_an_index_are_printed_with_escapes(tmp_path, drive, capsys):
    index = tokenize(tmp_path / "out", [drive])[0]
    index["recordings"][0] |= {"name": "\x1b[2J", "frames": 7}
    (tmp_path / "out/index.json").write_text(json.dumps(index))
    assert cli.main(["verify", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "\\x1b[2J: 4 frames, and the index says 7" in printed and "\x1b" not in printed


def test_a_damaged_entry_of_a_bag_is_said(tmp_path, drive):
    tokenize(tmp_path / "out", [drive], output="mcap")
    (entry,) = (tmp_path / "out").rglob("recording.json")
    right = entry.read_text()
    for damage in ("{", "[]", right.replace('"frames"', '"frame"'), right + " " * (1 << 24)):
        entry.write_text(damage)
        with pytest.raises(ValueError, match="recording.json is damaged: remove its folder"):
            tokenize(tmp_path / "out", [drive], output="mcap")


def test_two_runs_of_the_same_bits(tmp_path, drive):
    tokenize(tmp_path / "a", [drive])
    tokenize(tmp_path / "b", [drive], output="mcap")
    for a, b in (("a", "b"), ("b", "a"), ("a", "a"), ("b", "b"), ("a/drive.safetensors", "b/drive")):
        report = verify.compare(verify.Stored(tmp_path / a), verify.Stored(tmp_path / b))
        assert (report.frames, report.equal, report.is_good) == (4, 4, True), (a, b)
    assert verify.check(verify.Stored(tmp_path / "b")).is_good


def write_cut_off(path, source, whole):
    """A bag of the same token messages, which behind the first `whole` ones lack their ends."""
    from rosbags.rosbag2 import StoragePlugin, Writer

    from vla_perception.offline.bag_recordings import typestore

    with Bag(source) as bag, Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as cut_off:
        messages = list(bag.messages(["/tokens"]))
        topic = cut_off.add_connection("/tokens", messages[0].type, typestore=typestore())
        for index, message in enumerate(messages):
            cut_off.write(topic, message.time_ns, message.cdr if index < whole else message.cdr[:-9])


def test_a_damaged_message_of_a_bag_is_a_problem(tmp_path, drive):
    """Its sequence of bytes claims more than there are: what comes before it counts."""
    tokenize(tmp_path / "out", [drive], output="mcap")
    write_cut_off(tmp_path / "odd", tmp_path / "out/drive", whole=2)
    report = verify.check(verify.Stored(tmp_path / "odd"))
    assert (report.frames, report.equal, report.problems) == (2, 2, ["odd: a message ends too early"])


def test_what_is_damaged_from_the_first_message_on_is_compared_with_a_report(tmp_path, drive):
    tokenize(tmp_path / "out", [drive], output="mcap")
    write_cut_off(tmp_path / "odd", tmp_path / "out/drive", whole=0)
    report = verify.compare(verify.Stored(tmp_path / "odd"), verify.Stored(tmp_path / "out/drive"))
    assert report.problems == ["odd: a message ends too early"] and not report.is_good


def test_a_difference_is_measured_and_the_settings_named(tmp_path, drive, capsys):
    tokenize(tmp_path / "a", [drive])
    tokenize(tmp_path / "b", [drive], Shifted(), batch=2)
    assert cli.main(["verify", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["frames"], report["equal"], report["worst_steps"]) == (4, 2, 1)
    assert report["settings"] == ["settings.batch: 1, now 2"]
    a = verify.Stored(tmp_path / "a/drive.safetensors")
    b = verify.Stored(tmp_path / "b/drive.safetensors")
    assert verify.compare(a, b).worst_at.startswith("drive, frame ")


def test_steps_count_the_numbers_between():
    for dtype, values in (("float32", np.float32), ("float16", np.float16)):
        numbers = np.array([-1.0, -0.0, 0.0, 1.0], values)
        beside = np.nextafter(numbers, values(np.inf))
        words = [array.view(np.uint32 if dtype == "float32" else np.uint16) for array in (numbers, beside)]
        steps = verify._ordered(words[1], dtype) - verify._ordered(words[0], dtype)
        assert steps.tolist() == [1, 1, 1, 1]


def test_steps_are_those_of_the_largest_difference():
    """Not of values beside zero, between whose signs lie thousands of numbers."""

    def tokens(*values):
        words = bfloat16([values])
        numbers = (words.astype(np.uint32) << 16).view(np.float32)
        return SimpleNamespace(dtype="bfloat16", shape=words.shape, data=words, float32=lambda: numbers)

    report = verify.Report()
    report.compare(tokens(1e-3, 2.0), tokens(-1e-3, 2.03125), "here")
    assert (report.worst, report.worst_steps, report.worst_at) == (0.03125, 2, "here")


def test_frames_of_one_side_alone(tmp_path):
    tokenize(tmp_path / "a", [write_images(tmp_path / "shots", 3)])
    write_images(tmp_path / "shots", 5)
    tokenize(tmp_path / "b", [tmp_path / "shots"])
    report = verify.compare(verify.Stored(tmp_path / "a"), verify.Stored(tmp_path / "b"))
    assert (report.frames, report.only_a, report.only_b, report.is_good) == (3, 0, 2, False)


@pytest.mark.ros
@pytest.mark.jazzy_alone  # bits are PyTorch's; the next test has what arrives, under both
def test_the_nodes_tokens_have_the_same_bits(tmp_path):
    """The sample bag, tokenized, and then played to the node: every message that it publishes is compared."""
    import subprocess

    from ros_harness import RosProcess, free_domain

    bag, out = ROOT / "examples/sample_bag", tmp_path / "out"
    shared = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    tokenizing = [
        sys.executable,
        "-m",
        "vla_perception.cli",
        "tokenize",
        str(bag),
        "--model",
        "tiny-random",
        "--out",
        str(out),
    ]
    done = subprocess.run(tokenizing, env=os.environ | shared, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    domain = free_domain()
    node = ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args", "-p", "autostart:=true"]
    node += ["-p", "cameras:=[front, wrist]", "-p", "image_transport:=compressed", "-p", "shared_memory:=false"]
    verifying = ["-m", "vla_perception.cli", "verify", str(out), "--topic", "tokens", "--silence", "4", "--json"]
    playing = [
        "-m",
        "vla_perception.nodes.bag_player",
        "--ros-args",
        "-p",
        f"bag:={bag}",
        "-p",
        "wait_for_subscribers:=1",
    ]
    playing += ["-p", "rate:=2.0", "-p", "start_offset_sec:=3.0", "-p", "wait_timeout_sec:=120.0"]
    with RosProcess(node, domain, shared) as tokenizer, RosProcess(verifying, domain, shared) as verifier:
        verifier.wait_for("play the recording now", 60)
        tokenizer.wait_for("ready after", 120)
        with RosProcess(playing, domain, shared) as player:
            assert player.wait(60) == 0, player.output
        assert verifier.wait(60) == 0, verifier.output
        report = json.loads(verifier.output[verifier.output.index("{") :])
    assert report["equal"] == report["frames"] >= 3, report
    assert report["only_b"] == 0 and not report["settings"] and not report["problems"]


@pytest.mark.ros
def test_our_player_plays_a_bag_of_token_messages(tmp_path, drive):
    """And every message arrives as it is stored."""
    from ros_harness import RosProcess, free_domain

    tokenize(tmp_path / "files", [drive])
    tokenize(tmp_path / "bags", [drive], output="mcap")
    domain = free_domain()
    verifying = ["-m", "vla_perception.cli", "verify", str(tmp_path / "files"), "--topic", "/tokens", "--json"]
    playing = ["-m", "vla_perception.nodes.bag_player", "--ros-args", "-p", f"bag:={tmp_path / 'bags/drive'}"]
    playing += ["-p", "topics:=[/tokens]", "-p", "wait_for_subscribers:=1", "-p", "wait_timeout_sec:=60.0"]
    with RosProcess(verifying, domain) as verifier:
        verifier.wait_for("play the recording now", 60)
        with RosProcess(playing, domain) as player:
            assert player.wait(60) == 0, player.output
        assert verifier.wait(60) == 0, verifier.output
        report = json.loads(verifier.output[verifier.output.index("{") :])
    assert (report["equal"], report["frames"], report["missed"], report["only_b"]) == (4, 4, 0, 0)


def test_what_cannot_be_verified(tmp_path, capsys):
    shutil.copy(__file__, tmp_path / "x.txt")
    for arguments, text in (
        ([tmp_path / "nothing"], "there is no"),
        ([tmp_path / "x.txt"], "is not a bag"),
        ([tmp_path, tmp_path, "--topic", "tokens"], "not both"),
    ):
        assert cli.main(["verify", *map(str, arguments)]) == 1
        said = capsys.readouterr()
        assert text in said.err + said.out
