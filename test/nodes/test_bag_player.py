"""The node bag_player in a process of its own, over DDS: bytes, spacing, loop, clock, restamping, and its end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rosbags")
pytest.importorskip("rclpy")

from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from ros_harness import RosContext, RosProcess, free_domain, wait_until
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage

from vla_perception.nodes.bag_player import Pace, message_class
from vla_perception.sources.bags import Bag, header_stamp_ns, with_header_stamp
from vla_perception.tokens import FORMAT

pytestmark = pytest.mark.ros

PLAYER = "vla_perception.nodes.bag_player"
IMAGE, INFO = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/CameraInfo"
TYPES = get_typestore(Stores.ROS2_JAZZY)
START_NS = 1_700_000_000_000_000_000
FRAMES, SPACING_NS = 12, 50_000_000


@pytest.fixture(params=[StoragePlugin.MCAP, StoragePlugin.SQLITE3], ids=["mcap", "sqlite"])
def storage(request) -> StoragePlugin:
    return request.param


def image_cdr(index: int, format: str = "jpeg") -> bytes:
    random = np.random.default_rng(index)
    header = TYPES.types["std_msgs/msg/Header"](
        TYPES.types["builtin_interfaces/msg/Time"](*divmod(START_NS + index * SPACING_NS - 7, 10**9)), "eye"
    )
    message = TYPES.types[IMAGE](header, format, random.integers(0, 256, 50_001).astype(np.uint8))
    return bytes(TYPES.serialize_cdr(message, IMAGE))


def camera_info(index: int) -> bytes:
    stamp = TYPES.types["builtin_interfaces/msg/Time"](*divmod(START_NS + index * SPACING_NS - 7, 10**9))
    region = TYPES.types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    header = TYPES.types["std_msgs/msg/Header"](stamp, "eye")
    message = TYPES.types[INFO](
        header, 2, 3, "plumb_bob", np.zeros(5), np.zeros(9), np.zeros(9), np.zeros(12), 0, 0, region
    )
    return bytes(TYPES.serialize_cdr(message, INFO))


def make_bag(path: Path, storage: StoragePlugin = StoragePlugin.MCAP) -> Path:
    """An image topic with camera_info, a topic of tokens and one of a type that no package here defines."""
    TYPES.register(get_types_from_msg("int32 value", "absent_msgs/msg/Thing"))
    with Writer(path, version=9, storage_plugin=storage) as bag:
        image = bag.add_connection("/eye/image_raw/compressed", IMAGE, typestore=TYPES)
        info = bag.add_connection("/eye/camera_info", INFO, typestore=TYPES)
        tokens = bag.add_connection("/tokens", IMAGE, typestore=TYPES)
        thing = bag.add_connection("/thing", "absent_msgs/msg/Thing", typestore=TYPES)
        for index in range(FRAMES):
            time_ns = START_NS + index * SPACING_NS
            bag.write(image, time_ns, image_cdr(index))
            bag.write(info, time_ns, camera_info(index))
            bag.write(tokens, time_ns, image_cdr(index, FORMAT))
            bag.write(thing, time_ns, b"\0\1\0\0\1\0\0\0")
    return path


def filled(cdr: bytes) -> bytes:
    """A message as a subscriber to serialised messages gets it: RTPS fills payloads up to multiples of 4 bytes."""
    return cdr + bytes(-len(cdr) % 4)


class Listener:
    """Subscriptions to serialised messages; `received[topic]` is a list of (monotonic seconds, bytes)."""

    def __init__(self, domain: int, topics: dict[str, type]):
        self._ros = RosContext(domain)
        self.node = self._ros.node("listener")
        self.executor = SingleThreadedExecutor(context=self._ros.context)
        self.executor.add_node(self.node)
        self.received: dict[str, list[tuple[float, bytes]]] = {topic: [] for topic in topics}
        qos = QoSProfile(depth=200, reliability=ReliabilityPolicy.RELIABLE)
        for topic, kind in topics.items():
            self.node.create_subscription(
                kind, topic, lambda cdr, seen=self.received[topic]: seen.append((time.monotonic(), cdr)), qos, raw=True
            )

    def bytes(self, topic: str) -> list[bytes]:
        """What came, as DDS hands it over: filled up to a multiple of four bytes (see `filled`)."""
        return [cdr for _, cdr in self.received[topic]]

    def spin_until(self, condition, timeout: float, what: str) -> None:
        def met() -> object:
            self.executor.spin_once(timeout_sec=0.02)
            return condition()

        wait_until(met, timeout, what)

    def close(self) -> None:
        self.executor.shutdown()
        self._ros.close()


@pytest.fixture
def domain() -> int:
    return free_domain()


@pytest.fixture
def listener(domain) -> Iterator[Listener]:
    listening = Listener(
        domain,
        {
            "/eye/image_raw/compressed": CompressedImage,
            "/eye/camera_info": CameraInfo,
            "/tokens": CompressedImage,
            "/clock": Clock,
        },
    )
    yield listening
    listening.close()


def player(domain: int, bag: Path, **parameters: object) -> RosProcess:
    command = ["-m", PLAYER, "--ros-args", "-p", f"bag:={bag}"]
    for name, value in parameters.items():
        command += ["-p", f"{name}:={str(value).lower() if isinstance(value, bool) else value}"]
    return RosProcess(command, domain)


def stamps(messages: list[bytes]) -> list[int]:
    return [header_stamp_ns(cdr) for cdr in messages]


def test_bytes_and_spacing_as_recorded(tmp_path, storage, domain, listener):
    bag = make_bag(tmp_path / "bag", storage)
    with player(domain, bag, wait_for_subscribers=1) as process:
        listener.spin_until(lambda: process.process.poll() is not None, 20, "the player's end")
        assert process.wait() == 0, process.output
        assert f"Done: {2 * FRAMES} messages on 2 topics" in process.output
    listener.spin_until(lambda: len(listener.bytes("/eye/camera_info")) == FRAMES, 5, "the last message")
    assert listener.bytes("/eye/image_raw/compressed") == [filled(image_cdr(index)) for index in range(FRAMES)]
    assert listener.bytes("/eye/camera_info") == [filled(camera_info(index)) for index in range(FRAMES)]
    assert "Left out, because their encoding is not a camera's: /tokens" in process.output
    assert listener.bytes("/tokens") == []  # they look like images, but are none
    moments = np.array([moment for moment, _ in listener.received["/eye/image_raw/compressed"]])
    # Nothing is early (beyond what the first one's delivery took), and on the whole nothing is late.
    late = moments - moments[0] - np.arange(FRAMES) * SPACING_NS / 1e9
    assert late.min() > -0.1 and np.median(late) < 0.1


def test_rate_offset_topics_and_remapping(tmp_path, domain, listener):
    bag = make_bag(tmp_path / "bag")
    command = ["-m", PLAYER, "--ros-args", "-p", f"bag:={bag}", "-p", "topics:=['tokens', '/tokens']", "-p", "rate:=2"]
    command += ["-p", "start_offset_sec:=0.3", "-p", "wait_for_subscribers:=1"]
    command += ["-r", "/tokens:=/eye/image_raw/compressed"]
    with RosProcess(command, domain) as process:
        listener.spin_until(lambda: process.process.poll() is not None, 20, "the player's end")
        assert process.wait() == 0, process.output
    listener.spin_until(lambda: len(listener.bytes("/eye/image_raw/compressed")) == 6, 5, "the last message")
    assert listener.bytes("/eye/image_raw/compressed") == [
        filled(image_cdr(index, FORMAT)) for index in range(6, FRAMES)
    ]
    moments = [moment for moment, _ in listener.received["/eye/image_raw/compressed"]]
    assert 0.1 < moments[-1] - moments[0] < 0.24  # 0.25 s of the bag at twice the speed


def test_loop_and_clock(tmp_path, domain, listener):
    def clock() -> np.ndarray:
        return np.array([header_stamp_ns(cdr) for cdr in listener.bytes("/clock")])  # it begins as a header does

    def went_back(moments: np.ndarray) -> int:
        return int((np.diff(moments) < 0).sum())

    bag = make_bag(tmp_path / "bag")
    with player(domain, bag, loop=True, clock=True, rate=4, wait_for_subscribers=1) as process:
        # Subscribers to /clock are not waited for, so its first rounds may be missing.
        listener.spin_until(lambda: went_back(clock()) >= 2 and process.output.count("Starting") >= 2, 20, "two rounds")
        assert process.stop(signal.SIGINT) == 0, process.output
        assert "Traceback" not in process.output
    expected = [filled(image_cdr(index)) for index in range(FRAMES)]
    assert listener.bytes("/eye/image_raw/compressed")[: 2 * FRAMES] == expected * 2
    assert clock().min() >= START_NS and clock().max() <= START_NS + FRAMES * SPACING_NS
    rounds = len(listener.bytes("/eye/image_raw/compressed")) / FRAMES
    assert went_back(clock()) <= rounds  # once per round, and forward otherwise


def test_restamp_and_stamp_log(tmp_path, domain, listener):
    bag, log = make_bag(tmp_path / "bag"), tmp_path / "stamps.jsonl"
    before = time.time_ns()
    with player(domain, bag, restamp=True, stamp_log=log, rate=2.0, wait_for_subscribers=1) as process:
        listener.spin_until(lambda: process.process.poll() is not None, 20, "the player's end")
        assert process.wait() == 0, process.output
    listener.spin_until(lambda: len(listener.bytes("/eye/camera_info")) == FRAMES, 5, "the last message")
    images, infos = listener.bytes("/eye/image_raw/compressed"), listener.bytes("/eye/camera_info")
    given = stamps(images)
    assert before < given[0] and given[-1] < time.time_ns() and sorted(set(given)) == given
    assert stamps(infos) == given  # an image and its camera_info belong together by their stamp
    assert [with_header_stamp(cdr, 0) for cdr in images] == [
        with_header_stamp(filled(image_cdr(index)), 0) for index in range(FRAMES)
    ]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["stamp_ns"] for line in lines if line["topic"] == "/eye/image_raw/compressed"] == given
    monotonic = [line["monotonic_ns"] for line in lines]
    assert len(lines) == 2 * FRAMES and sorted(monotonic) == monotonic


def test_types_without_a_package_are_left_out(tmp_path, domain):
    bag = make_bag(tmp_path / "bag")
    with player(domain, bag, topics="['/thing','/tokens']", rate=20.0) as process:
        assert process.wait() == 0, process.output
        assert process.output.count("/thing (absent_msgs/msg/Thing)") == 1
        assert f"Done: {FRAMES} messages on 1 topics" in process.output
    with player(domain, bag, topics="['/thing']") as process:
        assert process.wait() == 1
        assert "nothing to play" in process.output and "Traceback" not in process.output


def test_mistakes_end_with_a_sentence(tmp_path, domain):
    bag = make_bag(tmp_path / "bag")
    cases = [
        (tmp_path / "nowhere", {}, "there is no such file or folder"),
        (bag, {"topics": "['/nose']"}, "no topic /nose"),
        (bag, {"rate": 1e-300}, "rate must be at least 0.001, got 1e-300"),
        (bag, {"queue_depth": 2**31}, "queue_depth must be from 1 to 1000000, got 2147483648"),
        (bag, {"start_offset_sec": 1e300}, "only 0.6 s long"),
        (bag, {"max_gap_sec": -1}, "max_gap_sec must be at least 0, got -1"),
        (bag, {"start_offset_sec": ".inf"}, "start_offset_sec must be a number, got inf"),
        (bag, {"start_offset_sec": 60}, "only 0.6 s long"),
        (bag, {"clock": True, "restamp": True}, "exclude each other"),
        (bag, {"wait_for_subscribers": 1, "wait_timeout_sec": 0.2}, "Is the subscriber running"),
    ]
    with ExitStack() as stack:  # beside each other: it is starting Python that takes time
        players = [stack.enter_context(player(domain, path, **parameters)) for path, parameters, _ in cases]
        for process, (_, parameters, sentence) in zip(players, cases, strict=True):
            assert process.wait(40) == 1, (parameters, process.output)
            assert sentence in process.output and "Traceback" not in process.output, process.output


def test_pace():
    """Recorded spacing over the rate; silences are cut down, and a time that goes back is due at once."""
    pace = Pace(2.0, 10.0)
    times = [0, START_NS, START_NS + 10**9, START_NS + 3601 * 10**9, START_NS, START_NS + 10**9, 2**64 - 1]
    assert [pace.due(ns) for ns in times] == [0.0, 5.0, 5.5, 10.5, 10.5, 11.0, 16.0]
    assert pace.elapsed_sec == 16.0 and pace.gap_sec > 1e10
    unbounded = Pace(1.0, 0.0)
    assert [unbounded.due(ns) for ns in (5 * 10**9, 65 * 10**9, 0)] == [0.0, 60.0, 60.0]


@pytest.mark.parametrize(
    "name",
    [
        "antigravity/msg/X",
        "this/msg/Zen",
        "json/msg/JSONDecoder",
        "test/msg/X",
        "../x/msg/X",
        "sensor_msgs/msg/__doc__",
        "sensor_msgs/msg/image",
        "os.path/msg/X",
        "",
        "/",
        "X/msg/X",
    ],
)
def test_a_bag_makes_the_player_import_nothing_but_message_packages(name, tmp_path, monkeypatch):
    (tmp_path / "evil_msgs" / "msg").mkdir(parents=True)
    (tmp_path / "evil_msgs" / "__init__.py").write_text("raise SystemExit('run')")
    (tmp_path / "evil_msgs" / "msg" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    assert message_class(name) is None and message_class("evil_msgs/msg/X") is None
    assert not {"antigravity", "this", "evil_msgs"} & (set(sys.modules) - before)
    assert message_class("sensor_msgs/msg/Image").__name__ == "Image"


def test_what_a_bag_may_hold_and_cannot_stop_the_player(tmp_path, domain, listener, monkeypatch):
    """A first message at time zero, an hour's silence, a time that /clock cannot hold, a topic with no name for ROS, a
    message shorter than a header; beside it, a player whose Python lacks a library."""
    with Writer(tmp_path / "bag", version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        image = bag.add_connection("/eye/image_raw/compressed", IMAGE, typestore=TYPES)
        odd = bag.add_connection("/no name!", IMAGE, typestore=TYPES)
        times = [0, START_NS, START_NS + SPACING_NS, START_NS + 3600 * 10**9, 2**62]
        for index, time_ns in enumerate(times):
            bag.write(image, time_ns, image_cdr(index))
            bag.write(odd, time_ns, image_cdr(index))
        bag.write(image, 2**62 + 1, b"\0\1\0\0short")
    (tmp_path / "mcap.py").write_text("raise ModuleNotFoundError(\"No module named 'mcap'\")")
    with ExitStack() as stack:
        process = stack.enter_context(
            player(
                domain,
                tmp_path / "bag",
                clock=True,
                max_gap_sec=0.3,
                wait_for_subscribers=1,
                stamp_log=tmp_path / "log",
            )
        )
        with monkeypatch.context() as changed:
            changed.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
            without = stack.enter_context(player(domain, tmp_path / "bag"))
        listener.spin_until(lambda: process.process.poll() is not None, 40, "the player's end")
        assert process.wait() == 0, process.output
        assert "Done: 6 messages on 1 topics" in process.output and "Traceback" not in process.output
        assert process.output.count("cut down to 0.3 s (max_gap_sec)") == 3
        assert "Left out, for its name: /no name!" in process.output
        assert "/clock cannot hold 4611686018 s" in process.output
        assert without.wait() == 1
        assert without.output.strip().count("\n") == 0 and "pip install mcap" in without.output, without.output
    listener.spin_until(lambda: len(listener.bytes("/eye/image_raw/compressed")) >= 5, 5, "the last image")
    assert listener.bytes("/eye/image_raw/compressed")[:5] == [filled(image_cdr(index)) for index in range(5)]


def test_ends_cleanly_while_playing_and_while_waiting(tmp_path, domain):
    bag = make_bag(tmp_path / "bag")
    with ExitStack() as stack:
        cases = [
            (stack.enter_context(player(domain, bag, **parameters)), moment, number)
            for parameters, moment in (({"rate": 0.1}, "Playing"), ({"wait_for_subscribers": 1}, "Waiting for 1"))
            for number in (signal.SIGINT, signal.SIGTERM)
        ]
        for process, moment, number in cases:
            process.wait_for(moment)
            assert process.stop(number) == 0, process.output
            assert "Traceback" not in process.output and "Done" not in process.output


def test_the_sample_bag_is_found(domain):
    sample = Path(__file__).parents[2] / "examples" / "sample_bag"
    with Bag(sample) as bag:
        count = sum(topic.messages for topic in bag.topics.values())
    with player(domain, sample, rate=20) as process:
        assert process.wait() == 0, process.output
        assert f"Done: {count} messages on 4 topics" in process.output
