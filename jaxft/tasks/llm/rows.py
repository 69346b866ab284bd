"""Rows of tokens to train a language model on. Short examples are packed."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.core.config import Config
from jaxft.data.loader import train_loader
from jaxft.data.text import dataset as text
from jaxft.data.text.packing import Packing, collate, collate_rows, make_packing
from jaxft.data.text.pairs import PairDataset
from jaxft.tasks import Planned
from jaxft.tasks.llm.opened import OpenedDecoder

PER_ROW = 8  # examples that share a row of a plan


class TokenRows:
    """A tokenised set as batches of [batch_size, seq_len]. Implements `jaxft.tasks.Rows`.

    packing: assigns the examples of a batch to shared rows. None gives each example a row.
    """

    bad = ()  # a bad record stops the run

    def __init__(self, opened: OpenedDecoder, spec: str, training: bool):
        self.cfg, self.options, self.name = opened.cfg, opened.options, spec
        self.data = text.load_text(
            spec,
            opened.tokenizer,
            seq_len=self.options.seq_len,
            template=self.options.template,
            vocab_size=opened.model_cfg.vocab_size,
            cache=self.options.cache,
        )
        self.packing = shared(self.data, self.cfg, self.options.seq_len) if training else None

    def __len__(self) -> int:
        return len(self.data)

    @property
    def per_row(self) -> int:
        """Largest number of examples in one row."""
        return self.packing.per_row if self.packing else 1

    @property
    def width(self) -> int:
        """Largest number of trained positions in one row."""
        return min(self.per_row * self.data.report["longest_trained"], self.options.seq_len)

    def batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return train_loader(
            self.data,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            start_step=start_step,
            collate_fn=self._collate_shared if self.packing else self.collate,
            rows=rows,
            layout=self._groups if self.packing else None,
        )

    def spec(self, rows: slice) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
        count = rows.stop - rows.start
        if self.packing:
            count = count * self.packing.rows // self.cfg.batch_size
        yield _shapes(count, self.options.seq_len)

    def report(self) -> dict[str, Any]:
        labels = {"labels": list(self.data.labels)} if self.data.labels else {}
        return {**self.data.report, **labels}

    def describe(self) -> str:
        report = self.data.report
        cut = f", {report['truncated']} truncated to seq_len" if report["truncated"] else ""
        dropped = report["empty"] + report["untrained"]
        lost = f", {dropped} dropped (nothing to train in them)" if dropped else ""
        rows = f", {self.cfg.batch_size} packed in {self.packing.rows} rows" if self.packing else ""
        return (
            f"{self.name}: {len(self.data)} sequences of at most {self.options.seq_len}"
            f" tokens{rows}, {report['trained_tokens']} trained tokens{cut}{lost}"
        )

    def collate(self, examples: Sequence[text.Example], *, batch_rows: int) -> dict:
        """Return arrays [batch_rows, seq_len], one example a row."""
        return collate(examples, self.options.seq_len, batch_rows)

    def _collate_shared(self, examples: Any, *, batch_rows: int) -> dict[str, np.ndarray]:
        return collate_rows(examples, self.options.seq_len, batch_rows)

    def _groups(self, sample_ids: Sequence[int]) -> list[list[int]]:
        assert self.packing is not None
        return self.packing.groups([self.data.inputs(i) for i in sample_ids])


def planned(opened: OpenedDecoder) -> Planned:
    """Return full rows of [batch_size, seq_len], without examples.

    With `pack`, examples share them. Short examples would fill fewer rows.
    """
    options = opened.options
    shapes = _shapes(opened.cfg.batch_size, options.seq_len)
    return Planned(shapes, width=options.seq_len, per_row=PER_ROW if options.pack else 1)


def _shapes(count: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of each array of a batch of `count` rows."""
    batch = collate([], seq_len, count)
    batch["sample_ids"] = np.zeros(count, np.int32)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def shared(data: text.TextDataset | PairDataset, cfg: Config, room: int) -> Packing | None:
    """Return the packing of examples into rows of `room` positions, or None if it saves nothing."""
    if not cfg.own["pack"]:
        return None
    ways = jax.device_count() // max(cfg.mesh.tensor, 1)
    packing = make_packing(data.inputs, len(data), cfg.batch_size, cfg.micro_batches * ways, room)
    return packing if packing.per_row > 1 else None
