"""Text records as masked token rows: spans of characters mark what is trained, never ids."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Float, Int

from jaxft.core.errors import UserError
from jaxft.data.sources.images.records import all_bad
from jaxft.data.sources.schemes import open_records
from jaxft.data.sources.texts import TextRecords
from jaxft.data.text import store
from jaxft.data.text.chat.format import ChatFormat
from jaxft.data.text.chat.records import is_chat, read_conversation
from jaxft.data.text.chat.rows import chat_rows, fingerprint_text
from jaxft.data.text.store import Encoded, EncodedRecord, Flat, byte_positions
from jaxft.data.text.templates import record_kind, render, split_template
from jaxft.data.text.vocabulary import check_ids, tokenize

Tokenizer = Any  # a fast tokenizer of transformers, whose classes are slow to import

_CHUNK_ROWS, _CHUNK_CHARS = 512, 1_000_000


class Example(NamedTuple):
    """One unpadded row. `weights[t]` is 1 where `tokens[t]` is a trained target, else 0."""

    tokens: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with its special tokens at the ends of a text. `bos` is None if it adds none."""

    tokenizer: Tokenizer
    bos: int | None
    eos: int

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Tokenise (prompt, completion) pairs jointly. The completion and its EOS are trained.

        The completion begins at the first token whose characters reach past the prompt. A token
        that crosses the border is therefore trained. No BOS or EOS is added where the text itself
        begins or ends with it.
        """
        texts = [prompt + completion for prompt, completion in pairs]
        columns = zip(pairs, *tokenize(self.tokenizer, texts), strict=True)
        return [self._row(*pair, ids, offsets) for pair, ids, offsets in columns]

    def _row(
        self, prompt: str, completion: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> Encoded:
        ends = np.maximum.accumulate(np.asarray(offsets, np.int64).reshape(-1, 2)[:, 1])
        first = int(np.searchsorted(ends, len(prompt), side="right")) if prompt else 0
        n_bytes = np.diff(byte_positions(prompt + completion, ends), prepend=0)
        add_bos = self.bos is not None and ids[:1] != [self.bos]
        add_eos = ids[-1:] != [self.eos]
        tokens = [self.bos] * add_bos + ids + [self.eos] * add_eos
        trained = np.arange(len(tokens)) >= first + add_bos
        if self.bos is not None:
            trained[0] = False
        padded = np.pad(n_bytes, (int(add_bos), int(add_eos)))
        return Encoded(np.asarray(tokens, np.int32), trained, padded.astype(np.int32))


def make_encoder(tokenizer: Tokenizer) -> Encoder:
    """Return the encoder of a tokenizer, with its EOS, and its BOS if it adds one by default.

    Raises UserError for a tokenizer that is not fast or has no EOS.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer "
            "(tokenizer.json) is needed; load it with AutoTokenizer and save it again"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no EOS token: set eos_token in tokenizer_config.json")
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
    return Encoder(tokenizer, bos if adds_bos else None, tokenizer.eos_token_id)


def encode(
    record: dict[str, Any], tokenizer: Tokenizer, template: str | None = None, where: str = "record"
) -> Example:
    """Return one whole record as tokens and weights, neither cut nor padded.

    It starts with BOS if the tokenizer adds it by default, and ends with a trained EOS. The first
    token is never a target. Raises UserError that names `where` for a bad record.
    """
    pair = render(record, record_kind(record, where), template, where)
    row = make_encoder(tokenizer).encode([pair])[0]
    return _example(row.tokens, row.trained)


def _example(tokens: Int[np.ndarray, " n"], trained: Bool[np.ndarray, " n"]) -> Example:
    weights = trained.astype(np.float32)
    weights[:1] = 0  # no token before the first one predicts it
    return Example(tokens, weights)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> Int[np.ndarray, " n"]:
    """Return the token ids of a prompt, with BOS if the tokenizer adds it, and without EOS."""
    encoder = make_encoder(tokenizer)
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    add_bos = encoder.bos is not None and ids[:1] != [encoder.bos]
    return np.asarray([encoder.bos] * add_bos + ids, np.int32)


def label_rows(
    tokenizer: Tokenizer, text: str, labels: Sequence[str], template: str | None, seq_len: int
) -> list[Example]:
    """Return the training row of a text with each label in turn, cut to `seq_len` as in training.

    Label, text after it and EOS are trained: a label that is the start of another one differs from
    it by the end. Raises UserError if a label changes the tokens of the prompt, because the labels
    are scored behind one common prompt.
    """
    head, lead, tail = split_template(template)
    encoder, prompt = make_encoder(tokenizer), head.replace("{text}", text)
    rows = encoder.encode([(prompt, lead + label + tail) for label in labels])
    if len({row.tokens[~row.trained].tobytes() for row in rows}) > 1:
        raise UserError(
            f"template {template!r} lets labels merge with the end of the prompt: "
            "put a space or a newline before {label}"
        )
    kept = [_truncate(x, seq_len + 1, encoder) if len(x.tokens) > seq_len + 1 else x for x in rows]
    return [_example(row.tokens, row.trained) for row in kept]


def first_tokens(rows: Sequence[Example]) -> Int[np.ndarray, " n"] | None:
    """Return the first trained token of each label's row, if it alone identifies the label.

    It does if each label is one token, different from the others, and at most one token follows,
    the same for all (EOS). Otherwise returns None.
    """
    targets = [row.tokens[row.weights > 0] for row in rows]
    ends = {tuple(ids[1:].tolist()) for ids in targets}
    firsts = np.asarray([ids[0] for ids in targets], np.int32)
    alone = len(ends) == 1 and len(targets[0]) <= 2 and len(set(firsts.tolist())) == len(firsts)
    return firsts if alone else None


class TextDataset:
    """Tokenised examples in flat arrays: int32 tokens and one mask byte per token.

    records: the source. record_ids int32 [n]: index of each example's record in it.
    n_bytes int64 [n]: UTF-8 bytes of the trained text of each example (for bits per byte).
    labels: the sorted labels of {"text", "label"} records, else ().
    chat: the format of conversations, None for other records.
    report: counts of records, examples, tokens, trained_tokens and longest_trained (the most in one
    example), of records truncated, split into windows or dropped as empty, and of examples dropped
    as untrained.
    """

    def __init__(
        self,
        records: TextRecords,
        tokens: Int[np.ndarray, " total"],
        trained: Bool[np.ndarray, " total"],
        spans: Int[np.ndarray, "n 2"],
        record_ids: Int[np.ndarray, " n"],
        n_bytes: Int[np.ndarray, " n"],
        labels: tuple[str, ...],
        report: dict[str, int],
        chat: ChatFormat | None = None,
    ):
        self.records, self.record_ids, self.n_bytes, self.chat = records, record_ids, n_bytes, chat
        self.labels, self.report = labels, report
        self._tokens, self._trained, self._spans = tokens, trained, spans

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:
        start, stop = self._spans[index]
        return _example(self._tokens[start:stop], self._trained[start:stop])

    def inputs(self, index: int) -> int:
        """Return the number of input positions of an example: its tokens without the last."""
        start, stop = self._spans[index]
        return int(stop - start - 1)

    def __repr__(self) -> str:
        return f"TextDataset({self.records!r}, {len(self)} examples)"


def load_text(
    spec: str,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    template: str | None = None,
    chat: ChatFormat | None = None,
    vocab_size: int | None = None,
    image_ids: tuple[int, ...] = (),
    cache: Path | str = "",
    columns: str = "",
) -> TextDataset:
    """Tokenise the whole set once, in batches, and keep it as compact arrays.

    A row holds up to seq_len + 1 tokens (seq_len inputs and their targets). Longer plain texts
    become windows that overlap by one token, so that every token but a document's first is
    trained exactly once. Longer prompt + completion rows lose the prompt's left end (BOS stays),
    then the completion's right end. Empty rows and rows without a trained token are dropped and
    counted. Conversations are rendered by the chat template, as prompt + completion rows are if
    `chat` is given, and lose whole rounds (see `chat_rows`). The arrays of more than IN_MEMORY
    bytes of text are files in the folder `cache`, which later runs reuse. With `cache` "" all
    arrays stay in memory. `columns` renames fields. Raises UserError for bad records, for tokens
    beyond `vocab_size` (the rows of the model's embedding table), for `image_ids`, which stand for
    pictures, and if no trained token remains.
    """
    if seq_len < 1:
        raise UserError(f"seq_len={seq_len} must be at least 1 token")
    records, encoder = open_records(spec, columns), make_encoder(tokenizer)
    kind = record_kind(records[0], records.where(0))
    chat = _chat(records, kind, chat)

    def parts(facts: dict) -> Iterator[EncodedRecord]:
        counts = Counter(records=len(records), truncated=0, split=0, empty=0, untrained=0)
        labels: set[str] = set()
        if chat:
            rows = chat_rows(records, chat, seq_len + 1, counts)
        else:
            rows = _encode_all(records, kind, encoder, template, counts, labels)
        for index, row in rows:
            if len(row.tokens) > seq_len + 1:
                counts["split" if kind == ("text",) else "truncated"] += 1
                row = row if kind == ("text",) else _truncate(row, seq_len + 1, encoder)
            if vocab_size is not None:
                check_ids(row.tokens, vocab_size, tokenizer, records.where(index), image_ids)
            yield _part(index, row, seq_len)
        facts |= {"counts": dict(counts), "labels": sorted(labels)}

    options = kind, seq_len, template, vocab_size, encoder.bos, encoder.eos
    options = (*options, chat.sha256) if chat else options
    options = (*options, image_ids) if image_ids else options
    texts = partial(_texts, records, None if chat else kind, template)
    facts: dict = {}
    with all_bad(records, partial(_check, records, kind, template, chat)):
        size, digest = _fingerprint(texts, len(records), tokenizer, options) if cache else (0, "")
        if size <= store.IN_MEMORY:
            flat = store.in_memory(parts(facts))
        else:
            folder = Path(cache).expanduser() / f"text-{digest}"
            flat, facts = store.on_disk(folder, parts)
    return _dataset(records, flat, facts, chat)


def _check(
    records: TextRecords,
    kind: tuple[str, ...],
    template: str | None,
    chat: ChatFormat | None,
    index: int,
) -> None:
    """Raise UserError for a record that gives no text."""
    record, where = records[index], records.where(index)
    if not chat:
        render(record, kind, template, where)
    elif "messages" in record or "conversations" in record:  # an empty completion is dropped
        read_conversation(record, where)


def _chat(
    records: TextRecords, kind: tuple[str, ...], chat: ChatFormat | None
) -> ChatFormat | None:
    """Return the chat format of a set, None for plain texts. Raises UserError if it is missing."""
    if chat is None and is_chat(records[0], kind):
        raise UserError(
            f"{records.where(0)}: {' and '.join(map(repr, kind))} hold turns of a chat, which need"
            " a chat template, but the checkpoint has none or chat=off; set chat=FILE.jinja, or"
            " chat=auto for the checkpoint's own"
        )
    return None if kind[0] == "text" else chat


def _texts(
    records: TextRecords, kind: tuple[str, ...] | None, template: str | None, index: int
) -> list[str | None]:
    """Return the texts of a record that determine its tokens. `kind` None is a conversation."""
    record = records[index]
    if kind is None:
        return [fingerprint_text(record)]
    return [*render(record, kind, template, records.where(index)), record.get("label")]


def _fingerprint(
    texts: Callable[[int], list[str | None]], count: int, tokenizer: Tokenizer, more: Any
) -> tuple[int, str]:
    """Return the bytes of all texts, and a hash of everything that determines their tokens."""
    known = (tokenizer.backend_tokenizer.to_str(), tokenizers.__version__, more)
    digest, size = hashlib.sha256(repr(known).encode()), 0
    for index in range(count):
        found = texts(index)
        digest.update(repr(found).encode())
        size += sum(len(text.encode()) for text in found[:2] if text is not None)
    return size, digest.hexdigest()[:32]


def _part(index: int, row: Encoded, seq_len: int) -> EncodedRecord:
    """Cut a tokenised record into examples of at most seq_len + 1 tokens.

    Each example begins with the last token of the one before, and its first token is not trained.
    """
    length = len(row.tokens)
    begins = range(0, max(length - 1, 1), seq_len)
    spans = [(begin, min(begin + seq_len + 1, length)) for begin in begins]
    n_trained = [int(np.sum(row.trained[start + 1 : stop])) for start, stop in spans]
    n_bytes = [
        int(np.sum(row.n_bytes[start + 1 : stop], where=row.trained[start + 1 : stop]))
        for start, stop in spans
    ]
    return EncodedRecord(row.tokens, row.trained, spans, index, n_trained, n_bytes)


def _encode_all(
    records: TextRecords,
    kind: tuple[str, ...],
    encoder: Encoder,
    template: str | None,
    counts: Counter,
    labels: set[str],
) -> Iterator[tuple[int, Encoded]]:
    """Encode every record that is not empty, in chunks that limit the tokenizer's memory."""
    pending: list[tuple[int, tuple[str, str]]] = []
    size = 0
    for index in range(len(records)):
        record = records[index]
        pair = render(record, kind, template, records.where(index))
        if not (record["label"] if "label" in kind else pair[1]).strip():
            counts["empty"] += 1
            continue
        if "label" in kind:
            labels.add(record["label"])
        pending.append((index, pair))
        size += len(pair[0]) + len(pair[1])
        if len(pending) >= _CHUNK_ROWS or size >= _CHUNK_CHARS:
            yield from _encode_chunk(encoder, pending)
            pending, size = [], 0
    if pending:
        yield from _encode_chunk(encoder, pending)


def _encode_chunk(
    encoder: Encoder, pending: list[tuple[int, tuple[str, str]]]
) -> Iterator[tuple[int, Encoded]]:
    rows = encoder.encode([pair for _, pair in pending])
    yield from zip((index for index, _ in pending), rows, strict=True)


def _truncate(row: Encoded, limit: int, encoder: Encoder) -> Encoded:
    """Cut the prompt on the left, except BOS, then the completion on the right."""
    kept = 0 if encoder.bos is None else 1
    prompt = int(np.argmax(row.trained))
    cut = min(len(row.tokens) - limit, prompt - kept)
    index = np.delete(np.arange(len(row.tokens)), np.s_[kept : kept + cut])[:limit]
    return Encoded(row.tokens[index], row.trained[index], row.n_bytes[index])


def _dataset(records: TextRecords, flat: Flat, facts: dict, chat: ChatFormat | None) -> TextDataset:
    """Drop the examples in which nothing is trained, and count the others."""
    keep, counts = flat.n_trained > 0, Counter(facts["counts"])
    counts["untrained"] += int((~keep).sum())
    if not keep.any():
        long = f", {counts['too_long']} are longer than seq_len" if counts["too_long"] else ""
        raise UserError(
            f"{records!r} leaves nothing to train on: of {counts['records']} records "
            f"{counts['empty']} are empty{long} and {counts['untrained']} have no trained token; "
            "expected a text, completion, answer or label in each"
        )
    spans = flat.spans[keep]
    counts["examples"] = len(spans)
    counts["tokens"] = int((spans[:, 1] - spans[:, 0]).sum())
    counts["trained_tokens"] = int(flat.n_trained.sum())
    counts["longest_trained"] = int(flat.n_trained.max())
    ids, n_bytes, labels = flat.record_ids[keep], flat.n_bytes[keep], tuple(facts["labels"])
    return TextDataset(
        records, flat.tokens, flat.trained, spans, ids, n_bytes, labels, dict(counts), chat
    )
