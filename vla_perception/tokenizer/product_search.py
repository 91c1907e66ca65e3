"""The search behind ``vla-perception tune``: which proposals of cuBLASLt make one replay of the CUDA graph shortest.

A proposal that is fastest alone need not be fastest beside the other encoder's products. So each is tried in the whole
graph: first all together that cuBLASLt proposes for a part of the device, then group by group, those first that are fastest
alone. What is in use and what is tried are timed in turn, and a change stays where a second capture of it is faster, too.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vla_perception.tokenizer import tuned_products
from vla_perception.tokenizer.cublaslt import Choice, CublasLt, CublasLtError, Product
from vla_perception.tokenizer.cuda_graphs import CudaGraphs, capturing
from vla_perception.tokenizer.network import TokenizerNetwork
from vla_perception.tokenizer.tuned_products import Group

#: Times that the groups are gone through.
_PASSES = 2
#: Proposals that are tried in the graph: the fastest alone, and the fastest of those for a part of the device.
_FASTEST, _FASTEST_OF_PART = 7, 3
#: Replays to see whether a proposal may be faster, and to be sure of it.
_GLANCE, _LOOK = 8, 32
#: Share of a replay's time that a change has to gain.
_LEAST_GAIN = 0.001


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        choices: group's name → choice, of those that are changed.
        before_us, after_us: one replay, in microseconds, timed in turn at the end.
        tried: captures that were timed.
    """

    choices: dict[str, Choice]
    before_us: float
    after_us: float
    tried: int


class GraphTimer:
    """Captures the network as it is now for so many views, and times captures in turn."""

    def __init__(self, network: TokenizerNetwork, views: int) -> None:
        weight = next(network.parameters())
        self._network, self._device, self._dtype = network, weight.device, weight.dtype
        sizes = [encoder.config.image_size for encoder in network.towers]
        self._pixel_values = [torch.randn(views, 3, size, size, device=self._device) for size in sizes]

    def capture(self) -> CudaGraphs:
        """Another capture of the network as it is now. RuntimeError if it cannot be captured."""
        torch.cuda.empty_cache()  # of captures that are gone, which each had a pool
        runtime = CudaGraphs(self._network, self._device, self._dtype)
        runtime(self._pixel_values, features=False)
        if runtime.fallback:
            raise RuntimeError(runtime.fallback)
        return runtime

    def compare(self, captures: Sequence[CudaGraphs], rounds: int) -> list[float]:
        """Median microseconds of one replay of each."""
        return _microseconds([each.replay_last for each in captures], rounds)

    def tokens(self) -> torch.Tensor:
        """Of the network as it is now, by another capture."""
        return CudaGraphs(self._network, self._device, self._dtype)(self._pixel_values, features=False)[1]

    def alone(self, group: Group, rows: int, product: Product) -> float:
        """Microseconds of one product, all layers of the group in turn, so that no weight is in a cache."""
        layer = group.layers[0]
        values = torch.randn(rows, layer.in_features, device=self._device).to(self._dtype)
        stream, graph = torch.cuda.Stream(self._device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self._device))  # which writes the values
        with torch.cuda.stream(stream):
            product(values, layer.weight, layer.bias)
            stream.synchronize()
        with capturing(graph, torch.cuda.graph_pool_handle(), stream):
            for layer in group.layers:
                product(values, layer.weight, layer.bias)
        return _microseconds([graph.replay], _GLANCE)[0] / len(group.layers)


def _microseconds(actions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Medians on the device's clock; the actions take turns."""
    times: list[list[float]] = [[] for _ in actions]
    for number in range(rounds + 1):
        for own, action in zip(times, actions):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(400_000)  # the host runs ahead meanwhile, so that no launch of its is in the time
            start.record()
            action()
            end.record()
            end.synchronize()
            if number:  # the first one is a warm-up
                own.append(start.elapsed_time(end) * 1e3)
    return [statistics.median(own) for own in times]


class Search:
    """Finds products for one number of views, and leaves the groups with them.

    Args:
        groups: as PyTorch has them for that number.
        timer: a `GraphTimer`.
        progress: called with what is being done.
    """

    def __init__(
        self, lt: CublasLt, groups: Sequence[Group], views: int, timer: Any, progress: Callable[[str], object]
    ) -> None:
        self._lt, self._groups, self._views, self._timer = lt, groups, views, timer
        self._progress = progress
        self._tried = 0

    def run(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> Found:
        """Ends after about so many seconds, or when nothing is left to be tried.

        Raises:
            RuntimeError: the network cannot be captured.
        """
        deadline = clock() + seconds
        with torch.inference_mode(False), torch.no_grad():  # what a first capture makes outlives it
            untouched = best = self._timer.capture()
            pools = []
            for group in self._groups:
                if clock() < deadline:
                    self._progress(f"{self._views} view(s): timing the products of {group.name} alone")
                    pools.append((*self._pool(group), group))
            pools.sort(key=lambda each: each[0], reverse=True)  # first what there is most to gain from
            for changes in self._together([group for _, pool, group in pools if pool]):
                if clock() < deadline:
                    self._progress(f"{self._views} view(s): trying all products for a part of the device")
                    best = self._try(changes, best)
            for number in range(_PASSES):
                for _, pool, group in pools:
                    for product in pool:
                        left = deadline - clock()
                        if left < 0:
                            break
                        self._progress(
                            f"{self._views} view(s), pass {number + 1} of {_PASSES}: trying {group.name} in the graph, "
                            f"{self._tried} tried, at most {left:.0f} s to go"
                        )
                        best = self._try([(group, product)], best)
            before, after = self._timer.compare((untouched, best), 2 * _LOOK)
        choices = {
            group.name: group.products[self._rows(group)].choice
            for group in self._groups
            if self._rows(group) in group.products
        }
        if not choices or not after < before * (1 - _LEAST_GAIN):
            for group in self._groups:
                group.products.pop(self._rows(group), None)
            choices, after = {}, before
        return Found(choices, before, after, self._tried)

    def _rows(self, group: Group) -> int:
        return self._views * group.tokens

    def _pool(self, group: Group) -> tuple[float, list[Product]]:
        """Microseconds of the group's products, and what is worth a try in the graph, the fastest alone first."""
        rows, layer, timed = self._rows(group), group.layers[0], []
        try:
            proposals = self._lt.proposals(rows, layer.weight, layer.bias)
        except CublasLtError:
            return 0.0, []
        for product in proposals:
            if self._is_right(product, group):
                with contextlib.suppress(RuntimeError):  # it cannot be captured
                    timed.append((self._timer.alone(group, rows, product), product))
        timed.sort(key=lambda pair: pair[0])
        ordered = [product for _, product in timed]
        rest = [product for product in ordered[_FASTEST:] if product.choice.multiprocessors]
        whole = timed[0][0] * len(group.layers) if timed else 0.0
        return whole, ordered[:_FASTEST] + rest[:_FASTEST_OF_PART]

    def _is_right(self, product: Product, group: Group) -> bool:
        try:
            return tuned_products.gives_the_product(product, group.layers[0], self._rows(group))
        except CublasLtError:  # it refuses after all
            return False

    def _together(self, groups: Sequence[Group]) -> Iterator[list[tuple[Group, Product]]]:
        """Changes of all groups at once: one alone gains nothing where the others still want the whole device."""
        firsts: dict[int, list[tuple[Group, Product]]] = {}
        for group in groups:
            rows, layer = self._rows(group), group.layers[0]
            for part, product in self._lt.first_for_parts(rows, layer.weight, layer.bias).items():
                if self._is_right(product, group):
                    firsts.setdefault(part, []).append((group, product))
        yield from firsts.values()

    def _try(self, changes: Sequence[tuple[Group, Product]], best: Any) -> Any:
        """The capture that is best now; the groups keep the products if that is theirs."""
        before = [(group, group.products.get(self._rows(group))) for group, _ in changes]
        if all(product is old for (_, product), (_, old) in zip(changes, before)):
            return best
        for group, product in changes:
            group.products[self._rows(group)] = product
        self._tried += 1
        try:
            found = self._timer.capture()
            if self._gains(best, found, _GLANCE):
                found = self._timer.capture()
                if self._gains(best, found, _LOOK):
                    return found
        except RuntimeError:  # of cuBLASLt, or of a capture
            pass
        for group, old in before:
            if old is None:
                del group.products[self._rows(group)]
            else:
                group.products[self._rows(group)] = old
        return best

    def _gains(self, best: Any, other: Any, rounds: int) -> bool:
        old, new = self._timer.compare((best, other), rounds)
        return new < old * (1 - _LEAST_GAIN)
