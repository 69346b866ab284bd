"""Preference records as pairs of masked token rows: two answers to compare, laid side by side."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_mixture
from jaxft.data.sources.texts import TextRecords
from jaxft.data.sources.texts.joined import JoinedRecords
from jaxft.data.text import store
from jaxft.data.text.chat.format import ChatFormat
from jaxft.data.text.chat.records import read_conversation
from jaxft.data.text.chat.rows import count_row, encode_rendered
from jaxft.data.text.chat.spans import find_answers
from jaxft.data.text.dataset import Encoder, Example, Tokenizer, make_encoder
from jaxft.data.text.labelled import read_at_end
from jaxft.data.text.store import EncodedRecord, Flat
from jaxft.data.text.templates import text_field
from jaxft.data.text.vocabulary import check_ids

PAIR_KINDS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
OPTION_FIELDS = ("tools", "chat_template_kwargs")  # of a conversation, beside its messages
LABELLED_KIND = ("prompt", "completion", "label")
EQUAL_SHARE = 0.05  # share of pairs with equal sides, above which the user is warned
CHUNK_RECORDS = 256  # records in one call of the tokenizer


class Pair(NamedTuple):
    """Two completions of one prompt, chosen first.

    A labelled record has its own completion first. The second one answers another prompt.
    """

    sides: tuple[Example, Example]
    desirable: bool = True


class Texts(NamedTuple):
    """Prompt and both completions of a record, and the label of the first one.

    They are strings, or lists of messages for a chat template. options: the fields of OPTION_FIELDS
    that the record has.
    """

    prompt: Any
    sides: tuple[Any, Any]
    desirable: bool = True
    options: Mapping[str, Any] = {}


class PairDataset:
    """Tokenised pairs in flat arrays. Sides 2i and 2i + 1 belong to pair i.

    record_ids int32 [n]: index of each pair's record in the source. report: counts of records,
    examples (pairs), tokens, trained_tokens and longest_trained (the most in one pair), of pairs
    with a truncated side, and of those dropped as empty, untrained or equal after truncation.
    chat: the format of the texts, None for plain ones.
    """

    def __init__(
        self, records: JoinedRecords, flat: Flat, facts: dict[str, Any], chat: ChatFormat | None
    ):
        self.chat = chat
        self.records, self.record_ids = records, flat.record_ids[::2]
        self._tokens, self._trained, self._spans = flat.tokens, flat.trained, flat.spans
        self._desirable = facts["desirable"]
        trained = flat.n_trained.reshape(-1, 2).sum(axis=1)
        self.report = {
            **facts["counts"],
            "examples": len(self),
            "tokens": len(flat.tokens),
            "trained_tokens": int(trained.sum()),
            "longest_trained": int(trained.max()),
        }

    def __len__(self) -> int:
        return len(self._spans) // 2

    def __getitem__(self, index: int) -> Pair:
        spans = self._spans[2 * index : 2 * index + 2]
        first, second = (self._example(start, stop) for start, stop in spans)
        return Pair((first, second), bool(self._desirable[index]))

    def __repr__(self) -> str:
        return f"PairDataset({self.records!r}, {len(self)} pairs)"

    def _example(self, start: int, stop: int) -> Example:
        return Example(self._tokens[start:stop], self._trained[start:stop].astype(np.float32))

    def inputs(self, index: int) -> int:
        """Return the number of input positions of a pair: its tokens without the last of each."""
        return int(self._spans[2 * index + 1, 1] - self._spans[2 * index, 0]) - 2

    def key(self, index: int) -> str:
        """Return a hash of the token ids of both sides, and of the mask of trained ones."""
        digest = hashlib.sha256()
        for tokens, weights in self[index].sides:
            digest.update(np.int64(len(tokens)).tobytes() + tokens.tobytes() + weights.tobytes())
        return digest.hexdigest()[:32]


def load_pairs(
    spec: str,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    labelled: bool = False,
    chat: ChatFormat | None = None,
    vocab_size: int | None = None,
    image_ids: tuple[int, ...] = (),
    cache: Path | str = "",
    columns: str = "",
    pad_id: int | None = None,
) -> PairDataset:
    """Tokenise a preference set, or with `labelled` a set of single answers with labels (KTO).

    A side starts with BOS if the tokenizer adds it by default, and ends with a trained EOS. With
    `chat` prompt and answer are turns of a conversation instead, and the answer and its stop token
    are trained. A side keeps its first seq_len + 1 tokens. Pairs that are empty, equal or without a
    trained token in a side after that are dropped and counted. Sets above IN_MEMORY bytes are files
    in `cache`, as in `load_text`. `columns` renames fields. With `pad_id` a side is for a reward
    model: it keeps seq_len tokens, and is weighted where the reward is read (`read_at_end`). Raises
    UserError for bad records, equal sides, tokens beyond `vocab_size` or in `image_ids`, and if no
    pair remains.
    """
    records, encoder = open_mixture(spec, columns), make_encoder(tokenizer)
    kind = pair_kind(records[0], records.where(0), labelled)
    if "prompt" not in kind and isinstance(records[0]["chosen"], str):
        chat = None  # two whole texts, whose common part is no turn of a user

    def parts(facts: dict) -> Iterator[EncodedRecord]:
        counts = Counter(records=len(records), truncated=0, empty=0, untrained=0, equal=0)
        facts |= {"desirable": []}
        for index, texts, sides in _encode_all(records, kind, encoder, chat, counts):
            limit = seq_len + (pad_id is None)
            if kept := _cut(sides, limit, counts, labelled, pad_id):
                if vocab_size is not None:
                    where = records.where(index)
                    check_ids(kept.tokens, vocab_size, tokenizer, where, image_ids)
                facts["desirable"].append(int(texts.desirable))
                yield kept._replace(record_id=index)
        facts |= {"counts": dict(counts)}

    options = kind, seq_len, vocab_size, encoder.bos, encoder.eos, chat and chat.sha256
    options = options if pad_id is None else (*options, pad_id)
    options = (*options, image_ids) if image_ids else options
    size, digest = _fingerprint(records, kind, tokenizer, options) if cache else (0, "")
    facts: dict = {}
    if size <= store.IN_MEMORY:
        flat = store.in_memory(parts(facts))
    else:
        flat, facts = store.on_disk(Path(cache).expanduser() / f"pairs-{digest}", parts)
    _check_counts(records, facts["counts"], len(flat.spans) // 2)
    return PairDataset(records, flat, facts, chat)


def pair_kind(record: dict[str, Any], where: str, labelled: bool) -> tuple[str, ...]:
    """Return the fields of a record that are read. Raises UserError for a record without them."""
    for kind in (LABELLED_KIND,) if labelled else PAIR_KINDS:
        if all(field in record for field in kind):
            return kind
    found = ", ".join(map(repr, record)) or "none"
    wanted = '"prompt", "completion" and "label"' if labelled else '"prompt", "chosen", "rejected"'
    raise UserError(
        f"{where}: found the fields {found}; objective={'kto' if labelled else 'dpo'} and its like"
        f" need {wanted}; give other records or another objective"
    )


def read_texts(record: dict[str, Any], kind: tuple[str, ...], where: str) -> Texts:
    """Return prompt and completions of a record.

    A labelled record has its own completion twice. Raises UserError for a bad field and for equal
    sides.
    """
    options = {name: record[name] for name in OPTION_FIELDS if record.get(name)}
    values = [_field(record, name, where) for name in kind if name != "label"]
    if kind == LABELLED_KIND:
        label = record.get("label")
        if label not in (True, False):
            raise UserError(f"{where}: field 'label' must be true or false, found {label!r:.40}")
        return Texts(values[0], (values[1], values[1]), bool(label), options)
    chosen, rejected = values[-2:]
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are equal; remove the record")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(f"{where}: chosen and rejected must both be strings, or both messages")
    if "prompt" in kind:
        return Texts(values[0], (chosen, rejected), options=options)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    size = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, str):  # tokenizers join whitespace to the word after it
        size = len(chosen[:size].rstrip())
    return Texts(chosen[:size], (chosen[size:], rejected[size:]), options=options)


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    """Return a string, or a list of messages, which a chat template checks later."""
    value = record.get(name)
    return value if isinstance(value, list) else text_field(record, name, where)


def mismatched(prompts: Sequence[Any]) -> list[int]:
    """Return for each record the next one, in a circle, with another prompt.

    If all prompts are equal, it is the next record.
    """
    count = len(prompts)
    after = [(i + 1) % count for i in range(count)]
    several = any(prompt != prompts[0] for prompt in prompts)
    rounds = 2 if several else 0  # the second one closes the circle
    for i in reversed(range(rounds * count)):
        i %= count
        if prompts[after[i]] == prompts[i]:
            after[i] = after[(i + 1) % count]
    return after


def _all_texts(records: TextRecords, kind: tuple[str, ...]) -> Iterator[Texts]:
    """Yield the strings of every record, with the completion of another one if it has a label."""
    if kind != LABELLED_KIND:
        for index in range(len(records)):
            yield read_texts(records[index], kind, records.where(index))
        return
    texts = [read_texts(records[i], kind, records.where(i)) for i in range(len(records))]
    full = [i for i, one in enumerate(texts) if not _is_blank(one.sides[0])]
    others = mismatched([texts[i].prompt for i in full])
    after = {i: full[other] for i, other in zip(full, others, strict=True)}
    for i, one in enumerate(texts):  # an empty answer keeps itself, and is dropped later
        yield one._replace(sides=(one.sides[0], texts[after.get(i, i)].sides[0]))


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _encode_all(
    records: TextRecords,
    kind: tuple[str, ...],
    encoder: Encoder,
    chat: ChatFormat | None,
    counts: Counter,
) -> Iterator[tuple[int, Texts, list[Example]]]:
    """Yield index, texts and both whole sides of every record that is not empty."""
    pending: list[tuple[int, Texts]] = []
    for index, texts in enumerate(_all_texts(records, kind)):
        if any(map(_is_blank, texts.sides)):
            counts["empty"] += 1
        else:
            pending.append((index, texts))
        if len(pending) == CHUNK_RECORDS:
            yield from _encode_chunk(records, pending, encoder, chat, kind == LABELLED_KIND, counts)
            pending = []
    if pending:
        yield from _encode_chunk(records, pending, encoder, chat, kind == LABELLED_KIND, counts)


def _encode_chunk(
    records: TextRecords,
    pending: list[tuple[int, Texts]],
    encoder: Encoder,
    chat: ChatFormat | None,
    labelled: bool,
    counts: Counter,
) -> Iterator[tuple[int, Texts, list[Example]]]:
    """Tokenise records together, in a chat format if there is one."""
    places = [records.where(index) for index, _ in pending]
    texts = [one for _, one in pending]
    if chat is None:
        rows = _plain_rows(texts, encoder, labelled, places)
    else:
        rows = _chat_rows(texts, chat, places, counts)
    for i, (index, one) in enumerate(pending):
        yield index, one, rows[2 * i : 2 * i + 2]


def _chat_rows(
    texts: list[Texts], chat: ChatFormat, places: list[str], counts: Counter
) -> list[Example]:
    """Return both sides of every record as a conversation, of which the last answer is trained.

    Raises UserError, and counts, as for conversations of the training of next tokens.
    """
    made = []
    for one, where in zip(texts, places, strict=True):
        for side in one.sides:
            fields = {"prompt": one.prompt, "completion": side, **one.options}
            made.append(find_answers(chat, read_conversation(fields, where), where))
    rows, sides = [row for row, _ in encode_rendered(chat, made)], Counter()
    for i, (one, row) in enumerate(zip(made, rows, strict=True)):
        count_row(chat, one, row, sides, places[i // 2])
    for name, number in sides.items():  # of pairs, as both sides have the same kind of answer
        counts[name] += -(-number // 2)
    return [Example(row.tokens, row.trained.astype(np.float32)) for row in rows]


def _plain_rows(
    texts: list[Texts], encoder: Encoder, labelled: bool, places: list[str]
) -> list[Example]:
    """Return both sides of every record, its completion joined to its prompt.

    Completions start where the ids of prompt, prompt + chosen and prompt + rejected diverge, so
    that both sides of a pair have one prompt. The sides of a labelled record are independent.
    """
    for one, where in zip(texts, places, strict=True):
        if not all(isinstance(value, str) for value in (one.prompt, *one.sides)):
            raise UserError(
                f"{where}: lists of messages need a chat template, but the checkpoint has none or"
                " chat=off; set chat=FILE.jinja, or chat=auto for the checkpoint's own"
            )
    rows = encoder.encode([(one.prompt, side) for one in texts for side in one.sides])
    prompts = [one.prompt for one in texts]
    found = encoder.tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    examples = []
    for i, prompt in enumerate(found):
        sides = [row.tokens for row in rows[2 * i : 2 * i + 2]]
        if encoder.bos is not None and prompt[:1] != [encoder.bos]:
            prompt = [encoder.bos, *prompt]
        starts = [_common(prompt, side) for side in sides]
        starts = starts if labelled else [min(starts)] * 2
        for side, start in zip(sides, starts, strict=True):
            # The first token is never a target: no token before it predicts it.
            trained = np.arange(len(side)) >= max(start, 1)
            examples.append(Example(side, trained.astype(np.float32)))
    return examples


def _common(prompt: list[int], side: Int[np.ndarray, " n"]) -> int:
    """Return the length of the common prefix."""
    size = min(len(prompt), len(side))
    differ = np.flatnonzero(np.asarray(prompt[:size]) != side[:size])
    return int(differ[0]) if len(differ) else size


def _cut(
    sides: list[Example], limit: int, counts: Counter, labelled: bool, pad_id: int | None
) -> EncodedRecord | None:
    """Return both sides cut to `limit` tokens, or None and a count if nothing can be compared.

    The second side of a labelled record may be equal to the first one: two prompts can have the
    same answer.
    """
    counts["truncated"] += any(len(side.tokens) > limit for side in sides)
    tokens = [side.tokens[:limit] for side in sides]
    trained: list[Bool[np.ndarray, " n"]] = [side.weights[:limit] > 0 for side in sides]
    if not all(mask.any() for mask in trained):
        counts["untrained"] += 1
        return None
    if not labelled and np.array_equal(tokens[0], tokens[1]):
        counts["equal"] += 1
        return None
    if pad_id is not None:
        ends = [read_at_end(ids, pad_id) for ids in tokens]
        tokens, trained = [end.tokens for end in ends], [end.weights > 0 for end in ends]
    first, both = len(tokens[0]), sum(map(len, tokens))
    n_trained = [int(mask.sum()) for mask in trained]
    spans = [(0, first), (first, both)]
    return EncodedRecord(
        np.concatenate(tokens), np.concatenate(trained), spans, 0, n_trained, [0, 0]
    )


def _check_counts(records: TextRecords, counts: dict[str, int], kept: int) -> None:
    """Warn of many equal sides. Raises UserError if no pair remains."""
    if not kept:
        raise UserError(
            f"{records!r} leaves no pair to compare: of {counts['records']} records"
            f" {counts['empty']} have an empty side, {counts['untrained']} no token of an answer"
            f" within seq_len, {counts['equal']} equal sides within it; raise seq_len"
        )
    if counts["equal"] > EQUAL_SHARE * (kept + counts["equal"]):
        print(
            f"warning: {counts['equal']} of {kept + counts['equal']} pairs of {records!r} have"
            " equal sides after the template and within seq_len, and are left out; raise seq_len",
            flush=True,
        )


def _fingerprint(
    records: TextRecords, kind: tuple[str, ...], tokenizer: Tokenizer, more: Any
) -> tuple[int, str]:
    """Return the bytes of all texts, and a hash of everything that determines their tokens."""
    known = (tokenizer.backend_tokenizer.to_str(), tokenizers.__version__, more)
    digest, size = hashlib.sha256(repr(known).encode()), 0
    for texts in _all_texts(records, kind):
        content = repr(texts).encode()
        digest.update(content)
        size += len(content)
    return size, digest.hexdigest()[:32]
