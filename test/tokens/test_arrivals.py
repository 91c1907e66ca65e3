"""Late messages, time set back, and several senders on a topic, by their stamps and numbers alone."""

from __future__ import annotations

import random

import pytest

from vla_perception.tokens.arrivals import LATE_IN_A_ROW, RECENT, TURNS_SEC, Order, Senders, StampOrder

LETTERS = {Order.IN_ORDER: ".", Order.LATE: "l", Order.SET_BACK: "b"}

# (what, stamps, how each of them follows the ones before it)
ORDERS = [
    ("in order", [1, 2, 3], "..."),
    ("no stamps", [0, 0, 0, 0], "...."),
    ("two are swapped", [1, 2, 4, 3, 5], "...l."),
    ("three come together", [1, 2, 6, 3, 4, 5, 7], "...lll."),
    ("older than all that came", [5, 4, 6], ".b."),
    ("a bag that loops", [*range(20), 0, 1, 2], "." * 20 + "b.."),
    ("a loop of two", [1, 2, 1, 2, 1, 2], "..l.l."),
    ("a loop of six", [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6], "......lllb.."),
    ("to the oldest that is remembered", [*range(10), 10 - RECENT], "." * 10 + "l"),
    ("and before it", [*range(10), 9 - RECENT], "." * 10 + "b"),
    ("one from the future", [1, 2, 10**6, 3, 4, 5, 6, 7], "...lllb."),
    ("time before 1970", [-5, -3, -4, -2], "..l."),
]


@pytest.mark.parametrize(("stamps", "expected"), [row[1:] for row in ORDERS], ids=[row[0] for row in ORDERS])
def test_orders(stamps, expected):
    order = StampOrder()
    assert "".join(LETTERS[order.add(stamp)] for stamp in stamps) == expected


def test_the_newest_stamp_is_of_this_side_of_a_jump():
    order = StampOrder()
    assert order.latest_ns is None
    for stamp, latest in ((1, 1), (5, 5), (4, 5), (0, 0), (1, 1)):
        order.add(stamp)
        assert order.latest_ns == latest


def test_a_jump_back_of_any_size_is_over_soon():
    """Whatever the step back, no more than LATE_IN_A_ROW messages count as late before stamps are in order again."""
    draw = random.Random(0)
    for _ in range(300):
        order = StampOrder()
        for stamp in range(draw.randint(1, 20)):
            order.add(stamp)
        start = draw.randint(-5, order.latest_ns - 1)
        late = sum(order.add(start + i) is Order.LATE for i in range(30))
        assert late <= LATE_IN_A_ROW


def numbers(*senders, seed=0):
    """The senders' numbers, each sender's in order, mixed."""
    draw, left, mixed = random.Random(seed), [list(sender) for sender in senders], []
    while any(left):
        mixed.append(draw.choice([sender for sender in left if sender]).pop(0))
    return mixed


def turns(sequence, step=0.1):
    senders, told = Senders(), False
    for i, number in enumerate(sequence):
        senders.add(number, i * step)
        told = told or senders.take_turns(i * step)
    return told


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "senders",
    [
        (range(100, 130), range(5, 35)),
        (range(30), range(30)),
        (range(0, 30, 2), range(1, 31, 3)),  # both lose some
        (range(10**12, 10**12 + 20), range(7, 60), range(30)),
    ],
)
def test_senders_that_mix_are_seen(senders, seed):
    assert turns(numbers(*senders, seed=seed))


@pytest.mark.parametrize(
    "sequence",
    [
        [],
        list(range(100)),
        list(range(0, 900, 9)),  # most are lost
        [*range(50), *range(50)],  # started anew, and past the first one's numbers
        [*range(50), *range(3), *range(4), *range(60), *range(10)],  # again and again
        [*range(40), *range(0, 80, 2)],
        [*range(50), *range(1000, 1050)],
        [7] * 50,  # numbers that are none
    ],
    ids=lambda sequence: f"{len(sequence)} numbers",
)
def test_one_sender_at_a_time_is_no_mixture(sequence):
    assert not turns(sequence)


def test_it_is_over_when_they_stop():
    senders = Senders()
    for i in range(10):
        senders.add(i, float(i))
        senders.add(i, float(i))
    assert senders.take_turns(9.0)
    for i in range(10, 10 + int(TURNS_SEC) + 2):
        senders.add(i, float(i))
    assert not senders.take_turns(float(i))
