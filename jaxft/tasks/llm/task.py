"""Causal language models of the LLaMA family: text, answers to prompts, labels, preferences."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxft.core.params import Params
from jaxft.nn.embedding import untrained_rows
from jaxft.objectives.next_token import NextToken
from jaxft.objectives.preference import Preference
from jaxft.tasks import Data, Planned, Preview, Task
from jaxft.tasks.llm.exports import WRITERS
from jaxft.tasks.llm.opened import OpenedDecoder
from jaxft.tasks.llm.pairs import PairRows, planned_pairs
from jaxft.tasks.llm.preference import PairPreview, encode, make_preference
from jaxft.tasks.llm.preview import DecoderPreview
from jaxft.tasks.llm.rows import TokenRows, planned
from jaxft.weights.transfer import to_host

EMBEDDINGS = "embed_tokens.embedding"


def _read(opened: OpenedDecoder, spec: str, training: bool) -> Any:
    rows = PairRows if opened.options.pairs else TokenRows
    return rows(opened, spec, training)


def _encode(
    opened: OpenedDecoder, params: Params, chosen: set[str], sets: Sequence[Any], initial: Any
) -> None:
    """Warn of markers of the chat template without a trained embedding, then encode pairs."""
    if opened.chat and any(rows.data.chat for rows in sets) and EMBEDDINGS not in chosen:
        ids = np.asarray(opened.chat.markers)
        lost = ids[to_host(jax.jit(untrained_rows)(params[EMBEDDINGS], ids))].tolist()
        if lost and jax.process_index() == 0:
            names = ", ".join(opened.tokenizer.convert_ids_to_tokens(lost))
            print(
                f"warning: {opened.chat.name} uses {names}, whose rows of the embedding table look"
                " untrained and stay so: train the table too, with trainable="
                r"'.*lora_.*|embed_tokens\.embedding|lm_head\..*', or take the model's instruct"
                " checkpoint",
                flush=True,
            )
    encode(opened, params, chosen, sets, initial)


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
    encode=_encode,
    objective=_objective,
    preview=_preview,
    writers=WRITERS,
)
