"""Levels of /diagnostics, from what is measured and the thresholds of the node's parameters. No ROS, no clock.

OK: works as it is set to. WARN: tokens come, but something is to be looked at. ERROR: no tokens come out, or none of a
camera, and it does not mend itself within `error_age_sec`. A threshold of 0 (of a share: 1) is never passed.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vla_perception.nodes.visual_tokenizer.parameters import TokenizerParameters

#: Seconds over which shares and ages are looked at: one late frame does not warn for long.
WINDOW_SEC = 10.0
#: Fewer frames than this within the window say nothing about a share.
_FEW = 10
#: Seconds that a camera gets until its rate counts.
_SETTLED_SEC = 5.0


class Level(enum.IntEnum):
    """Values of diagnostic_msgs/DiagnosticStatus."""

    OK = 0
    WARN = 1
    ERROR = 2


Finding = tuple[Level, str]
"""A level and its message."""


@dataclass(frozen=True)
class CameraSample:
    """What is known of a camera once a second.

    Attributes:
        counts: its counters: received, replaced, unmatched, undecodable.
        rate_hz: frames per second lately.
        silent_sec: seconds since its last frame, or since it was subscribed to where none has come.
        subscribed_sec: seconds since it was subscribed to.
        problem: what is wrong with it and what to do about it; empty if nothing is.
    """

    counts: Mapping[str, int]
    rate_hz: float
    silent_sec: float
    subscribed_sec: float
    problem: str


class CameraLevel:
    """One camera's level."""

    LOST = ("replaced", "unmatched", "undecodable")

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Mapping[str, int]]] = deque()

    def of(self, sample: CameraSample, thresholds: TokenizerParameters, now: float) -> Finding:
        self._samples.append((now, sample.counts))
        while now - self._samples[0][0] > WINDOW_SEC:
            self._samples.popleft()
        if sample.problem:
            severe = sample.silent_sec >= thresholds.error_age_sec
            return (Level.ERROR if severe else Level.WARN), sample.problem
        if sample.subscribed_sec >= _SETTLED_SEC and sample.rate_hz < thresholds.warn_rate_hz:
            return Level.WARN, (
                f"{sample.rate_hz:.1f} frames a second are fewer than warn_rate_hz ({thresholds.warn_rate_hz:g}): is the "
                "camera's exposure long, or its bus or network busy?"
            )
        before = self._samples[0][1]
        received = sample.counts["received"] - before["received"]
        lost = {key: sample.counts[key] - before[key] for key in self.LOST}
        if received >= _FEW and sum(lost.values()) / received > thresholds.warn_drop_share:
            shares = ", ".join(f"{key} {value / received:.0%}" for key, value in lost.items() if value)
            return Level.WARN, (
                f"of the last {received} frames more than warn_drop_share ({thresholds.warn_drop_share:g}) became no "
                f"tokens: {shares}"
            )
        return Level.OK, "ok"


class ModelLevel:
    """The level of what makes frame sets tokens."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Another pipeline counts from 0."""
        self._failures: Mapping[str, int] = {}
        self._messages = 0
        self._failing_since: float | None = None

    def of(
        self,
        state: str,
        configure_error: str,
        failures: Mapping[str, int],
        messages: int,
        thresholds: TokenizerParameters,
        now: float,
    ) -> Finding:
        """
        Args:
            state: the lifecycle state, which begins the message.
            configure_error: why the last `configure` failed; empty if it did not.
            failures: counters of frame sets that became no message.
            messages: how many token messages were published.
        """
        risen = [key for key, value in failures.items() if value > self._failures.get(key, 0)]
        if messages != self._messages:
            self._failing_since = None
        self._failures, self._messages = dict(failures), messages
        if configure_error and state == "unconfigured":
            return Level.ERROR, f"{state}, because configure failed: {configure_error}"
        if state != "active":
            self._failing_since = None
            return Level.OK, state
        if not risen:
            return Level.OK, state
        self._failing_since = now if self._failing_since is None else self._failing_since
        if now - self._failing_since >= thresholds.error_age_sec:
            return Level.ERROR, f"{state}, and every frame set fails ({', '.join(risen)}): see the log"
        return Level.WARN, f"{state}, and frame sets fail ({', '.join(risen)}): see the log"


def timing_level(ages: Sequence[float], thresholds: TokenizerParameters) -> Finding:
    """The level of how old tokens are when they are published; `ages` in seconds, of the last `WINDOW_SEC`."""
    oldest = sorted(ages)[int(0.95 * (len(ages) - 1))] if ages else 0.0
    if 0 < thresholds.warn_token_age_sec < oldest:
        return Level.WARN, (
            f"tokens are {oldest:.3f} s old when they are published, more than warn_token_age_sec "
            f"({thresholds.warn_token_age_sec:g}): the stages' times below say where it goes; what is beyond them is the "
            "camera's, or its clock"
        )
    return Level.OK, "ok"
