"""Topic ↔ shared memory as a table: who delivers, nothing twice, what is in flight is not lost, restarts."""

import random
from collections import deque

import pytest
from fake_tokenizer import make_tokens

from vla_perception.tokens import TokenBuffer
from vla_perception.tokens.handover import PENDING_SEC, SHARED_MEMORY, TOPIC, Handover


def message(sequence: int, **changes):
    """The same message each time, whichever transport brings it."""
    return make_tokens(sequence, stamp_ns=10**18 + sequence, **changes)


class Subscriber:
    """What `TokenSubscriber` does with a `Handover`, without threads and transports."""

    def __init__(self):
        self.handover, self.buffer, self.now, self.delivered = Handover(), TokenBuffer(), 0.0, []

    def step(self, event: str, *values) -> list[int]:
        """Events: topic SEQUENCE; shm SEQUENCE WRITER; after SECONDS; gone; left; subscribed. → delivered sequences."""
        deliveries = []
        if event == "topic":
            deliveries = self.handover.on_topic(message(*values), self.now)
        elif event == "shm":
            deliveries = self.handover.on_shared_memory(message(values[0]), values[1], self.now)
        elif event == "after":
            self.now += values[0]
            deliveries = self.handover.on_time(self.now)
        elif event == "gone":
            self.handover.on_writers_gone()
        else:
            self.handover.on_subscribed({"left": False, "subscribed": True}[event])
        for delivery in deliveries:
            self.buffer.push(delivery.tokens, lambda delivery=delivery: bool(delivery.another_run))
        self.delivered += [delivery.tokens.sequence for delivery in deliveries]
        return [delivery.tokens.sequence for delivery in deliveries]


A, B = 1, 2  # runs of the tokenizer in shared memory
SOON, LATE = 0.8 * PENDING_SEC, 0.4 * PENDING_SEC

#: name → steps (event, delivered, transport afterwards), and (received, lost, gaps, restarts) in the end.
TABLE = {
    "the topic alone": (
        [(("topic", 0), [0], TOPIC), (("topic", 1), [1], TOPIC), (("after", 99.0), [], TOPIC)],
        (2, 0, 0, 0),
    ),
    "shared memory before anything else": (
        [(("shm", 5, A), [5], SHARED_MEMORY), (("shm", 6, A), [6], SHARED_MEMORY)],
        (2, 0, 0, 0),
    ),
    "the next message by shared memory": (
        [
            (("topic", 0), [0], TOPIC),
            (("shm", 1, A), [1], SHARED_MEMORY),
            (("topic", 1), [], SHARED_MEMORY),  # its copy
            (("topic", 2), [], SHARED_MEMORY),  # before shared memory brings it
            (("shm", 2, A), [2], SHARED_MEMORY),
        ],
        (3, 0, 0, 0),
    ),
    "shared memory brings what the topic has delivered": (
        [(("topic", 0), [0], TOPIC), (("shm", 0, A), [], SHARED_MEMORY), (("shm", 1, A), [1], SHARED_MEMORY)],
        (2, 0, 0, 0),
    ),
    "a message in flight on the topic is waited for": (
        [
            (("topic", 0), [0], TOPIC),
            (("shm", 2, A), [], TOPIC),
            (("shm", 3, A), [], TOPIC),
            (("topic", 1), [1, 2, 3], SHARED_MEMORY),
            (("topic", 2), [], SHARED_MEMORY),
            (("shm", 6, A), [6], SHARED_MEMORY),  # 4 and 5 never came
        ],
        (5, 2, 1, 0),
    ),
    "several in flight": (
        [
            (("topic", 0), [0], TOPIC),
            (("shm", 3, A), [], TOPIC),
            (("topic", 1), [1], TOPIC),
            (("topic", 2), [2, 3], SHARED_MEMORY),
        ],
        (4, 0, 0, 0),
    ),
    "a message that never comes is waited for a while, and then lost": (
        [
            (("topic", 0), [0], TOPIC),
            (("shm", 2, A), [], TOPIC),
            (("after", SOON), [], TOPIC),
            (("shm", 3, A), [], TOPIC),
            (("after", LATE), [2, 3], SHARED_MEMORY),
        ],
        (3, 1, 1, 0),
    ),
    "the topic has passed over a lost message": (
        [(("topic", 0), [0], TOPIC), (("shm", 2, A), [], TOPIC), (("topic", 2), [2], SHARED_MEMORY)],
        (2, 1, 1, 0),
    ),
    "the writer goes": (
        [
            (("shm", 0, A), [0], SHARED_MEMORY),
            (("left",), [], SHARED_MEMORY),
            (("gone",), [], TOPIC),
            (("subscribed",), [], TOPIC),
            (("topic", 1), [1], TOPIC),
        ],
        (2, 0, 0, 0),
    ),
    "the writer goes before the topic was left: its copies come": (
        [
            (("topic", 0), [0], TOPIC),
            (("shm", 1, A), [1], SHARED_MEMORY),
            (("shm", 2, A), [2], SHARED_MEMORY),
            (("gone",), [], TOPIC),
            (("topic", 1), [], TOPIC),
            (("topic", 2), [], TOPIC),
            (("topic", 3), [3], TOPIC),
        ],
        (4, 0, 0, 0),
    ),
    "the writer goes while its messages wait: the topic brings them": (
        [
            (("topic", 0), [0], TOPIC),
            (("shm", 2, A), [], TOPIC),
            (("gone",), [], TOPIC),
            (("after", 9.0), [], TOPIC),
            (("topic", 1), [1], TOPIC),
            (("topic", 2), [2], TOPIC),
        ],
        (3, 0, 0, 0),
    ),
    "another run of the tokenizer, from the beginning": (
        [(("shm", 7, A), [7], SHARED_MEMORY), (("shm", 0, B), [0], SHARED_MEMORY)],
        (2, 0, 0, 1),
    ),
    "another run whose numbers go on as if some had been lost": (
        [(("shm", 7, A), [7], SHARED_MEMORY), (("shm", 100, B), [100], SHARED_MEMORY)],
        (2, 0, 0, 1),
    ),
    "another run after a pause: nothing of the first one is in flight": (
        [
            (("shm", 7, A), [7], SHARED_MEMORY),
            (("left",), [], SHARED_MEMORY),
            (("gone",), [], TOPIC),
            (("subscribed",), [], TOPIC),
            (("shm", 100, B), [100], SHARED_MEMORY),
        ],
        (2, 0, 0, 1),
    ),
    "the same run comes back: what it sent meanwhile is in flight": (
        [
            (("shm", 7, A), [7], SHARED_MEMORY),
            (("left",), [], SHARED_MEMORY),
            (("gone",), [], TOPIC),
            (("subscribed",), [], TOPIC),
            (("shm", 9, A), [], TOPIC),
            (("topic", 8), [8, 9], SHARED_MEMORY),
        ],
        (3, 0, 0, 0),
    ),
    "the same run comes back before the topic was subscribed to: nothing is in flight": (
        [
            (("shm", 7, A), [7], SHARED_MEMORY),
            (("left",), [], SHARED_MEMORY),
            (("gone",), [], TOPIC),
            (("shm", 9, A), [9], SHARED_MEMORY),
            (("gone",), [], TOPIC),
        ],
        (2, 1, 1, 0),
    ),
    "shared memory brings twice what the topic has delivered": (
        [
            (("topic", 1), [1], TOPIC),
            (("shm", 1, A), [], SHARED_MEMORY),
            (("shm", 1, A), [], SHARED_MEMORY),
            (("shm", 2, A), [2], SHARED_MEMORY),
        ],
        (2, 0, 0, 0),
    ),
    "the topic brings a copy after it was left and subscribed to again": (
        [
            (("shm", 0, A), [0], SHARED_MEMORY),
            (("left",), [], SHARED_MEMORY),
            (("gone",), [], TOPIC),
            (("subscribed",), [], TOPIC),
            (("topic", 0), [], TOPIC),
            (("topic", 1), [1], TOPIC),
        ],
        (2, 0, 0, 0),
    ),
    "a writer that changes to a larger segment repeats its order": (
        [
            (("shm", 5, A), [5], SHARED_MEMORY),
            (("shm", 7, A), [7], SHARED_MEMORY),
            (("shm", 6, A), [], SHARED_MEMORY),
            (("shm", 8, A), [8], SHARED_MEMORY),
        ],
        (3, 1, 1, 0),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_transitions(name):
    steps, counters = TABLE[name]
    subscriber = Subscriber()
    for number, (event, delivered, transport) in enumerate(steps):
        assert subscriber.step(*event) == delivered, f"step {number}: {event}"
        assert subscriber.handover.transport == transport, f"step {number}: {event}"
    buffer = subscriber.buffer
    assert (buffer.received, buffer.lost, buffer.gaps, buffer.restarts) == counters


def test_pending_is_reported():
    subscriber = Subscriber()
    subscriber.step("topic", 0)
    subscriber.step("shm", 2, A)
    subscriber.step("shm", 3, A)
    assert subscriber.handover.pending == 2
    subscriber.step("after", PENDING_SEC)
    assert subscriber.handover.pending == 0


def test_another_run_is_known_where_shared_memory_brought_both():
    handover = Handover()
    steps = [(0, A), (1, A), (2, B), (3, B)]
    told = [handover.on_shared_memory(message(*step[:1]), step[1], 0.0)[0].another_run for step in steps]
    assert told == [None, False, True, False]
    handover.on_writers_gone()
    (by_topic,) = handover.on_topic(message(4), 0.0)
    assert by_topic.another_run is None and by_topic.previous_writer == B


@pytest.mark.parametrize("seed", range(60))
def test_random_schedules_deliver_each_message_once_and_in_order(seed):
    """A tokenizer whose topic is slow, whose shared memory comes and goes, and a subscription that follows late.

    What is counted as lost is exactly what neither transport carried to the subscriber.
    """
    draw = random.Random(seed)
    subscriber, in_flight = Subscriber(), deque()
    writing, subscribed = False, True
    carried, published = set(), 0
    for _ in range(300):
        action = draw.choice(["publish", "publish", "topic", "topic", "writer", "follow"])
        wanted = subscriber.handover.transport == TOPIC
        if action == "publish":
            if subscribed:
                in_flight.append(published)
            if writing:
                subscriber.step("shm", published, A)
            if subscribed or writing:
                carried.add(published)
            published += 1
        elif action == "topic" and in_flight:
            subscriber.step("topic", in_flight.popleft())
        elif action == "writer" and draw.random() < 0.2:
            writing = not writing
            if not writing:
                subscriber.step("gone")
        elif action == "follow" and wanted != subscribed:
            subscribed = wanted
            if not subscribed:
                carried -= set(in_flight) - set(subscriber.delivered)
                in_flight.clear()  # what was queued in the reader goes with it
            subscriber.step("subscribed" if subscribed else "left")
    while in_flight:
        subscriber.step("topic", in_flight.popleft())
    subscriber.step("after", PENDING_SEC)
    delivered, buffer = subscriber.delivered, subscriber.buffer
    assert delivered == sorted(set(delivered))
    assert set(delivered) <= carried
    if delivered:
        missing = set(range(delivered[0], delivered[-1] + 1)) - set(delivered)
        assert buffer.lost == len(missing)
        assert not missing & carried, "it was on its way, and was passed over"
    assert buffer.restarts == 0
