"""Triton's kernels give what PIL and torchvision give, bit for bit: on a GPU, and on the CPU in Triton's interpreter."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("timm")
triton = pytest.importorskip("triton", reason="this PyTorch comes without Triton")
import kernel_images  # noqa: E402
from kernel_images import VIEWS, encoder, noise, preprocessor  # noqa: E402
from preprocessing import STATISTICS, reference  # noqa: E402

from vla_perception.tokenizer import preprocess_kernels  # noqa: E402
from vla_perception.tokenizer.config import FLOAT_RESIZES  # noqa: E402
from vla_perception.tokenizer.image_layout import memory_of  # noqa: E402
from vla_perception.tokenizer.pil_taps import FILTERS  # noqa: E402
from vla_perception.tokenizer.preprocess import Preprocessor  # noqa: E402
from vla_perception.tokenizer.preprocess_gpu import DevicePreprocessor  # noqa: E402

device = kernel_images.device  # a fixture


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("size", [(48, 64), (61, 37), (28, 50), (1, 5), (33, 90)])
def test_equals_pil_bit_for_bit(device, strategy, size):
    encoders = [encoder(28, strategy, statistics, f"e{index}") for index, statistics in enumerate(STATISTICS)]
    image = noise((*size, 3), sum(size))
    for config, pixels in zip(encoders, preprocessor(encoders, device)([image])):
        assert torch.equal(pixels[0].cpu(), reference(image, config)), config.name


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size, side", [((70, 31), 32), ((20, 90), 30)])
def test_every_filter_equals_pils(device, interpolation, size, side):
    image = noise((*size, 3), interpolation)
    encoders = [encoder(side, strategy, interpolation=interpolation) for strategy in ("resize-naive", "letterbox")]
    for got, expected in zip(preprocessor(encoders, device)([image]), Preprocessor(encoders)([image])):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("size", [(48, 64), (61, 37), (5, 3), (28, 20), (28, 28)])
def test_what_is_padded_after_the_resize(device, size):
    """Beside encoders that are fed in other ways; those in float32 take no kernel of ours."""
    ways = (
        "resize_with_pad_pil",
        "letterbox",
        "resize_with_pad_torch",
        "resize_with_pad_top_left",
        "resize_with_pad_lerobot_0_4",
        "resize-naive",
    )
    encoders = [encoder(28, way, name=way, interpolation=2) for way in ways]
    images = [noise((*size, 3), 1)[:, ::-1], noise((30, 31, 3), 2), noise((*size, 3), 3)]
    for way, got, expected in zip(ways, preprocessor(encoders, device)(images), Preprocessor(encoders)(images)):
        tolerance = 2.0**-22 if way in FLOAT_RESIZES and device.type == "cuda" else 0
        assert (got.cpu() - expected).abs().max() <= tolerance, way


@pytest.mark.parametrize("name", VIEWS)
def test_images_as_they_lie_in_memory(device, name):
    image = VIEWS[name]
    image.flags.writeable = False  # as images decoded from messages are
    config = encoder(28, "letterbox", STATISTICS[0])
    (pixels,) = preprocessor([config], device)([image])
    assert torch.equal(pixels[0].cpu(), reference(np.ascontiguousarray(image), config))


def test_views_of_several_sizes_and_layouts_keep_their_order(device):
    images = [noise((20, 31, 3), 1), *VIEWS.values(), noise((20, 31, 3), 2)[:, :, ::-1]]
    encoders = [encoder(28), encoder(28, statistics=STATISTICS[1], name="e1"), encoder(14, "letterbox", name="e2")]
    if device.type == "cpu":
        images = images[::4]
    for got, expected in zip(preprocessor(encoders, device)(images), Preprocessor(encoders)(images)):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_of_the_encoders_dtype_are_the_float32_values_rounded(device, dtype):
    encoders = [encoder(28, statistics=statistics, name=f"e{index}") for index, statistics in enumerate(STATISTICS)]
    plan = preprocessor(encoders, device).plan([VIEWS["bgr8"]])
    outputs = [torch.full(shape, torch.nan, dtype=dtype, device=device) for shape in plan.outputs]
    plan.run(plan.upload([VIEWS["bgr8"]]), outputs)
    for got, expected in zip(outputs, Preprocessor(encoders)([VIEWS["bgr8"]])):
        assert torch.equal(got.cpu(), expected.to(dtype))


def test_memory_crosses_once_and_as_it_is():
    sent = {name: memory_of(image)[0].nbytes / (44 * 60) for name, image in VIEWS.items()}
    assert sent["mono8"] <= 1 and sent["bgr8"] == sent["rgb8"] == sent["planes"] == 3
    assert sent["bgra8"] == pytest.approx(4, abs=0.01) and sent["rotate180"] == pytest.approx(4, abs=0.01)
    assert sent["region"] == 3 and sent["every second pixel"] == 3 and sent["one row many times"] < 0.1
    for name in ("rgb8", "bgr8", "bgra8", "mono8", "rows padded", "rotate180", "planes", "region"):
        assert np.shares_memory(memory_of(VIEWS[name])[1], VIEWS[name]), name


def test_a_plan_is_for_the_sizes_and_layouts_that_it_was_made_for(device):
    made = preprocessor([encoder(28)], device)
    plan = made.plan([VIEWS["rgb8"], VIEWS["bgr8"]])
    assert plan is made.plan([VIEWS["rgb8"] + 1, VIEWS["bgr8"]])
    with pytest.raises(ValueError, match="is for 2 images, got 1"):
        plan.upload([VIEWS["rgb8"]])
    with pytest.raises(ValueError, match="make a plan for these images"):
        plan.upload([VIEWS["bgr8"], VIEWS["rgb8"]])


def test_an_image_whose_places_do_not_fit_into_32_bits_is_refused():
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (30_000, 30_000, 3), (90_000, 3, 1))
    with pytest.raises(ValueError, match="less than 2 GiB"):  # its memory is not touched: there is none
        DevicePreprocessor([encoder(28)], torch.device("cpu")).plan([huge])


@pytest.mark.gpu
def test_in_a_graph(device):
    """Replays read what was uploaded last, and the first replay is not the only one that is right."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    encoders = [encoder(224), encoder(224, statistics=STATISTICS[0], name="e1"), encoder(196, "letterbox", name="e2")]
    images = [[noise((480, 640, 3), 2 * seed + view)[:, :, ::-1] for view in range(2)] for seed in range(3)]
    plan = preprocessor(encoders, device).plan(images[0])
    source = plan.upload(images[0])
    outputs = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in plan.outputs]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(source, outputs)
    for pair in images:
        plan.upload(pair, into=source)
        graph.replay()
        for got, expected in zip(outputs, Preprocessor(encoders)(pair)):
            assert torch.equal(got.cpu(), expected.to(torch.bfloat16))


def test_kernels_that_do_not_compile_or_compute_otherwise_are_not_used(monkeypatch, caplog):
    def broken(*arguments):
        raise RuntimeError("Failed to find C compiler\nset the environment variable CC")

    monkeypatch.setattr(preprocess_kernels, "along_rows", broken)
    made, image = DevicePreprocessor([encoder(28)], torch.device("cpu")), VIEWS["rotate180"]
    made._use_kernels()
    assert made.fallback == "RuntimeError: Failed to find C compiler" and made.fallback in caplog.text
    assert torch.equal(made([image])[0], Preprocessor([encoder(28)])([image])[0])

    monkeypatch.setattr(preprocess_kernels, "along_rows", lambda *arguments: None)
    monkeypatch.setattr(preprocess_kernels, "along_columns", lambda *arguments: arguments[5][0].zero_())
    made._use_kernels()
    assert "values are not PIL's" in made.fallback
    assert torch.equal(made([image])[0], Preprocessor([encoder(28)])([image])[0])
