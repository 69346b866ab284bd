"""Examples of a set with their trained tokens, and counts, before any weights are loaded."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple
from unicodedata import category

import numpy as np
from jaxtyping import Bool, Int

from jaxft.core.errors import UserError
from jaxft.data.loader import sample_order
from jaxft.data.text.dataset import Example, make_encoder
from jaxft.tasks.llm.opened import OpenedDecoder
from jaxft.tasks.llm.options import LLMOptions

BATCHES = 20  # batches whose padding is counted
COUNTED_AT_ONCE = 4096  # examples
LENGTHS = 10  # intervals of lengths


class Piece(NamedTuple):
    """A text of neighbouring tokens that are all trained or not, and all special or not."""

    text: str
    trained: bool
    special: bool


class Tally(NamedTuple):
    """Counts of all examples of a set.

    lengths: tokens of each example. used, trained: how often each id of the vocabulary occurs, and
    is trained. n_bos: examples that begin with BOS.
    """

    lengths: Int[np.ndarray, " n"]
    used: Int[np.ndarray, " v"]
    trained: Int[np.ndarray, " v"]
    n_bos: int


class Inspection(NamedTuple):
    """One set, ready to be shown.

    tokens: rows of name, id, count and trained count of special tokens. lengths: (first length,
    last length, examples) of each bar. examples: a heading and the pieces of each.
    """

    key: str
    title: str
    counts: list[tuple[str, str]]
    tokens: list[tuple[str, int, int, int]]
    lengths: list[tuple[int, int, int]]
    warnings: list[str]
    examples: list[tuple[str, list[Piece]]]


def inspect(opened: OpenedDecoder, rows: Any, key: str, shown: int) -> Inspection:
    """Count the tokens of `rows`, the set of the config key `key`, data.train or data.eval.

    The first `shown` examples of training, or of the evaluation set, are kept. Raises UserError for
    a set on which training would fail or learn nothing but the end of texts.
    """
    training = key == "data.train"
    tokenizer, options = opened.tokenizer, opened.options
    size = opened.model_cfg.vocab_size
    stops = [stop for stop in opened.stop_ids(rows.data.chat) if stop < size]
    texts = partial(texts_of, options, rows.data)
    tally = count(rows.data, texts, tokenizer.bos_token_id, size)
    if not options.scored and tally.trained.sum() == tally.trained[stops].sum():
        ends = " and ".join(map(repr, tokenizer.convert_ids_to_tokens(stops)))
        raise UserError(
            f"{key}={rows.name!r}: no example has a trained token besides {ends}; expected a text,"
            " completion, answer or label in each"
        )
    counts = [*_counts(rows.data.report, tally)]
    order: Any = range(len(rows))
    if training:
        counts.append(("positions with a token", _filled(rows, opened.cfg.batch_size)))
        order = sample_order(len(rows), opened.cfg.seed, rows.shares)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = sorted(special | {*stops})
    examples = []
    for place in range(min(shown, len(rows))):
        for name, (tokens, weights) in texts(int(order[place])):
            heading = f"{name}: {len(tokens)} tokens, {int(weights.sum())} trained"
            examples.append((heading, pieces(tokenizer, tokens, weights > 0, ids)))
    return Inspection(
        key,
        rows.describe(),
        counts,
        _special_tokens(tokenizer, stops, tally),
        _histogram(tally.lengths),
        _warnings(rows.data, tokenizer, [] if options.scored else stops, tally),
        examples,
    )


def texts_of(options: LLMOptions, data: Any, index: int) -> list[tuple[str, Example]]:
    """Return the texts of an example by name: one, or the two sides of a pair.

    A head of scores counts as trained at the token where it is read.
    """
    where, example = data.records.where(int(data.record_ids[index])), data[index]
    if options.objective == "kto":
        side = "desirable" if example.desirable else "undesirable"
        named = zip((side, "answer to another prompt"), example.sides, strict=True)
    elif options.pairs:
        named = zip(("chosen", "rejected"), example.sides, strict=True)
    elif options.scored:
        named = [(data.rule.name(example.label), example.example)]
    else:
        return [(where, example)]
    found = [(f"{where}, {name}", one) for name, one in named]
    if options.scored:  # position t belongs to target t + 1
        found = [(name, Example(one.tokens[:-1], one.weights[1:])) for name, one in found]
    return found


def count(
    data: Any, texts: Callable[[int], list[tuple[str, Example]]], bos: int | None, vocab_size: int
) -> Tally:
    """Count the tokens of all texts. Raises UserError for one that begins with two BOS."""
    used, trained = np.zeros((2, vocab_size), np.int64)
    lengths, n_bos = [], 0
    for first in range(0, len(data), COUNTED_AT_ONCE):
        some = range(first, min(first + COUNTED_AT_ONCE, len(data)))
        found = [one for index in some for one in texts(index)]
        for name, (tokens, _) in found:
            lengths.append(len(tokens))
            begin = tokens[:2].tolist()
            n_bos += begin[:1] == [bos]
            if begin == [bos, bos]:
                raise UserError(
                    f"{name}: the example begins with two BOS tokens; delete those of the text, as"
                    " the tokenizer adds one"
                )
        tokens = np.concatenate([one.tokens for _, one in found])
        weights = np.concatenate([one.weights for _, one in found])
        used += np.bincount(tokens, minlength=vocab_size)
        trained += np.bincount(tokens[weights > 0], minlength=vocab_size)
    return Tally(np.asarray(lengths, np.int64), used, trained, n_bos)


def pieces(
    tokenizer: Any, tokens: Int[np.ndarray, " n"], trained: Bool[np.ndarray, " n"], special: Any
) -> list[Piece]:
    """Cut an example into texts of the same kind. `special` holds the ids to show as special."""
    decode = partial(
        tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    marks = np.isin(tokens, list(special))
    edges = np.flatnonzero((np.diff(trained) != 0) | (np.diff(marks) != 0)) + 1
    found, before = [], ""
    for start, stop in zip([0, *edges], [*edges, len(tokens)], strict=True):
        # The text so far is decoded too, as tokenizers leave out the blank of a first word.
        text = decode(tokens[:stop])
        own = text.removeprefix(before) if text.startswith(before) else decode(tokens[start:stop])
        found.append(Piece(_visible(own), bool(trained[start]), bool(marks[start])))
        before = text
    return found


def _visible(text: str) -> str:
    """Replace control characters, which would move the cursor of a terminal, by their escapes."""
    hidden = {c for c in text if category(c) == "Cc" and c not in "\n\t"}
    return text.translate({ord(c): ascii(c)[1:-1] for c in hidden})


def _counts(report: dict[str, int], tally: Tally) -> list[tuple[str, str]]:
    tokens, trained = int(tally.lengths.sum()), int(tally.trained.sum())
    dropped = {
        "empty": report["empty"],
        "nothing to train": report["untrained"],
        "equal sides": report.get("equal", 0),
        "longer than seq_len": report.get("too_long", 0),
    }
    reasons = ", ".join(f"{number} {name}" for name, number in dropped.items() if number)
    shares = {name: report[name] for name in ("truncated", "split") if report.get(name)}
    return [
        ("records", str(report["records"])),
        ("examples", str(len(tally.lengths))),
        ("tokens", str(tokens)),
        ("trained tokens", f"{trained} ({trained / tokens:.1%})"),
        *((f"records {name}", str(number)) for name, number in shares.items()),
        ("dropped", f"{sum(dropped.values())} ({reasons})" if reasons else "0"),
    ]


def _filled(rows: Any, batch_size: int) -> str:
    """Return the share of positions that are no padding, in the first batches of training."""
    batches = islice(rows.batches(0, slice(0, batch_size)), BATCHES)
    segments = [batch["segment_ids"] for batch in batches]
    filled = sum(int((one > 0).sum()) for one in segments) / sum(one.size for one in segments)
    how = "packed" if rows.packing.per_row > 1 else "one example a row"
    return f"{filled:.1%} ({how}, {BATCHES} batches)"


def _special_tokens(
    tokenizer: Any, stops: Sequence[int], tally: Tally
) -> list[tuple[str, int, int, int]]:
    """Return name, id, count and trained count of BOS, EOS and the tokens that end a turn."""
    named = [(tokenizer.bos_token_id, "BOS"), (tokenizer.eos_token_id, "EOS")]
    named += [(stop, "end of turn") for stop in stops if stop != tokenizer.eos_token_id]
    return [
        (
            f"{name} {tokenizer.convert_ids_to_tokens(i)}",
            i,
            int(tally.used[i]),
            int(tally.trained[i]),
        )
        for i, name in named
        if i is not None and i < len(tally.used)
    ]


def _histogram(lengths: Int[np.ndarray, " n"]) -> list[tuple[int, int, int]]:
    """Return (first length, last length, examples) of intervals of one width, from 1 token on."""
    longest = int(lengths.max())
    width = -(-longest // LENGTHS)
    bars = np.bincount((lengths - 1) // width)
    return [
        (i * width + 1, min((i + 1) * width, longest), int(number)) for i, number in enumerate(bars)
    ]


def _warnings(data: Any, tokenizer: Any, stops: Sequence[int], tally: Tally) -> list[str]:
    found, report = [], data.report
    if stops and not tally.trained[[*stops]].any():
        ends = ", ".join(tokenizer.convert_ids_to_tokens([*stops]))
        found.append(f"no end of a text ({ends}) is trained: the model will not learn to stop")
    if make_encoder(tokenizer).bos is not None and not tally.n_bos:
        found.append("no example begins with BOS, which the tokenizer puts before other texts")
    if 10 * report["truncated"] > report["records"]:
        cut = report["truncated"]
        found.append(f"{cut} of {report['records']} records are truncated: raise seq_len")
    return found
