"""Measure a run: `python -m jaxft.evaluate --workdir DIR [--step N] [--config.data.eval=SPEC]`."""

import json
import sys
from pathlib import Path

from PIL import Image

from jaxft.core import processes
from jaxft.core.cli.arguments import parse
from jaxft.core.cli.live import status
from jaxft.core.errors import UserError
from jaxft.tasks import OPTIONS, Data, Report


def main(argv: list[str] | None = None) -> int:
    """Print the metrics of a checkpoint, or with --config those of the untrained model."""
    return processes.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    arguments = parse("evaluate", argv, OPTIONS)
    status("loading jax")
    import jax

    from jaxft.core.metrics import table, without_members
    from jaxft.runs.agreement import agreement
    from jaxft.runs.opening import encode, preview
    from jaxft.runs.restoring import facts, open_any
    from jaxft.runs.watch import check_losses

    run, params, step = open_any(arguments)
    if not run.cfg.data.eval:
        raise UserError("data.eval is empty; give the data to measure on with --config.data.eval")
    with agreement():
        held_out = run.task.read(run.opened, run.cfg.data.eval, False)
    status("evaluating")
    with jax.set_mesh(run.mesh):
        data = Data(held_out=held_out, facts=facts(arguments.options.get("workdir")))
        encode(run, data, params, step)
        report = preview(run, data).evaluate(params, run.mesh)
    status("")
    check_losses(report, f"step {step}")
    shown = without_members(report.metrics)
    rows = [(name, f"{value:.6g}") for name, value in shown.items()]
    print(table(rows, ("metric", f"step {step}")))
    if report.rows:
        print(table(report.rows, report.headers))
    if "workdir" in arguments.options and jax.process_index() == 0:
        _write(Path(arguments.options["workdir"]), step, report)


def _write(workdir: Path, step: int, report: Report) -> None:
    """Write metrics, and the predictions and the pictures if there are any."""
    file = workdir / f"evaluation-{step}.json"
    file.write_text(json.dumps({"step": step, **report.metrics}, indent=2) + "\n")
    written = [file]
    if report.predictions:
        written.append(workdir / f"predictions-{step}.jsonl")
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in report.predictions)
        written[-1].write_text("".join(lines), encoding="utf-8")
        for name, picture in report.pictures.items():
            written.append(workdir / f"evaluation-{step}-{name}.png")
            Image.fromarray(picture).save(written[-1])
    print(f"written to {', '.join(map(str, written))}")


if __name__ == "__main__":
    processes.restart_with_huge_pages()
    sys.exit(main())
