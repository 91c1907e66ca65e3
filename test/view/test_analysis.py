"""What is painted over a patch, against plain loops over its numbers."""

from dataclasses import replace

import numpy as np
import pytest
from fake_feed import GRID, HEIGHT, WIDTH, random_tokens

from vla_perception.view.analysis import JOINED, TOKENS, Palette, Patches, Pin, patch_middles, patch_vectors, spaces


def cosine(one, other):
    return float(np.dot(one.astype(np.float64), other) / np.linalg.norm(one) / np.linalg.norm(other))


def test_spaces_are_the_encoders_and_what_they_became():
    assert spaces(random_tokens()) == ("dinov2", "siglip", JOINED, TOKENS)
    assert spaces(random_tokens(features=False)) == (TOKENS,)
    one = ({"name": "dinov2", "channels": [0, 16]},)
    assert spaces(random_tokens(features=False, projector="none", encoders=one)) == ("dinov2",)
    both = ({"name": "dinov2", "channels": [0, 10]}, {"name": "siglip", "channels": [10, 16]})
    unprojected = random_tokens(features=False, projector="none", encoders=both)
    assert spaces(unprojected) == ("dinov2", "siglip", JOINED)
    assert np.array_equal(patch_vectors(unprojected, JOINED), unprojected.data)
    assert np.array_equal(patch_vectors(unprojected, "siglip"), unprojected.data[..., 10:])
    tokens = random_tokens()
    assert np.array_equal(patch_vectors(tokens, "siglip"), tokens.features[..., 12:])
    assert np.array_equal(patch_vectors(tokens, JOINED), tokens.features)
    assert np.array_equal(patch_vectors(tokens, TOKENS), tokens.data)
    with pytest.raises(KeyError, match="publish_features"):
        patch_vectors(random_tokens(features=False), "dinov2")


def test_features_on_a_finer_grid_than_tokens_are_no_space():
    """As of SmolVLA, whose projector makes one token of several patches."""
    features = np.random.default_rng(0).normal(size=(2, 4 * 48, 20)).astype(np.float32)
    tokens = replace(random_tokens(), features=features, pixel_shuffle=2)
    assert spaces(tokens) == (TOKENS,) and Patches(tokens, TOKENS).norms.shape == (2, 48)


def test_a_cls_token_is_no_patch():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(1, 1 + 48, 16)).astype(np.float32)
    tokens = random_tokens(cameras=("front",), features=False, data=data, token_strategy="cls+patch")
    assert np.array_equal(patch_vectors(tokens, TOKENS), data[:, 1:])


def test_similarity_norm_and_change():
    tokens, before = random_tokens(1), random_tokens(2)
    for space in spaces(tokens):
        patches, earlier = Patches(tokens, space), Patches(before, space)
        vectors = patch_vectors(tokens, space)
        reference = vectors[1, 7]
        for view in range(2):
            for patch in range(48):
                vector = vectors[view, patch]
                assert patches.norms[view, patch] == pytest.approx(np.linalg.norm(vector), rel=1e-5)
                assert patches.similarity(reference)[view, patch] == pytest.approx(cosine(vector, reference), abs=1e-5)
                changed = 1 - cosine(vector, patch_vectors(before, space)[view, patch])
                assert patches.change(earlier)[view, patch] == pytest.approx(changed, abs=1e-5)
        assert np.allclose(patches.mean(0, [3, 4]), vectors[0, 3:5].mean(axis=0))
    assert Patches(tokens, TOKENS).change(None) is None
    assert Patches(tokens, TOKENS).change(Patches(random_tokens(3, channels=5), TOKENS)) is None


def test_a_vector_of_zeros_is_like_nothing():
    data = np.zeros((1, 48, 16), np.float32)
    data[0, 0] = 1
    patches = Patches(random_tokens(cameras=("front",), features=False, data=data), TOKENS)
    assert patches.similarity(data[0, 0])[0].tolist() == pytest.approx([1.0] + [0.0] * 47)
    assert patches.similarity(data[0, 1])[0].tolist() == [0.0] * 48


def test_colors_settle_and_leave_invalid_views_black():
    palette = Palette()
    tokens = random_tokens(0)
    views = (tokens.views[0], replace(tokens.views[1], valid=False))
    for sequence in range(8):
        message = replace(random_tokens(sequence), views=views)
        colors = palette.colors(message, TOKENS, Patches(message, TOKENS))
        assert colors.shape == (2, 48, 3) and colors[0].std() > 20 and not colors[1].any()
    message = random_tokens(3)
    settled = palette.colors(message, TOKENS, Patches(message, TOKENS))
    assert np.array_equal(settled, palette.colors(message, TOKENS, Patches(message, TOKENS)))
    palette.refit()
    assert not np.array_equal(settled, palette.colors(message, TOKENS, Patches(message, TOKENS)))


def test_what_cannot_be_colored_is_black_and_the_next_message_is_not():
    palette, whole = Palette(), random_tokens(1, channels=16)
    nothing = replace(whole, data=np.full_like(whole.data, np.nan))
    for tokens in (nothing, whole, random_tokens(1, channels=12), nothing, whole):
        colors = palette.colors(tokens, TOKENS, Patches(tokens, TOKENS))
        assert colors.shape == (2, 48, 3) and colors.any() == (tokens is whole)


def test_middles_of_patches_lie_in_them():
    tokens = random_tokens()
    turned = (0.0, GRID[1] / HEIGHT, 0.0, -GRID[0] / WIDTH, 0.0, float(GRID[0]))
    views = (tokens.views[0], replace(tokens.views[1], affine=turned))
    tokens = replace(tokens, views=views)
    for view in range(2):
        for patch, (x, y) in enumerate(patch_middles(tokens, view)):
            corners = np.array(tokens.patch_corners(patch, view))
            assert np.allclose(corners.mean(axis=0), (x, y))
            assert tokens.token_at(x, y, view) == patch


def test_a_pin_takes_the_patches_in_its_box():
    tokens = random_tokens()  # patches of 20 × 20 pixels
    assert Pin("front", (45, 25, 45, 25)).patches(tokens) == [1 * 8 + 2]
    assert Pin("front", (0, 0, 40, 40)).patches(tokens) == [0, 1, 8, 9]
    assert Pin("front", (41, 41, 44, 44)).patches(tokens) == [2 * 8 + 2], "no middle inside: the patch below the box's"
    assert Pin("side", (45, 25, 45, 25)).patches(tokens) == []
    assert Pin("front", (-30, 0, -20, 10)).patches(tokens) == []
    cropped = replace(tokens, views=(replace(tokens.views[0], roi=(40, 0, 160, 120)), tokens.views[1]))
    assert Pin("front", (10, 10, 10, 10)).patches(cropped) == [], "cropped away"
    assert Pin("front", (0, 0, 80, 20)).patches(cropped) == [2, 3]
