"""Entry points of the nodes: signals are handled before slow imports; the process ends without finalization.

Imports nothing slow: until rclpy is imported (seconds on a busy machine) a signal finds Python's own handlers, which end
the process with a traceback or not with 0. The start of Python itself (twice with ROS 2's wheels) comes before this
module.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from vla_perception.startup import open_standard_streams

_ENDING = (signal.SIGINT, signal.SIGTERM)
#: Bytes that must be left in /dev/shm: the tracing library that rclpy loads ends the process with SIGBUS otherwise.
_ROOM = 16384
#: Seconds for what was printed to be written.
_WRITE_SEC = 0.3
#: Of glibc's malloc: a parameter's number (malloc.h), its value in a node, and the names by which a user sets it.
_MALLOC = (
    (-8, 1, ("MALLOC_ARENA_MAX", "arena_max")),
    (-1, 128 << 20, ("MALLOC_TRIM_THRESHOLD_", "trim_threshold")),
    (-3, 32 << 20, ("MALLOC_MMAP_THRESHOLD_", "mmap_threshold")),  # glibc takes no more
)


def begin() -> None:
    """From here on SIGINT and SIGTERM end this process with 0, at once; to be called before rclpy is imported.

    Nothing has to be torn down yet. `run_node` installs another action.
    """
    open_standard_streams()  # before the pipe of signals: what was logged came through it, and ended the process
    on_signal(lambda: os._exit(0))
    with contextlib.suppress(OSError):
        state = os.statvfs("/dev/shm")
        if state.f_blocks and state.f_bavail * state.f_frsize < _ROOM:
            program = os.path.basename(sys.argv[0])
            print(f"{program}: /dev/shm is full, and ROS 2 needs some of it (containers: --shm-size)", file=sys.stderr)
            leave(1)


def on_signal(action: Callable[[], None] | None) -> None:
    """Calls `action` in a separate thread at every SIGINT and SIGTERM; None: they are ignored.

    Not in the main thread, which Python's handlers need: where two signals come at once, Linux may give both to a thread
    of some library, and nothing wakes the main thread from what it waits for.
    """
    global _action
    _action = action
    handler = signal.SIG_IGN if action is None else _do_nothing
    if action is not None and _reading is None:
        _begin_reading()
    for number in _ENDING:
        signal.signal(number, handler)


def _do_nothing(_number: int, _frame: object) -> None:
    """Python's part of handling a signal; the other part writes to the wake-up file."""


def _begin_reading() -> None:
    global _reading
    _reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_read, args=(_reading,), name="signals", daemon=True).start()


def _read(reading: int) -> None:
    while number := os.read(reading, 1):
        # Python writes the numbers of all signals that it handles.
        if number[0] in _ENDING and (action := _action) is not None:
            action()


_action: Callable[[], None] | None = None
_reading: int | None = None


def leave(code: int) -> NoReturn:
    """Ends the process after flushing output and logs, without Python's finalization.

    DDS, shared memory, devices and files have been closed before. Python would go on to collect every
    object of torch and the model, for seconds on a busy machine, and to wait for threads that nothing can interrupt
    (a model being read), or crash in them.
    """
    on_signal(None)
    # Writing takes as long as the reader wants.
    limit = threading.Timer(_WRITE_SEC, os._exit, (code,))
    limit.daemon = True
    limit.start()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, a pipe without a reader, none at all
            stream.flush()
    os._exit(code)


def _run(name: str) -> NoReturn:
    set_up_malloc()
    begin()
    with contextlib.suppress(RuntimeError, ValueError, OSError):  # without stderr
        # A library that dies, of memory that is not there, say, ends with its name and not silently.
        faulthandler.enable()
    try:
        node = importlib.import_module(f"vla_perception.nodes.{name}")
    except ModuleNotFoundError as error:  # what else a node needs, it imports when it starts
        print(
            f"{os.path.basename(sys.argv[0])}: {error} in {sys.executable}; nodes need ROS 2's Python packages: source a ROS 2 "
            "distribution, or run pip install '.[ros]' in this package's sources (docs/install.md)",
            file=sys.stderr,
        )
        leave(1)
    leave(node.main())


def set_up_malloc() -> None:
    """One heap for all threads, whose freed memory is used again before the system gets it; before there are threads.

    *One heap*: glibc would make up to eight per core, keep up to 64 MiB of freed memory at the end of each, and never give
    the ends back but the first one's (mtrim in glibc's malloc.c). Python allocates in one thread at a time anyway, and the
    threads of DDS and of decoders were not slower with it.

    *Used again*: an image passes through several blocks of its size. glibc would give each back when it is freed, and the
    next one's pages would come anew, zeroed, at a page fault each: two thirds of what receiving an image took
    (docs/performance.md, Reception).
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    for parameter, value, (variable, tunable) in _MALLOC:
        if variable not in os.environ and tunable not in tunables:
            with contextlib.suppress(AttributeError):  # another C library
                ctypes.CDLL(None).mallopt(parameter, value)


def visual_tokenizer() -> NoReturn:
    _run("visual_tokenizer.node")


def bag_player() -> NoReturn:
    _run("bag_player")


def opencv_camera() -> NoReturn:
    _run("opencv_camera")


def mujoco_camera() -> NoReturn:
    _run("mujoco_camera")


def token_viewer() -> NoReturn:
    _run("token_viewer")
