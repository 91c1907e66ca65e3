"""What the policy's process reports, followed until a condition holds; and when nothing moves any more."""

from __future__ import annotations

import json
import queue
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from demo import DemoError
from demo.processes import Child
from demo.report import COUNTERS, rounded
from vla_perception.startup import Progress

LOST_SEC = 10.0
PROGRESS_SEC = 2.0  # between lines about the current step, where stdout is not a terminal


@dataclass
class Events:
    """What the policy's process has reported so far: token messages, the latest diagnostics, and how many there were."""

    policy: Child
    rmw: str | None = None
    messages: int = 0
    status: dict = field(default_factory=dict)
    diagnostics: int = 0
    problems: list[str] = field(default_factory=list)

    def take(self, timeout: float) -> None:
        """Takes in what comes within `timeout` seconds, at least what is there."""
        end = time.monotonic() + timeout
        while True:
            try:
                line = self.policy.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return
            if line is None:
                raise self.policy.failure()
            event = json.loads(line)
            if event["event"] == "ready":
                self.rmw = event["rmw"]
            elif event["event"] == "tokens":
                self.messages = event["count"]
            elif event["event"] == "problem":
                self.problems.append(event["text"])
            elif event["event"] == "diagnostics":
                status = {name: v for name, v in event["status"].items() if name.startswith("visual_tokenizer")}
                if status:
                    self.status = self.status | status
                    self.diagnostics += 1

    def camera(self, name: str) -> dict[str, int]:
        """The camera's counters; {} before the first diagnostics."""
        values = self.status.get(f"visual_tokenizer: camera {name}", {})
        return {key: int(values[key]) for key in COUNTERS if key in values}

    def model(self) -> dict[str, str]:
        return self.status.get("visual_tokenizer: model", {})

    def timing(self) -> dict[str, str]:
        return self.status.get("visual_tokenizer: timing", {})


def follow(
    events: Events,
    watched: Sequence[Child],
    until: Callable[[], bool],
    timeout: float,
    step: Callable[[float], str],
    problem: str,
) -> None:
    """Takes in events until the condition holds; DemoError if a process dies, or with the problem on timeout.

    Args:
        step: the current step, for stdout, after so many seconds.
    """
    began = time.monotonic()
    with Progress(sys.stdout, interval_sec=PROGRESS_SEC) as progress:
        while not until():
            for child in watched:
                child.check_alive()
            seconds = time.monotonic() - began
            if seconds > timeout:
                raise DemoError(f"After {timeout:.0f} s {problem}. {watched[0].failure()}")
            progress(step(seconds))
            events.take(0.1)


class Settled:
    """True once nothing moves any more in the tokenizer's diagnostics.

    At once if every frame has been encoded or dropped. `pending` may stay above 0 for good, because a frame can wait
    for a partner that never comes; then the counters have to stand still for longer than encoding a set takes. If
    frames were lost on the way, they have to for LOST_SEC more.
    """

    def __init__(self, events: Events, published: Mapping[str, int]):
        self._events = events
        self._published = published
        self._last: object = None
        self._since = 0.0
        self._seen = events.diagnostics

    def __call__(self) -> bool:
        events = self._events
        if events.diagnostics == self._seen:
            return False
        self._seen = events.diagnostics
        counters = {name: events.camera(name) for name in self._published}
        sent = events.model().get("token_messages")
        now = (counters, events.messages, sent)
        if now != self._last:
            self._last, self._since = now, time.monotonic()
            return False
        still = time.monotonic() - self._since
        encoding = 2e-3 * (rounded(events.timing().get("encode_p99_ms")) or 0.0)
        lost = any(counters[name].get("received") != count for name, count in self._published.items())
        lost = lost or (sent is not None and int(sent) != events.messages)
        pending = any(count.get("pending") for count in counters.values())
        return still >= (LOST_SEC if lost else 0.0) + (1.5 + encoding if pending or lost else 0.0)
