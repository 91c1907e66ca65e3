"""`TokenSubscriber`: visual tokens as they arrive in a policy's node, checked, latest first. Needs rclpy.

    subscriber = TokenSubscriber(node)
    while rclpy.ok():
        tokens = subscriber.wait(timeout_sec=1.0)
        act(tokens.torch("cuda"))

A message's way: `transports` (a receiver's thread) → `handover` (does this transport deliver it now?) → `buffer`.
"""

from __future__ import annotations

import array
import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_perception.condition import condition_digest
from vla_perception.tokens.arrivals import Order, Senders
from vla_perception.tokens.buffer import POLL_SEC, TokenBuffer
from vla_perception.tokens.encode_service import is_final, published_sequence
from vla_perception.tokens.handover import TOPIC, Delivery, Handover
from vla_perception.tokens.message import from_message
from vla_perception.tokens.shared_memory import SharedMemoryError, unavailable_reason
from vla_perception.tokens.transports import SharedMemoryReceiver, TopicReceiver
from vla_perception.tokens.visual_tokens import TokenFormatError, VisualTokens

if TYPE_CHECKING:
    from rclpy.node import Node
    from rclpy.qos import QoSProfile
    from sensor_msgs.msg import CompressedImage

#: Seconds until a service that never answered before is asked again; twice as long each time.
_ASK_AGAIN = 1.0


class TokenSubscriber(TokenBuffer):
    """Visual tokens from the tokenizer's topic, or from shared memory where the tokenizer runs on this machine.

    Messages are received by threads of the subscriber, so `latest`, `wait` and `request` work in a plain loop without
    any executor, and inside a callback of any executor, and a policy that computes for long loses nothing but what is
    too old to matter. `callback` is called by the executor that spins `node`, like a subscription's. (rclpy's
    experimental EventsExecutor rejects the guard condition that this takes: read without a callback there.)

    It begins with the topic. As soon as shared memory brings messages, it leaves the topic, so that the tokenizer need
    not serialise them; when the writer there has gone, it returns. During a switch no message is delivered twice, and
    messages in flight on DDS are not counted as lost.

    It receives until `close()`, the end of a `with`, or the shutdown of ROS. Dropping it ends nothing, for its threads
    hold it: a program that makes one after the other closes each.

    Args:
        node: whose context, namespace, remappings, clock and logger are used.
        topic: relative to the node's namespace, as for a subscription, and remapped like one. `request` calls the
            service ``encode`` beside it.
        callback: called with the latest message, by the executor that spins `node`. Messages that come while it runs
            are skipped but for the latest, and counted in `skipped`; rejected ones are logged and not given.
        history, expect_fingerprint: as for `TokenBuffer`.
        qos: of the topic: QoS profile, or a depth for reliable reception of the last so many.
        shared_memory: false: only the topic. Where iceoryx2 is not installed (the extra ``shm``), so it is anyway.

    Attributes:
        topic: the resolved name.
        received, lost, gaps, restarts, rejected: counters, as of `TokenBuffer`.
        skipped: messages for which `callback` was not called because a newer one was there.
    """

    def __init__(
        self,
        node: Node,
        topic: str = "tokens",
        *,
        callback: Callable[[VisualTokens], None] | None = None,
        history: int = 1,
        expect_fingerprint: str | Mapping[str, object] | None = None,
        qos: QoSProfile | int = 10,
        shared_memory: bool = True,
    ) -> None:
        super().__init__(history, expect_fingerprint)
        self._node = node
        self._context = node.context
        self._callback = callback
        self._next: VisualTokens | None = None  # for the callback
        self.skipped = 0
        self.topic = node.resolve_topic_name(topic)
        self._service = node.resolve_service_name(self.topic.rpartition("/")[0] + "/encode")
        self._client: Any = None
        self._condition_publisher: Any = None
        self._answered: frozenset[bytes] = frozenset()  # publishers beside whose service it has answered
        self._publishers: frozenset[bytes] = frozenset()  # as listed when a message was last checked
        self._senders = Senders()
        self._guard = node.create_guard_condition(self._run_callback) if callback is not None else None

        self._intake = _Intake(self)
        self._receiver = TopicReceiver(node, self.topic, qos, self._intake)
        self._shared_memory: SharedMemoryReceiver | None = None
        if shared_memory and not unavailable_reason():
            self._shared_memory = SharedMemoryReceiver(self.topic, self._context.get_domain_id(), self._intake)
            self._shared_memory.start()
        self._receiver.start()

    @property
    def transport(self) -> str:
        """Where messages come from now: ``topic`` or ``shared memory``."""
        return self._intake.handover.transport

    def publishers(self) -> int:
        """How many publishers of the topic are known. More than one is a mistake: their tokens would mix."""
        return self._receiver.node.count_publishers(self.topic)

    def set_condition(self, vector: np.ndarray | Sequence[float], name: str = "") -> str:
        """Sends what modulates the encoders of a model with FiLM: the mean of the instruction's embeddings.

        It is latched: a tokenizer that starts later gets it, too. From here on this subscriber delivers tokens of that
        condition alone, so `wait` waits until the tokenizer has changed over.

        Args:
            vector: as many finite numbers as the model takes (the language model's width).
            name: for the tokenizer's log, such as the instruction.

        Returns:
            the digest (hex) that the tokens carry as `VisualTokens.condition`.
        """
        from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
        from sensor_msgs.msg import ChannelFloat32

        digest = condition_digest(vector)
        if self._condition_publisher is None:
            topic = self.topic.rpartition("/")[0] + "/condition"
            latched = QoSProfile(
                depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
            )
            self._condition_publisher = self._receiver.node.create_publisher(ChannelFloat32, topic, latched)
        self.expect_condition(digest)
        values = array.array("f", np.asarray(vector, np.float32).tobytes())
        self._condition_publisher.publish(ChannelFloat32(name=name, values=values))
        return digest

    def request(self, timeout_sec: float = 5.0) -> VisualTokens:
        """Asks the tokenizer to encode its latest images, and waits for their tokens.

        For a tokenizer with ``trigger: on_request``. It is asked again where it has no image yet that is newer than
        those of the last request, is not active yet, or has not answered anything yet; not where its settings rule it
        out (``trigger: continuous``).

        Raises:
            TimeoutError: no service, no answer or no tokens in time.
            RuntimeError: the tokenizer could not in time, or never will as it is set; the text is its reason.
            TokenFormatError, FingerprintMismatchError: the tokens that came were rejected.
        """
        try:
            return self._request(timeout_sec)
        except Exception:
            self._raise_if_closed()  # what ROS says of a client whose context has ended is not the reason
            raise

    def _request(self, timeout_sec: float) -> VisualTokens:
        from std_srvs.srv import Trigger

        begin, reason, repeated = time.monotonic(), "", False
        with self._changed:
            if self._client is None:
                self._client = self._receiver.node.create_client(Trigger, self._service)
            client = self._client
            self._wait_for(
                client.service_is_ready, timeout_sec, f"no service {self._service} (is the tokenizer active?)"
            )
            before, rejected = self.received, self.rejected
        while True:
            try:
                answer, asked = self._call(client, Trigger.Request(), timeout_sec, begin)
            except TimeoutError:
                if reason:
                    raise RuntimeError(f"{self._service}: {reason}") from None
                raise
            repeated |= asked > 1
            if answer.success or repeated and self.received > before:  # what it was first asked for has come
                break
            # Most often there is no newer image yet, or the tokenizer does not know this subscription yet.
            reason = answer.message
            if is_final(reason) or time.monotonic() + POLL_SEC > begin + timeout_sec:
                raise RuntimeError(f"{self._service}: {reason}")
            with self._changed:
                self._raise_if_closed()
            time.sleep(POLL_SEC)
        with self._changed:
            wanted = published_sequence(answer.message) if answer.success else None

            def arrived() -> bool:
                if not self._can_pop():
                    return False
                if self.rejected > rejected:
                    return True
                return self.received > before and (
                    wanted is None or self._last is not None and self._last.sequence >= wanted
                )

            self._wait_for(arrived, timeout_sec, f"{self._service} has answered, but no tokens came", begin)
            return self._pop_latest()

    def _call(self, client, request, timeout_sec: float, begin: float):
        """The service's answer, and how often it was asked; TimeoutError if none has come `timeout_sec` after `begin`.

        While processes get to know each other, a service may know a client well enough to hear it and not yet well
        enough to answer: Fast DDS then drops the answer after 0.1 s. So a tokenizer that has not answered yet is asked
        again; one that has is not, since encoding may take its time.
        """
        publishers = self._receiver.publishers()
        futures: list[Any] = []
        wait = math.inf if publishers & self._answered else _ASK_AGAIN
        ask_again = 0.0

        def answers() -> list:
            return [future for future in futures if future.done()]

        def answered_or_due() -> bool:
            return bool(answers()) or time.monotonic() >= ask_again

        try:
            while not answers():
                futures.append(client.call_async(request))
                futures[-1].add_done_callback(lambda _future: self._notify())
                ask_again, wait = time.monotonic() + wait, 2 * wait
                with self._changed:
                    self._wait_for(answered_or_due, timeout_sec, f"no answer from {self._service}", begin)
            self._answered = publishers
            return answers()[0].result(), len(futures)
        finally:
            for future in futures:
                if not future.done():
                    client.remove_pending_request(future)

    def close(self) -> None:
        """Ends reception: threads, subscription and the place in shared memory. At Python's exit where not before."""
        super().close()
        self._receiver.close()
        guard, self._guard = self._guard, None
        if guard is not None and self._context.ok():
            self._node.destroy_guard_condition(guard)

    # In the threads of the receivers

    def _deliver(self, delivery: Delivery) -> None:
        try:
            self._take_in(delivery)
        except Exception:
            if self._context.ok():  # otherwise ROS was shut down under it
                raise

    def _take_in(self, delivery: Delivery) -> None:
        from rclpy.exceptions import InvalidHandle

        tokens, restarts, now = delivery.tokens, self.restarts, time.monotonic()
        order = self.push(tokens, lambda: self._another_publisher(delivery))
        if order is not None and (not self._publishers or self.restarts != restarts):
            self._publishers = self._receiver.publishers()
        self._senders.add(tokens.sequence, now)
        # The list alone says nothing: a publisher that was killed stays there for seconds.
        if self._senders.take_turns(now) and (count := self.publishers()) > 1:
            self._log_throttled(
                "publishers", f"{count} publishers on {self.topic}: their tokens mix; name topics apart"
            )
        if order is not None and (guard := self._guard) is not None:
            with self._changed:
                late = order is Order.LATE
                self.skipped += late or self._next is not None
                self._next = self._next if late else tokens
            with contextlib.suppress(InvalidHandle):  # the node was destroyed: nothing calls `callback` any more
                guard.trigger()

    def _another_publisher(self, delivery: Delivery) -> bool:
        """Whether another publisher sent the message before, as far as is known."""
        if delivery.another_run is not None:
            return delivery.another_run
        known, self._publishers = self._publishers, self._receiver.publishers()
        if not known:  # those of the topic; if the last message came by shared memory, its writer has gone since
            return delivery.previous_writer is not None
        # One that was killed stays listed for seconds: a new one beside it is its successor. When it leaves the list,
        # that tells nothing.
        return not (self._publishers and self._publishers <= known)

    def _end(self) -> None:
        """The topic's thread ends, and with it what uses its node."""
        self._closed = True
        self._notify()
        if self._shared_memory is not None:
            self._shared_memory.close()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # In the executor of the policy's node

    def _run_callback(self) -> None:
        with self._changed:
            tokens, self._next = self._next, None
        if tokens is not None and self._callback is not None:
            self._callback(tokens)

    # What `TokenBuffer` asks

    def _now_ns(self) -> int:
        return self._node.get_clock().now().nanoseconds

    def _timeout_hint(self) -> str:
        if self.rejected and not self.received:
            return f": {self.rejected} messages were rejected"
        count = self.publishers()
        if not count:
            return (
                f": {self.topic} has no publisher; is the tokenizer active, and are namespace and ROS_DOMAIN_ID the "
                "same?"
            )
        nothing = f": {self.topic} has {count} publisher(s) that sent nothing{' new' if self.received else ''}"
        if self._client is None:
            return f"{nothing}; do its cameras run? With trigger on_request it sends only when asked: request()"
        return nothing

    def _raise_if_closed(self) -> None:
        if not self._context.ok():
            from rclpy.executors import ExternalShutdownException

            raise ExternalShutdownException
        super()._raise_if_closed()

    def _log(self, text: str, error: bool) -> None:
        if self._context.ok():
            logger = self._node.get_logger()
            logger.error(text) if error else logger.warning(text)


class _Intake:
    """The receivers' `TokenSink`: decodes messages, asks `Handover` which to deliver, and delivers them in order."""

    def __init__(self, subscriber: TokenSubscriber) -> None:
        self.handover = Handover()
        self._subscriber = subscriber
        self._lock = threading.Lock()  # of the receivers' two threads: messages are delivered one after the other
        self._wanted = True  # as the topic's receiver has it

    @property
    def wants_topic(self) -> bool:
        return self.handover.transport == TOPIC

    @property
    def pending(self) -> int:
        return self.handover.pending

    def on_topic(self, message: CompressedImage) -> None:
        with self._lock:
            if not self.wants_topic:
                return  # shared memory has it
            try:
                tokens = from_message(message)
            except TokenFormatError as error:
                self._subscriber.reject(error)
                return
            self._deliver(self.handover.on_topic(tokens, time.monotonic()))

    def on_subscribed(self, subscribed: bool) -> None:
        with self._lock:
            self.handover.on_subscribed(subscribed)

    def on_topic_ended(self) -> None:
        self._subscriber._end()

    def on_shared_memory(self, data: memoryview | bytes, writer: int) -> VisualTokens | None:
        with self._lock:
            try:
                tokens = VisualTokens.from_bytes(data)
            except TokenFormatError as error:
                self._subscriber.reject(error)
                return None
            self._deliver(self.handover.on_shared_memory(tokens, writer, time.monotonic()))
            return tokens

    def on_time(self) -> None:
        with self._lock:
            self._deliver(self.handover.on_time(time.monotonic()))

    def on_writers_gone(self, error: SharedMemoryError | None = None) -> None:
        with self._lock:
            self.handover.on_writers_gone()
            self._update_subscription()
        if error is not None:
            self._subscriber._log_throttled("shared memory", f"tokens come by the topic: {error}", period=600)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            self._subscriber._deliver(delivery)
        self._update_subscription()

    def _update_subscription(self) -> None:
        if self.wants_topic != self._wanted and not self._subscriber._closed:
            self._wanted = self.wants_topic
            self._subscriber._receiver.update()
