"""What people have as images: each kind gives the array that it was made of, or an error that says what to do."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from PIL import Image  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokenizer.image_inputs import as_images, check_image  # noqa: E402

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(IMAGE)


@pytest.mark.parametrize(
    "images, count",
    [
        (IMAGE, 1),
        ([IMAGE], 1),
        (np.stack([IMAGE, IMAGE]), 2),
        (TENSOR, 1),
        (TENSOR.permute(2, 0, 1), 1),
        (torch.stack([TENSOR, TENSOR]), 2),
        (torch.stack([TENSOR, TENSOR]).permute(0, 3, 1, 2), 2),
        (TENSOR.permute(2, 0, 1)[:, :3].contiguous(), 1),
        (Image.fromarray(IMAGE), 1),
        ((Image.fromarray(IMAGE), IMAGE, TENSOR.permute(2, 0, 1)), 3),
    ],
)
def test_every_kind_is_the_array_that_it_was_made_of(images, count):
    found = as_images(images)
    assert len(found) == count
    for image in found:
        expected = IMAGE[: image.shape[0]]
        np.testing.assert_array_equal(check_image(image), expected)


def test_a_tensor_of_three_rows_has_its_channels_at_the_end():
    (found,) = as_images(TENSOR[:3])
    np.testing.assert_array_equal(found, IMAGE[:3])


def test_files_and_pillows_modes(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(IMAGE).save(path)
    for given in (path, str(path), [path], [str(path), IMAGE]):
        for image in as_images(given):
            np.testing.assert_array_equal(image, IMAGE)
    alpha = Image.fromarray(np.dstack([IMAGE, IMAGE[..., :1]]), "RGBA")
    np.testing.assert_array_equal(as_images(alpha)[0], IMAGE)
    grey = Image.fromarray(IMAGE[..., 0])
    np.testing.assert_array_equal(as_images(grey)[0], IMAGE[..., :1].repeat(3, 2))
    deep = tmp_path / "deep.png"
    Image.fromarray(IMAGE[..., 0].astype(np.uint16) * 257).save(deep)
    with pytest.raises(ValueError, match="deep.png: an image of Pillow's mode I;16 has values beyond 0–255"):
        as_images(deep)
    with pytest.raises(FileNotFoundError):
        as_images(tmp_path / "absent.png")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(OSError, match="truncated"):
        as_images(path)


@pytest.mark.parametrize(
    "images, words",
    [
        (
            TENSOR.permute(2, 0, 1) / 255,
            r"must be uint8 \(0–255\), got float32: .*\(image \* 255\).round\(\).to\(torch",
        ),
        (IMAGE / 255, r"got float64: .* If it holds 0 to 1, \(image \* 255\).round\(\).astype\(np.uint8\) makes it"),
        (IMAGE.transpose(2, 0, 1), r"got \[3, 20, 30\]; image.transpose\(1, 2, 0\) brings the channels to the end"),
        (
            torch.zeros(4, 20, 30, dtype=torch.uint8),
            r"\[3, height, width\] or \[height, width, 3\] \(RGB\), got \[4, 20",
        ),
        (TENSOR[..., 0], r"got \[20, 30\]"),
        ([7], "an image cannot be a int; pass a uint8 array"),
        (7, "int holds no images; pass one, or a list of them"),
        ({"front": IMAGE}, "dict holds no images"),
    ],
)
def test_anything_else_is_answered_with_what_to_do(images, words):
    with pytest.raises(ValueError, match=words):
        for image in as_images(images):
            check_image(image)


@pytest.fixture(scope="module")
def tokenizer():
    return VisualTokenizer.load("tiny-random", image_size=[28, 32], device="cpu", runtime="eager")


def test_a_tokenizer_takes_them(tokenizer):
    expected = tokenizer([IMAGE, IMAGE]).tokens
    for images in (torch.stack([TENSOR, TENSOR]).permute(0, 3, 1, 2), [Image.fromarray(IMAGE), IMAGE]):
        assert torch.equal(tokenizer(images).tokens, expected)
        assert torch.equal(tokenizer.encode(tokenizer.preprocess(images)).tokens, expected)
    with pytest.raises(ValueError, match="2 images need as many cameras"):
        tokenizer(torch.stack([TENSOR, TENSOR]), cameras=["front"])


def test_a_head_can_be_trained_on_the_tokens(tokenizer):
    for output in (tokenizer(IMAGE, features=True), tokenizer.encode(tokenizer.preprocess(IMAGE), features=True)):
        for values in (output.tokens, output.features):
            head = torch.nn.Linear(values.shape[-1], 1)
            head(values).square().mean().backward()
            assert head.weight.grad.abs().sum() > 0 and not values.requires_grad
    with torch.inference_mode():  # who asks for inference tensors gets them, without a copy
        assert tokenizer(IMAGE).tokens.is_inference()
