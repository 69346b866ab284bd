"""Measure a run: `python -m jaxft.evaluate --workdir DIR [--step N] [--config.data.eval=SPEC]`."""

import json
import sys
from pathlib import Path

from jaxft.core import processes, runtime
from jaxft.core.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Print the metrics of a checkpoint, or with --config those of the untrained model."""
    return processes.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    arguments = runtime.parse_arguments(argv, ("config", "workdir", "step"))
    import jax

    from jaxft.core.metrics import table
    from jaxft.runs.agreement import agreement
    from jaxft.runs.opening import preview
    from jaxft.runs.restoring import facts, open_any
    from jaxft.tasks import Data

    run, params, step = open_any(arguments)
    if not run.cfg.data.eval:
        raise UserError("data.eval is empty; give the data to measure on with --config.data.eval")
    with agreement():
        held_out = run.task.read(run.opened, run.cfg.data.eval, False)
    with jax.set_mesh(run.mesh):
        data = Data(held_out=held_out, facts=facts(arguments.options.get("workdir")))
        report = preview(run, data, params, step).evaluate(params, run.mesh)
    rows = [(name, f"{value:.6g}") for name, value in report.metrics.items()]
    print(table(rows, ("metric", f"step {step}")))
    if report.rows:
        print(table(report.rows, report.headers))
    if "workdir" in arguments.options and jax.process_index() == 0:
        file = Path(arguments.options["workdir"]) / f"evaluation-{step}.json"
        file.write_text(json.dumps({"step": step, **report.metrics}, indent=2) + "\n")
        print(f"written to {file}")


if __name__ == "__main__":
    processes.restart_with_huge_pages()
    sys.exit(main())
