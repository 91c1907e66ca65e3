"""The demo's report: every frame accounted for, latencies, what was dropped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from demo import DemoError

if TYPE_CHECKING:
    from demo.events import Events

STAGES = ("decode", "preprocess", "encode", "publish")
COUNTERS = ("received", "encoded", "replaced", "unmatched", "undecodable", "pending")
PERCENTILES = (50, 95, 99)


def read_stamp_log(path: Path) -> dict[str, dict[int, int]]:
    """Topic → {stamp (ns): CLOCK_MONOTONIC at publishing (ns)}, in the order of publishing."""
    published: dict[str, dict[int, int]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        published.setdefault(entry["topic"], {})[entry["stamp_ns"]] = entry["monotonic_ns"]
    return published


def make_report(
    events: Events, messages: list[dict], published: Mapping[str, Mapping[int, int]], topics: Mapping[str, str]
) -> tuple[dict, list[str]]:
    """The contents of report.json, and what is wrong with it: sentences, none if every frame is accounted for.

    Args:
        messages: what the policy recorded of each token message (messages.json).
        published: what `read_stamp_log` gives.
        topics: camera -> its topic.
    """
    accounting = {name: _account(events, name, len(published.get(topic, ()))) for name, topic in topics.items()}
    reference = published.get(next(iter(topics.values())), {})
    latencies = [(m["arrival_ns"] - reference[m["stamp_ns"]]) / 1e6 for m in messages if m["stamp_ns"] in reference]
    problems = [*_unaccounted(accounting), *_mismatches(events, messages, len(latencies), accounting)]
    timing = events.timing()
    latency = {"image_to_policy": _percentiles(latencies)}
    for stage in STAGES:
        latency[stage] = {f"p{p}": rounded(timing.get(f"{stage}_p{p}_ms")) for p in PERCENTILES}
    last = messages[-1]
    report = {
        "rmw": events.rmw,
        "model": last["model"],
        "weights": last["weights"],
        "fingerprint": last["fingerprint"],
        "frames_in": {name: count["received"] for name, count in accounting.items()},
        "token_messages": len(messages),
        "views": last["shape"][0],
        "tokens_per_view": last["shape"][1],
        "channels": last["shape"][2],
        "dtype": last["dtype"],
        "dropped": {
            name: count["replaced"] + count["unmatched"] + count["undecodable"] for name, count in accounting.items()
        },
        "accounting": accounting,
        "latency_ms": latency,
    }
    return report, problems


def _account(events: Events, camera: str, published: int) -> dict[str, int]:
    """The camera's counters. DemoError where the diagnostics lack one."""
    counters = events.camera(camera)
    missing = [key for key in COUNTERS if key not in counters]
    if missing:
        raise DemoError(f"The tokenizer's diagnostics say nothing about {', '.join(missing)} of camera {camera}")
    return {"published": published, **counters}


def _unaccounted(accounting: Mapping[str, Mapping[str, int]]) -> list[str]:
    problems = []
    for name, count in accounting.items():
        if count["published"] != count["received"]:
            problems.append(f"camera {name}: {count['published']} frames published, but {count['received']} received")
        parts = sum(count[key] for key in COUNTERS[1:])
        if count["received"] != parts:
            problems.append(f"camera {name}: {count['received']} frames received, but {parts} accounted for: {count}")
    return problems


def _mismatches(
    events: Events, messages: list[dict], timed: int, accounting: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """Where the messages at the policy and the tokenizer's counters disagree. timed: messages of a known stamp."""
    problems = []
    if timed != len(messages):
        problems.append(f"{len(messages) - timed} token messages carry a stamp that was never published")
    sent = events.model().get("token_messages")
    if sent is not None and int(sent) != len(messages):
        problems.append(f"{sent} token messages were sent, but {len(messages)} received by the policy")
    constant = ("model", "weights", "fingerprint", "dtype", "shape")
    if any(m[key] != messages[-1][key] for m in messages for key in constant):
        problems.append("token messages differ in model, dtype or shape")
    encoded = Counter(view["camera"] for m in messages for view in m["views"])
    for name, count in accounting.items():
        if encoded[name] != count["encoded"]:
            problems.append(f"camera {name}: {count['encoded']} frames encoded, {encoded[name]} at the policy")
    return problems


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {f"p{p}": None for p in PERCENTILES}
    return {f"p{p}": rounded(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def rounded(value: object) -> float | None:
    try:
        return round(float(value), 3)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def print_table(report: Mapping, out: Path) -> None:
    """What happened, for people."""

    def row(title: str, *cells: object) -> None:
        print(f"  {title:<18}" + "".join(f"{cell!s:>12}" for cell in cells))

    print()
    print(f"  model             {report['model']}, {report['weights']} weights")
    print(f"  fingerprint       {report['fingerprint']}")
    print(
        f"  tokens            {report['token_messages']} messages of {report['views']} × {report['tokens_per_view']} × "
        f"{report['channels']} {report['dtype']}, over {report['rmw']}"
    )
    print()
    counted = ("published", *COUNTERS)
    row("frames", *counted)
    for name, count in report["accounting"].items():
        row(f"  {name}", *(count[key] for key in counted))
    print()
    row("latency, ms", *(f"p{p}" for p in PERCENTILES))
    for stage, values in report["latency_ms"].items():
        cells = ("–" if values[f"p{p}"] is None else f"{values[f'p{p}']:.1f}" for p in PERCENTILES)
        row(f"  {stage.replace('_', ' ')}", *cells)
    print()
    dropped = ", ".join(f"{name} {count}" for name, count in report["dropped"].items())
    print(f"  dropped           {dropped}")
    print(f"  written           {out / 'report.json'}, {out / 'tokens.png'}")
