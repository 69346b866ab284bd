"""Loader: batch k is a function of the seed and k, whatever the process, thread or restart."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.core.errors import UserError
from jaxft.data.loader import SourceShare, eval_batches, train_loader

# Grain walks at least 2**16 places to shuffle, so that a tiny set costs up to 2 ms a sample:
# these sets have hundreds of samples, and few examples are drawn.
FEW = settings(max_examples=10, deadline=None)


def stack(examples, *, batch_rows):
    """Collate numbers: the value and a weight, padded with weight 0."""
    batch = {"value": np.zeros(batch_rows, np.int64), "weights": np.zeros(batch_rows, np.float32)}
    batch["value"][: len(examples)] = examples
    batch["weights"][: len(examples)] = 1
    return batch


def squares(n):
    return [i * i for i in range(n)]


def load(n, steps, *, batch_size, seed=0, start=0, rows=None, threads=2):
    batches = train_loader(
        squares(n),
        batch_size=batch_size,
        seed=seed,
        start_step=start,
        collate_fn=stack,
        rows=rows,
        threads=threads,
    )
    return list(islice(batches, steps))


def ids(batches):
    return np.concatenate([batch["sample_ids"] for batch in batches])


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@FEW
@given(
    st.integers(20, 900), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 20),
    st.integers(1, 4),
)  # fmt: skip
def test_t20_resume_equals_the_uninterrupted_run(n, batch_size, seed, start, threads):
    whole = load(n, start + 4, batch_size=batch_size, seed=seed)
    resumed = load(n, 4, batch_size=batch_size, seed=seed, start=start, threads=threads)
    assert_same(whole[start:], resumed)


@FEW
@given(st.integers(100, 900), st.integers(2, 8), st.data())
def test_t28_disjoint_rows_unite_to_the_global_batch(n, batch_size, data):
    cut = data.draw(st.integers(1, batch_size - 1))
    whole = load(n, 5, batch_size=batch_size, seed=3)
    left = load(n, 5, batch_size=batch_size, seed=3, rows=slice(0, cut))
    right = load(n, 5, batch_size=batch_size, seed=3, rows=slice(cut, batch_size))
    both = [
        {key: np.concatenate([a[key], b[key]]) for key in a}
        for a, b in zip(left, right, strict=True)
    ]
    assert_same(whole, both)


@FEW
@given(st.integers(5, 40), st.integers(1, 5), st.integers(0, 1000))
def test_t28_every_epoch_is_a_new_permutation(n, batch_size, seed):
    stream = ids(load(n, -(-3 * n // batch_size), batch_size=batch_size, seed=seed))
    epochs = stream[: 3 * n].reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


def test_t28_epochs_and_seeds_differ_and_samples_match_their_ids():
    batches = load(100, 20, batch_size=10, seed=1)
    first, second = ids(batches).reshape(2, 100)
    assert (first != second).mean() > 0.9 and (first != np.arange(100)).mean() > 0.9
    assert (ids(load(100, 10, batch_size=10, seed=2)) != first).mean() > 0.9
    for batch in batches:
        assert batch["sample_ids"].dtype == np.int32
        np.testing.assert_array_equal(batch["value"], batch["sample_ids"].astype(np.int64) ** 2)


def test_t20_a_late_start_reads_no_earlier_sample():
    class Watched(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    seen: list[int] = []
    batches = train_loader(
        Watched(squares(1000)), batch_size=2, seed=0, start_step=10**9, collate_fn=stack, threads=1
    )
    next(batches)
    assert len(seen) <= 2 * 4  # the batch itself and what is read ahead


@FEW
@given(st.integers(1, 30), st.integers(1, 8))
def test_t14_eval_pads_the_last_batch_with_weight_zero(n, batch_size):
    batches = list(eval_batches(squares(n), batch_size, stack))
    assert len(batches) == -(-n // batch_size)
    assert {len(batch["value"]) for batch in batches} == {batch_size}
    weights = np.concatenate([batch["weights"] for batch in batches])
    values = np.concatenate([batch["value"] for batch in batches])
    assert values[weights > 0].tolist() == squares(n)
    assert ids(batches)[weights > 0].tolist() == list(range(n))
    assert (ids(batches)[weights == 0] == -1).all()


def test_t28_eval_gives_every_process_as_many_batches():
    parts = [list(eval_batches(squares(5), 4, stack, slice(a, a + 2))) for a in (0, 2)]
    assert [len(part) for part in parts] == [2, 2]
    assert parts[0][1]["sample_ids"].tolist() == [4, -1]
    assert parts[1][1]["sample_ids"].tolist() == [-1, -1]
    assert parts[1][1]["weights"].sum() == 0


def test_a_dataset_smaller_than_a_batch_is_refused_with_the_arithmetic():
    with pytest.raises(UserError, match=r"has 5 examples, 3 fewer than .* batch_size=8 .* most 5"):
        load(5, 1, batch_size=8)


def mixed(start, steps, shares, **options):
    count = sum(one.count for one in shares)
    batches = train_loader(
        squares(count), batch_size=8, seed=options.pop("seed", 5), start_step=start,
        collate_fn=stack, shares=shares, **options,
    )  # fmt: skip
    return list(islice(batches, steps))


SHARES = (SourceShare(40, 0.7), SourceShare(7, 0.25), SourceShare(3, 0.05))


@pytest.mark.parametrize("start", [1, 7, 39])
def test_a_mixture_resumes_at_any_step(start):
    assert_same(mixed(0, 45, SHARES)[start : start + 5], mixed(start, 5, SHARES, threads=1))
    assert len(mixed(10**9, 1, SHARES)) == 1


def test_shares_are_those_of_the_drawn_examples_and_parts_keep_their_epochs():
    stream = ids(mixed(0, 100, SHARES))
    drawn = [np.flatnonzero((stream >= low) & (stream < low + n)) for low, n in ((0, 40), (40, 7))]
    assert len(drawn[0]) == pytest.approx(560, abs=2) and len(drawn[1]) == pytest.approx(200, abs=2)
    for places, low, n in ((drawn[0], 0, 40), (drawn[1], 40, 7)):
        epochs = stream[places][: len(places) // n * n].reshape(-1, n)
        assert all(sorted(epoch) == list(range(low, low + n)) for epoch in epochs)
        assert (epochs[0] != epochs[1]).any()
    assert (ids(mixed(0, 9, SHARES, seed=6)) != stream[:72]).mean() > 0.5


def test_processes_share_the_batches_of_a_mixture():
    whole, rows = mixed(0, 5, SHARES), (slice(0, 3), slice(3, 8))
    left, right = (mixed(0, 5, SHARES, rows=part) for part in rows)
    np.testing.assert_array_equal(
        ids(whole).reshape(5, 8), np.hstack([ids(left).reshape(5, 3), ids(right).reshape(5, 5)])
    )


@pytest.mark.parametrize("rows", [slice(0, 9), slice(3, 3), slice(-1, 2), slice(0, 8, 2)])
def test_rows_outside_the_batch_are_refused(rows):
    with pytest.raises(ValueError, match="batch_size=8"):
        load(20, 1, batch_size=8, rows=rows)


def test_an_error_in_a_reading_thread_keeps_its_kind_and_text():
    class Broken(list):
        def __getitem__(self, index):
            raise UserError("rows.jsonl:7: invalid JSON")

    batches = train_loader(Broken(squares(4)), batch_size=2, seed=0, start_step=0, collate_fn=stack)
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value) == "rows.jsonl:7: invalid JSON"
