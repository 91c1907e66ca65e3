"""Receivers of token messages, each in a thread: `TopicReceiver` over DDS, `SharedMemoryReceiver` on one machine.

Both hand what they receive to a `TokenSink` and decide nothing: which of them delivers is up to `handover`.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from vla_perception.tokens.handover import PENDING_SEC
from vla_perception.tokens.shared_memory import WRITE_DONE, WRITE_STARTED, SharedMemoryError, TokenReader
from vla_perception.tokens.visual_tokens import VisualTokens

if TYPE_CHECKING:
    from rclpy.node import Node
    from rclpy.qos import QoSProfile
    from sensor_msgs.msg import CompressedImage

#: Seconds without data before checking that the writer is alive.
_SILENCE = 1.0
#: Seconds until shared memory is tried again after it failed.
_RETRY = 5.0
_numbers = itertools.count(1)


class TokenSink(Protocol):
    """What receivers hand messages to. Each receiver calls it from its own thread."""

    @property
    def wants_topic(self) -> bool:
        """Whether the topic is to be subscribed to now."""

    @property
    def pending(self) -> int:
        """Messages of shared memory that wait for the topic: `on_time` is to be called soon."""

    def on_topic(self, message: CompressedImage) -> None:
        """The topic has brought a message."""

    def on_subscribed(self, subscribed: bool) -> None:
        """The topic is subscribed to, or was left."""

    def on_topic_ended(self) -> None:
        """The topic's thread ends: closed, or ROS was shut down."""

    def on_shared_memory(self, data: memoryview | bytes, writer: int) -> VisualTokens | None:
        """Shared memory has brought a message's data, written by the run of the tokenizer that has this number.

        Returns:
            What it holds; None: it is damaged.
        """

    def on_time(self) -> None:
        """Some time has passed in shared memory."""

    def on_writers_gone(self, error: SharedMemoryError | None = None) -> None:
        """Nothing writes to shared memory any more, or it failed."""


class TopicReceiver:
    """Receives a topic in a thread, with a hidden node and an executor that nothing else uses.

    So reception depends neither on whether the policy spins its node nor on how long its callbacks take.

    Args:
        node: whose context, name and namespace are used.
        topic: resolved.

    Attributes:
        node: the hidden one, which this thread spins.
    """

    def __init__(self, node: Node, topic: str, qos: QoSProfile | int, sink: TokenSink) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from sensor_msgs.msg import CompressedImage

        self._topic = topic
        self._context = node.context
        self._sink = sink
        self._closed = False
        # Hidden by its underscore. Names are resolved already.
        self.node = rclpy.create_node(
            f"_{node.get_name()}_tokens_{next(_numbers)}",
            context=self._context,
            namespace=node.get_namespace(),
            use_global_arguments=False,
            enable_rosout=False,
            start_parameter_services=False,
        )
        self._subscribe: Callable = lambda: self.node.create_subscription(CompressedImage, topic, sink.on_topic, qos)
        self._subscription: Any = self._subscribe()
        self._update = self.node.create_guard_condition(self._follow_sink)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.thread = threading.Thread(target=self._run, name=f"tokens of {topic}", daemon=True)

    def start(self) -> None:
        # A daemon thread inside DDS while Python shuts down may crash: end it before.
        atexit.register(self.close)
        self.thread.start()

    def update(self) -> None:
        """Subscribes to the topic, or leaves it, as the sink wants now. From any thread."""
        from rclpy.exceptions import InvalidHandle

        with contextlib.suppress(InvalidHandle):  # the thread has ended, and subscribes to nothing any more
            self._update.trigger()

    def publishers(self) -> frozenset[bytes]:
        """Identifiers of the publishers that DDS lists; one that was killed stays listed for seconds."""
        infos = self.node.get_publishers_info_by_topic(self._topic)
        return frozenset(bytes(info.endpoint_gid) for info in infos)

    def close(self) -> None:
        """Ends the thread, which destroys the hidden node. At Python's exit where not before."""
        self._closed = True
        if threading.current_thread() is not self.thread:
            with contextlib.suppress(Exception):  # the thread may be done with it just now
                self._update.trigger()  # a callback ends `spin_once`; the executor's `wake` does not
            self.thread.join(5.0)

    def _follow_sink(self) -> None:
        if self._closed:
            return
        if self._sink.wants_topic and self._subscription is None:
            self._subscription = self._subscribe()
            self._sink.on_subscribed(True)
        elif not self._sink.wants_topic and self._subscription is not None:
            self.node.destroy_subscription(self._subscription)
            self._subscription = None
            self._sink.on_subscribed(False)

    def _run(self) -> None:
        from rclpy.executors import ExternalShutdownException, ShutdownException

        try:
            while not self._closed and self._context.ok():
                self._executor.spin_once(timeout_sec=1.0)
        except (ExternalShutdownException, ShutdownException):
            pass
        except Exception:
            if self._context.ok():  # otherwise ROS was shut down under it
                raise
        finally:
            self._closed = True
            self._sink.on_topic_ended()
            self._executor.shutdown(timeout_sec=1.0)
            self.node.destroy_node()
            atexit.unregister(self.close)


class SharedMemoryReceiver:
    """Receives a topic's shared memory in a thread. Where that fails it says so to the sink, and tries again later."""

    def __init__(self, topic: str, domain: int, sink: TokenSink) -> None:
        self._topic, self._domain, self._sink = topic, domain, sink
        self._closed = threading.Event()
        self._reader: TokenReader | None = None
        self._writer: int | None = None  # that `_sample` is of
        self._sample: bytes | None = None
        self.thread = threading.Thread(target=self._run, name=f"shared memory of {topic}", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if (reader := self._reader) is not None:
            reader.wake()
        self.thread.join(2.0)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                with contextlib.closing(TokenReader(self._topic, self._domain)) as self._reader:
                    try:
                        while not self._closed.is_set():
                            self._receive(self._reader)
                    finally:  # also where an error ends this thread: the topic must deliver then
                        self._sink.on_writers_gone()
            except SharedMemoryError as error:
                self._sink.on_writers_gone(error)
            self._closed.wait(_RETRY)

    def _receive(self, reader: TokenReader) -> None:
        """Waits for messages and hands them on."""
        events = reader.wait(PENDING_SEC / 5 if self._sink.pending else _SILENCE)
        if events == {WRITE_STARTED}:
            self._warm_caches()
        self._read_all(reader)
        if events and events <= {WRITE_STARTED, WRITE_DONE}:
            return
        if not events:
            reader.cleanup_dead_nodes()
        if not reader.writers() and not self._sink.wants_topic:
            self._read_all(reader)  # what it wrote last
            self._sink.on_writers_gone()

    def _read_all(self, reader: TokenReader) -> None:
        while (taken := reader.take()) is not None:
            data, writer = taken
            tokens = self._sink.on_shared_memory(data, writer)
            if tokens is not None and writer != self._writer:
                self._writer = writer
                self._sample = replace(tokens, data=tokens.data[..., :1], features=None, projector="sample").to_bytes()
        self._sink.on_time()

    def _warm_caches(self) -> None:
        """Reads something like the message that is being written meanwhile.

        Most of the time that a small task takes after a pause goes into fetching code and data into the processor's
        caches; so this is done while the message is written. What it reads is the writer's first message with one
        channel left.
        """
        if self._sample is not None:
            VisualTokens.from_bytes(self._sample)
