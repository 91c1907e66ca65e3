"""The resizes of π0 and SmolVLA against results of openpi's and LeRobot's own functions (test/data/README.md)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from PIL import Image  # noqa: E402

from vla_perception.options import RESIZE_WITH_PAD  # noqa: E402
from vla_perception.tokenizer import PRESETS, VisualTokenizer  # noqa: E402
from vla_perception.tokenizer.config import HALF, EncoderConfig  # noqa: E402
from vla_perception.tokenizer.preprocess import Preprocessor, source_to_grid  # noqa: E402
from vla_perception.tokenizer.preprocess_gpu import DevicePreprocessor  # noqa: E402
from vla_perception.tokenizer.resize_with_pad import placement  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
STRIDE = 13
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def image(height: int, width: int) -> np.ndarray:
    """As make_resize_with_pad.py draws them."""
    return np.random.default_rng(height * 10007 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoder(side: int, strategy: str) -> EncoderConfig:
    return EncoderConfig("siglip", "vit_tiny_patch16_224", side, HALF, HALF, strategy, interpolation=2)


@pytest.fixture(scope="module")
def reference() -> dict[tuple[int, int, int], dict[str, np.ndarray]]:
    """(height, width, side) → way → every `STRIDE`-th row and column."""
    found: dict[tuple[int, int, int], dict[str, np.ndarray]] = {}
    for name, values in np.load(DATA / "resize_with_pad.npz").items():
        size, _, way = name.partition(".")
        height, width, side = map(int, size.replace("-", "x").split("x"))
        found.setdefault((height, width, side), {})[way] = values
    return found


@pytest.mark.parametrize("strategy", RESIZE_WITH_PAD)
def test_pixel_values_are_those_of_the_policies_own_code(reference, strategy):
    way = strategy.removeprefix("resize_with_pad_")
    assert len(reference) == 12
    if way == "lerobot_0_4":
        pytest.skip("LeRobot's own run: test_lerobot_policies.py; its padding: below")
    for (height, width, side), ways in reference.items():
        (pixels,) = Preprocessor([encoder(side, strategy)])([image(height, width)])
        found = pixels[0].numpy().transpose(1, 2, 0)[::STRIDE, ::STRIDE]
        if way == "pil":
            expected = ways[way].astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)
            np.testing.assert_array_equal(found, expected)
        elif way == "jax":  # whose own sums, in float32, are some roundings from the exact ones
            np.testing.assert_allclose(found, ways[way], rtol=0, atol=5e-7)
        else:
            np.testing.assert_array_equal(found, ways[way])


@pytest.mark.parametrize("strategy", RESIZE_WITH_PAD)
def test_the_number_of_threads_changes_nothing(strategy):
    """PyTorch's own bilinear resize takes another path in one thread."""
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(Preprocessor([encoder(224, strategy)])([image(480, 640), image(720, 405)])[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("strategy", RESIZE_WITH_PAD)
def test_on_a_device_as_on_the_host(strategy, kernels, device):
    """Several sizes at once, views of larger arrays, and an encoder beside it that squeezes images."""
    if kernels and device == "cpu":
        pytest.skip("Triton's kernels need a CUDA device; test_preprocess_kernels.py interprets them")
    encoders = [encoder(112, strategy), replace(encoder(98, "resize-naive"), name="other", interpolation=3)]
    images = [image(90, 130), image(200, 60)[::-1, ::-1], image(112, 112), image(90, 130)[:, :, ::-1], image(20, 30)]
    expected = Preprocessor(encoders)([np.ascontiguousarray(view) for view in images])
    found = DevicePreprocessor(encoders, torch.device(device), kernels=kernels)(images)
    assert torch.equal(found[1].cpu(), expected[1])
    tolerance = 0 if strategy == "resize_with_pad_pil" or device == "cpu" else 2.0**-22
    assert (found[0].cpu() - expected[0]).abs().max() <= tolerance


@pytest.mark.parametrize("strategy", RESIZE_WITH_PAD)
@pytest.mark.parametrize("height, width", [(480, 640), (640, 480), (100, 37), (7, 500), (224, 224)])
def test_the_affine_map_says_where_the_image_lies(strategy, height, width):
    """A bright image: the tokens whose middle the map puts outside of it are black, the others are not."""
    config, patch = encoder(224, strategy), 14
    (pixels,) = Preprocessor([config])([np.full((height, width, 3), 255, np.uint8)])
    a, _, c, _, e, f = source_to_grid(height, width, config, patch)
    for row in range(224 // patch):
        for column in range(224 // patch):
            y, x = (row + 0.5 - f) / e, (column + 0.5 - c) / a
            inside = 0 <= y < height and 0 <= x < width
            middle = pixels[0, :, row * patch + patch // 2, column * patch + patch // 2]
            near = min(abs(y), abs(y - height)) * e < 0.1 or min(abs(x), abs(x - width)) * a < 0.1
            black = -3.0 if strategy == "resize_with_pad_lerobot_0_4" else -1.0
            assert near or torch.all(middle == (1.0 if inside else black)), (row, column)


@pytest.mark.parametrize("height, width", [(480, 640), (100, 37), (112, 112)])
def test_lerobot_0_4_differs_in_the_padding_alone(height, width):
    """Images from 0 to 1 were padded with -1, then scaled by 2 x - 1."""
    found, expected = (
        Preprocessor([encoder(112, f"resize_with_pad_{way}")])([image(height, width)])[0]
        for way in ("lerobot_0_4", "torch")
    )
    rows, columns, top, left = placement(height, width, 112, "resize_with_pad_torch")
    inside = torch.zeros(112, 112, dtype=torch.bool)
    inside[top : top + rows, left : left + columns] = True
    assert torch.equal(found[..., inside], expected[..., inside])
    assert torch.all(found[..., ~inside] == -3.0) and torch.all(expected[..., ~inside] == -1.0)


def test_an_image_of_which_nothing_would_be_left_is_refused():
    with pytest.raises(ValueError, match="too narrow"):
        placement(1, 500, 224, "resize_with_pad_torch")
    with pytest.raises(ValueError, match="too narrow"):
        Preprocessor([encoder(224, "resize_with_pad_pil")])([image(500, 1)])


def test_the_way_is_an_image_transform_and_in_the_fingerprint():
    """Named last in `image_transforms`; naming the model's own changes nothing."""
    config = PRESETS["pi05"]
    own = config.with_options(trained=False)
    assert config.with_options(trained=False, image_transforms=["resize_with_pad_torch"]) == own
    chosen = [config.with_options(trained=False, image_transforms=[name]).settings() for name in RESIZE_WITH_PAD]
    assert len({str(settings) for settings in chosen}) == len(RESIZE_WITH_PAD)
    after = config.with_options(trained=False, image_transforms=["wrist=rotate180", "resize_with_pad_jax"])
    assert after.encoders[0].resize_strategy == "resize_with_pad_jax"
    assert dict(after.image_transforms) == {"": (), "wrist": ("rotate180",)}
    for wrong in (["resize_with_pad_jax", "rotate180"], ["wrist=resize_with_pad_pil"]):
        with pytest.raises(ValueError, match="must be the last one"):
            config.with_options(trained=False, image_transforms=wrong)
    with pytest.raises(ValueError, match="take resize_with_pad_pil"):
        PRESETS["openvla-7b"].with_options(trained=False, image_transforms=["resize_with_pad_torch"])


def test_steps_come_before_the_resize():
    tokenizer = VisualTokenizer.load(
        "tiny-random",
        encoders=["siglip"],
        projector="none",
        image_transforms=["rotate180", "resize_with_pad_pil"],
        device="cpu",
    )
    source = image(120, 200)
    (pixels,) = tokenizer.preprocess([source])
    square = Image.new("RGB", (224, 224))
    square.paste(Image.fromarray(source[::-1, ::-1]).resize((224, 134), Image.Resampling.BILINEAR), (0, 45))
    expected = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(pixels[0], (expected - 0.5) / 0.5, rtol=0, atol=1e-6)
    a, _, c, _, e, f = tokenizer.affine(120, 200)
    assert (a * 0 + c, a * 200 + c) == pytest.approx((14, 0)) and (f, e * 120 + f) == pytest.approx((179 / 16, 45 / 16))
