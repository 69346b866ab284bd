"""The convolution: im2col on a CPU, XLA's own elsewhere, with the same values and gradients."""

import jax
import numpy as np
import pytest

from jaxft.kernels.conv import IM2COL_MIN_CHANNELS, convolve, reference
from tests.devices import traced_for

ONE, NONE, BOTTOM_RIGHT = ((1, 1), (1, 1)), ((0, 0), (0, 0)), ((0, 1), (0, 1))


def data(size, channels=IM2COL_MIN_CHANNELS):
    rng = np.random.default_rng(0)
    shapes = ((2, 7, 6, channels), (size, size, channels, 5))
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, ONE), (3, 2, BOTTOM_RIGHT), (1, 1, NONE), (2, 3, ONE)]
)
def test_wide_convolutions_are_matrix_products_with_the_same_gradients(size, stride, padding):
    x, kernel = data(size)
    ours, ours_back = jax.vjp(lambda *a: convolve(*a, stride, padding), x, kernel)
    theirs, theirs_back = jax.vjp(lambda *a: reference(*a, stride, padding), x, kernel)
    for a, b in zip((ours, *ours_back(theirs)), (theirs, *theirs_back(theirs)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("platform", "channels", "product"),
    [
        ("cpu", IM2COL_MIN_CHANNELS, True),
        ("cpu", IM2COL_MIN_CHANNELS - 1, False),
        ("gpu", IM2COL_MIN_CHANNELS, False),
        ("tpu", IM2COL_MIN_CHANNELS, False),
    ],
)
def test_the_device_and_the_channels_choose_the_form(platform, channels, product):
    with traced_for(platform):
        text = str(jax.make_jaxpr(lambda *a: convolve(*a, 1, ONE))(*data(3, channels)))
    assert ("dot_general" in text) == product
    assert ("conv_general_dilated" in text) != product
