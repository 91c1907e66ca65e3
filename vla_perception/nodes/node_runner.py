"""Runs a node as a process: one-line start-up errors, clean shutdown on SIGINT and SIGTERM.

rclpy's own signal handling is left off. Its handlers race with the executor (a few SIGTERMs in a hundred end in a
hang), so here the main thread does nothing but wait for the end, the executor runs in a thread beside it, and
everything is torn down in one order on the main thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import rclpy
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.exceptions import InvalidHandle
from rclpy.executors import (
    Executor,
    ExternalShutdownException,
    ShutdownException,
    SingleThreadedExecutor,
    TimeoutException,
)
from rclpy.impl.rcutils_logger import RcutilsLogger
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from vla_perception import kept_threads
from vla_perception.nodes.executables import on_signal
from vla_perception.nodes.requests import guard_requests
from vla_perception.printable import error_text, printable

Stop = Callable[[int], None]
"""Ends the process with an exit code: `stop(0)`. From any thread, any number of times; the first one counts."""

#: Seconds that callbacks and threads which are still running get to finish before the process leaves without them.
GRACE_SEC = 0.5
#: Seconds from the first signal, or `stop`, after which the process leaves with whatever has not ended yet.
_LIMIT_SEC = 1.5
#: Seconds without a round of the executor, which takes 1.1 s at most, after which the process ends.
_STILL_SEC = 15.0
#: Seconds that the main thread may wake up late in a process whose threads get on.
_LATE_SEC = 0.5
#: Seconds after which a thread that waits for the interpreter is given it. A frame passes through several threads; with Python's
#: 5 ms it waited at each of them while diagnostics were computed (measured: p99 of its age 9.3 ms instead of 12.3).
_SWITCH_SEC = 0.0005
#: Seconds that a callback may wait for a thread before others are looked for.
_BUSY_SEC = 0.1


class RosLogHandler(logging.Handler):
    """What Python modules log, as log lines of a node: on its screen, in its file and on /rosout."""

    def __init__(self, logger: RcutilsLogger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        # It may quote names of files and messages. A traceback keeps its lines.
        text = "\n".join(map(printable, text.splitlines())) if record.exc_info else printable(text)
        # A call for each: rclpy does not let one line of code log at two severities.
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        else:
            self._logger.info(text)


def run_node(make_node: Callable[[Stop], Node], args: Sequence[str] | None = None, *, threads: int = 1) -> int:
    """Runs one node until SIGINT, SIGTERM or its own `stop`, and gives the process's exit code.

    To be called from the main thread, as the last thing before `executables.leave`: SIGINT and SIGTERM are ignored
    afterwards, because under `ros2 launch` Ctrl-C reaches a node twice, and threads that cannot be interrupted may be
    left. Where the end takes longer than `_LIMIT_SEC` it leaves by itself. Works alike on rclpy 7.1 (Jazzy) and 9.1.

    Args:
        make_node: gets `stop` and makes the node. If it raises, its message is printed as one sentence. A node with
            a `close()` method has it called once, on the main thread, while the executor still runs: there it ends
            its threads and makes callbacks that wait return.
        args: like `sys.argv`, the program's name first; None for `sys.argv` itself.
        threads: callbacks that may run at once (see callback groups); 1 runs them one after the other.

    Returns:
        0 after a signal, 1 if the node could not be made or a callback raised, 2 for unknown arguments, otherwise
        what `stop` was given.
    """
    arguments = list(sys.argv if args is None else args)
    program = os.path.basename(arguments[0]) if arguments else "node"
    codes: queue.SimpleQueue[int] = queue.SimpleQueue()
    ending: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # the same for `limit`, and None when all has ended

    def stop(code: int) -> None:
        codes.put(code)
        ending.put(code)

    def limit() -> None:
        if (code := ending.get()) is None:
            return
        end = time.monotonic() + _LIMIT_SEC
        try:
            while ending.get(timeout=max(0.0, end - time.monotonic())) is not None:
                pass
        except queue.Empty:
            os._exit(code)

    sys.setswitchinterval(_SWITCH_SEC)
    watch = threading.Thread(target=limit, name="limit", daemon=True)
    watch.start()
    on_signal(lambda: stop(0))
    try:
        return _run(make_node, arguments, program, stop, codes, threads)
    finally:
        on_signal(None)
        ending.put(None)
        watch.join()


def _run(
    make_node: Callable[[Stop], Node],
    arguments: list[str],
    program: str,
    stop: Stop,
    codes: queue.SimpleQueue[int],
    threads: int,
) -> int:
    try:
        rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:
        return _print_error(program, error)
    try:
        unknown = remove_ros_args(args=arguments)[1:]
        if unknown:
            _say(
                f"{program}: unknown arguments {' '.join(unknown)}: parameters are given as "
                f"`--ros-args -p NAME:=VALUE` or `--ros-args --params-file FILE`"
            )
            return 2
        if not codes.empty():
            return codes.get()
        try:
            node = make_node(stop)
        except Exception as error:
            return _print_error(program, error)
        guard_requests(node)
        return _spin(node, stop, codes, threads)
    finally:
        rclpy.try_shutdown()


class ImmediateCallbackGroup(ReentrantCallbackGroup):
    """For callbacks that end within milliseconds: `run_node`'s executor calls them itself, without waking another thread."""


class _ThreadedExecutor(Executor):
    """Several callbacks at a time, as far as their groups allow.

    rclpy's MultiThreadedExecutor hands a callback that is ready to a thread, and again some thousand times a second until
    it has begun there; meanwhile no other thread gets far. Beside an encoding that took half of a node's frames and most
    of a core (measured: 30 Hz of 640 × 480, 2 cores). This one waits until the callback has begun. And a callback may
    destroy a subscription, which ends rclpy's executors (up to 9.1) if one waits for its events at that moment.

    Attributes:
        rounds: counts calls of `spin_once`.
        pool: the threads. `shutdown` does not wait for callbacks that still run, so its owner does that.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.pool = kept_threads.start("callback", threads)
        self._running: list[Future] = []
        self.rounds = 0

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Begins one callback that is ready within `timeout_sec`. Raises what one that has ended did."""
        self.rounds += 1
        for future in [future for future in self._running if future.done()]:
            self._running.remove(future)
            future.result()
        try:
            handler, entity, _node = self.wait_for_ready_callbacks(timeout_sec=timeout_sec)
        except (TimeoutException, InvalidHandle):
            return  # InvalidHandle: a callback has just destroyed what was to be waited for, which the next round leaves out
        if entity is not None and isinstance(entity.callback_group, ImmediateCallbackGroup):
            handler()
            handler.result()
            return
        begun = threading.Event()

        def call() -> None:
            begun.set()
            handler()
            if handler.done():  # no coroutine that waits for something
                handler.result()

        self._running.append(self.pool.submit(call))
        begun.wait(_BUSY_SEC)

    def _take_waitable(self, waitable: Any) -> Any:
        try:
            return super()._take_waitable(waitable)
        except InvalidHandle:  # a subscription's event: as rclpy itself does with all that is no waitable
            return None


def _spin(node: Node, stop: Stop, codes: queue.SimpleQueue[int], threads: int) -> int:
    executor = SingleThreadedExecutor() if threads == 1 else _ThreadedExecutor(threads)
    executor.add_node(node)
    stopping = threading.Event()

    def spin() -> None:
        try:
            while not stopping.is_set():
                executor.spin_once(timeout_sec=1.0)
        except (ExternalShutdownException, ShutdownException):
            stop(0)
        except Exception:
            _say(f"{traceback.format_exc()}this error ends the process, so that a supervisor can start another one")
            stop(1)
        if isinstance(executor, _ThreadedExecutor):
            executor.pool.shutdown(wait=True)

    spinner = threading.Thread(target=spin, name="executor", daemon=True)
    spinner.start()
    # Without threads, callbacks run in the executor's own, and may take long.
    code = _code_of_the_end(executor, stop, codes) if isinstance(executor, _ThreadedExecutor) else codes.get()
    if hasattr(node, "close"):
        try:
            node.close()
        except Exception:
            _say(traceback.format_exc())
            code = code or 1
    stopping.set()
    executor.create_task(lambda: None)  # ends `spin_once`, as the executor's `wake` does not
    spinner.join(GRACE_SEC)
    # Only when no callback runs any more may what callbacks use be destroyed.
    if not spinner.is_alive() and executor.shutdown(timeout_sec=GRACE_SEC):
        node.destroy_node()
    return code


def _code_of_the_end(executor: _ThreadedExecutor, stop: Stop, codes: queue.SimpleQueue[int]) -> int:
    """Waits for the end, and ends a node whose executor stands still for `_STILL_SEC`, which nothing else would notice.

    A thread that finds no memory while it begins leaves who started it waiting for ever (CPython), with a lock that every
    pool of the process needs.
    """
    rounds, still = -1, 0  # still: seconds
    while True:
        begun = time.monotonic()
        try:
            return codes.get(timeout=1.0)
        except queue.Empty:
            # This thread was late, too: the process was stopped (SIGSTOP), or one thread kept Python to itself (the GIL).
            late = time.monotonic() - begun > 1.0 + _LATE_SEC
        still = still + 1 if executor.rounds == rounds and not late else 0
        rounds = executor.rounds
        if still >= _STILL_SEC:
            _say(
                f"the executor has stood still for {_STILL_SEC:g} s (a thread that found no memory while it began?): the "
                "process ends, so that a supervisor can start another one"
            )
            stop(1)


def _print_error(program: str, error: Exception) -> int:
    """One line for an exception at the start; returns the exit code."""
    text = error_text(" ".join(str(error).split())) or type(error).__name__
    if "logging directory" in text:  # ROS 2 keeps logs in the home directory, and supervisors may start a node without
        text += "; set HOME, or ROS_LOG_DIR to a folder that can be written"
    _say(f"{program}: {text}")
    return 1


def _say(text: str) -> None:
    """A line on stderr, where that can be written: a full disk or a reader that has gone must not hold up an end."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr)
