"""Conversations as token rows. Spans of the rendered text mark what is trained, never ids."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.core.errors import UserError
from jaxft.data.sources.texts import TextRecords
from jaxft.data.text.chat.format import ChatFormat
from jaxft.data.text.chat.records import FIRST_ROLES, Conversation, read_conversation
from jaxft.data.text.chat.spans import Rendered, find_answers, token_spans
from jaxft.data.text.store import Encoded, byte_positions
from jaxft.data.text.vocabulary import tokenize

_CHUNK_ROWS, _CHUNK_CHARS = 512, 1_000_000
# Counts of chat rows in a report, all of which may be 0.
CHAT_COUNTS = ("too_long", "merged", "prompted", "lost_thoughts", "added_eos", "not_round_trip")
# Fields of a record that determine its tokens.
_FIELDS = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "tools",
    "chat_template_kwargs",
)  # fmt: skip


class _Pending(NamedTuple):
    index: int
    talk: Conversation
    made: Rendered


def fingerprint_text(record: Mapping[str, Any]) -> str:
    """Return the fields of a record that determine its tokens, as one text."""
    return json.dumps({name: record.get(name) for name in _FIELDS}, default=str)


def chat_rows(
    records: TextRecords, chat: ChatFormat, limit: int, counts: Counter[str]
) -> Iterator[tuple[int, Encoded]]:
    """Yield (index, tokenised conversation) of every record.

    A conversation of more than `limit` tokens loses whole rounds from the left, after the system
    turn. It is dropped and counted if the last round alone is too long. Records of a prompt and an
    empty completion are dropped and counted, too. Raises UserError for a bad record, and for one
    without a trained token.
    """
    counts.update(dict.fromkeys(CHAT_COUNTS, 0))
    for chunk in _chunks(records, chat, counts):
        rows = encode_rendered(chat, [pending.made for pending in chunk])
        for (index, talk, made), (row, merged) in zip(chunk, rows, strict=True):
            where = records.where(index)
            if len(row.tokens) > limit:
                shorter = _shortened(chat, talk, limit, where)
                counts["too_long" if shorter is None else "truncated"] += 1
                if shorter is None:
                    continue
                made, row, merged = shorter
            elif not row.trained[1:].any():
                raise UserError(f"{where}: the conversation has no token to train; delete the row")
            counts["merged"] += merged
            count_row(chat, made, row, counts, where)
            yield index, row


def encode_rendered(chat: ChatFormat, rows: Sequence[Rendered]) -> list[tuple[Encoded, bool]]:
    """Tokenise rendered conversations without special tokens other than their own.

    A token is trained if it starts inside the span of an answer. The second result is True where
    the text before an answer shares a token with it. That token is not trained.
    """
    columns = zip(rows, *tokenize(chat.tokenizer, [row.text for row in rows]), strict=True)
    return [_row(made, ids, offsets, chat.tokenizer.eos_token_id) for made, ids, offsets in columns]


def _row(
    made: Rendered, ids: list[int], offsets: list[tuple[int, int]], eos: int
) -> tuple[Encoded, bool]:
    starts, ends = token_spans(offsets)
    trained, merged = np.zeros(len(ids), bool), False
    for answer in made.answers:
        trained |= (starts >= answer.start) & (starts < answer.stop)
        merged |= bool(np.any((starts < answer.start) & (ends > answer.start)))
    n_bytes = np.diff(byte_positions(made.text, ends), prepend=0)
    if made.add_eos:
        ids, trained, n_bytes = [*ids, eos], np.append(trained, True), np.append(n_bytes, 0)
    return Encoded(np.asarray(ids, np.int32), trained, n_bytes.astype(np.int32)), merged


def _chunks(
    records: TextRecords, chat: ChatFormat, counts: Counter[str]
) -> Iterator[list[_Pending]]:
    """Render every record, in chunks that limit the tokenizer's memory."""
    pending: list[_Pending] = []
    size = 0
    for index in range(len(records)):
        record, where = records[index], records.where(index)
        completion = record.get("completion", record.get("output"))
        turns = "messages" in record or "conversations" in record
        if not turns and isinstance(completion, str) and not completion.strip():
            counts["empty"] += 1
            continue
        talk = read_conversation(record, where)
        pending.append(_Pending(index, talk, find_answers(chat, talk, where)))
        size += len(pending[-1].made.text)
        if len(pending) >= _CHUNK_ROWS or size >= _CHUNK_CHARS:
            yield pending
            pending, size = [], 0
    if pending:
        yield pending


def _shortened(
    chat: ChatFormat, talk: Conversation, limit: int, where: str
) -> tuple[Rendered, Encoded, bool] | None:
    """Return a conversation without its first rounds, or None if no round fits in `limit`."""
    roles = [message["role"] for message in talk.messages]
    n_head = sum(role in FIRST_ROLES for role in roles)
    last = len(roles) - 1 - roles[::-1].index("assistant")
    starts = [i for i in range(n_head + 1, last) if roles[i] == "user"]
    for start in starts:
        messages = [*talk.messages[:n_head], *talk.messages[start:]]
        first = max(talk.first - (start - n_head), 0)
        made = find_answers(chat, talk._replace(messages=messages, first=first), where)
        ((row, merged),) = encode_rendered(chat, [made])
        if len(row.tokens) <= limit:
            return made, row, merged
    return None


def count_row(
    chat: ChatFormat, made: Rendered, row: Encoded, counts: Counter[str], where: str
) -> None:
    """Count what a reader of the report has to know. Raises UserError for two BOS."""
    bos = chat.tokenizer.bos_token_id
    if bos is not None and row.tokens[:2].tolist() == [bos, bos]:
        raise UserError(
            f"{where}: {chat.name} begins with two BOS tokens; delete one from the template"
        )
    counts["prompted"] += any(answer.prompted for answer in made.answers)
    counts["lost_thoughts"] += made.lost_thoughts > 0
    counts["added_eos"] += made.add_eos
    text = chat.tokenizer.decode(
        row.tokens[: len(row.tokens) - made.add_eos],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    counts["not_round_trip"] += text.strip() != made.text.strip()
