"""Texts with labels for a head of scores, which is read at the last token of each text."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_mixture
from jaxft.data.sources.texts import TextRecords
from jaxft.data.sources.texts.joined import JoinedRecords
from jaxft.data.text import store
from jaxft.data.text.dataset import Example, Tokenizer
from jaxft.data.text.store import EncodedRecord, Flat
from jaxft.data.text.templates import text_field
from jaxft.data.text.vocabulary import check_ids

TEXTS_AT_ONCE = 512  # records in one call of the tokenizer
LOOKED_AT = 10_000  # records in which label names are looked for
MOST_NAMES = 50  # names in an error


class Labelled(NamedTuple):
    """A text, and its label: an index int32 [], or numbers float32 [C] for several labels."""

    example: Example
    label: np.ndarray


class LabelRule(NamedTuple):
    """The names of the labels, and transformers' problem_type."""

    names: tuple[str, ...]
    problem: str

    def read(self, record: dict[str, Any], where: str) -> np.ndarray:
        """Return the label of a record. Raises UserError for a bad one."""
        if self.problem == "regression":
            return self._numbers(record, where)
        if self.problem == "multi_label_classification":
            field = "labels" if "labels" in record else "label"
            value = record.get(field)
            if not isinstance(value, list):
                raise UserError(f"{where}: field 'labels' must be a list, found {value!r:.40}")
            hot = np.zeros(len(self.names), np.float32)
            hot[[self._index(one, where) for one in value]] = 1.0
            return hot
        if "label" not in record:
            found = ", ".join(map(repr, record)) or "none"
            raise UserError(
                f'{where}: found the fields {found}; objective=classify needs "text" and "label";'
                " --config.columns=label=FIELD renames"
            )
        return np.asarray(self._index(record["label"], where), np.int32)

    def name(self, label: np.ndarray) -> str:
        """Return a label as text: a name, names, or numbers."""
        if self.problem == "regression":
            return " ".join(f"{one:.4g}" for one in label)
        if label.ndim == 0:
            return self.names[int(label)]
        return ", ".join(name for name, one in zip(self.names, label, strict=True) if one > 0.5)

    def _index(self, label: Any, where: str) -> int:
        """Return the id of a label, which a record gives as a name or as that id.

        Where a name is a number itself, a number is never an id.
        """
        name = label if isinstance(label, str) else json.dumps(label)
        if name in self.names:
            return self.names.index(name)
        ids_are_given = name.isdecimal() and not any(one.isdecimal() for one in self.names)
        if ids_are_given and int(name) < len(self.names):
            return int(name)
        raise UserError(
            f"{where}: label {label!r:.60} is not one of labels={','.join(self.names)}; correct it,"
            " or add the name to labels"
        )

    def _numbers(self, record: dict[str, Any], where: str) -> np.ndarray:
        value: Any = record.get("labels", record.get("label"))
        values = value if isinstance(value, list) else [value]
        try:
            numbers = np.asarray([float(one) for one in values], np.float32)
        except (TypeError, ValueError):
            numbers = np.asarray([np.nan], np.float32)
        if len(numbers) != len(self.names) or not np.isfinite(numbers).all():
            raise UserError(
                f"{where}: field 'label' must hold {len(self.names)} finite numbers for"
                f" problem_type=regression, found {value!r:.40}"
            )
        return numbers


class LabelledDataset:
    """Tokenised texts in flat arrays, with their labels.

    labels: int32 [n], or float32 [n, C]. record_ids int32 [n]: index of each text in the source.
    report: counts of records, examples, tokens, trained_tokens (one a text), and of records that
    are truncated or dropped as empty. chat is None: texts are read as they are.
    """

    chat = None

    def __init__(self, records: JoinedRecords, flat: Flat, facts: dict[str, Any], rule: LabelRule):
        self.records, self.record_ids, self.rule = records, flat.record_ids, rule
        single = rule.problem == "single_label_classification"
        self.labels = np.asarray(facts["labels"], np.int32 if single else np.float32)
        self._tokens, self._trained, self._spans = flat.tokens, flat.trained, flat.spans
        self.report = {
            **facts["counts"],
            "examples": len(self),
            "tokens": len(flat.tokens) - len(self),
            "trained_tokens": len(self),
            "longest_trained": 1,
        }

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Labelled:
        start, stop = self._spans[index]
        weights = self._trained[start:stop].astype(np.float32)
        return Labelled(Example(self._tokens[start:stop], weights), self.labels[index])

    def __repr__(self) -> str:
        return f"LabelledDataset({self.records!r}, {len(self)} texts)"

    def inputs(self, index: int) -> int:
        """Return the number of input positions of a text, all its tokens."""
        start, stop = self._spans[index]
        return int(stop - start - 1)


def read_at_end(tokens: Int[np.ndarray, " n"], pad_id: int) -> Example:
    """Return all tokens as inputs, whose weight is 1 where the head of scores is read.

    It is read at the last token that is not padding, whatever the padding is, as in transformers.
    A token that is no input follows, because position t of a row belongs to target t + 1.
    """
    real = np.flatnonzero(tokens != pad_id)
    weights = np.zeros(len(tokens) + 1, np.float32)
    weights[1 + (int(real[-1]) if len(real) else 0)] = 1.0
    return Example(np.append(tokens, np.int32(pad_id)), weights)


def load_labelled(
    spec: str,
    tokenizer: Tokenizer,
    rule: LabelRule,
    *,
    seq_len: int,
    pad_id: int,
    vocab_size: int,
    cache: Path | str = "",
    columns: str = "",
) -> LabelledDataset:
    """Tokenise {"text", "label"} records as `tokenizer(text)` does, with its special tokens.

    A longer text is truncated to `seq_len` by the tokenizer. Blank texts are dropped and counted.
    Sets above IN_MEMORY bytes are files in `cache`, as in `load_text`. `columns` renames fields.
    Raises UserError for bad records and labels, tokens beyond `vocab_size`, and if no text remains.
    """
    records = open_mixture(spec, columns)

    def parts(facts: dict) -> Iterator[EncodedRecord]:
        counts: Counter[str] = Counter(records=len(records), truncated=0, empty=0, untrained=0)
        facts["labels"] = []
        for index, label, ids in _encode_all(records, rule, tokenizer, seq_len, counts):
            check_ids(ids, vocab_size, tokenizer, records.where(index))
            facts["labels"].append(label.tolist())
            tokens, weights = read_at_end(np.asarray(ids, np.int32), pad_id)
            yield EncodedRecord(tokens, weights > 0, [(0, len(tokens))], index, [1], [0])
        facts["counts"] = dict(counts)

    known = tokenizer.backend_tokenizer.to_str(), tokenizers.__version__, tokenizer.truncation_side
    size, digest = 0, hashlib.sha256(repr((known, rule, seq_len, pad_id, vocab_size)).encode())
    for index in range(len(records) if cache else 0):
        content = repr(records[index]).encode()
        digest.update(content)
        size += len(content)
    facts: dict = {}
    if size <= store.IN_MEMORY:
        flat = store.in_memory(parts(facts))
    else:
        folder = Path(cache).expanduser() / f"labels-{digest.hexdigest()[:32]}"
        flat, facts = store.on_disk(folder, parts)
    if not len(flat.spans):
        raise UserError(f"{records!r} leaves nothing to train on: every text is empty")
    return LabelledDataset(records, flat, facts, rule)


def _encode_all(
    records: TextRecords, rule: LabelRule, tokenizer: Tokenizer, seq_len: int, counts: Counter
) -> Iterator[tuple[int, np.ndarray, list[int]]]:
    """Yield index, label and token ids of every record that is not blank."""
    for first in range(0, len(records), TEXTS_AT_ONCE):
        kept = []
        for index in range(first, min(first + TEXTS_AT_ONCE, len(records))):
            where = records.where(index)
            text = text_field(records[index], "text", where)
            label = rule.read(records[index], where)
            if text.strip():
                kept.append((index, label, text))
            else:
                counts["empty"] += 1
        if not kept:
            continue
        texts = [text for _, _, text in kept]
        found = tokenizer(texts, truncation=True, max_length=seq_len + 1, verbose=False)
        for (index, label, text), ids in zip(kept, found["input_ids"], strict=True):
            if not ids:  # of characters that the tokenizer deletes
                counts["empty"] += 1
                continue
            if len(ids) > seq_len:
                counts["truncated"] += 1
                ids = tokenizer(text, truncation=True, max_length=seq_len)["input_ids"]
            yield index, label, ids


def labels_in(spec: str, columns: str) -> list[str]:
    """Return the sorted label names of a set, for an error. Empty if there are none, or many."""
    try:
        records = open_mixture(spec, columns)
        some = [records[i] for i in range(min(len(records), LOOKED_AT))]
    except UserError:
        return []
    values = [record.get("label") for record in some]
    for record in some:
        several = record.get("labels")
        values += several if isinstance(several, list) else []
    names = {one if isinstance(one, str) else json.dumps(one) for one in values if one is not None}
    ordered = sorted(names, key=lambda name: (int(name) if name.isdecimal() else -1, name))
    return ordered if len(names) <= MOST_NAMES else []
