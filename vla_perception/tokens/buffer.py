"""`TokenBuffer`: the latest token messages, checked, in order, for any number of threads. No ROS in here.

A source (`TokenSubscriber`, `LocalTokenizer`, a test) calls `push`; policies read `latest`,
`latest_within`, `history` and `wait`.
"""

from __future__ import annotations

import bisect
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from operator import attrgetter

from vla_perception.tokens.arrivals import Continuation, Continuity, Order, StampOrder
from vla_perception.tokens.fingerprint import difference, expectation
from vla_perception.tokens.visual_tokens import VisualTokens

#: Minimum seconds between repeats of one log message.
_LOG_PERIOD = 5.0
#: Seconds between checks of a waiting thread: a shutdown of ROS notifies no condition.
POLL_SEC = 0.05
#: Seconds. Ages above are those of recordings, not of cameras that lag.
_LONG_AGO = 86400.0


class FingerprintMismatchError(ValueError):
    """Tokens of other weights or another preprocessing than the policy was made for."""


class TokenBuffer:
    """The latest token messages. All of it may be called by any thread.

    Args:
        history: how many messages `history` keeps.
        expect_fingerprint: reject tokens of another tokenizer. The 64 digits, or their first ones (8 at least); or
            `VisualTokenizer.metadata()`, whose `FingerprintMismatchError` always says what differs.

    Attributes:
        received: messages that were accepted.
        lost: messages that were published and never arrived here, by gaps in the sequence numbers.
        gaps: how often some were lost.
        restarts: how often the sequence began anew or the fingerprint changed: another tokenizer. Not a loss.
        rejected: messages that were not accepted: another schema, damaged, or of other weights.
    """

    def __init__(self, history: int = 1, expect_fingerprint: str | Mapping[str, object] | None = None) -> None:
        if history < 1:
            raise ValueError(f"history must be at least 1, got {history}")
        self._expected: str | None = None
        self._expected_inputs: Mapping[str, object] | None = None
        if expect_fingerprint is not None:
            self._expected, self._expected_inputs = expectation(expect_fingerprint)
        self._condition: str | None = None
        self._mismatch = ("", "")  # the last wrong fingerprint, and what is wrong with it
        self._pushing = threading.Lock()  # guards what only `push` uses
        self._continuity = Continuity()
        self._order = StampOrder()
        self._changed = threading.Condition()  # guards what readers use
        self._history: deque[VisualTokens] = deque()  # by stamp, equal ones as they arrived
        self._max_history = history
        self._last: VisualTokens | None = None  # to arrive; the latest by its stamp is `_history[-1]`
        self._rejection: ValueError | None = None
        self._generation = 0  # how often `latest` has changed
        self._waited = (0, 0)  # generation and rejected, when a wait returned last
        self._closed = False
        self._last_logged: dict[str, float] = {}
        self.received = self.lost = self.gaps = self.restarts = self.rejected = 0

    # Reading

    @property
    def latest(self) -> VisualTokens | None:
        """The latest message, or None before the first one.

        It stays the latest however old it gets: see `latest_within` and `age`.

        Raises:
            TokenFormatError, FingerprintMismatchError: the last message was rejected, so what came before it may be of
                another tokenizer than the one that runs now.
        """
        with self._changed:
            self._raise_if_rejected()
            return self._history[-1] if self._history else None

    @property
    def history(self) -> tuple[VisualTokens, ...]:
        """The last `history` messages, oldest first; fewer until as many have come. Raises like `latest`.

        It begins anew when the tokenizer restarts, when cameras or shapes change, or when stamps jump back (a bag that
        loops), so that frames that are stacked belong together. A message that is only late, by its stamp, goes to its
        place before the latest one (not older than all of the last 8: `arrivals.StampOrder`). Lost messages leave
        holes: compare `sequence` where that matters.
        """
        with self._changed:
            self._raise_if_rejected()
            return tuple(self._history)

    def wait(self, timeout_sec: float | None = None) -> VisualTokens:
        """The latest message that no `wait` has returned before; waits for one if need be.

        Args:
            timeout_sec: how long to wait at most; None: for ever.

        Raises:
            TimeoutError: none came; the text says what is known of the reason.
            TokenFormatError, FingerprintMismatchError: a message was rejected, and nothing better has come since.
        """
        with self._changed:
            generation, rejected = self._waited
            try:
                self._wait_for(
                    lambda: self._can_pop() and (self._generation > generation or self.rejected > rejected),
                    timeout_sec,
                    "no new visual tokens",
                )
            except TimeoutError:
                self._raise_if_rejected()
                raise
            return self._pop_latest()

    def latest_within(self, max_age_sec: float) -> VisualTokens | None:
        """The latest message if its oldest valid image is at most `max_age_sec` old, else None. Raises like `latest`.

        None as well if its stamps lie more than `max_age_sec` in the future: then the camera's clock and this one
        differ, and ages mean nothing.
        """
        latest = self.latest
        if latest is None:
            return None
        age = self.age(latest)
        if age < -max_age_sec:
            self._log_throttled(
                "clock", f"visual tokens are stamped {-age:.3f} s in the future: synchronise the clocks"
            )
        return latest if abs(age) <= max_age_sec else None

    def age(self, tokens: VisualTokens | None = None) -> float:
        """Seconds since the oldest valid image behind `tokens` (the latest ones) was taken, by its stamp.

        Infinite where there are no tokens, or no valid view.
        """
        tokens = self.latest if tokens is None else tokens
        age = math.inf if tokens is None else tokens.age(self._now_ns())
        if _LONG_AGO < age < math.inf:
            self._log_throttled(
                "recording",
                f"visual tokens are stamped {age / 86400:.0f} days ago, as by a recording that is replayed with its own "
                "stamps: start bag_player with restamp:=true, or with clock:=true and this node with use_sim_time:=true",
                period=600,
            )
        return age

    def expect_condition(self, digest: str | None) -> None:
        """From here on only tokens of that condition (`VisualTokens.condition`) are delivered; None: of any.

        What is kept of other conditions is dropped, so `latest` is None and `wait` waits until the first one comes.
        """
        with self._pushing, self._changed:
            self._condition = digest
            kept = [tokens for tokens in self._history if digest in (None, tokens.condition)]
            if len(kept) < len(self._history):
                self._history = deque(kept)
                self._waited = (self._generation, self.rejected)

    def close(self) -> None:
        """Ends reception; threads that wait get a RuntimeError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # Filling

    def push(self, tokens: VisualTokens, another_publisher: Callable[[], bool] = lambda: False) -> Order | None:
        """Takes one message in.

        Args:
            another_publisher: whether another publisher than that of the message before sent it. Only asked where
                sequence numbers are missing: from another publisher they are no loss.

        Returns:
            How its stamp follows the ones before; a late message does not become the latest. None: it was rejected,
            for it has another fingerprint than the expected one, or left out, for it is of another condition.
        """
        with self._pushing:
            if self._expected is not None and not tokens.fingerprint.startswith(self._expected):
                self.reject(FingerprintMismatchError(self._describe_mismatch(tokens, self._expected)))
                return None
            self._expected_inputs = tokens.fingerprint_inputs or self._expected_inputs
            last = self._last
            continuation = self._continuity.add(tokens.sequence, tokens.fingerprint, another_publisher)
            if self._condition is not None and tokens.condition != self._condition:
                self._count(continuation)
                return None
            alike = last is not None and (tokens.cameras, tokens.shape) == (last.cameras, last.shape)
            if continuation.restarted or not alike:
                self._order = StampOrder()
            order = self._order.add(tokens.stamp_ns)
            with self._changed:
                if continuation.restarted or not alike or order is Order.SET_BACK:
                    self._history.clear()
                bisect.insort(self._history, tokens, key=attrgetter("stamp_ns"))
                if len(self._history) > self._max_history:
                    self._history.popleft()
                self._last = tokens
                self._rejection = None
                self._generation += order is not Order.LATE
                self.received += 1
                self._count(continuation)
                self._changed.notify_all()
        self._log_push(tokens, last, continuation)
        return order

    def reject(self, error: ValueError) -> None:
        """A message came that cannot be taken in: until a better one comes, every reader gets `error`."""
        with self._changed:
            self.rejected += 1
            self._rejection = error
            self._changed.notify_all()
        self._log_throttled(f"rejected, {type(error).__name__}", f"visual tokens rejected: {error}", error=True)

    def _count(self, continuation: Continuation) -> None:
        self.restarts += continuation.restarted
        self.gaps += continuation.lost > 0
        self.lost += continuation.lost

    def _log_push(self, tokens: VisualTokens, last: VisualTokens | None, continuation: Continuation) -> None:
        if tokens.weights == "random":
            self._log_throttled(
                "random", f"the tokens of {tokens.model!r} come from random weights: they mean nothing", period=600
            )
        if continuation.restarted and last is not None:
            self._log_throttled("restart", f"the tokenizer restarted (sequence {last.sequence} → {tokens.sequence})")
            if tokens.fingerprint != last.fingerprint:
                self._log_throttled("weights", f"the tokens' fingerprint changed to {tokens.fingerprint[:16]}…")
        elif continuation.lost:
            self._log_throttled(
                "lost",
                f"{continuation.lost} token messages were lost before sequence {tokens.sequence} ({self.lost} in all)",
            )

    def _describe_mismatch(self, tokens: VisualTokens, expected: str) -> str:
        """What is wrong with tokens of another fingerprint than the expected one."""
        if self._mismatch[0] != tokens.fingerprint:
            why = difference(expected, self._expected_inputs, tokens.fingerprint_inputs, tokens.fingerprint)
            if tokens.fingerprint_inputs is None and tokens.weights == "random":
                why = f"random weights of a preset without options came: pool {tokens.pool}, image_transforms [], {tokens.projector}"
            text = (
                f"the tokens of model {tokens.model!r} have the fingerprint {tokens.fingerprint[:16]}…, expected was "
                f"{expected[:16]}…: they come from other weights or another preprocessing than this policy is "
                f"for ({why}); start the tokenizer with the policy's checkpoint and options"
            )
            self._mismatch = (tokens.fingerprint, text)
        return self._mismatch[1]

    # What subclasses that receive know better

    def _now_ns(self) -> int:
        return time.time_ns()

    def _timeout_hint(self) -> str:
        """What is known of the reason why nothing came; follows the text of a TimeoutError."""
        return ""

    def _raise_if_closed(self) -> None:
        """Raises if nothing can come any more."""
        if self._closed:
            raise RuntimeError("this source of tokens is closed")

    def _log(self, text: str, error: bool) -> None:
        logging.getLogger(__name__).log(logging.ERROR if error else logging.WARNING, text)

    # Helpers

    def _log_throttled(self, kind: str, text: str, error: bool = False, period: float = _LOG_PERIOD) -> None:
        now = time.monotonic()
        if now - self._last_logged.get(kind, -math.inf) >= period:
            self._last_logged[kind] = now
            self._log(text, error)

    def _can_pop(self) -> bool:
        """Whether there is a message to return, or an error to raise: what has come, `expect_condition` may have dropped."""
        return bool(self._history) or self._rejection is not None

    def _pop_latest(self) -> VisualTokens:
        """The latest message, for a wait that ends; with `_changed` held."""
        self._waited = (self._generation, self.rejected)
        self._raise_if_rejected()
        return self._history[-1]

    def _raise_if_rejected(self) -> None:
        if self._rejection is not None:
            # A new one each time: threads must not share a traceback.
            raise type(self._rejection)(*self._rejection.args)

    def _wait_for(
        self, condition: Callable[[], object], timeout_sec: float | None, what: str, begin: float | None = None
    ) -> None:
        """Waits with `_changed` held, until `timeout_sec` after `begin` (now, where not given)."""
        begin = time.monotonic() if begin is None else begin
        end = math.inf if timeout_sec is None else begin + timeout_sec
        while not condition():
            self._raise_if_closed()
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{what} within {timeout_sec:g} s{self._timeout_hint()}")
            self._changed.wait(min(left, POLL_SEC))
