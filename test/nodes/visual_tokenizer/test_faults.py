"""Faults, each with its real cause, at the node in a process of its own: it goes on, or ends with a message."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy")
pytest.importorskip("timm")

from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from lifecycle_msgs.msg import Transition  # noqa: E402
from lifecycle_msgs.srv import ChangeState, GetState  # noqa: E402
from ros_harness import (  # noqa: E402
    COUNTS,
    ROOT,
    RosContext,
    RosProcess,
    Status,
    answer_of,
    frame_counts,
    statuses_of,
    wait_until,
)
from sensor_msgs.msg import Image  # noqa: E402

from vla_perception.byte_array import byte_array  # noqa: E402
from vla_perception.tokens import TokenSubscriber  # noqa: E402

pytestmark = pytest.mark.ros

NODE = [
    "-m",
    "vla_perception.nodes.visual_tokenizer",
    "--ros-args",
    "-p",
    "warn_age_sec:=1.0",
    "-p",
    "error_age_sec:=2.0",
]
AUTOSTART = [*NODE, "-p", "autostart:=true", "-p", "max_rate_hz:=10"]


class Robot:
    """What is around a node: a policy, and somebody who looks at diagnostics."""

    def __init__(self, ros: RosContext) -> None:
        self.ros = ros
        self.statuses: list[dict[str, Status]] = []
        self.clock = 0
        self.watcher = ros.node("watcher")
        self.watcher.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 20)
        self.images = self.watcher.create_publisher(Image, "front/image_raw", 10)
        ros.spin(self.watcher)
        self.policy = TokenSubscriber(ros.node("policy"))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        found = statuses_of(message)
        self.clock = message.header.stamp.sec  # the node's
        if "camera front" in found:
            counts = frame_counts(found["camera front"].values)
            assert counts["received"] == sum(counts[key] for key in COUNTS), counts
        self.statuses.append(found)

    def status(self, name: str, level: int, text: str = "", timeout: float = 30.0) -> None:
        """Waits for a status from now on of this level, with this text."""
        begin = len(self.statuses)

        def found():
            for statuses in self.statuses[begin:]:
                status = statuses.get(name)
                if status is not None and status.level == level and text in status.message:
                    return status
            return None

        try:
            wait_until(found, timeout, f"{name} at level {level} {text!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}; the last: {self.statuses[-1:]}") from None

    def tokens_again(self, timeout: float = 30.0):
        """Waits for tokens of images that are taken from now on."""
        now = time.time_ns()
        return wait_until(
            lambda: (tokens := self.policy.latest) is not None and tokens.stamp_ns > now and tokens,
            timeout,
            "new tokens",
        )

    def send(self, pixels: np.ndarray, encoding: str) -> int:
        """Publishes an image; returns its stamp."""
        stamp = time.time_ns()
        step = pixels.shape[1] * (pixels.shape[2] if pixels.ndim == 3 else 1)
        message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding, step=step)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
        message.data = byte_array(pixels)
        self.images.publish(message)
        return stamp


@pytest.fixture(scope="module")
def robot():
    with RosContext() as ros:
        robot = Robot(ros)
        try:
            yield robot
        finally:
            robot.policy.close()


def camera_in(ros: RosContext) -> RosProcess:
    return RosProcess([str(ROOT / "test" / "support" / "fake_camera.py"), "front"], ros.domain)


def camera(robot: Robot) -> RosProcess:
    return camera_in(robot.ros)


@pytest.fixture(scope="module")
def node(robot):
    with RosProcess(AUTOSTART, robot.ros.domain) as process:
        process.wait_for("ready after", 120)
        yield process


def test_a_camera_that_is_killed_and_one_that_is_paused(robot, node):
    with camera(robot) as killed:
        robot.tokens_again(60)
        robot.status("camera front", 0)
        killed.process.kill()
        robot.status("camera front", 1)
        robot.status("camera front", 2)  # a supervisor may restart it
    with camera(robot) as paused:
        robot.tokens_again()
        robot.status("camera front", 0)
        paused.process.send_signal(signal.SIGSTOP)
        robot.status("camera front", 2, "has the camera stopped?")
        paused.process.send_signal(signal.SIGCONT)
        robot.tokens_again()
        robot.status("camera front", 0)


def test_a_camera_that_changes_size_and_encoding_while_it_runs(robot, node):
    with camera(robot):  # node and policy know each other from here on
        robot.tokens_again(60)
    random = np.random.default_rng(0)
    for encoding, shape in (
        ("rgb8", (96, 128, 3)),
        ("mono8", (200, 300)),
        ("bayer_rggb8", (64, 64)),
        ("rgb8", (8, 8, 3)),
    ):
        stamp = robot.send(random.integers(0, 256, shape, np.uint8), encoding)
        wait_until(lambda at=stamp: robot.policy.latest.stamp_ns == at, 30, f"tokens of {encoding} {shape}")
        view = robot.policy.latest.views[0]
        assert (view.height, view.width) == shape[:2]


def test_a_policy_that_is_stopped_costs_the_others_nothing(robot, node):
    policy = RosProcess([str(ROOT / "examples" / "minimal_policy.py")], robot.ros.domain)
    with camera(robot), policy:
        policy.wait_for("ms old", 60)
        policy.process.send_signal(signal.SIGSTOP)
        before = robot.policy.received
        wait_until(lambda: robot.policy.received > before + 15, 30, "tokens at the other policy")

        def ages() -> list[int]:
            return [int(age) for age in re.findall(r"(\d+) ms old", policy.output)]

        printed = len(ages())
        policy.process.send_signal(signal.SIGCONT)
        wait_until(lambda: len(ages()) > printed + 1, 30, "tokens after SIGCONT")
        assert ages()[printed + 1] < 5000  # the latest, not those of the pause one after the other
        policy.process.kill()
        robot.tokens_again()


#: Takes a second for what the node does ten times a second.
SLOW_POLICY = """
import time
import rclpy
from vla_perception.tokens import TokenSubscriber

rclpy.init()
with TokenSubscriber(rclpy.create_node("slow_policy")) as subscriber:
    while True:
        print("took", subscriber.wait(timeout_sec=30.0).sequence, flush=True)
        time.sleep(1.0)
"""


def test_a_policy_that_is_slow_takes_the_latest_and_costs_the_others_nothing(robot, node):
    with camera(robot), RosProcess(["-c", SLOW_POLICY], robot.ros.domain) as policy:
        policy.wait_for("took", 60)
        lost, received = robot.policy.lost, robot.policy.received

        def taken() -> list[int]:
            return [int(sequence) for sequence in re.findall(r"took (\d+)\n", policy.output)]

        wait_until(lambda: len(taken()) > 4, 60, "tokens at the slow policy")
        first, *rest = taken()
        assert rest[-1] - first > 2 * len(rest) and rest == sorted({*rest} - {first}), (first, rest)
        wait_until(lambda: robot.policy.received > received + 15, 30, "tokens at the other policy")
        assert robot.policy.lost == lost


@contextlib.contextmanager
def limited(process: RosProcess, what: int, value: int):
    """A lower limit of a process that runs."""
    before = resource.prlimit(process.process.pid, what)
    resource.prlimit(process.process.pid, what, (value, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            resource.prlimit(process.process.pid, what, before)


def test_no_file_descriptor_is_left(robot, node):
    """Cameras and policies that are known go on; one more is served when there are descriptors again."""
    pid = node.process.pid
    policy = [str(ROOT / "examples" / "minimal_policy.py")]
    with camera(robot):
        robot.tokens_again()
        taken = set(map(int, os.listdir(f"/proc/{pid}/fd")))
        lowest_free = next(number for number in itertools.count() if number not in taken)
        with limited(node, resource.RLIMIT_NOFILE, lowest_free):
            with RosProcess(policy, robot.ros.domain) as late:
                wait_until(lambda: robot.watcher.count_subscribers("tokens") > 1 or late.output, 90, "one more policy")
                robot.tokens_again()
                robot.status("camera front", 0)
        with RosProcess(policy, robot.ros.domain) as later:  # Jazzy's Fast DDS does not come back to the first one
            later.wait_for("ms old", 90)
        robot.tokens_again()


@pytest.fixture(scope="module")
def successor(robot, node):
    """The next process of a node that was killed, as `respawn` and systemd start it."""
    with camera(robot):
        robot.tokens_again(60)
    assert node.process.poll() is None and "Traceback" not in node.output, node.output  # after all of the above
    node.process.kill()
    node.wait()
    with RosProcess(AUTOSTART, robot.ros.domain) as process:
        process.wait_for("ready after", 120)
        yield process


def test_a_killed_node_is_started_again(robot, successor):
    """Policies go on with the next process."""
    with camera(robot):
        robot.tokens_again()
        assert robot.policy.restarts == 1
        robot.status("camera front", 0)


def ended_with_a_message(process: RosProcess) -> bool:
    """Whether it has ended, and then not as if nothing had been wrong, and not silently."""
    if process.process.poll() is None:
        return False
    assert process.wait() != 0
    messages = (
        "Fatal Python error",
        "MemoryError",
        "bad_alloc",
        "[FATAL]",
        "so that a supervisor can start another one",
    )
    assert any(message in process.output for message in messages), process.output
    return True


def virtual_memory(process: RosProcess) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.process.pid}/status").read_text().splitlines())
    return int(status["VmSize"].split()[0]) * 1024


# Processes of their own


class Lifecycle:
    """A lifecycle manager's requests, without waiting for an answer that a process which ends may not give."""

    def __init__(self, robot: Robot, process: RosProcess) -> None:
        self._process = process
        self._state = robot.watcher.create_client(GetState, "visual_tokenizer/get_state")
        self._change = robot.watcher.create_client(ChangeState, "visual_tokenizer/change_state")

    def ask(self, transition: int) -> None:
        assert self._change.wait_for_service(60)
        self._change.call_async(ChangeState.Request(transition=Transition(id=transition)))

    def reach(self, transition: int, state: str) -> bool:
        """Whether the node reached the state, asked once; false if its process has ended."""
        self.ask(transition)

        def ended() -> bool:
            return self._process.process.poll() is not None

        def reached() -> bool:
            with contextlib.suppress(AssertionError):  # no answer: it may have ended meanwhile
                return self.state() == state
            return False

        wait_until(lambda: ended() or reached(), 120, f"{state}; its log: {self._process.output}")
        return not ended()

    def state(self) -> str:
        return answer_of(self._state, GetState.Request(), 10).current_state.label


@pytest.mark.parametrize("mib", [30, 600])
def test_no_memory_to_load_the_model(mib):
    """Where not even a thread begins, *configure* fails, and works when there is memory again. Where PyTorch's import
    breaks off, which a process cannot repeat, it ends. Which of both it is depends on what Fast DDS has allocated."""
    with RosContext() as ros, RosProcess(NODE, ros.domain) as process:
        robot = Robot(ros)
        lifecycle = Lifecycle(robot, process)
        try:
            process.wait_for("waits to be configured", 60)
            assert lifecycle.state() == "unconfigured"  # matched, before that takes memory that is not there
            with limited(process, resource.RLIMIT_AS, virtual_memory(process) + (mib << 20)):
                lifecycle.ask(Transition.TRANSITION_CONFIGURE)
                wait_until(lambda: "failed" in process.output or process.process.poll() is not None, 60, "no memory")
                if "configure failed" in process.output:
                    robot.status("model", 2, "because configure failed: ")
            if "configure failed" not in process.output:
                wait_until(lambda: process.process.poll() is not None, 20, f"the end: {process.output}")
                assert ended_with_a_message(process)
                return
            assert lifecycle.reach(Transition.TRANSITION_CONFIGURE, "inactive"), process.output
        finally:
            robot.policy.close()


@pytest.mark.parametrize("mib", [0, 60])
def test_no_memory_while_it_runs(mib):
    """Frames for which there is none are lost, or counted as errors, and the node goes on when there is some again; or its
    process ends with a message. It never stands still. (With 100 MiB all ten images, of 18 each, become tokens.)"""
    with RosContext() as ros, RosProcess(AUTOSTART, ros.domain) as process:
        robot = Robot(ros)

        def has_ended() -> bool:
            return process.process.poll() is not None

        try:
            process.wait_for("ready after", 120)
            with camera_in(ros):
                robot.tokens_again(60)
            pixels = np.zeros((2000, 3000, 3), np.uint8)
            received = robot.policy.received
            with limited(process, resource.RLIMIT_AS, virtual_memory(process) + (mib << 20)):
                for _ in range(10):
                    robot.send(pixels, "rgb8")
                    heard = len(robot.statuses)
                    wait_until(lambda at=heard: len(robot.statuses) > at or has_ended(), 60, "diagnostics, or the end")
                tokens = robot.policy.received - received
            if has_ended():
                assert ended_with_a_message(process)
                return
            assert tokens < 10, "there was memory for all of them: this shows nothing"
            with camera_in(ros):
                robot.tokens_again(60)
        finally:
            robot.policy.close()


def clock_library() -> str:
    """libfaketime's library for programs with threads: the other one reads its file in all of them at once, and ends
    the process now and then."""
    return next(map(str, sorted(Path("/usr/lib").rglob("libfaketimeMT.so.1"))), "")


UNSHARE = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
#: A full folder: 64 KiB, and nowhere else anything is written.
FULL = (
    'mount -t tmpfs -o size=64k tmpfs "$0" && mkdir "$0/log" && { head -c 1m /dev/zero >"$0/filler"; true; } 2>/dev/null && '
    'exec "$@"'
)


def test_the_disk_is_full_and_the_clock_is_set(tmp_path):
    """Logs and caches cannot be written; and NTP sets the clock forward and back, as on a robot without a battery."""
    offset = tmp_path / "offset"
    offset.write_text("+0s")
    disk = tmp_path / "disk"
    disk.mkdir()
    full = [*UNSHARE, "sh", "-c", FULL, str(disk)]
    if not shutil.which("unshare") or subprocess.run([*full, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace: root, or unprivileged user namespaces")
    environment = {"ROS_LOG_DIR": str(disk / "log"), "HOME": str(disk), "XDG_CACHE_HOME": str(disk)}
    if clock_library():
        environment |= {
            "LD_PRELOAD": clock_library(),
            "FAKETIME_TIMESTAMP_FILE": str(offset),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # In shared memory Fast DDS compares the clocks of processes, which on a robot are the same one.
            "FASTDDS_BUILTIN_TRANSPORTS": "UDPv4",
        }
    command = ["-c", f"import os; os.execvp('unshare', {[*full, sys.executable, *AUTOSTART]!r})"]
    with RosContext() as ros, RosProcess(command, ros.domain, environment) as process, camera_in(ros):
        robot = Robot(ros)
        try:
            process.wait_for("ready after", 120)
            robot.tokens_again(60)
            robot.status("camera front", 0)
            for seconds in (3600, -3600) if clock_library() else ():
                (tmp_path / "next").write_text(f"{seconds:+d}s")
                (tmp_path / "next").rename(offset)  # which is never read half written
                wait_until(lambda wanted=seconds: abs(robot.clock - time.time() - wanted) < 60, 30, "its clock is set")
                robot.tokens_again()
                robot.status("camera front", 0)
            assert robot.policy.restarts == 0
            assert process.stop(signal.SIGTERM) == 0 and "Traceback" not in process.output, process.output
        finally:
            robot.policy.close()
    if not clock_library():
        pytest.skip("the clock was not set: apt install libfaketime")
