"""Recordings as a page sees them, against the messages and images that were put in."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from fake_feed import HEIGHT, WIDTH, random_tokens

pytest.importorskip("mcap")
pytest.importorskip("simplejpeg")
pytest.importorskip("rosbags")

from PIL import Image
from ros_harness import ROOT
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vla_perception.tokens.message import FORMAT
from vla_perception.view.analysis import Palette
from vla_perception.view.recording import open_recording
from vla_perception.view.session import Session
from vla_perception.view.wire import unpack

TYPES = get_typestore(Stores.ROS2_JAZZY)
BAG = ROOT / "examples" / "sample_bag"
BEGIN_NS = 1_700_000_000 * 10**9
PERIOD_NS = 100_000_000


def gray(value):
    return np.full((HEIGHT, WIDTH, 3), value, np.uint8)


def message_at(index):
    """A token message of two cameras, of images that were taken before it was recorded."""
    tokens = random_tokens(index)
    stamps = BEGIN_NS + index * PERIOD_NS - (140_000_000 if index == 5 else 50_000_000)
    return replace(tokens, views=tuple(replace(view, stamp_ns=stamps) for view in tokens.views))


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """Six token messages, two of them at one time, with raw images of one camera and JPEGs of the other."""
    path = tmp_path_factory.mktemp("recordings") / "bag"
    header, stamp = TYPES.types["std_msgs/msg/Header"], TYPES.types["builtin_interfaces/msg/Time"]

    def head(stamp_ns):
        return header(stamp=stamp(*divmod(stamp_ns, 10**9)), frame_id="camera_optical")

    def compressed(stamp_ns, format, data):
        kind = TYPES.types["sensor_msgs/msg/CompressedImage"]
        return kind(header=head(stamp_ns), format=format, data=np.frombuffer(data, np.uint8))

    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connect = {
            topic: writer.add_connection(topic, kind, typestore=TYPES)
            for topic, kind in (
                ("/front/image_raw", "sensor_msgs/msg/Image"),
                ("/wrist/image_raw/compressed", "sensor_msgs/msg/CompressedImage"),
                ("/tokens", "sensor_msgs/msg/CompressedImage"),
            )
        }

        def write(topic, time_ns, message):
            writer.write(connect[topic], time_ns, TYPES.serialize_cdr(message, connect[topic].msgtype))

        for index in range(6):
            tokens = message_at(index)
            image = TYPES.types["sensor_msgs/msg/Image"](
                header=head(tokens.stamp_ns),
                height=HEIGHT,
                width=WIDTH,
                encoding="rgb8",
                is_bigendian=0,
                step=3 * WIDTH,
                data=gray(20 + 30 * index).ravel(),
            )
            write("/front/image_raw", tokens.stamp_ns, image)
            file = io.BytesIO()
            Image.fromarray(gray(220 - 30 * index)).save(file, "JPEG")
            write("/wrist/image_raw/compressed", tokens.stamp_ns, compressed(tokens.stamp_ns, "jpeg", file.getvalue()))
            recorded_ns = BEGIN_NS + (4 if index == 5 else index) * PERIOD_NS
            write("/tokens", recorded_ns, compressed(tokens.stamp_ns, FORMAT, tokens.to_bytes()))
    return path


def level(image):
    return np.asarray(Image.open(io.BytesIO(image.get().data)).convert("RGB")).mean()


def test_a_bag_of_tokens_has_a_time_line(bag):
    with open_recording(bag) as feed:
        (summary,) = feed.tokenizers()
        assert (summary["topic"], summary["state"], summary["gone"]) == ("/tokens", "recording", False)
        assert np.allclose(feed.times("/tokens"), [0, 0.1, 0.2, 0.3, 0.4, 0.4])
        for index in (3, 0, 5, 4, 1):
            snapshot, expected = feed.snapshot("/tokens", index), message_at(index)
            assert np.array_equal(snapshot.tokens.data, expected.data)
            assert level(snapshot.images[0]) == pytest.approx(20 + 30 * index, abs=2)
            assert level(snapshot.images[1]) == pytest.approx(220 - 30 * index, abs=2)
            if index:
                assert snapshot.before.sequence == index - 1
        assert feed.snapshot("/tokens", 0).before is None
        assert feed.snapshot("/tokens", 6) is None and feed.snapshot("/other", 0) is None
        assert feed.details("/tokens")["facts"]["model"] == "test"


def test_an_image_message_that_is_too_short_costs_no_tokens(tmp_path):
    header, stamp = TYPES.types["std_msgs/msg/Header"], TYPES.types["builtin_interfaces/msg/Time"]
    head, data = header(stamp=stamp(1, 0), frame_id=""), np.frombuffer(message_at(0).to_bytes(), np.uint8)
    tokens = TYPES.types["sensor_msgs/msg/CompressedImage"](head, FORMAT, data)
    with Writer(tmp_path / "short", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        images = writer.add_connection("/front/image_raw", "sensor_msgs/msg/Image", typestore=TYPES)
        topic = writer.add_connection("/tokens", "sensor_msgs/msg/CompressedImage", typestore=TYPES)
        writer.write(images, BEGIN_NS, b"\0\1\0\0")
        writer.write(topic, BEGIN_NS, TYPES.serialize_cdr(tokens, topic.msgtype))
    with open_recording(tmp_path / "short") as feed:
        snapshot = feed.snapshot("/tokens", 0)
        assert snapshot.images == (None, None) and np.array_equal(snapshot.tokens.data, message_at(0).data)


def test_a_folder_of_bags_lists_them(bag):
    with open_recording(bag.parent) as feed:
        assert [one["topic"] for one in feed.tokenizers()] == ["bag/tokens"]
        assert np.array_equal(feed.snapshot("bag/tokens", 3).tokens.data, message_at(3).data)


def test_a_page_goes_to_any_message_also_when_paused(bag):
    with open_recording(bag) as feed:
        session = Session(feed, Palette(), 5.0)
        session.select("/tokens")
        assert unpack(session.next_frame())[0]["sequence"] == 0
        session.receive(json.dumps({"type": "pause", "paused": True}))
        for index in (4, 2):
            session.receive(json.dumps({"type": "seek", "index": index}))
            header, _ = unpack(session.next_frame())
            assert header["sequence"] == header["index"] == index
        with pytest.raises(ValueError, match="no message 6"):
            session.receive('{"type": "seek", "index": 6}')


def test_token_files_one_and_a_folder_of_them(bag, tmp_path):
    for index in range(2):
        message_at(index).save(tmp_path / f"tokens-{index}.safetensors")
    with open_recording(tmp_path / "tokens-1.safetensors") as feed:
        snapshot = feed.snapshot("tokens-1.safetensors", 0)
        assert np.array_equal(snapshot.tokens.features, message_at(1).features)
        assert snapshot.images == (None, None)
    with open_recording(tmp_path) as feed:
        assert [one["topic"] for one in feed.tokenizers()] == ["tokens-0.safetensors", "tokens-1.safetensors"]


def test_what_holds_no_tokens_needs_a_model(tmp_path):
    with pytest.raises(ValueError, match="no token messages; --model"):
        open_recording(BAG)
    Image.fromarray(gray(1)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="--model"):
        open_recording(tmp_path)
    with pytest.raises(ValueError, match="there is no"):
        open_recording(tmp_path / "missing")
    message_at(0).save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="leave --model out"):
        open_recording(tmp_path / "b.safetensors", "tiny-random")


def test_images_are_encoded_when_they_are_looked_at(tmp_path):
    pytest.importorskip("timm")
    from vla_perception.tokenizer.tokenizer import VisualTokenizer

    for index in range(3):
        Image.fromarray(gray(40 + 60 * index)).save(tmp_path / f"{index}.png")
    tokenizer = VisualTokenizer.load("tiny-random", device="cpu")
    with open_recording(tmp_path, "tiny-random") as feed:
        (name,) = (one["topic"] for one in feed.tokenizers())
        assert feed.times(name) == [0, 1, 2]
        for index in (2, 0, 1):
            snapshot = feed.snapshot(name, index)
            expected = tokenizer([gray(40 + 60 * index)])
            assert np.allclose(snapshot.tokens.float32(), expected.tokens.float(), atol=1e-5)
            assert snapshot.tokens.features is not None and snapshot.tokens.cameras == ("front",)
            assert level(snapshot.images[0]) == pytest.approx(40 + 60 * index, abs=2)
        assert feed.snapshot(name, 1).before.sequence == 0


def test_a_datasets_episodes_are_listed_before_anything_is_decoded(monkeypatch):
    """Of thousands of episodes the page shows one."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    from vla_perception.offline import lerobot
    from vla_perception.offline.recordings import Selection, open_recordings
    from vla_perception.view.recorded import ComputedFrames

    recordings = open_recordings([ROOT / "test/data/lerobot/moving_crops"], Selection())
    times = [[frames.timestamp for frames in recording.frame_sets()] for recording in recordings]
    monkeypatch.setattr(lerobot, "frames_of", lambda *_: pytest.fail("a video is decoded"))
    for recording, expected in zip(recordings, times, strict=True):
        assert np.allclose(ComputedFrames(recording, None).times, expected, atol=1e-3)


@pytest.mark.parametrize("output", ["safetensors", "mcap"])
def test_tokens_that_tokenize_wrote_are_shown_over_their_images(tmp_path, output):
    pytest.importorskip("timm")
    from vla_perception.cli import main

    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        Image.fromarray(gray(40 + 60 * index)).save(images / f"{index}.png")
    options = ["--model", "tiny-random", "--device", "cpu", "--out", str(tmp_path / "run"), "--format", output]
    assert main(["tokenize", str(images), *options]) == 0
    with open_recording(tmp_path / "run") as feed:
        (name,) = (one["topic"] for one in feed.tokenizers())
        assert len(feed.times(name)) == 3
        for index in (1, 2, 0):
            snapshot = feed.snapshot(name, index)
            assert snapshot.tokens.weights == "random" and snapshot.tokens.sequence == index
            assert level(snapshot.images[0]) == pytest.approx(40 + 60 * index, abs=2)
    for file in images.iterdir():
        file.unlink()
    with open_recording(tmp_path / "run") as feed:
        assert feed.snapshot(name, 0).images == (None,), "moved since: the tokens alone"
    for entry in (tmp_path / "run").rglob("recording.json"):
        entry.write_text("{")
        with open_recording(entry.parent) as feed:
            (name,) = (one["topic"] for one in feed.tokenizers())
            assert feed.snapshot(name, 0).images == (None,), "what says of what they are is damaged"
