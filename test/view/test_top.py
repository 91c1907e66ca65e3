"""Health as text and as JSON."""

import json
import time

from fake_feed import FakeFeed

from vla_perception.view import top
from vla_perception.view.health import Reception, Status


def busy_feed():
    feed = FakeFeed()
    camera = {"rate_hz": "29.97", "age_sec": "0.01", "received": "12", "encoded": "9", "replaced": "3"}
    problem = "no frame for 5 s although /front/image_raw has a publisher: has the camera stopped?"
    now = time.monotonic()
    for second, messages in ((now - 2, "10"), (now, "30")):
        model = {"model": "test", "weights": "random", "fingerprint": "ab" * 32, "token_messages": messages}
        statuses = [
            Status("visual_tokenizer: model", 0, "active", model | {"device": "cpu", "encode_errors": "2"}),
            Status("visual_tokenizer: camera front", 1, problem, camera),
            Status("visual_tokenizer: timing", 1, "tokens are old", {"encode_p50_ms": "12.34", "age_p50_ms": "50"}),
        ]
        feed.health.on_statuses(statuses, second)
    feed.health.on_reception(Reception(), now)
    feed.log.add(40, "visual_tokenizer", "two\nlines", 0.0)
    return feed


def test_text_has_what_matters(capsys):
    assert top.run(busy_feed(), once=True, as_json=False) == 0
    text = capsys.readouterr().out
    for part in (
        "/tokens  /visual_tokenizer  active",
        "RANDOM WEIGHTS",
        "out 10.0 Hz, 30 messages",
        "encode_errors 2",
        "no frame for 5 s",
        "ms: p50 50.0, p95 –",
        "tokens are old",
        "error visual_tokenizer: two lines",
    ):
        assert part in text, text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("  front")]
    assert row == ["front", "30.0", "12", "9", "3", "–", "–", "–"]
    assert [line.split() for line in text.splitlines() if line.startswith("  p50")] == [
        ["p50", "–", "–", "12.3", "–", "–"]
    ]


def test_json_for_scripts(capsys):
    assert top.run(busy_feed(), once=True, as_json=True) == 0
    (report,) = json.loads(capsys.readouterr().out)["tokenizers"]
    assert report["out_hz"] == 10 and report["weights"] == "random" and report["cameras"][0]["received"] == 12


def test_ctrl_c_is_how_one_leaves_it(capsys, monkeypatch):
    def interrupted(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", interrupted)
    assert top.run(busy_feed(), once=False, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["tokenizers"][0]["out_hz"] == 10


def test_once_without_a_tokenizer_is_an_error(capsys):
    feed = FakeFeed()
    feed.tokenizers = list
    assert top.run(feed, once=True, as_json=True, wait_sec=0.1) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tokenizers"] == [] and "no tokenizer in a test" in printed.err


def test_long_lines_are_cut_where_the_terminal_ends():
    text = top.as_text("x" * 500, [], [], columns=80)
    assert max(map(len, text.splitlines())) == 80
