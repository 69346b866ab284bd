"""Causal language models: text, answers to prompts, preferences, classes of texts, rewards."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft.core.params import Params
from jaxft.nn.embedding import untrained_rows
from jaxft.objectives.classification import Classification
from jaxft.objectives.distillation import Distillation
from jaxft.objectives.next_token import NextToken
from jaxft.objectives.preference import Preference
from jaxft.tasks import Data, Objective, Planned, Preview, Task
from jaxft.tasks.llm.exports import WRITERS
from jaxft.tasks.llm.heads.preview import ScorePreview
from jaxft.tasks.llm.heads.rows import LabelledRows, planned_labelled
from jaxft.tasks.llm.opened import OpenedDecoder
from jaxft.tasks.llm.pairs import PairRows, planned_pairs
from jaxft.tasks.llm.preference import PairPreview, encode, make_preference
from jaxft.tasks.llm.preview import DecoderPreview
from jaxft.tasks.llm.rows import TokenRows, planned
from jaxft.weights.transfer import to_host

EMBEDDINGS = "embed_tokens.embedding"


class Kind(NamedTuple):
    """The parts of a task on one kind of examples. `loss(opened, rows)` returns the objective."""

    rows: Callable[[OpenedDecoder, str, bool], Any]
    plan: Callable[[OpenedDecoder], Planned]
    loss: Callable[[OpenedDecoder, Any], Objective]
    preview: Callable[[OpenedDecoder, Data], Preview]


def _next_token(opened: OpenedDecoder, rows: Any) -> NextToken:
    seq_len, flops = opened.options.seq_len, opened.architecture.flops
    assert flops is not None  # every decoder has it
    return NextToken(
        opened.dtype,
        seq_len,
        rows.width,
        per_row=rows.per_row,
        dropout=bool(opened.cfg.lora.dropout),
        token_flops=flops(opened.model_cfg, seq_len),
        router_loss=opened.router_loss,
    )


def _preference(opened: OpenedDecoder, rows: Any) -> Preference:
    return make_preference(opened, rows.width, rows.per_row)


def _classification(opened: OpenedDecoder, rows: Any) -> Classification:
    return Classification(_next_token(opened, rows), opened.options.problem_type)


def _taught_rows(opened: OpenedDecoder, spec: str, training: bool) -> TokenRows:
    """Return the rows of a distillation. Raises UserError to train without its teacher."""
    if training and opened.lost_teacher:
        raise opened.lost_teacher
    return TokenRows(opened, spec, training)


def _distillation(opened: OpenedDecoder, rows: Any) -> Distillation:
    keys, teacher = opened.options.distill, opened.teacher
    if teacher is None:
        raise opened.lost_teacher or AssertionError("objective=distill has a teacher")
    flops = teacher.architecture.flops(teacher.cfg, opened.options.seq_len)
    return Distillation(_next_token(opened, rows), keys.weight, keys.temperature, flops)


def _encode(opened: OpenedDecoder, chosen: set[str], sets: Sequence[Any], load: Any) -> Params:
    """Warn of markers of the chat template without a trained embedding, then encode pairs."""
    chats, params = any(rows.data.chat for rows in sets), {}
    if chats and opened.chat and EMBEDDINGS not in chosen:
        params = load({EMBEDDINGS})
        ids = np.asarray([i for i in opened.chat.markers if i not in opened.parts[0].rows], int)
        lost = ids[to_host(jax.jit(untrained_rows)(params[EMBEDDINGS], ids))].tolist()
        if lost and jax.process_index() == 0:
            names = ",".join(opened.tokenizer.convert_ids_to_tokens(lost))
            print(
                f"warning: {opened.chat.name} uses {names}, whose rows of the embedding table look"
                f" untrained and stay so: train them with lora.tokens={names!r}, or take the"
                " model's instruct checkpoint",
                flush=True,
            )
    return {**params, **encode(opened, sets, load)}


TEXTS = Kind(TokenRows, planned, _next_token, DecoderPreview)
PAIRS = Kind(PairRows, planned_pairs, _preference, PairPreview)
TAUGHT = Kind(_taught_rows, planned, _distillation, DecoderPreview)
LABELS = Kind(LabelledRows, planned_labelled, _classification, ScorePreview)


def _kind(opened: OpenedDecoder) -> Kind:
    kinds = {"sft": TEXTS, "distill": TAUGHT, "classify": LABELS}
    return kinds.get(opened.options.objective, PAIRS)


LLM = Task(
    open=OpenedDecoder,
    read=lambda opened, spec, training: _kind(opened).rows(opened, spec, training),
    plan=lambda opened: _kind(opened).plan(opened),
    encode=_encode,
    objective=lambda opened, rows: _kind(opened).loss(opened, rows),
    preview=lambda opened, data: _kind(opened).preview(opened, data),
    writers=WRITERS,
)
