"""Batches addressed by the global step: batch k depends on the seed and k alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from jaxft.core.cli.live import count_done
from jaxft.core.errors import UserError

HostBatch = dict[str, np.ndarray]


class Examples(Protocol):
    """A random-access dataset. Indexing must be safe in threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Collate(Protocol):
    """Stack of examples as `batch_rows` rows. Missing rows are padding with weight 0.

    With a layout, `examples` holds the list of examples of each row.
    """

    def __call__(self, examples: Sequence[Any], *, batch_rows: int) -> HostBatch: ...


class Batches(Protocol):
    """Batch k as a pure function of k. Indexing must be safe in threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class RowSharing(Protocol):
    """Groups of a batch's samples (by place in it) that share a row, equal on every process."""

    def __call__(self, sample_ids: Sequence[int]) -> list[list[int]]: ...


@dataclass(frozen=True)
class SourceShare:
    """A run of `count` examples of a dataset, which gives the part `share` of those drawn."""

    count: int
    share: float


def source_shares(counts: Sequence[int], shares: Sequence[float]) -> tuple[SourceShare, ...]:
    """Return the runs of examples of a mixture's parts. There are none without `shares`.

    Raises UserError for a part that has a share and no example.
    """
    if shares and 0 in counts:
        raise UserError(
            f"data.train: the part {counts.index(0) + 1} of the mixture leaves no example to train"
            " on; leave it out, or raise seq_len"
        )
    return tuple(SourceShare(*one) for one in zip(counts, shares, strict=False))


def describe_shares(shares: Sequence[SourceShare]) -> str:
    """Return the share of each part of a mixture in brackets, or nothing."""
    mixed = ", ".join(f"{one.share:.1%} from {one.count}" for one in shares)
    return f" ({mixed})" if mixed else ""


def sample_order(count: int, seed: int, shares: Sequence[SourceShare] = ()) -> Examples:
    """Return the endless stream of indices below `count`, any of which is read at equal cost.

    Every epoch is a new permutation. With `shares` each run of examples has epochs of its own, and
    the runs take turns by their shares. Any piece of the stream then has nearly those shares.
    """
    if not shares:
        return grain.MapDataset.source(range(count)).seed(seed).shuffle().repeat()
    parts, first = [], 0
    for place, one in enumerate(shares):
        own = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
        indices = range(first, first + one.count)
        parts.append(grain.MapDataset.source(indices).seed(own).shuffle().repeat())
        first += one.count
    return grain.MapDataset.mix(parts, [one.share for one in shares])


def train_loader(
    dataset: Examples,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    collate_fn: Collate,
    rows: slice | None = None,
    layout: RowSharing | None = None,
    shares: Sequence[SourceShare] = (),
    threads: int = 2,
) -> grain.DatasetIterator:
    """Return endless host batches from step `start_step` on, read ahead in threads.

    Batch k holds samples k*B .. (k+1)*B-1 of the stream of `sample_order`. `rows` is this
    process's slice of those B (all by default). With a `layout` samples share rows, and the process
    gets the same share of the batch's rows. Each batch has sample_ids int32 [rows], the index of
    each row's first sample. A start at a late step costs the same as a start at 0. Raises UserError
    if the dataset is smaller than a batch.
    """
    if len(dataset) < batch_size:
        raise UserError(
            f"{dataset!r} has {len(dataset)} examples, {batch_size - len(dataset)} fewer than one "
            f"batch: batch_size={batch_size} must be at most {len(dataset)}, or add data"
        )
    order = sample_order(len(dataset), seed, shares)
    batches = _Batches(
        dataset, order, batch_size, checked_rows(rows, batch_size), collate_fn, layout
    )
    iterator = read_ahead(batches, threads)
    iterator.set_state({"next_index": start_step})
    return iterator


def eval_batches(
    dataset: Examples,
    batch_size: int,
    collate_fn: Collate,
    rows: slice | None = None,
    threads: int = 2,
) -> Iterator[HostBatch]:
    """Return the whole dataset once, in order, as ceil(n / batch_size) batches of one shape.

    The last batch is padded by `collate_fn`. Padding rows have weight 0 and sample id -1. Every
    process gets the same number of batches. The live line counts them.
    """
    order = range(len(dataset))
    batches = _Batches(dataset, order, batch_size, checked_rows(rows, batch_size), collate_fn)
    return _counted(read_ahead(batches, threads), len(batches))


def _counted(batches: Iterator[HostBatch], total: int) -> Iterator[HostBatch]:
    for done, batch in enumerate(batches):
        count_done(done, total)
        yield batch


@dataclass(frozen=True)
class _Batches:
    """Batch k as a pure function of k. `order` maps a place in the sample stream to an index."""

    dataset: Examples
    order: Examples
    batch_size: int
    rows: slice
    collate_fn: Collate
    layout: RowSharing | None = None

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index: int) -> HostBatch:
        if self.layout is not None:
            return self._laid_out(index, self.layout)
        first = index * self.batch_size
        places = range(first + self.rows.start, first + self.rows.stop)
        ids = [int(self.order[place]) for place in places if place < len(self.order)]
        batch = self.collate_fn([self.dataset[i] for i in ids], batch_rows=len(places))
        sample_ids = np.full(len(places), -1, np.int32)
        sample_ids[: len(ids)] = ids
        return {**batch, "sample_ids": sample_ids}

    def _laid_out(self, index: int, layout: RowSharing) -> HostBatch:
        first = index * self.batch_size
        ids = [int(self.order[place]) for place in range(first, first + self.batch_size)]
        groups = layout(ids)
        own = slice(
            self.rows.start * len(groups) // self.batch_size,
            self.rows.stop * len(groups) // self.batch_size,
        )
        rows = [[self.dataset[ids[place]] for place in group] for group in groups[own]]
        firsts = [ids[group[0]] if group else -1 for group in groups[own]]
        batch = self.collate_fn(rows, batch_rows=len(rows))
        return {**batch, "sample_ids": np.asarray(firsts, np.int32)}


class Subset:
    """Some examples of a dataset, in the order of `ids`."""

    def __init__(self, data: Examples, ids: np.ndarray):
        self.data, self.ids = data, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        return self.data[int(self.ids[index])]


def subset(data: Examples, limit: int, seed: int) -> Subset:
    """Return `limit` random examples in order (all with limit 0), by the seed alone."""
    ids = np.arange(len(data))
    if 0 < limit < len(data):
        ids = np.sort(np.random.default_rng(seed).permutation(len(data))[:limit])
    return Subset(data, ids)


def checked_rows(rows: slice | None, batch_size: int) -> slice:
    """Return a process's slice of the batch, by default all. Raises ValueError for a bad slice."""
    if rows is None:
        return slice(0, batch_size)
    start, stop = rows.start or 0, batch_size if rows.stop is None else rows.stop
    if rows.step not in (None, 1) or not 0 <= start < stop <= batch_size:
        raise ValueError(f"rows={rows} must be a slice start:stop within batch_size={batch_size}")
    return slice(start, stop)


def read_ahead(batches: Batches, threads: int) -> grain.DatasetIterator:
    """Return the batches in order, read ahead in threads by up to 2 * `threads` batches."""
    # Threads, never worker processes, which would outlive a killed trainer.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))
