"""Where token colors are painted over the image that the tokens come from."""

import numpy as np
import pytest

from vla_perception.tokens import View
from vla_perception.visualization.overlay import overlay, side_by_side, side_by_side_size

ROWS, COLUMNS = 3, 4
HEIGHT, WIDTH = 30, 48
# Pixels to the grid: everything is seen, and a patch is 12 x 10 pixels.
WHOLE = (COLUMNS / WIDTH, 0, 0, 0, ROWS / HEIGHT, 0)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def view_of(affine, height=HEIGHT, width=WIDTH, roi=None) -> View:
    return View("front", "", 0, height, width, tuple(affine), roi=roi)


def test_patches_are_painted_where_they_lie():
    colors = noise(ROWS, COLUMNS, 3)
    expected = colors.repeat(10, axis=0).repeat(12, axis=1)
    assert np.array_equal(overlay(colors, view_of(WHOLE)), expected)
    image = noise(HEIGHT, WIDTH, 3, seed=1)
    blended = overlay(colors, view_of(WHOLE), image, 0.25)
    assert np.abs(blended - (0.75 * image + 0.25 * expected)).max() <= 1
    assert np.array_equal(overlay(colors, view_of(WHOLE), image, 0.0), image)
    assert np.array_equal(overlay(colors, view_of(WHOLE), image, 1.0), expected)


def test_features_on_a_finer_grid_are_painted_where_they_lie():
    """Of a projector that makes one token of 2 × 2 patches."""
    colors = noise(2 * ROWS, 2 * COLUMNS, 3)
    expected = colors.repeat(5, axis=0).repeat(6, axis=1)
    assert np.array_equal(overlay(colors, view_of(WHOLE).on_finer_grid(2)), expected)
    assert view_of(WHOLE).on_finer_grid(1) == view_of(WHOLE)


def test_pixels_that_no_token_sees_keep_the_image():
    colors = np.full((ROWS, COLUMNS, 3), 255, np.uint8)
    crop = (COLUMNS / 24, 0, -12 * COLUMNS / 24, 0, ROWS / HEIGHT, 0)  # the middle 24 columns
    image = noise(HEIGHT, WIDTH, 3)
    shown = overlay(colors, view_of(crop), image, 1.0)
    assert (shown[:, 12:36] == 255).all()
    assert np.array_equal(shown[:, :12], image[:, :12]) and np.array_equal(shown[:, 36:], image[:, 36:])
    assert (overlay(colors, view_of(crop))[:, :12] == 0).all()


def test_a_turned_grid_is_painted_turned():
    colors = noise(ROWS, COLUMNS, 3)
    turned = (-COLUMNS / WIDTH, 0, COLUMNS, 0, -ROWS / HEIGHT, ROWS)
    assert np.array_equal(overlay(colors, view_of(turned)), overlay(colors, view_of(WHOLE))[::-1, ::-1])


@pytest.mark.parametrize("seed", range(6))
def test_a_large_view_is_painted_like_a_small_one(seed):
    """Against a loop over pixels; 700 columns make several blocks of rows."""
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(380, 500)), 700
    colors, image = noise(ROWS, COLUMNS, 3), noise(height, width, 3, seed=seed)
    turned = [0.0, COLUMNS / height, 0.3, ROWS / width, 0.0, -0.4]
    straight = [COLUMNS / width * 1.2, 0.0, -0.3, 0.0, ROWS / height, 0.4]
    affine = (turned, straight, list(rng.normal(size=6) * [0.01, 0.01, 2, 0.01, 0.01, 2]))[seed % 3]
    shown = overlay(colors, view_of(affine, height, width), image, 1.0)
    for y, x in zip(rng.integers(0, height, 500), rng.integers(0, width, 500)):
        column = int(np.floor(affine[0] * (x + 0.5) + affine[1] * (y + 0.5) + affine[2]))
        row = int(np.floor(affine[3] * (x + 0.5) + affine[4] * (y + 0.5) + affine[5]))
        inside = 0 <= row < ROWS and 0 <= column < COLUMNS
        assert np.array_equal(shown[y, x], colors[row, column] if inside else image[y, x])


def test_painting_a_large_view_takes_little_more_memory_than_the_view():
    import tracemalloc

    tracemalloc.start()
    try:
        for affine in ((ROWS / 4000, 0, 0, 0, COLUMNS / 3000, 0), (0, ROWS / 3000, 0, COLUMNS / 4000, 0, 0)):
            for _ in range(2):  # nothing is kept either
                overlay(noise(ROWS, COLUMNS, 3), view_of(affine, 3000, 4000))
        assert tracemalloc.get_traced_memory()[1] < 1.5 * 3000 * 4000 * 3
    finally:
        tracemalloc.stop()


def test_what_a_crop_step_cut_off_stays_unpainted():
    """The middle 24 columns, letterboxed to 30 × 30: what was cut off beside them has a place in the padding."""
    roi = (12.0, 0.0, 36.0, 30.0)
    letterboxed = (COLUMNS / 30, 0, (3 - 12) * COLUMNS / 30, 0, ROWS / 30, 0)
    colors, image = np.full((ROWS, COLUMNS, 3), 255, np.uint8), noise(HEIGHT, WIDTH, 3) // 2
    shown = overlay(colors, view_of(letterboxed, roi=roi), image, 1.0)
    assert (shown[:, 12:36] == 255).all()
    assert np.array_equal(shown[:, :12], image[:, :12]) and np.array_equal(shown[:, 36:], image[:, 36:])
    alone = overlay(colors, view_of(letterboxed, roi=roi), size=(15, 24), background=7)
    assert (alone[:, 6:18] == 255).all() and (alone[:, :6] == 7).all() and (alone[:, 18:] == 7).all()


def test_a_scaled_view_is_painted_like_the_whole():
    colors = noise(ROWS, COLUMNS, 3)
    doubled = overlay(colors, view_of(WHOLE), size=(2 * HEIGHT, 2 * WIDTH))
    assert np.array_equal(doubled, overlay(colors, view_of(WHOLE)).repeat(2, axis=0).repeat(2, axis=1))
    half = (COLUMNS / 24, 0, 0, 0, ROWS / HEIGHT, 0)
    shown = overlay(colors, view_of(half), size=(HEIGHT // 2, WIDTH // 2), background=232)
    assert (shown[:, 12:] == 232).all() and np.array_equal(shown[:, :12], colors.repeat(5, axis=0).repeat(3, axis=1))


def test_images_side_by_side_have_one_height():
    first, second = noise(30, 48, 3), noise(60, 80, 3)
    both = side_by_side([first, second])
    assert side_by_side_size([(30, 48), (60, 80)]) == both.shape[:2]
    assert side_by_side_size([(10**6, 1), (1, 10**6)]) == (10**6, 10**12 + 1)
    assert both.shape == (30, 48 + 40, 3)
    assert np.array_equal(both[:, :48], first)
    assert {tuple(p) for p in both[:, 48:].reshape(-1, 3)} <= {tuple(p) for p in second.reshape(-1, 3)}
