"""Causal language models of the LLaMA family: text, prompt and completion, classification."""

from jaxft.objectives.next_token import NextToken
from jaxft.tasks import Planned, Task
from jaxft.tasks.llm.exports import WRITERS
from jaxft.tasks.llm.opened import OpenedDecoder
from jaxft.tasks.llm.preview import DecoderPreview
from jaxft.tasks.llm.rows import TokenRows, planned


def _objective(opened: OpenedDecoder, rows: TokenRows | Planned) -> NextToken:
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
    read=TokenRows,
    plan=planned,
    encode=lambda opened, params, chosen, sets: None,  # tokens are cheap
    objective=_objective,
    preview=DecoderPreview,
    writers=WRITERS,
)
