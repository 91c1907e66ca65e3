"""Whether Triton's kernels are launched before the ones in front of them have ended, and wait for their results by themselves.

That is CUDA's programmatic dependent launch: what a kernel does before it waits, and its launch, overlap with the end of the
kernel in front of it. From Hopper on. A kernel that is launched so (triton_kernels.py)

- waits in every program, so that its own end tells that all in front of it has ended;
- writes nothing before it waits, and reads nothing that the kernel right in front of it may have written;
- never tells the kernel behind it to begin before its own end, so kernels that do not wait may follow it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

#: For the whole process; cleared where it does not work.
WANTED = True


def in_use() -> bool:
    """Wanted, and known to the current device and to Triton."""
    return WANTED and torch.cuda.is_available() and _known_to(torch.cuda.current_device())


@functools.cache
def _known_to(device: int) -> bool:
    if not torch.version.cuda or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    try:
        from triton.language.extra.cuda import gdc_wait  # noqa: F401
    except ImportError:
        return False
    return True


def launch_options() -> dict[str, bool]:
    """To be given with a launch of a kernel with the argument `dependent`: whether it waits."""
    return {"dependent": True, "launch_pdl": True} if in_use() else {"dependent": False}


def attempt(action: Callable[[], _Result]) -> _Result:
    """What `action` returns. If it fails, it is tried without such launches; if it succeeds then, there are none any more."""
    global WANTED
    try:
        return action()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, or a driver, may raise
        if not in_use():
            raise
        WANTED, reason = False, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
    try:
        result = action()
    except BaseException:
        WANTED = True  # it was not their fault
        raise
    log.warning("without dependent launches, which is slower by some percent: %s", reason)
    return result
