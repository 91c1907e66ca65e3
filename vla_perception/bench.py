"""``vla-perception bench``: how fast a model encodes here, beside the baseline, in one run.

The baseline is what OpenVLA's own code does: PIL and torchvision prepare the image once for every encoder, both
timm towers run with all their blocks, one after the other, operation by operation, and the projector follows. It has
the same weights and gets the same images. The towers' last blocks, whose results nobody uses, are in no tokenizer:
the baseline's get random weights.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from torchvision.transforms import functional as transforms

from vla_perception import __version__
from vla_perception.startup import Progress
from vla_perception.tokenizer import VisualTokenizer
from vla_perception.tokenizer.config import EncoderConfig
from vla_perception.tokenizer.devices import TORCH_DTYPES
from vla_perception.tokenizer.fused_blocks import patches_as_products
from vla_perception.tokenizer.network import empty_network
from vla_perception.tokenizer.preprocess import letterbox_padding
from vla_perception.tokenizer.projector import Projector
from vla_perception.tokenizer.runtime import PackedLinear, limit_threads
from vla_perception.tokenizer.weights import random_weight

#: Relative L2 distance of tokens from the baseline in float32 that rounding accounts for (docs/performance.md).
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "float8": 1.4e-1}
#: The lowest cosine of a token with its own in float32, where that has a bound, too.
LOWEST_COSINES = {"float8": 0.99}
#: Height and width of the images.
SIZE = (480, 640)
PERCENTILES = (50, 95, 99)
_IMAGES = 16
_MIN_ROUNDS, _MAX_ROUNDS = 5, 1000
_PREPROCESS_ROUNDS = 50
_COMPARED_ROUNDS = 2

Mark = Callable[[str], None]

if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _packed_linear_flops(values_shape, weight_shape, *_, **__) -> int:
        """For `FlopCounterMode`, which does not know the operation."""
        return 2 * math.prod(values_shape) * weight_shape[0]


class ReferenceModel:
    """The baseline, with the weights of `tokenizer`, which must not have run yet: running may repack them.

    Args:
        exact: keep cuDNN from computing float32 convolutions in TF32, as it does unless told otherwise.
    """

    def __init__(self, tokenizer: VisualTokenizer, dtype: torch.dtype, exact: bool = False) -> None:
        config, network = tokenizer.config, tokenizer.network
        self._device, self._dtype = tokenizer.device, dtype
        self._encoders = config.encoders
        with torch.device("meta"):
            self._projector = Projector(config.projector, tokenizer.feature_channels, config.output_channels)
        self._projector.load_state_dict(self._cast(network.projector.state_dict()), assign=True)
        self._towers = []
        for encoder, own in zip(config.encoders, network.encoders.values()):
            name = encoder.timm_id.split(".")[0]
            with torch.device("meta"):
                tower = timm.create_model(
                    name, pretrained=False, num_classes=0, img_size=encoder.image_size, **encoder.overrides
                ).eval()
            weights = own.vit.state_dict()
            for missing in tower.state_dict().keys() - weights.keys():
                weights[missing] = random_weight(missing, tuple(tower.state_dict()[missing].shape), seed=1)
            tower.load_state_dict(self._cast(weights), assign=True)
            if exact:
                patches_as_products(tower)
            self._towers.append(tower)

    def preprocess(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """``PrismaticImageProcessor`` of openvla → per encoder float32 [views, 3, side, side] on the device."""
        pixel_values: list[list[torch.Tensor]] = [[] for _ in self._encoders]
        for image in map(Image.fromarray, images):
            for config, values in zip(self._encoders, pixel_values):
                values.append(_torchvision_pixels(image, config))
        return [torch.stack(values).to(self._device) for values in pixel_values]

    @torch.inference_mode()
    def encode(self, pixel_values: Sequence[torch.Tensor], mark: Mark = lambda stage: None) -> torch.Tensor:
        """→ tokens [views, tokens, channels]; calls `mark` with the name of each stage as it ends."""
        parts = []
        for config, tower, pixels in zip(self._encoders, self._towers, pixel_values):
            wanted = len(tower.blocks) - 2
            parts += tower.get_intermediate_layers(pixels.to(self._device, self._dtype), n={wanted})
            mark(config.name)
        tokens = self._projector(torch.cat(parts, dim=2))
        mark("project")
        return tokens

    def _cast(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self._device, self._dtype) for name, value in weights.items()}


class OptimizedModel:
    """The tokenizer with its runtime, told apart by stage where the runtime runs stage by stage."""

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
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        self.synchronize()
        self._marks = []
        self.mark("")

    def mark(self, stage: str) -> None:
        """`stage` ends here."""
        now: float | torch.cuda.Event = time.perf_counter()
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
    compute_dtype = tokenizer.compute_dtype
    reference = tokenizer
    if compute_dtype == "float8":  # which has given up the weights that it is compared with
        reference = VisualTokenizer.load(model, device=str(tokenizer.device), compute_dtype="bfloat16", runtime="eager")
    plain = ReferenceModel(reference, TORCH_DTYPES[compute_dtype])
    # On a CPU in float32 the baseline is what is compared with: its weights need not be there twice.
    as_it_is = compute_dtype == "float32" and tokenizer.device.type == "cpu"
    exact = plain if as_it_is else ReferenceModel(reference, torch.float32, exact=True)
    del reference
    begun = time.perf_counter()
    for number in views:
        progress(f"warming up for {number} view(s)", begins=True)
        tokenizer.warm_up(number)
    warm_up = time.perf_counter() - begun
    tuned = OptimizedModel(tokenizer)
    report = {
        "model": tokenizer.model,
        "weights": tokenizer.weights,
        "compute_dtype": compute_dtype,
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
        "load_s": loading,
        "warm_up_s": warm_up,
    }
    progress.clear()
    print(f"{report['model']} ({report['weights']} weights), {compute_dtype}, runtime {report['runtime']}")
    if report["runtime_fallback"]:
        print(f"  instead of what was asked for: {report['runtime_fallback']}")
    print(report["device"] + "; " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(f"loading {loading:.1f} s, warm-up {warm_up:.1f} s")
    by_views = {}
    for number in views:
        result = _measure(tokenizer, tuned, plain, exact, number, baseline, seconds, progress)
        progress.clear()
        _print(result, number)
        by_views[str(number)] = result
    report |= {"views": views[0]} | by_views[str(views[0])] | {"by_views": by_views}
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    for number, result in by_views.items():
        if not result["agreement"]["within_tolerance"]:
            raise ValueError(
                f"the tokens of {number} view(s) are not those of the baseline in float32: relative L2 "
                f"{result['agreement']['relative_l2']:.1e} where {compute_dtype} allows {TOLERANCES[compute_dtype]:g}, "
                f"lowest cosine of a token {result['agreement']['cosine']:.5f}"
            )
        if not result["preprocess"].get("identical", True):
            raise ValueError(f"the pixel values of {number} view(s) are not those of PIL and torchvision")
    return report


def _measure(
    tokenizer: VisualTokenizer,
    tuned: OptimizedModel,
    plain: ReferenceModel,
    exact: ReferenceModel,
    views: int,
    baseline: bool,
    seconds: float,
    progress: Progress,
) -> dict:
    progress(f"{views} view(s): measuring the machine", begins=True)
    dtype = TORCH_DTYPES[tokenizer.compute_dtype]
    rates = _rates(tokenizer.device, dtype)
    random = np.random.default_rng()
    images = [random.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(_IMAGES)]

    def batch(index: int) -> list[np.ndarray]:
        return [images[(index * views + view) % _IMAGES] for view in range(views)]

    clock = _Clock(tokenizer.device)
    progress(f"{views} view(s): comparing with the baseline in float32", begins=True)
    result: dict = {"agreement": _agreement(tokenizer, tuned, plain, exact, batch)}
    contenders = {"tuned": tuned, "plain": plain} if baseline else {"tuned": tuned}
    progress(f"{views} view(s): preprocessing", begins=True)
    result["preprocess"] = _preprocessing(contenders, clock, batch)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < _MIN_ROUNDS or (time.perf_counter() < deadline and rounds < _MAX_ROUNDS):
        # Who comes first changes with every round, so that neither has the warmer caches.
        for name in sorted(contenders, reverse=bool(rounds % 2)):
            contender, given = contenders[name], batch(rounds)
            clock.start()
            begun = time.perf_counter()
            pixel_values = contender.preprocess(given)
            clock.mark("preprocess")
            tokens = contender.encode(pixel_values, clock.mark)
            clock.mark("tokens")
            clock.synchronize()
            ended = time.perf_counter()
            del tokens
            if contender is tuned:  # in one call, which may do more in one than stage by stage
                begun = time.perf_counter()
                tokens = tuned.whole(given)
                clock.synchronize()
                ended = time.perf_counter()
                del tokens
            stages = clock.stages()
            stages.pop("tokens")
            whole = {"encode_and_project": clock.milliseconds("preprocess", "tokens")}
            times[name].append(stages | whole | {"end_to_end": (ended - begun) * 1e3})
        rounds += 1
        # Between rounds, so that it is in none.
        progress(f"{views} view(s): {rounds} rounds, {max(0.0, deadline - time.perf_counter()):.0f} s to go")
    result["rounds"] = rounds
    result["stages_ms"] = _percentiles(times["tuned"])
    # What else runs on the machine can only slow a measurement of the chip down: the better of two is closer.
    rates = {name: max(rate, rates[name]) for name, rate in _rates(tokenizer.device, dtype).items()}
    flops, weight_bytes = _work(tokenizer, views)
    arithmetic, reading = flops / rates["flop_per_s"] * 1e3, weight_bytes / rates["bytes_per_s"] * 1e3
    result |= {
        "rates": rates,
        "flop": flops,
        "weight_bytes": weight_bytes,
        "floor_arithmetic_ms": arithmetic,
        "floor_weights_ms": reading,
        "floor_ms": max(arithmetic, reading),
        "share_of_floor": max(arithmetic, reading) / result["stages_ms"]["encode_and_project"]["p50"],
    }
    if baseline:
        result["baseline_stages_ms"] = _percentiles(times["plain"])
        ratios = {
            stage: float(np.median([slow[stage] / fast[stage] for slow, fast in zip(times["plain"], times["tuned"])]))
            for stage in times["tuned"][0]
        }
        result["stage_ratios"] = ratios
        result["ratio_to_baseline"] = ratios["encode_and_project"]
        result["end_to_end_ratio"] = ratios["end_to_end"]
    return result


def _agreement(
    tokenizer: VisualTokenizer,
    tuned: OptimizedModel,
    plain: ReferenceModel,
    exact: ReferenceModel,
    batch: Callable[[int], list[np.ndarray]],
) -> dict:
    """How far tokens are from those of the baseline in float32, over some batches."""
    found, own, expected = [], [], []
    for index in range(_COMPARED_ROUNDS):
        pixel_values = plain.preprocess(batch(index))
        found.append(tuned.encode(tuned.preprocess(batch(index))).double().cpu())
        expected.append(exact.encode(pixel_values).double().cpu())
        if exact is not plain:
            own.append(plain.encode(pixel_values).double().cpu())
    difference, cosine = _distance(torch.cat(found), torch.cat(expected))
    # Anything but a number is a disagreement.
    result = {
        "relative_l2": difference,
        "cosine": cosine,
        "within_tolerance": difference < TOLERANCES[tokenizer.compute_dtype]
        and cosine >= LOWEST_COSINES.get(tokenizer.compute_dtype, -1.0),
    }
    if own:
        result["baseline_relative_l2"], result["baseline_cosine"] = _distance(torch.cat(own), torch.cat(expected))
    return result


def _distance(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Relative L2 over everything, and the lowest cosine of any token."""
    cosines = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    return float((found - expected).norm() / expected.norm()), float(cosines.min())


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
        if "plain" in outputs:
            pairs = zip(outputs["tuned"], outputs["plain"], strict=True)
            identical = identical and all(torch.equal(tuned, plain) for tuned, plain in pairs)
    result: dict = {"ms": _percentiles([{"": value} for value in times["tuned"]])[""]}
    if "plain" in contenders:
        result["baseline_ms"] = _percentiles([{"": value} for value in times["plain"]])[""]
        result["ratio_to_baseline"] = float(np.median(np.array(times["plain"]) / np.array(times["tuned"])))
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


def _torchvision_pixels(image: Image.Image, config: EncoderConfig) -> torch.Tensor:
    side = config.image_size
    if config.resize_strategy == "letterbox":
        top, left = letterbox_padding(image.height, image.width)
        image = transforms.pad(image, [left, top, left, top], fill=config.fill)
    target = [side, side] if config.resize_strategy == "resize-naive" else side
    image = transforms.resize(image, target, interpolation=config.interpolation, antialias=True)
    image = transforms.center_crop(image, [side, side])
    return transforms.normalize(transforms.to_tensor(image), config.mean, config.std)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _print(result: dict, views: int) -> None:
    rates = result["rates"]
    baseline = result.get("baseline_stages_ms")
    print(f"\n{views} view(s) of {SIZE[1]} × {SIZE[0]}, {result['rounds']} rounds, milliseconds\n")
    columns = [f"p{q}" for q in PERCENTILES]
    header = columns + ([f"plain {column}" for column in columns] + ["ratio"] if baseline else [])
    print("| | " + " | ".join(header) + " |")
    print("| --- " * (1 + len(header)) + "|")
    rows = [
        (stage, values, baseline and baseline[stage], baseline and result["stage_ratios"][stage])
        for stage, values in result["stages_ms"].items()
    ]
    alone = result["preprocess"]
    rows.append(("preprocess alone", alone["ms"], alone.get("baseline_ms"), alone.get("ratio_to_baseline")))
    for stage, values, plain, ratio in rows:
        cells = [f"{values[column]:.2f}" for column in columns]
        if baseline:
            cells += [f"{plain[column]:.2f}" for column in columns] + [f"{ratio:.2f}"]
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
