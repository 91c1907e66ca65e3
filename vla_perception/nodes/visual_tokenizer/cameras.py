"""The cameras' topics: subscriptions, their QoS, and what is wrong with a camera while no frames come."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rcl_interfaces.msg import ParameterDescriptor
from rclpy._rclpy_pybind11 import RCLError
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import HistoryPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo
from sensor_msgs.msg import CompressedImage, Image

from vla_perception.images.decode import check_message_size
from vla_perception.nodes.ignored_parameters import warn_of_ignored_qos
from vla_perception.nodes.node_runner import ImmediateCallbackGroup
from vla_perception.synchronizer import HISTORY
from vla_perception.tokens.arrivals import Senders
from vla_perception.tokens.message import check_header

if TYPE_CHECKING:
    from rclpy.subscription import MessageInfo  # Jazzy has no name for it

    from vla_perception.nodes.visual_tokenizer.pipeline import Pipeline

#: Seconds over which a camera's rate is counted, and without a frame set after which stamps are looked at.
QUIET_SEC = 5.0
#: Seconds after which a publisher that was killed is not listed any more (Fast DDS: 20).
LISTED_SEC = 30.0


@dataclass
class Camera:
    """One camera's subscription and what is known about it. Times are seconds on the monotonic clock.

    Attributes:
        name: as in the parameter `cameras`.
        subscribed_topic: its topic before it is remapped (image_transport raw).
        topic: its full name.
        compressed: whether the topic carries CompressedImage, not Image.
        since: when it was subscribed to.
        qos_overridden: whether the user gave the reliability by a `qos_overrides` parameter.
        numbered: whether the middleware gives the number that the sender gave a message.
        several_since: since when more than one publisher is listed.
        health_problem: what is wrong with it and what to do about it; empty if nothing is.
    """

    name: str
    subscribed_topic: str
    topic: str
    compressed: bool
    since: float
    qos_overridden: bool = False
    reliability: ReliabilityPolicy = ReliabilityPolicy.RELIABLE
    subscription: Subscription | None = None
    arrivals: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    senders: Senders = field(default_factory=Senders)
    numbered: bool = False
    several_since: float | None = None
    health_problem: str = ""

    @property
    def reliability_parameter(self) -> str:
        return f"qos_overrides.{self.topic}.subscription.reliability"

    @property
    def other_topic(self) -> str:
        """The camera's topic with the other `image_transport`."""
        return self.topic.removesuffix("/compressed") if self.compressed else f"{self.topic}/compressed"

    def on_frame(self, now: float, number: int | None) -> None:
        """A frame has arrived; `number` is the one that its sender gave it, None where the middleware gives none."""
        self.arrivals.append(now)
        self.numbered = number is not None
        if number is not None:
            self.senders.add(number, now)

    def rate_hz(self, now: float) -> float:
        """Frames per second over the last `QUIET_SEC`."""
        recent = [arrival for arrival in tuple(self.arrivals) if now - arrival <= QUIET_SEC]
        return (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 and recent[-1] > recent[0] else 0.0

    def age_sec(self, now: float) -> float:
        """Seconds since the last frame came, infinite before the first."""
        return now - self.arrivals[-1] if self.arrivals else float("inf")


class Cameras:
    """The subscriptions of an active node. Frames go to a `Pipeline`, from the executor's own thread.

    Reliability follows what the publishers offer, unless a `qos_overrides` parameter says it.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._changing = threading.Lock()  # held while subscriptions come and go
        self._cameras: dict[str, Camera] = {}
        self._pipeline: Pipeline | None = None
        self._warned_of_ignored_qos = False
        self._callback_group = ImmediateCallbackGroup()
        self._qos_mismatch = node.create_guard_condition(self.follow_publishers)

    def __getitem__(self, name: str) -> Camera:
        return self._cameras[name]

    def get(self, name: str) -> Camera | None:
        return self._cameras.get(name)

    def all(self) -> tuple[Camera, ...]:
        """Those that are subscribed to at the moment."""
        return tuple(self._cameras.values())

    def subscribe(self, names: Sequence[str], image_transport: str, pipeline: Pipeline) -> None:
        """From here on the frames of these cameras go to `pipeline`."""
        compressed, now = image_transport == "compressed", time.monotonic()
        with self._changing:
            self._pipeline = pipeline
            for name in names:
                topic = f"{name}/image_raw"
                if compressed:
                    # Resolved before the suffix is appended: remapping the base name moves both.
                    topic = f"{self._node.resolve_topic_name(topic)}/compressed"
                camera = Camera(name, topic, self._node.resolve_topic_name(topic), compressed, since=now)
                self._subscribe(camera, ReliabilityPolicy.RELIABLE)
                self._cameras[name] = camera
        if not self._warned_of_ignored_qos:
            self._warned_of_ignored_qos = True
            warn_of_ignored_qos(self._node, [camera.reliability_parameter for camera in self.all()])

    def unsubscribe(self) -> None:
        with self._changing:
            for camera in self._cameras.values():
                if camera.subscription is not None:
                    self._node.destroy_subscription(camera.subscription)
            self._cameras = {}
            self._pipeline = None

    def follow_publishers(self) -> None:
        """Takes the reliability that each camera's publishers offer: best effort if any offers no more."""
        with self._changing:
            for camera in self._cameras.values():
                if camera.qos_overridden:
                    continue
                publishers = self._publishers(camera)
                offers = {info.qos_profile.reliability for info in publishers}
                best_effort = ReliabilityPolicy.BEST_EFFORT in offers
                offered = ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE
                if offers and offered != camera.reliability:
                    self._node.get_logger().info(
                        f"camera {camera.name}: publishers offer {offered.short_key}, so the subscription takes that"
                    )
                    self._subscribe(camera, offered)

    def check_health(self, now: float, quiet_sec: float) -> None:
        """Sets each camera's `health_problem`, and logs where one begins and where it ends.

        Args:
            quiet_sec: seconds without a frame after which something is wrong.
        """
        logger = self._node.get_logger()
        for camera in self.all():
            others = self._node.count_publishers(camera.other_topic)
            problem = health_problem(camera, self._publishers(camera), others, now, quiet_sec)
            if problem and not camera.health_problem:
                logger.warning(f"camera {camera.name}: {problem}")
            elif camera.health_problem and not problem:
                logger.info(f"camera {camera.name}: frames arrive, and from one publisher")
            camera.health_problem = problem

    def _publishers(self, camera: Camera) -> list[TopicEndpointInfo]:
        return self._node.get_publishers_info_by_topic(camera.subscribed_topic)

    def _subscribe(self, camera: Camera, reliability: ReliabilityPolicy) -> None:
        """(Re)creates the camera's subscription; `qos_overrides` parameters come first.

        Raises:
            ValueError: the camera's topic is another one of this process, by a remapping.
        """
        camera.qos_overridden = self._is_given(camera.reliability_parameter)
        policies = [QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH]
        if camera.qos_overridden:
            policies.append(QoSPolicyKind.RELIABILITY)
        if camera.subscription is not None:
            self._node.destroy_subscription(camera.subscription)
        camera.reliability = reliability
        try:
            camera.subscription = self._node.create_subscription(
                CompressedImage if camera.compressed else Image,
                camera.subscribed_topic,
                lambda message, info: self._on_image(camera, message, info),
                QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=HISTORY, reliability=reliability),
                callback_group=self._callback_group,
                event_callbacks=SubscriptionEventCallbacks(
                    incompatible_qos=lambda _event: self._qos_mismatch.trigger()
                ),
                qos_overriding_options=QoSOverridingOptions(policies),
            )
        except RCLError as error:
            topic = self._node.resolve_topic_name(camera.subscribed_topic)
            raise ValueError(
                f"camera {camera.name}: {topic} cannot be subscribed to; does a remapping give the camera another topic of "
                f"this node? ({error})"
            ) from error

    def _is_given(self, name: str) -> bool:
        """Whether the user gave a value for a parameter that is not declared (rclpy has no other way to ask)."""
        if self._node.has_parameter(name):
            return True
        self._node.declare_parameter(name, None, ParameterDescriptor(dynamic_typing=True))
        given = self._node.get_parameter(name).type_ != Parameter.Type.NOT_SET
        self._node.undeclare_parameter(name)
        return given

    def _on_image(self, camera: Camera, message: Image | CompressedImage, info: MessageInfo) -> None:
        pipeline, stamp, now = self._pipeline, message.header.stamp, time.monotonic()
        # A callback may have waited for a thread since before the node was configured anew, for other cameras.
        if pipeline is None or self._cameras.get(camera.name) is not camera:
            return
        subject = "header"
        try:
            check_header(message.header)
            subject = "size"
            # Now, not when it is decoded: several wait for each camera.
            check_message_size(message, pipeline.parameters.max_image_pixels)
        except ValueError as error:
            taken = pipeline.reject(camera.name, str(error), subject)
        else:
            taken = pipeline.add(camera.name, stamp.sec * 10**9 + stamp.nanosec, message)
        if taken:
            camera.on_frame(now, info["publication_sequence_number"])


def health_problem(
    camera: Camera, publishers: Sequence[TopicEndpointInfo], other_publishers: int, now: float, quiet_sec: float
) -> str:
    """What is wrong with a camera and what to do about it; empty if nothing is.

    Args:
        publishers: those listed on the camera's topic.
        other_publishers: how many are listed on the topic of the other `image_transport`.
        quiet_sec: seconds without a frame after which something is wrong.
    """
    topic, other = camera.topic, camera.other_topic
    if min(camera.age_sec(now), now - camera.since) < quiet_sec:
        return _several_publishers(camera, publishers, now)
    if not publishers and other_publishers:
        transport = "raw" if camera.compressed else "compressed"
        return f"nothing publishes {topic}, but {other} has a publisher: set image_transport to {transport}"
    if not publishers:
        return f"nothing publishes {topic}: start the camera, or remap {camera.name}/image_raw to the topic that it publishes"
    kind = f"sensor_msgs/msg/{'CompressedImage' if camera.compressed else 'Image'}"
    if all(info.topic_type != kind for info in publishers):
        return f"{topic} carries {publishers[0].topic_type}, not {kind}: check image_transport and the remapping"
    if camera.arrivals:
        return f"no frame for {quiet_sec:g} s although {topic} has a publisher: has the camera stopped?"
    if camera.reliability == ReliabilityPolicy.BEST_EFFORT and not camera.compressed:
        return (
            f"{topic} has a publisher, but no frame arrives. Best-effort images are lost where Fast DDS's shared memory is "
            "smaller than a frame: start the *camera* with FASTRTPS_DEFAULT_PROFILES_FILE and "
            "FASTDDS_DEFAULT_PROFILES_FILE set to vla_perception's config/fastdds.xml, let it publish reliably, or set "
            "image_transport to compressed (docs/transport.md)"
        )
    return (
        f"{topic} has a publisher, but no frame arrives: does the camera capture? Does qos_overrides ask for more than "
        "it offers?"
    )


def _several_publishers(camera: Camera, publishers: Sequence[TopicEndpointInfo], now: float) -> str:
    """That several publishers send on a camera's topic. One that is only listed may have been killed, or be idle."""
    if len(publishers) < 2:
        camera.several_since = None
        return ""
    camera.several_since = camera.several_since or now
    # Cyclone DDS gives no numbers: there, a publisher that is listed for long counts as sending.
    listed_long = not camera.numbered and camera.arrivals and now - camera.several_since > LISTED_SEC
    if not camera.senders.take_turns(now) and not listed_long:
        return ""
    names = ", ".join(sorted(f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in publishers))
    return (
        f"more than one publisher sends on {camera.topic} (listed: {names}): their images alternate as one view. Stop "
        "one, or remap its topic and name it in `cameras`"
    )
