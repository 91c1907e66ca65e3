"""``vla-perception bench``: how fast a model encodes here, beside the baseline (baseline.py), in one run."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from vla_perception import __version__
from vla_perception.baseline import LOWEST_COSINES, TOLERANCES, Mark, ReferenceModel, distance
from vla_perception.startup import Progress
from vla_perception.tokenizer import VisualTokenizer
from vla_perception.tokenizer.devices import TORCH_DTYPES
from vla_perception.tokenizer.network import empty_network
from vla_perception.tokenizer.runtime import PackedLinear, limit_threads

#: Height and width of the images.
SIZE = (480, 640)
PERCENTILES = (50, 95, 99)
_IMAGES = 16
_MIN_ROUNDS, _MAX_ROUNDS = 5, 1000
_PREPROCESS_ROUNDS = 50
_COMPARED_ROUNDS = 2

if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _packed_linear_flops(values_shape, weight_shape, *_, **__) -> int:
        """For `FlopCounterMode`, which does not know the operation."""
        return 2 * math.prod(values_shape) * weight_shape[0]


class OptimizedModel:
    """The tokenizer with its runtime, split by stage where the runtime runs stage by stage."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        self._tokenizer = tokenizer
        self._mark: Mark | None = None
        self.preprocess = tokenizer.preprocess
        if tokenizer.runtime in ("eager", "onednn"):
            for name, encoder in tokenizer.network.encoders.items():
                encoder.register_forward_hook(lambda *_, name=name: self._mark and self._mark(name))
            tokenizer.network.projector.register_forward_hook(lambda *_: self._mark and self._mark("project"))

    def encode(self, pixel_values: Sequence[torch.Tensor], mark: Mark | None = None) -> torch.Tensor:
        """→ tokens [views, tokens, channels]."""
        self._mark = mark
        return self._tokenizer.encode(pixel_values).tokens

    def whole(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 RGB images → tokens [views, tokens, channels], in one call."""
        self._mark = None
        return self._tokenizer(images).tokens


class _Clock:
    """Times on the device's own clock: CUDA events there, the processor's counter here."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._marks: list[tuple[str, Any]] = []  # seconds, or a torch.cuda.Event

    def start(self) -> None:
        self.synchronize()
        self._marks = []
        self.mark("")

    def mark(self, stage: str) -> None:
        """`stage` ends here."""
        now: Any = time.perf_counter()
        if self._cuda is not None:
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._cuda))
        self._marks.append((stage, now))

    def synchronize(self) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)

    def milliseconds(self, first: str, last: str) -> float:
        """From the end of the stage `first` to the end of the stage `last`; the device must have got there."""
        at = dict(self._marks)
        if self._cuda is not None:
            return at[first].elapsed_time(at[last])
        return (at[last] - at[first]) * 1e3

    def stages(self) -> dict[str, float]:
        names = [name for name, _ in self._marks]
        return {last: self.milliseconds(first, last) for first, last in zip(names, names[1:])}


def run(
    model: str,
    *,
    device: str = "auto",
    compute_dtype: str = "auto",
    runtime: str = "auto",
    views: Sequence[int] = (1,),
    baseline: bool = False,
    seconds: float = 30.0,
    json_file: Path | None = None,
) -> dict:
    """Measures, prints a report, writes `json_file`; returns what is written there.

    Args:
        device, compute_dtype: as `VisualTokenizer.load` takes them; the report has what ``auto`` came to.
        seconds: for each number of views.

    Raises:
        ValueError: the model cannot be loaded, or its tokens or pixel values are not those of the baseline.
    """
    limit_threads()
    progress = Progress()
    progress(f"loading {model}", begins=True)
    begun = time.perf_counter()
    tokenizer = VisualTokenizer.load(model, device=device, compute_dtype=compute_dtype, runtime=runtime)
    loading = time.perf_counter() - begun
    baseline_model, exact = _references(tokenizer, model)
    begun = time.perf_counter()
    for number in views:
        progress(f"warming up for {number} view(s)", begins=True)
        tokenizer.warm_up(number)
    report = _about(tokenizer) | {"load_s": loading, "warm_up_s": time.perf_counter() - begun}
    progress.clear()
    _print_about(report)
    bench = _Bench(tokenizer, OptimizedModel(tokenizer), baseline_model, exact, progress)
    by_views = {}
    for number in views:
        result = bench.measure(number, baseline, seconds)
        progress.clear()
        _print(result, number)
        by_views[str(number)] = result
    report |= {"views": views[0]} | by_views[str(views[0])] | {"by_views": by_views}
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    for views_, result in by_views.items():
        _check(result, views_, tokenizer.compute_dtype)
    return report


def _references(tokenizer: VisualTokenizer, model: str) -> tuple[ReferenceModel, ReferenceModel]:
    """The baseline in the tokenizer's dtype, and in float32."""
    compute_dtype = tokenizer.compute_dtype
    reference = tokenizer
    if compute_dtype == "float8":  # which has given up the weights that it is compared with
        reference = VisualTokenizer.load(model, device=str(tokenizer.device), compute_dtype="bfloat16", runtime="eager")
    baseline = ReferenceModel(reference, TORCH_DTYPES[compute_dtype])
    # On a CPU in float32 the baseline is what is compared with: its weights need not be there twice.
    as_it_is = compute_dtype == "float32" and tokenizer.device.type == "cpu"
    return baseline, baseline if as_it_is else ReferenceModel(reference, torch.float32, exact=True)


def _about(tokenizer: VisualTokenizer) -> dict:
    """What does not depend on the number of views."""
    return {
        "model": tokenizer.model,
        "weights": tokenizer.weights,
        "compute_dtype": tokenizer.compute_dtype,
        "runtime": tokenizer.runtime,
        "runtime_fallback": tokenizer.runtime_fallback,
        "kernels": tokenizer.kernels,
        "device": _device_name(tokenizer.device),
        "versions": {
            "vla_perception": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if tokenizer.device.type == "cuda" else None,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
            "numpy": np.__version__,
        },
        "image_size": list(SIZE),
    }


def _check(result: dict, views: str, compute_dtype: str) -> None:
    """ValueError if tokens or pixel values are not those of the baseline."""
    if not result["agreement"]["within_tolerance"]:
        raise ValueError(
            f"the tokens of {views} view(s) are not those of the baseline in float32: relative L2 "
            f"{result['agreement']['relative_l2']:.1e} where {compute_dtype} allows {TOLERANCES[compute_dtype]:g}, "
            f"lowest cosine of a token {result['agreement']['cosine']:.5f}"
        )
    if not result["preprocess"].get("identical", True):
        raise ValueError(f"the pixel values of {views} view(s) are not those of PIL and torchvision")


class _Bench:
    """Measures a tokenizer beside the baseline.

    Args:
        optimized: the tokenizer, split by stage.
        baseline: in the tokenizer's dtype.
        exact: the baseline in float32.
    """

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        optimized: OptimizedModel,
        baseline: ReferenceModel,
        exact: ReferenceModel,
        progress: Progress,
    ) -> None:
        self._tokenizer = tokenizer
        self._optimized, self._baseline, self._exact = optimized, baseline, exact
        self._progress = progress
        self._clock = _Clock(tokenizer.device)
        self._dtype = TORCH_DTYPES[tokenizer.compute_dtype]

    def measure(self, views: int, baseline: bool, seconds: float) -> dict:
        """What the report has under this number of views."""
        tokenizer, optimized = self._tokenizer, self._optimized
        self._progress(f"{views} view(s): measuring the machine", begins=True)
        rates = _rates(tokenizer.device, self._dtype)
        random = np.random.default_rng()
        images = [random.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(_IMAGES)]

        def batch(index: int) -> list[np.ndarray]:
            return [images[(index * views + view) % _IMAGES] for view in range(views)]

        self._progress(f"{views} view(s): comparing with the baseline in float32", begins=True)
        result: dict = {"agreement": _agreement(tokenizer, optimized, self._baseline, self._exact, batch)}
        contenders: dict[str, OptimizedModel | ReferenceModel] = {"optimized": optimized}
        if baseline:
            contenders["baseline"] = self._baseline
        self._progress(f"{views} view(s): preprocessing", begins=True)
        result["preprocess"] = _preprocessing(contenders, self._clock, batch)
        times = self._stages(contenders, batch, views, seconds)
        result["rounds"] = len(times["optimized"])
        result["stages_ms"] = _percentiles(times["optimized"])
        # What else runs on the machine can only slow a measurement of the chip down: the better of two is closer.
        rates = {name: max(rate, rates[name]) for name, rate in _rates(tokenizer.device, self._dtype).items()}
        result |= _floor(tokenizer, views, rates, result["stages_ms"]["encode_and_project"]["p50"])
        if baseline:
            result["baseline_stages_ms"] = _percentiles(times["baseline"])
            pairs = list(zip(times["baseline"], times["optimized"]))
            ratios = {
                stage: float(np.median([slow[stage] / fast[stage] for slow, fast in pairs]))
                for stage in times["optimized"][0]
            }
            result["stage_ratios"] = ratios
            result["ratio_to_baseline"] = ratios["encode_and_project"]
            result["end_to_end_ratio"] = ratios["end_to_end"]
        return result

    def _stages(
        self,
        contenders: Mapping[str, OptimizedModel | ReferenceModel],
        batch: Callable[[int], list[np.ndarray]],
        views: int,
        seconds: float,
    ) -> dict[str, list[dict[str, float]]]:
        """Milliseconds of every stage in every round, of each contender."""
        times: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        deadline = time.perf_counter() + seconds
        rounds = 0
        while rounds < _MIN_ROUNDS or (time.perf_counter() < deadline and rounds < _MAX_ROUNDS):
            # Who comes first changes with every round, so that neither has the warmer caches.
            for name in sorted(contenders, reverse=bool(rounds % 2)):
                times[name].append(self._round(contenders[name], batch(rounds)))
            rounds += 1
            # Between rounds, so that it is in none.
            left = max(0.0, deadline - time.perf_counter())
            self._progress(f"{views} view(s): {rounds} rounds, {left:.0f} s to go")
        return times

    def _round(self, contender: OptimizedModel | ReferenceModel, images: list[np.ndarray]) -> dict[str, float]:
        clock = self._clock
        clock.start()
        begun = time.perf_counter()
        pixel_values = contender.preprocess(images)
        clock.mark("preprocess")
        tokens = contender.encode(pixel_values, clock.mark)
        clock.mark("tokens")
        clock.synchronize()
        ended = time.perf_counter()
        del tokens
        if isinstance(contender, OptimizedModel):  # in one call, which may do more in one than stage by stage
            begun = time.perf_counter()
            tokens = contender.whole(images)
            clock.synchronize()
            ended = time.perf_counter()
            del tokens
        stages = clock.stages()
        stages.pop("tokens")
        whole = {"encode_and_project": clock.milliseconds("preprocess", "tokens")}
        return stages | whole | {"end_to_end": (ended - begun) * 1e3}


def _floor(tokenizer: VisualTokenizer, views: int, rates: Mapping[str, float], median_ms: float) -> dict:
    """The least time that the machine could take, and the share of it in the time that encoding took."""
    flops, weight_bytes = _work(tokenizer, views)
    arithmetic, reading = flops / rates["flop_per_s"] * 1e3, weight_bytes / rates["bytes_per_s"] * 1e3
    return {
        "rates": rates,
        "flop": flops,
        "weight_bytes": weight_bytes,
        "floor_arithmetic_ms": arithmetic,
        "floor_weights_ms": reading,
        "floor_ms": max(arithmetic, reading),
        "share_of_floor": max(arithmetic, reading) / median_ms,
    }


def _agreement(
    tokenizer: VisualTokenizer,
    optimized: OptimizedModel,
    baseline: ReferenceModel,
    exact: ReferenceModel,
    batch: Callable[[int], list[np.ndarray]],
) -> dict:
    """How far tokens are from those of the baseline in float32, over some batches."""
    found, own, expected = [], [], []
    for index in range(_COMPARED_ROUNDS):
        pixel_values = baseline.preprocess(batch(index))
        found.append(optimized.encode(optimized.preprocess(batch(index))).double().cpu())
        expected.append(exact.encode(pixel_values).double().cpu())
        if exact is not baseline:
            own.append(baseline.encode(pixel_values).double().cpu())
    difference, cosine = distance(torch.cat(found), torch.cat(expected))
    # Anything but a number is a disagreement.
    result = {
        "relative_l2": difference,
        "cosine": cosine,
        "within_tolerance": difference < TOLERANCES[tokenizer.compute_dtype]
        and cosine >= LOWEST_COSINES.get(tokenizer.compute_dtype, -1.0),
    }
    if own:
        result["baseline_relative_l2"], result["baseline_cosine"] = distance(torch.cat(own), torch.cat(expected))
    return result


def _preprocessing(contenders: dict, clock: _Clock, batch: Callable[[int], list[np.ndarray]]) -> dict:
    """Preprocessing alone: nothing else is in the caches then, as it is beside a GPU that encodes."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    identical = True
    for index in range(_PREPROCESS_ROUNDS):
        outputs = {}
        for name in sorted(contenders, reverse=bool(index % 2)):
            clock.start()
            outputs[name] = contenders[name].preprocess(batch(index))
            clock.mark("preprocess")
            clock.synchronize()
            times[name].append(clock.milliseconds("", "preprocess"))
        if "baseline" in outputs:
            pairs = zip(outputs["optimized"], outputs["baseline"], strict=True)
            identical = identical and all(torch.equal(own, expected) for own, expected in pairs)
    result: dict = {"ms": _percentiles([{"": value} for value in times["optimized"]])[""]}
    if "baseline" in contenders:
        result["baseline_ms"] = _percentiles([{"": value} for value in times["baseline"]])[""]
        result["ratio_to_baseline"] = float(np.median(np.array(times["baseline"]) / np.array(times["optimized"])))
        result["identical"] = identical
    return result


def _percentiles(times: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        stage: {f"p{q}": float(np.percentile([entry[stage] for entry in times], q)) for q in PERCENTILES}
        for stage in times[0]
    }


def _work(tokenizer: VisualTokenizer, views: int) -> tuple[int, int]:
    """Floating point operations for one batch, and bytes of all weights."""
    network = empty_network(tokenizer.config)
    size = torch.empty(0, dtype=TORCH_DTYPES[tokenizer.compute_dtype]).element_size()
    weight_bytes = size * sum(weight.numel() for weight in network.state_dict().values())
    if tokenizer.compute_dtype == "float8":  # of several sizes
        weight_bytes = sum(weight.nbytes for weight in tokenizer.network.state_dict().values())
    inputs = [
        torch.empty(views, 3, encoder.image_size, encoder.image_size, device="meta")
        for encoder in tokenizer.config.encoders
    ]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(inputs)
    return counter.get_total_flops(), weight_bytes


@torch.inference_mode()
def _rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The best that large products and large copies reach here, in operations and bytes per second."""
    cuda = device.type == "cuda"
    side, length = (8192, 1 << 30) if cuda else (2048, 1 << 28)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    products = [lambda: torch.mm(left, right)]
    if not cuda and torch.backends.mkldnn.is_available():
        linear = torch.nn.Linear(side, side, bias=False)
        linear.weight = torch.nn.Parameter(right, requires_grad=False)
        packed = PackedLinear(linear)
        products.append(lambda: packed(left))
    source, target = (torch.zeros(length, dtype=torch.uint8, device=device) for _ in range(2))
    clock = _Clock(device)

    def best(action: Callable[[], object]) -> float:
        times = []
        for _ in range(20 if cuda else 10):
            clock.start()
            action()
            clock.mark("end")
            clock.synchronize()
            times.append(clock.milliseconds("", "end") / 1e3)
        return min(times)

    product, copy = min(best(product) for product in products), best(lambda: target.copy_(source))
    return {"flop_per_s": 2 * side**3 / product, "bytes_per_s": 2 * length / copy}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _print_about(report: dict) -> None:
    print(
        f"{report['model']} ({report['weights']} weights), {report['compute_dtype']}, runtime {report['runtime']}, "
        f"kernels {report['kernels']}"
    )
    if report["runtime_fallback"]:
        print(f"  instead of what was asked for: {report['runtime_fallback']}")
    print(report["device"] + "; " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(f"loading {report['load_s']:.1f} s, warm-up {report['warm_up_s']:.1f} s")


def _print(result: dict, views: int) -> None:
    rates = result["rates"]
    baseline: dict = result.get("baseline_stages_ms", {})
    print(f"\n{views} view(s) of {SIZE[1]} × {SIZE[0]}, {result['rounds']} rounds, milliseconds\n")
    columns = [f"p{q}" for q in PERCENTILES]
    header = columns + ([f"baseline {column}" for column in columns] + ["ratio"] if baseline else [])
    print("| | " + " | ".join(header) + " |")
    print("| --- " * (1 + len(header)) + "|")
    alone = result["preprocess"]
    rows = [
        (stage, values, baseline.get(stage, {}), result.get("stage_ratios", {}).get(stage))
        for stage, values in result["stages_ms"].items()
    ]
    rows.append(("preprocess alone", alone["ms"], alone.get("baseline_ms", {}), alone.get("ratio_to_baseline")))
    for stage, values, slow, ratio in rows:
        cells = [f"{values[column]:.2f}" for column in columns]
        if baseline:
            cells += [f"{slow[column]:.2f}" for column in columns] + [f"{ratio:.2f}"]
        print(f"| {stage.replace('_', ' ')} | " + " | ".join(cells) + " |")
    print()
    if baseline:
        print(
            f"ratio to the baseline: {result['ratio_to_baseline']:.3f} (encode and project), "
            f"{result['end_to_end_ratio']:.3f} (end to end); medians of the rounds' ratios"
        )
        print(f"pixel values identical to PIL's and torchvision's: {'yes' if alone['identical'] else 'NO'}")
    print(
        f"floor {result['floor_ms']:.2f} ms: {result['flop'] / 1e9:.0f} GFLOP at "
        f"{rates['flop_per_s'] / 1e12:.3g} TFLOP/s take {result['floor_arithmetic_ms']:.2f}, "
        f"{result['weight_bytes'] / 1e9:.2f} GB of weights at {rates['bytes_per_s'] / 1e9:.0f} GB/s take "
        f"{result['floor_weights_ms']:.2f}; floor / p50 of encode and project: {result['share_of_floor']:.0%}"
    )
    agreement = result["agreement"]
    print(
        f"agreement with the baseline in float32: relative L2 {agreement['relative_l2']:.1e}, "
        f"lowest cosine of a token {agreement['cosine']:.7f}"
        + ("" if agreement["within_tolerance"] else "; THIS IS TOO FAR")
    )
    if "baseline_relative_l2" in agreement:
        distance, cosine = agreement["baseline_relative_l2"], agreement["baseline_cosine"]
        print(f"  of the baseline in the same dtype: {distance:.1e}, {cosine:.7f}")
