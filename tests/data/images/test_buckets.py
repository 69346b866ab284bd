"""Buckets: lawful sizes, batches of one size, and batch k from the seed and k alone."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.core.errors import UserError
from jaxft.data.images.buckets import BucketBatches, assign, bucket_loader, make_buckets

FEW = settings(max_examples=30, deadline=None)


@FEW
@given(st.integers(1, 24), st.sampled_from([8, 16, 64]), st.floats(1, 4))
def test_buckets_are_multiples_of_bounded_area_and_ratio(times, multiple, max_ratio):
    resolution = times * multiple
    sizes = make_buckets(resolution, multiple, max_ratio)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for h, w in sizes:
        assert h % multiple == w % multiple == 0 and h * w <= resolution**2
        assert max(h, w) <= max_ratio * min(h, w) and (w, h) in sizes
        # No side could grow: the bucket uses the area it may.
        assert (min(h, w) + multiple) * max(h, w) > resolution**2
    assert list(sizes) == sorted(sizes, key=lambda size: size[0] / size[1])


def test_buckets_of_sdxl():
    sizes = make_buckets(1024, 64)
    assert {(1024, 1024), (832, 1216), (896, 1152), (768, 1344), (1216, 832)} <= set(sizes)
    assert make_buckets(64, 8) == ((48, 80), (56, 72), (64, 64), (72, 56), (80, 48))


@pytest.mark.parametrize("resolution, multiple", [(100, 64), (32, 64), (0, 8), (64, 0)])
def test_a_resolution_off_the_grid_is_refused(resolution, multiple):
    with pytest.raises(UserError, match=f"resolution={resolution} must be a multiple"):
        make_buckets(resolution, multiple)


@pytest.mark.parametrize(
    "size, expected",
    [((500, 500), (64, 64)), ((9, 16), (48, 80)), ((16, 9), (80, 48)), ((1, 99), (48, 80)),
     ((3000, 3100), (64, 64)), ((560, 720), (56, 72))],
)  # fmt: skip
def test_the_nearest_log_aspect_ratio_wins(size, expected):
    buckets = make_buckets(64, 8)
    assert buckets[assign(size, buckets)] == expected


def test_wide_and_tall_pictures_are_treated_alike():
    buckets = make_buckets(512, 64)
    for h in range(100, 1000, 13):
        bucket = buckets[assign((h, 400), buckets)]
        assert buckets[assign((400, h), buckets)] == bucket[::-1]


bucket_sets = st.lists(st.integers(0, 4), min_size=9, max_size=80).map(np.asarray)


@FEW
@given(bucket_sets, st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_every_epoch_holds_each_example_in_batches_of_one_bucket(bucket_of, batch_size, seed):
    plan = BucketBatches(bucket_of, batch_size, seed)
    for epoch in range(2):
        rows = [plan.plan(epoch * plan.batches + place) for place in range(plan.batches)]
        assert all(len(set(bucket_of[ids])) == 1 and len(ids) == batch_size for ids in rows)
        counts = np.bincount(np.concatenate(rows), minlength=len(bucket_of))
        assert counts.min() >= 1 and (counts - 1).sum() == plan.repeated
        for bucket in set(bucket_of):  # the repeats are spread over the bucket
            inside = counts[bucket_of == bucket]
            assert inside.max() - inside.min() <= 1
    sizes = {int(b): int((bucket_of == b).sum()) for b in set(bucket_of)}
    assert plan.short == {b: n for b, n in sizes.items() if n < batch_size}


@FEW
@given(bucket_sets, st.integers(1, 9), st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_batch_k_depends_on_the_seed_and_k_alone(bucket_of, batch_size, steps):
    plan = BucketBatches(bucket_of, batch_size, 3)
    asked = {k: plan.plan(k) for k in steps}
    for k in reversed(steps):
        np.testing.assert_array_equal(asked[k], BucketBatches(bucket_of, batch_size, 3).plan(k))


def test_epochs_seeds_and_batch_order_differ():
    bucket_of = np.arange(200) % 2
    plan = BucketBatches(bucket_of, 10, 0)
    first, second = (np.stack([plan.plan(e * 20 + i) for i in range(20)]) for e in (0, 1))
    other = np.stack([BucketBatches(bucket_of, 10, 1).plan(i) for i in range(20)])
    assert (first != second).mean() > 0.9 and (first != other).mean() > 0.9
    buckets = bucket_of[first[:, 0]]
    assert buckets.tolist() not in ([0] * 10 + [1] * 10, [1] * 10 + [0] * 10)


def test_too_few_images_are_refused_with_the_arithmetic():
    with pytest.raises(UserError, match=r"has 5 images, 3 fewer than .* batch_size=8 .* 1 to 5"):
        BucketBatches(np.zeros(5, int), 8, 0)
    with pytest.raises(UserError, match="has 0 images"):
        BucketBatches(np.zeros(0, int), 8, 0)


class Sizes:
    """Example i is an array of i's, as long as its bucket's size."""

    bucket_of = np.asarray([0, 1, 1, 2, 0, 1, 0, 2, 0, 1, 1])

    def __len__(self):
        return len(self.bucket_of)

    def __getitem__(self, index):
        return np.full(3 + self.bucket_of[index], index)


def stack(examples, *, batch_rows):
    assert len(examples) == batch_rows
    return {"value": np.stack(examples)}


def load(steps, start=0, rows=None, threads=2):
    plan = BucketBatches(Sizes.bucket_of, 4, seed=5)
    batches = bucket_loader(
        Sizes(), plan, start_step=start, collate_fn=stack, rows=rows, threads=threads
    )
    return list(islice(batches, steps))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"value", "sample_ids"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("start", [0, 1, 3, 4, 11])
def test_resume_equals_the_uninterrupted_stream(start):
    assert_same(load(start + 5)[start:], load(5, start=start, threads=4))


def test_rows_of_all_hosts_unite_to_the_global_batch():
    parts = [load(12, rows=slice(at, at + 2)) for at in (0, 2)]
    both = [
        {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)
    ]
    assert_same(load(12), both)


def test_batches_carry_their_sample_ids():
    for batch in load(12):
        assert batch["sample_ids"].dtype == np.int32
        np.testing.assert_array_equal(batch["value"][:, 0], batch["sample_ids"] % len(Sizes()))


def test_an_example_that_fills_a_batch_up_draws_noise_of_its_own():
    """Rows of one id have one PRNG key: the same noise and timestep again would teach nothing."""
    repeated = 0
    for batch in load(12):
        repeated += len(batch["value"]) - len(np.unique(batch["value"][:, 0]))
        assert len(np.unique(batch["sample_ids"])) == len(batch["sample_ids"])
    assert repeated, "a bucket is to be shorter than the batch"


def test_a_late_start_reads_no_earlier_example():
    assert_same(load(1, start=10**12, threads=1), load(1, start=10**12))


def test_rows_outside_the_batch_are_refused():
    with pytest.raises(ValueError, match="batch_size=4"):
        load(1, rows=slice(2, 5))
