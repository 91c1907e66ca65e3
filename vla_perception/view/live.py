"""The feed of a running system: what nodes of the ROS domain publish, received as a policy would, in separate threads.

Tokens come through `TokenSubscriber`, and only while a page shows them: without a page no tokens are wanted here, and
none are encoded for it. Camera images stay serialized until one is shown.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Log
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, ShutdownException, SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import Trigger

from vla_perception.images.decode import MAX_PIXELS, check_message_size
from vla_perception.sources.bags import header_stamp_ns
from vla_perception.tokens import TokenSubscriber, VisualTokens
from vla_perception.view.health import LogBook, Reception, Status, TokenizerHealth
from vla_perception.view.snapshot import ImageHistory, LazyImage, PageImage, Snapshot, page_image

#: Seconds between two looks at what nodes and topics there are, and before a first tokenizer is found.
LOOK_SEC, FIRST_LOOK_SEC = 0.5, 0.05
SAMPLE_SEC = 1.0
#: More tokenizers, cameras of one or statuses of a message are not kept.
MAX_TOKENIZERS, MAX_IMAGE_TOPICS, MAX_STATUSES = 64, 16, 1000
#: Seconds for a service to answer.
ANSWER_SEC = 5.0
_UNKNOWN = "_NODE_NAME_UNKNOWN_"  # rmw_dds_common's
_IMAGE_TYPES: dict[str, type] = {
    "sensor_msgs/msg/Image": Image,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
}


@dataclass
class _Tokenizer:
    """What is kept of one tokenizer."""

    health: TokenizerHealth
    publishers: tuple[str, ...] = ()  # full names of the nodes that publish its topic
    subscriber: TokenSubscriber | None = None
    snapshot: Snapshot | None = None
    image_topics: tuple[str, ...] = ()


class LiveFeed:
    """What runs in a ROS domain. A `Feed`; a context manager that ends its threads.

    Args:
        domain: ROS_DOMAIN_ID; None: the environment's.
        passive: receive tokens only while another node subscribes to their topic.
        changed: called by a thread of this feed whenever there is a new snapshot.
    """

    is_recording = False

    def __init__(
        self, *, domain: int | None = None, passive: bool = False, changed: Callable[[], None] = lambda: None
    ) -> None:
        self.changed = changed
        self._passive = passive
        self._lock = threading.RLock()  # of what follows; never held while ROS waits for something
        self._tokenizers: dict[str, _Tokenizer] = {}  # by topic
        self._wanted: Counter[str] = Counter()
        self._statuses: dict[str, None] = {}  # full names of nodes whose diagnostics are a tokenizer's
        self._log = LogBook()
        # In the executor's thread alone:
        self._history = ImageHistory()
        self._images: dict[str, Subscription] = {}
        self._image_types: dict[str, type] = {}

        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO, domain_id=domain)
        self.title = f"ROS domain {self._context.get_domain_id()}"
        self._node = rclpy.create_node(
            f"vla_perception_view_{os.getpid()}",
            context=self._context,
            use_global_arguments=False,
            enable_rosout=False,
            start_parameter_services=False,
        )
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 20)
        rosout = QoSProfile(
            depth=200, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
        )
        self._node.create_subscription(Log, "/rosout", self._on_log, rosout)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._looked = 0.0
        self._node.create_timer(FIRST_LOOK_SEC, self._look_if_due, clock=steady)
        self._node.create_timer(SAMPLE_SEC, self._sample, clock=steady)
        self._look_now = self._node.create_guard_condition(self._look)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._spin, name="view", daemon=True)
        self._thread.start()

    def __enter__(self) -> LiveFeed:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends reception."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._executor.create_task(lambda: None)  # ends `spin_once`, as the executor's `wake` does not
        self._thread.join(5.0)
        for tokenizer in self._tokenizers.values():
            if tokenizer.subscriber is not None:
                tokenizer.subscriber.close()
        if not self._thread.is_alive():
            self._executor.shutdown(timeout_sec=1.0)
            self._node.destroy_node()
        rclpy.try_shutdown(context=self._context)

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException, ShutdownException):
            while not self._ending.is_set() and self._context.ok():
                self._executor.spin_once(timeout_sec=1.0)

    # For the pages, from any thread

    def times(self, topic: str) -> Sequence[float]:
        return ()

    def tokenizers(self) -> list[dict[str, object]]:
        now = time.monotonic()
        with self._lock:
            summaries = [tokenizer.health.summary(now) for tokenizer in self._tokenizers.values()]
        return sorted(summaries, key=lambda summary: (bool(summary["gone"]), str(summary["topic"])))

    def details(self, topic: str) -> dict[str, object] | None:
        with self._lock:
            tokenizer = self._tokenizers.get(topic)
            return None if tokenizer is None else tokenizer.health.details(time.monotonic())

    def samples(self, topic: str) -> list[dict[str, object]]:
        now = time.monotonic()
        with self._lock:
            tokenizer = self._tokenizers.get(topic)
            samples = [] if tokenizer is None else list(tokenizer.health.samples)
        return [sample | {"ago_sec": now - sample["time"]} for sample in samples]  # type: ignore[operator]

    def log_after(self, number: int) -> list[dict[str, object]]:
        with self._lock:
            return self._log.after(number)

    def snapshot(self, topic: str, index: int = 0) -> Snapshot | None:
        with self._lock:
            tokenizer = self._tokenizers.get(topic)
            return None if tokenizer is None else tokenizer.snapshot

    def acquire(self, topic: str) -> None:
        with self._lock:
            self._wanted[topic] += 1
        self._look_now.trigger()

    def release(self, topic: str) -> None:
        with self._lock:
            self._wanted[topic] -= 1
            if self._wanted[topic] <= 0:
                del self._wanted[topic]
        self._look_now.trigger()

    def control(self, topic: str, action: str) -> str:
        with self._lock:
            tokenizer = self._tokenizers.get(topic)
            node = tokenizer.health.node if tokenizer is not None else ""
        transitions = {"activate": Transition.TRANSITION_ACTIVATE, "deactivate": Transition.TRANSITION_DEACTIVATE}
        if action in transitions:
            if not node:
                raise ValueError(f"the node that publishes {topic} is not known")
            request = ChangeState.Request()
            request.transition.id = transitions[action]
            answer = self._call(ChangeState, f"{node}/change_state", request)
            return f"{action}: {'done' if answer.success else 'refused; the log says why'}"
        if action == "encode":
            answer = self._call(Trigger, f"{topic.rpartition('/')[0]}/encode", Trigger.Request())
            return f"encode: {answer.message[:1000]}"
        raise ValueError(f"unknown action {action[:100]!r}")

    def _call(self, kind: type, service: str, request: object) -> Any:
        client: Any = self._node.create_client(kind, service)
        try:
            end = time.monotonic() + ANSWER_SEC
            while not client.service_is_ready():
                if time.monotonic() > end:
                    raise ValueError(f"there is no service {service}: is the tokenizer running?")
                time.sleep(0.02)
            answered = threading.Event()
            future = client.call_async(request)
            future.add_done_callback(lambda _future: answered.set())
            if not answered.wait(ANSWER_SEC):
                raise ValueError(f"{service} did not answer within {ANSWER_SEC:g} s")
            return future.result()
        finally:
            self._node.destroy_client(client)

    # In the executor's thread

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        now = time.monotonic()
        by_node: dict[str, list[Status]] = {}
        for status in message.status[:MAX_STATUSES]:
            if not any(part in status.name for part in (": model", ": timing", ": camera ")):
                continue
            level = status.level[0] if isinstance(status.level, bytes) else int(status.level)
            pairs = ((pair.key, pair.value) for pair in status.values)
            by_node.setdefault(status.hardware_id, []).append(Status.of(status.name, level, status.message, pairs))
        with self._lock:
            for node, statuses in by_node.items():
                if not any(status.is_of_a_tokenizer for status in statuses):
                    continue
                if node not in self._statuses and len(self._statuses) < MAX_TOKENIZERS:
                    self._statuses[node] = None
                    self._look_now.trigger()
                for tokenizer in self._tokenizers.values():
                    if tokenizer.health.node == node:
                        tokenizer.health.on_statuses(statuses, now)

    def _on_log(self, message: Log) -> None:
        level = message.level[0] if isinstance(message.level, bytes) else int(message.level)
        with self._lock:
            self._log.add(level, message.name, message.msg, message.stamp.sec + message.stamp.nanosec / 1e9)

    def _sample(self) -> None:
        now = time.monotonic()
        with self._lock:
            for tokenizer in self._tokenizers.values():
                self._count(tokenizer, now)
                tokenizer.health.sample(now)

    @staticmethod
    def _count(tokenizer: _Tokenizer, now: float) -> None:
        subscriber = tokenizer.subscriber
        if subscriber is None:
            tokenizer.health.on_reception(Reception(), now)
        else:
            counts = ("transport", "received", "lost", "gaps", "restarts", "rejected")
            tokenizer.health.on_reception(Reception(**{name: getattr(subscriber, name) for name in counts}), now)

    def _look_if_due(self) -> None:
        if not self._tokenizers or time.monotonic() - self._looked >= LOOK_SEC:
            self._look()

    def _look(self) -> None:
        """Finds tokenizers, and subscribes to what pages show and to nothing else."""
        self._looked = now = time.monotonic()
        topics = self._token_topics()
        with self._lock:
            for topic, publishers in topics.items():
                if topic not in self._tokenizers and len(self._tokenizers) < MAX_TOKENIZERS:
                    self._tokenizers[topic] = _Tokenizer(TokenizerHealth(topic))
                if (tokenizer := self._tokenizers.get(topic)) is not None:
                    tokenizer.publishers = publishers
                    known = [node for node in publishers if node in self._statuses] or list(publishers)
                    tokenizer.health.node = known[0] if known else tokenizer.health.node
            tokenizers = dict(self._tokenizers)
            for topic, tokenizer in tokenizers.items():
                tokenizer.health.on_listed(topic in topics, now)
            wanted = {topic for topic in tokenizers if self._wanted[topic] > 0}
        for topic, tokenizer in tokenizers.items():
            asked = not self._passive or self._somebody_else_wants(topic, tokenizer)
            self._follow(topic, tokenizer, topic in wanted and asked)
        self._follow_images(
            {topic for tokenizer in tokenizers.values() if tokenizer.subscriber for topic in tokenizer.image_topics}
        )

    def _token_topics(self) -> dict[str, tuple[str, ...]]:
        """Topics that carry tokens → full names of the nodes that publish them."""
        found = {}
        for topic, types in self._node.get_topic_names_and_types():
            if "sensor_msgs/msg/CompressedImage" not in types:
                continue
            named = topic.endswith("/tokens")
            if not named and not self._statuses:
                continue
            infos = self._node.get_publishers_info_by_topic(topic)
            publishers = tuple(sorted(name for info in infos if (name := _full_name(info))))
            if infos and (named or any(node in self._statuses for node in publishers)):
                found[topic] = publishers
        return found

    def _somebody_else_wants(self, topic: str, tokenizer: _Tokenizer) -> bool:
        """Whether another subscriber than this feed reads a topic, as ROS's graph and the tokenizer's diagnostics say."""
        if tokenizer.health.shared_memory_readers:
            return True
        own = f"/_{self._node.get_name()}_tokens"
        names = map(_full_name, self._node.get_subscriptions_info_by_topic(topic))
        return any(name and not name.startswith(own) for name in names)

    def _follow(self, topic: str, tokenizer: _Tokenizer, wanted: bool) -> None:
        if wanted and tokenizer.subscriber is None:
            tokenizer.subscriber = TokenSubscriber(
                self._node,
                topic,
                callback=lambda tokens: self._on_tokens(topic, tokens),
                # Diagnostics count every reader in shared memory: a passive viewer must not be one of them.
                shared_memory=not self._passive,
            )
        elif not wanted and tokenizer.subscriber is not None:
            tokenizer.subscriber.close()
            tokenizer.subscriber = None
        if tokenizer.subscriber is not None:
            tokenizer.image_topics = self._image_topics(topic, tokenizer)

    def _on_tokens(self, topic: str, tokens: VisualTokens) -> None:
        tokenizer = self._tokenizers[topic]
        matches = self._history.match(tokens.views, tokenizer.image_topics)
        images = tuple(None if match is None else self._lazy(*match) for match in matches)
        with self._lock:
            before = tokenizer.snapshot.tokens if tokenizer.snapshot is not None else None
            tokenizer.snapshot = Snapshot(topic, tokens, images, before)
            tokenizer.health.on_tokens(tokenizer.snapshot.facts, tokens.age(time.time_ns()), time.monotonic())
        self.changed()

    def _lazy(self, topic: str, stamp_ns: int, data: bytes) -> LazyImage:
        kind = self._image_types[topic]
        return LazyImage(lambda: _page_image(kind, data), stamp_ns)

    # Cameras

    def _image_topics(self, topic: str, tokenizer: _Tokenizer) -> tuple[str, ...]:
        """The camera topics that the tokenizer subscribes to; those named after its cameras where ROS does not say."""
        found: list[str] = []
        namespace, _, name = tokenizer.health.node.rpartition("/")
        with contextlib.suppress(Exception):  # rclpy has several for a node that has gone
            for image_topic, types in self._node.get_subscriber_names_and_types_by_node(name, namespace or "/"):
                kind = next((t for t in types if t in _IMAGE_TYPES), None)
                if kind is not None and len(found) < MAX_IMAGE_TOPICS:
                    self._image_types.setdefault(image_topic, _IMAGE_TYPES[kind])
                    found.append(image_topic)
        if not found and tokenizer.snapshot is not None:
            beside = topic.rpartition("/")[0]
            for view in tokenizer.snapshot.tokens.views[:MAX_IMAGE_TOPICS]:
                found += self._published_image(f"{beside}/{view.camera.strip('/')}/image_raw")
        return tuple(found) or tokenizer.image_topics

    def _published_image(self, base: str) -> list[str]:
        with contextlib.suppress(Exception):  # a camera's name that no topic can have
            for image_topic in (base, f"{base}/compressed"):
                for info in self._node.get_publishers_info_by_topic(image_topic):
                    if info.topic_type in _IMAGE_TYPES:
                        self._image_types.setdefault(image_topic, _IMAGE_TYPES[info.topic_type])
                        return [image_topic]
        return []

    def _follow_images(self, wanted: set[str]) -> None:
        for topic in set(self._images) - wanted:
            self._node.destroy_subscription(self._images.pop(topic))
            self._history.forget(topic)
        for topic in wanted - set(self._images):
            self._images[topic] = self._subscribe_to_image(topic)

    def _subscribe_to_image(self, topic: str) -> Subscription:
        # Best-effort images are lost where Fast DDS's shared memory is smaller than a frame: reliably, where offered.
        offers = {info.qos_profile.reliability for info in self._node.get_publishers_info_by_topic(topic)}
        best_effort = not offers or ReliabilityPolicy.BEST_EFFORT in offers
        reliability = ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE

        def keep(data: bytes) -> None:
            with contextlib.suppress(ValueError):
                self._history.add(topic, header_stamp_ns(data), data)

        qos = QoSProfile(depth=5, reliability=reliability)
        return self._node.create_subscription(self._image_types[topic], topic, keep, qos, raw=True)


def _full_name(info: TopicEndpointInfo) -> str:
    """Of an endpoint's node; empty while ROS has found the endpoint and not yet its node."""
    if info.node_name == _UNKNOWN:
        return ""
    return f"{info.node_namespace.rstrip('/')}/{info.node_name}"


def _page_image(kind: type, data: bytes) -> PageImage:
    """ValueError for an image that cannot be read."""
    message: Any = deserialize_message(data, kind)
    check_message_size(message, MAX_PIXELS)
    return page_image(message)
