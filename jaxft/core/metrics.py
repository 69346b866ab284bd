"""The outputs of a run's numbers: metrics.jsonl, TensorBoard, and a progress line on stdout."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter

from jaxft.core.cli.live import live_line
from jaxft.core.runtime import find_chip

# Metrics of a sweep: the highest loss of its members, and those that each member has, KEY/MEMBER.
WORST_MEMBER, OF_MEMBERS = "worst", ("loss/", "accuracy/")


@dataclass(frozen=True)
class Throughput:
    """Rates between two log lines, summed over all `devices`."""

    device_kind: str
    devices: int
    unit: str = "tokens"

    def rates(
        self, count: float, seconds: float, data_wait: float = 0.0, flops: float = 0.0
    ) -> dict[str, float]:
        """Return the rates of `count` units and `flops` that all devices did together.

        `seconds` is wall time, and `data_wait` the part of it spent waiting for a batch. If `flops`
        is not 0, the result has `mfu` (a share of the peak) on a device of known peak, and
        `gflops_per_s` on any other.
        """
        rates = {
            f"{self.unit}_per_s": count / seconds,
            "data_wait_share": data_wait / seconds,
        }
        if not flops:
            return rates
        chip = find_chip(self.device_kind)
        if chip is None:
            return rates | {"gflops_per_s": flops / seconds / 1e9}
        return rates | {"mfu": flops / seconds / (chip.flops * self.devices)}


class Tracker(Protocol):
    """A service that keeps the numbers and the pictures of a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W C"]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Events below a folder. Those after `resume_step` of an earlier start are hidden."""

    def __init__(self, folder: Path, resume_step: int):
        self._events = SummaryWriter(str(folder), purge_step=resume_step + 1, flush_secs=10)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W C"]) -> None:
        self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._events.close()


class MetricWriter:
    """Writer of a run's records, which also prints them. Only the primary process writes.

    A record is one line of `workdir/metrics.jsonl`: a JSON object with `step` first, flushed at
    once. A number that is not finite is written as null, because JSON has no NaN. A resumed run
    first drops the records that it will write again: records after `resume_step`, a line that was
    cut off by a kill, and the evaluation at `resume_step` if that is the run's first or last step.

    tracker: gets what TensorBoard gets, too.
    """

    def __init__(
        self,
        workdir: Path | str,
        total_steps: int,
        resume_step: int = 0,
        *,
        primary: bool = True,
        tracker: Tracker | None = None,
    ) -> None:
        self._primary = primary
        if not primary:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _truncate(path, resume_step, total_steps)
        self._file = path.open("a", encoding="utf-8")
        board = TensorBoard(workdir / "tensorboard", resume_step)
        self._trackers: list[Tracker] = [board, *([tracker] if tracker else [])]
        self._progress = _Progress(total_steps, resume_step, sys.stdout.isatty())

    def write(self, step: int, record: Mapping[str, Any], *, shown: bool = True) -> None:
        """Write a train record: strings, numbers and arrays of one value, by name.

        shown: False leaves the record out of the printed lines if stdout is not a terminal. The
        live line of a terminal shows every record.
        """
        if self._primary:
            record = self._record(step, record, "")
            self._progress.train(step, record, shown)

    def write_eval(self, step: int, record: Mapping[str, Any]) -> None:
        """Write the record of an evaluation. Each key gets the prefix `eval_`."""
        if self._primary:
            record = self._record(step, record, "eval_")
            shown = without_members({k.removeprefix("eval_"): v for k, v in record.items()})
            pairs = [f"{key} {_cell(value)}" for key, value in shown.items()]
            self._progress.note(f"eval at step {step} | " + " | ".join(pairs))

    def note(self, text: str) -> None:
        """Print a line of text. It is not kept in a file."""
        if self._primary:
            self._progress.note(text)

    def busy(self, text: str) -> None:
        """Show on the live line of a terminal what runs beside the steps. "" shows the steps."""
        if self._primary:
            self._progress.busy(text)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W C"]) -> None:
        """Write a picture [H, W, C] to the trackers."""
        if self._primary:
            for tracker in self._trackers:
                tracker.image(step, name, image)

    def close(self) -> None:
        """End the progress line, and flush and close the files."""
        if self._primary:
            self._progress.end()
            self._file.close()
            for tracker in self._trackers:
                tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, step: int, record: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        plain = {prefix + key: _plain(value) for key, value in record.items()}
        self._file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
        self._file.flush()
        group = "eval" if prefix else "train"
        numbers = {
            f"{group}/{key.removeprefix(prefix)}": value
            for key, value in plain.items()
            if isinstance(value, int | float)
        }
        for tracker in self._trackers:
            tracker.scalars(step, numbers)
        return plain


class _Progress:
    """A live line on a terminal. Elsewhere, one line a record."""

    def __init__(self, total_steps: int, resume_step: int, live: bool) -> None:
        self._total = total_steps
        self._bar = self._drawn(resume_step, f"step {resume_step}/{total_steps}")
        self._line = live_line(sys.stdout) if live else None
        self._first: tuple[int, float] | None = None

    def train(self, step: int, record: Mapping[str, Any], shown: bool) -> None:
        start, rates, left = f"step {step}/{self._total}", _headline(record), self._eta(step)
        if self._line is None:
            if shown:
                print(" | ".join([start, *rates, *left]), flush=True)
            return
        # A narrow terminal cuts the end off: the time left stands in front.
        self._bar = self._drawn(step, " | ".join([start, *left, *rates]))
        self._line.show(self._bar)

    def _drawn(self, step: int, line: str) -> str:
        done = round(20 * min(1.0, step / max(1, self._total)))
        return f"[{'#' * done}{'.' * (20 - done)}] {line}"

    def busy(self, text: str) -> None:
        if self._line is not None:
            bar = self._bar.partition(" | ")[0]
            self._line.show(" | ".join(filter(None, (bar, text))) if text else self._bar)

    def note(self, text: str) -> None:
        if self._line is None:
            print(text, flush=True)
        else:
            self._line.above(text + "\n", self._line.stream)

    def end(self) -> None:
        if self._line is not None:
            self._line.end()

    def _eta(self, step: int) -> list[str]:
        """Return the time left, as a list of one text, or of none at the first record.

        The rate is measured from the first record on, because the time before it includes the
        compilation of the step.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step <= first_step:
            return []
        left = (now - first_time) / (step - first_step) * max(0, self._total - step)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return [f"ETA {hours}h{minutes:02}m" if hours else f"ETA {minutes}m{seconds:02}s"]


def without_members(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics without those of each member of a sweep, which have a table of their own."""
    return {key: x for key, x in metrics.items() if not key.startswith(OF_MEMBERS)}


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Return a text table. The first column is aligned left, the others right.

    Floats are shown with 4 significant digits.
    """
    cells = [list(headers), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _truncate(path: Path, last_step: int, total_steps: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _is_kept(line, last_step, total_steps)]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _is_kept(line: str, last_step: int, total_steps: int) -> bool:
    """Return True for a complete record that a run resumed from `last_step` does not write again.

    A run evaluates before its first step and after its last one: the evaluation at these steps is
    written again.
    """
    try:
        record = json.loads(line)
        step = record["step"]
    except (ValueError, KeyError, TypeError):
        return False
    repeated = last_step in (0, total_steps) and any(key.startswith("eval_") for key in record)
    return step < last_step if repeated else step <= last_step


def _plain(value: Any) -> Any:
    """Return a JSON value. A float that is not finite becomes None. Arrays hold one number."""
    if value is None or isinstance(value, str | bool | int):
        return value
    number = np.asarray(value).item()
    return number if isinstance(number, bool | int) or math.isfinite(number) else None


def _headline(record: Mapping[str, Any]) -> list[str]:
    """Return the parts of a progress line: the loss and the rates that the record has."""
    parts = []
    if "loss" in record:
        parts.append(f"loss {_cell(record['loss'])}")
    if WORST_MEMBER in record:
        parts.append(f"worst {_cell(record[WORST_MEMBER])}")
    for key, value in record.items():
        if key.endswith("_per_s") and key != "gflops_per_s" and value is not None:
            parts.append(f"{_short(value)} {key.removesuffix('_per_s')}/s")
    for key, form in (
        ("mfu", lambda x: f"MFU {x:.1%}"),
        ("gflops_per_s", lambda x: f"{_short(x)} GFLOP/s"),
        ("data_wait_share", lambda x: f"data wait {x:.1%}"),
    ):
        if record.get(key) is not None:
            parts.append(form(record[key]))
    return parts


def _cell(value: Any) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
