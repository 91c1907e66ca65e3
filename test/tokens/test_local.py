"""Tokens computed in the policy's own process, and the way from a pixel to its token through the tokenizer itself."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from fake_tokenizer import make_tokens
from ros_harness import ROOT

from vla_perception.tokens import (
    FingerprintMismatchError,
    LocalTokenizer,
    TokenFormatError,
    View,
    VisualTokens,
    tokenize,
)

OTHER = "cd" * 32


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("timm")
    from vla_perception.tokenizer import VisualTokenizer

    return VisualTokenizer.from_preset("tiny-random")


def test_in_process_tokens_are_what_the_node_would_publish(tokenizer):
    import torch

    random = np.random.default_rng(0)
    front, wrist = (random.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(2))
    tokens = tokenize(tokenizer, {"front": front, "wrist": wrist}, stamp_ns=5, token_dtype="bfloat16", features=True)
    assert tokens.cameras == ("front", "wrist") and tokens.dtype == "bfloat16" and tokens.stamp_ns == 5
    expected = tokenizer([front, wrist], features=True)
    assert torch.equal(tokens.torch(), expected.tokens.to(torch.bfloat16))
    assert tokens.encoder("siglip").shape == (2, 196, 384)
    read = VisualTokens.from_bytes(tokens.to_bytes())
    assert read.views == tokens.views and read.fingerprint == tokenizer.fingerprint


def test_a_policy_loop_runs_on_local_tokens(tokenizer):
    images = iter(np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), dtype=np.uint8))
    calls = []
    source = LocalTokenizer(tokenizer, lambda: {"front": next(images)}, history=2, callback=calls.append)
    first, second, third = source.wait(1.0), source.wait(1.0), source.request()
    assert [t.sequence for t in (first, second, third)] == [0, 1, 2] == [t.sequence for t in calls]
    assert source.latest is third and source.history == (second, third)
    assert not np.array_equal(first.data, second.data)
    assert source.latest_within(60.0) is third
    with pytest.raises(FingerprintMismatchError):
        LocalTokenizer(tokenizer, expect_fingerprint=OTHER).encode({"front": next(images)})


def code_on_the_page(words: str) -> str:
    """The one program of docs/policy.md that has these words in it."""
    page = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if words in code)
    return code


def test_local_tokens_on_the_page(tokenizer, monkeypatch):
    monkeypatch.setattr("vla_perception.tokenizer.VisualTokenizer.load", lambda _model, **_options: tokenizer)
    camera = SimpleNamespace(read=lambda: np.zeros((48, 64, 3), np.uint8))
    exec(code_on_the_page("LocalTokenizer"), namespace := {"camera": camera})
    assert namespace["tokens"].cameras == ("front",) and namespace["tokens"].shape == (1, 196, 256)


def test_files_on_the_page(tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(code_on_the_page("VisualTokens.load"), namespace := {})
    assert namespace["tokens"].cameras == ("front", "wrist") and namespace["tokens"].stamp_ns == 0
    images = {"front": np.zeros((480, 640, 3), np.uint8), "wrist": np.zeros((480, 640, 3), np.uint8)}
    assert namespace["tokens"].to_bytes() == tokenize(tokenizer, images, stamp_ns=0).to_bytes()


def test_frame_sets_on_the_page(capsys):
    exec(code_on_the_page("SetSynchronizer"), {})
    assert capsys.readouterr().out == "[('front', 100000000, 'first'), ('wrist', 110000000, 'second')]\n"


def test_tokens_that_are_no_numbers_are_refused_in_process_too(tokenizer):
    import torch

    class Overflowing:
        affine, roi, metadata = tokenizer.affine, tokenizer.roi, tokenizer.metadata

        def __call__(self, images, features=False, cameras=None):
            return SimpleNamespace(tokens=torch.full((1, 196, 256), 7e4), features=None, condition=None)

    image = {"front": np.zeros((48, 64, 3), np.uint8)}
    assert tokenize(Overflowing(), image).float32().max() == 7e4
    with pytest.raises(TokenFormatError, match="float16 ends at 65504"):
        tokenize(Overflowing(), image, token_dtype="float16")


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("pool", [1, 3])
def test_places_through_resize_pooling_and_uncovered_pixels(strategy, pool):
    """A pixel and its token against the preprocessing itself: a bright dot is followed to its 14-pixel patch."""
    pytest.importorskip("timm")
    from vla_perception.tokenizer.config import EncoderConfig
    from vla_perception.tokenizer.preprocess import resize, source_to_grid

    # 384 / 14: 27 patches, 6 pixels at the right and the bottom that no token sees.
    config = EncoderConfig("siglip", "x", 384, (0.5,) * 3, (0.5,) * 3, strategy, letterbox_fill=(0, 0, 0))
    height, width = 480, 640
    affine = tuple(value / pool for value in source_to_grid(height, width, config, 14))
    side = 27 // pool
    tokens = make_tokens(0, grid=(side, side), pool=pool)
    view = type(tokens.views[0])("front", "", 0, height, width, affine)
    tokens = VisualTokens(**{**tokens.__dict__, "views": (view,)})
    seen = set()
    random = np.random.default_rng(0)
    for x, y in [(639, 240), (320, 479), (2, 2), *random.integers(0, (width, height), (40, 2))]:
        image = np.zeros((height, width, 3), np.uint8)
        image[max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4] = 255
        small = resize(image, config)[..., 0].astype(float)
        token = tokens.token_at(x + 0.5, y + 0.5)
        if small.max() < 100:  # cropped away
            assert token is None or strategy != "resize-naive"
            continue
        row, column = (int(np.average(range(384), weights=small.sum(axis))) for axis in (1, 0))
        near_edge = any(min(value % (14 * pool), -value % (14 * pool)) < 3 for value in (row, column))
        if max(row, column) >= side * 14 * pool + 3:
            assert token is None
            seen.add("uncovered")
        elif not near_edge and token is not None:
            assert divmod(token, side) == (row // (14 * pool), column // (14 * pool))
            corners = np.array(tokens.patch_corners(token))
            assert (corners.min(0) <= (x + 0.5, y + 0.5)).all() and ((x + 0.5, y + 0.5) <= corners.max(0)).all()
            seen.add("covered")
    assert "covered" in seen
    if strategy == "resize-naive" and pool == 1:
        assert "uncovered" in seen


@pytest.mark.parametrize(
    "steps",
    [
        ["rotate180"],
        ["crop:100,60,300,400", "rotate180"],
        ["center_crop_pil"],
        ["lanczos3:224", "center_crop_tf:224"],
    ],
)
@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_places_through_everything_that_the_tokenizer_does(tokenizer, steps, strategy):
    """A bright square goes through the tokenizer's own preparation and resizing, to the patch that it ends in."""
    from dataclasses import replace

    from vla_perception.tokenizer import VisualTokenizer
    from vla_perception.tokenizer.network import empty_network

    chosen = VisualTokenizer.from_preset(
        "tiny-random", image_transforms=steps, token_strategy="cls+patch", pool=2
    ).config
    encoders = tuple(
        replace(encoder, resize_strategy=strategy, letterbox_fill=(0, 0, 0)) for encoder in chosen.encoders
    )
    config = replace(chosen, encoders=encoders)
    whole = VisualTokenizer(config, empty_network(config), weights="random", weights_digest="", compute_dtype="float32")
    height, width, side = 480, 640, config.encoders[0].image_size
    view = View("front", "", 0, height, width, whole.affine(height, width), roi=whole.roi(height, width))
    tokens = make_tokens(0, grid=whole.grid, token_strategy="cls+patch", pool=2, data=np.zeros((1, 50, 6), np.float32))
    tokens = VisualTokens(**{**tokens.__dict__, "views": (view,)})
    seen = set()
    random = np.random.default_rng(0)
    for x, y in [(320, 30), (320, 450), (30, 240), *random.integers((20, 20), (width - 20, height - 20), (40, 2))]:
        image = np.zeros((height, width, 3), np.uint8)
        image[y - 8 : y + 9, x - 8 : x + 9] = 255
        light = whole.preprocess(image)[0][0, 0].numpy()
        light -= light.min()
        token = tokens.token_at(x + 0.5, y + 0.5)
        if light.max() == 0:
            assert token is None
            seen.add("cut")
            continue
        row, column = (float(np.average(np.arange(side) + 0.5, weights=light.sum(axis))) / 28 for axis in (1, 0))
        whole_spot = not any(edge.any() for edge in (light[0], light[-1], light[:, 0], light[:, -1]))
        if not whole_spot:
            continue
        assert token is not None
        if all(0.1 < value % 1 < 0.9 for value in (row, column)):
            assert token == 1 + int(row) * 7 + int(column)
            seen.add("covered")
    assert "covered" in seen
    if steps[0].startswith("crop"):
        assert "cut" in seen
