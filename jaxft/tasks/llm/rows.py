"""Rows of tokens to train a language model on. Short examples are packed."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.core.configs.schema import Config
from jaxft.core.errors import UserError
from jaxft.core.sharding import batch_ways
from jaxft.data.loader import SourceShare, describe_shares, sample_order, train_loader
from jaxft.data.sources.mixtures import Mixture, check_weights
from jaxft.data.sources.texts.columns import check_renamed
from jaxft.data.text import dataset as text
from jaxft.data.text.labelled import LabelledDataset
from jaxft.data.text.mixture import MixedText
from jaxft.data.text.packing import Packing, alone, collate, collate_rows, make_packing
from jaxft.data.text.pairs import PairDataset
from jaxft.data.text.templates import record_kind
from jaxft.tasks import Planned
from jaxft.tasks.llm.opened import OpenedDecoder

CHAT_FACT = "chat_template_sha256"  # key of a report on conversations
KIND_FACT = "record_fields"  # key of a report: the fields of its records
PER_ROW = 8  # examples that share a row of a plan


class TokenRows:
    """A tokenised set as batches of [batch_size, seq_len]. Implements `jaxft.tasks.Rows`.

    packing: the layout of the examples of a batch of training in rows.
    """

    bad = ()  # a bad record stops the run

    def __init__(self, opened: OpenedDecoder, spec: str, training: bool):
        self.cfg, self.options, self.name = opened.cfg, opened.options, spec
        self.data = self._read(opened, check_weights(spec, training), training)
        self.shares = self.data.shares if isinstance(self.data, MixedText) else ()
        size, room = self.cfg.batch_size, self.options.seq_len
        self.packing = alone(size, room)
        if training and self.options.pack:
            self.packing = shared(self.data, self.cfg, room, self.shares)

    def _read(
        self, opened: OpenedDecoder, mixture: Mixture, training: bool
    ) -> text.TextDataset | MixedText:
        parts = [
            text.load_text(
                spec,
                opened.tokenizer,
                seq_len=self.options.seq_len,
                template=self.options.template,
                chat=opened.chat,
                vocab_size=opened.model_cfg.vocab_size,
                image_ids=opened.model_cfg.image_ids,
                cache=self.options.cache,
                columns=self.options.columns,
            )
            for spec in mixture.specs
        ]
        check_renamed([part.records for part in parts], self.options.columns)
        if len({bool(part.labels) for part in parts}) > 1 and not training:
            raise UserError(
                f"data.eval={self.name!r} mixes records with a label and records without: evaluate"
                " them in two runs"
            )
        return parts[0] if len(parts) == 1 else MixedText(self.name, parts, mixture.shares)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def per_row(self) -> int:
        """Largest number of examples in one row."""
        return self.packing.per_row

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
            collate_fn=self._collate_shared,
            rows=rows,
            layout=self._groups,
            shares=self.shares,
        )

    def spec(self, rows: slice) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
        for count in self.packing.own_counts(rows):
            yield _shapes(count, self.options.seq_len)

    def report(self) -> dict[str, Any]:
        labels = {"labels": list(self.data.labels)} if self.data.labels else {}
        chat = {CHAT_FACT: self.data.chat.sha256} if self.data.chat else {}
        kind = record_kind(self.data.records[0], self.data.records.where(0))
        return {**self.data.report, **labels, **chat, KIND_FACT: list(kind)}

    def describe(self) -> str:
        report, packed = self.data.report, self.packing.describe()
        cut = f", {report['truncated']} truncated to seq_len" if report["truncated"] else ""
        dropped = report["empty"] + report["untrained"]
        lost = f", {dropped} dropped (nothing to train in them)" if dropped else ""
        mixed = describe_shares(self.shares)
        return (
            f"{self.name}: {len(self.data)} sequences{mixed} of at most {self.options.seq_len}"
            f" tokens{packed}, {report['trained_tokens']} trained tokens{cut}{lost}"
            f"{_chat_notes(self.data) if self.data.chat else ''}"
        )

    def collate(self, examples: Sequence[text.Example], *, batch_rows: int) -> dict:
        """Return arrays [batch_rows, seq_len], one example a row."""
        return collate(examples, self.options.seq_len, batch_rows)

    def _collate_shared(self, examples: Any, *, batch_rows: int) -> dict[str, np.ndarray]:
        return collate_rows(examples, self.options.seq_len, batch_rows)

    def _groups(self, sample_ids: Sequence[int]) -> list[list[int]]:
        return self.packing.groups([self.data.inputs(i) for i in sample_ids])


def _chat_notes(data: text.TextDataset | MixedText) -> str:
    """Return the format of conversations and the counts that a user should look at."""
    parts = data.parts if isinstance(data, MixedText) else (data,)
    first, chat = next((part, part.chat) for part in parts if part.chat)
    kind, report = record_kind(first.records[0], ""), data.report
    if kind[0] == "messages":
        turns = ""
    elif kind[0] == "conversations":
        turns = " (ShareGPT turns as messages)"
    else:
        turns = f" ({kind[0]} and {kind[-1]} as user and assistant turns)"
    counts = {
        "too_long": "dropped, as their last round is longer than seq_len",
        "merged": "with an answer whose first token begins before it and is not trained",
        "prompted": "trained from the generation prompt on (thoughts or tool calls)",
        "lost_thoughts": "whose thoughts the template leaves out",
        "added_eos": "end with EOS, as the template ends the last answer without a token",
        "not_round_trip": "that the tokenizer does not decode to the same text",
    }
    notes = [f"{report[name]} {meaning}" for name, meaning in counts.items() if report[name]]
    return "; ".join([f"; {chat.name}{turns}", *notes])


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


def shared(
    data: text.TextDataset | MixedText | PairDataset | LabelledDataset,
    cfg: Config,
    room: int,
    shares: Sequence[SourceShare] = (),
) -> Packing:
    """Return the layout of a batch in shared rows of `room` positions, for the mesh in use."""
    ways = batch_ways(jax.sharding.get_abstract_mesh())
    drawn = sample_order(len(data), cfg.seed, shares) if shares else range(len(data))
    return make_packing(
        lambda place: data.inputs(drawn[place]),
        len(data),
        cfg.batch_size,
        cfg.micro_batches * ways,
        room,
    )
