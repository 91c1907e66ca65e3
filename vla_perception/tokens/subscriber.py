"""What a policy node imports: visual tokens as they arrive, checked, latest first.

`TokenSubscriber` reads them from the tokenizer's topic, `LocalTokenizer` computes them in the policy's own process;
both are read in the same way, and both give `VisualTokens`. Needs NumPy (and rclpy for `TokenSubscriber`); torch
only where tokens are asked for as torch tensors.

    tokens = TokenSubscriber(node)
    while rclpy.ok():
        visual = tokens.wait(timeout_sec=1.0)
        act(visual.torch("cuda"))
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vla_perception.tokens.arrivals import Order, Senders, StampOrder
from vla_perception.tokens.encode_service import FINAL
from vla_perception.tokens.fingerprint import difference, expectation
from vla_perception.tokens.shared_memory import (
    WRITE_DONE,
    WRITE_STARTED,
    SharedMemoryError,
    TokenReader,
    unavailable_reason,
)
from vla_perception.tokens.visual_tokens import TokenFormatError, View, VisualTokens, all_finite, from_message

if TYPE_CHECKING:
    import numpy as np
    from rclpy.node import Node
    from rclpy.qos import QoSProfile

    from vla_perception.tokenizer import VisualTokenizer

__all__ = [
    "FingerprintMismatchError",
    "LocalTokenizer",
    "TokenFormatError",
    "TokenSubscriber",
    "VisualTokens",
    "tokenize",
]

#: Seconds between two log lines of the same kind: what happens at every message is told, not shouted.
_LOG_PERIOD = 5.0
_POLL = 0.05
#: Seconds of silence in shared memory after which it is looked whether the tokenizer is still there.
_SILENCE = 1.0
#: Seconds until shared memory is tried again after it failed.
_RETRY = 5.0
#: Seconds that what shared memory brings first waits for what the topic is still bringing.
_HAND_OVER = 0.5
#: Seconds until a service that never answered before is asked again; twice as long each time.
_ASK_AGAIN = 1.0
_numbers = itertools.count(1)


class FingerprintMismatchError(ValueError):
    """Tokens of other weights or another preprocessing than the policy was made for."""


class _Tokens:
    """The latest sets of tokens, for any number of threads. No ROS in here.

    Attributes:
        received: sets that were accepted.
        lost: sets that were published and never arrived here, told by gaps in the sequence numbers.
        gaps: how often some were lost.
        restarts: how often the sequence began anew or the fingerprint changed: another tokenizer. Not a loss.
        rejected: messages that were not accepted: another schema, damaged, or of other weights.
    """

    def __init__(self, history: int, expect_fingerprint: str | Mapping[str, object] | None) -> None:
        if history < 1:
            raise ValueError(f"history must be at least 1, got {history}")
        self._expected, self._expected_inputs = None, None
        if expect_fingerprint is not None:
            self._expected, self._expected_inputs = expectation(expect_fingerprint)
        self._mismatch = ("", "")  # the last wrong fingerprint, and what is wrong with it
        self._changed = threading.Condition()
        self._history: deque[VisualTokens] = deque(maxlen=history)
        self._order = StampOrder()
        self._last: VisualTokens | None = None
        self._refusal: ValueError | None = None
        self._renewed = 0  # how often `latest` has changed
        self._waited = (0, 0)  # renewed and refused, when a wait returned last
        self._closed = False
        self._told: dict[str, float] = {}
        self.received = self.lost = self.gaps = self.restarts = self.rejected = 0

    # Reading

    @property
    def latest(self) -> VisualTokens | None:
        """The latest set, or None before the first one.

        It stays the latest however old it gets: see `latest_within` and `age`.

        Raises:
            TokenFormatError, FingerprintMismatchError: the last message was refused, so what came before it may be of
                another tokenizer than the one that runs now.
        """
        with self._changed:
            self._raise_refusal()
            return self._history[-1] if self._history else None

    @property
    def history(self) -> tuple[VisualTokens, ...]:
        """The last `history` sets, oldest first; fewer until as many have come. Raises like `latest`.

        It begins anew when the tokenizer restarts or stamps jump back (a bag that loops), so that frames that are
        stacked belong together. A set that is only late, by its stamp, goes to its place before the latest one (not
        older than all of the last 8: `arrivals.StampOrder`). Lost sets leave holes: compare `sequence` where that
        matters.
        """
        with self._changed:
            self._raise_refusal()
            return tuple(self._history)

    def wait(self, timeout_sec: float | None = None) -> VisualTokens:
        """The latest set that no `wait` has returned before; waits for one if need be.

        Args:
            timeout_sec: how long to wait at most; None: for ever.

        Raises:
            TimeoutError: none came; the text says what is known of the reason.
            TokenFormatError, FingerprintMismatchError: a message was refused, and nothing better has come since.
        """
        with self._changed:
            renewed, refused = self._waited
            try:
                self._wait_for(
                    lambda: self._renewed > renewed or self.rejected > refused, timeout_sec, "no new visual tokens"
                )
            except TimeoutError:
                self._raise_refusal()
                raise
            return self._taken()

    def latest_within(self, max_age_sec: float) -> VisualTokens | None:
        """The latest set if its oldest valid image is at most `max_age_sec` old, else None. Raises like `latest`.

        None as well if its stamps lie more than `max_age_sec` in the future: then the camera's clock and this one
        differ, and no age can be told.
        """
        latest = self.latest
        if latest is None:
            return None
        age = self.age(latest)
        if age < -max_age_sec:
            self._tell("clock", f"visual tokens are stamped {-age:.3f} s in the future: synchronise the clocks")
        return latest if abs(age) <= max_age_sec else None

    def age(self, tokens: VisualTokens | None = None) -> float:
        """Seconds since the oldest valid image behind `tokens` (the latest ones) was taken, by its stamp.

        Infinite where there are no tokens, or no valid view.
        """
        tokens = self.latest if tokens is None else tokens
        return math.inf if tokens is None else tokens.age(self._now_ns())

    def close(self) -> None:
        """Ends reception; whoever waits gets a RuntimeError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # Filling

    def _accept(self, tokens: VisualTokens) -> bool:
        """Takes one set in; False if it was refused."""
        if self._expected is not None and not tokens.fingerprint.startswith(self._expected):
            self._refuse(FingerprintMismatchError(self._told_apart(tokens)))
            return False
        self._expected_inputs = tokens.fingerprint_inputs or self._expected_inputs
        if tokens.weights == "random":
            self._tell(
                "random", f"the tokens of {tokens.model!r} come from random weights: they mean nothing", period=600
            )
        restarted = missing = 0
        with self._changed:
            last = self._last
            if last is not None:
                restarted = tokens.sequence <= last.sequence or tokens.fingerprint != last.fingerprint
                missing = 0 if restarted else tokens.sequence - last.sequence - 1
        if missing and self._another_publisher():
            restarted, missing = True, 0
        with self._changed:
            if restarted:
                self.restarts += 1
            elif missing:
                self.gaps += 1
                self.lost += missing
            same = last is not None and (tokens.cameras, tokens.shape) == (last.cameras, last.shape)
            if restarted or not same:
                self._order = StampOrder()
                self._history.clear()
            order = self._order.add(tokens.stamp_ns)
            if order is Order.SET_BACK:
                self._history.clear()
            self._put_in_place(tokens)
            self._last = tokens
            self._refusal = None
            self._renewed += order is not Order.LATE
            self.received += 1
            self._changed.notify_all()
        if restarted:
            self._tell("restart", f"the tokenizer started anew (sequence {last.sequence} → {tokens.sequence})")
            if tokens.fingerprint != last.fingerprint:
                self._tell("weights", f"the tokens' fingerprint changed to {tokens.fingerprint[:16]}…")
        elif missing:
            self._tell(
                "lost",
                f"{missing} sets of visual tokens were lost before sequence {tokens.sequence} ({self.lost} in all)",
            )
        return True

    def _put_in_place(self, tokens: VisualTokens) -> None:
        """Into the history, in the order of stamps; of equal ones in that of arrival. With `_changed` held."""
        newer = []
        while self._history and self._history[-1].stamp_ns > tokens.stamp_ns:
            newer.append(self._history.pop())
        if len(self._history) + len(newer) < self._history.maxlen or self._history:
            self._history.append(tokens)  # where it is full, the oldest one leaves
        self._history.extend(reversed(newer))

    def _told_apart(self, tokens: VisualTokens) -> str:
        """What is wrong with tokens of another fingerprint than the expected one."""
        if self._mismatch[0] != tokens.fingerprint:
            why = difference(self._expected, self._expected_inputs, tokens.fingerprint_inputs, tokens.fingerprint)
            if tokens.fingerprint_inputs is None and tokens.weights == "random":
                why = f"random weights of a preset without options came: pool {tokens.pool}, prepare [], {tokens.projector}"
            text = (
                f"the tokens of model {tokens.model!r} have the fingerprint {tokens.fingerprint[:16]}…, expected was "
                f"{self._expected[:16]}…: they come from other weights or another preprocessing than this policy is "
                f"for ({why}); start the tokenizer with the policy's checkpoint and options"
            )
            self._mismatch = (tokens.fingerprint, text)
        return self._mismatch[1]

    def _refuse(self, error: ValueError) -> None:
        with self._changed:
            self.rejected += 1
            self._refusal = error
            self._changed.notify_all()
        self._tell(f"refused, {type(error).__name__}", f"visual tokens refused: {error}", error=True)

    # What the kinds of source differ in

    def _now_ns(self) -> int:
        return time.time_ns()

    def _another_publisher(self) -> bool:
        """Whether the last set came from another publisher, as far as can be told."""
        return False

    def _why_nothing(self) -> str:
        return ""

    def _alive(self) -> None:
        """Raises if nothing can come any more."""
        if self._closed:
            raise RuntimeError("these tokens are closed")

    def _log(self, text: str, error: bool) -> None:
        import logging

        logging.getLogger(__name__).log(logging.ERROR if error else logging.WARNING, text)

    # Helpers

    def _tell(self, kind: str, text: str, error: bool = False, period: float = _LOG_PERIOD) -> None:
        now = time.monotonic()
        if now - self._told.get(kind, -math.inf) >= period:
            self._told[kind] = now
            self._log(text, error)

    def _taken(self) -> VisualTokens:
        """The latest set, for a wait that ends; with `_changed` held."""
        self._waited = (self._renewed, self.rejected)
        self._raise_refusal()
        return self._history[-1]

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            # A new one each time: threads must not share a traceback.
            raise type(self._refusal)(*self._refusal.args)

    def _wait_for(
        self, condition: Callable[[], object], timeout_sec: float | None, what: str, begin: float | None = None
    ) -> None:
        """Waits with `_changed` held, until `timeout_sec` after `begin` (now, where not given).

        In slices, because a shutdown of ROS wakes nobody.
        """
        begin = time.monotonic() if begin is None else begin
        end = None if timeout_sec is None else begin + timeout_sec
        while not condition():
            self._alive()
            left = _POLL if end is None else end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{what} within {timeout_sec:g} s{self._why_nothing()}")
            self._changed.wait(min(left, _POLL))


class TokenSubscriber(_Tokens):
    """Visual tokens from the tokenizer's topic, or from shared memory where the tokenizer runs on this machine.

    Messages are taken in by a thread of its own, so `latest`, `wait` and `request` work in a plain loop without any
    executor, and inside a callback of any executor, and a policy that computes for long loses nothing but what is
    too old to matter. `callback` is called by the executor that spins `node`, like a subscription's. (rclpy's
    experimental EventsExecutor refuses the guard condition that this takes: read without a callback there.)

    It begins with the topic. As soon as shared memory brings sets, it leaves the topic, so that the tokenizer need not
    serialise them; when the writer there has gone, it returns. Neither counts as a loss or gives a set twice.

    It receives until `close()`, the end of a `with`, or the shutdown of ROS. Dropping it ends nothing, for its threads
    hold it: a program that makes one after the other closes each.

    Args:
        node: whose context, namespace, remappings, clock and logger are used.
        topic: relative to the node's namespace, as for a subscription, and remapped like one.
        callback: called with the latest set, by the executor that spins `node`. Sets that come while it runs are
            skipped but for the latest, and counted in `skipped`; refused messages are logged and not given.
        callback_group: of `callback`; the node's default one where not given.
        history: how many sets `history` keeps.
        expect_fingerprint: refuse tokens of another tokenizer. The 64 digits, or their first ones (8 at least); or
            `VisualTokenizer.metadata()`, whose `FingerprintMismatchError` always says what differs.
        service: of `request`; ``encode`` beside the topic where not given.
        qos: of the topic: QoS profile, or a depth for reliable reception of the last so many.
        shared_memory: false: only the topic. Where iceoryx2 is not installed (the extra ``shm``), so it is anyway.

    Attributes:
        topic: the resolved name.
        transport: where the sets come from now, ``topic`` or ``shared memory``.
        received, lost, gaps, restarts, rejected: counters.
        skipped: sets for which `callback` was not called because a newer one was there.
    """

    def __init__(
        self,
        node: Node,
        topic: str = "tokens",
        *,
        callback: Callable[[VisualTokens], None] | None = None,
        callback_group=None,
        history: int = 1,
        expect_fingerprint: str | Mapping[str, object] | None = None,
        service: str | None = None,
        qos: QoSProfile | int = 10,
        shared_memory: bool = True,
    ) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from sensor_msgs.msg import CompressedImage

        super().__init__(history, expect_fingerprint)
        self._node = node
        self._context = node.context
        self._callback = callback
        self._waiting: VisualTokens | None = None
        self.skipped = 0
        self.topic = node.resolve_topic_name(topic)
        beside = self.topic.rpartition("/")[0] + "/encode"
        self._service = node.resolve_service_name(beside if service is None else service)
        self._client = None
        self._answered: frozenset[bytes] = frozenset()  # publishers beside whose service it has answered
        self._publishers: frozenset[bytes] = frozenset()
        self._senders = Senders()
        self._guard = None
        if callback is not None:
            self._guard = node.create_guard_condition(self._call_back, callback_group)

        # A node of its own (hidden by its underscore) in an executor of its own: reception depends neither on
        # whether the policy spins nor on how long its callbacks take. Names are resolved already.
        self._private = rclpy.create_node(
            f"_{node.get_name()}_tokens_{next(_numbers)}",
            context=self._context,
            namespace=node.get_namespace(),
            use_global_arguments=False,
            enable_rosout=False,
            start_parameter_services=False,
        )
        self._subscribe = lambda: self._private.create_subscription(CompressedImage, self.topic, self._take, qos)
        self._subscription = self._subscribe()
        self._resubscribe = self._private.create_guard_condition(self._follow_transport)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._private)

        self._taking = threading.Lock()  # of the two threads that take sets in, and for what follows
        self.transport = "topic"
        self._taken_from_topic: deque[tuple] = deque(maxlen=32)
        self._taken_from_shared_memory: deque[tuple] = deque(maxlen=32)  # while the topic may still bring them
        self._held: list[tuple[VisualTokens, int]] = []  # of shared memory, while the topic still brings sets
        self._held_since = 0.0
        self._writer: int | None = None  # of the last set; None: it came by the topic
        self._new_writer = False
        self._reader: TokenReader | None = None
        self._rehearsal: bytes | None = None

        self._reading: threading.Thread | None = None
        if shared_memory and not unavailable_reason():
            name = f"shared memory of {self.topic}"
            self._reading = threading.Thread(target=self._read, name=name, daemon=True)
            self._reading.start()
        self._thread = threading.Thread(target=self._receive, name=f"tokens of {self.topic}", daemon=True)
        # A daemon thread inside DDS while Python takes itself apart may crash: end it before.
        atexit.register(self.close)
        self._thread.start()

    def publishers(self) -> int:
        """How many publishers of the topic are known. More than one is a mistake: their tokens would mix."""
        return self._private.count_publishers(self.topic)

    def request(self, timeout_sec: float = 5.0) -> VisualTokens:
        """Asks the tokenizer to encode its latest images, and waits for that set.

        For a tokenizer with ``trigger: on_request``. It is asked again where it has no image yet that is newer than
        those of the last request, is not active yet, or has not answered anything yet; not where its settings rule it
        out (``trigger: continuous``).

        Raises:
            TimeoutError: no service, no answer or no tokens in time.
            RuntimeError: the tokenizer could not in time, or never will as it is set; the text is its reason.
            TokenFormatError, FingerprintMismatchError: the tokens that came were refused.
        """
        try:
            return self._request(timeout_sec)
        except Exception:
            self._alive()  # what ROS says of a client whose context has ended is not the reason
            raise

    def _request(self, timeout_sec: float) -> VisualTokens:
        from std_srvs.srv import Trigger

        begin, reason, repeated = time.monotonic(), "", False
        with self._changed:
            if self._client is None:
                self._client = self._private.create_client(Trigger, self._service)
            client = self._client
            self._wait_for(
                client.service_is_ready, timeout_sec, f"no service {self._service} (is the tokenizer active?)"
            )
            before, refused = self.received, self.rejected
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
            if reason.startswith(FINAL) or time.monotonic() + _POLL > begin + timeout_sec:
                raise RuntimeError(f"{self._service}: {reason}")
            with self._changed:
                self._alive()
            time.sleep(_POLL)
        with self._changed:
            wanted = _sequence_in(answer.message) if answer.success else None

            def arrived() -> bool:
                if self.rejected > refused:
                    return True
                return self.received > before and (wanted is None or self._last.sequence >= wanted)

            self._wait_for(arrived, timeout_sec, f"{self._service} has answered, but no tokens came", begin)
            return self._taken()

    def _call(self, client, request, timeout_sec: float, begin: float):
        """The service's answer, and how often it was asked; TimeoutError if none has come `timeout_sec` after `begin`.

        While processes get to know each other, a service may know a client well enough to hear it and not yet well
        enough to answer: Fast DDS then drops the answer after 0.1 s. So a tokenizer that has not answered yet is asked
        again; one that has is not, since encoding may take its time.
        """
        publishers, futures = self._look_up_publishers(), []
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
        if threading.current_thread() is not self._thread:
            with contextlib.suppress(Exception):  # the thread may be done with it just now
                self._executor.wake()
            self._thread.join(5.0)
        if self._guard is not None and self._context.ok():
            self._node.destroy_guard_condition(self._guard)
            self._guard = None

    # In the thread of the topic

    def _receive(self) -> None:
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
            self._notify()
            if self._reading is not None:  # it uses what is destroyed now
                if (reader := self._reader) is not None:
                    reader.wake()
                self._reading.join(2.0)
            self._executor.shutdown(timeout_sec=1.0)
            self._private.destroy_node()
            atexit.unregister(self.close)

    def _follow_transport(self) -> None:
        """Subscribes to the topic, or leaves it."""
        if self.transport == "topic" and self._subscription is None:
            self._subscription = self._subscribe()
        elif self.transport != "topic" and self._subscription is not None:
            self._private.destroy_subscription(self._subscription)
            with self._taking:
                self._subscription = None
                self._taken_from_shared_memory.clear()

    def _take(self, message) -> None:
        with self._taking:
            if self.transport != "topic":
                return  # shared memory has it
            try:
                tokens = from_message(message)
            except TokenFormatError as error:
                self._refuse(error)
                return
            if _identity(tokens) in self._taken_from_shared_memory:
                return  # it was on its way when shared memory came and went
            if self._held and tokens.sequence >= self._held[0][0].sequence:
                self._hand_over(at_once=True)  # the topic has nothing before it any more, and shared memory has it
                return
            self._taken_from_topic.append(_identity(tokens))
            self._give(tokens)
            self._writer = None
            self._hand_over()

    # In the thread of shared memory

    def _read(self) -> None:
        domain = self._context.get_domain_id()
        while not self._closed:
            try:
                with contextlib.closing(TokenReader(self.topic, domain)) as self._reader:
                    try:
                        while not self._closed:
                            self._read_on(self._reader)
                    finally:  # whatever it is that ends this thread, the topic must not stay left
                        self._use_topic()
            except SharedMemoryError as error:
                self._tell("shared memory", f"tokens come by the topic: {error}", period=600)
            with self._changed:
                end = time.monotonic() + _RETRY
                while not self._closed and (left := end - time.monotonic()) > 0:
                    self._changed.wait(left)

    def _read_on(self, reader: TokenReader) -> None:
        """Waits for sets and takes them in."""
        events = reader.wait(_HAND_OVER / 5 if self._held else _SILENCE)
        if events == {WRITE_STARTED}:
            self._rehearse()
        self._take_written(reader)
        if events and events <= {WRITE_STARTED, WRITE_DONE}:
            return
        if not events:
            reader.cleanup_dead_nodes()
        if not reader.writers() and self.transport != "topic":
            self._take_written(reader)  # its last words
            self._use_topic()

    def _rehearse(self) -> None:
        """Reads something like the set that is being written meanwhile.

        Most of the time that a small thing takes after a pause goes into fetching code and data into the processor's
        caches; so this is done when the set comes. What it reads is the last writer's first set with one channel left.
        """
        if self._rehearsal is not None:
            VisualTokens.from_bytes(self._rehearsal)

    def _take_written(self, reader: TokenReader) -> None:
        while (taken := reader.take()) is not None:
            data, writer = taken
            with self._taking:
                try:
                    tokens = VisualTokens.from_bytes(data)
                except TokenFormatError as error:
                    self._refuse(error)
                    continue
                if self.transport == "topic":
                    self._held_since = self._held_since if self._held else time.monotonic()
                    self._held.append((tokens, writer))
                else:
                    self._give_written(tokens, writer)
        if self._held:
            with self._taking:
                self._hand_over()

    def _hand_over(self, at_once: bool = False) -> None:
        """From the topic to shared memory, when what it brought follows what the topic did; with `_taking` held.

        A set may still be on its way through DDS while shared memory brings the next one. It is waited for, so that
        sets stay in order and it is not counted as lost.
        """
        if not self._held:
            return
        (first, writer), last = self._held[0], self._last
        behind = (
            last is not None
            and self._writer in (None, writer)  # otherwise another tokenizer, whose numbers say nothing about the last
            and last.sequence < first.sequence - 1
            and _identity(first) not in self._taken_from_topic
        )
        if behind and not at_once and time.monotonic() - self._held_since < _HAND_OVER:
            return
        self.transport = "shared memory"
        held, self._held = self._held, []
        for tokens, writer in held:
            if _identity(tokens) not in self._taken_from_topic:
                self._give_written(tokens, writer)
        self._taken_from_topic.clear()
        self._resubscribe.trigger()

    def _give_written(self, tokens: VisualTokens, writer: int) -> None:
        self._new_writer = self._writer is not None and writer != self._writer
        if writer == self._writer and self._last is not None and tokens.sequence <= self._last.sequence:
            return  # a writer that changed to a larger segment: its next set was there before its last one
        if writer != self._writer:
            small = replace(tokens, data=tokens.data[..., :1], features=None, projector="rehearsal")
            self._rehearsal = small.to_bytes()
        if self._subscription is not None:
            self._taken_from_shared_memory.append(_identity(tokens))
        self._give(tokens)
        self._writer = writer

    def _use_topic(self) -> None:
        with self._taking:
            self.transport = "topic"
            self._held = []  # the topic was not left yet, and brings them too
            if not self._closed:
                self._resubscribe.trigger()

    # In both

    def _give(self, tokens: VisualTokens) -> None:
        if self._accept(tokens) and self._callback is not None:
            with self._changed:
                late = self._history[-1] is not tokens
                self.skipped += late or self._waiting is not None
                self._waiting = self._waiting if late else tokens
            self._guard.trigger()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # In the executor of the policy's node

    def _call_back(self) -> None:
        with self._changed:
            tokens, self._waiting = self._waiting, None
        if tokens is not None:
            self._callback(tokens)

    def _accept(self, tokens: VisualTokens) -> bool:
        restarts, now = self.restarts, time.monotonic()
        accepted = super()._accept(tokens)
        if accepted and (not self._publishers or self.restarts != restarts):
            self._look_for_publishers()
        self._senders.add(tokens.sequence, now)
        # The list alone tells nothing: a publisher that was killed stays there for seconds.
        if self._senders.take_turns(now) and (count := self.publishers()) > 1:
            self._tell("publishers", f"{count} publishers on {self.topic}: their tokens mix; name topics apart")
        return accepted

    def _another_publisher(self) -> bool:
        if self.transport != "topic" and self._writer is not None:
            return self._new_writer
        known = self._publishers
        self._look_for_publishers()
        if not known:  # those of the topic; if the last set came by shared memory, its writer has gone since
            return self._writer is not None
        # One that was killed stays listed for seconds: a new one beside it is its successor. When it leaves the list,
        # that tells nothing.
        return not (self._publishers and self._publishers <= known)

    def _look_for_publishers(self) -> None:
        self._publishers = self._look_up_publishers()

    def _look_up_publishers(self) -> frozenset[bytes]:
        infos = self._private.get_publishers_info_by_topic(self.topic)
        return frozenset(bytes(info.endpoint_gid) for info in infos)

    def _now_ns(self) -> int:
        return self._node.get_clock().now().nanoseconds

    def _why_nothing(self) -> str:
        if self.rejected and not self.received:
            return f": {self.rejected} messages were refused"
        count = self.publishers()
        if not count:
            return (
                f": nobody publishes {self.topic}; is the tokenizer active, and are namespace and ROS_DOMAIN_ID the "
                "same?"
            )
        nothing = f": {self.topic} has {count} publisher(s) that sent nothing{' new' if self.received else ''}"
        if self._client is None:
            return f"{nothing}; do its cameras run? With trigger on_request it sends only when asked: request()"
        return nothing

    def _alive(self) -> None:
        if not self._context.ok():
            from rclpy.executors import ExternalShutdownException

            raise ExternalShutdownException
        super()._alive()

    def _log(self, text: str, error: bool) -> None:
        if self._context.ok():
            logger = self._node.get_logger()
            logger.error(text) if error else logger.warning(text)


class LocalTokenizer(_Tokens):
    """Visual tokens computed in this process, read like those of a `TokenSubscriber`.

    A policy can so begin with the tokenizer inside, and move it to a node by changing the one line that makes its
    source of tokens.

    Args:
        tokenizer: a `VisualTokenizer`.
        grab: gives the latest image of every camera, ``{"front": uint8 [height, width, 3] RGB, …}``, in the order
            in which tokens are wanted. `wait` and `request` call it and encode what it gives.
        token_dtype: of the tokens; the tokenizer's compute dtype where not given.
        features: keep what went into the projector, too.
        callback: called with every set, by the thread that encodes it.
        history, expect_fingerprint: as for `TokenSubscriber`.
    """

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        grab: Callable[[], Mapping[str, np.ndarray]] | None = None,
        *,
        token_dtype: str | None = None,
        features: bool = False,
        callback: Callable[[VisualTokens], None] | None = None,
        history: int = 1,
        expect_fingerprint: str | Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(history, expect_fingerprint)
        self._tokenizer = tokenizer
        self._grab = grab
        self._dtype = token_dtype
        self._features = features
        self._callback = callback
        self._encoding = threading.Lock()
        self._sequence = 0

    def encode(self, images: Mapping[str, np.ndarray], stamp_ns: int | None = None) -> VisualTokens:
        """Encodes one image per camera and makes the result the latest set. Raises like `latest`."""
        with self._encoding:
            self._alive()
            tokens = tokenize(
                self._tokenizer,
                images,
                stamp_ns=stamp_ns,
                sequence=self._sequence,
                token_dtype=self._dtype,
                features=self._features,
            )
            self._sequence += 1
            if not self._accept(tokens):
                self._raise_refusal()
        if self._callback is not None:
            self._callback(tokens)
        return tokens

    def wait(self, timeout_sec: float | None = None) -> VisualTokens:
        """Grabs and encodes; without `grab`, waits for another thread's `encode`."""
        return super().wait(timeout_sec) if self._grab is None else self.encode(self._grab())

    def request(self, timeout_sec: float = 5.0) -> VisualTokens:
        """Grabs and encodes."""
        return self.wait(timeout_sec)


def tokenize(
    tokenizer: VisualTokenizer,
    images: Mapping[str, np.ndarray],
    *,
    stamp_ns: int | None = None,
    sequence: int = 0,
    token_dtype: str | None = None,
    features: bool = False,
) -> VisualTokens:
    """The same `VisualTokens` that the node would publish for these images.

    Args:
        images: camera → uint8 [height, width, 3] RGB, in the order in which views are wanted.
        stamp_ns: when they were taken, nanoseconds since the epoch; now, where not given.
        token_dtype: of the tokens; the tokenizer's compute dtype where not given.

    Raises:
        TokenFormatError: NaN or infinity came out, as with a dtype that is too narrow for the model.
    """
    import torch

    stamp_ns = time.time_ns() if stamp_ns is None else stamp_ns
    views = [
        View(
            camera,
            camera,
            stamp_ns,
            *image.shape[:2],
            tokenizer.affine(*image.shape[:2], camera),
            roi=tokenizer.seen(*image.shape[:2], camera),
        )
        for camera, image in images.items()
    ]
    output = tokenizer(list(images.values()), features=features, cameras=list(images))
    dtype = getattr(torch, token_dtype) if token_dtype else output.tokens.dtype
    parts = [part.to(dtype) for part in (output.tokens, output.features) if part is not None]
    # A GPU is faster at it; which view is at fault is only asked where one is.
    finite = all_finite(parts) if parts[0].is_cuda else None
    tokens = VisualTokens.from_torch(
        parts[0], sequence=sequence, views=views, features=parts[1] if features else None, **tokenizer.metadata()
    )
    if finite is None or not finite:
        tokens.check_finite()
    return tokens


def _identity(tokens: VisualTokens) -> tuple:
    """The same for the same set from another transport."""
    return tokens.fingerprint, tokens.sequence, tokens.stamps_ns


def _sequence_in(text: str) -> int | None:
    """The number in an answer like ``sequence 12``, by which the node names the message that it published."""
    words = text.replace(",", " ").replace(":", " ").split()
    for word, following in zip(words, words[1:]):
        if word == "sequence" and following.isdigit():
            return int(following)
    return None
