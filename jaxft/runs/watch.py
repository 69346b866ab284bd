"""Output of a run: records of every step, evaluations, samples, and the table at the end."""

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft.core import runtime
from jaxft.core.errors import BAD_SAMPLES, DIVERGED, UserError
from jaxft.core.guards.best import BEST_FILE, Best
from jaxft.core.guards.faults import inject
from jaxft.core.guards.watchdog import Watchdog, count_start
from jaxft.core.metrics import MetricWriter, Throughput, table, without_members
from jaxft.core.params import Params
from jaxft.core.sharding import local_rows
from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.opening import Run, completed
from jaxft.runs.pages.records import read_history
from jaxft.runs.pages.report import REPORT, write_report
from jaxft.runs.pages.samples import Samples
from jaxft.runs.tracking import open_tracker
from jaxft.tasks import Data, Objective, Preview, Report, Sheet

MANIFEST = "manifest.json"  # environment, mesh and data of a run
SKIPS_IN_ROW, SKIPS = 10, 50  # steps that are not finite, after which a start of a run ends
PROMPT_END = 80  # characters of the prompt of a sample that a line shows
ROW_TEXT, ROW_REST = 60, 40  # columns of a text in the last table, and those of a line beside it
BEFORE = "before.json"  # the evaluation before step 0, for the final table of a resumed run too


class _Pending(NamedTuple):
    """A dispatched step whose numbers are still on the device."""

    step: int
    sums: dict[str, Any]
    units: int
    shown: bool


class Watch:
    """Writer of a run's records, evaluations and samples. It holds no part of the state.

    skipped_in_row: steps since the last one that was finite.
    """

    def __init__(
        self,
        run: Run,
        data: Data,
        objective: Objective,
        preview: Preview,
        workdir: Path,
        watchdog: Watchdog,
        *,
        total: int,
        start: int,
    ):
        self.run, self.workdir, self.total, self.start = run, workdir, total, start
        self.watchdog = watchdog
        self.objective, self.preview = objective, preview
        self.primary = jax.process_index() == 0
        tracker = open_tracker(run.cfg.track, workdir) if self.primary else None
        self.writer = MetricWriter(workdir, total, start, primary=self.primary, tracker=tracker)
        self.throughput = Throughput(
            runtime.device(run.mesh).kind, jax.device_count(), objective.unit
        )
        rows = local_rows(run.mesh, run.cfg.batch_size)  # the same for tensor parallel processes
        self.processes = run.cfg.batch_size / (rows.stop - rows.start)
        self.flops_per_unit = objective.flops(run.trained_leaves) * run.copies
        self.pending: _Pending | None = None
        self._before = "the first step of this start, from finite weights"
        self.skipped_in_row = self._skipped = 0
        self.last = time.perf_counter()
        self.samples = Samples(workdir)
        self.manifest = {"command": runtime.command_line(), "total_steps": total}
        self.data, self._bad = data, -1
        self._totals = _totals(workdir / MANIFEST, run.cfg.total, start)
        self._describe_data()

    def _describe_data(self) -> None:
        """Write the counts of the data, and the bad samples. Training may find more of these."""
        sets = [rows for rows in (self.data.train, self.data.held_out) if rows is not None]
        bad = [one for rows in sets for one in rows.bad]
        if len(bad) == self._bad:
            return
        self._bad, cfg = len(bad), self.run.cfg
        named = {"train": cfg.data.train, "eval": cfg.data.eval, **self.data.train.report()}
        shapes = {path: list(self.run.leaves[path].shape) for path in sorted(self.run.chosen)}
        self.manifest |= {"totals": self._totals, "trained": shapes}
        self.manifest |= runtime.manifest(self.run.mesh, named)
        self._keep(MANIFEST, self.manifest)
        if bad and self.primary:
            lines = [json.dumps(one._asdict()) + "\n" for one in bad]
            (self.workdir / BAD_SAMPLES).write_text("".join(lines))

    def train(
        self,
        step: int,
        sums: dict[str, Any],
        batch: dict[str, np.ndarray],
        waited: float,
        shown: bool,
    ) -> None:
        """Hold the numbers of a step that was just dispatched, and write those of the last one."""
        units = round(self.objective.units(batch) * self.processes)
        self._write_held(waited)
        self.watchdog.arm(step)
        if step == self.start + 1 and self.primary:
            count_start(self.workdir, self.start)
        self.pending = _Pending(step, sums, units, shown)
        inject("step", step, jax.process_index())

    def flush(self) -> None:
        """Write the numbers of the held step. Waits until the device has finished it.

        What follows is not part of a step. Raises: UserError if too many steps were skipped,
        because they were not finite.
        """
        self._write_held()
        self.watchdog.pause()

    def _write_held(self, waited: float = 0.0) -> None:
        """Write the numbers of the held step as `flush`.

        waited: the time that the next step's batch took since then.
        """
        self._describe_data()
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        sums = {name: float(value) for name, value in pending.sums.items()}
        now = time.perf_counter()
        flops = self.flops_per_unit * pending.units
        rates = self.throughput.rates(pending.units, now - self.last, waited, flops)
        self.last = now
        # A finite loss may have gradients that are not.
        if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(sums[name])]:
            self._skip(pending.step, f"{bad[0]} is {sums[bad[0]]}")
        else:
            self.skipped_in_row = 0
            self._before = f"loss {sums['loss']:.4g}, grad_norm {sums['grad_norm']:.4g} before them"
        self.writer.write(pending.step, sums | rates, shown=pending.shown)

    def _skip(self, step: int, reason: str) -> None:
        """Count a step that changed no parameter. Raises: UserError if there are too many."""
        self.skipped_in_row, self._skipped = self.skipped_in_row + 1, self._skipped + 1
        if self.skipped_in_row < SKIPS_IN_ROW and self._skipped < SKIPS:
            self.note(f"step {step} is skipped, because its {reason}")
            return
        many = (
            f"{self.skipped_in_row} steps in a row"
            if self.skipped_in_row > 1
            else f"{self._skipped} steps"
        )
        raise UserError(
            f"{reason} at step {step}, and {many} were skipped for such numbers; the newest"
            f" checkpoint is from before ({self._before}): lower optim.lr or lengthen"
            " optim.warmup, in another --workdir, or look for odd records in those batches",
            DIVERGED,
        )

    def evaluate(self, step: int, params: Params) -> Report:
        """Return the evaluation of the model before `step`'s update, and write it.

        Raises UserError as `check_losses`.
        """
        self.flush()
        self.writer.busy("evaluating")
        every = completed(self.run, params, self.preview.unread.evaluate)
        report = self.preview.evaluate(every, self.run.mesh)
        self.writer.busy("")
        check_losses(report, f"step {step} of {self.workdir}")
        if report.metrics:
            self.writer.write_eval(step, report.metrics)
        self._show(step, report.pictures, report.sheets)
        if report.rows and self.primary:
            self.samples.write_rows(step, "predictions", report.headers, report.rows)
        self._refresh()
        self.last = time.perf_counter()
        return report

    def _refresh(self) -> None:
        """Write the report of the run as it is now."""
        if not self.primary:
            return
        self.manifest |= runtime.peak_memory(self.run.mesh)
        self._keep(MANIFEST, self.manifest)
        try:
            write_report(self.workdir)
        except Exception as error:  # no page is worth the training that it is about
            self.note(f"{REPORT} is not written: {type(error).__name__}: {error}")

    def begin(self, params: Params) -> Report:
        """Evaluate and sample the model before step 0, and keep the numbers for the last table."""
        report = self.evaluate(0, params)
        record = {"metrics": report.metrics, "headers": report.headers, "rows": report.rows}
        self._keep(BEFORE, record)
        self.look(0, params)
        return report

    def keep_best(self, best: Best, saved: Checkpoints, ended: int | None = None) -> Best:
        """Keep the checkpoint of the best step, and write the step to best.json. Return `best`.

        ended: the step at which the run stopped early.
        """
        saved.kept.best = best.step
        if best.step is not None:
            named = {"measure": best.measure, "step": best.step, "value": best.value}
            self._keep(BEST_FILE, {**named, "waited": best.waited, "ended": ended})
        return best

    def _keep(self, name: str, record: dict[str, Any]) -> None:
        if self.primary:
            (self.workdir / name).write_text(json.dumps(record, indent=2) + "\n")

    def look(self, step: int, params: Params) -> None:
        """Print and write samples of the model before `step`'s update."""
        self.flush()
        self.writer.busy("sampling")
        sampled = self.preview.sample(completed(self.run, params, self.preview.unread.sample))
        self.writer.busy("")
        self.note(sampled.text)
        for *given, made in sampled.rows:
            named = zip(sampled.headers[1:], given[1:], strict=False)
            beside = "".join(f" ({name} {text!r})" for name, text in named)
            prompt = given[0]
            prompt = prompt if len(prompt) <= PROMPT_END else f"…{prompt[-PROMPT_END:]}"
            self.note(f"{prompt!r} -> {made!r}{beside}")
        if sampled.rows and self.primary:
            self.samples.write_rows(step, "texts", sampled.headers, sampled.rows)
        self._show(step, sampled.pictures, sampled.sheets)
        self._refresh()
        self.last = time.perf_counter()

    def _show(
        self, step: int, pictures: Mapping[str, np.ndarray], sheets: Mapping[str, Sheet]
    ) -> None:
        """Write pictures and sheets to samples/NAME-STEP.png and to the trackers."""
        if not self.primary:
            return
        shown = {name: self.samples.write_sheet(step, name, x) for name, x in sheets.items()}
        for name, picture in pictures.items():
            self.samples.write_picture(step, name, picture)
        for name, picture in {**shown, **pictures}.items():
            self.writer.image(step, name, picture)
            self.note(f"{name}: {self.samples.path(step, name)}")

    def note(self, text: str) -> None:
        if text:
            self.writer.note(text)

    def close(self, step: int, after: Report | None, params: Params, seconds: float) -> None:
        """Write the last lines: metrics before and after, samples, the export's path, the time.

        step: that of `params`, which is earlier than the last one where the best step is kept.
        """
        if step < self.total:
            after = Report(read_history(self.workdir).measures(step))
            self.note(f"step {step} is the best of {self.total}, and the one that is exported")
        file = self.workdir / BEFORE
        before = Report(**json.loads(file.read_text())) if file.exists() else Report({})
        self.note(_comparison(before, after or before))
        if after is not None:
            self.look(step, params)
        if self.run.cfg.export.kind != "none":
            self.note(f"export ({self.run.cfg.export.kind}): {self.workdir / 'export'}")
        self.manifest |= {"finished": True, "seconds": round(seconds, 1)}
        self._refresh()
        self.note(f"report: {self.workdir / REPORT}")
        self.note(f"done in {seconds / 60:.1f} minutes")
        self.writer.close()


def _totals(file: Path, total: str, start: int) -> list[dict[str, Any]]:
    """Return the lengths that a run had, each with the step from which it held."""
    former = json.loads(file.read_text()).get("totals", []) if start and file.is_file() else []
    if former and former[-1]["total"] == total:
        return former
    return [*former, {"total": total, "from_step": start}]


def check_losses(report: Report, where: str) -> None:
    """Raise UserError for an evaluation whose loss is NaN or infinite, which is no result."""
    for name, value in report.metrics.items():
        if "loss" in name.split("_") and not math.isfinite(value):
            raise UserError(
                f"{name} of data.eval is {value} at {where}; the weights or a record of data.eval"
                " give numbers that are not finite: try compute_dtype=float32, or another model"
            )


def _comparison(before: Report, after: Report) -> str:
    """Return tables of the metrics before and after, and of the rows with both predictions."""
    shown = without_members(after.metrics) if after.rows else after.metrics
    rows = [(name, before.metrics.get(name), value) for name, value in shown.items()]
    parts = [table(rows, ("metric", "before", "after"))] if rows else []
    if after.rows:
        headers = (*after.headers[:-1], f"{after.headers[-1]} before", "after")
        earlier = {tuple(row[:-1]): row[-1] for row in before.rows or after.rows}
        width = min(ROW_TEXT, shutil.get_terminal_size((100, 0)).columns - ROW_REST)
        both = [
            (*(_clip(str(cell), width) for cell in given), earlier.get(tuple(given), ""), made)
            for *given, made in after.rows
        ]
        parts.append(table(both, headers))
    return "\n\n".join(parts)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
