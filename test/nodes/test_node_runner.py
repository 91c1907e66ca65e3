"""How a node's callbacks are run."""

import contextlib
import functools
import logging
import queue
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

rclpy = pytest.importorskip("rclpy")
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup  # noqa: E402
from rclpy.executors import Executor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.waitable import NumberOfEntities, Waitable  # noqa: E402
from ros_harness import free_domain, in_domain  # noqa: E402
from sensor_msgs.msg import CompressedImage  # noqa: E402

from vla_perception.nodes import node_runner as process  # noqa: E402

pytestmark = pytest.mark.ros


class Timers(Node):
    """Calls `on_timer` every 5 ms, in a group of its own each of `groups`."""

    def __init__(self, stop, on_timer, groups=(MutuallyExclusiveCallbackGroup,)):
        super().__init__("timers")
        for group in groups:
            self.create_timer(0.005, lambda: on_timer(stop), callback_group=group())


@pytest.fixture
def run(monkeypatch):
    """`run_node` in this process and a domain of its own; signal handlers are put back."""
    monkeypatch.setattr(process, "_LIMIT_SEC", 60.0)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(on_timer, threads, **options):
        """`on_timer`, or a class of node that is made of `stop`."""
        make = on_timer if isinstance(on_timer, type) else lambda stop: Timers(stop, on_timer, **options)
        with in_domain(free_domain()):
            return process.run_node(make, ["test"], threads=threads)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_is_logged_is_printable(capfd):
    """Names of files and messages come with it: rclpy raises TypeError for half a surrogate pair."""
    with in_domain(free_domain()):
        process.rclpy.init()
        try:
            handler = process.RosLogHandler(process.rclpy.logging.get_logger("printable"))
            for level in (logging.INFO, logging.WARNING, logging.ERROR):
                handler.emit(logging.LogRecord("x", level, "", 0, "a %s", ("\ud800\n[FATAL] \x1b[2J",), None))
            try:
                raise ValueError("\x1b[2J")
            except ValueError:
                handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "b", (), sys.exc_info()))
        finally:
            process.rclpy.shutdown()
    lines = capfd.readouterr().err.splitlines()
    assert sum(line.endswith(r"a \ud800\n[FATAL] \x1b[2J") for line in lines) == 3
    assert r"ValueError: \x1b[2J" in lines and "Traceback (most recent call last):" in lines


@pytest.mark.parametrize("threads", [1, 3])
def test_a_callback_that_raises_ends_it(run, threads, capfd):
    assert run(lambda _stop: 1 / 0, threads) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize("threads", [1, 3])
def test_a_callback_that_raises_ends_it_where_stderr_cannot_be_written(run, threads, monkeypatch):
    """A log on a disk that is full: the node neither worked nor ended."""
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        code = run(lambda _stop: 1 / 0, threads)
    assert code == 1


def test_callbacks_of_several_groups_run_at_the_same_time(run):
    here, there = threading.Barrier(2), threading.Event()

    def meet(stop):
        if not there.is_set():
            here.wait(20)
            there.set()
        stop(7)

    assert run(meet, 3, groups=[MutuallyExclusiveCallbackGroup] * 2) == 7


def test_it_is_not_looked_for_work_again_and_again_until_a_callback_has_begun(run, monkeypatch):
    looked, called = [], []
    wait = Executor.wait_for_ready_callbacks

    def counted(self, *arguments, **options):
        looked.append(1)
        return wait(self, *arguments, **options)

    def count(stop):
        called.append(1)
        if len(called) == 100:
            stop(0)

    monkeypatch.setattr(Executor, "wait_for_ready_callbacks", counted)
    assert run(count, 3, groups=[ReentrantCallbackGroup]) == 0
    assert len(looked) < 1.5 * len(
        called
    )  # rclpy's MultiThreadedExecutor looks twice, and much more beside an encoding


class _Meanwhile(Waitable):
    """Has `on_wait` called while the executor puts together what it waits for, and `on_take` where one thread takes it."""

    def __init__(self, node, on_wait=lambda: None, on_take=None):
        super().__init__(MutuallyExclusiveCallbackGroup())
        self._on_wait, self._on_take = on_wait, on_take
        node.add_waitable(self)

    def get_num_entities(self):
        self._on_wait()
        return NumberOfEntities()

    def add_to_wait_set(self, wait_set):
        pass

    def is_ready(self, wait_set):
        return self._on_take is not None

    def take_data(self):
        self._on_take()

    async def execute(self, taken_data):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_exception):
        pass


@pytest.mark.parametrize("when", ["waited for", "taken"])
def test_what_is_destroyed_while_it_is_waited_for_ends_nothing(run, when, capfd):
    """As when the node is deactivated: a callback destroys subscriptions, and another thread waits for their events."""
    destroyed, rounds = [], []

    class Destroying(Timers):
        def __init__(self, stop):
            super().__init__(stop, lambda stop: rounds.append(1) if len(rounds) < 20 else stop(7))
            subscription = self.create_subscription(CompressedImage, "image", lambda _message: None, 1)
            event = subscription.event_handlers[0]

            def destroy():
                if not destroyed:
                    destroyed.append(self.destroy_subscription(subscription))
                    if when == "taken":
                        with event:
                            raise AssertionError("the event is still there")

            _Meanwhile(self, **{"on_wait" if when == "waited for" else "on_take": destroy})

    assert run(Destroying, 3) == 7
    assert destroyed == [True] and "InvalidHandle" not in capfd.readouterr().err


@pytest.mark.parametrize("threads", [1, 3])
def test_a_node_is_destroyed_when_nothing_waits_for_what_it_has_any_more(run, threads, monkeypatch):
    """rclpy does that as well, but a thread that still waits for what the node has may crash."""
    monkeypatch.setattr(process, "GRACE_SEC", 20.0)
    spinning, destroyed = threading.Event(), []
    for executor in (process.SingleThreadedExecutor, process._ThreadedExecutor):

        def spin_once(self, timeout_sec, spin_once=executor.spin_once):
            spinning.set()
            spin_once(self, 600.0)

        monkeypatch.setattr(executor, "spin_once", spin_once)

    class Idle(Timers):
        def __init__(self, stop):
            super().__init__(stop, None, groups=())
            threading.Thread(target=lambda: [spinning.wait(20.0), stop(7)]).start()

        def destroy_node(self):
            destroyed.append("executor" not in [thread.name for thread in threading.enumerate()])
            super().destroy_node()

    assert run(Idle, threads) == 7 and destroyed[:1] == [True]


def test_what_never_waits_is_called_by_the_executor_itself(run):
    """Others have threads: they may wait."""
    callers = {}

    class Mixed(Timers):
        def __init__(self, stop):
            super().__init__(stop, None, groups=())
            for group in (process.ImmediateCallbackGroup, ReentrantCallbackGroup):
                self.create_timer(0.005, functools.partial(self.on_timer, stop, group), callback_group=group())

        def on_timer(self, stop, group):
            callers.setdefault(group, set()).add(threading.current_thread().name.partition("_")[0])
            if len(callers) == 2:
                stop(7)

    assert run(Mixed, 3) == 7
    assert callers == {process.ImmediateCallbackGroup: {"executor"}, ReentrantCallbackGroup: {"callback"}}


def test_what_fails_there_ends_the_process(run, capfd):
    assert run(lambda _stop: 1 / 0, 3, groups=(process.ImmediateCallbackGroup,)) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_an_executor_that_stands_still_ends_the_process(run, monkeypatch, capfd):
    """As where a thread that found no memory while it began holds the lock of all pools: no signal, no exception."""
    monkeypatch.setattr(process, "_STILL_SEC", 1.5)
    released, calls = threading.Event(), []
    submit = ThreadPoolExecutor.submit

    def submit_or_wait(self, *arguments):
        calls.append(1)
        if len(calls) > 100:
            released.wait(60)
        return submit(self, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_or_wait)
    try:
        assert run(lambda _stop: None, 4) == 1
        assert len(calls) == 101 and "has stood still" in capfd.readouterr().err
    finally:
        released.set()


@pytest.mark.parametrize(("late", "code"), [(0.0, 1), (1.0, 7)])
def test_a_process_that_is_late_as_a_whole_goes_on(monkeypatch, late, code):
    """It was stopped, or one thread kept Python to itself (importing PyTorch from a slow disk): again and again, here."""
    given, polls = [], []

    def get(timeout: float) -> int:
        polls.append(timeout + late)
        if given or len(polls) == 100:
            return (*given, 7)[0]
        raise queue.Empty

    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: sum(polls)))
    executor, codes = SimpleNamespace(rounds=0), SimpleNamespace(get=get)
    assert process._code_of_the_end(executor, given.append, codes) == code
    assert late or process._STILL_SEC <= sum(polls) < process._STILL_SEC + 3
