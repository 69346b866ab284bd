"""Rows of labelled texts. Short texts are packed."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.data.loader import describe_shares, source_shares, train_loader
from jaxft.data.sources.mixtures import check_weights
from jaxft.data.text.labelled import Labelled, LabelRule, load_labelled
from jaxft.data.text.packing import alone, collate_rows
from jaxft.tasks import Planned
from jaxft.tasks.llm.opened import OpenedDecoder
from jaxft.tasks.llm.options import SINGLE_LABEL
from jaxft.tasks.llm.rows import PER_ROW, shared


class LabelledRows:
    """A labelled set as batches of [batch_size, seq_len]. Implements `jaxft.tasks.Rows`.

    packing: the layout of the texts of a batch of training in rows.
    """

    bad = ()  # a bad record stops the run

    def __init__(self, opened: OpenedDecoder, spec: str, training: bool):
        self.cfg, self.options, self.name = opened.cfg, opened.options, spec
        mixture = check_weights(spec, training)
        self.rule = LabelRule(opened.labels, self.options.problem_type)
        self.data = load_labelled(
            spec,
            opened.tokenizer,
            self.rule,
            seq_len=self.options.seq_len,
            pad_id=opened.pad_id,
            vocab_size=opened.model_cfg.vocab_size,
            cache=self.options.cache,
            columns=self.options.columns,
        )
        counts = self.data.records.counts(self.data.record_ids)
        self.shares = source_shares(counts, mixture.shares)
        size, room = self.cfg.batch_size, self.options.seq_len
        self.packing = alone(size, room)
        if training and self.options.pack:
            self.packing = shared(self.data, self.cfg, room, self.shares)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def per_row(self) -> int:
        """Largest number of texts in one row."""
        return self.packing.per_row

    @property
    def width(self) -> int:
        """Number of positions of a row at which the head is read."""
        return self.per_row

    def batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return train_loader(
            self.data,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            start_step=start_step,
            collate_fn=self._collate_shared,
            rows=rows,
            layout=self._groups,
            shares=self.shares,
        )

    def spec(self, rows: slice) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
        for count in self.packing.own_counts(rows):
            yield _shapes(self.rule, self.options.seq_len, count, self.per_row)

    def report(self) -> dict[str, Any]:
        return {**self.data.report, "labels": list(self.rule.names)}

    def describe(self) -> str:
        report, packed = self.data.report, self.packing.describe()
        mixed = describe_shares(self.shares)
        lost = {name: report[name] for name in ("truncated", "empty")}
        counted = "".join(f", {count} {name}" for name, count in lost.items() if count)
        return (
            f"{self.name}: {len(self)} texts{mixed} of at most {self.options.seq_len} tokens"
            f"{packed}{counted}, {len(self.rule.names)} labels ({self.options.problem_type})"
        )

    def collate(self, examples: Sequence[Any], *, batch_rows: int) -> dict[str, np.ndarray]:
        """Return a batch with one text a row."""
        return self._collate_shared([[one] for one in examples], batch_rows=batch_rows)

    def _collate_shared(self, examples: Any, *, batch_rows: int) -> dict[str, np.ndarray]:
        return collate_labelled(examples, self.rule, self.options.seq_len, self.per_row, batch_rows)

    def _groups(self, sample_ids: Sequence[int]) -> list[list[int]]:
        return self.packing.groups([self.data.inputs(i) for i in sample_ids])


def collate_labelled(
    rows: Sequence[Sequence[Labelled]], rule: LabelRule, seq_len: int, per_row: int, batch_rows: int
) -> dict[str, np.ndarray]:
    """Return the batch of `collate_rows`, whose weights mark where the head is read, and labels.

    labels: int32 [batch_rows, per_row], or float32 [batch_rows, per_row, C].
    """
    batch = collate_rows([[one.example for one in row] for row in rows], seq_len, batch_rows)
    del batch["targets"]
    single = rule.problem == SINGLE_LABEL
    shape = (batch_rows, per_row) if single else (batch_rows, per_row, len(rule.names))
    batch["labels"] = np.zeros(shape, np.int32 if single else np.float32)
    for i, row in enumerate(rows):
        for k, one in enumerate(row):
            batch["labels"][i, k] = one.label
    return batch


def planned_labelled(opened: OpenedDecoder) -> Planned:
    """Return full rows of [batch_size, seq_len], without texts. With `pack`, texts share them."""
    options, per_row = opened.options, PER_ROW if opened.options.pack else 1
    rule = LabelRule(opened.labels, options.problem_type)
    shapes = _shapes(rule, options.seq_len, opened.cfg.batch_size, per_row)
    return Planned(shapes, width=per_row, per_row=per_row)


def _shapes(
    rule: LabelRule, seq_len: int, count: int, per_row: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of each array of a batch of `count` rows."""
    batch = collate_labelled([], rule, seq_len, per_row, count)
    batch["sample_ids"] = np.zeros(count, np.int32)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
