"""Rows of preference pairs. Both sides of a pair lie in one row, and short pairs share rows."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxft.data.loader import describe_shares, source_shares, train_loader
from jaxft.data.sources.mixtures import check_weights
from jaxft.data.text.packing import alone, collate_rows
from jaxft.data.text.pairs import Pair, load_pairs
from jaxft.tasks import Planned
from jaxft.tasks.llm.opened import OpenedDecoder
from jaxft.tasks.llm.options import LLMOptions
from jaxft.tasks.llm.rows import CHAT_FACT, shared


class PairItem(NamedTuple):
    """A pair, and the reference log-probabilities of its sides, chosen first."""

    pair: Pair
    reference: Float[np.ndarray, " 2"]


class PairRows:
    """A preference set as batches of [batch_size, 2 * seq_len]. Implements `jaxft.tasks.Rows`.

    A row has room for the two longest sides, so that a pair is never divided over rows, devices or
    micro-batches. packing: the layout of the pairs of a batch of training in rows.
    reference: log-probabilities [n, 2] at step 0, filled in by the task's `encode`.
    """

    bad = ()  # a bad record stops the run

    def __init__(self, opened: OpenedDecoder, spec: str, training: bool):
        self.cfg, self.options, self.name = opened.cfg, opened.options, spec
        mixture = check_weights(spec, training)
        self.data = load_pairs(
            spec,
            opened.tokenizer,
            seq_len=self.options.seq_len,
            labelled=self.options.objective == "kto",
            chat=opened.chat,
            vocab_size=opened.model_cfg.vocab_size,
            image_ids=opened.model_cfg.image_ids,
            cache=self.options.cache,
            columns=self.options.columns,
            pad_id=opened.pad_id if self.options.scored else None,
        )
        counts = self.data.records.counts(self.data.record_ids)
        self.shares = source_shares(counts, mixture.shares)
        size, self.room = self.cfg.batch_size, 2 * self.options.seq_len
        self.packing = alone(size, self.room)
        if training and self.options.pack:
            self.packing = shared(self.data, self.cfg, self.room, self.shares)
        self.reference: Float[np.ndarray, "n 2"] = np.zeros((len(self.data), 2), np.float32)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return repr(self.data)

    def __getitem__(self, index: int) -> PairItem:
        return PairItem(self.data[index], self.reference[index])

    @property
    def per_row(self) -> int:
        """Largest number of pairs in one row."""
        return self.packing.per_row

    @property
    def width(self) -> int:
        """Largest number of trained positions in one row."""
        return min(self.per_row * self.data.report["longest_trained"], self.room)

    def batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return train_loader(
            self,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            start_step=start_step,
            collate_fn=self._collate,
            rows=rows,
            layout=self._groups,
            shares=self.shares,
        )

    def spec(self, rows: slice) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
        for count in self.packing.own_counts(rows):
            yield _shapes(self.options, count, self.per_row)

    def report(self) -> dict[str, Any]:
        chat = {CHAT_FACT: self.data.chat.sha256} if self.data.chat else {}
        return {"prompted": 0, **self.data.report, **chat}

    def describe(self) -> str:
        report = self.data.report
        lost = {name: report[name] for name in ("truncated", "empty", "untrained", "equal")}
        counted = "".join(f", {count} {name}" for name, count in lost.items() if count)
        mixed = describe_shares(self.shares)
        kind = "labelled answers" if self.options.objective == "kto" else "pairs"
        compared = "" if self.options.scored else f", {report['trained_tokens']} compared tokens"
        return (
            f"{self.name}: {len(self)} {kind}{mixed} of at most {self.options.seq_len} tokens"
            f" a side{self.packing.describe()}{compared}{counted}"
            f"{f'; {self.data.chat.name}' if self.data.chat else ''}"
        )

    def _collate(self, examples: Sequence[Any], *, batch_rows: int) -> dict[str, np.ndarray]:
        return collate_pairs(examples, self.options, self.per_row, batch_rows)

    def _groups(self, sample_ids: Sequence[int]) -> list[list[int]]:
        return self.packing.groups([self.data.inputs(i) for i in sample_ids])


def collate_pairs(
    rows: Sequence[Sequence[PairItem]], options: LLMOptions, per_row: int, batch_rows: int
) -> dict[str, np.ndarray]:
    """Return the batch of `collate_rows` in which segments 2k - 1 and 2k are the sides of pair k.

    pairs: [batch_rows, per_row], 1 for a pair and 0 for padding. Where the objective needs them,
    reference: [batch_rows, per_row, 2] and desirable: bool [batch_rows, per_row].
    """
    sides = [[side for item in row for side in item.pair.sides] for row in rows]
    batch = collate_rows(sides, 2 * options.seq_len, batch_rows)
    batch["pairs"] = np.zeros((batch_rows, per_row), np.float32)
    if options.stores_reference:
        batch["reference"] = np.zeros((batch_rows, per_row, 2), np.float32)
    if options.objective == "kto":
        batch["desirable"] = np.zeros((batch_rows, per_row), bool)
    for i, row in enumerate(rows):
        for k, item in enumerate(row):
            batch["pairs"][i, k] = 1.0
            if "reference" in batch:
                batch["reference"][i, k] = item.reference
            if "desirable" in batch:
                batch["desirable"][i, k] = item.pair.desirable
    return batch


def planned_pairs(opened: OpenedDecoder) -> Planned:
    """Return full rows of [batch_size, 2 * seq_len], one pair each, without examples."""
    options = opened.options
    width = 2 if options.scored else 2 * options.seq_len
    return Planned(_shapes(options, opened.cfg.batch_size, 1), width=width)


def _shapes(options: LLMOptions, count: int, per_row: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of each array of a batch of `count` rows."""
    batch = collate_pairs([], options, per_row, count)
    batch["sample_ids"] = np.zeros(count, np.int32)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
