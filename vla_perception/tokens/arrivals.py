"""What follows from the order of messages: late ones, time that was set back, lost ones, a restart, several senders.

By stamps and numbers alone: no ROS, no threads, no clock. `StampOrder` draws the line between a late message and time
that was set back (here for tokens, in `synchronizer` for frames); `Continuity` draws it between a lost message and
a tokenizer that restarted.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

#: Stamps that are remembered: a message not older than all of these is late, an older one means that time was set back.
RECENT = 8
#: Late messages in a row; one more means that time was set back by little, as by a recording of a few messages that loops.
LATE_IN_A_ROW = 3
#: Seconds within which senders must have taken turns `TURNS` times.
TURNS_SEC = 10.0
TURNS = 2
#: Senders that are distinguished.
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
        latest_ns: the latest stamp since time was set back, nanoseconds; None before the first.
    """

    def __init__(self) -> None:
        self.latest_ns: int | None = None
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._late = 0

    def add(self, stamp_ns: int) -> Order:
        """Takes in the stamp of the message that has arrived."""
        order = Order.IN_ORDER
        if self.latest_ns is not None and stamp_ns < self.latest_ns:
            within = stamp_ns >= min(self._recent) and self._late < LATE_IN_A_ROW
            order = Order.LATE if within else Order.SET_BACK
        if order is Order.SET_BACK:
            self._recent.clear()
        if order is Order.LATE:
            self._late += 1
        else:
            self._late = 0
            self.latest_ns = stamp_ns
        self._recent.append(stamp_ns)
        return order


@dataclass(frozen=True)
class Continuation:
    """How a token message follows the one before it.

    Attributes:
        restarted: another run of the tokenizer, or another tokenizer, sent it.
        lost: messages between the two that never arrived; 0 after a restart.
    """

    restarted: bool = False
    lost: int = 0


class Continuity:
    """Tells messages that were lost from a tokenizer that restarted.

    A number that is not above the last one, or another fingerprint, is a restart. So is a gap where another publisher
    than before sent the message: a restarted tokenizer does not begin at 0 where a subscriber sees its first messages
    late. Any other gap is a loss.
    """

    def __init__(self) -> None:
        self._last: tuple[int, str] | None = None

    def add(self, sequence: int, fingerprint: str, another_publisher: Callable[[], bool]) -> Continuation:
        """Takes in a message; `another_publisher` is only asked where there is a gap, for it may take time."""
        last, self._last = self._last, (sequence, fingerprint)
        if last is None:
            return Continuation()
        if sequence <= last[0] or fingerprint != last[1]:
            return Continuation(restarted=True)
        lost = sequence - last[0] - 1
        return Continuation(restarted=True) if lost and another_publisher() else Continuation(lost=lost)


class Senders:
    """Whether several senders take turns on one topic, by the numbers that each of them counts up.

    One that is started anew after it was killed counts from the beginning, too, but the first one's numbers do not go
    on: that is not a turn. So it does not matter that DDS lists a publisher for seconds after it was killed.
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
