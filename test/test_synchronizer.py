"""Which sets come out for which arrivals, and that every frame is accounted for at every moment."""

from __future__ import annotations

import random

import pytest

from vla_perception.synchronizer import HISTORY, SetSynchronizer
from vla_perception.tokens.arrivals import LATE_IN_A_ROW

MS = 10**6
FRONT, WRIST = "front", "wrist"


class Accountant:
    """Feeds a synchronizer and checks its books after every step."""

    def __init__(self, cameras=(FRONT, WRIST), take=True, **settings):
        self.sync = SetSynchronizer(cameras, **settings)
        self.take = take
        self.sets: list[tuple[int, ...]] = []

    def check(self):
        for counts in self.sync.counts.values():
            settled = counts.encoded + counts.replaced + counts.unmatched + counts.undecodable
            assert counts.received == settled + counts.pending
            assert min(vars(counts).values()) >= 0
        held = {id(frame) for history in self.sync._history.values() for frame in history if not frame.settled}
        held |= {id(frame) for frame in self.sync._waiting or () if not frame.settled}
        held |= {id(frame) for frames in self.sync._taken for frame in frames if not frame.settled}
        assert sum(counts.pending for counts in self.sync.counts.values()) == len(held)
        assert all(len(history) <= HISTORY for history in self.sync._history.values())

    def add(self, camera, stamp_ms):
        made = self.sync.add(camera, round(stamp_ms * MS), f"{camera} {stamp_ms}")
        self.check()
        if made:
            assert self.sync.waiting
        if made and self.take:
            frames = self.sync.take()
            self.check()
            assert [frame.camera for frame in frames] == list(self.sync.cameras)
            self.sets.append(tuple(round(frame.stamp_ns / MS) for frame in frames))
            self.sync.encoded(frames)
            self.check()
        return made

    def play(self, arrivals):
        """`arrivals`: (arrival, camera, stamp) in milliseconds, in any order."""
        for _, camera, stamp in sorted(arrivals, key=lambda arrival: arrival[0]):
            self.add(camera, stamp)
        return self.sets


def stream(camera, rate, seconds, *, delay=0.0, offset=0.0, jitter=0.0, start=0.0, seed=0):
    """A camera's (arrival, camera, stamp) in milliseconds."""
    draw = random.Random(f"{camera} {seed}")
    for i in range(round(seconds * rate)):
        stamp = start + offset + i * 1000 / rate + draw.uniform(-jitter, jitter)
        yield (stamp + delay, camera, stamp)


# (what, settings, arrivals as camera and stamp in ms, the sets that are to come out)
TABLE = [
    ("one camera: every frame", {"cameras": (FRONT,)}, [(FRONT, 0), (FRONT, 33)], [(0,), (33,)]),
    ("same stamps", {}, [(FRONT, 0), (WRIST, 0), (WRIST, 33), (FRONT, 33)], [(0, 0), (33, 33)]),
    ("on the slop", {"slop_sec": 0.02}, [(FRONT, 0), (WRIST, 20)], [(0, 20)]),
    ("beyond the slop", {"slop_sec": 0.02}, [(FRONT, 0), (WRIST, 21)], []),
    ("the closest partner", {"slop_sec": 0.05}, [(FRONT, 0), (FRONT, 33), (FRONT, 66), (WRIST, 40)], [(33, 40)]),
    ("a frame is used once", {"slop_sec": 0.05}, [(FRONT, 0), (WRIST, 0), (FRONT, 33), (FRONT, 66)], [(0, 0)]),
    (
        "a frame that never came",
        {"slop_sec": 0.01},
        [(FRONT, 0), (WRIST, 0), (FRONT, 33), (FRONT, 66), (WRIST, 66)],
        [(0, 0), (66, 66)],
    ),
    (
        "three cameras: the closest to one is not the set",
        {"cameras": ("a", "b", "c"), "slop_sec": 0.03},
        [("b", 80), ("b", 122), ("c", 118), ("a", 100)],
        [(100, 122, 118)],
    ),
    (
        "time is set back: one camera follows late",
        {"slop_sec": 0.01},
        [(FRONT, 5000), (WRIST, 5000), (FRONT, 5033), (FRONT, 0), (WRIST, 5033), (FRONT, 33), (WRIST, 0), (WRIST, 33)],
        [(5000, 5000), (0, 0), (33, 33)],
    ),
    (
        "a camera without stamps",
        {},
        [(FRONT, 0), (WRIST, 0), (FRONT, 0), (WRIST, 0)],
        [(0, 0), (0, 0)],
    ),
    (
        "latest: the others' last ones, again and again",
        {"policy": "latest", "max_age_sec": 0.1},
        [(FRONT, 0), (WRIST, 10), (FRONT, 33), (FRONT, 66), (WRIST, 70), (WRIST, 80), (FRONT, 100)],
        [(33, 10), (66, 10), (100, 80)],
    ),
    (
        "latest: age is measured from the first camera's stamp",
        {"policy": "latest", "max_age_sec": 0.1},
        [(WRIST, 0), (FRONT, 100), (FRONT, 101), (WRIST, 90), (FRONT, 133)],
        [(100, 0), (133, 90)],
    ),
    (
        "latest: the first camera lags, the other is newer",
        {"policy": "latest", "max_age_sec": 0.1},
        [(WRIST, 50), (FRONT, 0), (WRIST, 83), (FRONT, 33)],
        [(0, 50), (33, 83)],
    ),
    (
        "latest: no image from before a jump back",
        {"policy": "latest", "max_age_sec": 0.5},
        [(WRIST, 9990), (FRONT, 10000), (FRONT, 0), (WRIST, 10023), (FRONT, 33), (WRIST, 10), (FRONT, 66)],
        [(10000, 9990), (66, 10)],
    ),
    (
        "latest: the other camera jumps first",
        {"policy": "latest", "max_age_sec": 0.5},
        [(WRIST, 9990), (FRONT, 10000), (WRIST, 0), (FRONT, 10033), (FRONT, 5), (FRONT, 38)],
        [(10000, 9990), (5, 0), (38, 0)],
    ),
    (
        "a late frame still finds its partner, in order",
        {"slop_sec": 0.01},
        [(FRONT, 0), (FRONT, 66), (FRONT, 33), (WRIST, 0), (WRIST, 33), (WRIST, 66)],
        [(0, 0), (33, 33), (66, 66)],
    ),
    (
        "a late frame costs neither what is kept nor the order of the sets",
        {"slop_sec": 0.01},
        [(FRONT, 0), (WRIST, 0), (FRONT, 33), (FRONT, 66), (WRIST, 66), (WRIST, 33), (FRONT, 100), (WRIST, 100)],
        [(0, 0), (66, 66), (100, 100)],
    ),
    (
        "one camera: never tokens that are older than the last ones",
        {"cameras": (FRONT,)},
        [(FRONT, 0), (FRONT, 66), (FRONT, 33), (FRONT, 100)],
        [(0,), (66,), (100,)],
    ),
    (
        "latest: late frames of either camera",
        {"policy": "latest", "max_age_sec": 0.1},
        [(WRIST, 0), (FRONT, 0), (WRIST, 33), (WRIST, 20), (FRONT, 33), (FRONT, 10), (FRONT, 66)],
        [(0, 0), (33, 33), (66, 33)],
    ),
    (
        "one frame from the future",
        {"slop_sec": 0.01},
        [(FRONT, 0), (WRIST, 0), (FRONT, 10**6), (FRONT, 33), (WRIST, 33), (FRONT, 66), (WRIST, 66)],
        [(0, 0), (33, 33), (66, 66)],
    ),
]


@pytest.mark.parametrize(
    ("settings", "arrivals", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_table(settings, arrivals, expected):
    accountant = Accountant(**settings)
    for camera, stamp in arrivals:
        accountant.add(camera, stamp)
    assert accountant.sets == expected


@pytest.mark.parametrize("lagging", [FRONT, WRIST])
def test_a_lag_of_50_ms_at_30_hz_loses_nothing(lagging):
    accountant = Accountant(slop_sec=0.02)
    arrivals = [
        *stream(FRONT, 30, 20, delay=50 * (lagging == FRONT)),
        *stream(WRIST, 30, 20, delay=50 * (lagging == WRIST)),
    ]
    assert len(accountant.play(arrivals)) >= 599
    assert all(front == wrist for front, wrist in accountant.sets)


def test_jitter_keeps_pairs_together():
    accountant = Accountant(slop_sec=0.05)
    jittered = [*stream(FRONT, 5, 60, jitter=20), *stream(WRIST, 5, 60, jitter=20, delay=30)]
    sets = accountant.play(jittered)
    assert len(sets) == 300
    assert all(abs(front - wrist) <= 41 for front, wrist in sets)


def test_different_rates():
    accountant = Accountant(slop_sec=0.02)
    sets = accountant.play([*stream(FRONT, 30, 10), *stream(WRIST, 10, 10, delay=5)])
    assert len(sets) == 100 and all(abs(front - wrist) <= 1 for front, wrist in sets)
    assert accountant.sync.counts[FRONT].unmatched >= 190

    latest = Accountant(policy="latest", max_age_sec=0.2)
    assert len(latest.play([*stream(FRONT, 30, 10, delay=1), *stream(WRIST, 10, 10)])) == 300
    assert latest.sync.counts[WRIST].encoded == 100  # in three sets each, counted once
    fast = Accountant(policy="latest", max_age_sec=0.2)
    assert len(fast.play([*stream(FRONT, 10, 10, delay=1), *stream(WRIST, 30, 10)])) == 100
    assert fast.sync.counts[WRIST].replaced == 300 - 100 - fast.sync.counts[WRIST].pending


@pytest.mark.parametrize("policy", ["approximate", "latest"])
def test_a_camera_dies_and_comes_back(policy):
    accountant = Accountant(policy=policy, slop_sec=0.02, max_age_sec=0.1)
    arrivals = [
        *stream(FRONT, 30, 30, delay=1),
        *stream(WRIST, 30, 10),
        *stream(WRIST, 30, 10, start=20000),
    ]
    sets = accountant.play(arrivals)
    assert 600 <= len(sets) <= 600 + 4  # `latest` may use the last frame for max_age_sec
    assert not [front for front, _ in sets if 10200 < front < 19900]
    assert sets[-1][0] > 29900
    assert accountant.sync.counts[FRONT].pending <= HISTORY


@pytest.mark.parametrize("policy", ["approximate", "latest"])
@pytest.mark.parametrize("lag", [0, 5, 50])
@pytest.mark.parametrize("length", [0.5, 10])
def test_a_bag_that_loops(policy, lag, length):
    """One set at most is lost at each turn per frame of lag, and none mixes two rounds."""
    accountant = Accountant(policy=policy, slop_sec=0.01, max_age_sec=0.1)
    rounds = 5
    arrivals = []
    for i in range(rounds):
        for camera, delay in ((FRONT, 1), (WRIST, lag)):
            for arrival, _, stamp in stream(camera, 30, length):
                arrivals.append((arrival + i * length * 1000 + delay, camera, stamp))
    sets = accountant.play(arrivals)
    per_turn = 1 + -(-lag // 33)
    assert len(sets) >= rounds * (length * 30 - per_turn)
    assert all(abs(front - wrist) <= 100 for front, wrist in sets)


@pytest.mark.parametrize("policy", ["approximate", "latest"])
@pytest.mark.parametrize("frames", [2, 3, 5, 8])
def test_a_loop_of_a_few_frames_goes_on(policy, frames):
    """Its steps back are no larger than a late frame's, but frame after frame is late."""
    accountant = Accountant(policy=policy, slop_sec=0.01)
    for _ in range(40):
        for i in range(frames):
            accountant.add(WRIST, i * 33)
            accountant.add(FRONT, i * 33)
    assert len(accountant.sets) >= 40 * max(1, frames - LATE_IN_A_ROW)


@pytest.mark.parametrize("rate", [2, 10, 30, 60])
@pytest.mark.parametrize("behind", [1, 2, 5])
@pytest.mark.parametrize("lag", [0, 2.5, 6])
@pytest.mark.parametrize("swapping", [(FRONT,), (WRIST,), (FRONT, WRIST)])
def test_frames_out_of_order(rate, behind, lag, swapping):
    """A frame in twenty comes `behind` places late; `lag` periods of the wrist's camera. Each costs its own set at most."""
    frames, period, arrivals = 200, 1000 / rate, []
    for camera, delay in ((FRONT, 0.0), (WRIST, lag * period + 0.1)):
        order = list(range(frames))
        for i in range(10, frames - behind, 20) if camera in swapping else ():
            order.insert(i + behind, order.pop(i))
        arrivals += [(i * period + delay, camera, stamp * period) for i, stamp in enumerate(order)]
    accountant = Accountant(slop_sec=0.4 / rate)
    sets = accountant.play(arrivals)
    assert len(sets) >= frames - 10 * len(swapping)
    assert sets == sorted(sets) and all(abs(front - wrist) < 1 for front, wrist in sets)
    late = accountant.sync.counts[swapping[0]]
    assert late.received == frames == late.encoded + late.replaced + late.unmatched + late.pending


def test_only_the_latest_frame_set_waits():
    accountant = Accountant(take=False)
    for i in range(50):
        accountant.add(FRONT, i * 33)
        accountant.add(WRIST, i * 33)
    counts = accountant.sync.counts[FRONT]
    assert (counts.received, counts.replaced, counts.pending) == (50, 49, 1)
    assert accountant.sync.take()[0].stamp_ns == 49 * 33 * MS
    assert accountant.sync.take() is None


def test_a_dead_camera_keeps_the_history_bounded():
    accountant = Accountant()
    for i in range(1000):
        accountant.add(FRONT, i * 33)
    counts = accountant.sync.counts[FRONT]
    assert (counts.unmatched, counts.pending) == (1000 - HISTORY, HISTORY)


def test_undecodable_frames():
    accountant = Accountant(take=False)
    accountant.add(FRONT, 0)
    accountant.add(WRIST, 0)
    frames = accountant.sync.take()
    accountant.sync.undecodable(frames, [frames[1]])
    accountant.check()
    counts = accountant.sync.counts
    assert (counts[WRIST].undecodable, counts[FRONT].unmatched) == (1, 1)
    assert counts[FRONT].pending == counts[WRIST].pending == 0


def test_frames_that_are_refused_leave_the_others_alone():
    accountant = Accountant()
    accountant.add(FRONT, 0)
    accountant.sync.reject(WRIST)
    accountant.check()
    accountant.add(WRIST, 0)
    assert accountant.sets == [(0, 0)]
    assert (accountant.sync.counts[WRIST].received, accountant.sync.counts[WRIST].undecodable) == (2, 1)


def test_latest_does_not_use_an_undecodable_frame_again():
    accountant = Accountant(take=False, policy="latest")
    accountant.add(WRIST, 0)
    accountant.add(FRONT, 10)
    frames = accountant.sync.take()
    accountant.sync.undecodable(frames, [frames[1]])
    accountant.check()
    assert not accountant.add(FRONT, 20)
    accountant.add(WRIST, 25)
    assert accountant.add(FRONT, 30)


def test_latest_counts_a_shared_frame_once():
    accountant = Accountant(take=False, policy="latest")
    accountant.add(WRIST, 0)
    accountant.add(FRONT, 10)
    first = accountant.sync.take()
    accountant.add(FRONT, 20)
    second = accountant.sync.take()
    accountant.add(WRIST, 25)
    accountant.check()
    accountant.sync.replaced(first)
    accountant.check()
    assert accountant.sync.counts[WRIST].pending == 2  # still in the second set, and the new one
    accountant.sync.encoded(second)
    accountant.check()
    assert vars(accountant.sync.counts[WRIST]) == {
        "received": 2,
        "encoded": 1,
        "replaced": 0,
        "unmatched": 0,
        "undecodable": 0,
        "pending": 1,
    }


def test_clear_and_change_of_policy():
    accountant = Accountant(take=False)
    accountant.add(FRONT, 1000)
    accountant.add(WRIST, 1000)
    accountant.add(FRONT, 1033)
    accountant.sync.policy = "latest"
    accountant.check()
    assert not accountant.sync.waiting
    counts = accountant.sync.counts[FRONT]
    assert (counts.replaced, counts.unmatched, counts.pending) == (1, 1, 0)
    assert accountant.sync.last_stamp_ns(FRONT) is None


def test_random_arrivals_keep_the_books():
    draw = random.Random(1)
    for policy in ("approximate", "latest"):
        accountant = Accountant(cameras=("a", "b", "c"), take=False, policy=policy)
        stamps, taken = dict.fromkeys("abc", 0.0), []
        for _ in range(3000):
            camera = draw.choice("aabc")
            stamps[camera] = stamps[camera] + draw.uniform(0, 60) if draw.random() > 0.01 else draw.uniform(0, 500)
            accountant.add(camera, stamps[camera])
            if draw.random() < 0.3 and (frames := accountant.sync.take()):
                taken.append(frames)
            while len(taken) > 2 or (taken and draw.random() < 0.3):
                frames = taken.pop(0)
                end = draw.choice((accountant.sync.encoded, accountant.sync.replaced, None))
                if end is None:
                    accountant.sync.undecodable(frames, [draw.choice(frames)])
                else:
                    end(frames)
                accountant.check()


@pytest.mark.parametrize("cameras", [(), (FRONT, FRONT)])
def test_refuses_cameras_that_are_none(cameras):
    with pytest.raises(ValueError, match="different names"):
        SetSynchronizer(cameras)


def test_refuses_an_unknown_policy():
    with pytest.raises(ValueError, match="exact.*approximate, latest"):
        SetSynchronizer((FRONT,), policy="exact")
