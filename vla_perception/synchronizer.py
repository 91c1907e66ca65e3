"""Which frames of several cameras go through the encoders together. No ROS in here, no threads, no clock.

The latest frame set wins: each camera keeps a short history, so that a camera that lags still finds its partners, and
of the frame sets that came out of it only the latest waits to be taken. Every frame is accounted for, at every moment:
received = encoded + replaced + unmatched + undecodable + pending.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from vla_perception.options import SYNC_POLICIES
from vla_perception.tokens.arrivals import RECENT, Order, StampOrder

#: Frames that a camera keeps while their partners are on the way: 8 make up for a lag of 250 ms at 30 Hz. As many as
#: stamps are remembered to recognise a late one: what may still find its place in the history is not taken for a jump.
HISTORY = RECENT


@dataclass(eq=False)
class Frame:
    """One image on its way.

    Attributes:
        camera: its camera's name.
        stamp_ns: the image's stamp, nanoseconds of whatever clock stamped it.
        image: anything; only handed through.
    """

    camera: str
    stamp_ns: int
    image: Any = field(repr=False)
    settled: bool = False


FrameSet = tuple[Frame, ...]
"""One frame per camera, in the order of the cameras."""


@dataclass
class Counts:
    """What became of a camera's frames.

    Attributes:
        received: all of them.
        encoded: went through the encoders.
        replaced: a newer one was there before their turn came, or before they did.
        unmatched: found no partners in time, or lost a partner that could not be decoded.
        undecodable: not a readable image, or rejected as they came.
        pending: still in flight (buffered, matched or being encoded).
    """

    received: int = 0
    encoded: int = 0
    replaced: int = 0
    unmatched: int = 0
    undecodable: int = 0
    pending: int = 0


class SetSynchronizer:
    """Frames in, one at a time; frame sets out, latest first. Not thread-safe: guard it with one lock.

    approximate: frames whose stamps all lie within `slop_sec` of each other make a frame set; each frame is in one at
        most. Of several possible ones that with the closest stamps is made. A slop above half a camera's period may
        pair neighbours where a frame is missing.
    latest: each frame of the first camera makes a frame set with the latest frame of every other, if that one is not
        further than `max_age_sec` from it in stamp; a frame of another camera may be in several frame sets.

    A frame that is a little older than the same camera's latest one is late (`arrivals.StampOrder` says where the line
    is). approximate: it goes to its place in the history and finds its partners like any other, unless a newer frame
    of its camera was in a frame set already. latest: the newer one stays. So no frame set is older than one before it.

    A frame that is much older means that time has been set back (a bag that loops, a simulation that is reset): what
    was kept from before is dropped, of this camera and of those that are yet to follow, so that no frame set mixes
    before and after.
    """

    def __init__(
        self, cameras: Sequence[str], policy: str = "approximate", slop_sec: float = 0.05, max_age_sec: float = 0.5
    ) -> None:
        if not cameras or len(set(cameras)) != len(cameras):
            raise ValueError(f"cameras must be one or more different names, got {list(cameras)}")
        self.cameras = tuple(cameras)
        self.counts = {camera: Counts() for camera in self.cameras}
        self.sets_made = 0
        self.slop_sec = slop_sec
        self.max_age_sec = max_age_sec
        self._history: dict[str, deque[Frame]] = {camera: deque() for camera in self.cameras}
        self._orders: dict[str, StampOrder] = {}
        self._matched_ns: dict[str, int] = {}  # stamp of each camera's frame in the last frame set
        self._waiting: FrameSet | None = None
        self._taken: list[FrameSet] = []
        self._policy = ""
        self.policy = policy

    @property
    def policy(self) -> str:
        """One of `options.SYNC_POLICIES`; setting another one drops what is kept."""
        return self._policy

    @policy.setter
    def policy(self, policy: str) -> None:
        if policy not in SYNC_POLICIES:
            raise ValueError(f"sync_policy {policy!r} is not one of {', '.join(SYNC_POLICIES)}")
        if policy != self._policy:
            self.clear()
        self._policy = policy

    @property
    def waiting(self) -> bool:
        """Whether `take` would give a frame set."""
        return self._waiting is not None

    def last_stamp_ns(self, camera: str) -> int | None:
        """Stamp of the camera's latest frame; None before the first."""
        order = self._orders.get(camera)
        return None if order is None else order.latest_ns

    def add(self, camera: str, stamp_ns: int, image: object) -> bool:
        """A frame has arrived. Returns whether it completed a frame set, which then waits in place of any older one."""
        frame = Frame(camera, stamp_ns, image)
        counts = self.counts[camera]
        counts.received += 1
        counts.pending += 1
        last = self.last_stamp_ns(camera)
        order = self._orders.setdefault(camera, StampOrder()).add(stamp_ns)
        if order is Order.SET_BACK and last is not None:
            self._set_back(camera, last, stamp_ns)
        elif order is Order.LATE and (
            self._policy == "latest" or stamp_ns <= self._matched_ns.get(camera, stamp_ns - 1)
        ):
            self._settle(frame, "replaced")
            return False
        frames = self._match_approximate(frame) if self._policy == "approximate" else self._match_latest(frame)
        if frames is None:
            return False
        self.sets_made += 1
        self._matched_ns = {chosen.camera: chosen.stamp_ns for chosen in frames}
        before, self._waiting = self._waiting, frames
        self._release(before or (), "replaced")
        return True

    def reject(self, camera: str) -> None:
        """A frame has arrived that cannot be used: neither its stamp nor its image counts."""
        self.counts[camera].received += 1
        self.counts[camera].undecodable += 1

    def take(self) -> FrameSet | None:
        """The waiting frame set, to be worked on and then given to `encoded`, `replaced` or `undecodable`."""
        frames, self._waiting = self._waiting, None
        if frames is not None:
            self._taken.append(frames)
        return frames

    def encoded(self, frames: FrameSet) -> None:
        """A taken frame set has gone through the encoders."""
        self._taken.remove(frames)
        for frame in frames:
            self._settle(frame, "encoded")

    def replaced(self, frames: FrameSet) -> None:
        """A taken frame set has been given up for a newer one."""
        self._taken.remove(frames)
        self._release(frames, "replaced")

    def undecodable(self, frames: FrameSet, bad: Sequence[Frame]) -> None:
        """Frames of a taken frame set could not be decoded; its others have lost their partners."""
        self._taken.remove(frames)
        for frame in bad:
            self._settle(frame, "undecodable")
            if frame in self._history[frame.camera]:
                self._history[frame.camera].remove(frame)
        self._release(frames, "unmatched")

    def clear(self) -> None:
        """Drops what is kept and forgets past stamps; taken frame sets and the counts go on."""
        self._orders.clear()
        self._matched_ns.clear()
        for history in self._history.values():
            self._drop_history(history)
        waiting, self._waiting = self._waiting, None
        self._release(waiting or (), "replaced")

    def _match_approximate(self, frame: Frame) -> FrameSet | None:
        history = self._history[frame.camera]
        bisect.insort(history, frame, key=attrgetter("stamp_ns"))
        if len(history) > HISTORY:
            self._release((history.popleft(),), "unmatched")
        frames = self._closest_set()
        if frames is None:
            return None
        for chosen in frames:
            history = self._history[chosen.camera]
            passed = []
            while (first := history.popleft()) is not chosen:
                passed.append(first)
            self._release(passed, "unmatched")
        return frames

    def _closest_set(self) -> FrameSet | None:
        """The frame set of the smallest spread of stamps, the latest of equals; None if none is within the slop."""
        best: FrameSet | None = None
        best_spread = round(self.slop_sec * 1e9)
        for start in (frame.stamp_ns for history in self._history.values() for frame in history):
            # Histories are in the order of their stamps: the earliest frame not before `start` is the closest.
            closest = [
                next((frame for frame in history if frame.stamp_ns >= start), None)
                for history in self._history.values()
            ]
            frames = tuple(frame for frame in closest if frame is not None)
            if len(frames) < len(closest):
                continue
            spread = max(frame.stamp_ns for frame in frames) - start
            newer = best is not None and frames[0].stamp_ns > best[0].stamp_ns
            if spread < best_spread or (spread == best_spread and (best is None or newer)):
                best, best_spread = frames, spread
        return best

    def _match_latest(self, frame: Frame) -> FrameSet | None:
        if frame.camera != self.cameras[0]:
            history = self._history[frame.camera]
            before = tuple(history)
            history.clear()
            history.append(frame)
            self._release(before, "replaced")
            return None
        limit = round(self.max_age_sec * 1e9)
        frames = [frame]
        for camera in self.cameras[1:]:
            history = self._history[camera]
            # Much newer is as wrong as much older: the other camera has not yet followed a jump back in time.
            if not history or abs(frame.stamp_ns - history[-1].stamp_ns) > limit:
                self._release((frame,), "unmatched")
                return None
            frames.append(history[-1])
        return tuple(frames)

    def _set_back(self, camera: str, last: int, stamp_ns: int) -> None:
        self._matched_ns.pop(camera, None)
        middle = (last + stamp_ns) // 2
        for other, history in self._history.items():
            # A camera whose last stamp is already on this side has followed; what it keeps is from after the jump.
            latest = self.last_stamp_ns(other)
            if other == camera or (latest is not None and latest > middle):
                self._drop_history(history)
        if self._waiting is not None and any(frame.stamp_ns > middle for frame in self._waiting):
            waiting, self._waiting = self._waiting, None
            self._release(waiting, "replaced")

    def _drop_history(self, history: deque[Frame]) -> None:
        frames = tuple(history)
        history.clear()
        self._release(frames, "unmatched")

    def _release(self, frames: Sequence[Frame], outcome: str) -> None:
        """Frames that left one place: those that are in no other place either are settled."""
        for frame in frames:
            held = frame in self._history[frame.camera] or any(frame in other for other in self._taken)
            if not held and not (self._waiting and frame in self._waiting):
                self._settle(frame, outcome)

    def _settle(self, frame: Frame, outcome: str) -> None:
        if frame.settled:
            return
        frame.settled = True
        counts = self.counts[frame.camera]
        counts.pending -= 1
        setattr(counts, outcome, getattr(counts, outcome) + 1)
