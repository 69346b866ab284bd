"""Causal language models of the LLaMA family: text, answers to prompts, labels, preferences."""

from typing import Any

from jaxft.objectives.next_token import NextToken
from jaxft.objectives.preference import Preference
from jaxft.tasks import Data, Planned, Preview, Task
from jaxft.tasks.llm.exports import WRITERS
from jaxft.tasks.llm.opened import OpenedDecoder
from jaxft.tasks.llm.pairs import PairRows, planned_pairs
from jaxft.tasks.llm.preference import PairPreview, encode, make_preference
from jaxft.tasks.llm.preview import DecoderPreview
from jaxft.tasks.llm.rows import TokenRows, planned


def _read(opened: OpenedDecoder, spec: str, training: bool) -> Any:
    rows = PairRows if opened.options.pairs else TokenRows
    return rows(opened, spec, training)


def _plan(opened: OpenedDecoder) -> Planned:
    return planned_pairs(opened) if opened.options.pairs else planned(opened)


def _preview(opened: OpenedDecoder, data: Data) -> Preview:
    return PairPreview(opened, data) if opened.options.pairs else DecoderPreview(opened, data)


def _objective(
    opened: OpenedDecoder, rows: TokenRows | PairRows | Planned
) -> NextToken | Preference:
    if opened.options.pairs:
        return make_preference(opened, rows.width, rows.per_row)
    seq_len, flops = opened.options.seq_len, opened.architecture.flops
    assert flops is not None  # every decoder has it
    return NextToken(
        opened.dtype,
        seq_len,
        rows.width,
        per_row=rows.per_row,
        dropout=bool(opened.cfg.lora.dropout),
        token_flops=flops(opened.model_cfg, seq_len),
    )


LLM = Task(
    open=OpenedDecoder,
    read=_read,
    plan=_plan,
    encode=encode,
    objective=_objective,
    preview=_preview,
    writers=WRITERS,
)
