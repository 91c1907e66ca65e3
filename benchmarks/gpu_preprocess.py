"""How long preprocessing takes on a GPU, per size, number of views and encoding, and whether its values are PIL's.

    python benchmarks/gpu_preprocess.py --json gpu_preprocess.json

`plan`: the whole way, from images in the host's memory to bfloat16 values of both encoders of openvla-7b, waited for.
`upload`: its first part, to the bytes on the device. `kernels`: its second part as a CUDA graph, as it runs in the tokenizer's
graph; `rows` and `columns` are its two kernels. `torch`: the whole way without Triton. Every image of a round is another one.
`libero` is what OpenVLA's evaluation on LIBERO does to two images before that; there the JPEG round trip on the host is part
of `plan`, and `torch` has all of it on the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from vla_perception.tokenizer import PRESETS, EncoderConfig
from vla_perception.tokenizer.image_transforms import ImageTransforms, Step
from vla_perception.tokenizer.preprocess import Preprocessor
from vla_perception.tokenizer.preprocess_gpu import DevicePreprocessor, PreprocessPlan

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rgb8": lambda image: np.ascontiguousarray(image[:, :, :3]),
    "bgr8": lambda image: np.ascontiguousarray(image[:, :, :3])[:, :, ::-1],
    "bgra8": lambda image: image[:, :, 2::-1],
    "mono8": lambda image: np.broadcast_to(image[:, :, 0].copy()[:, :, None], (*image.shape[:2], 3)),
    "rotate180": lambda image: np.ascontiguousarray(image[:, :, :3])[::-1, ::-1],
}
SIZES = ((480, 640), (1080, 1920))
LIBERO = ("rotate180", "jpeg:95", "lanczos3:224", "center_crop_tf:224")
LIBERO_SIZES = ((256, 256), (480, 640))
#: Different images, so that what is measured does not lie in a cache.
ROTATION = 4


def measure(
    device: torch.device,
    rounds: int = 50,
    sizes: Sequence[tuple[int, int]] = SIZES,
    views: Sequence[int] = (1, 4),
    encoders: Sequence[EncoderConfig] = PRESETS["openvla-7b"].encoders,
) -> list[dict]:
    """One row per size, number of views and encoding; times are medians in microseconds."""
    preprocessor, reference = DevicePreprocessor(encoders, device), Preprocessor(encoders)
    in_torch = DevicePreprocessor(encoders, device, kernels=False)
    generator = np.random.default_rng(0)
    rows = []
    for height, width in sizes:
        pool = [generator.integers(0, 256, (height, width, 4), dtype=np.uint8) for _ in range(ROTATION)]
        for count in views:
            for name, layout in LAYOUTS.items():
                sets = [[layout(pool[(first + view) % ROTATION]) for view in range(count)] for first in range(ROTATION)]
                row = {"size": f"{width}x{height}", "views": count, "encoding": name}
                row["fallback"] = preprocessor.fallback
                plan = preprocessor.plan(sets[0])
                expected = [values.bfloat16() for values in reference(sets[1])]
                row["equal"] = _equal(plan, sets[1], expected)
                row["plan_us"] = _wall(lambda images: _whole(preprocessor, images), sets, rounds)
                row["upload_us"] = _wall(plan.upload, sets, rounds)
                if name == "rgb8":
                    row["torch_us"] = _wall(lambda images: _whole(in_torch, images), sets, max(3, rounds // 4))
                    row["torch_equal"] = _equal(in_torch.plan(sets[1]), sets[1], expected)
                if device.type == "cuda" and not preprocessor.fallback:
                    row.update(_kernels(plan, sets[0], rounds))
                rows.append(row)
    return rows + [measure_libero(preprocessor, reference, size, rounds) for size in LIBERO_SIZES]


def measure_libero(
    preprocessor: DevicePreprocessor, reference: Preprocessor, size: tuple[int, int], rounds: int
) -> dict[str, object]:
    """The same row for two images of (height, width) that are transformed as in OpenVLA's evaluation on LIBERO."""
    transforms, cameras = ImageTransforms({"": LIBERO}), ["front", "wrist"]
    generator = np.random.default_rng(1)
    # Coarse noise: fine noise takes JPEG several times as long as what cameras see.
    coarse = generator.integers(0, 256, (ROTATION, 2, size[0] // 16, size[1] // 16, 3), dtype=np.uint8)
    sets = [list(pair.repeat(16, 1).repeat(16, 2)) for pair in coarse]

    def on_device(images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        return _whole(preprocessor, *transforms.images_on_host(images, cameras))

    def on_host(images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        return _whole(preprocessor, transforms.images(images, cameras))

    row = {"size": f"{size[1]}x{size[0]}", "views": 2, "encoding": "libero", "fallback": preprocessor.fallback}
    expected = [values.bfloat16() for values in reference(transforms.images(sets[1], cameras))]
    way = on_device if preprocessor.does_steps else on_host
    row["equal"] = all(torch.equal(got.cpu(), wanted) for got, wanted in zip(way(sets[1]), expected))
    row["plan_us"], row["torch_us"] = _wall(way, sets, rounds), _wall(on_host, sets, max(3, rounds // 4))
    if preprocessor.does_steps and preprocessor.device.type == "cuda":
        begun, steps = transforms.images_on_host(sets[0], cameras)
        plan = preprocessor.plan(begun, steps)
        source = plan.upload(begun)
        outputs = _outputs(plan, source.device)
        row["kernels_us"] = _graph(lambda: plan.run(source, outputs), rounds)
    return row


def _outputs(plan: PreprocessPlan, device: torch.device) -> list[torch.Tensor]:
    return [torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device) for shape in plan.outputs]


def _whole(
    preprocessor: DevicePreprocessor, images: Sequence[np.ndarray], steps: Sequence[tuple[Step, ...]] | None = None
) -> list[torch.Tensor]:
    plan = preprocessor.plan(images, steps)
    outputs = [torch.empty(shape, dtype=torch.bfloat16, device=preprocessor.device) for shape in plan.outputs]
    plan.run(plan.upload(images), outputs)
    return outputs


def _equal(plan: PreprocessPlan, images: Sequence[np.ndarray], expected: Sequence[torch.Tensor]) -> bool:
    source = plan.upload(images)
    outputs = _outputs(plan, source.device)
    plan.run(source, outputs)
    return all(torch.equal(got.cpu(), wanted) for got, wanted in zip(outputs, expected))


def _wall(call: Callable[[Sequence[np.ndarray]], object], sets: Sequence[Sequence[np.ndarray]], rounds: int) -> float:
    """Median of microseconds from the call until the device has finished."""
    times = []
    for index in range(rounds + 5):
        begun = time.perf_counter()
        call(sets[index % len(sets)])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return round(statistics.median(times[5:]) * 1e6, 1)


def _kernels(plan: PreprocessPlan, images: Sequence[np.ndarray], rounds: int) -> dict[str, float]:
    """Microseconds on the device: the plan's kernels as a graph, and each of the two alone, 20 in a row."""
    from vla_perception.tokenizer import preprocess_kernels

    source = plan.upload(images)
    outputs = _outputs(plan, source.device)
    calls: dict[str, list] = {"along_rows": [], "along_columns": []}
    real = {name: getattr(preprocess_kernels, name) for name in calls}
    try:
        for name in calls:

            def recorded(*arguments, name=name):
                calls[name].append(arguments)
                return real[name](*arguments)

            setattr(preprocess_kernels, name, recorded)
        plan.run(source, outputs)
    finally:
        for name, function in real.items():
            setattr(preprocess_kernels, name, function)
    result = {"kernels_us": _graph(lambda: plan.run(source, outputs), rounds)}
    for name, arguments in calls.items():
        result[f"{name}_us"] = _graph(lambda name=name, a=arguments: [real[name](*each) for each in a], rounds)
    return result


def _graph(call: Callable[[], object], rounds: int, repeats: int = 20) -> float:
    """Median microseconds of `call` within a graph that holds it `repeats` times."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    times = []
    for _ in range(max(3, rounds // 5)):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended) * 1e3 / repeats)
    return round(statistics.median(times), 2)


COLUMNS = (
    "size",
    "views",
    "encoding",
    "equal",
    "plan_us",
    "upload_us",
    "kernels_us",
    "along_rows_us",
    "along_columns_us",
    "torch_us",
)


def table(rows: Sequence[dict]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(str(row.get(column, '')) for column in COLUMNS)} |" for row in rows]
    fallbacks = {row["fallback"] for row in rows if row["fallback"]}
    return "\n".join([*lines, *(f"without Triton's kernels: {reason}" for reason in sorted(fallbacks))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with torch.inference_mode():
        rows = measure(device, arguments.rounds)
    print(table(rows))
    if arguments.json:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        arguments.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
