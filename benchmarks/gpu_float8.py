"""`compute_dtype: float8` beside bfloat16 on one device: time of a replay, of products, and the distance from float32.

A question of benchmarks/gpu.py.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator

import torch
from float8_error import distance

from vla_perception.tokenizer import VisualTokenizer, float8

Timer = Callable[[Callable[[], object]], float]


def measure(
    load: Callable[[str], VisualTokenizer],
    bfloat16: VisualTokenizer,
    exact: Callable,
    images: Callable[[int], list],
    device_us: Timer,
    graph_us: Timer,
    wall_ms: Timer,
) -> dict:
    """Prints and returns figures; errors of `load` are the caller's.

    Args:
        load: the precision's name → the tokenizer to measure.
        bfloat16: what it is compared with; `exact` gives its tokens in float32 for pixel values.
        images: number of views → images.
        device_us, graph_us: time of an action on the device, and of one in a row of actions within a graph.
        wall_ms: time of an action by the host's clock, until the device has finished.
    """
    begun = time.perf_counter()
    with torch.inference_mode(False):  # weights are ordinary tensors, as everywhere
        tokenizer = load("float8")
    found: dict = {"load_s": time.perf_counter() - begun, "kernels": tokenizer.kernels}
    for views in (1, 4):
        pixel_values = bfloat16.preprocess(images(views))
        expected = exact(pixel_values)
        for name, each in (("bfloat16", bfloat16), ("float8", tokenizer)):
            tokens = each.encode(pixel_values).tokens
            difference, cosine = distance(tokens, expected)
            row = {
                "replay_us": device_us(each._runtime.replay_last),
                "end_to_end_ms": wall_ms(functools.partial(each, images(views))),
                "relative_l2": difference,
                "lowest_cosine": cosine,
                "same_bits": torch.equal(tokens, each.encode(pixel_values).tokens),
                "runtime": each.runtime,
                "fallback": each.runtime_fallback,
            }
            found[f"{name}, {views} view(s)"] = row
            print(
                f"{name:>10}, {views} view(s): replay {row['replay_us']:7.1f} us, end to end p50 "
                f"{row['end_to_end_ms']:.3f} ms, relative L2 {difference:.2e}, lowest cosine of a token {cosine:.5f}, "
                f"same bits {row['same_bits']} {row['fallback']}",
                flush=True,
            )
    for label, action in _products(tokenizer):
        try:
            found[label] = graph_us(action)
            print(f"{label:>50}: {found[label]:.2f} us", flush=True)
        except Exception as error:  # an answer, too
            found[label] = f"{type(error).__name__}: {error}"[:200]
            print(f"{label:>50}: {found[label]}", flush=True)
    return found


def _products(tokenizer: VisualTokenizer) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every layer of an encoder's blocks in turn, so that no weight is in the L2 cache; with both kinds of sums."""
    for name, encoder in tokenizer.network.encoders.items():
        rows = encoder.grid[0] * encoder.grid[1] + encoder.vit.num_prefix_tokens
        for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            layers = [block.get_submodule(path) for block in encoder.vit.blocks]
            if not isinstance(layers[0], float8.Float8Linear):  # fakes
                continue
            for fast in (True, False):
                yield f"{name} {path}, {rows} rows, fast sums {fast}", _product(layers, rows, fast)


def _product(layers: list[float8.Float8Linear], rows: int, fast: bool) -> Callable[[], object]:
    turn, weight = itertools.cycle(layers), layers[0].weight
    values = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    scales = torch.ones(rows, 1, device=weight.device)

    def multiply() -> torch.Tensor:
        before, float8.FAST_ACCUMULATION = float8.FAST_ACCUMULATION, fast
        try:
            return next(turn)(values, scales)
        finally:
            float8.FAST_ACCUMULATION = before

    return multiply
