"""Short examples share rows: the same examples a step, the same sums, less padding to compute."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Groups = list[list[int]]
TRIALS = 64  # random batches that the usual number of rows is chosen from


class Packing(NamedTuple):
    """How a batch of `examples` is laid out: in `rows` of `seq_len` inputs, at most `per_row` each.

    A batch that does not fit takes more rows (one more compiled shape), always a multiple of
    `multiple` (micro-batches times devices), so that every part of the mesh gets as many.
    """

    rows: int
    multiple: int
    examples: int
    per_row: int
    seq_len: int

    def groups(self, lengths: Sequence[int]) -> Groups:
        """Which examples of a batch, by place, share which row: a pure function of the lengths."""
        packed = first_fit(lengths, self.seq_len, self.per_row)
        rows = max(self.rows, -(-len(packed) // self.multiple) * self.multiple)
        if rows >= self.examples:
            return [[place] for place in range(self.examples)]
        return packed + [[] for _ in range(rows - len(packed))]


def make_packing(
    length_of: Callable[[int], int], count: int, examples: int, multiple: int, seq_len: int
) -> Packing:
    """Choose the rows that nine of ten random batches of a dataset of `count` examples fit in.

    `length_of(i)` is the number of inputs of example i. Where sharing saves no row, every example
    keeps its own.
    """
    rng = np.random.default_rng(0)
    drawn = [[length_of(int(i)) for i in rng.integers(0, count, examples)] for _ in range(TRIALS)]
    mean = np.mean(drawn)
    per_row = max(1, round(2 * seq_len / mean))
    needed = [len(first_fit(lengths, seq_len, per_row)) for lengths in drawn]
    rows = -(-int(np.quantile(needed, 0.9)) // multiple) * multiple
    if rows >= examples:
        return Packing(examples, multiple, examples, 1, seq_len)
    return Packing(rows, multiple, examples, per_row, seq_len)


def first_fit(lengths: Sequence[int], room: int, per_row: int) -> Groups:
    """First-fit decreasing: longest first, each into the first row with room for it."""
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
