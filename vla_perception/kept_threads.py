"""Threads that are started once and then kept, for what is done with every frame set.

Where there is no memory for a thread that starts, whoever starts it may wait for ever, and holds the lock of all of
`concurrent.futures`'s pools meanwhile. So a pool has all of its threads from the beginning, and none starts later.
"""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

_IMPORTED_IN = os.getpid()


def pool(name: str, threads: int) -> ThreadPoolExecutor:
    """The pool of this name with so many threads; the first call starts them.

    A forked process (a DataLoader's worker) has none of its parent's threads: it gets another pool.
    """
    return _started(os.getpid(), name, threads)


def is_forked() -> bool:
    """Whether this process was forked after this was imported.

    OpenMP's threads may be missing then, for which PyTorch's operations in the thread that forked wait for ever. In a
    thread that is new they start others.
    """
    return os.getpid() != _IMPORTED_IN


@functools.cache
def _started(process: int, name: str, threads: int) -> ThreadPoolExecutor:
    return start(name, threads)


def start(name: str, threads: int) -> ThreadPoolExecutor:
    """A new pool that has all of its threads already; the caller ends it."""
    started = ThreadPoolExecutor(threads, thread_name_prefix=name)
    together = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):
            started.submit(together.wait)  # none is idle before all wait, so each of these starts one
        together.wait()
    except BaseException:
        together.abort()
        raise
    return started
