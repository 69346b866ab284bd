"""Figures of one network beside another: relative to the largest value, shapes and codes exact."""

import math

import numpy as np
import pytest

from jaxft.verify.component import compare_output
from jaxft.verify.report import worst_gradient
from jaxft.verify.rounding import FLOAT32_UNIT, MULTIPLE


def test_outputs_are_compared_relative_to_the_largest_value():
    theirs = np.array([[100.0, 1.0]], np.float32)
    wide = theirs + np.array([[0.0, 1e-4]])
    found = compare_output("x", theirs + np.float32([[0.0, 0.5]]), theirs, [wide])
    assert found.figure == 0.005 and not found.passed
    assert found.rounding == pytest.approx(1e-6) and found.bound < 1e-5


def test_another_shape_and_nan_fail():
    theirs = np.ones((2, 3), np.float32)
    other = compare_output("x", theirs.T, theirs, [theirs])
    assert other.figure == math.inf and "(3, 2)" in other.note and not other.passed
    assert not compare_output("x", np.full((2, 3), np.nan), theirs, [theirs]).passed


def test_codes_have_to_be_equal():
    theirs = np.arange(6, dtype=np.int32)
    assert compare_output("x", theirs.copy(), theirs, [theirs]).passed
    found = compare_output("x", theirs[::-1], theirs, [theirs])
    assert (found.figure, found.bound, found.note) == (6, 0, "of 6")


def test_a_gradient_that_one_side_lacks_is_infinitely_wrong():
    theirs = {"a": np.ones(3), "b": np.ones(2)}
    assert worst_gradient("g", [("a", np.ones(3))], theirs, {}).figure == math.inf
    both = [("a", np.ones(3)), ("b", np.full(2, 1.01))]
    found = worst_gradient("g", both, theirs, {"a": 1e-6})
    assert found.note == "b" and round(found.figure, 6) == 0.01 and not found.passed


def test_a_tensor_without_a_gradient_is_measured_by_the_whole():
    theirs = {"a": np.ones(10000), "bias": np.zeros(1)}
    # Its own norm is 0, so it is measured against a thousandth of the whole one, which is 100.
    for error, passes in ((4e-8, True), (1e-6, False)):
        ours = [("a", np.ones(10000)), ("bias", np.full(1, error))]
        assert worst_gradient("g", ours, theirs, {}).passed == passes


def test_each_gradient_has_the_bound_of_its_own_rounding():
    """A tensor whose rounding is large hides no error of another one."""
    theirs = {key: np.ones(4) for key in "abc"}
    distances = {"a": 2.0, "b": 2e-6, "c": 2e-6}
    fine = {"a": np.full(4, 2.0), "b": np.full(4, 1 + 5e-6), "c": np.ones(4)}
    assert worst_gradient("g", fine.items(), theirs, distances).passed
    wrong = {**fine, "b": np.full(4, 1.001)}
    found = worst_gradient("g", wrong.items(), theirs, distances)
    assert not found.passed and found.note == "b" and found.rounding == pytest.approx(1e-6)


def test_a_bound_is_a_multiple_of_the_oracles_own_rounding():
    theirs = np.ones((1, 4), np.float32)
    for own in (1e-3, 1e-5):
        wide = theirs + own
        near, far = (theirs + np.float32(share * own * MULTIPLE) for share in (0.9, 1.1))
        assert compare_output("x", near, theirs, [wide]).passed
        assert not compare_output("x", far, theirs, [wide]).passed
    assert compare_output("x", theirs, theirs, [theirs]).bound == MULTIPLE * FLOAT32_UNIT
