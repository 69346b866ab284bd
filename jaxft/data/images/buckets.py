"""Aspect-ratio buckets: the sizes of pictures, and batches of one size each."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import grain
import numpy as np
from jaxtyping import Int

from jaxft.core.errors import UserError
from jaxft.data.loader import Collate, Examples, HostBatch, checked_rows, read_ahead

Size = tuple[int, int]  # height, width


def make_buckets(resolution: int, multiple: int, max_ratio: float = 2.0) -> tuple[Size, ...]:
    """Return sizes (h, w) of about resolution^2 pixels and never more, sorted from wide to tall.

    Each long side has the longest possible short side. Both are multiples of `multiple`, and their
    ratio is at most `max_ratio`. The square is one of the sizes. Raises UserError if `resolution`
    is no multiple of `multiple`. Source: SDXL (arXiv 2307.01952, section 2.2).
    """
    if multiple < 1 or resolution < multiple or resolution % multiple:
        raise UserError(
            f"resolution={resolution} must be a multiple of {multiple}, such as "
            f"{max(1, round(resolution / max(multiple, 1))) * multiple}"
        )
    sizes = set()
    for long in range(resolution, int(resolution * max_ratio) + 1, multiple):
        short = resolution**2 // long // multiple * multiple
        if long <= max_ratio * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def assign(original_size: Size, buckets: Sequence[Size]) -> int:
    """Return the index of the bucket (h, w) whose aspect ratio is nearest on a log scale."""
    ratio = math.log(original_size[0] / original_size[1])
    distances = [abs(math.log(h / w) - ratio) for h, w in buckets]
    return min(range(len(buckets)), key=distances.__getitem__)


class BucketBatches:
    """Plan of an endless stream of batches of one bucket each, from (seed, k) alone.

    Every epoch is a new permutation inside the buckets and of the batches. A bucket's last batch
    is filled up with the bucket's first examples of the epoch, so that all batches have one size.

    bucket_of: int [n], the bucket of each example. batches: number of batches in an epoch.
    repeated: number of places in an epoch that repeat an example.
    short: number of examples of each bucket with fewer than a batch, by bucket.
    Raises UserError for a dataset smaller than a batch.
    """

    def __init__(self, bucket_of: Int[np.ndarray, " n"], batch_size: int, seed: int):
        n = len(bucket_of)
        if batch_size < 1 or n < batch_size:
            raise UserError(
                f"the dataset has {n} images, {batch_size - n} fewer than one batch: "
                f"batch_size={batch_size} must be from 1 to {n}, or add images"
                if n
                else "the dataset has 0 images: expected at least one batch of them"
            )
        self.batch_size, self._seed = batch_size, seed
        self._members = [np.flatnonzero(bucket_of == bucket) for bucket in np.unique(bucket_of)]
        self.batches = sum(-(-len(ids) // batch_size) for ids in self._members)
        self.repeated = self.batches * batch_size - n
        self.short = {
            int(bucket_of[ids[0]]): len(ids) for ids in self._members if len(ids) < batch_size
        }
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)  # threads may need two at once

    def plan(self, k: int) -> Int[np.ndarray, " batch_size"]:
        """Return the int32 ids of batch k's examples."""
        epoch, place = divmod(k, self.batches)
        return self._epoch(epoch)[place]

    def _make_epoch(self, epoch: int) -> Int[np.ndarray, "batches batch_size"]:
        rng = np.random.default_rng([self._seed, epoch])
        rows = []
        for ids in self._members:
            count = -(-len(ids) // self.batch_size)
            order = np.resize(rng.permutation(ids), (count, self.batch_size))  # repeats from start
            rows.append(order.astype(np.int32))
        return rng.permutation(np.concatenate(rows))


@dataclass(frozen=True)
class _Planned:
    """This process's rows of batch k by its plan."""

    dataset: Examples
    plan: BucketBatches
    rows: slice
    collate_fn: Collate

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> HostBatch:
        whole = self.plan.plan(index)
        ids = whole[self.rows]
        batch = self.collate_fn([self.dataset[int(i)] for i in ids], batch_rows=len(ids))
        # The k-th repetition of an example adds k * n to its id, so that it gets its own noise.
        order = np.argsort(whole, kind="stable")
        first = np.searchsorted(whole[order], whole[order])
        apart = whole.astype(np.int32)
        apart[order] += (len(self.dataset) * (np.arange(len(whole)) - first)).astype(np.int32)
        return {**batch, "sample_ids": apart[self.rows]}


def bucket_loader(
    dataset: Examples,
    plan: BucketBatches,
    *,
    start_step: int,
    collate_fn: Collate,
    rows: slice | None = None,
    threads: int = 2,
) -> grain.DatasetIterator:
    """Return endless host batches of one bucket each from step `start_step` on, read ahead.

    The batches are like those of `train_loader`. `rows` is this process's slice of every batch.
    sample_ids int32 [rows] identify the examples modulo their number, and no two rows of a batch
    share an id. A late start costs nothing.
    """
    rows = checked_rows(rows, plan.batch_size)
    iterator = read_ahead(_Planned(dataset, plan, rows, collate_fn), threads)
    iterator.set_state({"next_index": start_step})
    return iterator
