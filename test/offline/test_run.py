"""Runs: the tokens of every frame set, whatever is damaged, and whatever interrupts them."""

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest

for package in ("torch", "av", "pyarrow", "rosbags", "mcap"):
    pytest.importorskip(package)
from offline_runs import DATASET, MS, ROOT, bfloat16, contents, tokenize  # noqa: E402
from pixel_tokenizer import PixelTokenizer, cells  # noqa: E402
from recorded import numbered_image, write_bag, write_images, write_video  # noqa: E402

from vla_perception.offline import run, run_index, token_file_writer  # noqa: E402
from vla_perception.offline.recordings import Selection, SourceError, open_recordings  # noqa: E402
from vla_perception.offline.token_file import TokenFile  # noqa: E402


@pytest.fixture
def sources(tmp_path):
    """A bag of two cameras with a damaged image, a folder of images with a damaged one, and a video."""
    frames = []
    for index in range(9):
        image = None if index == 4 else numbered_image(index)
        frames.append(("/front/image_raw", index * 100 * MS, image))
        frames.append(("/wrist/image_raw", (index * 100 + 10) * MS, numbered_image(50 + index)))
    write_bag(tmp_path / "drive", frames)
    (write_images(tmp_path / "shots", 7) / "image_2.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    write_video(tmp_path / "clip.mp4", 5)
    return [tmp_path / "drive", tmp_path / "shots", tmp_path / "clip.mp4"]


def test_every_frame_set_becomes_its_tokens(tmp_path, sources):
    told = []
    index, statistics = tokenize(tmp_path / "out", sources, report=told.append)
    with TokenFile(tmp_path / "out/drive.safetensors") as file:
        kept = [number for number in range(9) if number != 4]
        expected = [[cells(numbered_image(number)), cells(numbered_image(50 + number))] for number in kept]
        np.testing.assert_array_equal(file.words, bfloat16(expected))
        assert file.stamps_ns[:, 1].tolist() == [(number * 100 + 10) * MS for number in kept]
        assert file.cameras == ("front", "wrist") and all(map(file.is_sound, range(len(file))))
    with TokenFile(tmp_path / "out/shots.safetensors") as file:
        np.testing.assert_array_equal(
            file.words[:, 0], bfloat16([cells(numbered_image(number)) for number in (0, 1, 3, 4, 5, 6)])
        )
    assert index["complete"] and index["totals"]["frames"] == 8 + 6 + 5 == statistics.frame_sets
    assert index["totals"]["frames_skipped"] == 2 and any("frame set 4" in text for text in told)
    by_name = {entry["name"]: entry for entry in index["recordings"]}
    assert "image_2.png" in by_name["shots"]["skipped_because"][0]
    assert json.loads((tmp_path / "out/index.json").read_text()) == index


def test_the_index_says_what_the_tokens_are_made_of(tmp_path, sources):
    import hashlib

    index, _ = tokenize(tmp_path / "out", sources[2:], token_dtype="float32")
    (entry,) = index["recordings"]
    assert entry["files"][0]["sha256"] == hashlib.sha256(sources[2].read_bytes()).hexdigest()
    assert entry["dtype"] == index["settings"]["token_dtype"] == "float32"
    assert index["model"]["fingerprint"] == PixelTokenizer.fingerprint
    assert {"torch", "av", "numpy"} <= set(index["environment"]["versions"]) and index["environment"]["threads"] >= 1
    assert index["batch_tolerance"] is None


def test_a_file_of_several_episodes_is_hashed_once(tmp_path, monkeypatch):
    """Also where each episode is a call of its own, as a worker of Ray gets them."""
    hashed = []
    real = run_index.file_digest
    monkeypatch.setattr(run_index, "file_digest", lambda file, ended: hashed.append(file.name) or real(file, ended))
    settings = run.RunSettings(tmp_path / "out", Selection())
    with run_index.Digests() as digests:
        for recording in open_recordings([DATASET], Selection()):
            run.encode_recordings([recording], PixelTokenizer(), settings, digests=digests)
    assert len(hashed) == len(set(hashed)) > 2
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 3


def test_an_interruption_does_not_wait_for_digests():
    """Of a source without end."""
    asked = threading.Event()

    class Endless:
        def read(self, size):
            asked.set()
            return bytes(10)

    with run_index.Digests() as digests:
        pending = digests._thread.submit(run_index.file_digest, Endless(), digests._ended)
        assert asked.wait(60)
    with pytest.raises(CancelledError):
        pending.result(60)


def test_a_batch_is_measured_against_single_frame_sets(tmp_path, sources):
    tokenizer = PixelTokenizer()
    index, _ = tokenize(tmp_path / "out", sources[:1], tokenizer, batch=4)
    assert index["batch_tolerance"]["worst_difference"] == 0 and index["batch_tolerance"]["frame_sets"] == 4
    views = [8, *[2] * 4, 8, 6, 2]  # measured together and alone; then 0–3, 4–7 less the damaged one, 8
    assert tokenizer.batches == views


@pytest.mark.parametrize("batch", [1, 3])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, sources, batch):
    whole, _ = tokenize(tmp_path / "whole", sources, batch=batch)

    class Interrupting(PixelTokenizer):
        left = 5

        def encode(self, pixel_values, features=False):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().encode(pixel_values, features)

    interruptions = 0
    while True:
        try:
            tokenize(tmp_path / "parts", sources, Interrupting(), batch=batch)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= (3 if batch == 1 else 1)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_killed_run_ends_with_the_same_bytes(tmp_path, sources):
    """kill -9, at random points, until the rest fits between two of them."""
    from kill_run import whole_run

    whole_run(tmp_path / "whole", sources)
    command = [sys.executable, str(ROOT / "test/support/kill_run.py"), str(tmp_path / "parts"), "3", *sources]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    killed, code = map(int, done.stdout.split())
    assert code == 0 and killed >= 2, "it must have been killed while it worked"
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_full_disk_interrupts_and_the_run_goes_on(tmp_path, sources, monkeypatch):
    tokenize(tmp_path / "whole", sources)
    room = [900]
    real = token_file_writer._write

    def write(file, data, offset):
        if len(data) > room[0]:
            real(file, memoryview(data)[: room[0]], offset)  # as the system does: what still fits is written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        real(file, data, offset)

    monkeypatch.setattr(token_file_writer, "_write", write)
    full = 0
    while True:
        try:
            tokenize(tmp_path / "parts", sources)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
            full += 1
            room[0] = 900 * full * full
    assert full >= 3
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_what_is_done_is_not_done_again(tmp_path, sources):
    tokenize(tmp_path / "out", sources[:1])
    before = contents(tmp_path / "out")
    tokenizer = PixelTokenizer()
    advanced, found = [], []
    run.encode_recordings(
        open_recordings(sources[:1], Selection()),
        tokenizer,
        run.RunSettings(tmp_path / "out"),
        advance=advanced.append,
        found=found.append,
    )
    assert (advanced, found) == ([], [8])
    tokenize(tmp_path / "out", sources[:1], tokenizer)
    assert not tokenizer.batches and contents(tmp_path / "out") == before
    index, _ = tokenize(tmp_path / "out", sources, tokenizer)
    assert [entry["name"] for entry in index["recordings"]] == ["clip", "drive", "shots"]
    assert len(tokenizer.batches) == 5 + 6


def test_a_run_of_other_settings_is_refused(tmp_path, sources):
    tokenize(tmp_path / "out", sources[:1])
    for changes, said in (
        ({"batch": 2}, "settings.batch: 1, now 2"),
        ({"token_dtype": "float16"}, 'settings.token_dtype: "bfloat16", now "float16"'),
        ({"selection": Selection(every=2)}, "settings.every: 1, now 2"),
    ):
        with pytest.raises(run_index.RunIndexError, match=said):
            tokenize(tmp_path / "out", sources[:1], **changes)
    other = PixelTokenizer()
    other.fingerprint = "cd" * 32
    with pytest.raises(run_index.RunIndexError, match="model.fingerprint"):
        tokenize(tmp_path / "out", sources[:1], other)


def test_a_changed_preset_is_told_from_an_unchanged_one_by_what_was_changed():
    """The latter has no inputs of its fingerprint that the other's could be compared with."""
    preset = {"model": {"fingerprint": "a", "grid": [14, 14], "pool": 1}}
    inputs = {"settings": {"pool": 2, "projector": "none"}, "weights": "w"}
    pooled = {"model": {"fingerprint": "b", "fingerprint_inputs": inputs, "grid": [7, 7], "pool": 2}}
    said = ["model.grid: [14, 14], now [7, 7]", "model.pool: 1, now 2", 'model.fingerprint: "a", now "b"']
    assert run_index.differences(preset, pooled) == said
    other = {"model": pooled["model"] | {"fingerprint_inputs": inputs | {"weights": "x"}}}
    assert run_index.differences(pooled, other) == ['model.fingerprint_inputs.weights: "w", now "x"']


def test_on_error_stop_ends_with_the_reason(tmp_path, sources):
    with pytest.raises(SourceError, match="frame set 4: .*truncated.*--on-error skip"):
        tokenize(tmp_path / "out", sources[:1], on_error="stop")
    assert not json.loads((tmp_path / "out/index.json").read_text())["complete"]


def test_what_stopped_goes_on_with_skip_as_the_error_says(tmp_path, sources):
    with pytest.raises(SourceError, match="--on-error skip goes on without it"):
        tokenize(tmp_path / "out", sources, on_error="stop")
    tokenize(tmp_path / "out", sources)
    tokenize(tmp_path / "whole", sources)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(run_index.RunIndexError, match='settings.on_error: "skip", now "stop"'):
        tokenize(tmp_path / "out", sources, on_error="stop")


def test_a_recording_that_breaks_off_keeps_what_came_before(tmp_path, sources, monkeypatch):
    from vla_perception.sources.bags import Bag, BagError

    real = Bag.messages

    def messages(self, *arguments):
        for number, message in enumerate(real(self, *arguments)):
            if len(arguments[0]) == 2 and number == 8:  # where both cameras are read
                raise BagError("there is no chunk at byte 12345, where the index has one")
            yield message

    monkeypatch.setattr(Bag, "messages", messages)
    told = []
    index, _ = tokenize(tmp_path / "out", sources[:1], report=told.append)
    (entry,) = index["recordings"]
    assert entry["frames"] == 4 and "no chunk at byte" in entry["breaks_off"]
    assert any("breaks off" in text for text in told)
    with pytest.raises(BagError):
        tokenize(tmp_path / "strict", sources[:1], on_error="stop")


def test_a_damaged_source_is_left_out_or_an_error(tmp_path, sources):
    path = next(sources[0].glob("*.mcap"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    damaged = []
    recordings = open_recordings(sources, Selection(), damaged)
    assert [recording.name for recording in recordings] == ["shots", "clip"]
    assert damaged[0]["name"] == "drive" and "mcap recover" in damaged[0]["error"]
    with pytest.raises(SourceError, match="mcap recover"):
        open_recordings(sources, Selection())
    with pytest.raises(SourceError, match="there is no"):
        open_recordings([*sources, tmp_path / "typo"], Selection(), damaged)


def test_a_recording_without_one_readable_frame_is_left_out(tmp_path, sources):
    folder = write_images(tmp_path / "broken", 2)
    for file in folder.iterdir():
        file.write_bytes(b"\x89PNG\r\n\x1a\n")
    index, _ = tokenize(tmp_path / "out", [folder, sources[2]])
    assert [entry["name"] for entry in index["failed"]] == ["broken"] and "image_0.png" in index["failed"][0]["error"]
    assert [entry["name"] for entry in index["recordings"]] == ["clip"] and index["complete"]
    assert not list((tmp_path / "out").glob("broken*"))


def test_tokens_that_are_not_finite_are_skipped(tmp_path, sources):
    class Overflowing(PixelTokenizer):
        def encode(self, pixel_values, features=False):
            output = super().encode(pixel_values, features)
            if len(self.batches) == 3:
                output.tokens[0, 0, 0] = float("inf")
            return output

    index, _ = tokenize(tmp_path / "out", sources[2:], Overflowing())
    assert index["totals"] | {"bytes": 0} == {"frames": 4, "frames_skipped": 1, "frames_damaged": 0, "bytes": 0}
    assert "not finite" in index["recordings"][0]["skipped_because"][0]


def test_images_of_several_sizes_make_one_file(tmp_path):
    from recorded import png

    folder = write_images(tmp_path / "shots", 2)
    (folder / "image_9.png").write_bytes(png(numbered_image(9, 50, 40)))
    (folder / "image_10.png").write_bytes(png(numbered_image(10, 1, 1)))
    index, _ = tokenize(tmp_path / "out", [folder])
    with TokenFile(tmp_path / "out/shots.safetensors") as file:
        assert [(file.frame(i).views[0].height, file.frame(i).views[0].width) for i in range(3)] == [(24, 36)] * 2 + [
            (50, 40)
        ]
    assert "too small" in index["recordings"][0]["skipped_because"][0]
