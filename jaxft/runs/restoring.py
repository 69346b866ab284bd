"""Models with parameters, restored from a run folder or opened from an untrained config."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxft.core import config as configs
from jaxft.core import processes, runtime
from jaxft.core.errors import UserError
from jaxft.core.guards.best import read_best
from jaxft.core.params import Params
from jaxft.core.step import State
from jaxft.runs.agreement import agreement, check_same
from jaxft.runs.checkpoint import Checkpoints, Damage
from jaxft.runs.folders.inputs import MODEL_KEYS, check_inputs
from jaxft.runs.folders.workdir import read_config_file
from jaxft.runs.opening import Run, load_params, open_run
from jaxft.runs.state import abstract_state, model_params
from jaxft.runs.watch import MANIFEST
from jaxft.tasks import OPTIONS


def restore_run(
    workdir: Path, at: int | None, overrides: Iterable[tuple[str, str]] = ()
) -> tuple[Run, Params, int]:
    """Return (run, all parameters, step) of a run folder at a step.

    By default it is the best step if the run keeps one, else the latest.

    No data are read. Overrides are for the measurement of the model (`data.eval`). Raises
    UserError for a folder without a run or a checkpoint.
    """
    read_config_file(workdir)  # raises where this is no run folder
    processes.join()
    saved = Checkpoints(workdir)
    best = read_best(workdir) if at is None else {}
    first = best["step"] if best.get("step") in saved.manager.all_steps() else None
    newest = saved.latest() if at is None else at
    check_same({"checkpoint": newest, "best": first})
    if newest is None:
        raise UserError(f"{workdir} has no checkpoint yet; train first")
    overrides = tuple(overrides)

    def read(step: int) -> tuple[Run, State]:
        config = saved.config(step)
        with agreement():
            check_inputs(workdir, config, MODEL_KEYS)
            run = open_run(configs.resolve_config(config, overrides, OPTIONS))
        with jax.set_mesh(run.mesh):
            return run, saved.restore(step, abstract_state(run))[0]

    if at is None:
        at, (run, state), damaged = saved.newest(read, first)
        for step, reason in damaged.items():
            print(f"the checkpoint of step {step} is damaged ({reason}): step {at} is used")
        if at == first and jax.process_index() == 0:
            print(f"step {at} is the best by {best['measure']} ({best['value']:.4g})")
    else:
        try:
            run, state = read(at)
        except Damage as damage:
            raise UserError(
                f"the checkpoint of step {at} in {workdir} is damaged ({damage}); name another"
                " step, or leave --step out"
            ) from None
    with jax.set_mesh(run.mesh):
        params = model_params(load_params(run, set(run.leaves) - run.chosen), state)
    saved.close()
    return run, params, at


def open_any(arguments: runtime.Arguments) -> tuple[Run, Params, int]:
    """Return (run, parameters, step) of `--workdir` at `--step`, or of an untrained `--config`."""
    options, overrides = arguments
    if "workdir" in options:
        return restore_run(Path(options["workdir"]), step_option(options), overrides)
    if "config" not in options:
        raise UserError("give --workdir=DIR (a run folder) or --config=FILE (an untrained model)")
    config = configs.load_config(options["config"], overrides, OPTIONS)
    processes.join()
    with agreement():
        run = open_run(config)
    with jax.set_mesh(run.mesh):
        return run, load_params(run), 0


def facts(workdir: str | None) -> Mapping[str, Any]:
    """Return the manifest's report on the training data of a run, or {} without a manifest."""
    file = Path(workdir or "") / MANIFEST
    return json.loads(file.read_text())["data"] if workdir and file.is_file() else {}


def step_option(options: Mapping[str, str]) -> int | None:
    """Return `--step` as a number, or None for the latest."""
    text = options.get("step")
    if text is not None and not text.isdigit():
        raise UserError(f"--step={text!r} must be the number of a checkpoint")
    return None if text is None else int(text)
