"""Image transforms against TensorFlow's results (test/data/make_image_transforms.py), and MiniVLA's crop against torch's."""

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("timm")
from preprocessing import IMAGES  # noqa: E402

from vla_perception.tokenizer.image_transforms import ImageTransforms, parse_step  # noqa: E402


@pytest.fixture(scope="module")
def reference():
    return np.load(Path(__file__).parents[1] / "data" / "image_transforms.npz")


def run(step: str, image: np.ndarray) -> np.ndarray:
    return parse_step(step).run(image)


def test_every_image_of_the_reference_is_compared(reference):
    assert {name.split(".")[0] for name in reference if "." in name} == set(IMAGES)


@pytest.mark.parametrize("name", IMAGES)
def test_jpeg_round_trip_is_tensorflows(reference, name):
    np.testing.assert_array_equal(run("jpeg", reference[f"{name}.input"]), reference[f"{name}.jpeg"])


@pytest.mark.parametrize("name", IMAGES)
def test_lanczos3_is_tensorflows(reference, name):
    expected = reference[f"{name}.lanczos3"]
    resized = run(f"lanczos3:{len(expected)}", reference[f"{name}.jpeg"])
    assert resized.shape == expected.shape and resized.dtype == np.uint8
    # float32 sums whose last bit differs between CPUs: a value on the border between two levels may fall on either side
    off = np.abs(resized.astype(int) - expected)
    assert off.max() <= 1 and (off > 0).mean() <= 2e-4


@pytest.mark.parametrize("name", IMAGES)
def test_center_crop_is_tensorflows(reference, name):
    expected = reference[f"{name}.center_crop"]
    cropped = run(f"center_crop_tf:{len(expected)}", reference[f"{name}.lanczos3"])
    np.testing.assert_array_equal(cropped, expected)


@pytest.mark.parametrize("name", ["coffee", "noise"])
def test_center_crop_of_images_that_are_not_square(reference, name):
    expected = reference[f"{name}.center_crop_of_input"]
    np.testing.assert_array_equal(run(f"center_crop_tf:{len(expected)}", reference[f"{name}.input"]), expected)


def test_whole_chain_of_openvlas_libero_evaluation(reference):
    """On the image as the simulator renders it, upside down."""
    steps = ("rotate180", "jpeg", "lanczos3:224", "center_crop_tf:224")
    rendered = reference["astronaut.input"][::-1, ::-1]
    prepared = ImageTransforms({"": steps}).image(rendered).astype(int)
    off = np.abs(prepared - reference["astronaut.center_crop"])
    assert off.max() <= 1 and (off > 0).mean() <= 2e-4


@pytest.mark.parametrize("shape", [(224, 224), (97, 61), (256, 256), (33, 480)])
def test_center_crop_of_minivla(shape):
    """90 % of the area in whole pixels, in integers here; then bilinear, in float64 here and in PIL's fixed point there."""
    image = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)
    kept = [math.isqrt(9 * length * length // 10) for length in shape]
    first = [(length - part) // 2 for length, part in zip(shape, kept)]
    crop = image[first[0] : first[0] + kept[0], first[1] : first[1] + kept[1]]
    pixels = torch.from_numpy(crop.astype(np.float64)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(pixels, shape, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    result = run("center_crop_pil", image)
    assert result.shape == image.shape
    # PIL rounds after either pass: half a level each
    assert np.abs(result - expected.numpy()).max() <= 1.01


def test_the_two_center_crops_are_not_the_same():
    image = np.random.default_rng(3).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    difference = np.abs(run("center_crop_tf:224", image).astype(int) - run("center_crop_pil", image))
    assert difference.max() > 10
