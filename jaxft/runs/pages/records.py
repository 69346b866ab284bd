"""The files of a run folder, read for its report. Torn or absent files leave gaps."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MANY = 3000  # train records that are read, equally far apart


class History(NamedTuple):
    """Records of training and of evaluations, in the order of their steps."""

    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]

    def curve(self, key: str, evaluated: bool = False) -> tuple[list[float], list[float]]:
        """Return steps and values of a key, without the records that lack it."""
        records = self.evals if evaluated else self.train
        pairs = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def measures(self, at: int | None = None) -> dict[str, float]:
        """Return the measures of the evaluation at a step, by default the last, without `eval_`.

        Those that were not finite are left out.
        """
        found = [one for one in self.evals if at is None or one["step"] == at]
        record = found[-1] if found else {}
        named = ((k.removeprefix("eval_"), v) for k, v in record.items() if k.startswith("eval_"))
        return {name: value for name, value in named if isinstance(value, int | float)}

    @property
    def last(self) -> int:
        return max((one["step"] for one in (*self.train[-1:], *self.evals[-1:])), default=0)


def read_history(workdir: Path) -> History:
    """Return the records of metrics.jsonl. Of long runs only every k-th train record is read."""
    try:
        lines = (workdir / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return History([], [])
    is_eval = [b'"eval_' in line for line in lines]
    trained = [line for line, one in zip(lines, is_eval, strict=True) if not one]
    every = -(-len(trained) // MANY) or 1
    some = trained[:-1:every] + trained[-1:]
    evals = {
        r["step"]: r for r in _records(line for line, e in zip(lines, is_eval, strict=True) if e)
    }
    return History(list(_records(some)), [evals[step] for step in sorted(evals)])


def _records(lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every value that is not empty, lists in one line."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            if value:
                yield prefix + key, ", ".join(map(str, value))
        elif value not in (None, ""):
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            yield prefix + key, f"{value:,}" if type(value) is int else text
