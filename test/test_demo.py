"""`make demo`, run whole: its report accounts for every frame, its image is what it says, it ends cleanly."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rosbags")
pytest.importorskip("rclpy")
pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("PIL")
pytest.importorskip("cv2")

from PIL import Image
from ros_harness import ROOT
from rosbags.typesys import Stores, get_typestore

from vla_perception.images.decode import compressed_to_rgb
from vla_perception.sources.bags import Bag
from vla_perception.visualization import figures

sys.path.insert(0, str(ROOT))

from demo import DemoError, recording
from demo.__main__ import MOMENTS, main
from demo.events import Events
from demo.report import make_report

# `make demo` runs in .venv. Its node, player and subscriber are tested under both distributions.
pytestmark = [pytest.mark.ros, pytest.mark.kilted_alone]

CAMERAS = ("front", "wrist")
COUNTERS = ("published", "received", "encoded", "replaced", "unmatched", "undecodable", "pending")
TYPES = get_typestore(Stores.ROS2_JAZZY)


def start_demo(*arguments: str) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "demo", *arguments],
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, for a Ctrl-C that reaches all of it
    )


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> Iterator[tuple[Path, subprocess.Popen]]:
    """A demo with a model that does not exist, started early: importing torch takes its time."""
    out = tmp_path_factory.mktemp("refused")
    with start_demo("--out", str(out), "--model", "no-such-model") as process:
        yield out, process
        process.terminate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, refused) -> tuple[Path, str]:
    """Where a demo wrote to, and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    process = start_demo("--out", str(out), "--rate", "2")
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, printed + errors
    assert errors == ""
    return out, printed


def test_every_frame_is_accounted_for(whole):
    report = json.loads((whole[0] / "report.json").read_text())
    assert set(report) == {
        "rmw",
        "model",
        "weights",
        "fingerprint",
        "frames_in",
        "token_messages",
        "views",
        "tokens_per_view",
        "channels",
        "dtype",
        "dropped",
        "accounting",
        "latency_ms",
    }
    with Bag(ROOT / "examples" / "sample_bag") as bag:
        recorded = {camera: bag.topics[f"/{camera}/image_raw/compressed"].messages for camera in CAMERAS}
    assert set(report["accounting"]) == set(report["frames_in"]) == set(report["dropped"]) == set(CAMERAS)
    for camera, count in report["accounting"].items():
        assert set(count) == set(COUNTERS)
        assert count["published"] == count["received"] == recorded[camera] == report["frames_in"][camera]
        assert count["received"] == sum(count[name] for name in COUNTERS[2:])
        assert count["encoded"] == report["token_messages"] > 0
        assert count["replaced"] + count["unmatched"] + count["undecodable"] == report["dropped"][camera]
    assert report["rmw"].startswith("rmw_")
    assert (report["model"], report["weights"]) == ("tiny-random", "random")
    assert len(report["fingerprint"]) == 64 and int(report["fingerprint"], 16)
    assert (report["views"], report["tokens_per_view"], report["channels"]) == (2, 196, 256)
    assert report["dtype"] in ("bfloat16", "float16", "float32")


def test_a_bag_with_more_images_than_memory_is_for(monkeypatch):
    with Bag(ROOT / "examples" / "sample_bag") as bag:
        images = recording.Recording.read(bag).images
        assert {name: len(messages) for name, messages in images.items()} == dict.fromkeys(CAMERAS, 40)
        monkeypatch.setattr(recording, "IMAGES_LIMIT", 1 << 20)
        with pytest.raises(DemoError, match="more than 1 MiB of images"):
            recording.Recording.read(bag)


def test_latencies(whole):
    latency = json.loads((whole[0] / "report.json").read_text())["latency_ms"]
    assert set(latency) == {"image_to_policy", "decode", "preprocess", "encode", "publish"}
    for values in latency.values():
        assert 0 < values["p50"] <= values["p95"] <= values["p99"]
    assert latency["image_to_policy"]["p50"] > latency["encode"]["p50"]


def test_the_table(whole):
    printed = whole[1]
    for text in ("tiny-random, random weights", "image to policy", "p99", "undecodable", "report.json", "tokens.png"):
        assert text in printed


def test_the_image(whole):
    """The camera images are those that the tokens came from; the other cells are 14 × 14 patches of one color."""
    sheet = np.asarray(Image.open(whole[0] / "tokens.png").convert("RGB")).astype(int)
    cell, gap = figures.CELL_WIDTH, figures.GAP
    height = cell * 480 // 640
    assert sheet.shape[1] == gap + 4 * (cell + gap)
    # Rows of cells: where the second column holds no background.
    filled = (sheet[:, gap + cell + gap : gap + 2 * cell + gap] != 255).any(axis=2).all(axis=1)
    tops = np.flatnonzero(np.diff(filled.astype(int), prepend=0) == 1)
    # On a machine that hardly keeps up, fewer moments may have become tokens.
    moments, left_over = divmod(len(tops), len(CAMERAS))
    messages = json.loads((whole[0] / "report.json").read_text())["token_messages"]
    assert left_over == 0 and min(messages, 2) <= moments <= MOMENTS

    images = {}
    with Bag(ROOT / "examples" / "sample_bag") as bag:
        for camera in CAMERAS:
            messages = bag.messages([f"/{camera}/image_raw/compressed"])
            decoded = [compressed_to_rgb(TYPES.deserialize_cdr(m.cdr, m.type)) for m in messages]
            images[camera] = [Image.fromarray(image).resize((cell, height), 3) for image in decoded]
    places = []
    for row, top in enumerate(tops):
        shown = sheet[top : top + height, gap : gap + cell]
        differences = [np.abs(np.asarray(p).astype(int) - shown).mean() for p in images[CAMERAS[row % 2]]]
        assert min(differences) < 4  # the moment is one of this camera's images
        places.append(int(np.argmin(differences)))
    assert places[::2] == sorted(set(places[::2])) and places[1::2] == sorted(set(places[1::2]))
    assert all(abs(front - wrist) <= 1 for front, wrist in zip(places[::2], places[1::2]))

    for column in (1, 2, 3):
        colors = set()
        for top in tops:
            left = gap + column * (cell + gap)
            block = sheet[top : top + height, left : left + cell]
            for r in range(14):
                for c in range(14):
                    patch = block[int(r * height / 14) + 2 : int((r + 1) * height / 14) - 1]
                    patch = patch[:, int(c * cell / 14) + 2 : int((c + 1) * cell / 14) - 1]
                    assert (patch == patch[0, 0]).all()
                    colors.add(tuple(patch[0, 0]))
        assert len(colors) > 100


@contextlib.contextmanager
def started_demo(*arguments: str) -> Iterator[subprocess.Popen]:
    """A demo; at the end none of its processes runs any more, whatever the test has found."""
    process = start_demo(*arguments)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def errors_after_ctrl_c(process: subprocess.Popen) -> str:
    """What it prints to stderr; all of its processes have ended."""
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=40)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return errors
        time.sleep(0.05)
    raise AssertionError("a process of the demo is still running")


def test_view_shows_frames_until_ctrl_c():
    client = pytest.importorskip("websockets.sync.client")
    with started_demo("--view", "--no-browser") as process:
        address = re.search(r"http://(\S+)/", process.stdout.readline())[1]
        frames = 0
        with client.connect(f"ws://{address}/socket", origin=f"http://{address}", max_size=None) as page:
            while frames < 3:  # binary messages
                message = page.recv(60)
                frames += isinstance(message, bytes)
                page.send('{"type": "painted"}')
        errors = errors_after_ctrl_c(process)
        assert process.returncode == 0 and not errors


def test_ctrl_c_leaves_no_process_behind(tmp_path):
    with started_demo("--out", str(tmp_path), "--rate", "0.2") as process:
        for line in process.stdout:
            if "Replaying" in line:
                break
        errors = errors_after_ctrl_c(process)
        assert process.returncode == 130 and "Interrupted" in errors and "Traceback" not in errors


def test_a_process_that_dies_is_quoted(refused):
    out, process = refused
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "tokenizer ended with exit code" in errors and "no-such-model" in errors
    assert not (out / "report.json").exists()


def test_bags_that_do_not_fit(tmp_path, capsys):
    assert main(["--bag", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    assert "no bag at" in capsys.readouterr().err


def unbalanced(**changes: int) -> list[str]:
    """The problems of a report over one camera with 10 frames, all encoded except for the changes."""
    counters = dict(received=10, encoded=10, replaced=0, unmatched=0, undecodable=0, pending=0) | changes
    events = Events(policy=None, rmw="rmw_none")
    events.status = {
        "visual_tokenizer: camera eye": {key: str(value) for key, value in counters.items()},
        "visual_tokenizer: model": {"token_messages": "10"},
    }
    messages = [
        {
            "sequence": i,
            "stamp_ns": i,
            "arrival_ns": 5_000_000 + i,
            "views": [{"camera": "eye", "stamp_ns": i}],
            "shape": [1, 4, 8],
            "dtype": "float32",
            "model": "m",
            "weights": "random",
            "fingerprint": "f",
        }
        for i in range(10)
    ]
    published = {"/eye/image_raw": {i: i for i in range(10)}}
    report, problems = make_report(events, messages, published, {"eye": "/eye/image_raw"})
    assert report["latency_ms"]["image_to_policy"] == {"p50": 5.0, "p95": 5.0, "p99": 5.0}
    return problems


def test_frames_that_are_not_accounted_for_are_a_problem():
    assert unbalanced() == []
    assert "10 frames published, but 9 received" in unbalanced(received=9, encoded=9)[0]
    assert "10 frames received, but 11 accounted for" in unbalanced(pending=1)[0]
    assert "8 frames encoded, 10 at the policy" in unbalanced(encoded=8, replaced=2)[0]
