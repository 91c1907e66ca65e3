"""cuBLASLt without a GPU: proposals that PyTorch computes, right, with other last bits, and wrong."""

import itertools

import fake_cuda
from torch.nn import functional

from vla_perception.tokenizer import VisualTokenizer, cublaslt
from vla_perception.tokenizer.cublaslt import Choice, Configuration, CublasLtError


def load(**choices):
    """A small tokenizer whose products can be tuned."""
    given = {"image_size": [56, 64], "compute_dtype": "bfloat16", "device": "cpu", "runtime": "eager"}
    return VisualTokenizer.load("tiny-random", **given | choices)


def install(monkeypatch, cache):
    """A CPU passes for a GPU with this cuBLASLt, and `cache` is the folder of caches."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    lt = FakeLt()
    monkeypatch.setattr(cublaslt, "open_library", lambda device: lt)
    return lt


def choice(index, multiprocessors=0, tile=None):
    """A proposal of number `index`."""
    tile = 100 + index if tile is None else tile
    return Choice(multiprocessors, index, Configuration(66, tile, 1, 0, 0, 1, 35, 0, 4, 0))


def halves(values, weight, bias):
    """The product, its sums made in two parts that are rounded: other last bits."""
    middle = weight.shape[1] // 2
    left, right = (
        functional.linear(values[..., part], weight[:, part]) for part in (slice(middle), slice(middle, None))
    )
    return (left + right) if bias is None else (left + right) + bias


def wrong(values, weight, bias):
    return functional.linear(values, weight, bias) * 1.5


def refused(values, weight, bias):
    raise CublasLtError("cublasLtMatmul ended with status 15", 15)


_turn = itertools.count()


def unsteady(values, weight, bias):
    """Within rounding, and other bits every time."""
    return functional.linear(values, weight, bias) * (1 + next(_turn) % 2 * 0.009)


class Product:
    def __init__(self, compute, choice):
        self.compute, self.choice = compute, choice

    def __call__(self, values, weight, bias):
        return self.compute(values, weight, bias)


class FakeLt:
    """The same proposals for every product; `asked` holds (rows, out, in) of each."""

    version = 130001

    def __init__(self, *computations):
        self.computations = computations or (functional.linear, halves, wrong, refused, unsteady)
        self.asked = []

    def proposals(self, rows, weight, bias):
        self.asked.append((rows, *weight.shape))
        return [Product(compute, choice(index, 66 * (index % 2))) for index, compute in enumerate(self.computations)]

    def first_for_parts(self, rows, weight, bias):
        proposals = [each for each in self.proposals(rows, weight, bias) if each.choice.multiprocessors]
        return {each.choice.multiprocessors: each for each in proposals if each.choice.index == 0}

    def product(self, rows, weight, bias, choice):
        return next((each for each in self.proposals(rows, weight, bias) if each.choice == choice), None)
