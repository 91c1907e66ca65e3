"""What sources become: recordings, their cameras, and every frame set in its order."""

import json
import random
import shutil

import numpy as np
import pytest

for package in ("av", "pyarrow", "rosbags", "mcap"):
    pytest.importorskip(package)
import av  # noqa: E402
from offline_runs import DATASET, MS, ROOT  # noqa: E402
from recorded import numbered_image, png, write_bag, write_images, write_video  # noqa: E402

from vla_perception.offline import lerobot  # noqa: E402
from vla_perception.offline.recordings import (  # noqa: E402
    Selection,
    SourceError,
    expected_sets,
    open_recordings,
    parse_cameras,
    parse_episodes,
    parse_values,
    selected,
)


def select(**changes):
    for name, parse in (("cameras", parse_cameras), ("values", parse_values)):
        if name in changes:
            changes[name] = parse(changes[name])
    return Selection(**changes)


def only(source, **changes):
    (recording,) = open_recordings([source], select(**changes))
    return recording


def two_cameras(count, lag_ms=7, period_ms=100):
    for index in range(count):
        yield "/front/image_raw", 10**9 + index * period_ms * MS, numbered_image(index)
        yield "/wrist/image_raw", 10**9 + (index * period_ms + lag_ms) * MS, numbered_image(100 + index)


# --- bags


@pytest.mark.parametrize("plugin", ["mcap", "sqlite3"])
@pytest.mark.parametrize("types", ["sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"])
def test_a_bag_gives_every_matched_frame_set(tmp_path, plugin, types):
    recording = only(write_bag(tmp_path / "bag", two_cameras(5), plugin=plugin, types=types))
    assert (recording.kind, recording.name, recording.cameras) == ("bag", "bag", ("front", "wrist"))
    sets = list(recording.frame_sets())
    assert [frames.ordinal for frames in sets] == list(range(5)) == list(range(recording.expected_sets()))
    for index, frames in enumerate(sets):
        assert frames.stamps_ns == (10**9 + index * 100 * MS, 10**9 + (index * 100 + 7) * MS)
        assert frames.frame_ids == ("front_optical", "wrist_optical")
        assert frames.time_ns == frames.stamps_ns[1] + 5 * MS, "that of the frame that completed it"
        np.testing.assert_array_equal(frames.images(), [numbered_image(index), numbered_image(100 + index)])
    assert recording.details["frames_matched"] == {"front": 5, "wrist": 5}


def test_frames_without_a_partner_are_counted_and_not_matched(tmp_path):
    frames = [entry for index, entry in enumerate(two_cameras(6)) if index != 5]  # wrist's third
    recording = only(write_bag(tmp_path / "bag", frames))
    assert [frames.stamps_ns[0] // MS - 1000 for frames in recording.frame_sets()] == [0, 100, 300, 400, 500]
    assert recording.details["frames_received"] == {"front": 6, "wrist": 5}


def test_cameras_of_depth_or_labels_are_left_out_unless_they_are_named(tmp_path):
    frames = [*two_cameras(2), *(("/front/depth/image_raw", 10**9 + index, numbered_image(7)) for index in range(2))]
    bag = write_bag(tmp_path / "bag", frames)
    assert only(bag).cameras == ("front", "wrist")
    recording = only(bag, cameras=["far=/front/depth/image_raw"])
    np.testing.assert_array_equal(next(recording.frame_sets()).images(), [numbered_image(7)])


def test_latest_pairs_each_frame_of_the_first_camera(tmp_path):
    frames = [*two_cameras(4), ("/front/image_raw", 10**9 + 350 * MS, numbered_image(50))]
    recording = only(write_bag(tmp_path / "bag", frames), sync_policy="latest")
    stamps = [tuple(stamp // MS - 1000 for stamp in frames.stamps_ns) for frames in recording.frame_sets()]
    assert stamps == [(100, 7), (200, 107), (300, 207), (350, 307)]


def test_cameras_are_named_by_topic_and_ordered_as_given(tmp_path):
    bag = write_bag(tmp_path / "bag", two_cameras(2))
    recording = only(bag, cameras=["hand=/wrist/image_raw", "front"])
    assert recording.cameras == ("hand", "front")
    np.testing.assert_array_equal(next(recording.frame_sets()).images(), [numbered_image(100), numbered_image(0)])
    with pytest.raises(
        SourceError,
        match="/side/image_raw is not in the bag; it has /front/image_raw, /wrist/image_raw.*--cameras NAME=TOPIC",
    ):
        only(bag, cameras=["side"])


def test_values_are_those_recorded_before_the_frame_set(tmp_path):
    values = [("/command", 10**9 + (index * 100 + 50) * MS, [index, 2 * index]) for index in range(4)]
    recording = only(write_bag(tmp_path / "bag", two_cameras(4), values=values), values=["action=/command"])
    sets = list(recording.frame_sets())
    assert [frames.values["action"].tolist() for frames in sets] == [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]
    assert recording.problems.count == 1 and "before the first value of action" in recording.problems.shown[0]
    with pytest.raises(SourceError, match="no /nothing for the value action; it has /command"):
        only(tmp_path / "bag", values=["action=/nothing"])
    (tmp_path / "more").mkdir()
    with pytest.raises(SourceError, match="say which of its fields"):
        only(tmp_path / "bag", values=["action=/front/image_raw"])


def test_damaged_messages_are_counted_and_the_rest_goes_on(tmp_path):
    frames = list(two_cameras(4))
    frames[2] = (*frames[2][:2], None)
    recording = only(write_bag(tmp_path / "bag", frames))
    sets = list(recording.frame_sets())
    assert len(sets) == 4
    with pytest.raises(ValueError, match="truncated"):
        sets[1].images()
    sets[2].images()


# --- images and videos


def test_a_folder_of_images_is_in_the_order_of_its_numbers(tmp_path):
    recording = only(write_images(tmp_path / "shots", 12), image_rate=4.0)
    sets = list(recording.frame_sets())
    assert recording.cameras == ("front",) and recording.name == "shots"
    for index, frames in enumerate(sets):
        assert frames.timestamp == index / 4 and frames.stamps_ns == (index * 250 * MS,)
        np.testing.assert_array_equal(frames.images()[0], numbered_image(index))


def test_a_folder_with_a_subfolder_per_camera(tmp_path):
    write_images(tmp_path / "rig/left", 3)
    write_images(tmp_path / "rig/right", 3)
    assert only(tmp_path / "rig").cameras == ("left", "right")
    recording = only(tmp_path / "rig", cameras=["a=right", "left"])
    assert recording.cameras == ("a", "left") and len(next(recording.frame_sets()).images()) == 2
    (tmp_path / "rig/right/image_1.png").unlink()
    with pytest.raises(SourceError, match="only one has image_1.png"):
        only(tmp_path / "rig")


def test_image_files_are_one_recording(tmp_path):
    write_images(tmp_path, 3)
    recording = open_recordings([tmp_path / "image_2.png", tmp_path / "image_0.png"], Selection())[0]
    assert [frames.images()[0][0, 0, 0] for frames in recording.frame_sets()] == [26, 0]


def test_a_video_gives_ffmpegs_frames_at_their_times(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 7)
    recording = only(path)
    sets = list(recording.frame_sets())
    assert recording.expected_sets() == 7 and recording.seconds == pytest.approx(0.7)
    np.testing.assert_allclose([frames.timestamp for frames in sets], np.arange(7) / 10)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal([frames.images()[0] for frames in sets], expected)


@pytest.mark.parametrize("codec, lost", [("mjpeg", 1), ("mpeg4", 4)])
def test_a_damaged_video_loses_the_damaged_frames_and_what_builds_on_them(tmp_path, codec, lost):
    path = write_video(tmp_path / "clip.avi", 40, codec=codec)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        container.seek(0)
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    start, size = packets[20]
    content[start + size // 3 : start + 2 * size // 3] = b"\xa5" * (2 * size // 3 - size // 3)
    path.write_bytes(content)
    whole = 0
    for frames in only(path).frame_sets():
        try:
            (image,) = frames.images()
        except ValueError:
            continue
        whole += 1
        assert any(np.array_equal(image, good) for good in expected), "what is given was not damaged"
    assert whole >= 40 - 3 * lost


def test_a_playlist_is_no_video(tmp_path):
    write_video(tmp_path / "clip.mp4", 2)
    playlist = tmp_path / "list.mp4"
    playlist.write_text("ffconcat version 1.0\nfile clip.mp4\n")
    with pytest.raises(SourceError, match="cannot be read as a video"):
        only(playlist)
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n")
    with pytest.raises(SourceError, match="cannot be read as a video"):
        only(playlist)


def test_huge_images_are_refused_before_they_are_decoded(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 2)
    with pytest.raises(SourceError, match="pixels"):
        only(path, max_image_pixels=100)


# --- selection


def test_every_and_rate(tmp_path):
    recording = only(write_images(tmp_path / "shots", 20), image_rate=30.0)

    def ordinals(**changes):
        return [frames.ordinal for frames in selected(recording, select(image_rate=30.0, **changes))]

    assert ordinals(every=6) == [0, 6, 12, 18]
    assert ordinals(rate=10.0) == [0, 3, 6, 9, 12, 15, 18]
    assert ordinals(rate=60.0) == list(range(20))
    assert len(ordinals(rate=7.0)) == int(19 / 30 * 7) + 1
    assert expected_sets(recording, select(rate=10.0)) == 7 and expected_sets(recording, select(every=6)) == 4


def test_sources_of_one_name_are_distinguished(tmp_path):
    for day in ("monday", "tuesday"):
        write_images(tmp_path / day / "run", 1)
    recordings = open_recordings([tmp_path / "monday/run", tmp_path / "tuesday/run"], Selection())
    assert [recording.name for recording in recordings] == ["monday/run", "tuesday/run"]
    with pytest.raises(SourceError, match="two runs"):
        open_recordings([tmp_path / "monday/run"] * 2, Selection())


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda path: None, "there is no"),
        (lambda path: path.write_text("x"), "is not an image, a recording or a folder of them"),
        (lambda path: path.mkdir(), "holds neither images nor a bag nor a LeRobot dataset"),
        (lambda path: (path.mkdir(), (path / "a.mp4").write_text("")), "name them themselves"),
    ],
)
def test_what_is_no_source_is_an_error(tmp_path, make, text):
    make(tmp_path / "thing")
    with pytest.raises(SourceError, match=text):
        open_recordings([tmp_path / "thing"], Selection())


def test_episodes_are_parsed():
    assert parse_episodes("0,2,5-7") == {0, 2, 5, 6, 7}
    for text in ("", "a", "3-1", "-2", "1-99999999"):
        with pytest.raises(ValueError, match="--episodes"):
            parse_episodes(text)


# --- LeRobot


def test_frames_are_those_of_lerobots_own_reader():
    with np.load(ROOT / "test/data/lerobot/expected.npz") as expected:
        found = {}
        for recording in open_recordings([DATASET], Selection()):
            for frames in recording.frame_sets():
                found[int(frames.values["index"])] = frames, frames.images(), recording
        assert len(found) == 25 + 18 + 31
        for row, index in enumerate(expected["index"]):
            frames, images, recording = found[int(index)]
            np.testing.assert_array_equal(images[0], expected["front"][row])
            np.testing.assert_array_equal(images[1], expected["wrist"][row])
            np.testing.assert_array_equal(frames.values["action"], expected["action"][row])
            assert frames.timestamp == pytest.approx(expected["timestamp"][row], abs=1e-9)
            assert frames.values["frame_index"] == expected["frame_index"][row]
            assert frames.values["episode_index"] == expected["episode_index"][row]
            assert recording.details["tasks"] == [expected["task"][row]]


def test_episodes_and_keys_of_a_dataset():
    recordings = open_recordings(
        [DATASET], select(episodes=frozenset({0, 2}), cameras=["hand=observation.images.wrist"])
    )
    assert [recording.name for recording in recordings] == [
        "moving_crops/episode_000000",
        "moving_crops/episode_000002",
    ]
    assert recordings[0].cameras == ("hand",) and next(recordings[1].frame_sets()).images()[0].shape == (96, 96, 3)
    assert not any("front" in str(file) for file in recordings[0].files), "only what is read counts"
    with pytest.raises(SourceError, match="no episode 7; it has 3"):
        open_recordings([DATASET], select(episodes=frozenset({7})))
    with pytest.raises(SourceError, match="no images top for the camera top"):
        open_recordings([DATASET], select(cameras=["top"]))


@pytest.mark.parametrize("where", [("info", "is_depth_map"), ("video_info", "video.is_depth_map")])
def test_depth_maps_of_a_dataset_are_left_out(tmp_path, where):
    """LeRobot 0.6 records them as videos of one channel, and says so in either of these places."""
    root = tmp_path / "rig"
    shutil.copytree(DATASET, root)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.wrist"][where[0]] = {where[1]: True}
    (root / "meta/info.json").write_text(json.dumps(info))
    assert {recording.cameras for recording in open_recordings([root], Selection())} == {("front",)}
    with pytest.raises(SourceError, match="observation.images.wrist holds depth maps"):
        open_recordings([root], select(cameras=["wrist"]))


def write_images_of_version_3(root, lengths):
    """As LeRobot's writer does it: one file, PNG in front of the numbers, a row group per episode."""
    import pyarrow
    import pyarrow.parquet as parquet

    features = {"observation.images.top": {"dtype": "image", "shape": [24, 36, 3]}}
    features |= {"timestamp": {"dtype": "float32", "shape": [1]}}
    features |= {name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index")}
    info = {
        "codebase_version": "v3.0",
        "fps": 5,
        "features": features,
        "data_path": "data/file-{file_index:03d}.parquet",
        "video_path": None,
    }
    for folder in ("meta/episodes", "data"):
        (root / folder).mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    episodes, groups, total = [], [], 0
    for episode, length in enumerate(lengths):
        place = {"data/chunk_index": 0, "data/file_index": 0}
        episodes.append({"episode_index": episode, "length": length, "tasks": ["push"], **place})
        rows = []
        for frame in range(length):
            cell = {"bytes": png(numbered_image(total)), "path": None}
            numbers = {"timestamp": frame / 5, "frame_index": frame, "episode_index": episode, "index": total}
            rows.append({"observation.images.top": cell, **numbers})
            total += 1
        groups.append(pyarrow.Table.from_pylist(rows))
    parquet.write_table(pyarrow.Table.from_pylist(episodes), root / "meta/episodes/file-000.parquet")
    with parquet.ParquetWriter(root / "data/file-000.parquet", groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)


def test_every_episode_of_a_dataset_of_images_is_found(tmp_path):
    """A row group's columns are counted in leaves, of which an image has two."""
    write_images_of_version_3(tmp_path / "pusher", (3, 2, 4))
    found = []
    for recording in open_recordings([tmp_path / "pusher"], Selection()):
        sets = list(recording.frame_sets())
        assert len(sets) == recording.expected_sets() and not recording.problems.count
        found += [(int(frames.values["index"]), frames.images()[0]) for frames in sets]
    assert [index for index, _ in found] == list(range(9))
    np.testing.assert_array_equal([image for _, image in found], [numbered_image(index) for index in range(9)])


def test_an_episode_with_missing_rows_is_reported(tmp_path):
    import pyarrow.parquet as parquet

    write_images_of_version_3(tmp_path / "pusher", (3, 2))
    file = tmp_path / "pusher/data/file-000.parquet"
    parquet.write_table(parquet.read_table(file).slice(0, 4), file)
    whole, cut = open_recordings([tmp_path / "pusher"], Selection())
    assert len(list(whole.frame_sets())) == 3 and whole.problems.count == 0
    assert len(list(cut.frame_sets())) == 1 and cut.problems.count == 1
    assert "has 1 of the 2 rows of episode 1" in cut.problems.shown[0]


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("timestamp", None, "row 0 of episode 0 .*there is no timestamp"),
        ("timestamp", [0.0, None, 0.4], "row 1 of episode 0"),
        ("timestamp", [0.0, 0.2, 1e300], "row 2 of episode 0 .*1e"),
        ("timestamp", [float("nan")] * 3, "row 0 of episode 0 .*nan"),
        ("index", [0, None, 2], "row 1 of episode 0 .*index is not int64"),
        ("index", ["a", "b", "c"], "row 0 of episode 0 .*index is not int64"),
        ("episode_index", None, "episode_index"),
    ],
)
def test_rows_that_are_not_as_info_says(tmp_path, name, values, says):
    import pyarrow
    import pyarrow.parquet as parquet

    write_images_of_version_3(tmp_path / "pusher", (3,))
    file = tmp_path / "pusher/data/file-000.parquet"
    table = parquet.read_table(file)
    place = table.schema.get_field_index(name)
    table = table.remove_column(place)
    parquet.write_table(table if values is None else table.append_column(name, pyarrow.array(values)), file)
    (recording,) = open_recordings([tmp_path / "pusher"], Selection())
    with pytest.raises(SourceError, match=f"file-000.parquet.*{says}"):
        list(recording.frame_sets())


def test_lists_of_episodes_that_no_dataset_has(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet as parquet

    write_images_of_version_3(tmp_path / "pusher", (3, 2, 4))
    monkeypatch.setattr(lerobot, "_MAX_EPISODES", 2)
    with pytest.raises(SourceError, match="more than 2 episodes"):
        open_recordings([tmp_path / "pusher"], Selection())
    file = tmp_path / "pusher/meta/episodes/file-000.parquet"
    for name, value in (("length", -3), ("length", 10**15), ("episode_index", -1)):
        episode = {"episode_index": 0, "length": 3, "tasks": ["push"], "data/chunk_index": 0, "data/file_index": 0}
        parquet.write_table(pyarrow.Table.from_pylist([episode | {name: value}]), file)
        with pytest.raises(SourceError, match=f"list of episodes cannot be read: {name} is {value}"):
            open_recordings([tmp_path / "pusher"], Selection())


def test_a_dataset_of_images_and_one_of_version_2(tmp_path):
    """Written here, as LeRobot lays them out: PNG in the rows of parquet files, one file per episode."""
    import pyarrow
    import pyarrow.parquet as parquet

    root = tmp_path / "pusher"
    (root / "meta").mkdir(parents=True)
    features = {
        "observation.images.top": {"dtype": "image", "shape": [24, 36, 3]},
        "action": {"dtype": "float32", "shape": [2]},
        "next.done": {"dtype": "bool", "shape": [1]},
        **{name: {"dtype": "int64", "shape": [1]} for name in ("episode_index", "frame_index", "index")},
        "timestamp": {"dtype": "float32", "shape": [1]},
    }
    info = {
        "codebase_version": "v2.1",
        "fps": 5,
        "chunks_size": 1000,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = [{"episode_index": index, "tasks": ["push"], "length": 3} for index in range(2)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for episode in range(2):
        rows = [
            {
                "observation.images.top": {"bytes": png(numbered_image(episode * 10 + frame)), "path": None},
                "action": [float(frame), 0.5],
                "next.done": frame == 2,
                "episode_index": episode,
                "frame_index": frame,
                "index": episode * 3 + frame,
                "timestamp": frame / 5,
            }
            for frame in range(3)
        ]
        file = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    first, second = open_recordings([root], Selection())
    sets = list(second.frame_sets())
    np.testing.assert_array_equal(
        [frames.images()[0] for frames in sets], [numbered_image(10 + frame) for frame in range(3)]
    )
    assert [bool(frames.values["next.done"]) for frames in sets] == [False, False, True]
    assert first.cameras == ("top",) and first.details["tasks"] == ["push"]
    info["data_path"] = "../{episode_index}.parquet"
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(SourceError, match="leads outside"):
        open_recordings([root], Selection())
    info["data_path"] = "{episode_index.__class__}.parquet"
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(SourceError):
        open_recordings([root], Selection())


def test_garbled_datasets_are_errors(tmp_path):
    """Whatever byte of its index is changed: an error of ours, or other frames, and no crash."""
    chance = random.Random(0)
    for name in ("meta/info.json", "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"):
        for attempt in range(8):
            root = tmp_path / f"{attempt}{name.replace('/', '_')}"
            shutil.copytree(DATASET, root)
            content = bytearray((root / name).read_bytes())
            for _ in range(4):
                content[chance.randrange(len(content))] = chance.randrange(256)
            (root / name).write_bytes(content)
            try:
                for recording in open_recordings([root], Selection()):
                    for frames in recording.frame_sets():
                        frames.images()
            except (ValueError, OSError):
                pass
