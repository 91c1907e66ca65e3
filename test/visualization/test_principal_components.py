"""Principal components as colors: against NumPy's SVD, stable signs, degenerate input."""

import numpy as np
import pytest

from vla_perception.visualization.principal_components import PrincipalComponents


def tokens_with_structure(count=200, channels=32, seed=0):
    rng = np.random.default_rng(seed)
    scales = np.array([9.0, 6.0, 4.0] + [0.5] * (channels - 3))
    basis, _ = np.linalg.qr(rng.normal(size=(channels, channels)))
    return (rng.normal(size=(count, channels)) * scales @ basis.T + rng.normal(size=channels)).astype(np.float32)


@pytest.mark.parametrize("count, channels", [(200, 32), (20, 64)])  # both Gram matrices
def test_axes_are_those_of_the_svd(count, channels):
    tokens = tokens_with_structure(count, channels)
    basis = PrincipalComponents.fit(tokens)
    expected = np.linalg.svd(tokens - tokens.mean(axis=0), full_matrices=False)[2][:3]
    assert np.allclose(np.abs(np.sum(basis.axes * expected, axis=1)), 1, atol=1e-4)
    assert np.allclose(basis.axes @ basis.axes.T, np.eye(3), atol=1e-4)


def test_colors_span_the_range_and_follow_the_projection():
    tokens = tokens_with_structure()
    basis = PrincipalComponents.fit(tokens)
    colors = basis.rgb(tokens)
    assert colors.shape == (200, 3) and colors.dtype == np.uint8
    assert (colors.min(axis=0) == 0).all() and (colors.max(axis=0) == 255).all()
    for axis, projected in enumerate(basis.project(tokens).T):
        order = np.argsort(projected)
        assert (np.diff(colors[order, axis].astype(int)) >= 0).all()


def test_same_tokens_same_colors_whatever_the_order():
    tokens = tokens_with_structure()
    shuffled = np.random.default_rng(1).permutation(len(tokens))
    first = PrincipalComponents.fit(tokens).rgb(tokens)
    second = PrincipalComponents.fit(tokens[shuffled]).rgb(tokens)
    assert np.abs(first.astype(int) - second).max() <= 1


def test_refit_like_an_earlier_basis_keeps_order_and_signs():
    tokens = tokens_with_structure()
    basis = PrincipalComponents.fit(tokens)
    turned = PrincipalComponents(basis.mean, -basis.axes[[2, 0, 1]], basis.low, basis.high)
    refit = PrincipalComponents.fit(tokens, like=turned)
    assert (np.sum(refit.axes * turned.axes, axis=1) > 0.99).all()


def test_degenerate_tokens_become_grey():
    constant = np.full((10, 8), 3.0, np.float32)
    assert (PrincipalComponents.fit(constant).rgb(constant) == 128).all()
    line = np.outer(np.linspace(-1, 1, 50), np.ones(8)).astype(np.float32)
    colors = PrincipalComponents.fit(line).rgb(line)
    assert np.ptp(colors[:, 0].astype(int)) == 255 and (colors[:, 1:] == 128).all()
    single = np.ones((1, 2), np.float32)
    assert PrincipalComponents.fit(single).rgb(single).shape == (1, 3)


def test_tokens_that_are_not_finite_are_left_out_and_black():
    tokens = tokens_with_structure()
    broken = tokens.copy()
    broken[7, 3] = np.nan
    basis = PrincipalComponents.fit(broken)
    colors = basis.rgb(broken)
    assert (colors[7] == 0).all() and np.isfinite(basis.axes).all()


def test_values_whose_squares_are_infinite_are_black_and_leave_the_others_as_they_are():
    tokens = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    huge = tokens.copy()
    huge[7, 3], huge[8] = 3e38, -1e30
    colors = PrincipalComponents.fit(huge).rgb(huge)
    others = np.delete(np.arange(50), [7, 8])
    assert (colors[7:9] == 0).all()
    np.testing.assert_array_equal(colors[others], PrincipalComponents.fit(tokens[others]).rgb(tokens[others]))


@pytest.mark.parametrize("bad", [np.zeros(8), np.zeros((2, 0)), np.zeros((0, 4)), np.full((3, 4), np.nan)])
def test_bad_tokens_are_refused(bad):
    with pytest.raises(ValueError):
        PrincipalComponents.fit(bad)


def test_other_channel_count_is_refused():
    basis = PrincipalComponents.fit(tokens_with_structure())
    with pytest.raises(ValueError, match="32"):
        basis.rgb(np.zeros((4, 16), np.float32))
    with pytest.raises(ValueError, match="like"):
        PrincipalComponents.fit(np.eye(8), like=basis)
