"""The preprocessing that runs on a device gives what PIL and torchvision give, bit for bit; here on the CPU."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("timm")
from PIL import Image  # noqa: E402
from preprocessing import SIZES, STATISTICS, reference  # noqa: E402

from vla_perception.tokenizer import preprocess_gpu as device_preprocess  # noqa: E402
from vla_perception.tokenizer.config import HALF, EncoderConfig  # noqa: E402
from vla_perception.tokenizer.pil_taps import FILTERS  # noqa: E402
from vla_perception.tokenizer.preprocess import Preprocessor  # noqa: E402
from vla_perception.tokenizer.preprocess_gpu import DevicePreprocessor  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


def encoder(side=224, strategy="resize-naive", interpolation=3, statistics=(HALF, HALF), name="siglip"):
    return EncoderConfig(name, "vit_tiny_patch16_224", side, *statistics, strategy, interpolation=interpolation)


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("side", [224, 384])
def test_equals_pil_bit_for_bit(device, strategy, side):
    generator = np.random.default_rng(side)
    encoders = [encoder(side, strategy, statistics=statistics, name=f"e{i}") for i, statistics in enumerate(STATISTICS)]
    preprocess = DevicePreprocessor(encoders, device)
    for height, width in SIZES + [(500, 240), *(tuple(generator.integers(20, 900, 2)) for _ in range(6))]:
        if strategy == "resize-crop" and max(height, width) > 9 * min(height, width):
            continue
        # Noise of two levels overshoots 0 and 255, which PIL clips after each pass.
        levels = [0, 255] if height % 2 else np.arange(256)
        image = generator.choice(np.array(levels, np.uint8), (height, width, 3))
        for config, pixels in zip(encoders, preprocess([image])):
            assert torch.equal(pixels[0].cpu(), reference(image, config)), (height, width, config.name)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("height, width", [(480, 640), (100, 37), (1080, 1920), (224, 500), (700, 300)])
def test_every_filter_equals_pils(device, interpolation, height, width):
    image = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    config = encoder(interpolation=interpolation)
    planes = torch.from_numpy(image).to(device).permute(2, 0, 1)[None]
    resized = DevicePreprocessor([config], device).resize(planes, config)[0].permute(1, 2, 0)
    expected = Image.fromarray(image).resize((224, 224), Image.Resampling(interpolation))
    np.testing.assert_array_equal(resized.cpu().numpy(), np.asarray(expected))


def test_a_large_image_is_resized_in_parts(device, monkeypatch):
    monkeypatch.setattr(device_preprocess, "_MAX_PRODUCTS", 1 << 18)
    image = np.random.default_rng(3).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    config = encoder()
    (pixels,) = DevicePreprocessor([config], device)([image])
    assert torch.equal(pixels[0].cpu(), reference(image, config))


def test_views_of_several_sizes_and_layouts_keep_their_order(device):
    big = np.random.default_rng(1).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    big.setflags(write=False)  # as images decoded from a message are
    images = [big[::2, ::3], big[:, :, ::-1], np.asfortranarray(big), big[5:355, 7:307]]
    encoders = [encoder(), encoder(196, "letterbox", statistics=STATISTICS[0], name="dinov2")]
    for got, expected in zip(DevicePreprocessor(encoders, device)(images), Preprocessor(encoders)(images)):
        assert torch.equal(got.cpu(), expected)


def test_views_of_bgr_images(device):
    images = np.random.default_rng(4).integers(0, 256, (2, 90, 120, 4), dtype=np.uint8)
    images = [images[0, :, :, 2::-1], np.ascontiguousarray(images[1, :, :, :3])[:, :, ::-1]]
    config = encoder()
    (pixels,) = DevicePreprocessor([config], device)(images)
    for got, image in zip(pixels.cpu(), images):
        assert torch.equal(got, reference(np.ascontiguousarray(image), config))


@pytest.mark.parametrize("make", [Preprocessor, lambda encoders: DevicePreprocessor(encoders, torch.device("cpu"))])
def test_a_pillow_that_resizes_otherwise_is_refused(monkeypatch, make):
    monkeypatch.setattr("PIL.__version__", "12.9.9")
    make([encoder()])
    monkeypatch.setattr("PIL.__version__", "13.0.0")
    with pytest.raises(ImportError, match=r"Pillow 13\.0\.0 .* pip install 'pillow<13'"):
        make([encoder()])


def test_bad_images_are_refused_with_advice():
    preprocess = DevicePreprocessor([encoder()], torch.device("cpu"))
    with pytest.raises(ValueError, match="uint8"):
        preprocess([np.zeros((4, 4, 3), np.float32)])
    with pytest.raises(ValueError, match="at least one"):
        preprocess([])
