"""Levels of /diagnostics, by tables: what a supervisor may rely on."""

import dataclasses

import pytest

from vla_perception.nodes.visual_tokenizer.levels import CameraLevel, CameraSample, Level, ModelLevel, timing_level
from vla_perception.nodes.visual_tokenizer.parameters import TokenizerParameters

DEFAULTS = TokenizerParameters()
NONE = {"encode_errors": 0, "non_finite": 0, "publish_errors": 0}


def thresholds(**values):
    return dataclasses.replace(DEFAULTS, **values)


def sample(received=0, replaced=0, unmatched=0, undecodable=0, **values):
    counts = {"received": received, "replaced": replaced, "unmatched": unmatched, "undecodable": undecodable}
    known = {"rate_hz": 30.0, "silent_sec": 0.03, "subscribed_sec": 60.0, "problem": ""}
    return CameraSample(counts, **(known | values))


@pytest.mark.parametrize(
    ("silent", "problem", "level"),
    [
        (0.03, "", Level.OK),
        (6.0, "stopped?", Level.WARN),
        (9.9, "stopped?", Level.WARN),
        (10.0, "stopped?", Level.ERROR),
    ],
)
def test_a_silent_camera_is_a_warning_and_then_an_error(silent, problem, level):
    found = CameraLevel().of(sample(silent_sec=silent, problem=problem), DEFAULTS, 0.0)
    assert found == (level, problem or "ok")


def test_two_publishers_are_a_warning_for_ever():
    """Tokens come: wrong ones, but no restart of anything would help."""
    found = CameraLevel().of(sample(problem="more than one publisher"), DEFAULTS, 1000.0)
    assert found[0] == Level.WARN


def test_a_slow_camera_is_a_warning_where_it_was_asked_for():
    slow = sample(rate_hz=9.4)
    assert CameraLevel().of(slow, DEFAULTS, 0.0)[0] == Level.OK
    level, message = CameraLevel().of(slow, thresholds(warn_rate_hz=10.0), 0.0)
    assert level == Level.WARN and "9.4 frames a second" in message
    just_started = sample(rate_hz=0.0, subscribed_sec=1.0)
    assert CameraLevel().of(just_started, thresholds(warn_rate_hz=10.0), 0.0)[0] == Level.OK


def test_the_share_of_frames_without_tokens_is_that_of_the_last_seconds():
    camera, limit = CameraLevel(), thresholds(warn_drop_share=0.5)
    # 30 frames a second; from the 20th second on, 24 of them are replaced, and from the 40th on none.
    levels = []
    for second in range(60):
        replaced = 24 * (min(max(second, 20), 40) - 20)
        levels.append(camera.of(sample(received=30 * second, replaced=replaced), limit, float(second)))
    found = [level for level, _ in levels]
    assert found[:24] == [Level.OK] * 24 and found[30:41] == [Level.WARN] * 11 and found[47:] == [Level.OK] * 13
    assert "of the last 300 frames" in levels[35][1] and "replaced 80%" in levels[35][1]
    assert CameraLevel().of(sample(received=3, undecodable=3), limit, 0.0)[0] == Level.OK  # too few to tell
    assert [CameraLevel().of(sample(received=300, replaced=300), DEFAULTS, 0.0)[0]] == [Level.OK]


def test_a_model_that_fails_and_one_that_only_fails():
    model = ModelLevel()
    assert model.of("active", "", NONE, 5, DEFAULTS, 0.0) == (Level.OK, "active")
    # Some fail, some come out: never an error.
    for second in range(1, 40):
        level, message = model.of("active", "", NONE | {"non_finite": second}, 5 + second, DEFAULTS, float(second))
        assert level == Level.WARN and message.startswith("active, and frame sets fail (non_finite)")
    # Nothing comes out any more, since second 39.
    levels = [model.of("active", "", NONE | {"non_finite": s}, 44, DEFAULTS, float(s))[0] for s in range(40, 60)]
    assert levels == [Level.WARN] * 9 + [Level.ERROR] * 11
    # No frames, no failures: the cameras' statuses say why.
    assert model.of("active", "", NONE | {"non_finite": 59}, 44, DEFAULTS, 60.0) == (Level.OK, "active")


def test_a_configure_that_failed_is_an_error_until_the_next():
    model = ModelLevel()
    level, message = model.of("unconfigured", "no checkpoint at /nowhere", NONE, 0, DEFAULTS, 0.0)
    assert (level, message) == (Level.ERROR, "unconfigured, because configure failed: no checkpoint at /nowhere")
    assert model.of("configuring", "no checkpoint at /nowhere", NONE, 0, DEFAULTS, 1.0) == (Level.OK, "configuring")
    assert model.of("unconfigured", "", NONE, 0, DEFAULTS, 2.0) == (Level.OK, "unconfigured")


def test_tokens_older_than_wanted():
    ages = [0.1] * 94 + [0.8] * 6
    assert timing_level(ages, DEFAULTS) == (Level.OK, "ok")
    level, message = timing_level(ages, thresholds(warn_token_age_sec=0.5))
    assert level == Level.WARN and "0.800 s old" in message
    assert timing_level([0.1] * 96 + [0.8] * 4, thresholds(warn_token_age_sec=0.5))[0] == Level.OK
    assert timing_level([], thresholds(warn_token_age_sec=0.5))[0] == Level.OK
    assert timing_level([float("inf")], thresholds(warn_token_age_sec=0.5))[0] == Level.WARN
