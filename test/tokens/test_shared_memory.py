"""Tokens through shared memory: the same as by the topic, nothing twice, and whatever fails leaves the topic."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from fake_tokenizer import make_tokens
from ros_harness import RosProcess, free_domain, ros_environment, wait_until

from vla_perception.tokens import (
    TokenSubscriber,
    VisualTokens,
    shared_memory,
    shared_memory_services,
    to_message,
    transports,
)
from vla_perception.tokens.handover import Handover
from vla_perception.tokens.shared_memory import (
    DEPTH,
    LENT,
    WRITE_DONE,
    WRITE_STARTED,
    SharedMemoryError,
    TokenReader,
    TokenWriter,
)

needs_iceoryx2 = pytest.mark.skipif(
    bool(shared_memory.unavailable_reason()), reason="needs iceoryx2: pip install '.[shm]'"
)


@pytest.fixture
def ends():
    """Makes writers and readers of one topic in a domain that no other test run of this machine uses."""
    domain, made = free_domain(), []

    def make(kind, domain=domain):
        made.append(kind("/tokens", domain))
        return made[-1]

    yield make
    for end in made:
        end.close()


def taken(reader: TokenReader) -> list[VisualTokens]:
    sets = []
    while (found := reader.take()) is not None:
        sets.append(VisualTokens.from_bytes(found[0]))
    return sets


# Writer and reader


@needs_iceoryx2
def test_the_bytes_are_the_messages(ends):
    writer, reader = ends(TokenWriter), ends(TokenReader)
    tokens = make_tokens(7, cameras=("front", "wrist"), features=np.ones((2, 12, 9), np.float32))
    assert writer.readers() == 1 and writer.write(tokens) == 1
    told = reader.wait(20.0)
    while WRITE_DONE not in told:
        told |= reader.wait(20.0)
    assert told == {WRITE_STARTED, WRITE_DONE}
    data, _writer = reader.take()
    assert bytes(data) == tokens.to_bytes()
    read = VisualTokens.from_bytes(data)
    assert not read.data.flags.writeable and read.views == tokens.views
    assert reader.take() is None


@needs_iceoryx2
def test_what_is_kept_stays_as_it_was(ends):
    """More sets than are lent, while the writer goes on, grows, and after both have gone."""
    writer, reader = ends(TokenWriter), ends(TokenReader)
    kept = []
    for sequence in range(3 * LENT):
        writer.write(make_tokens(sequence, channels=6 if sequence < LENT else 600))
        kept += taken(reader)
    for _ in range(3 * DEPTH):
        writer.write(make_tokens(99))
    writer.close()
    reader.close()
    assert [tokens.sequence for tokens in kept] == list(range(3 * LENT))
    assert all((tokens.data == tokens.sequence).all() for tokens in kept)


@needs_iceoryx2
def test_a_signal_is_no_failure(ends):
    """As after SIGSTOP and SIGCONT, or with a profiler's timer: the wait ends early, and the next one goes on."""
    writer, reader = ends(TokenWriter), ends(TokenReader)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    results = []
    thread = threading.Thread(target=lambda: results.append(reader.wait(60.0)))
    try:
        thread.start()
        while thread.is_alive():  # the first ones may come before it waits
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
            thread.join(0.05)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert results == [set()]
    writer.write(make_tokens(1))
    assert reader.wait(20.0) and [tokens.sequence for tokens in taken(reader)] == [1]


@needs_iceoryx2
def test_a_reader_that_takes_nothing_stops_no_other(ends):
    writer, idle, busy = ends(TokenWriter), ends(TokenReader), ends(TokenReader)
    got = []
    for sequence in range(5 * DEPTH):
        writer.write(make_tokens(sequence))
        got += [tokens.sequence for tokens in taken(busy)]
    assert got == list(range(5 * DEPTH))
    assert [tokens.sequence for tokens in taken(idle)] == got[-DEPTH:]


@needs_iceoryx2
def test_domains_do_not_mix(ends):
    writer, other = ends(TokenWriter), ends(TokenReader, free_domain())
    assert writer.readers() == 0 and writer.write(make_tokens(0)) == 0
    assert other.take() is None and other.writers() == 0


@needs_iceoryx2
def test_a_full_dev_shm_is_an_error_and_no_bus_error(ends, monkeypatch):
    writer = ends(TokenWriter)
    free = os.statvfs("/dev/shm")
    full = os.statvfs_result((*free[:4], 0, *free[5:]))
    monkeypatch.setattr(shared_memory_services.os, "statvfs", lambda _path: full)
    with pytest.raises(SharedMemoryError, match="/dev/shm has 0.0 MiB left"):
        writer.write(make_tokens(0))


# Over ROS


class Source:
    """A token publisher in this process; `send` publishes the next set."""

    def __init__(self, ros):
        from vla_perception.nodes.visual_tokenizer.token_publisher import TokenPublisher

        self.publisher = TokenPublisher(ros.node("tokenizer"))
        self.sent = 0
        self.changes = {}

    def send(self, count=1):
        for _ in range(count):
            self.publisher.publish(make_tokens(self.sent, **self.changes))
            self.sent += 1

    def publish(self, *sequences):
        """By the topic alone."""
        for sequence in sequences:
            self.publisher._publisher.publish(to_message(self.made(sequence)))

    def write(self, *sequences):
        """Into shared memory alone."""
        for sequence in sequences:
            assert self.publisher._writer.write(self.made(sequence)) == 1

    def made(self, sequence):
        """The same set each time."""
        return make_tokens(sequence, stamp_ns=10**18 + sequence)

    def on_topic(self):
        return self.publisher._publisher.get_subscription_count()


@pytest.fixture
def source(ros):
    source = Source(ros)
    yield source
    source.publisher.close_shared_memory()


def until_shared(tokens, send):
    """Sends until `tokens` reads from shared memory."""
    wait_until(lambda: send() or tokens.transport == "shared memory", 20.0, "sets from shared memory")


@needs_iceoryx2
@pytest.mark.ros
@pytest.mark.parametrize("changes", [{}, {"channels": 9, "projector": "none"}], ids=["tokens", "features"])
def test_equal_to_the_topics_and_nothing_is_serialised_for_shared_memory(ros, source, monkeypatch, changes):
    from vla_perception.nodes.visual_tokenizer import token_publisher

    source.changes = changes
    source.publisher.open_shared_memory()
    with TokenSubscriber(ros.node("near"), history=5) as near:
        with TokenSubscriber(ros.node("far"), history=5, shared_memory=False) as far:
            until_shared(near, source.send)
            wait_until(lambda: source.on_topic() == 1, 20.0, "only the one without shared memory on the topic")
            source.send(5)
            last = source.sent - 1
            for tokens in (near, far):
                wait_until(lambda tokens=tokens: tokens.latest.sequence == last, 20.0, "the last set")
            assert (near.transport, far.transport) == ("shared memory", "topic")
            for left, right in zip(near.history, far.history, strict=True):
                assert left.to_bytes() == right.to_bytes()
            assert near.lost == far.lost == 0
        wait_until(lambda: source.on_topic() == 0, 20.0, "nobody on the topic")
        monkeypatch.setattr(token_publisher, "to_message", lambda _tokens: pytest.fail("a message was made"))
        assert source.publisher.has_subscribers()
        source.send(3)
        wait_until(lambda: near.latest.sequence == source.sent - 1, 20.0, "sets by shared memory alone")
        assert (near.received, near.lost, near.restarts) == (source.sent, 0, 0)
    assert source.publisher.readers() == 0


@needs_iceoryx2
@pytest.mark.ros
def test_sets_change_their_way_without_loss_or_repetition(ros, source):
    """From the topic to shared memory while sets come, and back when it goes."""
    seen = []
    node = ros.node()
    with TokenSubscriber(node, callback=lambda visual: seen.append(visual.sequence)) as tokens:
        ros.spin(node)
        wait_until(source.on_topic, 20.0, "a match")
        source.send(DEPTH // 2)
        source.publisher.open_shared_memory()
        # One at a time: neither queue runs over, however busy the machine is.
        until_shared(tokens, lambda: tokens.received == source.sent and source.send())
        source.send(DEPTH // 2)
        wait_until(lambda: tokens.received == source.sent, 20.0, "every set once")
        assert (tokens.lost, tokens.gaps, tokens.restarts) == (0, 0, 0)
        source.publisher.close_shared_memory()
        wait_until(lambda: tokens.transport == "topic" and source.on_topic(), 20.0, "the topic again")
        source.send()
        wait_until(lambda: tokens.received == source.sent, 20.0, "the next set")
        assert (tokens.lost, tokens.restarts) == (0, 0)
        wait_until(lambda: seen and seen[-1] == source.sent - 1, 20.0, "the callback")
        assert seen == sorted(set(seen))


@pytest.fixture
def waiting(ros, source, monkeypatch):
    """A `TokenSubscriber` that has set 0 by the topic, and sets 2 and 3 by shared memory, which wait for set 1."""
    with TokenSubscriber(ros.node()) as tokens:
        tokens._intake.handover = Handover(pending_sec=20.0)
        wait_until(source.on_topic, 20.0, "a match")
        source.publish(0)
        wait_until(lambda: tokens.received == 1, 20.0, "the first set")
        source.publisher.open_shared_memory()
        wait_until(source.publisher.readers, 20.0, "a reader")
        source.write(2, 3)
        wait_until(lambda: tokens._intake.pending == 2, 20.0, "sets that wait")
        yield tokens


@needs_iceoryx2
@pytest.mark.ros
def test_shared_memory_waits_for_what_the_topic_still_brings(waiting, source):
    """DDS is slower: the set before the first one of shared memory arrives after it."""
    assert waiting.received == 1
    source.publish(1)
    wait_until(lambda: waiting.received == 4, 20.0, "all of them")
    assert (waiting.lost, waiting.transport, waiting.latest.sequence) == (0, "shared memory", 3)
    source.write(6)
    wait_until(lambda: waiting.received == 5, 20.0, "a set after two that never came")
    assert (waiting.lost, waiting.gaps) == (2, 1)


@needs_iceoryx2
@pytest.mark.ros
def test_shared_memory_that_fails_while_messages_wait_leaves_them_to_the_topic(waiting, source, monkeypatch):
    def take(_reader):
        raise SharedMemoryError("broken")

    told = []
    monkeypatch.setattr(waiting, "_log", lambda text, _error: told.append(text))
    monkeypatch.setattr(TokenReader, "take", take)
    source.publisher._writer.write(source.made(4))  # may reach nobody: its announcement wakes the reader already
    wait_until(lambda: told, 20.0, "shared memory given up")
    assert told == ["tokens come by the topic: broken"]
    for sequence in range(1, 6):
        source.publish(sequence)
        wait_until(lambda sequence=sequence: waiting.latest.sequence == sequence, 20.0, f"set {sequence} by the topic")
    assert (waiting.transport, waiting.received, waiting.lost, waiting.restarts) == ("topic", 6, 0, 0)


@needs_iceoryx2
@pytest.mark.ros
def test_a_message_of_shared_memory_that_the_topic_brings_later_is_not_given_again(waiting, source, monkeypatch):
    """The writer goes just after its sets were taken over, while the topic has not been left yet."""
    monkeypatch.setattr(waiting._receiver, "update", lambda: None)
    source.publish(1, 2)
    wait_until(lambda: waiting.received == 4, 20.0, "the sets that waited")
    assert waiting.transport == "shared memory"
    source.publisher.close_shared_memory()
    wait_until(lambda: waiting.transport == "topic", 20.0, "the topic")
    source.publish(3, 4)
    wait_until(lambda: waiting.latest.sequence == 4, 20.0, "the next set")
    assert (waiting.received, waiting.lost, waiting.restarts) == (5, 0, 0)


@needs_iceoryx2
@pytest.mark.ros
def test_shared_memory_that_cannot_even_be_given_back_is_tried_again(ros, source, monkeypatch):
    monkeypatch.setattr(transports, "_RETRY", 0.1)
    source.publisher.open_shared_memory()
    with TokenSubscriber(ros.node()) as tokens:
        until_shared(tokens, source.send)
        subscriber = tokens._shared_memory._reader._subscriber
        broken = SimpleNamespace(receive=_fail, delete=lambda: (subscriber.delete(), _fail()))
        monkeypatch.setattr(tokens._shared_memory._reader, "_subscriber", broken)
        source.send()
        wait_until(lambda: tokens.transport == "topic", 20.0, "the topic")
        until_shared(tokens, source.send)
        wait_until(lambda: tokens.latest.sequence == source.sent - 1, 20.0, "the last set")


@needs_iceoryx2
@pytest.mark.ros
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_that_ends_the_reading_of_shared_memory_leaves_the_topic(ros, source, monkeypatch):
    source.publisher.open_shared_memory()
    with TokenSubscriber(ros.node()) as tokens:
        until_shared(tokens, source.send)
        wait_until(lambda: source.on_topic() == 0, 20.0, "nobody on the topic")
        monkeypatch.setattr(tokens._shared_memory, "_receive", _fail)
        source.send()
        wait_until(lambda: tokens.transport == "topic" and source.on_topic() == 1, 20.0, "the topic")
        source.send()
        wait_until(lambda: tokens.latest.sequence == source.sent - 1, 20.0, "the next set")


def _fail(*_arguments):
    raise OSError("nobody has thought of this")


@needs_iceoryx2
@pytest.mark.ros
def test_shared_memory_that_fails_at_the_tokenizer_leaves_the_topic_and_comes_again(ros, source, monkeypatch):
    """There is no room when it begins, and none again while it goes on."""
    from vla_perception.nodes.visual_tokenizer import token_publisher

    def no_room(_size):
        raise SharedMemoryError("no room")

    told = []
    monkeypatch.setattr(token_publisher, "_RETRY", 0.1)
    monkeypatch.setattr(token_publisher, "_RETRY_AT_MOST", 0.2)
    logger = SimpleNamespace(warning=told.append, info=told.append, error=told.append)
    monkeypatch.setattr(source.publisher._node, "get_logger", lambda: logger)
    with TokenSubscriber(ros.node()) as tokens:
        wait_until(source.on_topic, 20.0, "a match")
        for module in (shared_memory, shared_memory_services):
            monkeypatch.setattr(module, "require_room", no_room)
        source.publisher.open_shared_memory()
        assert told == ["tokens go by the topic alone: no room; tried again in 0.1 s, later less often"]
        source.send()
        wait_until(lambda: tokens.received == source.sent, 20.0, "a set by the topic")
        for module in (shared_memory, shared_memory_services):
            monkeypatch.setattr(module, "require_room", lambda _size: None)
        until_shared(tokens, source.send)
        monkeypatch.setattr(shared_memory, "require_room", no_room)
        source.send()
        wait_until(lambda: tokens.transport == "topic" and source.on_topic(), 20.0, "the topic")
        source.send()
        wait_until(lambda: tokens.latest.sequence == source.sent - 1, 20.0, "a set by the topic")
        monkeypatch.setattr(shared_memory, "require_room", lambda _size: None)
        until_shared(tokens, source.send)
        source.publisher.close_shared_memory()
        wait_until(lambda: tokens.transport == "topic", 20.0, "the topic")
        assert source.publisher._timer is None and len(told) == 1


@pytest.mark.ros
def test_shared_memory_that_was_closed_while_it_was_opened_stays_closed(source, monkeypatch):
    from vla_perception.nodes.visual_tokenizer import token_publisher

    closed = []

    def open_late(*_arguments):
        source.publisher.close_shared_memory()
        return SimpleNamespace(close=lambda: closed.append(True))

    monkeypatch.setattr(token_publisher, "unavailable_reason", lambda: "")
    monkeypatch.setattr(token_publisher, "TokenWriter", open_late)
    source.publisher.open_shared_memory()
    assert source.publisher._writer is None and closed == [True]


@needs_iceoryx2
@pytest.mark.ros
def test_a_killed_policy_does_not_keep_the_tokenizer_at_work(ros, source):
    source.publisher.open_shared_memory()
    with policy_process(ros) as policy:
        until_shared_in(policy, source)
        wait_until(lambda: source.on_topic() == 0, 20.0, "nobody on the topic")
        policy.process.kill()
        policy.process.wait()
        assert source.publisher.has_subscribers()  # nobody has looked yet
        source.publisher.cleanup_dead_nodes()
        assert not source.publisher.has_subscribers()


@needs_iceoryx2
@pytest.mark.ros
def test_a_stalled_policy_harms_no_other_and_counts_what_it_missed(ros, source):
    source.publisher.open_shared_memory()
    with policy_process(ros) as policy, TokenSubscriber(ros.node()) as tokens:
        until_shared_in(policy, source)
        until_shared(tokens, source.send)
        policy.process.send_signal(signal.SIGSTOP)
        for _ in range(5 * DEPTH):
            source.send()
            wait_until(lambda: tokens.latest.sequence == source.sent - 1, 20.0, "the set at the other policy")
        assert tokens.lost == 0
        policy.process.send_signal(signal.SIGCONT)
        policy.wait_for(f"sequence {source.sent - 1} ")
        *_, last = (line.split() for line in policy.output.splitlines() if line.startswith("sequence"))
        received, lost, first = (int(last[index]) for index in (3, 5, 7))
        assert lost >= 4 * DEPTH - 1
        assert received + lost == source.sent - first


@needs_iceoryx2
@pytest.mark.ros
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_tokenizer_that_starts_again(ros, number):
    # No more sets than a queue holds: none is lost on the way, however busy the machine is.
    some = ("--rate", 50, "--count", DEPTH, "--shared-memory")
    with TokenSubscriber(ros.node()) as tokens:

        def all_of(processes: int) -> bool:
            return tokens.received == processes * DEPTH and tokens.transport == "shared memory"

        with ros.fake(*some) as first:
            wait_until(lambda: all_of(1), 20.0, "shared memory")
            first.process.send_signal(number)
            first.process.wait()
        wait_until(lambda: tokens.transport == "topic", 20.0, "the topic")
        assert (tokens.lost, tokens.restarts) == (0, 0)
        # Its numbers go on as if some had been lost, but they are another process's.
        with ros.fake(*some, "--first", DEPTH + 100):
            wait_until(lambda: all_of(2), 20.0, "sets of the second process")
            assert (tokens.lost, tokens.restarts) == (0, 1)
        with ros.fake(*some):
            wait_until(lambda: all_of(3), 20.0, "sets of the third process")
            assert (tokens.lost, tokens.restarts) == (0, 2)


@needs_iceoryx2
@pytest.mark.ros
def test_a_short_life_in_shared_memory_leaves_no_loss(ros, source, monkeypatch):
    """The first tokenizer has come and gone before DDS told of its publisher."""
    source.publisher.open_shared_memory()
    with TokenSubscriber(ros.node()) as tokens:
        monkeypatch.setattr(tokens._receiver, "publishers", frozenset)
        until_shared(tokens, source.send)
        source.publisher.close_shared_memory()
        wait_until(lambda: tokens.transport == "topic" and source.on_topic(), 20.0, "the topic")
        source.publish(1000)
        wait_until(lambda: tokens.latest.sequence == 1000, 20.0, "a set of its successor")
        assert (tokens.lost, tokens.restarts) == (0, 1)


def policy_process(ros, *lines: str) -> RosProcess:
    """A policy that says what it gets."""
    code = (
        "import rclpy\n"
        "from vla_perception.tokens import TokenSubscriber\n"
        "rclpy.init()\n"
        "tokens = TokenSubscriber(rclpy.create_node('other_policy'), history=1000)\n"
        "while True:\n"
        "    visual = tokens.wait()\n"
        "    print('sequence', visual.sequence, 'received', tokens.received, 'lost', tokens.lost,"
        " 'first', tokens.history[0].sequence, tokens.transport)\n"
    )
    return RosProcess(["-c", "\n".join([*lines, code])], ros.domain)


def until_shared_in(policy: RosProcess, source: Source) -> None:
    wait_until(lambda: source.send() or "shared memory" in policy.output, 30.0, "shared memory in another process")


@pytest.mark.ros
def test_without_iceoryx2_the_topic_does_alone(ros, source):
    hidden = "import sys\nsys.modules['iceoryx2'] = None"
    source.publisher.open_shared_memory()
    with policy_process(ros, hidden) as policy:
        wait_until(source.on_topic, 20.0, "a match")
        wait_until(lambda: source.send() or "sequence" in policy.output, 20.0, "sets by the topic")
        assert policy.process.poll() is None and "shared memory" not in policy.output
    with TokenSubscriber(ros.node()) as tokens, RosProcess(["-c", hidden + PUBLISH], ros.domain) as publisher:
        assert tokens.wait(20.0).sequence >= 0
        assert tokens.transport == "topic"
        publisher.wait_for("without shared memory: ")
        assert "pip install '.[shm]'" in publisher.output


PUBLISH = """
sys.path.insert(0, "test/support")
sys.argv += ["--rate", "50", "--shared-memory"]
import fake_tokenizer
fake_tokenizer.main()
"""


@needs_iceoryx2
@pytest.mark.ros
def test_the_node_offers_it_and_encodes_for_who_reads_there(ros):
    pytest.importorskip("timm")
    from sensor_msgs.msg import Image

    def start(namespace, *settings):
        words = [word for setting in ("autostart:=true", *settings) for word in ("-p", setting)]
        words += ["-r", f"__ns:={namespace}", "-r", "front/image_raw:=/image"]
        return RosProcess(["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args", *words], ros.domain)

    camera = ros.node("camera").create_publisher(Image, "/image", 10)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    stamp = iter(range(1, 10**6))

    def shoot():
        message = Image(height=48, width=64, step=192, encoding="rgb8", data=image.tobytes())
        message.header.stamp.sec = next(stamp)
        camera.publish(message)

    node = ros.node()
    with (
        start("/a", "trigger:=on_request") as offers,
        start("/b", "shared_memory:=false") as refuses,
        TokenSubscriber(node, "/a/tokens") as tokens,
        TokenSubscriber(node, "/b/tokens") as others,
    ):
        for process in (offers, refuses):
            process.wait_for("ready after", 90.0)
        wait_until(lambda: camera.get_subscription_count() == 2, 20.0, "the nodes' subscriptions")
        for count in range(1, 4):
            shoot()
            assert tokens.request(20.0).shape == (1, 196, 256)
            assert tokens.received == count
        assert tokens.transport == "shared memory"
        wait_until(lambda: tokens._receiver.node.count_subscribers("/a/tokens") == 0, 20.0, "nobody on the topic")
        wait_until(lambda: shoot() or others.received > 1, 20.0, "tokens by the topic")
        assert others.transport == "topic"
        assert offers.stop() == 0
        wait_until(lambda: tokens.transport == "topic", 20.0, "the topic, when the node has ended")


@needs_iceoryx2
def test_a_process_keeps_its_signals_and_stderr(tmp_path):
    code = (
        "import signal\n"
        "before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]\n"
        "from vla_perception.tokens.shared_memory import TokenReader\n"
        f"reader = TokenReader('/tokens', {free_domain()})\n"
        "reader.wait(0.01)\n"
        "assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=ros_environment(0), capture_output=True, text=True, timeout=60
    )
    assert "KeyboardInterrupt" in ended.stderr and "config" not in ended.stderr, ended.stderr
