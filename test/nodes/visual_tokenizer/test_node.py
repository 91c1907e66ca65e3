"""The node `visual_tokenizer` in a process of its own, over DDS."""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import os
import re
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus  # noqa: E402
from lifecycle_msgs.msg import Transition  # noqa: E402
from lifecycle_msgs.srv import ChangeState, GetState  # noqa: E402
from rcl_interfaces.srv import GetParameters, SetParameters  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from ros_harness import (  # noqa: E402
    COUNTS,
    RosContext,
    RosProcess,
    answer_of,
    destroy,
    frame_counts,
    free_domain,
    in_domain,
    ros_environment,
    statuses_of,
    wait_until,
)
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402

from vla_perception.synchronizer import HISTORY  # noqa: E402
from vla_perception.tokens import VisualTokens, from_message  # noqa: E402
from vla_perception.tokens.encode_service import FINAL  # noqa: E402

pytestmark = pytest.mark.ros

NODE = ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args"]
DEFAULTS = {
    "model": "tiny-random",
    "encoders": [""],
    "image_size": [0],
    "token_strategy": "patch",
    "pool": 1,
    "image_transforms": [""],
    "cameras": ["front"],
    "image_transport": "raw",
    "max_image_pixels": 64_000_000,
    "token_dtype": "float32",
    "publish_features": False,
    "sync_policy": "approximate",
    "sync_slop_sec": 0.05,
    "max_age_sec": 0.5,
    "max_rate_hz": 0.0,
    "trigger": "continuous",
}
TOPICS = {"front": "front/image_raw", "top": "top/image_raw", "wrist": "arm/image"}  # the wrist's is remapped


def image(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def image_message(pixels: np.ndarray, stamp_ns: int, frame_id: str = "camera") -> Image:
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding="rgb8", step=pixels.shape[1] * 3)
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    message.header.frame_id = frame_id
    message.data = array.array("B", pixels.tobytes())
    return message


class Robot:
    """What is around the node: cameras, a policy, a reader of diagnostics, a lifecycle manager."""

    def __init__(self, domain: int, process: RosProcess) -> None:
        self.process = process
        self.tokens: list[VisualTokens] = []
        self.headers: list = []
        self.diagnostics: list[dict[str, dict[str, str]]] = []
        self.stamp_ns = 10**18
        self._ros = RosContext(domain)
        self.node = self._ros.node("robot")
        self._publishers: dict[tuple, object] = {}
        self._tokens = None
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._ros.spin(self.node)

    def close(self) -> None:
        self._ros.close()

    def _on_tokens(self, message: CompressedImage) -> None:
        self.headers.append(message.header)
        self.tokens.append(from_message(message))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        found = {name: status.values | {"message": status.message} for name, status in statuses_of(message).items()}
        for name, values in found.items():
            if name.startswith("camera "):
                counts = frame_counts(values)
                assert counts["received"] == sum(counts[key] for key in COUNTS), counts
        self.diagnostics.append(found)

    @functools.cache  # noqa: B019 (one robot per module)
    def _client(self, kind, name):
        client = self.node.create_client(kind, name)
        assert client.wait_for_service(90.0), name
        return client

    def call_async(self, kind, name: str, **fields):
        return self._client(kind, name).call_async(kind.Request(**fields))

    def call(self, kind, name: str, *, timeout: float = 90.0, **fields):
        if kind in (GetState, GetParameters, SetParameters):
            return answer_of(self._client(kind, name), kind.Request(**fields), timeout)
        future = self.call_async(kind, name, **fields)
        wait_until(future.done, timeout, f"answer of {name}")
        return future.result()

    # Lifecycle and parameters

    @property
    def state(self) -> str:
        return self.call(GetState, "visual_tokenizer/get_state").current_state.label

    def change(self, transition: int, timeout: float = 90.0) -> bool:
        request = Transition(id=transition)
        return self.call(ChangeState, "visual_tokenizer/change_state", transition=request, timeout=timeout).success

    def set(self, **values) -> str:
        """Sets parameters; the first reason of a refusal, or nothing."""
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        results = self.call(SetParameters, "visual_tokenizer/set_parameters", parameters=parameters).results
        return next((result.reason or "refused" for result in results if not result.successful), "")

    def unconfigure(self) -> None:
        assert self.process.process.poll() is None, self.process.output
        # An earlier test may have failed during a transition: those behind it need not.
        wait_until(lambda: self.state in ("unconfigured", "inactive", "active"), 90, "the end of a transition")
        if self.state == "active":
            assert self.change(Transition.TRANSITION_DEACTIVATE)
        if self.state == "inactive":
            assert self.change(Transition.TRANSITION_CLEANUP)
        assert self.state == "unconfigured"

    def start(self, *, subscribe: bool = True, **values) -> None:
        """The node active with these parameters, matched with the cameras and, if wanted, with the policy."""
        self.unconfigure()
        if subscribe:
            self.subscribe()
        else:
            self.unsubscribe()
        assert not self.set(**(DEFAULTS | values))
        assert self.change(Transition.TRANSITION_CONFIGURE), self.process.output
        assert self.change(Transition.TRANSITION_ACTIVATE)
        assert self.state == "active"
        self.tokens.clear()
        self.headers.clear()

    def subscribe(self) -> None:
        if self._tokens is not None:  # since an earlier test: the node knows it
            return
        self._tokens = self.node.create_subscription(CompressedImage, "tokens", self._on_tokens, 20)
        wait_until(lambda: self.node.count_publishers("tokens"), 10, "the node's tokens topic")
        time.sleep(0.5)  # until the node knows of this subscription, too: nothing says when

    def unsubscribe(self) -> None:
        if self._tokens is not None:
            destroy(self.node, self._tokens)
            self._tokens = None
            time.sleep(0.5)

    # Cameras

    def publisher(self, camera: str, kind=Image, reliability=ReliabilityPolicy.RELIABLE):
        key = (camera, kind, reliability)
        if key not in self._publishers:
            topic = TOPICS[camera] + ("/compressed" if kind is CompressedImage else "")
            qos = QoSProfile(depth=20, reliability=reliability)
            self._publishers[key] = self.node.create_publisher(kind, topic, qos)
        return self._publishers[key]

    def forget(self, camera: str, kind=Image, reliability=ReliabilityPolicy.RELIABLE) -> None:
        if (publisher := self._publishers.pop((camera, kind, reliability), None)) is not None:
            destroy(self.node, publisher)

    def send(self, camera: str, message, **which) -> None:
        publisher = self.publisher(camera, type(message), **which)
        wait_until(publisher.get_subscription_count, 15, f"the node subscribes to {camera}")
        publisher.publish(message)

    def send_until_tokens(self, camera: str, seed: int, **which) -> None:
        """Sends images until one has become tokens: a best-effort subscription may lose some."""
        begun, end = len(self.tokens), time.monotonic() + 30.0
        while len(self.tokens) == begun:
            assert time.monotonic() < end, f"no tokens of {camera} within 30 s"
            self.send(camera, image_message(image(seed), self.next_stamp()), **which)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: len(self.tokens) > begun, 2.0, "tokens")

    def next_stamp(self, step_ms: int = 200) -> int:
        self.stamp_ns += step_ms * 10**6
        return self.stamp_ns

    def wait_for_tokens(self, count: int, timeout: float = 30.0) -> list[VisualTokens]:
        wait_until(lambda: len(self.tokens) >= count, timeout, f"{count} token messages, {len(self.tokens)} came")
        return self.tokens

    def diagnosis_of(self, camera: str) -> str:
        """What the last diagnostics say of a camera; nothing if they are from before it was subscribed to."""
        return self.diagnostics[-1].get(f"camera {camera}", {}).get("message", "")

    def counts(self, camera: str, condition=lambda values: True, timeout: float = 20.0) -> dict[str, int]:
        """The camera's counters as soon as a diagnostics message from now on meets the condition."""
        begun = len(self.diagnostics)

        def find():
            for found in self.diagnostics[begun:]:
                numbers = frame_counts(found.get(f"camera {camera}", {}))
                if numbers and condition(numbers):
                    return numbers
            return None

        try:
            return wait_until(find, timeout, "diagnostics")
        except AssertionError as error:
            raise AssertionError(f"{error}; the last: {self.diagnostics[-1]}") from None


@pytest.fixture(scope="module")
def robot():
    domain = free_domain()
    command = [*NODE, "-r", "wrist/image_raw:=/arm/image", "-p", "token_dtype:=float32"]
    command += ["-p", "qos_overrides./top/image_raw.subscription.reliability:=best_effort"]
    command += [
        "-p",
        "token_type:=float32",
        "-p",
        "qos_overrides./front/image_raw.subscription.dept:=3",
    ]  # no such ones
    with RosProcess(command, domain) as process:
        robot = Robot(domain, process)
        try:
            yield robot
        finally:
            robot.close()
        assert process.stop(signal.SIGTERM) == 0, process.output
        assert "Traceback" not in process.output


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("timm")
    from vla_perception.tokenizer import VisualTokenizer

    return VisualTokenizer.load("tiny-random")


def assert_same_tokens(message: VisualTokens, expected) -> None:
    expected = expected.tokens.float().numpy()
    error = np.abs(message.float32() - expected).max() / np.abs(expected).max()
    assert message.shape == expected.shape and error < 1e-4


# Tests share one process; each brings the node into the state that it needs.


def test_lifecycle_and_a_model_that_cannot_be_loaded(robot, tmp_path):
    assert robot.state == "unconfigured"
    robot.set(**DEFAULTS)
    assert not robot.set(model=str(tmp_path / "nowhere"))
    assert not robot.change(Transition.TRANSITION_CONFIGURE)
    assert robot.state == "unconfigured"
    robot.process.wait_for("configure failed: ")
    assert "no checkpoint directory at" in robot.process.output

    assert not robot.set(model=str(tmp_path))  # a directory without a checkpoint
    assert not robot.change(Transition.TRANSITION_CONFIGURE)
    assert not robot.set(model="tiny-random")

    configuring = robot.call_async(
        ChangeState, "visual_tokenizer/change_state", transition=Transition(id=Transition.TRANSITION_CONFIGURE)
    )
    seen = set()
    while not configuring.done():
        seen.add(robot.state)
    assert configuring.result().success and "configuring" in seen  # it answers while it loads
    assert robot.state == "inactive"
    assert robot.change(Transition.TRANSITION_ACTIVATE)
    assert robot.state == "active"
    assert robot.change(Transition.TRANSITION_DEACTIVATE)
    assert robot.change(Transition.TRANSITION_CLEANUP)
    assert robot.state == "unconfigured"


def test_parameters(robot):
    robot.unconfigure()
    assert "one of auto, float32" in robot.set(compute_dtype="int8")
    assert "different names" in robot.set(cameras=["front", "front"])
    assert "must be names of letters, digits and _" in robot.set(cameras=["front camera"])
    assert "at most 64 names" in robot.set(cameras=[f"camera{i}" for i in range(65)])
    assert "at most 200 characters" in robot.set(cameras=["x" * 201])
    for name in ("adapter", "encoders", "sync_slop_sec", "cameras"):  # None: rclpy would take the parameter away
        assert robot.set(**{name: None}), name
    assert robot.set(max_rate_hz=-1.0)
    assert not robot.set(max_rate_hz=5)  # an integer will do for a number
    robot.start(subscribe=False)
    assert "deactivate and clean it up" in robot.set(model="openvla-7b")
    assert "deactivate and clean it up" in robot.set(cameras=["wrist"])
    assert not robot.set(sync_policy="latest", max_rate_hz=2.5, trigger="on_request")
    names = ["sync_policy", "max_rate_hz", "trigger", "model"]
    values = robot.call(GetParameters, "visual_tokenizer/get_parameters", names=names).values
    assert values[0].string_value == "latest" and values[1].double_value == 2.5
    assert values[3].string_value == "tiny-random"


def test_one_camera(robot, tokenizer):
    robot.start()
    sequence = None
    for i in range(3):
        pixels, stamp = image(i), robot.next_stamp()
        robot.send("front", image_message(pixels, stamp, "front_optical"))
        message = robot.wait_for_tokens(i + 1)[i]
        assert_same_tokens(message, tokenizer([pixels]))
        header = robot.headers[i]
        assert (header.stamp.sec * 10**9 + header.stamp.nanosec, header.frame_id) == (stamp, "front_optical")
        view = message.views[0]
        assert (view.camera, view.stamp_ns, view.height, view.width) == ("front", stamp, 96, 128)
        assert view.affine == pytest.approx(tokenizer.affine(96, 128))
        assert message.fingerprint == tokenizer.fingerprint and message.weights == "random"
        assert sequence is None or message.sequence == sequence + 1
        sequence = message.sequence
    counts = robot.counts("front", lambda counts: counts["encoded"] == 3)
    assert counts["received"] == 3

    # While the node runs, what its message carries may change.
    assert not robot.set(token_dtype="bfloat16", publish_features=True)
    pixels = image(9)
    robot.send("front", image_message(pixels, robot.next_stamp()))
    message = robot.wait_for_tokens(4)[3]
    assert message.dtype == "bfloat16" and message.features.shape[:2] == message.shape[:2]
    expected = tokenizer([pixels], features=True)
    assert np.abs(message.features_float32() - expected.features.numpy()).max() < 0.05 * expected.features.abs().max()


def test_options_of_tokens_and_image_transforms(robot):
    image_transforms = ["rotate180", "wrist=crop:10,5,60,50"]
    choices = dict(token_strategy="cls+patch", pool=2, image_transforms=image_transforms)
    robot.start(cameras=["front", "wrist"], image_size=[200, 0], **choices)  # SigLIP's stays as it is, 224
    from vla_perception.tokenizer import VisualTokenizer

    expected = VisualTokenizer.load("tiny-random", image_size=[200, 224], **choices)
    images = {"front": image(200), "wrist": image(201)}
    for camera, pixels in images.items():
        robot.send(camera, image_message(pixels, robot.stamp_ns))
    message = robot.wait_for_tokens(1)[0]
    assert_same_tokens(message, expected(list(images.values()), cameras=list(images)))
    assert (message.fingerprint, message.grid, message.pool) == (expected.fingerprint, (7, 7), 2)
    assert message.views[1].affine == pytest.approx(expected.affine(96, 128, "wrist"))
    # Turned, then cut: the first patch begins where the source image, 128 × 96, has its (118, 91).
    assert message.patch_corners(1, view=1)[0] == pytest.approx((118, 91))
    # An image that is too small for its crop is skipped, and counted.
    stamp = robot.next_stamp()
    robot.send("front", image_message(images["front"], stamp))
    robot.send("wrist", image_message(image(202, 40, 40), stamp))
    robot.counts("wrist", lambda counts: counts["undecodable"] == 1)
    robot.process.wait_for("does not lie within an image of 40 × 40")

    for values, words in (
        (
            {"image_transforms": ["top=rotate180"]},
            "image_transforms names top, which is not among the cameras (front, wrist)",
        ),
        ({"image_transforms": ["mirror"]}, "unknown image transform 'mirror'; choose from rotate180"),
        ({"encoders": ["clip"]}, "no encoder 'clip'"),
        ({"pool": 5}, "pool 5 does not divide the grid of 14 × 14"),
    ):
        robot.unconfigure()
        assert not robot.set(**DEFAULTS | {"cameras": ["front", "wrist"]} | values)
        assert not robot.change(Transition.TRANSITION_CONFIGURE)
        robot.process.wait_for(words)


def test_two_cameras_approximate(robot, tokenizer):
    robot.start(cameras=["front", "wrist"], sync_slop_sec=0.05)
    for i in range(3):
        front, wrist, stamp = image(10 + i), image(20 + i, 60, 80), robot.next_stamp()
        robot.send("wrist", image_message(wrist, stamp + 10_000_000, "wrist"))
        robot.send("front", image_message(front, stamp, "front"))
        message = robot.wait_for_tokens(i + 1)[i]
        assert message.cameras == ("front", "wrist")
        assert [view.stamp_ns - stamp for view in message.views] == [0, 10_000_000]
        assert [(view.height, view.width) for view in message.views] == [(96, 128), (60, 80)]
        assert robot.headers[i].frame_id == "front" and message.stamp_ns == stamp
        assert_same_tokens(message, tokenizer([front, wrist]))
    # Stamps that are too far apart make no set; time that is set back does not stop it.
    robot.send("front", image_message(front, robot.next_stamp()))
    robot.send("wrist", image_message(wrist, robot.stamp_ns + 60_000_000))
    for camera in ("front", "wrist"):
        robot.send(camera, image_message(image(30), 10**17))
    assert robot.wait_for_tokens(4)[3].stamp_ns == 10**17
    counts = robot.counts("front", lambda counts: counts["encoded"] == 4)
    assert (counts["received"], counts["unmatched"], counts["pending"]) == (5, 1, 0)


def test_two_cameras_latest(robot, tokenizer):
    robot.start(cameras=["front", "wrist"], sync_policy="latest", max_age_sec=0.3)
    wrist, stamp = image(40), robot.next_stamp()
    robot.send("wrist", image_message(wrist, stamp))
    robot.counts("wrist", lambda counts: counts["received"] == 1)
    for i, behind_ms in enumerate((100, 250)):
        front = image(50 + i)
        robot.send("front", image_message(front, stamp + behind_ms * 10**6, "front"))
        message = robot.wait_for_tokens(i + 1)[i]
        assert [view.stamp_ns - stamp for view in message.views] == [behind_ms * 10**6, 0]
        assert_same_tokens(message, tokenizer([front, wrist]))
    # The wrist's frame is too old now: no tokens rather than wrong ones.
    robot.send("front", image_message(front, stamp + 350 * 10**6))
    counts = robot.counts("front", lambda counts: counts["received"] == 3)
    assert (counts["encoded"], counts["unmatched"], len(robot.tokens)) == (2, 1, 2)


def test_a_flood_keeps_to_the_newest(robot, tokenizer):
    robot.start(cameras=["front", "wrist"])
    status = Path(f"/proc/{robot.process.process.pid}/status")

    def resident_mb() -> float:
        return int(status.read_text().split("VmRSS:")[1].split()[0]) / 1024

    def flood(frames: int) -> None:
        for _ in range(frames):
            stamp = robot.next_stamp(33)
            for camera in ("front", "wrist"):
                robot.send(camera, image_message(pixels, stamp))
            time.sleep(0.005)

    pixels = image(60, 480, 640)
    flood(20)
    robot.counts("front", lambda counts: counts["encoded"] > 0)
    before = resident_mb()
    flood(100)  # 184 MB
    grown = resident_mb() - before
    last, stamp = image(61), robot.next_stamp(1000)
    begun = time.monotonic()
    for camera in ("front", "wrist"):
        robot.send(camera, image_message(last, stamp))
    wait_until(lambda: robot.tokens and robot.tokens[-1].stamp_ns == stamp, 20, "tokens of the last frame")
    assert time.monotonic() - begun < 10.0  # two encodings, however long the flood was
    assert_same_tokens(robot.tokens[-1], tokenizer([last, last]))
    assert grown < 80
    counts = robot.counts("front", lambda counts: not counts["pending"] or counts["received"] == 121)
    assert counts["replaced"] > 20 and counts["encoded"] >= len(robot.tokens) - 1
    for found in robot.diagnostics:  # at every moment: histories, one waiting, one encoded, one published
        pending = [int(values["pending"]) for name, values in found.items() if name.startswith("camera")]
        assert all(count <= HISTORY + 4 for count in pending)
    assert [message.sequence for message in robot.tokens] == list(
        range(robot.tokens[0].sequence, robot.tokens[0].sequence + len(robot.tokens))
    )


def test_bad_frames_are_skipped(robot, tokenizer):
    robot.start()
    good = image_message(image(70), robot.next_stamp())
    truncated = image_message(image(71), robot.next_stamp())
    truncated.data = truncated.data[:100]
    depth = image_message(image(72), robot.next_stamp())
    depth.encoding = "32FC1"
    for bad in (truncated, depth, Image()):
        received = robot.counts("front")["received"]
        bad.header.stamp.sec, bad.header.stamp.nanosec = divmod(robot.next_stamp(), 10**9)
        robot.send("front", bad)
        robot.counts("front", lambda counts, n=received: counts["received"] == n + 1 and counts["pending"] == 0)
    good.header.stamp.sec += 100
    robot.send("front", good)
    robot.wait_for_tokens(1)
    counts = robot.counts("front", lambda counts: counts["encoded"] == 1)
    assert counts["undecodable"] == 3
    robot.process.wait_for("camera front: a frame is skipped: ")


def test_headers_that_no_message_can_carry_are_refused_at_the_node(robot):
    """Neither their stamps nor they themselves cost the other camera's frames anything."""
    robot.start(cameras=["front", "wrist"], sync_slop_sec=0.05)
    pixels, stamp = image(75), robot.next_stamp()
    robot.send("wrist", image_message(pixels, stamp))
    for sec, nanosec, frame_id in ((-1, 0, "front"), (5, 10**9, "front"), (5, 2**32 - 1, "front"), (5, 0, "x" * 1001)):
        bad = image_message(pixels, 0, frame_id)
        bad.header.stamp.sec, bad.header.stamp.nanosec = sec, nanosec
        robot.send("front", bad)
    robot.send("front", image_message(pixels, stamp, "x" * 1000))
    message = robot.wait_for_tokens(1)[0]
    assert message.stamps_ns == (stamp, stamp) and message.views[0].frame_id == "x" * 1000
    counts = robot.counts("front", lambda counts: counts["encoded"] == 1)
    assert (counts["received"], counts["undecodable"], counts["pending"]) == (5, 4, 0)
    robot.process.wait_for("camera front: a frame is skipped: its stamp, -1 s and 0 ns, is not a time")


def test_two_publishers_on_one_camera_are_reported(robot):
    robot.start()
    other = rclpy.create_node("second_camera", namespace="arm", context=robot.node.context)
    publisher = other.create_publisher(Image, "/front/image_raw", 20)
    wait_until(publisher.get_subscription_count, 15, "the node subscribes")
    robot.send("front", image_message(image(76), robot.next_stamp()))
    robot.counts("front", lambda counts: counts["received"] > 0)
    assert robot.diagnosis_of("front") == "ok"  # one that sends nothing does no harm
    for _ in range(4):
        robot.send("front", image_message(image(76), robot.next_stamp()))
        publisher.publish(image_message(image(77), robot.next_stamp()))
    wait_until(
        lambda: "more than one publisher sends on /front/image_raw" in robot.diagnosis_of("front"), 15, "a warning"
    )
    assert "(listed: /arm/second_camera, /robot)" in robot.diagnosis_of("front")
    robot.process.wait_for("camera front: more than one publisher sends on /front/image_raw")
    other.destroy_node()
    wait_until(lambda: robot.diagnosis_of("front") == "ok", 15, "no warning")


def test_on_request(robot):
    robot.start(trigger="on_request")
    call = functools.partial(robot.call, Trigger, "encode")
    answer = call()
    assert not answer.success and "no new frame set" in answer.message
    for _ in range(3):
        robot.send("front", image_message(image(80), robot.next_stamp()))
    robot.counts("front", lambda counts: counts["received"] == 3)
    assert not robot.tokens
    answer = call()
    assert answer.success and str(robot.stamp_ns) in answer.message
    assert robot.wait_for_tokens(1)[0].stamp_ns == robot.stamp_ns  # the latest
    assert not call().success
    robot.send("front", image_message(image(81), robot.next_stamp()))
    robot.counts("front", lambda counts: counts["received"] == 4)
    robot.unsubscribe()
    wait_until(lambda: "no subscriber" in call().message, 10, "the node knows that nobody subscribes")
    assert not robot.set(trigger="continuous")
    answer = call()
    assert answer.message.startswith(FINAL) and "continuous" in answer.message
    assert robot.change(Transition.TRANSITION_DEACTIVATE)
    assert "not active" in call().message


def test_max_rate(robot):
    robot.start(max_rate_hz=2.0)
    begin = time.monotonic()

    def frame_and_tokens() -> bool:
        robot.send("front", image_message(image(90), robot.next_stamp(20)))
        return len(robot.tokens) >= 6

    wait_until(frame_and_tokens, 90, "six messages")
    last = robot.stamp_ns
    wait_until(lambda: robot.tokens[-1].stamp_ns == last, 30, "tokens of the latest frame")
    assert len(robot.tokens) - 1 <= 2.0 * (time.monotonic() - begin)


def test_nothing_is_encoded_without_a_subscriber(robot):
    robot.start(subscribe=False)
    for _ in range(HISTORY):  # no more than the subscription's depth: none may be lost on the way
        robot.send("front", image_message(image(100), robot.next_stamp()))
    counts = robot.counts("front", lambda counts: counts["received"] == HISTORY)
    assert (counts["encoded"], counts["replaced"], counts["pending"]) == (0, HISTORY - 1, 1)
    robot.subscribe()
    assert not robot.tokens  # what waited is old by now
    robot.send("front", image_message(image(101), robot.next_stamp()))
    assert robot.wait_for_tokens(1)[0].stamp_ns == robot.stamp_ns


def test_compressed_images_of_a_remapped_camera(robot, tokenizer):
    cv2 = pytest.importorskip("cv2")
    robot.start(cameras=["wrist"], image_transport="compressed")
    pixels = image(110)
    message = CompressedImage(format="png", data=cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes())
    message.header.stamp.sec = robot.next_stamp() // 10**9
    robot.send("wrist", message)
    assert_same_tokens(robot.wait_for_tokens(1)[0], tokenizer([pixels]))
    # What is damaged or too large is counted, and the next one is encoded.
    whole = cv2.imencode(".jpg", pixels[:, :, ::-1])[1].tobytes()

    def send(data: bytes) -> None:
        message = CompressedImage(format="jpeg", data=data)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(robot.next_stamp(), 10**9)
        robot.send("wrist", message)

    vast = whole.replace(struct.pack(">HH", 96, 128), struct.pack(">HH", 32000, 32000))
    for number, data in enumerate((whole[: len(whole) // 2] + b"\xff\xd9", vast), start=1):
        send(data)
        robot.counts("wrist", lambda counts, number=number: counts["undecodable"] == number)
    assert not robot.set(max_image_pixels=96 * 128)
    send(whole)
    robot.wait_for_tokens(2)
    assert not robot.set(max_image_pixels=96 * 128 - 1)
    send(whole)
    robot.counts("wrist", lambda counts: counts["undecodable"] == 3)


def test_best_effort_publishers_and_cameras_that_are_missing(robot):
    robot.forget("front")
    robot.start()
    robot.send_until_tokens("front", 120, reliability=ReliabilityPolicy.BEST_EFFORT)
    robot.process.wait_for("camera front: publishers offer best_effort")
    # The camera goes away: logged once, and again when it is back.
    reported = robot.process.output.count("camera front: nothing publishes")
    robot.forget("front", reliability=ReliabilityPolicy.BEST_EFFORT)
    wait_until(lambda: "nothing publishes /front/image_raw" in robot.diagnosis_of("front"), 20, "a health problem")
    robot.counts("front")  # a second later it has not been logged again
    assert robot.process.output.count("camera front: nothing publishes") == reported + 1
    robot.send_until_tokens("front", 121)  # reliable now
    wait_until(lambda: robot.diagnosis_of("front") == "ok", 10, "no health problem")
    robot.process.wait_for("camera front: frames arrive")


def test_settings_that_do_not_exist_are_named(robot):
    robot.process.wait_for("has no parameter token_type, so it is ignored; is token_dtype meant?")
    robot.start()
    name = "qos_overrides./front/image_raw.subscription.dept"
    robot.process.wait_for(f"has no parameter {name}, so it is ignored; is {name}h meant?")


def test_qos_overrides_come_first(robot):
    robot.start(cameras=["top"])
    robot.send_until_tokens("top", 125)  # from a reliable publisher
    robot.counts("top")  # the node has looked at its publishers
    (subscription,) = robot.node.get_subscriptions_info_by_topic("/top/image_raw")
    assert subscription.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT


def test_model_and_timing_are_reported(robot):
    robot.start()
    robot.send("front", image_message(image(130), robot.next_stamp()))
    robot.wait_for_tokens(1)
    begun = len(robot.diagnostics)
    found = wait_until(lambda: robot.diagnostics[begun + 1 :], 10, "diagnostics")[0]
    assert (found["model"]["model"], found["model"]["weights"]) == ("tiny-random", "random")
    assert found["model"]["fingerprint"] == robot.tokens[0].fingerprint
    assert found["model"]["message"] == "active" and int(found["model"]["token_messages"]) > 0
    for stage in ("decode", "preprocess", "encode", "publish", "overhead"):
        p50, p95, p99 = (float(found["timing"][f"{stage}_p{percent}_ms"]) for percent in (50, 95, 99))
        assert 0 < p50 <= p95 <= p99


# Within this process: what a model rarely does, and who may set what


def test_a_locked_model_is_settled_for_the_process():
    from vla_perception.nodes.visual_tokenizer.node import VisualTokenizerNode
    from vla_perception.nodes.visual_tokenizer.parameters import PARAMETERS

    locked = [name for name, spec in PARAMETERS.items() if spec.locked]
    assert {"model", "adapter", "device", "max_image_pixels"} < set(locked)

    with RosContext(args=["--ros-args", "-p", "model_locked:=true"]) as ros, in_domain(ros.domain):
        node = VisualTokenizerNode(lambda _code: None, context=ros.context)
        ros.nodes.append(node)
        for state in ("unconfigured", "inactive", "unconfigured"):
            node.lifecycle_state = state
            for name in locked:
                (result,) = node.set_parameters([Parameter(name, value=PARAMETERS[name].ros_default)])
                assert not result.successful and f"{name} keeps the value" in result.reason
                assert "model_locked is true" in result.reason
            together = [Parameter("max_rate_hz", value=3.0), Parameter("model", value="base")]
            assert not node.set_parameters_atomically(together).successful
            assert (node.parameters.values.max_rate_hz, node.parameters.values.model) == (0.0, "tiny-random")
            assert not node.set_parameters([Parameter("model_locked", value=False)])[0].successful
        assert node.set_parameters([Parameter("max_rate_hz", value=3.0)])[0].successful
        assert node.set_parameters([Parameter("cameras", value=["wrist"])])[0].successful
        node.close()


def test_an_encoding_that_fails_and_tokens_that_are_not_finite(monkeypatch):
    pytest.importorskip("torch")
    from fake_model import Model

    from vla_perception.nodes.visual_tokenizer import node as node_module
    from vla_perception.nodes.visual_tokenizer.node import VisualTokenizerNode

    model, received, reports = Model(), [], []
    with RosContext() as ros:
        with in_domain(ros.domain):
            node = VisualTokenizerNode(lambda _code: None, context=ros.context)
        ros.nodes.append(node)
        policy = ros.node("policy")
        policy.create_subscription(
            CompressedImage, "tokens", lambda message: received.append(from_message(message)), 10
        )
        policy.create_subscription(DiagnosticArray, "/diagnostics", reports.append, 10)
        ros.spin(policy)
        monkeypatch.setattr(node_module, "load_tokenizer", lambda *_arguments: model)
        node.trigger_configure()
        assert gc.get_freeze_count() > 0, "the garbage collector would hold up frames"
        node.trigger_activate()
        wait_until(node._token_publisher.has_subscribers, 10, "the policy is known")
        # 70000 is beyond float16's range, infinity after the conversion; the third frame shows that it goes on.
        assert node.set_parameters([Parameter("token_dtype", value="float16")])[0].successful
        for i, result in enumerate([RuntimeError("CUDA out of memory"), float("nan"), 70000.0, 1.5]):
            model.results.append(result)
            assert node._pipeline.add("front", i + 1, image_message(image(i), i + 1))
            wait_until(
                lambda n=i: node._pipeline.report()[0]["front"]["encoded"] == n + 1, 10, f"frame {i} is done with"
            )
        wait_until(lambda: received, 10, "tokens")
        assert [(message.sequence, message.stamp_ns) for message in received] == [(0, 4)]
        assert (received[0].float32() == 1.5).all()
        for level in (DiagnosticStatus.WARN, DiagnosticStatus.OK):  # once for what failed since the last time
            reports.clear()
            node._on_timer()
            wait_until(lambda: reports, 10, "diagnostics")
            (status,) = [status for status in reports[0].status if status.name.endswith(": model")]
            assert status.level == level and status.message.startswith("active")
            values = {item.key: item.value for item in status.values}
            assert (values["encode_errors"], values["non_finite"], values["publish_errors"]) == ("1", "2", "0")
        node.trigger_deactivate()
        node.trigger_cleanup()
        assert gc.get_freeze_count() == 0, "what was loaded would never be collected"
        node.close()


# Processes of their own


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly(number):
    domain = free_domain()
    for _ in range(5):
        with RosProcess(NODE, domain) as process:
            process.wait_for("waits to be configured")
            process.process.send_signal(number)
            assert process.stop(number, 10) == 0, process.output  # under `ros2 launch` they come twice
            assert "Traceback" not in process.output


def test_autostart_and_signals_while_it_loads_and_while_it_works():
    domain = free_domain()
    autostart = [*NODE, "-p", "autostart:=true"]
    with RosProcess([*autostart, "-p", "model:=/nowhere"], domain) as failing:
        assert failing.wait(90) == 1
        assert "configure failed" in failing.output and "autostart" in failing.output
    with RosProcess(autostart, domain) as loading:
        loading.wait_for("loading tiny-random")
        assert loading.stop(signal.SIGINT) == 0, loading.output
    with RosProcess([*autostart, "-p", "max_rate_hz:=3"], domain) as working:
        working.wait_for("ready after", 90)
        where = re.search(r"\[visual_tokenizer\]: computes on (\S+) in (\w+): ", working.output)
        ready = re.search(r"ready after .* on (\S+) in (\w+), kernels (.+)\n", working.output)
        assert where and ready and ready.groups()[:2] == where.groups()
        robot = Robot(domain, working)
        try:
            wait_until(lambda: robot.diagnostics and "device" in robot.diagnostics[-1]["model"], 10, "diagnostics")
            reported = robot.diagnostics[-1]["model"]
            assert (reported["device"], reported["compute_dtype"], reported["kernels"]) == ready.groups()
            wait_until(lambda: robot.state == "active", 10, "active")
            robot.subscribe()
            for i in range(100):
                robot.send("front", image_message(image(i), robot.next_stamp()))
                if robot.tokens:
                    break
                time.sleep(0.1)
            assert robot.tokens and robot.tokens[0].compute_dtype == where[2]
            assert working.stop(signal.SIGTERM) == 0, working.output
        finally:
            robot.close()
        assert "Traceback" not in working.output


def test_without_opencv_compressed_images_are_refused_before_they_come(tmp_path):
    (tmp_path / "cv2.py").write_text("raise ImportError('no OpenCV')")
    (tmp_path / "cv_bridge.py").write_text("raise ImportError('no cv_bridge')")
    path = {"PYTHONPATH": os.pathsep.join((str(tmp_path), ros_environment(0)["PYTHONPATH"]))}
    command = [*NODE, "-p", "autostart:=true"]
    with RosProcess([*command, "-p", "image_transport:=compressed"], free_domain(), path) as process:
        assert process.wait(90) == 1
        assert "pip install opencv-python-headless" in process.output and "Traceback" not in process.output
    with RosProcess(command, free_domain(), path) as process:
        process.wait_for("ready after", 90)
        assert process.stop(signal.SIGINT) == 0, process.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-p", "trigger:=sometimes"], "trigger must be one of continuous, on_request"),
        (["-p", "cameras:=front"], "cameras"),
        (["-p", "sync_slop_sec:=11.0"], "sync_slop_sec"),
    ],
)
def test_a_bad_parameter_ends_it_with_a_sentence(arguments, reason):
    with RosProcess([*NODE, *arguments], free_domain()) as process:
        assert process.wait(20) == 1
        assert reason in process.output and "Traceback" not in process.output
