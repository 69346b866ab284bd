"""Token ids of a set: in memory, or of a large set in files that are mapped into memory."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxft.core.errors import UserError

# Bytes of text whose ids stay in memory: at most 256 MiB of int32, as a token has a byte or more.
IN_MEMORY = 64 << 20
_TOKENS, _TRAINED, _EXAMPLES, _FACTS = "tokens.bin", "trained.bin", "examples.npz", "facts.json"


class Encoded(NamedTuple):
    """A tokenised record: ids, mask of trained tokens, and UTF-8 bytes of text a token."""

    tokens: Int[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]
    n_bytes: Int[np.ndarray, " n"]


class EncodedRecord(NamedTuple):
    """A tokenised record in examples: ids, mask of trained ids, and examples.

    spans: [start, stop) of each example in the record. record_id: index in the source.
    n_trained, n_bytes: trained tokens of each example, and the UTF-8 bytes of their text.
    """

    tokens: Int[np.ndarray, " t"]
    trained: Bool[np.ndarray, " t"]
    spans: list[tuple[int, int]]
    record_id: int
    n_trained: list[int]
    n_bytes: list[int]


class Flat(NamedTuple):
    """All records in flat arrays: tokens int32 [total], trained bool [total], examples [n]."""

    tokens: np.ndarray
    trained: np.ndarray
    spans: Int[np.ndarray, "n 2"]
    record_ids: Int[np.ndarray, " n"]
    n_trained: Int[np.ndarray, " n"]
    n_bytes: Int[np.ndarray, " n"]


def byte_positions(text: str, chars: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the UTF-8 byte position of each character position."""
    if text.isascii():
        return chars
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])[chars]


def in_memory(parts: Iterator[EncodedRecord]) -> Flat:
    """Join the records in memory."""
    tokens: list[np.ndarray] = [np.zeros(0, np.int32)]
    trained: list[np.ndarray] = [np.zeros(0, bool)]

    def add(part: EncodedRecord) -> None:
        tokens.append(part.tokens)
        trained.append(part.trained)

    examples = _join(parts, add)
    return Flat(np.concatenate(tokens), np.concatenate(trained), *examples)


def on_disk(folder: Path, make: Callable[[dict], Iterator[EncodedRecord]]) -> tuple[Flat, dict]:
    """Return the records in `folder` and facts about them.

    An existing folder is read. Its name has to identify its content. Otherwise `make(facts)` yields
    the records and fills in `facts`. The files are first written under another name, so that they
    are complete or absent. Raises UserError if they cannot be written or read.
    """
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                _write(made, make)
                _publish(made, folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        with np.load(folder / _EXAMPLES) as examples:
            arrays = [examples[name] for name in Flat._fields[2:]]
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        return Flat(
            _mapped(folder / _TOKENS, np.int32), _mapped(folder / _TRAINED, bool), *arrays
        ), facts
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot keep tokenised text in {folder}: {reason}; free some space, delete the"
            " folder, or choose another cache"
        ) from error


def _write(folder: Path, make: Callable[[dict], Iterator[EncodedRecord]]) -> None:
    facts: dict = {}
    with open(folder / _TOKENS, "wb") as tokens, open(folder / _TRAINED, "wb") as trained:

        def add(part: EncodedRecord) -> None:
            tokens.write(part.tokens.astype(np.int32).tobytes())
            trained.write(part.trained.astype(bool).tobytes())

        spans, record_ids, n_trained, n_bytes = _join(make(facts), add)
        _sync(tokens)
        _sync(trained)
    with open(folder / _EXAMPLES, "wb") as file:
        np.savez(file, spans=spans, record_ids=record_ids, n_trained=n_trained, n_bytes=n_bytes)
        _sync(file)
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _publish(made: Path, folder: Path) -> None:
    """Rename a complete folder, unless another process has already made it."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _join(parts: Iterator[EncodedRecord], add: Callable[[EncodedRecord], None]) -> list[np.ndarray]:
    """Call `add` with each record. Return the arrays of all examples, in the order of Flat."""
    spans, record_ids, n_trained, n_bytes = [], [], [], []
    end = 0
    for part in parts:
        add(part)
        spans += [(end + start, end + stop) for start, stop in part.spans]
        record_ids += [part.record_id] * len(part.spans)
        n_trained += part.n_trained
        n_bytes += part.n_bytes
        end += len(part.tokens)
    return [
        np.asarray(spans, np.int64).reshape(-1, 2),
        np.asarray(record_ids, np.int32),
        np.asarray(n_trained, np.int64),
        np.asarray(n_bytes, np.int64),
    ]


def _mapped(file: Path, dtype: type) -> np.ndarray:
    return np.asarray(np.memmap(file, dtype, "r")) if file.stat().st_size else np.zeros(0, dtype)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
