"""Recordings: bags, datasets of LeRobot, calibration files."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import shutil
import sqlite3
from itertools import islice
from pathlib import Path

import calibration
import offline_runs
import recorded
from engine import Target, scratch
from mutations import change_json, change_lines

from vla_perception.offline.recordings import Selection, SourceError, open_recordings
from vla_perception.sources.bags import (
    CAMERA_INFO,
    COMPRESSED_IMAGE,
    IMAGE,
    Bag,
    BagError,
    compressed_format,
    header_stamp_ns,
    image_encoding,
    with_header_stamp,
)

#: Messages of a bag that are looked at, and frame sets of a recording.
_MESSAGES, _FRAME_SETS = 50, 3


def _play(path: Path) -> None:
    """What the player and the command do with a bag."""
    with Bag(path) as bag:
        assert bag.seconds >= 0
        cameras = bag.camera_topics()
        for message in islice(bag.messages(), _MESSAGES):
            _look_into(message.type, message.cdr)
        if cameras:
            bag.cameras()


def _look_into(kind: str, cdr: bytes) -> None:
    with contextlib.suppress(ValueError):  # too short for a header
        header_stamp_ns(cdr)
        assert len(with_header_stamp(cdr, 5)) == len(cdr)
    if kind == IMAGE:
        image_encoding(cdr)
    if kind == COMPRESSED_IMAGE:
        compressed_format(cdr)


def _frames():
    return [("/front/image_raw", 10**9 + index * 10**8, recorded.numbered_image(index, 6, 8)) for index in range(3)]


def _written(plugin: str) -> Path:
    folder = scratch() / f"seed_{plugin}"
    if not folder.exists():
        recorded.write_bag(folder, _frames(), plugin=plugin, values=[("/command", 10**9, [1.0])])
    return folder


def mcap(data: bytes) -> None:
    path = scratch() / "x.mcap"
    path.write_bytes(data)
    _play(path)


def mcap_seeds() -> list[bytes]:
    """By rosbags, and by the reference library: with and without chunks, index, checksums, compression."""
    from mcap.writer import CompressionType, IndexType, Writer

    seeds = [next(_written("mcap").glob("*.mcap")).read_bytes()]
    with Bag(_written("mcap")) as bag:
        messages = list(bag.messages(["/front/image_raw"]))
    for options in (
        {"compression": CompressionType.NONE, "enable_crcs": False},
        {"compression": CompressionType.ZSTD, "enable_crcs": False},
        {"compression": CompressionType.LZ4},
        {"use_chunking": False, "enable_crcs": False},
        {"compression": CompressionType.NONE, "index_types": IndexType.NONE, "use_statistics": False},
    ):
        stream = io.BytesIO()
        writer = Writer(stream, **options)
        writer.start(profile="ros2", library="test")
        channel = writer.register_channel("/front/image_raw", "cdr", writer.register_schema(IMAGE, "ros2msg", b""))
        for message in messages:
            writer.add_message(channel, message.time_ns, message.cdr, message.time_ns)
        writer.finish()
        seeds.append(stream.getvalue())
    return seeds


def sqlite(data: bytes) -> None:
    path = scratch() / "x.db3"
    for rest in scratch().glob("x.db3-*"):
        rest.unlink()
    path.write_bytes(data)
    _play(path)


def sqlite_seeds() -> list[bytes]:
    path = next(_written("sqlite3").glob("*.db3"))
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA page_size = 512")  # smaller pages: more of a mutation hits what is read
    connection.execute("VACUUM")
    connection.close()
    return [path.read_bytes()]


def metadata(data: bytes) -> None:
    folder = scratch() / "folder"
    if not folder.exists():
        shutil.copytree(_written("mcap"), folder)
    (folder / "metadata.yaml").write_bytes(data)
    _play(folder)


@functools.cache
def metadata_seeds() -> list[bytes]:
    return [(_written(plugin) / "metadata.yaml").read_bytes().replace(b"seed_sqlite3.db3", b"seed_mcap.mcap")
            for plugin in ("mcap", "sqlite3")]  # fmt: skip


def cdr(data: bytes) -> None:
    for kind in (IMAGE, COMPRESSED_IMAGE, CAMERA_INFO):
        _look_into(kind, data)


def cdr_seeds() -> list[bytes]:
    with Bag(_written("mcap")) as bag:
        return [message.cdr for message in bag.messages()]


def offline(data: bytes) -> None:
    """A bag whose messages are read, matched and decoded for `vla-perception tokenize`."""
    path = scratch() / "offline.mcap"
    path.write_bytes(data)
    for recording in open_recordings([path], Selection()):
        for frames in islice(recording.frame_sets(), _FRAME_SETS):
            with contextlib.suppress(ValueError):  # of a damaged image: its frame set is left out
                assert all(image.shape[2] == 3 for image in frames.images())


def _dataset() -> Path:
    folder = scratch() / "dataset"
    if not folder.exists():
        shutil.copytree(offline_runs.DATASET, folder)
    return folder


def dataset_info(data: bytes) -> None:
    """LeRobot's meta/info.json."""
    (_dataset() / "meta" / "info.json").write_bytes(data)
    for recording in islice(open_recordings([_dataset()], Selection()), 1):
        for frames in islice(recording.frame_sets(), 1):
            with contextlib.suppress(ValueError):
                frames.images()


def dataset_info_seeds() -> list[bytes]:
    return [(offline_runs.DATASET / "meta" / "info.json").read_bytes()]


def camera_calibration(data: bytes) -> None:
    from vla_perception.images.camera_info import read_calibration

    path = scratch() / "camera.yaml"
    path.write_bytes(data)
    info = read_calibration(str(path))
    assert len(info.k) == 9 and len(info.p) == 12 and info.k[0] > 0


def calibration_seeds() -> list[bytes]:
    return [calibration.CALIBRATION.encode()]


_ERRORS = (BagError,)
TARGETS = [
    Target("bag_mcap", mcap, mcap_seeds, _ERRORS, max_bytes=8192),
    Target("bag_sqlite", sqlite, sqlite_seeds, _ERRORS),
    Target("bag_metadata", metadata, metadata_seeds, _ERRORS, (change_lines,), max_bytes=8192),
    Target("bag_message", cdr, cdr_seeds, (), max_bytes=1024),
    Target("bag_offline", offline, mcap_seeds, (BagError, SourceError), max_bytes=8192, cost=2),
    Target("dataset_info", dataset_info, dataset_info_seeds, (SourceError,), (change_json,), cost=20),
]
if importlib.util.find_spec("sensor_msgs"):
    from vla_perception.images.camera_info import CalibrationError

    TARGETS.append(
        Target(
            "calibration", camera_calibration, calibration_seeds, (CalibrationError,), (change_lines,), max_bytes=4096
        )
    )
