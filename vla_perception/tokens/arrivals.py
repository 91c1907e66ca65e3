"""What arrivals on one topic tell: late messages, time that was set back, several senders. No ROS, no clock."""

from __future__ import annotations

import enum
from collections import deque

#: Stamps that are remembered: a message not older than all of these is late, an older one means that time was set back.
RECENT = 8
#: Late messages in a row; one more means that time was set back by little, as by a recording of a few messages that loops.
LATE_IN_A_ROW = 3
#: Seconds within which senders must have taken turns `TURNS` times.
TURNS_SEC = 10.0
TURNS = 2
#: Senders that are told apart.
_SENDERS = 8


class Order(enum.Enum):
    """How a stamp follows the ones before it."""

    IN_ORDER = enum.auto()
    LATE = enum.auto()
    SET_BACK = enum.auto()


class StampOrder:
    """Tells a late message from time that was set back (a bag that loops, a simulation that is reset).

    A stamp before the latest one is late if it is not before the oldest of the last `RECENT` stamps, and no more than
    `LATE_IN_A_ROW` messages came late in a row. Otherwise time was set back, and nothing is remembered from before.

    Attributes:
        newest_ns: the latest stamp since time was set back, nanoseconds; None before the first.
    """

    def __init__(self) -> None:
        self.newest_ns: int | None = None
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._late = 0

    def add(self, stamp_ns: int) -> Order:
        """Takes in the stamp of the message that has arrived."""
        order = Order.IN_ORDER
        if self.newest_ns is not None and stamp_ns < self.newest_ns:
            within = stamp_ns >= min(self._recent) and self._late < LATE_IN_A_ROW
            order = Order.LATE if within else Order.SET_BACK
        if order is Order.SET_BACK:
            self._recent.clear()
        if order is Order.LATE:
            self._late += 1
        else:
            self._late = 0
            self.newest_ns = stamp_ns
        self._recent.append(stamp_ns)
        return order


class Senders:
    """Whether several senders take turns on one topic, told by numbers that each of them counts up.

    One that is started anew after it was killed counts from the beginning, too, but the first one's numbers do not go
    on: that is no turn. So it does not matter that DDS lists a publisher for seconds after it was killed.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []  # the last one of each sender; at the end the sender's who sent last
        self._turns: deque[float] = deque(maxlen=TURNS)

    def add(self, number: int, now: float) -> None:
        """Takes in the number of a message that has arrived at `now`, in seconds."""
        lower = [index for index, last in enumerate(self._numbers) if last < number]
        if lower:
            sender = max(lower, key=lambda index: (self._numbers[index], index))
            if sender != len(self._numbers) - 1:
                self._turns.append(now)
            del self._numbers[sender]
        self._numbers.append(number)
        del self._numbers[:-_SENDERS]

    def take_turns(self, now: float) -> bool:
        """Whether they have done so within the last `TURNS_SEC`."""
        return len(self._turns) == TURNS and now - self._turns[0] <= TURNS_SEC
