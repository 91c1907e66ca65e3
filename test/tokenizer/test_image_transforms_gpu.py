"""Image transforms as Triton kernels have the host's bits: on a GPU, and on the CPU in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("timm")
triton = pytest.importorskip("triton", reason="this PyTorch comes without Triton")
import kernel_images  # noqa: E402
from kernel_images import VIEWS, encoder, noise, preprocessor  # noqa: E402
from preprocessing import IMAGES  # noqa: E402

from vla_perception.tokenizer import image_transform_kernels as kernels  # noqa: E402
from vla_perception.tokenizer import image_transforms as transforms_module  # noqa: E402
from vla_perception.tokenizer.image_transforms import ImageTransforms, parse_step  # noqa: E402
from vla_perception.tokenizer.preprocess import Preprocessor  # noqa: E402
from vla_perception.tokenizer.preprocess_gpu import DevicePreprocessor  # noqa: E402

device = kernel_images.device  # a fixture

REAL = {name: getattr(kernels, name) for name in ("_lanczos3_down", "_lanczos3_across", "_center_crop")}


@pytest.fixture(autouse=True)
def interpreted(device, monkeypatch):
    if device.type == "cpu":
        from triton.runtime.interpreter import InterpretedFunction

        for name, kernel in REAL.items():
            monkeypatch.setattr(kernels, name, InterpretedFunction(kernel.fn))
        monkeypatch.setattr(kernels, "BLOCK", (64, 64))


@pytest.fixture(scope="module")
def tensorflow():
    return np.load(Path(__file__).parents[1] / "data" / "image_transforms.npz")


def run(device, image, *texts):
    plan = preprocessor([encoder(28)], device).plan([image], [tuple(parse_step(text) for text in texts)])
    (prepared,) = plan.prepare(plan.upload([image]))
    return prepared[0].cpu().numpy()


@pytest.mark.parametrize("name", IMAGES)
def test_tensorflows_images(device, tensorflow, name):
    """Lanczos-3 has the host's bits, which are TensorFlow's but for 2e-4 of the values; the crop has TensorFlow's."""
    image, resized = tensorflow[f"{name}.jpeg"], tensorflow[f"{name}.lanczos3"]
    step = f"lanczos3:{len(resized)}"
    np.testing.assert_array_equal(run(device, image, step), parse_step(step).run(image))
    cropped = run(device, resized, f"center_crop_tf:{len(resized)}")
    np.testing.assert_array_equal(cropped, tensorflow[f"{name}.center_crop"])


@pytest.mark.parametrize("texts", [("lanczos3:37",), ("center_crop_tf:50",), ("lanczos3:40", "center_crop_tf:24")])
@pytest.mark.parametrize("name", ["bgr8", "bgra8", "mono8", "rotate180", "rows padded", "region", "every second pixel"])
def test_images_as_they_lie_in_memory(device, name, texts):
    expected = VIEWS[name]
    for text in texts:
        expected = parse_step(text).run(expected)
    np.testing.assert_array_equal(run(device, VIEWS[name], *texts), expected)


def test_many_images_of_noise(device):
    """A product fused with its sum would show in one value of some ten thousand."""
    if device.type == "cpu":
        pytest.skip("the interpreter fuses nothing")
    for seed in range(20):
        height, width = np.random.default_rng(seed).integers(200, 900, 2)
        image = noise((height, width, 3), 2 * seed + 1)
        for text in ("lanczos3:224", "center_crop_tf:224"):
            np.testing.assert_array_equal(run(device, image, text), parse_step(text).run(image))


def test_pixel_values_of_views_that_are_transformed_differently(device):
    transforms = ImageTransforms(
        {"": ("rotate180", "jpeg:90", "lanczos3:28", "center_crop_tf:28"), "wrist": (), "side": ("lanczos3:20",)}
    )
    images = [noise((40, 52, 3), 1), VIEWS["bgr8"], VIEWS["rgb8"], noise((40, 52, 3), 3)]
    cameras = ["front", "side", "wrist", "back"]
    encoders = [encoder(28), encoder(28, "letterbox", name="e1")]
    made = preprocessor(encoders, device)
    assert made.does_steps
    begun, steps = transforms.images_on_host(images, cameras)
    assert [tuple(step.name for step in chain) for chain in steps] == [
        ("lanczos3", "center_crop_tf"),
        ("lanczos3",),
        (),
        ("lanczos3", "center_crop_tf"),
    ]
    for got, expected in zip(made(begun, steps), Preprocessor(encoders)(transforms.images(images, cameras))):
        assert torch.equal(got.cpu(), expected)


def test_what_the_host_has_to_do_before_and_after():
    transforms = ImageTransforms({"": ("lanczos3:28", "jpeg", "rotate180", "center_crop_tf:20", "lanczos3:16")})
    image = noise((40, 52, 3), 1)
    (begun,), (left,) = transforms.images_on_host([image], [None])
    assert [step.text for step in left] == ["center_crop_tf:20", "lanczos3:16"]
    for step in left:
        begun = step.run(begun)
    np.testing.assert_array_equal(begun, transforms.image(image))
    with pytest.raises(ValueError, match="at least 2 × 2"):
        ImageTransforms({"": ("center_crop_tf:20",)}).images_on_host([image[:1]], [None])


def test_side_by_side_as_one_by_one():
    transforms = ImageTransforms({"": ("jpeg", "center_crop_pil")})
    images = [noise((48, 60 + view, 3), view) for view in range(4)]
    for got, image in zip(transforms.images(images, [None] * 4), images):
        np.testing.assert_array_equal(got, transforms.image(image))


def test_kernels_that_fail_leave_the_steps_to_the_host(device, monkeypatch, caplog):
    made = preprocessor([encoder(28)], device)
    monkeypatch.setattr(kernels, "center_crop", lambda *arguments: torch.zeros(1, 24, 24, 3, dtype=torch.uint8))
    assert not made.does_steps and "values are not TensorFlow's" in caplog.text
    assert not DevicePreprocessor([encoder(28)], torch.device("cpu")).does_steps


def test_a_tokenizer_transforms_on_the_gpu(device, monkeypatch):
    from vla_perception.tokenizer import VisualTokenizer

    chain = ["rotate180", "front=jpeg", "lanczos3:32", "center_crop_tf:28"]
    made = [
        VisualTokenizer.from_preset(
            "tiny-random", device=name, compute_dtype="float32", image_size=[28, 32], image_transforms=chain
        )
        for name in (device.type, "cpu")
    ]
    if device.type == "cpu":
        made[0]._preprocessor = preprocessor(made[0].config.encoders, device)
    assert made[0]._preprocessor.does_steps and not hasattr(made[1]._preprocessor, "does_steps")
    for function in ("resize_lanczos3", "crop_and_resize"):  # the host's
        monkeypatch.setattr(transforms_module, function, None)
    images, cameras = [noise((40, 56, 3), seed) for seed in (1, 3)], ["front", "wrist"]
    with pytest.raises(TypeError):
        made[1].preprocess(images, cameras)
    prepared = made[0].preprocess(images, cameras)
    monkeypatch.undo()
    for got, expected in zip(prepared, made[1].preprocess(images, cameras)):
        assert torch.equal(got.cpu(), expected)


#: Compiles the kernels for a Hopper GPU, which need not be there, and prints their code.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vla_perception.tokenizer import preprocess_kernels
from vla_perception.tokenizer import image_transform_kernels as kernels

kinds = {"source": "*u8", "views": "*i64", "first": "*i32", "weights": "*fp32", "between": "*fp32", "output": "*u8"}
kinds |= {name: "*i32" for name in ("left", "right", "top", "bottom")} | {"across": "*fp32", "down": "*fp32"}
constants = {"ROWS": 4, "COLUMNS": 32, "STEP": 4, "VIEW": 5, "BOTH": True}
integers = kinds | {"weights": "*i32", "between": "*u8", "left": "i32", "top": "i32"}
integers |= {name: "*bf16" for name in ("table0", "table1", "output0", "output1")}
for kernel, kinds, options in (
    (preprocess_kernels._along_rows, integers, {}),
    (preprocess_kernels._along_columns, integers, {}),
    (kernels._lanczos3_down, kinds, kernels._EXACT),
    (kernels._lanczos3_across, kinds, kernels._EXACT),
    (kernels._center_crop, kinds, kernels._EXACT),
):
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs={name: constants[name] for name in constants if name in signature})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, **options})
    assert compiled.asm["cubin"]
    print(compiled.asm["ptx"], end="END OF KERNEL")
"""


def test_kernels_compile_and_fuse_no_product_with_a_sum():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    kernels = done.stdout.split("END OF KERNEL")[2:5]
    assert len(kernels) == 3
    for code in kernels:
        assert "mul.rn.f32" in code and "add.rn.f32" in code and "fma" not in code
