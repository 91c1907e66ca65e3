"""Rosbag2 recordings: every frame set that the node's synchronizer matches, none dropped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from vla_perception.images.decode import check_message_size, decode_image
from vla_perception.offline.recordings import (
    DamagedError,
    FrameError,
    FrameSet,
    Problems,
    Selection,
    SourceError,
    safe_name,
)
from vla_perception.sources.bags import Bag, BagCamera, BagError, BagMessage
from vla_perception.synchronizer import SetSynchronizer
from vla_perception.tokens.message import check_header

#: What `--values` takes of a message where no field is named.
_FIELDS = {
    "sensor_msgs/msg/JointState": "position",
    "std_msgs/msg/Float32MultiArray": "data",
    "std_msgs/msg/Float64MultiArray": "data",
    "std_msgs/msg/Float32": "data",
    "std_msgs/msg/Float64": "data",
}


class BagRecording:
    """One bag. Images come as the node gets them: messages with the fields of Image or CompressedImage.

    Attributes beside those of `Recording`:
        recorded_topics: all that the bag has.

    Raises:
        SourceError: no bag, no such cameras or values.
    """

    kind = "bag"

    def __init__(self, path: Path, selection: Selection) -> None:
        self._types = typestore()
        self._selection = selection
        self.source = str(path)
        self.path = path
        self.problems = Problems()
        try:
            with Bag(path) as bag:
                self._topics = _camera_topics(bag, selection)
                self._values = _value_topics(bag, selection)
                self._counts = {name: bag.topics[topic].messages for name, topic in self._topics.items()}
                self.seconds = bag.seconds
                recorded_topics = tuple(bag.topics)
        except BagError as error:
            raise DamagedError(str(error)) from error
        folder = path.parent if path.name == "metadata.yaml" else path
        stem = re.sub(r"\.(mcap|db3)(\.zstd)?$", "", folder.resolve().name, flags=re.IGNORECASE)
        self.name = safe_name(stem)
        self.files = sorted(entry for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else [path]
        self.cameras = tuple(self._topics)
        self.recorded_topics = recorded_topics
        self.details: dict[str, object] = {
            "topics": dict(self._topics),
            **(
                {"values": {name: f"{topic}:{field}" for name, (topic, field) in self._values.items()}}
                if self._values
                else {}
            ),
        }

    def expected_sets(self) -> int:
        if self._selection.sync_policy == "latest":
            return self._counts[self.cameras[0]]
        return min(self._counts.values())

    def frame_sets(self) -> Iterator[FrameSet]:
        """Frame sets in the order in which their last frame was recorded.

        Values are those of the last message that was recorded before that frame; a frame set before the first of them
        is left out.
        """
        selection = self._selection
        synchronizer = SetSynchronizer(
            self.cameras, selection.sync_policy, selection.sync_slop_sec, selection.max_age_sec
        )
        cameras = {topic: name for name, topic in self._topics.items()}
        fields = {
            topic: [(name, field) for name, (of, field) in self._values.items() if of == topic]
            for topic, _ in self._values.values()
        }
        values: dict[str, np.ndarray] = {}
        ordinal, first_ns = 0, None
        self.problems.clear()
        with Bag(self.path) as bag:
            for recorded in bag.messages({*cameras, *fields}):
                if recorded.topic in fields:
                    self._take_values(recorded, fields[recorded.topic], values)
                camera = cameras.get(recorded.topic)
                if camera is None or not self._add(synchronizer, camera, recorded):
                    continue
                matched = synchronizer.take()
                assert matched is not None, "that is what completing a set means"
                synchronizer.encoded(matched)
                if len(values) < len(self._values):
                    missing = ", ".join(name for name in self._values if name not in values)
                    self.problems.add(f"a frame set at {recorded.time_ns} ns comes before the first value of {missing}")
                    continue
                stamps = tuple(frame.stamp_ns for frame in matched)
                first_ns = stamps[0] if first_ns is None else first_ns
                yield FrameSet(
                    ordinal,
                    recorded.time_ns,
                    (stamps[0] - first_ns) / 1e9,
                    stamps,
                    tuple(_header(frame.image).frame_id for frame in matched),
                    partial(_images, matched, selection.max_image_pixels),
                    dict(values),
                )
                ordinal += 1
        self.details["frames_received"] = {name: counts.received for name, counts in synchronizer.counts.items()}
        matched_counts = {name: counts.encoded for name, counts in synchronizer.counts.items()}
        self.details["frames_matched"] = matched_counts

    def _add(self, synchronizer: SetSynchronizer, camera: str, recorded: BagMessage) -> bool:
        try:
            message = self._message(recorded)
            check_header(message.header)
            check_message_size(message, self._selection.max_image_pixels)
        except ValueError as error:  # FrameError and ImageDecodeError are such
            synchronizer.reject(camera)
            self.problems.add(f"{recorded.topic} at {recorded.time_ns} ns: {error}")
            return False
        stamp = message.header.stamp
        return synchronizer.add(camera, stamp.sec * 10**9 + stamp.nanosec, message)

    def _take_values(self, recorded: BagMessage, fields: list[tuple[str, str]], values: dict[str, np.ndarray]) -> None:
        for name, field in fields:
            try:
                found = _numbers(self._message(recorded), field)
                if name in values and values[name].shape != found.shape:
                    raise FrameError(f"it has {len(found)} numbers, those before had {len(values[name])}")
                values[name] = found
            except ValueError as error:
                self.problems.add(f"{name}: {recorded.topic} at {recorded.time_ns} ns: {error}")

    def _message(self, recorded: BagMessage) -> Any:
        try:
            return self._types.deserialize_cdr(recorded.cdr, recorded.type)
        except Exception as error:  # noqa: BLE001 - the library raises whatever garbled bytes lead it to
            raise FrameError(f"it is not a {recorded.type}: {type(error).__name__}: {error}") from error


@cache
def typestore() -> Any:
    """The definitions of ROS 2's message types."""
    try:
        from rosbags.typesys import Stores, get_typestore
    except ImportError as error:
        raise SourceError(f"{error}: messages of bags are read with rosbags: pip install '.[offline]'") from error
    return get_typestore(Stores.ROS2_JAZZY)


def _header(message: Any) -> Any:
    return message.header


def _images(matched: Any, max_pixels: int) -> list[np.ndarray]:
    return [decode_image(frame.image, max_pixels) for frame in matched]


def _camera_topics(bag: Bag, selection: Selection) -> dict[str, str]:
    """Camera → topic, in the order of the views: raw images where a camera has both, unless its topic is named."""
    if not selection.cameras:
        return {name: _recorded(camera, "") for name, camera in bag.cameras().items()}
    bases = {name: camera.topic for name, camera in _named_cameras(bag).items()}
    try:
        cameras = bag.cameras({name: where or bases.get(name, "") for name, where in selection.cameras})
    except BagError as error:
        raise SourceError(f"{error} (--cameras NAME=TOPIC)") from error
    return {name: _recorded(cameras[name], where) for name, where in selection.cameras}


def _named_cameras(bag: Bag) -> dict[str, BagCamera]:
    try:
        return bag.cameras()
    except BagError:  # every topic has to be named
        return {}


def _recorded(camera: BagCamera, where: str) -> str:
    topics = camera.topics
    named = next((topic for topic in topics.values() if topic == f"/{where.strip('/')}"), "")
    return named or topics.get("raw") or topics["compressed"]


def _value_topics(bag: Bag, selection: Selection) -> dict[str, tuple[str, str]]:
    """Name → (topic, field)."""
    found = {}
    for name, where in selection.values:
        topic, _, field = where.partition(":")
        topic = f"/{topic.lstrip('/')}"
        if topic not in bag.topics:
            raise SourceError(f"{bag.path} has no {topic} for the value {name}; it has {', '.join(bag.topics)}")
        field = field or _FIELDS.get(bag.topics[topic].type, "")
        if not field:
            raise SourceError(
                f"{topic} holds {bag.topics[topic].type}: say which of its fields {name} is, as {name}={topic}:FIELD[.FIELD]"
            )
        found[name] = (topic, field)
    return found


def _numbers(message: Any, field: str) -> np.ndarray:
    """float64 [n]: what a message's field holds; the numbers of its parts in their order where it is a message itself."""
    value = message
    for part in field.split("."):
        if part.startswith("_") or not hasattr(value, part):
            raise FrameError(f"it has no field {field}")
        value = getattr(value, part)
    return np.array(list(_flat(value)), np.float64)


def _flat(value: Any) -> Iterator[float]:
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield from value.ravel().tolist()
    elif isinstance(value, (bool, int, float, np.number)):
        yield float(value)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            if name != "__msgtype__" and name != "header":
                yield from _flat(getattr(value, name))
    else:
        raise FrameError(f"a {type(value).__name__} is not a number")
