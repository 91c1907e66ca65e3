"""Topic ↔ shared memory: which of the two delivers each message. A pure state machine: no ROS, no threads, no clock.

A subscriber begins with the topic. When shared memory brings a message it switches there and leaves the topic, and it
returns when the writer has gone. During a switch no message is delivered twice, and a message still in flight on the
topic is waited for, so that it is neither overtaken nor counted as lost:

    topic ── shared memory brings a message ──> pending ── the topic has caught up, or PENDING_SEC ──> shared memory
      ^                                            │                                                       │
      └────────────── the writer is gone ──────────┴───────────────────────────────────────────────────────┘

`Handover` gets every message with the transport that brought it, and returns the messages to deliver now, in
their order. Times are seconds of any clock that does not jump.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from vla_perception.tokens.visual_tokens import VisualTokens

TOPIC = "topic"
SHARED_MEMORY = "shared memory"
#: When switching to shared memory, wait this many seconds for messages still in flight on the topic.
PENDING_SEC = 0.5
#: Delivered messages that are remembered, so that copies are recognised, whichever transport brings them.
_REMEMBERED = 32


@dataclass(frozen=True)
class Delivery:
    """A message that is to be delivered now.

    Attributes:
        tokens: the message.
        writer: a number that one run of the tokenizer has in shared memory; None: the topic brought it.
        previous_writer: `writer` of the delivery before; None as well for the first one.
    """

    tokens: VisualTokens
    writer: int | None = None
    previous_writer: int | None = None

    @property
    def another_run(self) -> bool | None:
        """Whether another run of the tokenizer sent the message before; None where shared memory does not show it."""
        if self.writer is None or self.previous_writer is None:
            return None
        return self.writer != self.previous_writer


class Handover:
    """Decides which transport delivers. For one thread at a time.

    Attributes:
        transport: ``topic`` or ``shared memory``: what delivers now, and so whether the topic is to be subscribed to.
    """

    def __init__(self, pending_sec: float = PENDING_SEC) -> None:
        self.transport = TOPIC
        self._pending_sec = pending_sec
        self._pending: list[tuple[VisualTokens, int]] = []  # of shared memory, while the topic still delivers
        self._pending_since = 0.0
        self._delivered: deque[tuple] = deque(maxlen=_REMEMBERED)  # identities
        self._subscribed = True  # to the topic, or about to be
        self._last: VisualTokens | None = None
        self._writer: int | None = None  # of the last delivery

    @property
    def pending(self) -> int:
        """Messages of shared memory that wait for the topic."""
        return len(self._pending)

    def on_topic(self, tokens: VisualTokens, now: float) -> list[Delivery]:
        """The topic has brought a message."""
        if self.transport != TOPIC:
            return []  # shared memory has it
        if identity(tokens) in self._delivered:
            return []  # it was in flight when shared memory came and went
        if self._pending and tokens.sequence >= self._pending[0][0].sequence:
            return self._switch_to_shared_memory()  # the topic has caught up, and shared memory has this one, too
        return [self._deliver(tokens, None), *self.on_time(now)]

    def on_shared_memory(self, tokens: VisualTokens, writer: int, now: float) -> list[Delivery]:
        """Shared memory has brought a message of `writer`."""
        if self.transport == SHARED_MEMORY:
            return self._deliver_written(tokens, writer)
        if not self._pending:
            self._pending_since = now
        self._pending.append((tokens, writer))
        return self.on_time(now)

    def on_time(self, now: float) -> list[Delivery]:
        """Time has passed: switches to shared memory if nothing is to be waited for (any longer)."""
        if not self._pending or (self._topic_is_behind() and now - self._pending_since < self._pending_sec):
            return []
        return self._switch_to_shared_memory()

    def on_writers_gone(self) -> None:
        """Nothing writes to shared memory any more, or it failed: the topic delivers."""
        self.transport = TOPIC
        self._pending.clear()  # the topic was not left yet, and brings them too

    def on_subscribed(self, subscribed: bool) -> None:
        """The topic is subscribed to, or was left: then nothing is in flight there."""
        self._subscribed = subscribed

    def _topic_is_behind(self) -> bool:
        """Whether a message before the first pending one may still be in flight on the topic."""
        (first, writer), last = self._pending[0], self._last
        return (
            last is not None
            and self._subscribed  # otherwise nothing is in flight
            and self._writer in (None, writer)  # otherwise another tokenizer, whose numbers say nothing about the last
            and last.sequence < first.sequence - 1
            and identity(first) not in self._delivered
        )

    def _switch_to_shared_memory(self) -> list[Delivery]:
        self.transport = SHARED_MEMORY
        pending, self._pending = self._pending, []
        return [delivery for tokens, writer in pending for delivery in self._deliver_written(tokens, writer)]

    def _deliver_written(self, tokens: VisualTokens, writer: int) -> list[Delivery]:
        if identity(tokens) in self._delivered:
            return []
        if writer == self._writer and self._last is not None and tokens.sequence <= self._last.sequence:
            return []  # a writer that changed to a larger segment: its next message was there before its last one
        return [self._deliver(tokens, writer)]

    def _deliver(self, tokens: VisualTokens, writer: int | None) -> Delivery:
        delivery = Delivery(tokens, writer, self._writer)
        self._last, self._writer = tokens, writer
        self._delivered.append(identity(tokens))
        return delivery


def identity(tokens: VisualTokens) -> tuple:
    """Equal for the same message from the other transport."""
    return tokens.fingerprint, tokens.sequence, tokens.stamps_ns
