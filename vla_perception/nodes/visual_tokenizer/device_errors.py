"""Which errors of a GPU end its use in this process."""

from __future__ import annotations

import re

#: What an error of CUDA says that does not end the device's use (`device_is_lost`).
_PASSES = re.compile("out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|captur")


def device_is_lost(error: Exception) -> bool:
    """Whether an error stays with the process: most errors of CUDA do.

    Not those of memory that is not there just now, under whatever name, and of a graph's capture that something broke
    off: the next frame may do better, and is counted if not.
    """
    text = str(error).partition("\n")[0]  # advice follows
    # Before torch 2.8 an error of CUDA had no separate class.
    of_cuda = type(error).__name__ == "AcceleratorError" or "CUDA error" in text
    return of_cuda and not _PASSES.search(text)
