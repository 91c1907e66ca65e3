"""Bags of token messages: what the node would have published, at the times of the recording."""

import numpy as np
import pytest

for package in ("torch", "rosbags", "mcap"):
    pytest.importorskip(package)
import rosbags.rosbag2  # noqa: E402
import rosbags.typesys  # noqa: E402
from offline_runs import MS, contents, tokenize, write_drive  # noqa: E402
from pixel_tokenizer import PixelTokenizer  # noqa: E402
from recorded import numbered_image, write_bag, write_images  # noqa: E402
from rosbags.interfaces import QosDurability  # noqa: E402

from vla_perception.offline import bag_output, run  # noqa: E402
from vla_perception.offline.bag_recordings import typestore  # noqa: E402
from vla_perception.offline.recordings import Selection, open_recordings  # noqa: E402
from vla_perception.offline.token_file import TokenFile  # noqa: E402
from vla_perception.sources.bags import Bag, BagTopic  # noqa: E402
from vla_perception.tokens.visual_tokens import VisualTokens  # noqa: E402


@pytest.fixture
def drive(tmp_path):
    return write_drive(tmp_path / "drive")


def messages(folder, topics=None):
    with Bag(folder) as bag:
        return list(bag.messages(topics))


def test_messages_are_those_of_the_token_file(tmp_path, drive):
    tokenize(tmp_path / "files", [drive])
    index, _ = tokenize(tmp_path / "bags", [drive], output="mcap")
    assert [entry["file"] for entry in index["recordings"]] == ["drive"] and index["totals"]["frames"] == 4
    found = messages(tmp_path / "bags/drive")
    assert {message.topic for message in found} == {"/tokens"}
    with TokenFile(tmp_path / "files/drive.safetensors") as file:
        for number, message in enumerate(found):
            recorded = typestore().deserialize_cdr(message.cdr, message.type)
            assert message.time_ns == file.times_ns[number] == 10**9 + (number * 100 + 15) * MS
            assert recorded.format == "safetensors; vla_tokens/1" and recorded.header.frame_id == "front_optical"
            assert recorded.header.stamp.sec * 10**9 + recorded.header.stamp.nanosec == file.stamps_ns[number, 0]
            tokens = VisualTokens.from_bytes(recorded.data.tobytes())
            assert tokens.to_bytes() == file.frame(number).to_bytes()
    assert not list((tmp_path / "bags").rglob("*.safetensors"))


def test_other_topics_are_copied_if_asked(tmp_path, drive):
    tokenize(tmp_path / "all", [drive], output="mcap", copied=None)
    found = messages(tmp_path / "all/drive")
    assert [message.time_ns for message in found] == sorted(message.time_ns for message in found)
    copied = [message for message in found if message.topic != "/tokens"]
    assert copied == messages(drive, ["/command"]) and len(found) == 8 + 4
    tokenize(tmp_path / "one", [drive], output="mcap", copied=("/front/image_raw",))
    found = messages(tmp_path / "one/drive", ["/front/image_raw"])
    assert found == messages(drive, ["/front/image_raw"])


@pytest.mark.parametrize("plugin", ["mcap", "sqlite3"])
def test_other_readers_find_what_they_need_and_the_qos_that_was_recorded(tmp_path, plugin):
    import mcap.reader
    import yaml

    latched = bag_output._tokens_qos()._replace(durability=QosDurability.TRANSIENT_LOCAL, depth=1)
    frames = [("/front/image_raw", 10**9 + index * 100 * MS, numbered_image(index)) for index in range(3)]
    values = [("/tf_static", 10**9, [1.0]), ("/command", 10**9, [2.0])]
    drive = write_bag(tmp_path / "drive", frames, plugin=plugin, values=values, qos={"/tf_static": [latched]})
    tokenize(tmp_path / "out", [drive], output="mcap", copied=None)
    folder = tmp_path / "out/drive"

    said = yaml.safe_load((folder / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert said["storage_identifier"] == "mcap" and said["relative_file_paths"] == ["drive.mcap"]
    assert said["message_count"] == 5 and said["files"][0]["message_count"] == 5
    topics = {entry["topic_metadata"]["name"]: entry for entry in said["topics_with_message_count"]}
    assert {name: entry["message_count"] for name, entry in topics.items()} == {
        "/tokens": 3, "/tf_static": 1, "/command": 1,
    }  # fmt: skip
    assert all(entry["topic_metadata"]["serialization_format"] == "cdr" for entry in topics.values())
    qos = {name: entry["topic_metadata"]["offered_qos_profiles"] for name, entry in topics.items()}
    assert [(each["durability"], each["depth"], each["reliability"]) for each in qos["/tf_static"]] == [
        ("transient_local", 1, "reliable")
    ]
    assert [(each["history"], each["durability"], each["reliability"]) for each in qos["/tokens"]] == [
        ("keep_last", "volatile", "reliable")
    ]
    assert qos["/command"] == []

    with (folder / "drive.mcap").open("rb") as opened:
        reader = mcap.reader.make_reader(opened, validate_crcs=True)
        assert reader.get_header().profile == "ros2"
        found = list(reader.iter_messages())
    assert [(schema.name, schema.encoding) for schema, channel, _ in found if channel.topic == "/tokens"] == [
        ("sensor_msgs/msg/CompressedImage", "ros2msg")
    ] * 3
    assert all(channel.message_encoding == "cdr" for _, channel, _ in found)
    written = {channel.topic: channel.metadata["offered_qos_profiles"] for _, channel, _ in found}
    assert {name: yaml.safe_load(text) for name, text in written.items()} == qos
    with rosbags.rosbag2.Reader(folder) as bag:
        assert {each.topic: each.msgcount for each in bag.connections} == {
            name: entry["message_count"] for name, entry in topics.items()
        }


@pytest.mark.parametrize("plugin", ["mcap", "sqlite3"])
def test_types_that_are_not_ros_2s_own_keep_their_definition(tmp_path, plugin):
    """Which Foxglove, PlotJuggler and rosbags need to show what was copied."""
    kind, text = "my_robot_msgs/msg/Gripper", f"Width width\n{'=' * 80}\nMSG: my_robot_msgs/Width\nfloat64 metres\n"
    digest = f"RIHS01_{'5e' * 32}"
    (image,) = messages(write_bag(tmp_path / "images", [("/front/image_raw", 10**9, numbered_image(0))]))
    drive = tmp_path / "drive"
    with rosbags.rosbag2.Writer(
        drive, version=9, storage_plugin=rosbags.rosbag2.StoragePlugin[plugin.upper()]
    ) as recorded:
        images = recorded.add_connection(image.topic, image.type, typestore=typestore())
        recorded.write(images, image.time_ns, image.cdr)
        gripper = recorded.add_connection("/gripper", kind, msgdef=text, rihs01=digest)
        recorded.write(gripper, 10**9, b"\0\1\0\0" + np.array(0.04).tobytes())
    tokenize(tmp_path / "out", [drive], output="mcap", copied=None)
    with rosbags.rosbag2.Reader(tmp_path / "out/drive") as bag:
        (copied,) = [each for each in bag.connections if each.topic == "/gripper"]
        ((_, _, cdr),) = bag.messages([copied])
        known = typestore()
        known.register(rosbags.typesys.get_types_from_msg(copied.msgdef.data, kind))
        assert (copied.msgtype, copied.msgdef.data) == (kind, text)
        assert known.deserialize_cdr(cdr, kind).width.metres == 0.04
        if plugin == "sqlite3":  # rosbags' MCAP files have none
            assert copied.digest == digest


@pytest.mark.parametrize(
    "text",
    ["", "[]", "- history: 1", "3", "[" * 16000, "- &a {depth: 1}\n- *a", "a: [", "- {depth: [1]}"],
)
def test_qos_that_cannot_be_read_is_none(text):
    assert bag_output._recorded_qos(BagTopic("/tf", "tf2_msgs/msg/TFMessage", 1, text)) == []


def test_the_disk_need_has_room_for_a_token_file_beside_its_bag(tmp_path, drive):
    recordings = open_recordings([drive, write_images(tmp_path / "shots", 3)], Selection())
    frames = 4 * 2, 3  # of one view each: 6 tokens of 6 channels in bfloat16
    for output, expected in (("safetensors", sum(frames)), ("mcap", sum(frames) + max(frames))):
        settings = run.RunSettings(tmp_path, output=output)
        assert run.expected_bytes(recordings, PixelTokenizer(), settings) == expected * 6 * 6 * 2


def test_tokens_have_the_qos_of_the_node():
    pytest.importorskip("rclpy")
    from vla_perception.nodes.visual_tokenizer import token_publisher

    assert bag_output._tokens_qos().depth == token_publisher.DEPTH


def test_a_folder_of_images_becomes_a_bag_from_time_zero_on(tmp_path):
    tokenize(tmp_path / "out", [write_images(tmp_path / "shots", 3)], output="mcap")
    assert [message.time_ns for message in messages(tmp_path / "out/shots")] == [0, 10**9, 2 * 10**9]


def test_it_goes_on_and_ends_with_the_same_bytes(tmp_path, drive, monkeypatch):
    tokenize(tmp_path / "whole", [drive], output="mcap", copied=None)
    real, left = bag_output._token_messages, [2]

    def interrupted(file, store):
        for message in real(file, store):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            yield message

    unlink = bag_output.Path.unlink

    def interrupted_at_the_end(path, **options):
        if path.suffix == ".safetensors":
            raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(bag_output, "_token_messages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(tmp_path / "parts", [drive], output="mcap", copied=None)
    monkeypatch.undo()
    monkeypatch.setattr(
        bag_output.Path, "unlink", interrupted_at_the_end
    )  # the bag is there, and the token file still is
    with pytest.raises(KeyboardInterrupt):
        tokenize(tmp_path / "parts", [drive], output="mcap", copied=None)
    monkeypatch.undo()
    assert (tmp_path / "parts/drive").is_dir() and (tmp_path / "parts/drive.safetensors").is_file()
    tokenizer = PixelTokenizer()
    tokenize(tmp_path / "parts", [drive], tokenizer, output="mcap", copied=None)
    assert not tokenizer.batches, "the tokens were there already"
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    np.testing.assert_equal(len(contents(tmp_path / "parts")), 4)  # index, bag, its metadata, its entry
