"""What a CUDA device does with the tokenizer, question by question: prints tables and writes one JSON.

    python benchmarks/gpu.py --json gpu.json                         # all questions, some three minutes on an H100
    python benchmarks/gpu.py --json gpu.json latency variants        # these alone

``latency``: host uint8 images → tokens on the device, for several numbers of views and sizes, one call right after the other
and 30 calls a second, before which caches and cores have cooled down; and the device's memory.
``baseline``: encoding alone beside the eager baseline alone, both in bfloat16.
``variants``: one replay of the CUDA graph with parts of it done otherwise, how far its tokens are from float32's, and
whether a second capture and later replays give the same bits; for one view and for four.
``preprocess``: preprocessing alone, per size, number of views and encoding, and whether its values are PIL's.
``profile``: the kernels of one replay and of one preprocessing, the heaviest first.
``kernels``: what lies between the products, one by one: PyTorch's beside Triton's, and Triton's block sizes.
``products``: the matrix products, one by one.
``float8``: the model in `compute_dtype: float8` beside bfloat16, and its products; some 20 s on an H100.
``tuned``: what `vla-perception tune` finds in `SEARCH_SECONDS` for each number of views of `variants`, before and after.

Device times are CUDA events' around work that was queued before it began, so no launch of the host is in them. What is
compared is measured in one process on one device. How captures survive others is asked by the tests with the marker gpu.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_float8
import gpu_preprocess
import gpu_tuned
import gpu_variants
import numpy as np
import torch
from torch.nn import functional

from vla_perception import __version__
from vla_perception.baseline import ReferenceModel
from vla_perception.tokenizer import VisualTokenizer
from vla_perception.tokenizer.cuda_graphs import CudaGraphs, capturing

#: A test puts others here.
DEVICE, DTYPE, ROUNDS, REPEAT = torch.device("cuda"), torch.bfloat16, 100, 40
#: (views, height, width) of `latency`.
SIZES = ((1, 480, 640), (2, 480, 640), (4, 480, 640), (1, 1080, 1920))
#: Calls of `latency` that come once in so many seconds.
PACED_ROUNDS, PERIOD_SEC = 30, 1 / 30
#: Numbers that products take in turn, more than fit in an L2 cache.
ROTATED_WEIGHTS = 60_000_000
#: Numbers of views of `variants` and `tuned`.
VARIANT_VIEWS = (1, 4)
#: Of `tuned`, for each number of views.
SEARCH_SECONDS = 40.0


def device_us(action: Callable[[], object], rounds: int | None = None) -> float:
    """Median microseconds on the device."""
    rounds = rounds or ROUNDS
    for _ in range(min(3, rounds)):
        action()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(400_000)  # the host runs ahead meanwhile
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def graph_us(action: Callable[[], object]) -> float:
    """Median microseconds of one of `REPEAT` actions in a row within a CUDA graph."""
    stream = torch.cuda.Stream(DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            action()
        stream.synchronize()
    with capturing(graph, torch.cuda.graph_pool_handle(), stream):
        for _ in range(REPEAT):
            action()
    return device_us(graph.replay, max(1, ROUNDS // 5)) / REPEAT


def random_images(views: int, height: int = 480, width: int = 640, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(views)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def load(model: str, dtype: str | None = None) -> VisualTokenizer:
    dtype = dtype or str(DTYPE).removeprefix("torch.")
    return VisualTokenizer.load(model, device=str(DEVICE), compute_dtype=dtype, runtime="graph")


class Kit:
    """The questions, the model that they are asked about, and the answers."""

    def __init__(self, model: str) -> None:
        self.answers: dict = {"versions": _versions()}
        self._model = model
        begun = time.perf_counter()
        self.tokenizer = load(model)
        loaded = time.perf_counter()
        self.tokenizer.warm_up(1)
        self.network = self.tokenizer.network
        self.weight_bytes = sum(value.nbytes for value in self.network.state_dict().values())
        self.answers["start"] = {
            "model": self.tokenizer.model,
            "load_s": loaded - begun,
            "warm_up_s": time.perf_counter() - loaded,
            "runtime": self.tokenizer.runtime,
            "runtime_fallback": self.tokenizer.runtime_fallback,
            "kernels": self.tokenizer.kernels,
        }

    # --- questions

    def latency(self) -> dict:
        found = {}
        for views, height, width in SIZES:
            batches = itertools.cycle([random_images(views, height, width, seed) for seed in range(4)])
            begun = time.perf_counter()
            self.tokenizer(next(batches))
            torch.cuda.synchronize()
            first = (time.perf_counter() - begun) * 1e3  # for which the graph is captured, unless it was warmed up for
            pixel_values = self.tokenizer.preprocess(next(batches))
            whole, whole_host = _wall_ms(lambda batches=batches: self.tokenizer(next(batches)))
            prepared, prepared_host = _wall_ms(lambda batches=batches: self.tokenizer.preprocess(next(batches)))
            encoded, encoded_host = _wall_ms(lambda pixels=pixel_values: self.tokenizer.encode(pixels))
            paced, _ = _wall_ms(lambda batches=batches: self.tokenizer(next(batches)), PACED_ROUNDS, PERIOD_SEC)
            p50, p95, p99 = np.percentile(whole, (50, 95, 99))
            found[f"{views} view(s) of {width} x {height}"] = {
                "end_to_end_ms": {"p50": p50, "p95": p95, "p99": p99},
                "end_to_end_host_ms": np.median(whole_host),
                "end_to_end_30_hz_ms": np.median(paced),
                "preprocess_alone_ms": np.median(prepared),
                "preprocess_host_ms": np.median(prepared_host),
                "encode_alone_ms": np.median(encoded),
                "encode_host_ms": np.median(encoded_host),
                "first_call_ms": first,
            }
        for size, row in found.items():
            print(
                f"{size:>24}: end to end p50 {row['end_to_end_ms']['p50']:.3f} p95 {row['end_to_end_ms']['p95']:.3f} "
                f"p99 {row['end_to_end_ms']['p99']:.3f} ms (host {row['end_to_end_host_ms']:.3f}), 30 times a second p50 "
                f"{row['end_to_end_30_hz_ms']:.3f}; alone: preprocess "
                f"{row['preprocess_alone_ms']:.3f} (host {row['preprocess_host_ms']:.3f}), encode "
                f"{row['encode_alone_ms']:.3f} (host {row['encode_host_ms']:.3f}); first call {row['first_call_ms']:.0f}"
            )
        print(
            _table(
                ["uint8 on the host → tokens", "p50", "p95", "p99", "host", "30 Hz", "preprocess", "encode"],
                [
                    [
                        size,
                        *row["end_to_end_ms"].values(),
                        row["end_to_end_host_ms"],
                        row["end_to_end_30_hz_ms"],
                        row["preprocess_alone_ms"],
                        row["encode_alone_ms"],
                    ]
                    for size, row in found.items()
                ],
            )
        )
        found["beyond_weights_mib"] = (torch.cuda.memory_reserved(DEVICE) - self.weight_bytes) / 2**20
        found["tokens_to_host_ms"] = self._tokens_to_host()
        print(
            f"memory beyond the weights {found['beyond_weights_mib']:.0f} MiB; tokens to the host, pageable and pinned: "
            f"{found['tokens_to_host_ms']}"
        )
        return found

    def baseline(self) -> dict:
        found = {}
        eager = ReferenceModel(self.tokenizer, DTYPE)
        for views in VARIANT_VIEWS:
            pixel_values = self.tokenizer.preprocess(random_images(views))
            own = wall_ms(lambda pixels=pixel_values: self.tokenizer.encode(pixels))
            plain = wall_ms(lambda pixels=pixel_values: eager.encode(pixels))
            found[f"{views} view(s)"] = row = {"ms": own, "baseline_ms": plain}
            row["ratio"] = row["baseline_ms"] / row["ms"]
            print(
                f"{views} view(s): encode {row['ms']:.3f} ms, baseline {row['baseline_ms']:.3f} ms, {row['ratio']:.2f}"
            )
        return found

    def preprocess(self) -> dict:
        sizes = dict.fromkeys((height, width) for _, height, width in SIZES)
        views = sorted({1, max(views for views, *_ in SIZES)})
        rows = gpu_preprocess.measure(DEVICE, ROUNDS, tuple(sizes), views, self.tokenizer.config.encoders)
        print(gpu_preprocess.table(rows))
        return {f"{row['views']} view(s) of {row['size']} {row['encoding']}": row for row in rows}

    def variants(self) -> dict:
        found: dict[str, dict] = {}
        plain = self._plain()
        for views in VARIANT_VIEWS:
            pixel_values = self.tokenizer.preprocess(random_images(views, seed=5))
            exact, base = plain.encode(pixel_values), None
            for label, change in gpu_variants.changes(views):
                try:
                    with change:
                        row, tokens = self._variant(pixel_values)
                    base = tokens if base is None else base
                    row |= {"relative_l2": relative(tokens, exact), "bits_of_as_it_is": torch.equal(tokens, base)}
                    print(
                        f"{views} view(s), {label:>42}: {row['replay_us']:7.1f} us, relative L2 {row['relative_l2']:.2e}, "
                        f"same bits again {row['same_bits']}, as it is {row['bits_of_as_it_is']} {row['fallback']}",
                        flush=True,
                    )
                except Exception as error:  # a variant that fails is an answer, too
                    row = {"error": _first_line(error)}
                    print(f"{views} view(s), {label:>42}: {row['error']}", flush=True)
                found[f"{views} view(s), {label}"] = row
        print(
            _table(
                ["variant", "replay, ms", "relative L2"],
                [
                    [label, row["replay_us"] / 1e3, f"{row['relative_l2']:.2e}"]
                    for label, row in found.items()
                    if "error" not in row
                ],
            )
        )
        return found

    def _variant(self, pixel_values: list[torch.Tensor]) -> tuple[dict, torch.Tensor]:
        """One replay as things are now, and its tokens."""
        runtime = CudaGraphs(self.network, DEVICE, DTYPE)
        tokens = runtime(pixel_values)[1]
        again = [CudaGraphs(self.network, DEVICE, DTYPE)(pixel_values)[1]]
        us = device_us(runtime.replay_last)
        for _ in range(min(ROUNDS, 20)):  # in a row, as no one waits for each in between
            again.append(runtime(pixel_values)[1])
        same = all(torch.equal(tokens, other) for other in again)
        return {"replay_us": us, "same_bits": same, "fallback": runtime.fallback}, tokens

    def kernels(self) -> dict:
        found = {}
        for name, encoder in self.network.encoders.items():
            rows, columns = encoder.grid
            for label, action in _kernel_actions(encoder.vit.blocks[0], rows * columns + encoder.vit.num_prefix_tokens):
                try:
                    found[f"{name} {label}"] = graph_us(action)
                except Exception as error:
                    found[f"{name} {label}"] = _first_line(error)
        _print_numbers(found, "us")
        return found

    def products(self) -> dict:
        found = {}
        shapes, most = {f"patch K={length}": (256, 1152, length) for length in (588, 592)}, max(VARIANT_VIEWS)
        for name, encoder in self.network.encoders.items():
            block, (rows, columns) = encoder.vit.blocks[0], encoder.grid
            tokens = rows * columns + encoder.vit.num_prefix_tokens
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
                linear = block.get_submodule(layer)
                shapes[f"{name} {layer}"] = (tokens, linear.out_features, linear.in_features)
                shapes[f"{name} {layer}, {most} views"] = (most * tokens, linear.out_features, linear.in_features)
        for label, layer in self.network.projector.named_children():
            shapes[f"projector {label}"] = (rows * columns, layer.out_features, layer.in_features)
        for label, (m, n, k) in shapes.items():
            weights = [torch.randn(n, k, device=DEVICE, dtype=DTYPE) for _ in range(max(2, ROTATED_WEIGHTS // (n * k)))]
            values, bias = torch.randn(m, k, device=DEVICE, dtype=DTYPE), torch.randn(n, device=DEVICE, dtype=DTYPE)
            us = graph_us(_product(values, weights, bias))
            found[label] = {"us": us, "tflop_per_s": 2 * m * n * k / us / 1e6}
        print(_table(["product", "us", "TFLOP/s"], [[label, *row.values()] for label, row in found.items()]))
        return found

    def profile(self) -> dict:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        images, found = random_images(1), {}
        pixel_values = self.tokenizer.preprocess(images)
        for label, action in (
            ("encode", lambda: self.tokenizer.encode(pixel_values)),
            ("preprocess", lambda: self.tokenizer.preprocess(images)),
            ("end to end", lambda: self.tokenizer(images)),
        ):
            with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
                for _ in range(10):
                    action()
                torch.cuda.synchronize()
            kernels = defaultdict(list)
            for event in recorded.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    kernels[event.name].append(event.time_range.elapsed_us())
            rows = [(sum(us) / 10, len(us) / 10, name[:120]) for name, us in kernels.items()]
            found[label] = sorted(rows, reverse=True)[:30]
            print(f"{label}: {sum(row[1] for row in rows):.0f} kernels, {sum(row[0] for row in rows):.0f} us of them")
            print("\n".join(f"{us:8.1f} us {count:6.1f} x {name[:90]}" for us, count, name in found[label][:18]))
        return found

    def float8(self) -> dict:
        return gpu_float8.measure(
            lambda dtype: load(self._model, dtype),
            self.tokenizer,
            self._plain().encode,
            random_images,
            device_us,
            graph_us,
            wall_ms,
        )

    def tuned(self) -> dict:
        return gpu_tuned.measure(
            lambda: load(self._model), VARIANT_VIEWS, random_images, device_us, wall_ms, SEARCH_SECONDS
        )

    # --- parts

    def _plain(self) -> ReferenceModel:
        return ReferenceModel(self.tokenizer, torch.float32, exact=True)

    def _tokens_to_host(self) -> dict[str, float]:
        tokens = self.tokenizer(random_images(1)).tokens
        pinned = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=DEVICE.type == "cuda")
        found = {}
        for label, action in (("pageable", tokens.cpu), ("pinned", lambda: pinned.copy_(tokens, non_blocking=True))):
            found[label] = round(wall_ms(action), 4)
        return found


def wall_ms(action: Callable[[], object]) -> float:
    """Median milliseconds by the host's clock until the device has finished."""
    return statistics.median(_wall_ms(action)[0])


def _wall_ms(
    action: Callable[[], object], rounds: int | None = None, period: float = 0.0
) -> tuple[list[float], list[float]]:
    """Per round milliseconds until the device has finished, and until the call has returned; it begins once in `period`."""
    whole, host = [], []
    rounds = rounds or ROUNDS
    unwarmed = min(rounds, 10)
    due = time.perf_counter()
    for index in range(rounds + unwarmed):
        torch.cuda.synchronize()
        due = max(due + period, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))
        begun = time.perf_counter()
        action()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        if index >= unwarmed:
            whole.append((time.perf_counter() - begun) * 1e3)
            host.append((queued - begun) * 1e3)
    return whole, host


def _kernel_actions(block: torch.nn.Module, tokens: int) -> Iterator[tuple[str, Callable[[], object]]]:
    from vla_perception.tokenizer import triton_kernels

    channels, heads, scale, norm = block.norm1.weight.shape[0], block.attn.num_heads, block.attn.scale, block.norm2
    values, delta = (torch.randn(1, tokens, channels, device=DEVICE, dtype=DTYPE) for _ in range(2))
    wide, gamma = torch.randn(1, tokens, block.mlp.fc1.out_features, device=DEVICE, dtype=DTYPE), delta[0, 0].clone()
    projected = torch.randn(1, tokens, 3 * channels, device=DEVICE, dtype=DTYPE)

    def normalize() -> object:
        return triton_kernels.add_layer_norm(values, delta, gamma, norm)

    def attend() -> object:
        return triton_kernels.attention(projected, heads, scale)

    yield "sum, layer norm: PyTorch", lambda: gpu_variants.add_layer_norm(values, delta, gamma, norm)
    yield "sum, layer norm: Triton", normalize
    for elements in (256, 512):
        with gpu_variants.pytorchs(ELEMENTS_PER_WARP=elements):
            yield f"sum, layer norm: Triton, {elements} elements a warp", normalize
    yield "GELU: PyTorch", lambda: functional.gelu(wide)
    yield "GELU: Triton", lambda: triton_kernels.gelu(wide)
    yield "attention: PyTorch", lambda: gpu_variants.attention(projected, heads, scale)
    yield f"attention: Triton {triton_kernels.ATTENTION_BLOCKS}", attend
    for blocks in gpu_variants.ATTENTION_BLOCKS:
        with gpu_variants.pytorchs(ATTENTION_BLOCKS=blocks):
            yield f"attention: Triton {blocks}", attend


def _product(values: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Multiplies by the next of the weights, so that none is in the L2 cache."""
    turn = itertools.cycle(weights)
    return lambda: functional.linear(values, next(turn), bias)


QUESTIONS = ("latency", "baseline", "variants", "preprocess", "profile", "products", "kernels", "float8", "tuned")


def _versions() -> dict:
    import PIL
    import timm

    found = {
        "device": torch.cuda.get_device_name(DEVICE),
        "vla_perception": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "cpus": os.cpu_count(),
    }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    print(", ".join(f"{name} {version}" for name, version in found.items()), flush=True)
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def _print_numbers(numbers: dict[str, float | str], unit: str) -> None:
    for label, number in numbers.items():
        print(f"{label:>50}: {number if isinstance(number, str) else f'{number:.2f} {unit}'}", flush=True)


def _table(titles: list[str], rows: list[list]) -> str:
    """Markdown, for docs/performance.md; numbers with two digits."""
    cells = [[value if isinstance(value, str) else f"{value:.2f}" for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *cells])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="question", help=f"of {', '.join(QUESTIONS)}; all where none")
    parser.add_argument("--model", default="openvla-7b", help="a preset or checkpoint (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write, after every question")
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="no question is begun later (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.questions) - set(QUESTIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose among {', '.join(QUESTIONS)}")
    begun = time.perf_counter()
    kit = Kit(options.model)
    print(kit.answers["start"], flush=True)
    for question in options.questions or QUESTIONS:
        elapsed = time.perf_counter() - begun
        if elapsed > options.seconds:
            print(f"== {question}: no time left", flush=True)
            continue
        print(f"== {question}, after {elapsed:.0f} s", flush=True)
        try:
            with torch.inference_mode():
                kit.answers[question] = getattr(kit, question)()
        except Exception as error:
            kit.answers[question] = {"error": _first_line(error)}
            print(f"{question}: {kit.answers[question]['error']}", file=sys.stderr, flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(kit.answers, indent=1) + "\n", encoding="utf-8")
    print(f"== done after {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
