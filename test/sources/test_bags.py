"""Bags, read without ROS: both storages, both ways to name them, and what happens with damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rosbags")

from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vla_perception.sources.bags import Bag, BagError, compressed_format, header_stamp_ns, with_header_stamp
from vla_perception.sources.bags.cdr import read_compressed_image, read_image
from vla_perception.tokens import FORMAT

SAMPLE = Path(__file__).parents[2] / "examples" / "sample_bag"
TYPES = get_typestore(Stores.ROS2_JAZZY)
Header, Time = TYPES.types["std_msgs/msg/Header"], TYPES.types["builtin_interfaces/msg/Time"]
CompressedImage, String = TYPES.types["sensor_msgs/msg/CompressedImage"], TYPES.types["std_msgs/msg/String"]


def compressed(stamp_ns: int, *, format: str = "jpeg", frame_id: str = "eye", data: bytes = b"image") -> bytes:
    header = Header(Time(*divmod(stamp_ns, 1_000_000_000)), frame_id)
    message = CompressedImage(header, format, np.frombuffer(data, np.uint8))
    return bytes(TYPES.serialize_cdr(message, message.__msgtype__))


def write(path: Path, messages: list[tuple[str, str, int, bytes]], storage=StoragePlugin.MCAP) -> Path:
    """A bag of (topic, type, time_ns, cdr), written in the order given."""
    with Writer(path, version=9, storage_plugin=storage) as bag:
        connections = {}
        for topic, kind, time_ns, cdr in messages:
            if topic not in connections:
                connections[topic] = bag.add_connection(topic, kind, typestore=TYPES)
            bag.write(connections[topic], time_ns, cdr)
    return path


@pytest.fixture(params=[StoragePlugin.MCAP, StoragePlugin.SQLITE3], ids=["mcap", "sqlite"])
def small_bag(request, tmp_path) -> Path:
    image = CompressedImage.__msgtype__
    text = bytes(TYPES.serialize_cdr(String("hello"), String.__msgtype__))
    messages = [
        ("/eye/image_raw/compressed", image, 1_000, compressed(900)),
        ("/chatter", String.__msgtype__, 3_000, text),
        ("/eye/image_raw/compressed", image, 4_000, compressed(3_900)),
        ("/tokens", image, 2_000, compressed(900, format=FORMAT)),
    ]
    return write(tmp_path / "bag", messages, request.param)


def test_topics_messages_and_order(small_bag):
    with Bag(small_bag) as bag:
        assert [(topic.name, topic.messages) for topic in bag.topics.values()] == [
            ("/chatter", 1),
            ("/eye/image_raw/compressed", 2),
            ("/tokens", 1),
        ]
        assert bag.camera_topics() == ["/eye/image_raw/compressed"]
        assert (bag.start_ns, bag.end_ns) == (1_000, 4_000)
        assert [message.time_ns for message in bag.messages()] == [1_000, 2_000, 3_000, 4_000]
        images = list(bag.messages(["/eye/image_raw/compressed"]))
        assert [message.cdr for message in images] == [compressed(900), compressed(3_900)]
        assert [message.time_ns for message in bag.messages(start_ns=2_500)] == [3_000, 4_000]
        assert list(bag.messages([])) == []


def test_a_storage_file_by_itself(small_bag):
    (file,) = [file for file in small_bag.iterdir() if file.suffix in (".mcap", ".db3")]
    with Bag(file) as bag:
        assert len(list(bag.messages())) == 4
    (small_bag / "metadata.yaml").unlink()
    with Bag(small_bag) as bag:
        assert len(list(bag.messages())) == 4


def test_absent_topic_lists_those_that_exist(small_bag):
    with Bag(small_bag) as bag, pytest.raises(BagError, match=r"no topic /nose .* /eye/image_raw/compressed"):
        bag.messages(["/nose"])


def test_paths_that_are_no_bag(tmp_path):
    with pytest.raises(BagError, match="no such file"):
        Bag(tmp_path / "absent")
    with pytest.raises(BagError, match="neither metadata.yaml nor"):
        Bag(tmp_path)
    (tmp_path / "notes.txt").write_text("not a bag")
    with pytest.raises(BagError, match="is not a bag"):
        Bag(tmp_path / "notes.txt")
    for name in ("empty.mcap", "empty.db3"):
        (tmp_path / name).touch()
        with pytest.raises(BagError, match="empty"):
            Bag(tmp_path / name)
    for name in ("text.mcap", "text.db3"):
        (tmp_path / name).write_text("this is text, however it is called, and there is enough of it to read")
        with pytest.raises(BagError, match="cannot read the bag"):
            Bag(tmp_path / name)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "metadata.yaml").write_text("something: else")
    with pytest.raises(BagError, match="cannot read the bag"):
        Bag(folder)


@pytest.mark.parametrize("keep", [9, 40, 200, 0.3, 0.9])
def test_truncated_file(small_bag, keep):
    (file,) = [file for file in small_bag.iterdir() if file.suffix in (".mcap", ".db3")]
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(BagError, match="cannot read the bag"), Bag(small_bag) as bag:
        list(bag.messages())


@pytest.mark.parametrize("frame_id", ["", "a", "ab", "abc", "abcd", "Kamera-Ü"])
def test_looking_into_cdr(frame_id):
    cdr = compressed(1_767_225_600_123_456_789, format="jpeg; compressed bgr8", frame_id=frame_id)
    assert compressed_format(cdr) == "jpeg; compressed bgr8"
    assert header_stamp_ns(cdr) == 1_767_225_600_123_456_789
    changed = with_header_stamp(cdr, 5_000_000_007)
    assert changed == compressed(5_000_000_007, format="jpeg; compressed bgr8", frame_id=frame_id)


def test_cdr_in_big_endian():
    message = TYPES.deserialize_cdr(compressed(7_000_000_009), CompressedImage.__msgtype__)
    cdr = bytes(TYPES.serialize_cdr(message, CompressedImage.__msgtype__, little_endian=False))
    assert (header_stamp_ns(cdr), compressed_format(cdr)) == (7_000_000_009, "jpeg")
    assert header_stamp_ns(with_header_stamp(cdr, 11)) == 11
    assert compressed_format(cdr[:18]) == "" and compressed_format(b"") == ""


@pytest.mark.parametrize("little", [True, False])
@pytest.mark.parametrize("frame_id", ["", "a", "ab", "abc", "abcd", "Kamera-Ü"])
def test_image_messages_are_read_without_their_definition(frame_id, little):
    """As by rosbags; and of less than all of its bytes, nothing is read."""
    new = TYPES.types
    header = new["std_msgs/msg/Header"](new["builtin_interfaces/msg/Time"](5, 7), frame_id)
    data = np.arange(24, dtype=np.uint8)
    raw = {"height": 2, "width": 4, "encoding": "rgb8", "is_bigendian": 1, "step": 12, "data": data}
    for kind, read, fields in (
        ("sensor_msgs/msg/Image", read_image, raw),
        ("sensor_msgs/msg/CompressedImage", read_compressed_image, {"format": "jpeg; ü", "data": data}),
    ):
        cdr = bytes(TYPES.serialize_cdr(new[kind](header=header, **fields), kind, little_endian=little))
        found = vars(read(cdr))
        assert found | {"data": bytes(found["data"])} == fields | {"data": data.tobytes()}
        for length in range(len(cdr)):
            with pytest.raises(ValueError):
                read(cdr[:length])


def test_the_sample_bag():
    """Two cameras at about 5 Hz with jitter, real stamps, and camera_info that fits the images."""
    cv2 = pytest.importorskip("cv2")
    with Bag(SAMPLE) as bag:
        assert {topic.name: topic.type for topic in bag.topics.values()} == {
            "/front/image_raw/compressed": "sensor_msgs/msg/CompressedImage",
            "/front/camera_info": "sensor_msgs/msg/CameraInfo",
            "/wrist/image_raw/compressed": "sensor_msgs/msg/CompressedImage",
            "/wrist/camera_info": "sensor_msgs/msg/CameraInfo",
        }
        assert 5 <= bag.seconds <= 10
        for camera in ("front", "wrist"):
            images = list(bag.messages([f"/{camera}/image_raw/compressed"]))
            infos = list(bag.messages([f"/{camera}/camera_info"]))
            stamps = np.array([header_stamp_ns(message.cdr) for message in images])
            assert stamps.tolist() == [header_stamp_ns(message.cdr) for message in infos]
            spacing = np.diff(stamps) / 1e6
            assert 195 < spacing.mean() < 205 and spacing.std() > 1 and spacing.min() > 150
            for image, info in zip(images, infos, strict=True):
                image = TYPES.deserialize_cdr(image.cdr, image.type)
                pixels = cv2.imdecode(image.data, cv2.IMREAD_COLOR)
                described = TYPES.deserialize_cdr(info.cdr, info.type)
                assert pixels.shape == (described.height, described.width, 3)
                assert described.header.frame_id == image.header.frame_id == f"{camera}_camera_optical_frame"
                # The focal length is that of a plausible field of view, the same in both directions.
                assert described.k[0] == described.k[4]
                field = 2 * np.degrees(np.arctan(described.width / 2 / described.k[0]))
                assert 50 < field < 90
    assert sum(file.stat().st_size for file in SAMPLE.iterdir()) <= 5_000_000
