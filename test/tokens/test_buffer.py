"""`TokenBuffer`: what every source of tokens has in common, without any transport."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_tokenizer import MODEL, make_tokens

from vla_perception.tokens import FingerprintMismatchError, TokenBuffer, VisualTokens
from vla_perception.tokens.arrivals import Order

OTHER = "cd" * 32


def push(buffer, *sequences, **changes):
    for sequence in sequences:
        buffer.push(make_tokens(sequence, **changes))


def test_latest_and_history_in_order():
    tokens = TokenBuffer(history=3)
    assert tokens.latest is None and tokens.history == () and tokens.age() == math.inf
    push(tokens, 0)
    assert [t.sequence for t in tokens.history] == [0]
    push(tokens, 1, 2, 3)
    assert tokens.latest.sequence == 3
    assert [t.sequence for t in tokens.history] == [1, 2, 3]
    assert tokens.received == 4
    with pytest.raises(ValueError, match="at least 1"):
        TokenBuffer(history=0)


def test_gaps_are_counted_and_logged(caplog):
    tokens = TokenBuffer()
    push(tokens, 5, 6, 9, 10, 15)
    assert (tokens.lost, tokens.gaps, tokens.restarts) == (6, 2, 0)
    assert "2 token messages were lost before sequence 9" in caplog.messages[0]


def test_random_weights_are_logged_once(caplog):
    tokens = TokenBuffer()
    push(tokens, 0, 1, weights="random")
    assert caplog.messages == ["the tokens of 'fake' come from random weights: they mean nothing"]


def test_a_restart_is_not_a_gap_and_history_begins_anew(caplog):
    tokens = TokenBuffer(history=4)
    push(tokens, 5, 6, 0, 1)
    assert (tokens.lost, tokens.restarts) == (0, 1)
    assert [t.sequence for t in tokens.history] == [0, 1]
    assert "restarted" in caplog.messages[0]
    # Other weights are a restart even if the numbers happen to go on.
    push(tokens, 9, fingerprint=OTHER)
    assert (tokens.lost, tokens.restarts) == (0, 2)
    assert [t.sequence for t in tokens.history] == [9]


def test_history_never_stacks_what_does_not_belong_together():
    tokens = TokenBuffer(history=4)
    push(tokens, 0, stamp_ns=10)
    push(tokens, 1, stamp_ns=20)
    push(tokens, 2, stamp_ns=5)  # a bag that loops
    assert [t.sequence for t in tokens.history] == [2]
    push(tokens, 3, cameras=("front", "wrist"))
    assert [t.sequence for t in tokens.history] == [3]


@pytest.mark.parametrize(
    ("history", "stamps", "kept"),
    [
        (4, [0, 33, 100, 67, 133, 167], [67, 100, 133, 167]),
        (8, [0, 33, 100, 133, 66, 167], [0, 33, 66, 100, 133, 167]),
        (3, [0, 33, 66, 100, 10], [33, 66, 100]),  # older than all that is kept
        (1, [0, 66, 33], [66]),
        (4, [100, 133, 166, 50, 83], [50, 83]),  # older than all that came: time was set back
        (4, [*range(0, 1000, 33), 0, 33], [0, 33]),
        (3, [0, 0, 0, 0], [0, 0, 0]),
    ],
)
def test_a_late_message_goes_to_its_place_in_the_history(history, stamps, kept):
    tokens, latest = TokenBuffer(history=history), []
    for sequence, stamp in enumerate(stamps):
        push(tokens, sequence, stamp_ns=stamp)
        latest.append(tokens.latest.stamp_ns)
    assert [t.stamp_ns for t in tokens.history] == kept
    assert (tokens.received, tokens.lost, tokens.restarts) == (len(stamps), 0, 0)
    assert sum(after < before for before, after in zip(latest, latest[1:])) == (latest[-1] < max(stamps))


def test_no_wait_returns_for_a_late_message():
    tokens = TokenBuffer()
    push(tokens, 0, stamp_ns=0)
    push(tokens, 1, stamp_ns=100)
    assert tokens.wait(0.0).stamp_ns == 100
    push(tokens, 2, stamp_ns=50)
    with pytest.raises(TimeoutError):
        tokens.wait(0.0)
    push(tokens, 3, stamp_ns=150)
    assert tokens.wait(0.0).stamp_ns == 150


def test_other_weights_are_rejected_and_nothing_old_is_given_instead(caplog):
    tokens = TokenBuffer(expect_fingerprint=MODEL["fingerprint"])
    push(tokens, 0)
    push(tokens, 1, fingerprint=OTHER)
    for read in (
        lambda: tokens.latest,
        lambda: tokens.history,
        lambda: tokens.wait(0.1),
        lambda: tokens.latest_within(9.0),
    ):
        with pytest.raises(FingerprintMismatchError, match="expected was abababab"):
            read()
    assert (tokens.received, tokens.rejected) == (1, 1)
    assert "cdcdcdcd" in caplog.messages[-1]
    push(tokens, 2)
    assert tokens.latest.sequence == 2
    with pytest.raises(ValueError, match="at least 8"):
        TokenBuffer(expect_fingerprint="ab")
    assert TokenBuffer(expect_fingerprint="ABABABAB").push(make_tokens(0)) is Order.IN_ORDER


def test_age_and_freshness(caplog):
    tokens = TokenBuffer()
    now = time.time_ns()
    push(tokens, 0, stamp_ns=now - 2_000_000_000)
    assert 2.0 <= tokens.age() < 4.0
    assert tokens.latest_within(5.0).sequence == 0 and tokens.latest_within(1.0) is None
    # The oldest valid image counts; a view without an image has no age.
    views = make_tokens(1, cameras=("front", "wrist"), stamp_ns=now).views
    old = VisualTokens(
        **{
            **make_tokens(1, cameras=("front", "wrist")).__dict__,
            "views": (
                views[0],
                type(views[1])("wrist", "", now - 10**10, 480, 640, views[1].affine, False),
            ),
        }
    )
    assert old.valid == (True, False) and old.stamps_ns == (now, now - 10**10)
    assert old.age(now) == 0.0 and old.select("wrist").age(now) == math.inf
    # Stamps from the future say that clocks differ, which makes every age meaningless.
    push(tokens, 2, stamp_ns=time.time_ns() + 60 * 10**9)
    assert tokens.latest_within(1.0) is None and "synchronise the clocks" in caplog.messages[-1]


def test_tokens_of_another_condition_are_left_out_and_are_no_loss():
    """A policy that has changed its instruction gets nothing that was computed for the last one."""
    buffer, first, second = TokenBuffer(history=4), "1" * 64, "2" * 64

    def take(sequence, condition):
        return buffer.push(make_tokens(sequence, condition=condition))

    take(0, first)
    buffer.expect_condition(second)
    assert buffer.latest is None and buffer.history == ()
    assert take(1, first) is None and take(2, first) is None
    with pytest.raises(TimeoutError):
        buffer.wait(0.01)
    take(3, second)
    assert buffer.wait(1.0).sequence == 3 and buffer.latest.condition == second
    assert (buffer.lost, buffer.gaps, buffer.rejected) == (0, 0, 0)
    buffer.expect_condition(None)
    take(4, None)
    assert [tokens.sequence for tokens in buffer.history] == [3, 4]


def test_a_wait_goes_on_where_what_came_is_dropped_for_its_condition():
    """Another thread changes the instruction between a message's arrival and the waiting thread's turn."""
    buffer, first, second = TokenBuffer(), "1" * 64, "2" * 64
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(buffer.wait, 10.0)
        time.sleep(0.2)
        with buffer._changed:
            buffer.push(make_tokens(0, condition=first))
            buffer.expect_condition(second)
        time.sleep(0.2)
        assert not waiting.done()
        buffer.push(make_tokens(1, condition=second))
        assert waiting.result(10.0).sequence == 1
