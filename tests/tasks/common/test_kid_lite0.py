"""kid-lite0: padding changes nothing, alike sets are near 0, unlike ones are not."""

import numpy as np
import pytest

from jaxft.tasks.common import kid_lite0
from jaxft.tasks.common.kid_lite0 import KidLite0


@pytest.fixture(scope="module")
def measure():
    return KidLite0()


def noise(count, seed=0, high=256):
    return np.random.default_rng(seed).integers(0, high, (count, 32, 32, 3), np.uint8)


def test_features_of_a_row_do_not_depend_on_the_others(measure):
    """A last batch is padded, so that all are compiled as one shape."""
    pictures = noise(kid_lite0.KID_ROWS + 3)
    features = measure.features(pictures)
    assert features.shape == (len(pictures), 1280)
    np.testing.assert_allclose(features[-2:], measure.features(pictures[-2:]), rtol=1e-4, atol=1e-5)


def test_it_tells_sets_apart(measure):
    alike = measure(noise(12), noise(12, seed=1))
    unlike = measure(noise(12), noise(12, seed=1, high=40))
    assert abs(alike) < 0.2 * unlike and unlike > 0
