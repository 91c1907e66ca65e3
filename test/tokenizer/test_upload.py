"""Images' memory arrives whole and in order, and crosses to the device at once."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from vla_perception.tokenizer.upload import upload  # noqa: E402


class Device:
    """Passes for a uint8 tensor on a GPU: keeps what is copied into it, and into which part."""

    def __init__(self, size):
        self.content, self.copies = torch.zeros(size, dtype=torch.uint8, device="cpu"), []
        self.shape, self.device, self.numel = torch.Size([size]), torch.device("cuda"), lambda: size

    def __getitem__(self, part):
        self.copies.append("from the images")
        return self.content[part]  # whose `copy_` waits

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.copies.append("from pinned memory")
        self.content.copy_(source)


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    """The current stream: `idle`, busy or capturing."""

    def query():
        assert stream.state != "capturing", "CUDA refuses it, and breaks the capture off"
        return stream.state == "idle"

    stream = SimpleNamespace(state="busy", query=query)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.state == "capturing")
    return stream


@pytest.fixture
def pinned(monkeypatch):
    """The pinned memory that is asked for, filled with something else than 0."""
    empty, asked = torch.empty, []

    def make(shape, dtype, device, pin_memory):
        asked.append(empty(shape, dtype=dtype, device=device).fill_(7))
        assert pin_memory
        return asked[-1]

    monkeypatch.setattr(torch, "empty", make)
    return asked


def memories(generator):
    wide = generator.integers(0, 256, (60, 400), dtype=np.uint8)
    sizes = (1, 12_345, 1000, 921_600)
    return [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes] + [wide[:, 50:350], wide[:3]]


@pytest.mark.parametrize("seed", range(5))
def test_everything_arrives_in_order_and_crosses_at_once(pinned, seed):
    sources = memories(np.random.default_rng(seed))
    expected = np.concatenate([source.reshape(-1) for source in sources])
    device = Device(expected.size)
    with torch.device("meta"):  # a caller may have another default device than the CPU, such as its GPU
        upload(sources, device)
    np.testing.assert_array_equal(device.content.numpy(), expected)
    assert device.copies == ["from pinned memory"] and len(pinned) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the current stream is a real one")
@pytest.mark.parametrize(
    ("size", "state", "copies"),
    [
        (1 << 18, "idle", ["from the images"] * 4),
        ((1 << 18) + 1, "idle", ["from pinned memory"]),
        (1 << 18, "busy", ["from pinned memory"]),
        (1 << 18, "capturing", ["from pinned memory"]),
    ],
)
def test_few_bytes_go_straight_to_the_device_where_nothing_is_queued_before_them(pinned, stream, size, state, copies):
    """From memory that is not pinned, CUDA waits for what is queued: the host would do nothing meanwhile."""
    random = np.random.default_rng(0)
    sources = [random.integers(0, 256, (4, size // 4 + size % 4), dtype=np.uint8)[:, : size // 4] for _ in range(3)]
    sources.append(random.integers(0, 256, size + 3 * (size - sources[0].size), dtype=np.uint8))
    stream.state, device = state, Device(sum(source.size for source in sources))
    upload(sources, device)
    np.testing.assert_array_equal(device.content.numpy(), np.concatenate([source.reshape(-1) for source in sources]))
    assert device.copies == copies


def test_what_is_read_only_is_read_alone(pinned):
    """As the bytes of a message are; PyTorch would warn of undefined behaviour."""
    content = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    read_only = np.frombuffer(content, np.uint8)
    rows = read_only.reshape(50, 100)[:, 10:90]
    device = Device(5000 + rows.size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upload([read_only, rows], device)
    np.testing.assert_array_equal(device.content.numpy(), np.concatenate([read_only, rows.reshape(-1)]))
    assert not read_only.flags.writeable and read_only.tobytes() == content


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sizes", [(5_000_000, 7, 921_600), (921_600,), (196_608, 7, 196_608)])
def test_on_a_real_device(device, sizes):
    sources = [np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8) for size in sizes]
    into = torch.empty(sum(map(len, sources)), dtype=torch.uint8, device=device)
    upload(sources, into)
    expected = np.concatenate(sources)
    for source in sources:
        source.fill(0)  # the caller's again
    np.testing.assert_array_equal(into.cpu().numpy(), expected)
