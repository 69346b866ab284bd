"""Portions of one size, and sheets that keep the first evaluation beside the last."""

import numpy as np

from jaxft.tasks.common.sheets import CELL, Compared, portions


def test_portions_have_one_size_and_repeat_at_the_end():
    arrays = {"ids": np.arange(5)[:, None], "given": {"mask": np.arange(5.0)}}
    made = list(portions(arrays, 5, 2))
    assert [places.tolist() for places, _ in made] == [[0, 1], [2, 3], [4, 5]]
    assert [rows["ids"].shape for _, rows in made] == [(2, 1)] * 3
    assert made[-1][1]["given"]["mask"].tolist() == [4.0, 4.0]
    assert [rows for _, rows in portions({}, 3, 2)] == [{}, {}], "nothing is given"


def test_sheets_show_the_first_beside_the_last():
    pictures = [np.full((3, CELL, CELL, 3), level, np.uint8) for level in (10, 60, 200)]
    compared, captions = Compared(), ["a", "b", "c"]
    for now in pictures[1:]:
        sheet = compared.sheet(captions, {"given": None, "target": pictures[0]}, now)
    levels = [sheet[CELL // 2 + 30, CELL // 2 + i * (CELL + 4), 0] for i in range(3)]
    assert levels == [10, 60, 200], "target, before, now"
    assert sheet.shape[1] == 3 * (CELL + 4) + 4
