"""Preprocessing equals PIL's and torchvision's, composed as OpenVLA's processor composes them."""

import multiprocessing
import threading
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transforms = pytest.importorskip("torchvision.transforms")
pytest.importorskip("timm")
from preprocessing import SIZES, STATISTICS, reference  # noqa: E402

from vla_perception.tokenizer import preprocess as preprocess_module  # noqa: E402
from vla_perception.tokenizer.config import (  # noqa: E402
    HALF,
    EncoderConfig,
)
from vla_perception.tokenizer.preprocess import Preprocessor, source_to_grid  # noqa: E402


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("side", [224, 384])
def test_equals_pil_bit_for_bit(strategy, side):
    generator = np.random.default_rng(side)
    encoders = [
        EncoderConfig(f"e{i}", "vit_tiny_patch16_224", side, mean, std, strategy)
        for i, (mean, std) in enumerate(STATISTICS)
    ]
    preprocess = Preprocessor(encoders)
    random_sizes = [tuple(generator.integers(20, 900, 2)) for _ in range(6)]
    for height, width in SIZES + random_sizes:
        if strategy == "resize-crop" and max(height, width) > 9 * min(height, width):
            continue
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for config, pixels in zip(encoders, preprocess([image])):
            expected = reference(image, config)
            assert torch.equal(pixels[0], expected), (height, width, config.name)


def test_several_views_of_different_sizes_and_layouts():
    generator = np.random.default_rng(1)
    config = EncoderConfig("siglip", "vit_tiny_patch16_224", 224, HALF, HALF)
    big = generator.integers(0, 256, (700, 900, 3), dtype=np.uint8)
    bgra = generator.integers(0, 256, (90, 120, 4), dtype=np.uint8)
    images = [big[::2, ::3], big[:, :, ::-1], np.asfortranarray(big), big[5:99, 3:, ::-1], bgra[:, :, 2::-1]]
    (pixels,) = Preprocessor([config])(images)
    assert pixels.shape == (5, 3, 224, 224)
    for got, image in zip(pixels, images):
        assert torch.equal(got, reference(np.ascontiguousarray(image), config))


@pytest.mark.parametrize("strategy, why", [("resize-crop", "too narrow"), ("letterbox", "too long")])
@pytest.mark.parametrize("size", [(1, 65_500), (65_500, 1), (2, 20_000)])
@pytest.mark.parametrize("side", [98, 4096])
def test_strips_are_refused_before_they_fill_the_memory(strategy, why, size, side):
    """Scaled to their short side, or padded to a square, they would be gigabytes."""
    config = EncoderConfig("siglip", "vit_tiny_patch16_224", side, HALF, HALF, strategy)
    strip = np.broadcast_to(np.zeros(3, np.uint8), (*size, 3))
    for refused in (lambda: source_to_grid(*size, config, 14), lambda: Preprocessor([config])([strip])):
        with pytest.raises(ValueError, match=why):
            refused()


@pytest.fixture
def two_sizes():
    """Encoders that share no resize, and two images for them: four resizes."""
    encoders = [EncoderConfig(f"e{side}", "vit_tiny_patch16_224", side, HALF, HALF) for side in (196, 224)]
    return encoders, list(np.random.default_rng(2).integers(0, 256, (2, 90, 120, 3), dtype=np.uint8))


@pytest.mark.parametrize("allowed", [1, 2])
def test_no_more_threads_than_torch_has_and_none_left_behind(two_sizes, monkeypatch, allowed):
    encoders, images = two_sizes
    monkeypatch.setattr(torch, "get_num_threads", lambda: allowed)  # what OMP_NUM_THREADS and limit_threads decide
    resize, ran = preprocess_module.resize, set()

    def observed(image, config):
        ran.add(threading.current_thread())
        return resize(image, config)

    monkeypatch.setattr(preprocess_module, "resize", observed)
    preprocess, before = Preprocessor(encoders), threading.enumerate()
    for config, pixels in zip(encoders, preprocess(images)):
        assert torch.equal(pixels, torch.stack([reference(image, config) for image in images]))
    assert threading.enumerate() == before
    assert len(ran) <= allowed and (allowed > 1 or ran == {threading.current_thread()})


def test_a_frame_set_starts_no_thread(two_sizes, monkeypatch):
    """One that gets no memory while it starts is waited for without end."""
    encoders, images = two_sizes
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    preprocess, started = Preprocessor(encoders), []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    preprocess(images)
    assert not started


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # which is what DataLoader does on Linux
@pytest.mark.parametrize("in_float, views", [(False, 2), (True, 1), (True, 2)])
def test_a_forked_process_preprocesses_as_well(two_sizes, monkeypatch, in_float, views):
    encoders, images = two_sizes
    if in_float:  # by PyTorch, whose operations on images of this size are parallel
        encoders = [replace(encoders[-1], resize_strategy="resize_with_pad_torch")]
        images = [image.repeat(8, axis=0).repeat(8, axis=1) for image in images[:views]]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    preprocess = Preprocessor(encoders)
    expected = preprocess(images)

    def child():  # NumPy compares: torch's own threads did not come along, and DataLoader's workers have none
        for pixels, values in zip(preprocess(images), expected):
            np.testing.assert_array_equal(pixels.numpy(), values.numpy())

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    assert code == 0, "it hangs" if code is None else "see above"


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((4, 4), np.uint8), "height, width, 3"),
        (np.zeros((4, 4, 4), np.uint8), "height, width, 3"),
        (np.zeros((0, 4, 3), np.uint8), "height, width, 3"),
        ([[0]], "uint8 NumPy array"),
    ],
)
def test_bad_images_are_refused_with_advice(image, words):
    config = EncoderConfig("siglip", "vit_tiny_patch16_224", 224, HALF, HALF)
    with pytest.raises(ValueError, match=words):
        Preprocessor([config])([image])
    with pytest.raises(ValueError, match="at least one"):
        Preprocessor([config])([])


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("height, width", [(480, 640), (640, 300), (224, 224)])
def test_affine_map_finds_a_bright_spot(strategy, height, width):
    """A white square in the source appears in the patch that the map names."""
    config = EncoderConfig("siglip", "vit_tiny_patch16_224", 224, HALF, HALF, strategy)
    y, x = height // 2 + 41, width // 2 - 57
    image = np.zeros((height, width, 3), np.uint8)
    image[y - 4 : y + 5, x - 4 : x + 5] = 255
    (pixels,) = Preprocessor([config])([image])
    if strategy == "letterbox":  # the padding is grey, which is brighter than black but darker than the spot
        assert pixels.max() > 0
    row, column = np.unravel_index(int(pixels[0].sum(0).argmax()), (224, 224))
    a, b, c, d, e, f = source_to_grid(height, width, config, 16)
    u, v = a * (x + 0.5) + b * (y + 0.5) + c, d * (x + 0.5) + e * (y + 0.5) + f
    # The brightest pixel lies somewhere within the square: up to 5 source pixels, 3.5 pixels of the input, away.
    assert abs(u - (column + 0.5) / 16) < 0.3
    assert abs(v - (row + 0.5) / 16) < 0.3
