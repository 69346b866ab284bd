"""F1 by hand, and the confusion of classes as a picture."""

import numpy as np
import pytest

from jaxft.tasks.llm.heads.measures import MOST_CLASSES, confusion, confusion_picture, macro_f1


def test_macro_f1_leaves_out_classes_without_texts():
    """By hand: precision and recall of class 0 are 1/2 and 1, of class 1 are 1 and 1/2."""
    each = np.eye(3, dtype=bool)
    truth, guessed = each[[0, 1, 1]], each[[0, 0, 1]]
    assert macro_f1(truth, guessed) == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_the_confusion_picture_has_its_largest_classes():
    rng = np.random.default_rng(0)
    counts = confusion(rng.integers(0, 40, 500), rng.integers(0, 40, 500), 40)
    assert counts.sum() == 500 and counts.shape == (40, 40)
    whole = confusion_picture(counts, [f"class {i}" for i in range(40)])
    some = confusion_picture(counts[:5, :5], [f"class {i}" for i in range(5)])
    assert whole.shape[0] > some.shape[0] and whole.shape[0] < 50 * MOST_CLASSES
