"""The network as CUDA graphs, with preprocessing or without: captured once per input shape, then launched as one.

Memory: all graphs of one `CudaGraphs` share one private memory pool, and their replays follow one another, so the pool
is as large as the largest of them. Streams: a capture runs on streams on which nothing else of ours runs. cuBLAS keeps
a workspace per stream for as long as the process lives, 32 MiB on Hopper: streams are used again when their `CudaGraphs`
is gone, and their workspaces lie in a separate pool, where they stay when others free all workspaces (as Inductor
does).
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from vla_perception.tokenizer.dependent_launches import attempt
from vla_perception.tokenizer.network import TokenizerNetwork
from vla_perception.tokenizer.preprocess_gpu import PreprocessPlan
from vla_perception.tokenizer.runtime import Runtime

log = logging.getLogger(__name__)

#: Runs before a capture: libraries choose and load their kernels in these.
_RUNS_BEFORE_CAPTURE = 3
#: Seconds between attempts at a capture that another thread has broken off.
_RETRY_AFTER_SEC = (0.01, 0.03, 0.1, 0.3)
#: Graphs that are kept, the least recently used goes first. A robot's cameras need one.
_MAX_GRAPHS = 8
#: Calls after which a graph with preprocessing has gained what its capture took: about 0.1 s, at 0.3 ms each.
_CALLS_PER_CAPTURE = 300
#: Captures for images that need not have been earned so.
_CAPTURES_AHEAD = 4
#: Libraries that say no more than that they failed where a capture was broken off before.
_LIBRARIES = re.compile("cublas|cudnn", re.IGNORECASE)
#: CUDA captures one graph at a time in a process.
_one_at_a_time = threading.Lock()

#: The inputs' shapes, or `PreprocessPlan.key`.
_Key = tuple


@dataclass(frozen=True)
class _Captured:
    """One graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    #: what the caller fills: pixel values, or the bytes of images
    inputs: list[torch.Tensor]
    features: torch.Tensor
    tokens: torch.Tensor
    #: holds on to what else it reads and writes that is not of the graphs' pool
    prepare: Callable[[], list[torch.Tensor]]


@dataclass
class _Streams:
    """What captures run on, and what the graphs made of them must not do at the same time."""

    main: torch.cuda.Stream
    sides: list[torch.cuda.Stream]
    #: recorded when the last replay has been read
    free: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event())
    workspaces: torch.cuda.MemPool | None = None
    #: of this thread, which has a cuBLAS handle of its own, and so workspaces of its own
    of_thread: threading.local = field(default_factory=threading.local)

    def hold_workspaces(self, device: torch.device, dtype: torch.dtype) -> None:
        """Has cuBLAS allocate this thread's workspaces, where nothing else is allocated and nothing is freed."""
        if hasattr(self.of_thread, "holds") or not hasattr(torch.cuda, "use_mem_pool"):  # PyTorch 2.4 has none
            return
        if self.workspaces is None:
            self.workspaces = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(self.workspaces):
            for stream in (self.main, *self.sides):
                with torch.cuda.stream(stream):
                    ones = torch.ones(16, 16, dtype=dtype, device=device)
                    torch.mm(functional.linear(ones, ones, ones[0]), ones)
        self.of_thread.holds = True


class _BrokenOffError(RuntimeError):
    """Something outside of it has ended a capture; the cause is what was noticed of that first."""


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is queued meanwhile, on this stream, becomes the graph; its memory is of `pool`, a `graph_pool_handle`.

    Leaves nothing of a capture behind if it fails; raises what went wrong first, or `_BrokenOffError`.
    """
    # Not `torch.cuda.graph`: it synchronizes the device and empties the allocator's cache, which would break off a
    # capture of another thread's. thread_local: other threads may use CUDA meanwhile, but not wait for all of it.
    with _one_at_a_time, torch.cuda.stream(stream):
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            yield
            graph.capture_end()
        except BaseException as error:
            end = ""
            try:
                graph.capture_end()
            except Exception as failure:
                end = str(failure)
            # Up to torch 2.11 an end that fails leaves the allocator believing in the capture, for the whole
            # process. Where it does not, the first of these raises.
            with contextlib.suppress(Exception):
                names = "_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"  # the second before torch 2.8
                end_allocation = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
                end_allocation(stream.device_index, pool)
                torch._C._cuda_releasePool(stream.device_index, pool)
            if "captur" in str(error) or ("captur" in end and _LIBRARIES.search(str(error))):
                raise _BrokenOffError(str(error)) from error
            raise


#: Of devices by index, and numbers of side streams: those that no `CudaGraphs` has.
_spare: dict[tuple[int | None, int], list[_Streams]] = {}


def _streams(owner: object, device: torch.device, sides: int) -> _Streams:
    """Streams for as long as `owner` lives."""
    spare = _spare.setdefault((device.index, sides), [])
    try:
        streams = spare.pop()
    except IndexError:
        # Of high priority: before whatever prepares the next images. Also, torch hands out streams in turn, and what
        # another thread did on the same one during a capture would be captured as well: these are rarer.
        main, *others = (torch.cuda.Stream(device, priority=-1) for _ in range(1 + sides))
        streams = _Streams(main, others)
    weakref.finalize(owner, _give_back, streams, spare).atexit = False
    return streams


def _give_back(streams: _Streams, spare: list[_Streams]) -> None:
    """The owner is gone, and its graphs' memory right after this: the device may still be reading it."""
    with contextlib.suppress(Exception):  # as where the device has failed
        if not torch.cuda.is_current_stream_capturing():
            streams.free.synchronize()
    spare.append(streams)


class CudaGraphs(Runtime):
    """The network as CUDA graphs, one per shape of the inputs, captured when that shape first comes.

    `from_images` has preprocessing in the graph as well, one per size and layout of the images, captured with the first
    of them. Where sizes change again and again, captures would take longer than graphs save: beyond `_CAPTURES_AHEAD`
    each has to be earned, by `_CALLS_PER_CAPTURE` calls with images of sizes and layouts that are known.

    What cannot be compiled is captured as it is; a shape whose capture fails runs without a graph. `name` and
    `fallback` say so. Where the caller captures a graph itself, the network becomes part of it.

    A thread that synchronizes the whole device (`torch.cuda.synchronize`) breaks off any capture in the process; it is
    tried again some times. `VisualTokenizer.warm_up` before other threads start avoids that.

    Args:
        compiled: capture what `torch.compile` makes of the network.
    """

    def __init__(
        self, network: TokenizerNetwork, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
    ) -> None:
        super().__init__(network, device, dtype)
        self.name = "compile" if compiled else "graph"
        self._branches, self._join = network.branches(), network.join
        if compiled:
            # Without Inductor's own graphs: they would end where ours has to go on.
            self._branches = [torch.compile(branch, dynamic=False) for branch in self._branches]
            self._join = torch.compile(self._join, dynamic=False)
        self._streams = _streams(self, device, len(self._branches) - 1)
        self._pool = torch.cuda.graph_pool_handle()
        # None: cannot be captured.
        self._captured: OrderedDict[_Key, _Captured | None] = OrderedDict()
        self._seen: deque[_Key] = deque(maxlen=_MAX_GRAPHS)  # the last ones that were not captured
        self._earned = _CAPTURES_AHEAD * _CALLS_PER_CAPTURE
        # One at a time, in the calling threads and on the device: a graph has one place for inputs and outputs.
        self._lock = threading.Lock()

    def __call__(
        self, pixel_values: Sequence[torch.Tensor], features: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        def capture() -> _Captured:
            inputs = [pixels.to(self._device, self._dtype, copy=True) for pixels in pixel_values]
            return self._capture(inputs, lambda: inputs)

        def fill(inputs: list[torch.Tensor]) -> None:
            for static, pixels in zip(inputs, pixel_values, strict=True):
                static.copy_(pixels, non_blocking=True)

        with self._lock, torch.cuda.device(self._device):
            key = tuple(pixels.shape for pixels in pixel_values)
            captured = None if torch.cuda.is_current_stream_capturing() else self._graph(key, capture)
            if captured is None:
                return super().__call__(pixel_values, features)
            return self._replay(captured, fill, features)

    def from_images(
        self,
        plan: PreprocessPlan,
        fill: Callable[[torch.Tensor], object],
        features: bool = True,
        *,
        cameras: Sequence[str] | None = None,
        announced: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor] | None:
        """The plan for images, and what writes their memory → as `__call__`, preprocessing being part of the graph.

        None where there is no such graph: it cannot be captured, or is not worth it (see the class) and not announced.
        """

        def capture() -> _Captured:
            source = torch.zeros(plan.nbytes, dtype=torch.uint8, device=self._device)
            pixel_values = [torch.empty(shape, dtype=self._dtype, device=self._device) for shape in plan.outputs]

            def preprocess() -> list[torch.Tensor]:
                plan.run(source, pixel_values)
                return pixel_values

            return self._capture([source], preprocess)

        key = plan.key
        with self._lock, torch.cuda.device(self._device):
            if not plan.capturable or torch.cuda.is_current_stream_capturing():
                return None
            if not announced and not self._may_capture(key):
                return None
            known, begun = key in self._captured, time.perf_counter()
            captured = self._graph(key, capture)
            if captured is None:
                return None
            if not known:
                log.info("warmed up for %s in %.2f s", _named(plan, cameras), time.perf_counter() - begun)
            return self._replay(captured, lambda inputs: fill(inputs[0]), features)

    def replay_last(self) -> None:
        """Launches the graph that was used last once more, on what it holds, to be timed. There must be one."""
        captured = next(reversed(self._captured.values()))
        assert captured is not None
        captured.graph.replay()

    def _may_capture(self, key: _Key) -> bool:
        """Whether images of this key have a graph, or may get one now: then that is paid for."""
        captured = key in self._captured
        if captured or key in self._seen:
            self._earned = min(self._earned + 1, _CAPTURES_AHEAD * _CALLS_PER_CAPTURE)
        if captured:
            return True
        if self._earned >= _CALLS_PER_CAPTURE:
            self._earned -= _CALLS_PER_CAPTURE
            return True
        if key not in self._seen:
            self._seen.append(key)
        return False

    def _replay(
        self, captured: _Captured, fill: Callable[[list[torch.Tensor]], object], features: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._streams.free)  # the last caller may have used another stream
        try:
            fill(captured.inputs)
            captured.graph.replay()
            # Copies, because the next replay writes where this one did: 2 MiB take some microseconds on the device.
            return captured.features.clone() if features else None, captured.tokens.clone()
        finally:  # also where memory lacks for the copies: the next one must wait for what is queued
            self._streams.free.record(stream)

    def _graph(self, key: _Key, capture: Callable[[], _Captured]) -> _Captured | None:
        """The graph for this key; None, and the reason in `fallback`, if there cannot be one."""
        if key in self._captured:
            self._captured.move_to_end(key)
            return self._captured[key]
        try:
            # The first capture of a process makes tensors that outlive it, CUDA's generator's; made in inference mode
            # they would break other people's captures.
            with torch.inference_mode(False), torch.no_grad():
                captured = capture() if self.name == "compile" else attempt(capture)
        except Exception as error:
            if self.name == "compile":
                self._report(f"not compiled: {_reason(error)}", "runs without torch.compile")
                self.name = "graph"
                self._branches, self._join = self._network.branches(), self._network.join
                return self._graph(key, capture)
            self._report(f"no CUDA graph for {_described(key)}: {_reason(error)}", "runs eagerly, which is slower")
            captured = None
        self._captured[key] = captured
        if len(self._captured) > _MAX_GRAPHS:
            self._streams.free.synchronize()  # it may still be running
            self._captured.popitem(last=False)
        if self.name != "compile":
            self.name = "graph" if any(self._captured.values()) else "eager"
        return captured

    def _report(self, reason: str, consequence: str) -> None:
        log.warning("%s: %s", consequence, reason)
        if reason not in self.fallback:
            self.fallback = f"{self.fallback}; {reason}".removeprefix("; ")

    def _capture(self, inputs: list[torch.Tensor], prepare: Callable[[], list[torch.Tensor]]) -> _Captured:
        """`prepare` gives the network's inputs, on the device and in its dtype; what it computes is part of the graph."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._streams.free)
        for _ in range(_RUNS_BEFORE_CAPTURE):
            self._join([branch(pixels) for branch, pixels in zip(self._branches, prepare())])
        self._streams.hold_workspaces(self._device, self._dtype)
        stream.synchronize()
        for pause in (*_RETRY_AFTER_SEC, None):
            try:
                return self._record(inputs, prepare)
            except _BrokenOffError as error:
                if pause is None:
                    raise (error.__cause__ or error) from None
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _record(self, inputs: list[torch.Tensor], prepare: Callable[[], list[torch.Tensor]]) -> _Captured:
        """One attempt."""
        graph = torch.cuda.CUDAGraph()
        if not any(self._captured.values()):
            # The allocator gives a pool up with its last graph, and refuses it for another one.
            self._pool = torch.cuda.graph_pool_handle()
        with capturing(graph, self._pool, self._streams.main):
            features, tokens = self._run_side_by_side(prepare())
        return _Captured(graph, inputs, features, tokens, prepare)

    def _run_side_by_side(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The branches on a stream each: forked from the current stream, and joined to it again."""
        main = torch.cuda.current_stream(self._device)
        parts: list[tuple[torch.Tensor, ...]] = [()] * len(self._branches)
        forked = []
        try:
            for index, side in enumerate(self._streams.sides, start=1):
                side.wait_stream(main)
                forked.append(side)
                with torch.cuda.stream(side):
                    parts[index] = self._branches[index](inputs[index])
            parts[0] = self._branches[0](inputs[0])
        except BaseException:
            # A capture can only end where all that was forked is joined again.
            for side in forked:
                with contextlib.suppress(Exception):
                    main.wait_stream(side)
            raise
        for side in forked:
            main.wait_stream(side)
        # `parts` lives until its last reader is queued: a side stream's memory could be given out again before.
        return self._join(parts)


def _described(key: _Key) -> str:
    if isinstance(key[0], torch.Size):
        return " and ".join(str(list(shape)) for shape in key)
    return " and ".join(f"an image of {layout.width} × {layout.height}" for layout in key[0])


def _named(plan: PreprocessPlan, cameras: Sequence[str] | None) -> str:
    """``front: 1280x720 bgr8, wrist: 640x480 rgb8``."""
    kinds = [layout.kind for layout in plan.layouts]
    return ", ".join(kinds if cameras is None else [f"{camera}: {kind}" for camera, kind in zip(cameras, kinds)])


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
