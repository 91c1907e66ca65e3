"""How a tokenizer does, from what its diagnostics, the log and a subscriber say. No ROS, no clock, no threads.

`now` is seconds on a monotonic clock throughout.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vla_perception.printable import printable

#: Seconds without a sign of life after which a tokenizer counts as gone. Its diagnostics come once a second.
GONE_SEC = 1.7
#: Samples of the curves, one a second.
SAMPLES = 600
STAGES = ("decode", "preprocess", "encode", "publish", "overhead")
COUNTERS = ("received", "encoded", "replaced", "unmatched", "undecodable", "pending")
#: Whatever a peer sends, no more is kept: cameras of a tokenizer, characters of a text, entries of a list.
MAX_CAMERAS, MAX_TEXT, MAX_VALUES, MAX_EVENTS, MAX_LOG = 64, 1000, 64, 50, 200
#: Levels of rcl_interfaces/Log from which a line is kept.
WARNING = 30


@dataclass(frozen=True)
class Status:
    """One diagnostic_msgs/DiagnosticStatus. `level` 0 is fine."""

    name: str
    level: int
    message: str
    values: Mapping[str, str]

    @classmethod
    def of(cls, name: str, level: int, message: str, values: Iterable[tuple[str, str]]) -> Status:
        """With no more of each text than is kept of it, and nothing in it that a terminal would obey."""
        pairs: dict[str, str] = {}
        for key, value in values:
            if len(pairs) < MAX_VALUES:
                pairs[printable(key[:MAX_TEXT])] = printable(value[:MAX_TEXT])
        return cls(printable(name[:MAX_TEXT]), level, printable(message[:MAX_TEXT]), pairs)

    @property
    def is_of_a_tokenizer(self) -> bool:
        """Whether it is the status `<node>: model` of a tokenizer, which all of them have."""
        return self.name.endswith(": model") and {"model", "token_messages"} <= self.values.keys()


@dataclass
class Reception:
    """What a `TokenSubscriber` has counted."""

    transport: str = ""
    received: int = 0
    lost: int = 0
    gaps: int = 0
    restarts: int = 0
    rejected: int = 0


@dataclass
class TokenizerHealth:
    """One tokenizer.

    Attributes:
        topic: where its tokens are.
        node: its full name; empty while it is unknown.
        events: (now, text), the last ones: restarts, other weights, gone and back.
        samples: of the curves, one for each `sample`.
    """

    topic: str
    node: str = ""
    reception: Reception = field(default_factory=Reception)
    events: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    samples: deque[dict[str, object]] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    _model: Status | None = None
    _timing: Status | None = None
    _cameras: dict[str, Status] = field(default_factory=dict)
    _last_sign: float = -math.inf
    _listed: bool = False
    _gone: bool | None = None
    _published: tuple[float, int] | None = None
    _out_hz: float | None = None
    _ages: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    _received_before: tuple[float, int] | None = None
    _facts: dict[str, object] = field(default_factory=dict)

    # What comes in

    def on_statuses(self, statuses: Iterable[Status], now: float) -> None:
        """Its statuses in one message of `/diagnostics`."""
        cameras: dict[str, Status] = {}
        for status in statuses:
            node, _, what = status.name.partition(": ")
            if status.is_of_a_tokenizer:
                self._on_model(status, now)
            elif what == "timing":
                self._timing = status
            elif what.startswith("camera ") and len(cameras) < MAX_CAMERAS:
                cameras[what.removeprefix("camera ")] = status
        self._cameras = cameras
        self._alive(now)

    def _on_model(self, status: Status, now: float) -> None:
        before, self._model = self._model, status
        published = _whole(status.values.get("token_messages"))
        if self._published is not None and published is not None:
            then, count = self._published
            if published < count:
                self.events.append((now, f"the tokenizer started anew (messages {count} → {published})"))
                self._out_hz = None
            elif now > then:
                self._out_hz = (published - count) / (now - then)
        if published is not None:
            self._published = (now, published)
        self._on_fingerprint(status.values.get("fingerprint"), now)
        if before is not None:
            old, new = before.message.partition(",")[0], status.message.partition(",")[0]
            if old != new:
                self.events.append((now, f"{old} → {new}"))

    def _on_fingerprint(self, new: object, now: float) -> None:
        known = self._facts.get("fingerprint")
        if known and new and known != new:
            self.events.append((now, f"the fingerprint changed: {str(known)[:12]}… → {str(new)[:12]}…"))
        if new:
            self._facts["fingerprint"] = new

    def on_tokens(self, facts: Mapping[str, object], age_sec: float, now: float) -> None:
        """A message that came. `facts`: model, weights, fingerprint and the like; `age_sec`: since its oldest image."""
        self._on_fingerprint(facts.get("fingerprint"), now)
        self._facts.update(facts)
        if math.isfinite(age_sec):
            self._ages.append(age_sec)
        self._alive(now)

    def on_reception(self, reception: Reception, now: float) -> None:
        """What the subscriber has counted until now."""
        if reception.restarts > self.reception.restarts and self._model is None:
            self.events.append((now, "the tokenizer started anew"))
        self.reception = reception

    def on_listed(self, listed: bool, now: float) -> None:
        """Whether ROS lists a publisher of its topic. It does so for seconds after one was killed."""
        self._listed = listed
        self._watch(now)

    def _alive(self, now: float) -> None:
        self._last_sign = now
        self._watch(now)

    def _watch(self, now: float) -> None:
        gone = self.gone(now)
        if self._gone is not None and gone != self._gone:
            silence = now - self._last_sign
            seconds = f": nothing heard for {silence:.1f} s" if math.isfinite(silence) else ""
            self.events.append((now, f"gone{seconds}" if gone else "back"))
        self._gone = gone

    # What is known

    def gone(self, now: float) -> bool:
        """Whether there is no sign of it: no diagnostics and no tokens, or, where it never sent any, no publisher."""
        if self._model is None:
            return not self._listed
        return now - self._last_sign > GONE_SEC

    @property
    def shared_memory_readers(self) -> int:
        """How many read the tokens from shared memory, as the diagnostics said last."""
        return _whole(self._model.values.get("shared_memory_readers")) or 0 if self._model is not None else 0

    def sample(self, now: float) -> dict[str, object]:
        """One point of the curves; to be called once a second."""
        self._watch(now)
        gone = self.gone(now)
        received = self.reception.received
        received_hz = None
        if self._received_before is not None and now > self._received_before[0]:
            received_hz = max(0, received - self._received_before[1]) / (now - self._received_before[0])
        self._received_before = (now, received)
        stages: dict[str, object] = {}
        for stage in STAGES:
            for percent in ("p50", "p95"):
                stages[f"{stage}_{percent}"] = None if gone else self._milliseconds(f"{stage}_{percent}_ms")
        sample: dict[str, object] = {
            "time": now,
            "in_hz": {} if gone else {name: _number(c.values.get("rate_hz")) for name, c in self._cameras.items()},
            "out_hz": None if gone else self._out_hz,
            "received_hz": None if gone else received_hz,
            "published_age_ms": None if gone else self._milliseconds("age_p50_ms"),
            "age_ms": statistics.median(self._ages) * 1e3 if self._ages and not gone else None,
            **stages,
        }
        self._ages.clear()
        self.samples.append(sample)
        return sample

    def _milliseconds(self, key: str) -> float | None:
        return _number(self._timing.values.get(key)) if self._timing is not None else None

    def summary(self, now: float) -> dict[str, object]:
        """What the list of tokenizers shows."""
        state = self._model.message if self._model is not None else ""
        values = self._model.values if self._model is not None else {}
        return {
            "topic": self.topic,
            "node": self.node,
            "gone": self.gone(now),
            "silent_sec": round(now - self._last_sign, 1) if math.isfinite(self._last_sign) else None,
            "state": state,
            "warns": self._model is not None and self._model.level > 0,
            "model": str(values.get("model") or self._facts.get("model", "")),
            "weights": str(values.get("weights") or self._facts.get("weights", "")),
            "fingerprint": str(values.get("fingerprint") or self._facts.get("fingerprint", "")),
        }

    def details(self, now: float) -> dict[str, object]:
        """Everything but the curves."""
        values = dict(self._model.values) if self._model is not None else {}
        return self.summary(now) | {
            "facts": {key: str(value) for key, value in (self._facts | values).items()},
            "cameras": [
                {
                    "camera": name,
                    "problem": status.message if status.level > 0 else "",
                    "rate_hz": _number(status.values.get("rate_hz")),
                    "age_sec": _number(status.values.get("age_sec")),
                    **{key: _whole(status.values.get(key)) for key in COUNTERS},
                }
                for name, status in self._cameras.items()
            ],
            "timing": {}
            if self._timing is None
            else {key: _number(value) for key, value in self._timing.values.items()},
            "problem": self._timing.message if self._timing is not None and self._timing.level > 0 else "",
            "reception": vars(self.reception).copy(),
            "out_hz": self._out_hz,
            "age_ms": next((s["age_ms"] for s in reversed(self.samples) if s["age_ms"] is not None), None),
            "events": [{"ago_sec": round(now - then, 1), "text": text} for then, text in self.events],
        }


class LogBook:
    """The last warnings and errors of the log, numbered."""

    def __init__(self) -> None:
        self._lines: deque[dict[str, object]] = deque(maxlen=MAX_LOG)
        self._count = 0

    def add(self, level: int, node: str, text: str, stamp_sec: float) -> None:
        """A line of `/rosout`; what is below a warning is left out."""
        if level < WARNING:
            return
        self._count += 1
        text = "\n".join(printable(line) for line in text[:MAX_TEXT].splitlines())
        self._lines.append(
            {
                "number": self._count,
                "level": "warning" if level < 40 else "error" if level < 50 else "fatal",
                "node": printable(node[:MAX_TEXT]),
                "text": text,
                "stamp_sec": stamp_sec,
            }
        )

    def after(self, number: int) -> list[dict[str, object]]:
        """The lines behind that number, oldest first."""
        return [line for line in tuple(self._lines) if line["number"] > number]  # type: ignore[operator]


def _number(text: object) -> float | None:
    """A finite number; None for anything else."""
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _whole(text: object) -> int | None:
    value = _number(text)
    return None if value is None else int(value)
