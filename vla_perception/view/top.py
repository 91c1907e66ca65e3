"""Health as text: once, or refreshed every second."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Sequence

from vla_perception.view.health import COUNTERS, STAGES
from vla_perception.view.session import Feed

REFRESH_SEC = 1.0
LOG_LINES = 5
#: Clears the screen and goes to its top.
_CLEAR = "\x1b[H\x1b[2J"


def run(feed: Feed, *, once: bool, as_json: bool, wait_sec: float = 5.0) -> int:
    """Prints until Ctrl-C, or once. The exit code: 0, or 1 if `once` found no tokenizer."""
    if once:
        end = time.monotonic() + wait_sec
        # Rates follow from two diagnostics, a second apart.
        while not _complete(reports := collect(feed)) and time.monotonic() < end:
            time.sleep(0.1)
        _print(feed, reports, as_json, indent=2)
        if not reports:
            print(f"vla-perception: no tokenizer in {feed.title} within {wait_sec:g} s", file=sys.stderr)
        return 0 if reports else 1
    terminal = sys.stdout.isatty() and not as_json
    with contextlib.suppress(KeyboardInterrupt):  # how one leaves it
        while True:
            if terminal:
                sys.stdout.write(_CLEAR)
            _print(feed, collect(feed), as_json)
            time.sleep(REFRESH_SEC)
    return 0


def collect(feed: Feed) -> list[dict[str, object]]:
    """`Feed.details` of every tokenizer."""
    found = (feed.details(str(tokenizer["topic"])) for tokenizer in feed.tokenizers())
    return [details for details in found if details is not None]


def _complete(reports: Sequence[dict[str, object]]) -> bool:
    return bool(reports) and all(report["out_hz"] is not None for report in reports)


def _print(feed: Feed, reports: list[dict[str, object]], as_json: bool, indent: int | None = None) -> None:
    log = feed.log_after(0)
    if as_json:
        print(json.dumps({"tokenizers": reports, "log": log}, indent=indent), flush=True)
    else:
        print(as_text(feed.title, reports, log, shutil.get_terminal_size().columns), flush=True)


def as_text(title: str, reports: Sequence[dict], log: Sequence[dict], columns: int = 100) -> str:
    """What `top` shows. Names and log lines come from peers, and are printable already (`health.py`)."""
    lines = [f"vla-perception top, {title}, {time.strftime('%H:%M:%S')}"]
    if not reports:
        lines += ["", "No tokenizer yet: it appears here when it runs."]
    for report in reports:
        lines += ["", *_report(report)]
    if log:
        lines += ["", "Last warnings of the log"]
        for line in log[-LOG_LINES:]:
            moment = time.strftime("%H:%M:%S", time.localtime(line["stamp_sec"]))
            lines.append(f"  {moment} {line['level']} {line['node']}: {' '.join(line['text'].split())}")
    return "\n".join(line if len(line) <= columns else f"{line[: columns - 1]}…" for line in lines)


def _report(report: dict) -> list[str]:
    facts = report["facts"]
    state = f"GONE, {report['silent_sec']} s without a sign" if report["gone"] else report["state"] or "publishes"
    lines = [f"{report['topic']}  {report['node']}  {state}"]
    if report["weights"] == "random":
        lines.append("  RANDOM WEIGHTS: these tokens mean nothing to a policy")
    lines.append(
        f"  model {report['model'] or '–'}, {report['weights'] or '–'} weights, fingerprint "
        f"{report['fingerprint'][:12] or '–'}"
    )
    where = [facts[key] for key in ("device", "compute_dtype", "runtime") if facts.get(key)]
    if facts.get("device_memory_mb"):
        where.append(f"{facts['device_memory_mb']} MB of device memory")
    lines.append(
        f"  out {_number(report['out_hz'])} Hz, {facts.get('token_messages', '–')} messages "
        f"({facts.get('on_topic', '–')} on the topic, {facts.get('in_shared_memory', '–')} in shared memory)"
        + (f"; {', '.join(where)}" if where else "")
    )
    failures = [
        f"{key} {facts[key]}" for key in ("encode_errors", "non_finite", "publish_errors") if _above_0(facts, key)
    ]
    if failures:
        lines.append(f"  FAILURES: {', '.join(failures)}")
    if report["cameras"]:
        lines.append(f"  {'camera':<9}{'Hz':>6}" + "".join(_cell(name, name) for name in COUNTERS))
    for camera in report["cameras"]:
        counts = "".join(_cell("–" if camera[name] is None else camera[name], name) for name in COUNTERS)
        lines.append(f"  {camera['camera'][:9]:<9}{_number(camera['rate_hz']):>6}{counts}")
        if camera["problem"]:
            lines.append(f"    {camera['problem']}")
    timing = report["timing"]
    if timing:
        lines.append(f"  {'latency, ms':<15}" + "".join(_cell(stage, stage) for stage in STAGES))
        for percent in ("p50", "p95"):
            cells = "".join(_cell(_number(timing.get(f"{stage}_{percent}_ms")), stage) for stage in STAGES)
            lines.append(f"  {percent:<15}{cells}")
    if timing.get("age_p50_ms") is not None:
        ages = f"p50 {_number(timing['age_p50_ms'])}, p95 {_number(timing.get('age_p95_ms'))}"
        lines.append(f"  age of tokens when they are published, ms: {ages}")
    if report["problem"]:
        lines.append(f"    {report['problem']}")
    lines += [f"  {event['ago_sec']:.0f} s ago: {event['text']}" for event in report["events"][-3:]]
    return lines


def _cell(value: object, column: str) -> str:
    """Right-aligned under its column's name; with all of them a terminal of 80 columns is filled."""
    return f"{value!s:>{max(len(column), 7) + 2}}"


def _above_0(facts: dict, key: str) -> bool:
    return str(facts.get(key, "0")) not in ("0", "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
