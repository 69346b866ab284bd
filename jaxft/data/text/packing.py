"""Packing of short examples in shared rows: same examples a step, same sums, less padding."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxft.data.text.dataset import Example

Groups = list[list[int]]
TRIALS = 64  # random batches, from which the numbers of rows are chosen


class Packing(NamedTuple):
    """Layout of a batch of `examples` in rows of `seq_len` inputs, at most `per_row` of them each.

    counts: the numbers of rows that nine of ten random batches need, and all of TRIALS. A batch has
    the first of them that is enough. One that needs still more has as many as it needs. All are
    multiples of `multiple` (micro-batches times devices), so that devices get equally many.
    """

    counts: tuple[int, ...]
    multiple: int
    examples: int
    per_row: int
    seq_len: int

    def groups(self, lengths: Sequence[int]) -> Groups:
        """Return the examples (by place) of each row of a batch, as a function of lengths alone."""
        packed = [] if self.per_row == 1 else first_fit(lengths, self.seq_len, self.per_row)
        needed = -(-len(packed) // self.multiple) * self.multiple
        rows = next((count for count in self.counts if count >= needed), needed)
        if rows >= self.examples:
            return [[place] for place in range(self.examples)]
        return packed + [[] for _ in range(rows - len(packed))]

    def own_counts(self, own: slice) -> list[int]:
        """Return `counts` for a process that has `own` of the examples."""
        return [count * (own.stop - own.start) // self.examples for count in self.counts]

    def describe(self) -> str:
        return f", {self.examples} packed in {self.counts[0]} rows" if self.per_row > 1 else ""


def alone(examples: int, seq_len: int) -> Packing:
    """Return the layout that gives each example a row."""
    return Packing((examples,), 1, examples, 1, seq_len)


def make_packing(
    length_of: Callable[[int], int], count: int, examples: int, multiple: int, seq_len: int
) -> Packing:
    """Choose the numbers of rows by random batches.

    `length_of(i)` is the number of inputs of example i, of `count` in the dataset. If packing
    saves no row, every example has its own row.
    """
    rng = np.random.default_rng(0)
    drawn = [[length_of(int(i)) for i in rng.integers(0, count, examples)] for _ in range(TRIALS)]
    mean = np.mean(drawn)
    per_row = max(1, round(2 * seq_len / mean))
    needed = [len(first_fit(lengths, seq_len, per_row)) for lengths in drawn]
    counts = int(np.quantile(needed, 0.9)), max(needed)
    usual, most = (-(-one // multiple) * multiple for one in counts)
    if usual >= examples:
        return alone(examples, seq_len)
    counts = {usual, min(most, examples)}
    return Packing(tuple(sorted(counts)), multiple, examples, per_row, seq_len)


def first_fit(lengths: Sequence[int], room: int, per_row: int) -> Groups:
    """Return the places in each row by first-fit decreasing: longest first, first row with room."""
    groups: Groups = []
    free: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next(
            (
                r
                for r in range(len(groups))
                if free[r] >= lengths[place] and len(groups[r]) < per_row
            ),
            len(groups),
        )
        if row == len(groups):
            groups.append([])
            free.append(room)
        groups[row].append(place)
        free[row] -= lengths[place]
    return groups


def collate(
    examples: Sequence[Example], seq_len: int, batch_rows: int | None = None
) -> dict[str, np.ndarray]:
    """Return the batch of `collate_rows` with one example a row."""
    return collate_rows([[example] for example in examples], seq_len, batch_rows)


def collate_rows(
    rows: Sequence[Sequence[Example]], seq_len: int, batch_rows: int | None = None
) -> dict[str, np.ndarray]:
    """Return [batch_rows, seq_len] arrays in which position t predicts `targets[t]`.

    tokens, targets, segment_ids (1, 2, … for a row's examples, 0 for padding) and positions (from
    0 in every segment) are int32, weights are float32. Rows past `rows` are padding with weight 0.
    Only segment_ids mark padding. Raises ValueError for too many rows or a row that is too long.
    """
    n_rows = len(rows) if batch_rows is None else batch_rows
    if n_rows < len(rows):
        raise ValueError(f"batch_rows={n_rows} is fewer than the {len(rows)} examples")
    names = ("tokens", "targets", "segment_ids", "positions")
    batch: dict[str, np.ndarray] = {n: np.zeros((n_rows, seq_len), np.int32) for n in names}
    batch["weights"] = np.zeros((n_rows, seq_len), np.float32)
    for row, examples in enumerate(rows):
        start = 0
        for segment, (tokens, weights) in enumerate(examples, 1):
            n = len(tokens) - 1
            if start + n > seq_len:
                raise ValueError(f"an example of {n + 1} tokens does not fit seq_len={seq_len} + 1")
            place = (row, slice(start, start + n))
            batch["tokens"][place] = tokens[:-1]
            batch["targets"][place] = tokens[1:]
            batch["weights"][place] = weights[1:]
            batch["segment_ids"][place] = segment
            batch["positions"][place] = np.arange(n)
            start += n
    return batch
