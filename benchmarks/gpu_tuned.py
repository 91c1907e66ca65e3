"""`vla-perception tune` on one device: time of a replay and end to end before and after, and whether bits stay the same.

A question of benchmarks/gpu.py. What is found lies in a temporary folder.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from gpu_variants import replaced

from vla_perception import tune
from vla_perception.startup import Progress
from vla_perception.tokenizer import VisualTokenizer, cublaslt, tuned_products

Timer = Callable[[Callable[[], object]], float]


def measure(
    load: Callable[[], VisualTokenizer],
    views: Sequence[int],
    images: Callable[[int], list[np.ndarray]],
    device_us: Timer,
    wall_ms: Timer,
    seconds: float,
) -> dict:
    """Prints and returns figures; errors of `load` and of the search are the caller's.

    Args:
        load: the same model again, as at another start.
        images: number of views → images.
        device_us, wall_ms: time of an action on the device, and by the host's clock until the device has finished.
        seconds: of searching for each number of views.
    """
    found: dict = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        replaced(tuned_products, folder=lambda: Path(folder)),
        torch.inference_mode(False),  # weights are ordinary tensors, as everywhere
    ):
        untuned, chosen = load(), {}
        lt = cublaslt.open_library(untuned.device)
        found["cublaslt"] = lt.version
        for number in views:
            begun = time.perf_counter()
            search, error = tune.tune(lt, untuned.network, number, seconds, Progress())
            tuned_products.clear(untuned.network, number)
            chosen[number] = search.choices
            found[f"{number} view(s), search"] = row = {
                "seconds": time.perf_counter() - begun,
                "tried": search.tried,
                "before_us": search.before_us,
                "after_us": search.after_us,
                "relative_l2_to_before": error,
                "choices": {name: str(choice) for name, choice in search.choices.items()},
            }
            print(f"{number} view(s), search: {row}", flush=True)
        key = tuned_products.key_of(lt, tuned_products.groups_of(untuned.network))
        tuned_products.write(tuned_products.file_of(key), key, chosen)
        tuned, again = load(), load()
    found["kernels"] = [tuned.kernels, again.kernels]
    print(f"kernels: {found['kernels']}", flush=True)
    for number in views:
        pixel_values = untuned.preprocess(images(number))
        tokens = {each: each.encode(pixel_values).tokens for each in (untuned, tuned, again)}
        found[f"{number} view(s)"] = row = {
            "relative_l2_to_before": float(
                (tokens[tuned].double() - tokens[untuned].double()).norm() / tokens[untuned].double().norm()
            ),
            "same_bits_again": torch.equal(tokens[tuned], tuned.encode(pixel_values).tokens),
            "same_bits_at_another_start": torch.equal(tokens[tuned], tokens[again]),
        }
        for name, each in (("before", untuned), ("after", tuned)):
            row[f"{name}_replay_us"] = device_us(each._runtime.replay_last)
            row[f"{name}_end_to_end_ms"] = wall_ms(functools.partial(each, images(number)))
        print(
            f"{number} view(s): replay {row['before_replay_us']:.1f} -> {row['after_replay_us']:.1f} us, end to end p50 "
            f"{row['before_end_to_end_ms']:.3f} -> {row['after_end_to_end_ms']:.3f} ms, relative L2 to before "
            f"{row['relative_l2_to_before']:.1e}, same bits again {row['same_bits_again']}, at another start "
            f"{row['same_bits_at_another_start']}",
            flush=True,
        )
    return found
