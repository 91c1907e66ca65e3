"""Short start-ups, and progress lines of programs that are busy."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

#: Erases the line that the cursor is in.
_ERASE = "\r\x1b[2K"


def open_standard_streams() -> None:
    """What the process was started without of stdin, stdout and stderr leads to /dev/null from here on.

    Otherwise the next files and sockets get these numbers, and what libraries write to stderr goes into them.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """For long imports: without garbage collection they take a tenth less time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Progress:
    """One line with a program's current step: rewritten on a terminal, elsewhere a new line at long intervals.

    Args:
        stream: where to; stderr where not given.
        interval_sec: at most this often where it is not a terminal. The first line comes after that time.
    """

    def __init__(
        self, stream: TextIO | None = None, *, interval_sec: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = 0.1 if self._terminal else interval_sec
        self._clock = clock
        self._last = clock()
        self._shown = False

    def __call__(self, text: str, *, begins: bool = False) -> None:
        """Shows the current step. `begins`: a new step, which may take long; a terminal shows it at once."""
        now = self._clock()
        if now - self._last < self._interval and not (begins and self._terminal):
            return
        self._last = now
        if self._terminal:
            self._stream.write(f"{_ERASE}{text[: shutil.get_terminal_size().columns - 1]}")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()
        self._shown = self._terminal

    def clear(self) -> None:
        """Erases the line, before other output or at the end."""
        if self._shown:
            self._stream.write(_ERASE)
            self._stream.flush()
            self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


def log_format(text: str) -> str:
    """A format of log lines that first erases the line of a `Progress`, on a terminal."""
    return f"{_ERASE}{text}" if sys.stderr.isatty() else text
