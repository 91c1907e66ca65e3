"""Where tokens go: the topic `tokens` and, beside it, shared memory for policies on this machine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque

from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CompressedImage

from vla_perception.tokens import VisualTokens, to_message
from vla_perception.tokens.shared_memory import SharedMemoryError, TokenWriter, unavailable_reason

#: Token messages kept for a reliable subscriber that is behind: 2 MiB each for openvla-7b.
DEPTH = 10
#: Seconds until shared memory is tried again after it failed; twice as long each time, up to the second number:
#: policies lose messages whenever they return to the topic.
_RETRY, _RETRY_AT_MOST = 5.0, 300.0


class TokenPublisher:
    """Publishes tokens on the topic `tokens` of `node`, reliably; `qos_overrides` parameters come first.

    A message is only built while the topic has subscribers, and only written to shared memory while that has readers.
    Every failure of shared memory is logged, once, and retried later; meanwhile messages go to the topic.

    Attributes:
        messages: published on the topic so far.
        written: written to shared memory so far.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._publisher = node.create_publisher(
            CompressedImage,
            "tokens",
            QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
        )
        self._writer: TokenWriter | None = None
        self._changing = threading.Lock()  # guards what follows
        self._opened: object | None = None  # one per `open_shared_memory`, until `close_shared_memory`
        self._timer: threading.Timer | None = None
        self._retry_sec = _RETRY
        self.messages = self.written = 0
        self._ages: deque[tuple[float, float]] = deque(maxlen=500)  # when, and how old the tokens were

    def open_shared_memory(self) -> None:
        """From here on policies on this machine may read from shared memory, if iceoryx2 is installed."""
        if reason := unavailable_reason():
            self._node.get_logger().info(f"tokens go by the topic alone, without shared memory: {reason}")
            return
        self.close_shared_memory()
        with self._changing:
            self._retry_sec = _RETRY
            self._opened = opened = object()
        self._open(opened)

    def _open(self, opened: object) -> None:
        try:
            writer = TokenWriter(self._publisher.topic_name, self._node.context.get_domain_id())
        except SharedMemoryError as error:
            self._leave_shared_memory(f"tokens go by the topic alone: {error}", opened)
            return
        with self._changing:
            if self._opened is opened:
                self._writer = writer
                return
        writer.close()

    def _leave_shared_memory(self, text: str, opened: object | None) -> None:
        """Sends on the topic alone for a while."""
        with self._changing:
            if opened is None or self._opened is not opened:
                return
            writer, self._writer = self._writer, None
            first, again = self._retry_sec == _RETRY, self._retry_sec
            self._retry_sec = min(2 * again, _RETRY_AT_MOST)
            self._timer = threading.Timer(again, self._open, (opened,))
            self._timer.daemon = True
            self._timer.start()
        if writer is not None:
            writer.close()
        if first:
            self._node.get_logger().warning(f"{text}; tried again in {again:g} s, later less often")

    def close_shared_memory(self) -> None:
        """Readers of shared memory return to the topic."""
        with self._changing:
            writer, self._writer, self._opened = self._writer, None, None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        if writer is not None:
            writer.close()

    def readers(self) -> int:
        """Policies that read from shared memory."""
        writer = self._writer
        return writer.readers() if writer is not None else 0

    def has_subscribers(self) -> bool:
        """Whether there is a subscriber of the topic or a reader of shared memory."""
        return self._publisher.get_subscription_count() > 0 or self.readers() > 0

    def may_wait(self) -> bool:
        """Whether `publish` may wait: a reliable topic does where a subscriber was killed; shared memory never does."""
        return self._publisher.get_subscription_count() > 0

    def publish(self, tokens: VisualTokens) -> None:
        """Sends one message, on the ways that have subscribers."""
        writer, reached = self._writer, 0
        if writer is not None and writer.readers():
            try:
                reached = writer.write(tokens)
            except SharedMemoryError as error:
                self._leave_shared_memory(f"tokens go by the topic alone: {error}", self._opened)
        self.written += bool(reached)
        self._ages.append((time.monotonic(), tokens.age(self._node.get_clock().now().nanoseconds)))
        if self._publisher.get_subscription_count() or not reached:
            self._publisher.publish(to_message(tokens))
            self.messages += 1

    def ages(self, seconds: float) -> list[float]:
        """How old the tokens of the last so many seconds were when they were published, by the node's clock: seconds."""
        begin = time.monotonic() - seconds
        return [age for published, age in tuple(self._ages) if published >= begin]

    def cleanup_dead_nodes(self) -> None:
        """Now and then: policies that were killed no longer count as readers."""
        writer = self._writer
        if writer is not None:
            with contextlib.suppress(SharedMemoryError):  # the next time may do better
                writer.cleanup_dead_nodes()
