"""Images' memory arrives whole and in order, whoever copies which part of it."""

import threading
from concurrent.futures import Future

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from vla_perception.tokenizer import upload as upload_module  # noqa: E402
from vla_perception.tokenizer.upload import upload  # noqa: E402


class Device:
    """Passes for a uint8 tensor on a GPU: keeps what is copied into it, and where."""

    def __init__(self, size):
        self.memory, self.parts, self.threads = torch.zeros(size, dtype=torch.uint8), [], set()
        self.shape, self.device = self.memory.shape, torch.device("cuda")

    def numel(self):
        return self.memory.numel()

    def __getitem__(self, part):
        device = self

        class Part:
            def copy_(self, source, non_blocking):
                device.memory[part] = source
                device.parts.append(part)
                device.threads.add(threading.current_thread())

        return Part()


@pytest.fixture
def many_threads(monkeypatch):
    """As on a machine with a GPU and some cores."""
    empty = torch.empty
    monkeypatch.setattr(upload_module, "_PIECE", 1000)
    monkeypatch.setattr(upload_module, "_BYTES_PER_HELPER", 5000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype).fill_(7))


def memories(generator):
    wide = generator.integers(0, 256, (60, 400), dtype=np.uint8)
    return [generator.integers(0, 256, size, dtype=np.uint8) for size in (1, 12_345, 1000)] + [
        wide[:, 50:350],
        wide[:3],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_everything_arrives_once_and_from_one_thread(many_threads, seed):
    sources = memories(np.random.default_rng(seed))
    expected = np.concatenate([source.reshape(-1) for source in sources])
    device = Device(expected.size)
    upload(sources, device)
    np.testing.assert_array_equal(device.memory.numpy(), expected)
    edges = [0, *(part.stop for part in device.parts)]
    assert [part.start for part in device.parts] == edges[:-1] and edges[-1] == expected.size
    assert device.threads == {threading.current_thread()}  # the stream of which is the one that counts


def test_a_helper_copies_while_the_caller_does(many_threads, monkeypatch):
    """Both are in the middle of a piece at the same time: one alone would wait for ever."""
    copyto, together, threads = np.copyto, threading.Barrier(2), set()

    def observed(target, source):
        if len(threads) < 2:
            threads.add(threading.current_thread())
            together.wait(30.0)
        copyto(target, source)

    monkeypatch.setattr(np, "copyto", observed)
    source = np.random.default_rng(0).integers(0, 256, 6000, dtype=np.uint8)
    device = Device(source.size)
    upload([source], device)
    np.testing.assert_array_equal(device.memory.numpy(), source)
    assert len(threads) == 2


def test_what_fails_in_a_helper_is_raised(many_threads, monkeypatch):
    caller, copyto, failed = threading.current_thread(), np.copyto, threading.Event()

    def failing(target, source):
        if threading.current_thread() is not caller:
            failed.set()
            raise MemoryError("no page")
        assert failed.wait(30.0)
        copyto(target, source)

    monkeypatch.setattr(np, "copyto", failing)
    with pytest.raises(MemoryError, match="no page"):
        upload([np.zeros(6000, np.uint8)], Device(6000))


@pytest.mark.parametrize(
    "sizes, threads, helpers",
    [
        ([480 * 640 * 3], 16, 0),
        ([480 * 640 * 3] * 2, 16, 0),
        ([480 * 640 * 3] * 4, 16, 1),  # of all images together
        ([1080 * 1920 * 3], 16, 2),
        ([1080 * 1920 * 3] * 4, 16, 3),
        ([1080 * 1920 * 3], 2, 1),
        ([1080 * 1920 * 3], 1, 0),
    ],
)
def test_helpers_are_as_many_as_are_worth_waking(monkeypatch, sizes, threads, helpers):
    empty, asked = torch.empty, []

    class Pool:
        def submit(self, function, *arguments):
            asked.append(function)
            future = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(upload_module, "_pool", Pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype))
    device = Device(sum(sizes))
    upload([np.full(size, 5, np.uint8) for size in sizes], device)
    assert len(asked) == helpers and bool((device.memory == 5).all())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_on_a_real_device(device):
    sources = [np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8) for size in (5_000_000, 7, 921_600)]
    into = torch.empty(sum(map(len, sources)), dtype=torch.uint8, device=device)
    upload(sources, into)
    np.testing.assert_array_equal(into.cpu().numpy(), np.concatenate(sources))
