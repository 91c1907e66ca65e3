"""`torch.cuda` on the CPU: graphs are recorded and run again, streams and events keep a diary."""

import contextlib
import time
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vla_perception.tokenizer import PRESETS, cuda_graphs, dependent_launches, tokenizer
from vla_perception.tokenizer.checkpoints import open as checkpoints
from vla_perception.tokenizer.preprocess_gpu import DevicePreprocessor


class Recorder(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: operations on fixed memory, recorded once, run again on what it holds then."""

    def __init__(self, happened):
        super().__init__()
        self.happened = happened
        self.operations = []
        self.replays = 0

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.happened.captures.append(self)
        self.happened.pools.append(pool)
        self.happened.modes.append(torch.is_inference_mode_enabled())
        self.happened.in_pool.add(pool)
        self.stream = torch.cuda.current_stream()
        self.__enter__()
        failure = self.happened.failures.pop(0) if self.happened.failures else None
        if failure is not None:
            self.happened.broken = True
            raise failure

    def capture_end(self):
        self.__exit__(None, None, None)
        broken, self.happened.broken = self.happened.broken, False
        if broken or self.happened.forked:
            # As torch 2.11 does it, the allocator still believes in the capture.
            raise RuntimeError("capture_end: the capture is broken or has unjoined streams")
        self.happened.in_pool.clear()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for target, value in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(target, torch.Tensor) and target.data_ptr() != value.data_ptr():
                    target.copy_(value)


def _narrow(config):
    """A preset of a twelfth of the width: what graphs do does not depend on it, and the CPU has less to do."""
    narrow = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    encoders = tuple(replace(encoder, overrides={**encoder.overrides, **narrow}) for encoder in config.encoders)
    return replace(config, encoders=encoders)


@contextlib.contextmanager
def one_thread():
    """Operations as small as the narrow model's take a hundred times as long where threads are woken for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def let_plans_be_captured(monkeypatch):
    """Preprocessing in PyTorch's operations goes into the graph, too: the recorders can record it."""
    plan = DevicePreprocessor.plan

    def capturable(self, images, steps=None):
        made = plan(self, images, steps)
        made.capturable = True
        return made

    monkeypatch.setattr(DevicePreprocessor, "plan", capturable)


def in_graph(tokenizer):
    """A tokenizer of the CPU that takes it for a GPU: preprocessing in PyTorch's operations, which can be recorded."""
    device = torch.device("cpu")
    tokenizer._preprocessor = DevicePreprocessor(tokenizer.config.encoders, device)
    tokenizer._runtime = cuda_graphs.CudaGraphs(tokenizer.network, device, torch.float32)
    return tokenizer


def install(monkeypatch):
    """Replaces `torch.cuda` by recorders; returns what happens: captures, and the streams' waiting for each other."""

    class Happened:
        def __init__(self):
            #: one per attempt: its recorder, its pool, whether it was in inference mode
            self.captures, self.pools, self.modes = [], [], []
            self.order = []
            #: what the next captures raise, None for one that works
            self.failures = []
            self.broken = False
            #: streams that have waited for a capturing one, and not the other way round yet
            self.forked = set()
            #: pools that the allocator allocates from
            self.in_pool = set()
            self.released = []
            self.capturing_elsewhere = False
            self.slept = []
            #: pools that outlive the graphs, and whether one of them is allocated from
            self.lasting, self.holding = [], False

    happened = Happened()
    current = []

    class Stream:
        device_index = 0
        cuda_stream = 0

        def __init__(self, device=None, name="side", priority=0):
            self.name = name

        def wait_stream(self, other):
            happened.order.append(("wait", id(self), id(other)))
            if happened.in_pool:
                if other in happened.forked:
                    happened.forked.discard(other)
                else:
                    happened.forked.add(self)

        def wait_event(self, event):
            happened.order.append(("wait event", id(self), id(event)))

        def synchronize(self):
            pass

    class Event:
        def __init__(self, enable_timing=False):
            self.at = 0.0

        def record(self, stream=None):
            self.at = time.perf_counter()
            happened.order.append(("record", id(stream or current[-1]), id(self)))

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

        def synchronize(self):
            happened.order.append(("synchronize", id(self)))

    current.append(Stream(name="default"))

    @contextlib.contextmanager
    def stream(chosen):
        current.append(chosen)
        try:
            yield
        finally:
            current.pop()

    @contextlib.contextmanager
    def use_mem_pool(pool, device=None):
        happened.lasting.append(pool)
        happened.holding = True
        try:
            yield
        finally:
            happened.holding = False

    def release(_device, pool):
        happened.released.append(pool)

    def end_allocate(_device, pool):
        if pool not in happened.in_pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        happened.in_pool.discard(pool)

    for name, fake in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": lambda: Recorder(happened),
        "stream": stream,
        "current_stream": lambda device=None: current[-1],
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "_sleep": lambda cycles: None,
        "memory_reserved": lambda device: 2**30,
        "MemPool": lambda: object(),
        "use_mem_pool": use_mem_pool,
        "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
        "get_device_name": lambda device: "a fake",
        "get_device_capability": lambda device=None: (9, 0),
        "graph_pool_handle": lambda: object(),
        "is_current_stream_capturing": lambda: happened.capturing_elsewhere,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake, raising=name not in ("MemPool", "use_mem_pool"))  # not in 2.4
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    monkeypatch.setattr(cuda_graphs, "_spare", {})
    monkeypatch.setattr(dependent_launches, "WANTED", False)  # of a GPU that the machine may have
    for module in (checkpoints, tokenizer):
        monkeypatch.setattr(module, "PRESETS", {**PRESETS, "tiny-random": _narrow(PRESETS["tiny-random"])})
    monkeypatch.setattr(cuda_graphs, "_RUNS_BEFORE_CAPTURE", 1)  # takes a third of the time
    monkeypatch.setattr(cuda_graphs.time, "sleep", happened.slept.append)
    happened.current = current
    return happened
