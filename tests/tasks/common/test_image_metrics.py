"""PSNR, SSIM and KID against their definitions written out in plain numpy, and known values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.tasks.common.image_metrics import kid, psnr, ssim


def images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def noisy(x, amount, seed=1):
    return np.clip(x + amount * images(*x.shape, seed=seed), -1, 1)


def test_psnr_of_a_known_error_is_per_image():
    x = jnp.zeros((2, 8, 6, 3))
    y = x.at[0].add(0.2).at[1].add(0.02)  # a tenth and a hundredth of the range of 2
    np.testing.assert_allclose(psnr(x, y), [20, 40], rtol=1e-5)


def test_psnr_of_equal_images_is_infinite_and_bf16_is_widened():
    x = images(1, 8, 8, 3)
    assert np.isinf(psnr(x, x)).all()
    half = jnp.asarray(x, jnp.bfloat16)
    np.testing.assert_array_equal(psnr(half, x), psnr(half.astype(jnp.float32), x))


def ssim_of_one(x, y):
    """Wang et al. 2004 with a loop over windows, in fp64 on [0, 1]."""
    x, y = (np.asarray(z, np.float64) / 2 + 0.5 for z in (x, y))
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    rows, columns = range(x.shape[0] - 10), range(x.shape[1] - 10)
    for i, j, c in itertools.product(rows, columns, range(x.shape[2])):
        a, b = x[i : i + 11, j : j + 11, c], y[i : i + 11, j : j + 11, c]
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        both = (window * (a - mean_a) * (b - mean_b)).sum()
        light = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        values.append(light * (2 * both + 9e-4) / (var_a + var_b + 9e-4))
    return np.mean(values)


def test_ssim_is_the_papers():
    x = images(2, 16, 13, 3)
    y = np.concatenate([noisy(x[:1], 0.3), images(1, 16, 13, 3, seed=2)])
    wanted = [ssim_of_one(a, b) for a, b in zip(x, y, strict=True)]
    assert wanted[0] > 0.8 > 0.2 > abs(wanted[1])
    np.testing.assert_allclose(jax.jit(ssim)(x, y), wanted, atol=1e-5)


def test_ssim_of_flat_images_is_the_light_alone():
    """No cancellation: in fp32 the variance of a flat image has to stay far below 9e-4."""
    x, y = np.full((1, 12, 12, 3), 0.9, np.float32), np.full((1, 12, 12, 3), -0.5, np.float32)
    wanted = (2 * 0.95 * 0.25 + 1e-4) / (0.95**2 + 0.25**2 + 1e-4)
    np.testing.assert_allclose(ssim(x, y), wanted, rtol=2e-4)
    np.testing.assert_allclose(ssim(x, x), 1, rtol=1e-6)


def test_ssim_refuses_images_below_its_window():
    with pytest.raises(UserError, match="10x64 pixels: expected at least 11x11"):
        ssim(images(1, 10, 64, 3), images(1, 10, 64, 3))
    assert ssim(images(1, 11, 11, 3), images(1, 11, 11, 3)).shape == (1,)


def test_kid_of_a_known_case():
    """Features in one dimension: k(x, y) = (xy + 1)^3."""
    a, b = np.array([[0.0], [1.0]]), np.array([[2.0], [1.0], [0.0]])
    within_a = 1.0  # k(0, 1)
    within_b = (27 + 1 + 1) / 3  # k(2, 1), k(2, 0), k(1, 0)
    between = (1 + 1 + 1 + 27 + 8 + 1) / 6
    assert kid(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_kid_is_unbiased_and_grows_with_the_distance():
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal((40, 16)) for _ in range(40)]
    same = [kid(a, b) for a, b in itertools.pairwise(draws)]
    assert abs(np.mean(same)) < 3 * np.std(same) / len(same) ** 0.5
    assert min(same) < 0 < max(same)
    apart = [kid(draws[0], draws[1] + shift) for shift in (0.5, 1.0, 2.0)]
    assert max(np.abs(same)) < apart[0] < apart[1] < apart[2]


def test_kid_counts_in_fp64():
    """Large features of nearly equal sets, whose kernels of 1e12 differ in their last digits."""
    a = 1e2 * np.random.default_rng(0).uniform(1, 2, (20, 8)).astype(np.float32)
    wide = kid(a.astype(np.float64), a[::-1].astype(np.float64) + 1e-3)
    assert kid(a, a[::-1].astype(np.float64) + 1e-3) == wide


def test_kid_needs_two_images_a_set():
    with pytest.raises(UserError, match="KID of 1 and 3 images: expected at least 2"):
        kid(np.zeros((1, 4)), np.zeros((3, 4)))
