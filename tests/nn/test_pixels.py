"""Pixels become numbers in [-1, 1], and numbers pixels."""

import numpy as np

from jaxft.nn.pixels import to_float, to_pixels

LEVELS = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)


def test_every_grey_level_survives_the_round_trip():
    floats = to_float(LEVELS)
    assert floats.dtype == np.float32 and floats.min() == -1 and floats.max() == 1
    assert np.array_equal(to_pixels(floats), LEVELS)


def test_values_outside_are_clipped_and_others_rounded():
    values = np.array([-9.0, -1.0, 0.0, 1.0, 2.0, np.inf], np.float32).reshape(1, 2, 3)
    assert np.ravel(to_pixels(values)).tolist() == [0, 0, 128, 255, 255, 255]
