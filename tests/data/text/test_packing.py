"""Rows shared by short examples: nothing lost, nothing over the edge, the same on every process."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data.text.dataset import Example
from jaxft.data.text.packing import collate, collate_rows, first_fit, make_packing


def example(n):
    return Example(np.arange(1, n + 2, dtype=np.int32), np.r_[0, np.ones(n)].astype(np.float32))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 5))
def test_every_example_has_one_row_and_every_row_fits(lengths, per_row):
    groups = first_fit(lengths, 20, per_row)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in group) <= 20 for group in groups)
    assert all(1 <= len(group) <= per_row for group in groups)


@given(st.integers(1, 3), st.integers(0, 2**31))
def test_a_batch_keeps_its_rows_or_takes_a_multiple_more(multiple, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, 500).tolist()
    packing = make_packing(lengths.__getitem__, 500, 12, multiple, 64)
    for _ in range(20):
        drawn = [lengths[i] for i in rng.integers(0, 500, 12)]
        groups = packing.groups(drawn)
        assert len(groups) >= packing.counts[0] and len(groups) % multiple == 0
        assert sorted(place for group in groups for place in group) == list(range(12))


def test_full_rows_are_left_alone():
    packing = make_packing(lambda _: 64, 100, 8, 1, 64)
    assert packing.counts == (8,) and packing.per_row == 1
    assert packing.groups([64] * 8) == [[place] for place in range(8)]


def test_short_rows_are_packed_tightly():
    packing = make_packing(lambda _: 16, 100, 8, 1, 64)
    assert packing.counts == (2,)
    worst = packing.groups([64] * 7 + [1])
    assert len(worst) == 8, "a batch that cannot share gets a row an example"


def test_most_batches_have_one_of_the_announced_numbers_of_rows():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 33, 500).tolist()
    packing = make_packing(lengths.__getitem__, 500, 32, 1, 64)
    usual, most = packing.counts
    batches = [[lengths[i] for i in rng.integers(0, 500, 32)] for _ in range(200)]
    needed = [len(packing.groups(batch)) for batch in batches]
    assert {usual, most} <= set(needed)
    assert sum(one in packing.counts for one in needed) >= 190
    assert packing.own_counts(slice(16, 32)) == [usual // 2, most // 2]


def test_t10_packed_rows_hold_the_same_tokens_with_their_own_segments():
    packed = collate_rows([[example(3), example(2)], [example(4)]], seq_len=6)
    alone = collate([example(3), example(2), example(4)], seq_len=6)
    assert packed["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
    assert packed["positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert packed["weights"].sum() == alone["weights"].sum()
    for name in ("tokens", "targets"):
        real = packed[name][packed["segment_ids"] > 0]
        assert real.tolist() == alone[name][alone["segment_ids"] > 0].tolist()
