"""Portions of one size, and the examples of a sheet."""

import numpy as np

from jaxft.tasks.common.sheets import SHOWN, portions, shown_sheet


def test_portions_have_one_size_and_repeat_at_the_end():
    arrays = {"ids": np.arange(5)[:, None], "given": {"mask": np.arange(5.0)}}
    made = list(portions(arrays, 5, 2))
    assert [places.tolist() for places, _ in made] == [[0, 1], [2, 3], [4, 5]]
    assert [rows["ids"].shape for _, rows in made] == [(2, 1)] * 3
    assert made[-1][1]["given"]["mask"].tolist() == [4.0, 4.0]
    assert [rows for _, rows in portions({}, 3, 2)] == [{}, {}], "nothing is given"


def test_a_sheet_shows_examples_equally_far_apart():
    pictures = np.arange(20)[:, None, None, None].repeat(3, axis=3)
    sheet = shown_sheet([str(i) for i in range(20)], {"given": None, "target": pictures})
    assert list(sheet.columns) == ["target"] and len(sheet.captions) == SHOWN
    assert [int(one) for one in sheet.captions] == sheet.columns["target"][:, 0, 0, 0].tolist()
    assert sheet.captions[0] == "0" and sheet.captions[-1] == "19"
    assert len(shown_sheet(["a", "b"], {"now": pictures[:2]}).captions) == 2
