"""What is known of a tokenizer, from diagnostics and counts at given times."""

import pytest

from vla_perception.view import top
from vla_perception.view.health import GONE_SEC, MAX_CAMERAS, LogBook, Reception, Status, TokenizerHealth


def model(messages=0, state="active", level=0, **values):
    values = {"model": "test", "token_messages": str(messages), **values}
    return Status.of("visual_tokenizer: model", level, state, values.items())


def camera(name="front", **values):
    counts = {"received": "5", "encoded": "3", "replaced": "1", "unmatched": "0", "undecodable": "0", "pending": "1"}
    return Status.of(f"visual_tokenizer: camera {name}", 0, "ok", (counts | values).items())


def timing(**values):
    return Status.of("visual_tokenizer: timing", 0, "ok", values.items())


def test_gone_after_silence_and_back():
    health = TokenizerHealth("/tokens")
    assert health.gone(0.0), "never seen"
    health.on_listed(True, 0.0)
    assert not health.gone(0.0), "listed, and it never sent diagnostics"
    health.on_statuses([model()], 10.0)
    assert not health.gone(10.0 + GONE_SEC)
    assert health.gone(10.0 + GONE_SEC + 0.01), "still listed, as after a kill"
    health.sample(10.0 + GONE_SEC + 0.1)
    health.on_tokens({}, 0.1, 13.0)
    assert not health.gone(13.0)
    assert [text.split(":")[0] for _, text in health.events] == ["gone", "back"]


def test_rates_follow_from_two_diagnostics_and_a_restart_is_seen():
    health = TokenizerHealth("/tokens")
    health.on_statuses([model(100)], 1.0)
    assert health.details(1.0)["out_hz"] is None
    health.on_statuses([model(110)], 3.0)
    assert health.details(3.0)["out_hz"] == pytest.approx(5.0)
    health.on_statuses([model(4)], 4.0)
    assert health.details(4.0)["out_hz"] is None
    assert "started anew (messages 110 → 4)" in health.events[-1][1]


def test_other_weights_and_states_are_events():
    health = TokenizerHealth("/tokens")
    health.on_statuses([model(0, "active", fingerprint="a" * 64)], 1.0)
    health.on_tokens({"fingerprint": "a" * 64}, 0.1, 1.5)
    assert not health.events
    health.on_statuses([model(0, "inactive", fingerprint="a" * 64)], 2.0)
    health.on_statuses([model(0, "active", fingerprint="b" * 64)], 3.0)
    health.on_tokens({"fingerprint": "b" * 64}, 0.1, 3.5)
    assert [text for _, text in health.events if "back" not in text] == [
        "active → inactive",
        "the fingerprint changed: aaaaaaaaaaaa… → bbbbbbbbbbbb…",
        "inactive → active",
    ]


def test_details_and_samples():
    health = TokenizerHealth("/tokens", "/visual_tokenizer")
    statuses = [model(7, device="cuda:0", device_memory_mb="812"), camera(rate_hz="29.97", age_sec="0.01")]
    health.on_statuses(
        [*statuses, timing(encode_p50_ms="12.5", encode_p95_ms="20", decode_p50_ms="nan", age_p50_ms="31")], 1.0
    )
    health.on_reception(Reception("shared memory", received=10, lost=2, gaps=1), 1.0)
    for age in (0.1, 0.3, 0.2):
        health.on_tokens({"weights": "random"}, age, 1.0)
    first = health.sample(1.0)
    assert first["in_hz"] == {"front": 29.97} and first["encode_p50"] == 12.5 and first["encode_p95"] == 20
    assert first["published_age_ms"] == 31
    assert first["decode_p50"] is None and first["received_hz"] is None
    assert first["age_ms"] == pytest.approx(200)
    health.on_reception(Reception("shared memory", received=25, lost=2, gaps=1), 2.0)
    assert health.sample(2.0)["received_hz"] == pytest.approx(15)
    details = health.details(2.0)
    assert details["cameras"] == [
        {
            "camera": "front",
            "problem": "",
            "rate_hz": 29.97,
            "age_sec": 0.01,
            "received": 5,
            "encoded": 3,
            "replaced": 1,
            "unmatched": 0,
            "undecodable": 0,
            "pending": 1,
        }
    ]
    assert details["facts"]["device_memory_mb"] == "812" and details["weights"] == "random"
    assert details["reception"]["lost"] == 2 and details["reception"]["transport"] == "shared memory"
    assert health.sample(2.0 + GONE_SEC)["encode_p50"] is None, "curves end where it is gone"


def test_no_more_is_kept_than_is_for_use():
    cameras = [camera(f"c{index}", rate_hz="inf", received="1e999", encoded="x") for index in range(1000)]
    health = TokenizerHealth("/tokens")
    health.on_statuses([model(0, "active\x1b[2J" * 10_000), *cameras], 1.0)
    details = health.details(1.0)
    assert len(details["cameras"]) == MAX_CAMERAS
    assert details["cameras"][0]["rate_hz"] is None and details["cameras"][0]["received"] is None
    assert "\x1b" not in details["state"] and len(details["state"]) < 10_000
    for second in range(2000):
        health.sample(float(second))
    assert len(health.samples) == 600
    many = Status.of("x", 0, "ok", ((str(index), "v") for index in range(10_000)))
    assert len(many.values) == 64


def test_names_that_a_terminal_would_obey_are_escaped():
    health = TokenizerHealth("/tokens")
    health.on_statuses([model(**{"\x1b[2J": "1"}), camera("\x1b[2J\x07")], 1.0)
    details = health.details(1.0)
    assert details["cameras"][0]["camera"] == "\\x1b[2J\\x07" and "\\x1b[2J" in details["facts"]
    assert "\x1b" not in top.as_text("test", [details], [])


def test_the_log_keeps_warnings():
    log = LogBook()
    log.add(20, "node", "fine", 1.0)
    log.add(30, "node", "first\nsecond \x1b[31m", 2.0)
    log.add(40, "no\nde", "<b>", 3.0)
    lines = log.after(0)
    assert [(line["level"], line["text"]) for line in lines] == [
        ("warning", "first\nsecond \\x1b[31m"),
        ("error", "<b>"),
    ]
    assert lines[1]["node"] == "no\\nde" and log.after(1) == lines[1:]
    for _ in range(1000):
        log.add(50, "node", "x" * 100_000, 4.0)
    assert len(log.after(0)) == 200 and len(log.after(0)[0]["text"]) == 1000
