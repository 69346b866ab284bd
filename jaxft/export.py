"""Export weights: `python -m jaxft.export --workdir DIR [--step N] [--out DIR] [--kind …]`."""

import re
import sys
import tempfile
from pathlib import Path

import jax
from jax.experimental.multihost_utils import sync_global_devices

from jaxft.core import processes
from jaxft.core.cli.arguments import parse
from jaxft.core.configs.schema import CHOICES
from jaxft.core.errors import UserError
from jaxft.core.guards.faults import inject
from jaxft.core.guards.fingerprint import not_finite
from jaxft.core.params import ADAPTER_ROLE, Params, named, unpacked
from jaxft.runs.folders.outputs import begin_output, check_output, finish_output
from jaxft.runs.folders.push import check_push, push_folder
from jaxft.runs.folders.workdir import read_config_file
from jaxft.runs.opening import Run, apart
from jaxft.runs.pages.card import write_card
from jaxft.runs.restoring import restore_run, step_option
from jaxft.tasks import OPTIONS, Job
from jaxft.weights.folders.quantised.nf4 import PackedTensors
from jaxft.weights.views import Grafted


def main(argv: list[str] | None = None) -> int:
    """Export any checkpoint step, merged or as an adapter, in any dtype.

    `--out` is a new or an empty folder, by default export/ of the run. `--overwrite` replaces an
    earlier export there.
    """
    return processes.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    parsed = parse("export", argv, OPTIONS)
    options = parsed.options
    if "workdir" not in options:
        raise UserError("--workdir is missing: python -m jaxft.export --workdir DIR")
    dtypes = CHOICES["export.dtype"]
    if options.get("dtype", "source") not in dtypes:
        raise UserError(f"--dtype={options['dtype']!r} is not one of {', '.join(dtypes)}")
    workdir = Path(options["workdir"])
    out = Path(options.get("out", workdir / "export"))
    check_output(out, workdir, read_config_file(workdir), "overwrite" in options)
    run, params, step = restore_run(workdir, step_option(options), parsed.overrides)
    kind = options.get("kind", run.cfg.export.kind)
    if kind not in run.task.writers:
        raise UserError(f"--kind={kind!r} is not one of {', '.join(run.task.writers)}")
    check_push(run.cfg.export.push, kind)
    with jax.set_mesh(run.mesh):
        dtype = options.get("dtype", run.cfg.export.dtype)
        export_folder(run, params, out, kind, dtype, workdir, step)
    print(f"step {step} of {workdir} exported to {out}")


def export_folder(
    run: Run,
    params: Params,
    out: Path,
    kind: str,
    dtype: str,
    workdir: Path | None = None,
    step: int = 0,
) -> None:
    """Write an export of `kind` under a temporary name, and rename it to `out`.

    The keys of `run.task.writers` are the kinds, and exports.py of each task describes them.
    `params` holds at least the trained parameters, those of `step`. The card of the export has the
    measures of this step in `workdir`, the folder of the run. Each member of a sweep has a folder
    of its own in `out`. All processes have to call this
    function, because parameters are gathered from all. The first process writes and pushes. Each
    process returns when the folder is complete. `check_output` has to allow `out`. Raises UserError
    where `check_kind` does, and for trained parameters that are not finite.
    """
    check_kind(run, kind)
    if bad := not_finite({path: params[path] for path in run.chosen}):
        raise UserError(
            f"trained parameters hold numbers that are NaN or infinite ({named(bad)}), so nothing"
            " is exported; lower optim.lr or lengthen optim.warmup in another --workdir, or export"
            " an earlier checkpoint with --step"
        )
    place = out.absolute()
    name = place.parent.name if place.name == "export" else place.name

    def write(folder: Path) -> None:
        for member, one, own in apart(run, params):
            place = folder / member
            place.mkdir(exist_ok=True)
            title = "-".join(filter(None, (name, member)))
            job = Job(one.opened, unpacked(one.leaves), one.chosen, own, title, dtype, place)
            one.task.writers[kind].write(job)
            if jax.process_index() == 0:
                write_card(place, one, title, workdir, step, member)

    if jax.process_index() == 0:
        made = begin_output(out)
        write(made)
        inject("export", 1, 0)
        finish_output(made, out)
        if run.cfg.export.push:
            push_folder(out, run.cfg.export.push)
    else:
        with tempfile.TemporaryDirectory() as aside:
            write(Path(aside))
    sync_global_devices("exported")


def check_kind(run: Run, kind: str) -> None:
    """Raise UserError if an export of `kind` would omit trained parameters, or would be empty.

    A whole model is made of the weights before quantisation.
    """
    writer = run.task.writers.get(kind)
    if (
        writer
        and not writer.needs
        and any(isinstance(part.tensors, PackedTensors) for part in run.opened.parts)
    ):
        adapter = next(x for x, y in run.task.writers.items() if y.made_of == ADAPTER_ROLE)
        raise UserError(
            f"export.kind={kind!r} needs the weights before quantisation, but {run.cfg.model} holds"
            f" them in NF4; use export.kind={adapter!r}"
        )
    if writer is None or not writer.needs:  # no export, or an export of the whole model
        return
    instead = next(iter(run.task.writers))
    if not any(leaf.role == writer.made_of for leaf in run.leaves.values()):
        raise UserError(f"export.kind={kind!r} needs {writer.needs}; use export.kind={instead!r}")
    if any(isinstance(part.tensors, Grafted) for part in run.opened.parts):
        raise UserError(
            f"export.kind={kind!r} needs a base to lie beside, but the vocabulary was grafted onto"
            f" {run.cfg.model}; use export.kind={instead!r}"
        )
    kept = tuple(f"{name}." for part in run.opened.parts for name in part.whole)
    beside = {path for path in run.chosen if run.leaves[path].role not in writer.holds}
    # PEFT saves a module whole or adapts it, but not both.
    added = [path for path in run.leaves if path.endswith((".lora_a", ".tokens.embedding"))]
    adapted = {re.sub(r"\.lora_a$", ".kernel", path).replace(".tokens.", ".") for path in added}
    if more := sorted(path for path in beside if not path.startswith(kept) or path in adapted):
        raise UserError(
            f"export.kind={kind!r} would leave out {named(more)}, which train too; use"
            f" export.kind={instead!r}"
        )


if __name__ == "__main__":
    sys.exit(main())
