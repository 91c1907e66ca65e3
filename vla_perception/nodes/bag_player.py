"""Node `bag_player`: replays a bag's messages, as the CDR bytes that were recorded, at the recorded spacing.

Reads MCAP and SQLite bags in Python, so neither rosbag2 nor the message definitions are needed, only the
Python packages of the message types that are played. When the bag is over and every reliable subscriber has
acknowledged, the process ends with 0.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vla_perception.nodes import executables

    executables.begin()  # before what takes long to import

import importlib
import importlib.util
import json
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rclpy.duration import Duration
from rclpy.exceptions import NameValidationException
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock

from vla_perception.nodes.node_runner import Stop, run_node
from vla_perception.nodes.parameters import NodeParameters, parameter
from vla_perception.printable import printable
from vla_perception.sources.bags import (
    COMPRESSED_IMAGE,
    IMAGE,
    Bag,
    BagMessage,
    header_stamp_ns,
    with_header_stamp,
)

CLOCK_HZ = 50.0

# Headers whose new stamp is remembered, for the messages that share them; they follow each other closely.
REMEMBERED_STAMPS = 256

# Bytes of a message with an empty frame_id: encapsulation, stamp, the string's length.
SHORTEST_HEADER = 16

# Seconds of silence that are logged where max_gap_sec cuts none.
GAP_SEC = 5.0

# Silences that are logged one by one; further ones are counted.
LOGGED_GAPS = 5

# Messages per topic: a day of them at 10 Hz. DDS takes no number above 2³¹.
MAX_DEPTH = 1_000_000

# Seconds that subscribers get at the end to acknowledge what is still on its way.
ACKNOWLEDGE_SEC = 10.0


@dataclass(frozen=True)
class BagPlayerParameters:
    """The node's parameters (docs/nodes_bags.md)."""

    bag: str = parameter("", "Folder with metadata.yaml, .mcap or .db3 file to play.")
    topics: tuple[str, ...] = parameter(
        (), "Topics to play; empty: what cameras published (images and camera_info, no tokens)."
    )
    rate: float = parameter(1.0, "Speed: 2.0 plays twice as fast.", low=0.001)
    loop: bool = parameter(False, "Start over at the end instead of ending.")
    start_offset_sec: float = parameter(0.0, "Seconds of the bag to leave out at its beginning.", low=0.0)
    max_gap_sec: float = parameter(
        5.0, "Longer silences in the bag are cut down to this, in its seconds; 0: none is.", low=0.0
    )
    clock: bool = parameter(False, "Publish the bag's time on /clock, for nodes with use_sim_time.")
    wait_for_subscribers: int = parameter(0, "Wait for this many subscriptions to every image topic before starting.")
    wait_timeout_sec: float = parameter(
        30.0,
        "Give up waiting for subscribers after this time.",
        low=0.0,
        check=lambda seconds: "" if seconds else "must be above 0",
    )
    restamp: bool = parameter(False, "Set header stamps to the time of publishing (wall clock).")
    stamp_log: str = parameter("", "File for a JSON line per message: topic, stamp, monotonic clock.")
    queue_depth: int = parameter(
        100, "Messages per topic that are kept for subscribers that lag.", low=1, high=MAX_DEPTH
    )


class BagPlayer(Node):
    """Plays one bag; see docs/nodes_bags.md for parameters.

    Raises BagError or ValueError (and the process ends with that sentence) if the bag cannot be read or a
    parameter makes no sense.
    """

    def __init__(self, stop: Stop):
        super().__init__("bag_player")
        self._end_process = stop
        self._given = given = NodeParameters(self, BagPlayerParameters, "bag_player").values
        if given.clock and given.restamp:
            raise ValueError("clock and restamp exclude each other: the one is the bag's time, the other the wall's")
        self._bag = Bag(given.bag)
        self._topics = self._playable(
            list(dict.fromkeys(f"/{t.lstrip('/')}" for t in given.topics)) or self._camera_topics()
        )
        offset = given.start_offset_sec
        if offset > self._bag.seconds:
            raise ValueError(f"start_offset_sec is {offset:g}, but {given.bag} is only {self._bag.seconds:.1f} s long")
        # Without an offset nothing is filtered by time: the times that a bag says of itself may be wrong.
        self._start_ns = self._bag.start_ns + round(offset * 1e9) if offset else None
        self._stamp_log: TextIO | None = (
            Path(os.path.expanduser(given.stamp_log)).open("w") if given.stamp_log else None
        )

        qos = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=given.queue_depth,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.VOLATILE,
        )
        self._outlets: dict[str, Outlet] = {}
        for topic in self._topics:
            try:
                self._outlets[topic] = self._outlet(topic, qos)
            except (NameValidationException, RuntimeError) as error:  # RuntimeError: of DDS, where it is too long
                self.get_logger().warning(
                    f"Left out, for its name: {printable(topic[:300])} ({printable(' '.join(str(error).split())[:300])})"
                )
        self._topics = list(self._outlets)
        if not self._topics:
            raise ValueError(f"nothing to play: {given.bag} has no topic with a name that can be published")
        self._clock_publisher = self.create_publisher(Clock, "/clock", 10) if given.clock else None
        self._clock_due = 0.0
        self._clock_reported = False
        self._gaps = 0
        self._ending = threading.Event()
        self._player = threading.Thread(target=self._run, name="player", daemon=True)
        self._player.start()

    def close(self) -> None:
        """Ends the replay, wherever it is."""
        self._ending.set()
        self._player.join()
        self._bag.close()
        if self._stamp_log is not None:
            self._stamp_log.close()

    # What is played

    def _camera_topics(self) -> list[str]:
        cameras = self._bag.camera_topics()
        images = [topic for topic in self._bag.topics.values() if topic.type in (IMAGE, COMPRESSED_IMAGE)]
        others = [topic.name for topic in images if topic.messages and topic.name not in cameras]
        if others:
            self.get_logger().info(
                f"Left out, because their encoding is not a camera's: {printable(', '.join(others))} (`topics` plays them)"
            )
        return cameras

    def _playable(self, topics: list[str]) -> list[str]:
        """The topics whose message type has a Python package here; the others are named in one warning."""
        if not topics:
            raise ValueError(
                f"{self._bag.path} has no camera topic to play; it has {', '.join(self._bag.topics) or 'no topics'}"
                ": name some in `topics`"
            )
        self._bag.messages(topics)  # raises if one is absent
        classes = {topic: message_class(self._bag.topics[topic].type) for topic in topics}
        self._types = {topic: found for topic, found in classes.items() if found is not None}
        unknown = {topic: self._bag.topics[topic].type for topic in topics if topic not in self._types}
        playable = [topic for topic in topics if topic not in unknown]
        listing = ", ".join(f"{topic} ({kind})" for topic, kind in unknown.items())
        if not playable:
            raise ValueError(f"nothing to play: no Python package for the message type of {listing}")
        if unknown:
            self.get_logger().warning(
                f"Left out, for want of their message type's Python package: {printable(listing)}"
            )
        return playable

    def _outlet(self, topic: str, qos: QoSProfile) -> Outlet:
        fields = list(self._types[topic].get_fields_and_field_types().items())
        has_header = bool(fields) and fields[0] == ("header", "std_msgs/Header")
        return Outlet(self.create_publisher(self._types[topic], topic, qos), has_header)

    # The replay, in a separate thread

    def _run(self) -> None:
        try:
            code = self._play()
        except Exception as error:
            self.get_logger().error(f"Replay stopped: {printable(str(error))}")
            code = 1
        if not self._ending.is_set():
            self._end_process(code)

    def _play(self) -> int:
        if not self._wait_for_subscribers():
            return 1
        self.get_logger().info(
            f"Playing {self._bag.path} ({self._bag.seconds:.1f} s, rate {self._given.rate:g}): {', '.join(self._topics)}"
        )
        played, rounds, began = 0, 0, time.monotonic()
        start = began
        while not self._ending.is_set():
            count, start = self._play_once(start)
            played += count
            rounds += 1
            if count == 0 and not self._ending.is_set():
                after = " after start_offset_sec" if self._start_ns is not None else ""
                self.get_logger().error(f"Nothing to play: the bag holds no message of these topics{after}")
                return 1
            if not self._given.loop:
                break
            if not self._ending.is_set():
                self.get_logger().info(f"Starting over: {rounds} time{'s' * (rounds > 1)} through so far")
        if self._ending.is_set():
            return 0
        waiting = self._unacknowledged()
        if waiting:
            self.get_logger().warning(
                f"Not everything was acknowledged within {ACKNOWLEDGE_SEC:g} s by the subscribers to "
                + ", ".join(waiting)
            )
        self.get_logger().info(
            f"Done: {played} messages on {len(self._topics)} topics in {time.monotonic() - began:.1f} s"
        )
        return 0

    def _wait_for_subscribers(self) -> bool:
        """False if they did not come in time (said in the log) or the process ends."""
        # camera_info seldom has a separate subscriber, so the player waits for those of the images.
        images = set(self._bag.image_topics())
        awaited = [topic for topic in self._topics if topic in images] or self._topics
        deadline = time.monotonic() + self._given.wait_timeout_sec
        said = False
        while True:
            counts = {topic: self._outlets[topic].publisher.get_subscription_count() for topic in awaited}
            missing = [
                f"{topic} ({count})" for topic, count in counts.items() if count < self._given.wait_for_subscribers
            ]
            if not missing:
                return True
            if time.monotonic() > deadline:
                self.get_logger().error(
                    f"Waited {self._given.wait_timeout_sec:g} s for {self._given.wait_for_subscribers} subscription(s) on each topic, but there are "
                    f"fewer on {', '.join(missing)}. Is the subscriber running, with the same ROS_DOMAIN_ID and "
                    "the same topic names?"
                )
                return False
            if not said:
                self.get_logger().info(
                    f"Waiting for {self._given.wait_for_subscribers} subscription(s) on {', '.join(missing)}"
                )
                said = True
            if self._ending.wait(0.02):
                return False

    def _play_once(self, start: float) -> tuple[int, float]:
        """Plays the bag once, its first message at `start` (monotonic seconds).

        Returns the number of messages played, and when the next round is to start: after the last message by
        the mean spacing of the busiest topic, so that no two frames fall together.
        """
        stamps: dict[bytes, int] = {}
        counts: dict[str, int] = {}
        pace = Pace(self._given.rate, self._given.max_gap_sec)
        for message in self._bag.messages(self._topics, start_ns=self._start_ns):
            due = start + pace.due(message.time_ns)
            if pace.gap_sec > (self._given.max_gap_sec or GAP_SEC):
                self._log_gap(pace.gap_sec)
            if not self._sleep_until(due, message.time_ns):
                break
            self._publish(message, stamps)
            counts[message.topic] = counts.get(message.topic, 0) + 1
        if not counts:
            return 0, start
        length = pace.elapsed_sec
        gap = length / max(1, max(counts.values()) - 1) or 1.0 / self._given.rate
        return sum(counts.values()), start + length + gap

    def _log_gap(self, gap_sec: float) -> None:
        self._gaps += 1
        if self._gaps > LOGGED_GAPS:
            return
        cut = (
            f", cut down to {self._given.max_gap_sec:g} s (max_gap_sec)"
            if self._given.max_gap_sec
            else " (max_gap_sec is 0)"
        )
        last = "; further ones are not logged" if self._gaps == LOGGED_GAPS else ""
        self.get_logger().warning(f"Nothing was recorded for {gap_sec:.1f} s{cut}{last}")

    def _sleep_until(self, due: float, time_ns: int) -> bool:
        """Waits until `due` (monotonic seconds), when the bag's time is `time_ns`. False if the process ends."""
        while not self._ending.is_set():
            now = time.monotonic()
            if self._clock_publisher is not None and (now >= self._clock_due or now >= due):
                self._publish_clock(
                    self._clock_publisher, time_ns - round(max(0.0, due - now) * self._given.rate * 1e9)
                )
                self._clock_due = now + 1 / CLOCK_HZ
            if now >= due:
                return True
            wait = due - now if self._clock_publisher is None else min(due, self._clock_due) - now
            self._ending.wait(min(wait, threading.TIMEOUT_MAX))
        return False

    def _publish_clock(self, publisher: Publisher, bag_ns: int) -> None:
        seconds, nanoseconds = divmod(bag_ns, 1_000_000_000)
        if -(2**31) <= seconds < 2**31:
            message = Clock()
            message.clock.sec, message.clock.nanosec = seconds, nanoseconds
            publisher.publish(message)
        elif not self._clock_reported:
            self._clock_reported = True
            self.get_logger().warning(f"/clock cannot hold {seconds} s, when a message was recorded: it stands still")

    def _publish(self, message: BagMessage, stamps: dict[bytes, int]) -> None:
        outlet, cdr, stamp_ns = self._outlets[message.topic], message.cdr, None
        if outlet.has_header and len(cdr) >= SHORTEST_HEADER:  # a shorter one is played as it is
            if self._given.restamp:
                # An image and its camera_info have the same header (stamp and frame), and keep one stamp between
                # them: programs that join the two do so by equal stamps.
                header = cdr[4 : 16 + int.from_bytes(cdr[12:16], "little" if cdr[1] & 1 else "big")]
                stamp_ns = stamps.get(header)
                if stamp_ns is None or outlet.last_stamp_ns >= stamp_ns:
                    # Never the same stamp twice on a topic, even if the wall clock is set back.
                    stamp_ns = stamps[header] = max(time.time_ns(), outlet.last_stamp_ns + 1)
                    if len(stamps) > REMEMBERED_STAMPS:
                        del stamps[next(iter(stamps))]
                outlet.last_stamp_ns = stamp_ns
                cdr = with_header_stamp(cdr, stamp_ns)
            elif self._stamp_log is not None:
                stamp_ns = header_stamp_ns(cdr)
        monotonic_ns = time.monotonic_ns()
        outlet.publisher.publish(cdr)
        if self._stamp_log is not None:
            line = {"topic": outlet.publisher.topic_name, "stamp_ns": stamp_ns, "monotonic_ns": monotonic_ns}
            self._stamp_log.write(json.dumps(line) + "\n")

    def _unacknowledged(self) -> Iterable[str]:
        """Waits until every reliable subscriber has everything; the topics where one has not in the end."""
        deadline = time.monotonic() + ACKNOWLEDGE_SEC
        waiting = list(self._topics)
        while waiting and time.monotonic() < deadline and not self._ending.is_set():
            waiting = [
                topic
                for topic in waiting
                if not self._outlets[topic].publisher.wait_for_all_acked(Duration(seconds=0.1))
            ]
        return waiting


class Outlet:
    """A topic's publisher, whether its messages begin with a std_msgs/Header, and the latest stamp given to one."""

    def __init__(self, publisher: Publisher, has_header: bool):
        self.publisher = publisher
        self.has_header = has_header
        self.last_stamp_ns = 0


class Pace:
    """When messages are due: spaced as they were recorded, by the rate, with silences of at most `max_gap_sec`.

    Attributes: elapsed_sec (from the first message to the last, as played), gap_sec (recorded, before the last one).
    """

    def __init__(self, rate: float, max_gap_sec: float):
        self._rate, self._max_gap_sec = rate, max_gap_sec
        self._last_ns: int | None = None
        self.elapsed_sec = 0.0
        self.gap_sec = 0.0

    def due(self, time_ns: int) -> float:
        """Seconds after the first message at which that of `time_ns` is due. A time that goes back is due at once."""
        self.gap_sec = 0.0 if self._last_ns is None else max(0, time_ns - self._last_ns) / 1e9
        self._last_ns = time_ns
        gap = min(self.gap_sec, self._max_gap_sec) if self._max_gap_sec else self.gap_sec
        self.elapsed_sec += gap / self._rate
        return self.elapsed_sec


def message_class(name: str) -> Any | None:
    """The Python class of a message type ("sensor_msgs/msg/Image"), None if its package is not installed.

    The name comes from a file, so only what rosidl has generated is imported, and no other module of that name.
    """
    package, _, rest = name.partition("/")
    kind = rest.rpartition("/")[2]
    if not (re.fullmatch(r"[a-z]\w*", package, re.ASCII) and re.fullmatch(r"[A-Z]\w*", kind, re.ASCII)):
        return None
    try:
        spec = importlib.util.find_spec(package)  # finds it without running it
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not any(next(Path(folder).glob(f"{package}_s__rosidl_typesupport_*"), None) for folder in folders):
            return None
        return getattr(importlib.import_module(f"{package}.msg"), kind)
    except (ImportError, AttributeError, ValueError):
        return None


def main(args: list[str] | None = None) -> int:
    """Entry point of the executable `bag_player`."""
    return run_node(BagPlayer, args)


if __name__ == "__main__":
    executables.leave(main())
