"""What a policy sees, whatever brings the tokens: the same tests over the topic, shared memory and in-process.

Only the links differ: how a message is sent, and what receives it.
"""

import math
import threading
import time

import numpy as np
import pytest
from fake_tokenizer import MODEL, make_tokens
from ros_harness import wait_until

from vla_perception.tokens import (
    FingerprintMismatchError,
    LocalTokenizer,
    TokenFormatError,
    TokenSubscriber,
    View,
    VisualTokens,
    to_message,
)
from vla_perception.tokens.shared_memory import TokenWriter, unavailable_reason

OTHER = "cd" * 32


class LocalLink:
    """Messages are pushed, as `LocalTokenizer.encode` does."""

    def __init__(self, _ros, **options):
        self.reader = LocalTokenizer(None, **options)

    def send(self, tokens):
        self.reader.push(tokens)

    def restart(self):
        """A new run of the tokenizer. Here there is none, but for the numbers."""

    def close(self):
        self.reader.close()


class TopicLink:
    """A publisher and a `TokenSubscriber` that reads the topic alone."""

    def __init__(self, ros, **options):
        self.ros, self.node = ros, ros.node()
        self.reader = TokenSubscriber(self.node, shared_memory=False, **options)
        self.publisher = None
        self.restart()

    def send(self, tokens):
        self.publisher.publish(to_message(tokens))

    def send_bytes(self, data: bytes):
        message = to_message(make_tokens(0))
        message.data = data
        self.publisher.publish(message)

    def restart(self):
        if self.publisher is not None:
            self.publisher.destroy()
            wait_until(lambda: not self.reader.publishers(), 20.0, "the publisher gone")
        self.publisher = self.ros.publisher()
        wait_until(self.publisher.get_subscription_count, 20.0, "a match of publisher and subscriber")

    def close(self):
        self.reader.close()


class SharedMemoryLink:
    """A `TokenWriter`, and a `TokenSubscriber` on a topic without publishers."""

    def __init__(self, ros, **options):
        self.domain, self.node = ros.domain, ros.node()
        self.reader = TokenSubscriber(self.node, **options)
        self.writer = None
        self.restart()

    def send(self, tokens):
        assert self.writer.write(tokens) == 1

    def send_bytes(self, data: bytes):
        class Raw:
            def to_parts(self):
                return [data]

        self.send(Raw())

    def restart(self):
        if self.writer is not None:
            self.writer.close()
        self.writer = TokenWriter("/tokens", self.domain)
        wait_until(self.writer.readers, 20.0, "a reader in shared memory")

    def close(self):
        self.reader.close()
        self.writer.close()


LOCAL = pytest.param(LocalLink, id="in-process")
TOPIC = pytest.param(TopicLink, id="topic", marks=pytest.mark.ros)
SHARED_MEMORY = pytest.param(
    SharedMemoryLink,
    id="shared memory",
    marks=[
        pytest.mark.ros,
        pytest.mark.skipif(bool(unavailable_reason()), reason="needs iceoryx2: pip install '.[shm]'"),
    ],
)
everywhere = pytest.mark.parametrize("kind", [LOCAL, TOPIC, SHARED_MEMORY])
between_processes = pytest.mark.parametrize("kind", [TOPIC, SHARED_MEMORY])


@pytest.fixture
def link(request, kind):
    """Makes the link of a transport; options are its reader's."""
    made = []

    def make(**options):
        ros = None if kind is LocalLink else request.getfixturevalue("ros")
        made.append(kind(ros, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def send(link, *messages):
    """One after the other, each when the one before has arrived."""
    for tokens in messages:
        before = link.reader.received + link.reader.rejected
        link.send(tokens)
        wait_until(lambda before=before: link.reader.received + link.reader.rejected > before, 20.0, "the message")


def sequences(messages):
    return [tokens.sequence for tokens in messages]


@everywhere
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_message_arrives_as_it_was_sent(link, dtype):
    values = np.random.default_rng(0).standard_normal((2, 13, 6)).astype(np.float32)
    features = np.random.default_rng(1).standard_normal((2, 13, 9)).astype(np.float32)
    stored = {
        "float32": lambda array: array,
        "float16": lambda array: array.astype(np.float16),
        "bfloat16": lambda array: (array.view(np.uint32) >> 16).astype(np.uint16),
    }[dtype]
    views = (
        View("front", "front_optical", 7, 480, 640, (0.01, 0.0, -1.0, 0.0, 0.01, 0.5), roi=(10.0, 20.0, 600.0, 400.0)),
        View("wrist", "", 8, 30, 40, (0.0, 0.1, 0.0, -0.1, 0.0, 4.0), False),
    )
    sent = make_tokens(
        7,
        cameras=("front", "wrist"),
        data=stored(values),
        features=stored(features),
        dtype=dtype,
        views=views,
        token_strategy="cls+patch",
        model='a "model"\n名',
    )
    connected = link()
    send(connected, sent)
    received = connected.reader.wait(20.0)
    assert received.to_bytes() == sent.to_bytes() and received.views == views
    np.testing.assert_array_equal(received.float32(), sent.float32())
    np.testing.assert_array_equal(received.features_float32(), sent.features_float32())
    assert received.numpy().dtype.name == dtype
    if not isinstance(connected, LocalLink):
        assert not received.data.flags.writeable


@everywhere
def test_reading_latest_history_and_each_message_once(link):
    connected = link(history=3)
    reader = connected.reader
    assert reader.latest is None and reader.history == () and reader.age() == math.inf
    with pytest.raises(TimeoutError, match="no new visual tokens within 0.01 s"):
        reader.wait(0.01)
    send(connected, *map(make_tokens, range(4)))
    assert reader.latest.sequence == 3 and sequences(reader.history) == [1, 2, 3]
    assert reader.wait(20.0).sequence == 3
    with pytest.raises(TimeoutError):
        reader.wait(0.01)
    send(connected, make_tokens(4))
    assert reader.wait(0.0).sequence == 4
    assert (reader.received, reader.lost, reader.gaps, reader.restarts, reader.rejected) == (5, 0, 0, 0, 0)


@everywhere
def test_all_waiting_threads_get_the_message(link):
    connected, got = link(), []
    threads = [threading.Thread(target=lambda: got.append(connected.reader.wait(20.0).sequence)) for _ in range(3)]
    for thread in threads:
        thread.start()
    send(connected, make_tokens(7))
    for thread in threads:
        thread.join(20.0)
    assert got == [7] * 3


@everywhere
def test_gaps_are_losses(link):
    connected = link()
    send(connected, *map(make_tokens, (5, 6, 9, 10, 15)))
    assert (connected.reader.lost, connected.reader.gaps, connected.reader.restarts) == (6, 2, 0)


@everywhere
def test_a_restart_is_not_a_loss_and_the_history_begins_anew(link):
    connected = link(history=4)
    reader = connected.reader
    send(connected, *map(make_tokens, (5, 6)))
    connected.restart()
    send(connected, *map(make_tokens, (0, 1)))
    assert (reader.received, reader.lost, reader.restarts) == (4, 0, 1)
    assert sequences(reader.history) == [0, 1]
    send(connected, make_tokens(9, fingerprint=OTHER))  # other weights, even if the numbers go on
    assert (reader.lost, reader.restarts) == (0, 2) and sequences(reader.history) == [9]


@between_processes
def test_a_restart_whose_numbers_go_on_is_not_a_loss(link):
    connected = link(history=4)
    send(connected, *map(make_tokens, (5, 6)))
    connected.restart()
    send(connected, make_tokens(100))
    assert (connected.reader.lost, connected.reader.restarts) == (0, 1)
    assert sequences(connected.reader.history) == [100]


@everywhere
def test_late_messages_and_time_that_is_set_back(link):
    connected = link(history=4)
    reader, second = connected.reader, 10**9
    send(connected, make_tokens(0, stamp_ns=0), make_tokens(1, stamp_ns=2 * second))
    assert reader.wait(20.0).sequence == 1
    send(connected, make_tokens(2, stamp_ns=second))  # late
    assert sequences(reader.history) == [0, 2, 1] and reader.latest.sequence == 1
    with pytest.raises(TimeoutError):
        reader.wait(0.01)
    send(connected, make_tokens(3, stamp_ns=-second))  # a bag that loops
    assert sequences(reader.history) == [3] and reader.wait(20.0).sequence == 3
    send(connected, make_tokens(4, stamp_ns=0, cameras=("front", "wrist")))
    assert sequences(reader.history) == [4]
    assert (reader.received, reader.lost, reader.restarts) == (5, 0, 0)


@everywhere
def test_tokens_of_other_weights_are_rejected_and_nothing_old_is_given_instead(link):
    connected = link(expect_fingerprint=MODEL["fingerprint"][:16])
    reader = connected.reader
    send(connected, make_tokens(0), make_tokens(1, fingerprint=OTHER))
    for read in (
        lambda: reader.latest,
        lambda: reader.history,
        lambda: reader.wait(0.01),
        lambda: reader.latest_within(9.0),
    ):
        with pytest.raises(FingerprintMismatchError, match="expected was abababab"):
            read()
    assert (reader.received, reader.rejected) == (1, 1)
    send(connected, make_tokens(2))
    assert reader.latest.sequence == 2 and reader.wait(0.0).sequence == 2


@between_processes
def test_damage_is_rejected_and_reception_goes_on(link):
    connected = link()
    reader, good = connected.reader, make_tokens(1).to_bytes()
    send(connected, make_tokens(0))
    for count, (bad, words) in enumerate(
        [(good[:-1], "truncated"), (b"\0", "too few"), (b"\xff" * 99, "truncated")], 1
    ):
        connected.send_bytes(bad)
        wait_until(lambda count=count: reader.rejected == count, 20.0, "the rejection")
        with pytest.raises(TokenFormatError, match=words):
            reader.wait(20.0)
        with pytest.raises(TokenFormatError, match=words):
            reader.latest  # noqa: B018
    send(connected, make_tokens(1))
    assert reader.wait(20.0).sequence == 1 and (reader.received, reader.lost) == (2, 0)


@everywhere
def test_age_is_that_of_the_oldest_valid_image(link):
    connected = link()
    now = time.time_ns()
    views = make_tokens(0, cameras=("front", "wrist"), stamp_ns=now - 2 * 10**9).views
    odd = View("wrist", "", now - 10**11, 480, 640, views[1].affine, False)
    send(connected, make_tokens(0, cameras=("front", "wrist"), views=(views[0], odd)))
    reader = connected.reader
    assert 2.0 <= reader.age() < 90.0
    assert reader.latest_within(90.0).sequence == 0 and reader.latest_within(1.0) is None
    send(connected, make_tokens(1, cameras=("front", "wrist"), stamp_ns=time.time_ns() + 600 * 10**9))
    assert reader.latest_within(60.0) is None and reader.age() < 0  # clocks differ


@everywhere
def test_closing_frees_waiting_threads(link):
    reader, errors = link().reader, []

    def wait():
        try:
            reader.wait(60.0)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    reader.close()
    thread.join(20.0)
    assert errors == ["this source of tokens is closed"]


@between_processes
def test_the_callback_is_called_with_the_latest_message_by_the_executor_that_spins_the_node(ros, link):
    seen, threads, go = [], set(), threading.Event()

    def act(tokens: VisualTokens):
        seen.append(tokens.sequence)
        threads.add(threading.current_thread())
        go.wait(20.0)

    connected = link(callback=act, history=8)
    ros.spin(connected.node)
    send(connected, make_tokens(0, stamp_ns=0))
    wait_until(lambda: seen == [0], 20.0, "the first callback")
    send(connected, *(make_tokens(sequence, stamp_ns=sequence) for sequence in range(1, 6)))
    send(connected, make_tokens(6, stamp_ns=3))  # late: not for the callback
    go.set()
    wait_until(lambda: seen == [0, 5], 20.0, "the latest message, and only that")
    assert connected.reader.skipped == 5 and connected.reader.lost == 0
    assert [tokens.stamp_ns for tokens in connected.reader.history] == [0, 1, 2, 3, 3, 4, 5]
    assert threads == {ros.spinning[0][2]}


@between_processes
def test_the_callback_is_not_called_for_rejected_messages(ros, link):
    seen = []
    connected = link(callback=lambda tokens: seen.append(tokens.sequence), expect_fingerprint=MODEL["fingerprint"])
    ros.spin(connected.node)
    send(connected, make_tokens(0, fingerprint=OTHER), make_tokens(1))
    wait_until(lambda: seen, 20.0, "the callback")
    assert seen == [1]


@between_processes
def test_the_reader_says_what_brings_the_messages(link):
    connected = link()
    send(connected, make_tokens(0), make_tokens(1))
    assert connected.reader.transport == {TopicLink: "topic", SharedMemoryLink: "shared memory"}[type(connected)]
