"""Images' memory → a buffer on the device, by way of pinned memory, which a device reads while the host does other things.

One core copies some 10 GB/s, a PCIe 5 link takes 50: large images are copied by several threads, and what they have copied
crosses while they copy the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from vla_perception.tokenizer import kept_threads

#: Bytes that are copied at a time.
_PIECE = 3 << 17
#: Threads beside the caller's, at most, and the bytes that one must have to do to be worth waking. On the host of an H200,
#: 0.9 MB took 268 µs without helpers and 411 µs with one; 6.2 MB took 1464 µs, 1048 with one, 891 with two, 912 with three.
_MAX_HELPERS, _BYTES_PER_HELPER = 3, 2 << 20


def upload(memories: Sequence[np.ndarray], into: torch.Tensor) -> None:
    """Copies uint8 arrays, [bytes] or [rows, bytes of a row], one behind the other into uint8 `into` [bytes].

    They are in pinned memory, and no longer needed, when it returns; on a GPU the rest may still be running on the current
    stream.
    """
    on_gpu = into.device.type == "cuda"
    # The allocator gives a pinned block out again only when the copies that were queued from it are done.
    host = torch.empty(into.shape, dtype=torch.uint8, pin_memory=True) if on_gpu else into
    pieces, ends = _pieces(memories, host.numpy())
    numbers = itertools.count()
    done = [False] * len(pieces)
    crossed = [0, 0]  # pieces, bytes

    def copy(cross: bool) -> None:
        while (number := next(numbers)) < len(pieces):
            np.copyto(*pieces[number])  # lets go of the interpreter
            done[number] = True
            if cross:
                send()

    def send() -> None:
        """Queues what has been copied without a gap. Only the caller's thread does: a stream is current in a thread."""
        first, begin = crossed
        last = first
        while last < len(pieces) and done[last]:
            last += 1
        if last > first:
            crossed[:] = last, ends[last - 1]
            into[begin : crossed[1]].copy_(host[begin : crossed[1]], non_blocking=True)

    helpers = min(_MAX_HELPERS, torch.get_num_threads() - 1, into.numel() // _BYTES_PER_HELPER) if on_gpu else 0
    futures = [_pool().submit(copy, False) for _ in range(helpers)]
    copy(on_gpu)
    for future in futures:
        if not future.cancel():  # one that has not begun has nothing left to do
            future.result()
    if on_gpu:
        send()


def _pieces(memories: Sequence[np.ndarray], host: np.ndarray) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[int]]:
    """(target, source) of each piece, of whole rows where there are gaps between them; and where each ends in `host`."""
    pieces, ends, begin = [], [], 0
    for memory in memories:
        row_bytes = memory.shape[1] if memory.ndim == 2 else 1
        step = max(1, _PIECE // row_bytes)
        for first in range(0, len(memory), step):
            part = memory[first : first + step]
            end = begin + part.size
            pieces.append((host[begin:end].reshape(part.shape), part))
            ends.append(end)
            begin = end
    return pieces, ends


def _pool() -> ThreadPoolExecutor:
    return kept_threads.pool("upload", 2 * _MAX_HELPERS)
