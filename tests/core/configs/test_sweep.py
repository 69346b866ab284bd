"""The text of a sweep: its members in order, and one line for each mistake."""

import pytest

from jaxft.core.configs.sweep import read_sweep
from jaxft.core.errors import UserError


def test_every_combination_is_a_member_with_a_name_of_its_values():
    members = read_sweep("optim.lr = 1e-4, 2e-4 lora.rank=4,8  seed=0")
    assert [one.name for one in members] == [
        "lr1e-4-rank4-seed0",
        "lr1e-4-rank8-seed0",
        "lr2e-4-rank4-seed0",
        "lr2e-4-rank8-seed0",
    ]
    assert members[1].values == {"optim.lr": 1e-4, "lora.rank": 8, "seed": 0}
    assert [type(value) for value in members[1].values.values()] == [float, int, int]
    assert read_sweep("") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim.lr", "'' is no number"),
        ("optim.lr=1e-4,", "'' is no number"),
        ("optim.lr=1,2; seed=0,1", "'2;' is no number"),
        ("=1,2", "'' is none of optim.lr, lora.rank, lora.alpha, seed"),
        (" ", "is one adapter"),
        ("lr=1e-4,2e-4", "'lr' is none of optim.lr"),
        ("optim.lr=1e-4,2e-4 optim.lr=1", "'optim.lr' stands there twice"),
        ("optim.lr=1e-4,0.0001", "optim.lr has 0.0001 twice"),
        ("optim.lr=1e-4,../x", "'../x' is no number"),
        ("optim.lr=1e-4,1.2.3", "optim.lr=1.2.3 must be a number"),
        ("optim.lr=-1,nan", "optim.lr=-1 must not be below 0"),
        ("lora.alpha=8,1e999", "lora.alpha=1e999 must be above 0, and no infinity"),
        ("lora.rank=4,8.5", "lora.rank=8.5 must be a whole number"),
        ("lora.rank=4,0", "lora.rank=0 must be above 0"),
        ("optim.lr=1e-4", "is one adapter; give at least two"),
    ],
)
def test_a_mistake_is_told_in_one_line(text, words):
    with pytest.raises(UserError) as found:
        read_sweep(text)
    assert words in str(found.value) and "\n" not in str(found.value)
