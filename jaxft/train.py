"""Train: `python -m jaxft.train --config configs/llm.py [--workdir DIR] [--config.KEY=…]`.

`--workdir DIR` alone resumes the run of a folder.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jaxft.core import config as configs
from jaxft.core import processes, runtime
from jaxft.core.cli.arguments import parse
from jaxft.core.cli.live import status
from jaxft.core.errors import BAD_SAMPLES, UserError
from jaxft.core.guards.lock import locked
from jaxft.core.guards.stopping import STOP_FLAG, Stopped, StopRequests
from jaxft.core.guards.watchdog import Watchdog, refuse_idle
from jaxft.runs.folders.push import check_push
from jaxft.runs.folders.workdir import claim_workdir, differing_keys, make_workdir, read_config_file
from jaxft.tasks import OPTIONS, check_task
from jaxft.tasks.checking import check_early, check_track

Wrap = Callable[[Any], Any]  # an Objective for an Objective


def main(argv: list[str] | None = None) -> int:
    """Train or resume a run. Returns exit status 0, or 2 for a user's mistake."""
    return processes.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    options, overrides = parse("train", argv, OPTIONS)
    file, workdir = _places(options)
    config = configs.load_config(file, overrides, OPTIONS)
    if config.get("own_loss"):
        raise UserError(
            f"own_loss={config['own_loss']!r} is a function that jaxft.finetune was given; call it"
            " again, with loss=FUNCTION and the same arguments"
        )
    start(config, workdir)


def start(
    config: dict[str, Any],
    workdir: Path,
    wrap: Wrap = lambda objective: objective,
    *,
    interactive: bool = False,
) -> None:
    """Check a config, claim its folder and train. The arguments are those of `train`.

    interactive: Ctrl-C raises KeyboardInterrupt where there is nothing to save, as a notebook
    needs, instead of ending the process. Raises UserError for a mistake in config or folder, before
    jax and the weights load.
    """
    check_task(config.get("task"))
    cfg = configs.read_config(config, OPTIONS[config["task"]])
    check_track(cfg.track)
    check_push(cfg.export.push, cfg.export.kind)
    # Of several processes, all have to fail together. A run that has begun was checked then.
    if not processes.launcher() and not (workdir / "checkpoints").exists():
        check_early(config)
    with ExitStack() as held:
        _claim(workdir, config, held)
        stop = held.enter_context(StopRequests(not processes.joined(), interactive))
        try:
            train(config, workdir, stop, wrap)
        except UserError as error:
            if error.bad:
                lines = [json.dumps(one) + "\n" for one in error.bad]
                (workdir / BAD_SAMPLES).write_text("".join(lines))
            raise


def _places(options: Mapping[str, str]) -> tuple[str, Path]:
    """Return (config file, run folder) of a command line. A run folder has a config of its own.

    Raises UserError for a command line that names neither.
    """
    file, folder = options.get("config", ""), options.get("workdir", "")
    if file.endswith("config.json") and not folder:
        raise UserError(
            f"--workdir is missing: --workdir={Path(file).parent} resumes that run, another folder"
            " starts a new one with the same config"
        )
    workdir = Path(folder or f"runs/{Path(file).stem}")
    if file:
        return file, workdir
    own = workdir / "config.json"
    if not folder or not own.is_file():
        reason = f", and {own} does not exist" if folder else ""
        raise UserError(f"--config is missing{reason}: jaxft train --config configs/llm.py")
    return str(own), workdir


def _claim(workdir: Path, config: dict[str, Any], held: ExitStack) -> None:
    """Make and lock the run folder in the first process, and check it in the others."""
    if not processes.launcher():
        make_workdir(workdir)
        held.enter_context(locked(workdir))
        claim_workdir(workdir, config, OPTIONS)
        return
    processes.join()
    import jax

    from jaxft.runs.agreement import agreement

    with agreement():
        if jax.process_index() == 0:
            make_workdir(workdir)
            held.enter_context(locked(workdir))
            claim_workdir(workdir, config, OPTIONS)
    with agreement():
        if not (workdir / "config.json").exists():
            raise UserError(
                f"no config.json in workdir {workdir}, but process 0 wrote it; choose a --workdir"
                " on a disk that all hosts share"
            )
        if differing := differing_keys(read_config_file(workdir, OPTIONS), config):
            raise UserError(
                f"another config than in workdir {workdir} ({'; '.join(differing)}); give the"
                " same command on every host, and a --workdir on a disk that all hosts share"
            )


def train(config: dict[str, Any], workdir: Path, stop: StopRequests, wrap: Wrap) -> None:
    """Run the training that a config describes in a claimed `workdir`, then export.

    `wrap` returns the objective to train, given the task's own. If `stop` is asked, the step under
    way is finished and its state saved. Raises: Stopped then.
    Resume is exact by the order of the loop: evaluate, sample, save, next batch, step, log. Step k
    does the same work on the same state, whether the run began before step k or at it.
    """
    status("loading jax")
    import jax

    from jaxft.core.guards.best import make_best, read_best
    from jaxft.core.sharding import abstract_batch, local_rows, place_batch
    from jaxft.export import check_kind, export_folder
    from jaxft.runs import opening
    from jaxft.runs import state as states
    from jaxft.runs.agreement import agreement, check_same
    from jaxft.runs.checkpoint import Checkpoints
    from jaxft.runs.compiling import Compiled, make_steps
    from jaxft.runs.folders.inputs import check_inputs, record_inputs
    from jaxft.runs.folders.outputs import check_output
    from jaxft.runs.planning.fitting import room_for
    from jaxft.runs.watch import Watch

    began = time.perf_counter()
    with agreement():
        run = opening.open_run(config)
        check_kind(run, run.cfg.export.kind)
        if run.cfg.export.kind != "none":
            check_output(workdir / "export", workdir, config)
        data = opening.read_data(run)
    cfg, mesh = run.cfg, run.mesh
    examples, rows = len(data.train), local_rows(mesh, cfg.batch_size)
    plan, every = states.make_plan(run, examples), states.periods(run, examples)
    saved, best, total = Checkpoints(workdir), make_best(cfg.keep, cfg.stop), plan.total
    start = saved.latest() or 0
    exported = cfg.export.kind == "none" or (workdir / "export").exists()
    check_same({"examples": examples, "latest checkpoint": start, "exported": exported})
    ended = start > 0 and read_best(workdir).get("ended") == start
    if (start >= total > 0 or ended) and exported:
        early = ", stopped early" if ended else ""
        print(f"{workdir} is finished: {start} of {total} steps{early}; nothing to do")
        return
    with agreement():
        if jax.process_index() == 0:
            check_inputs(workdir, config) if start else record_inputs(workdir, config)
            refuse_idle(workdir, start)
    print(states.summary(run, plan, data.train), flush=True)
    with jax.set_mesh(mesh), room_for(run, config) as room, Watchdog(workdir) as watchdog:
        objective, state, frozen, position = states.begin(run, plan, saved, start, data, wrap)
        start = int(state.step)  # earlier, if the newest checkpoint is damaged
        best = best.resumed(position)
        saved.kept.best, total = best.step, start if best.over else total
        saves = start < total and 1 + ((total - start) // every.save if every.save else 0)
        saved.check_room(state, saves, bool(best.measure))
        preview = opening.preview(run, data)
        step_fn = Compiled(make_steps(run, plan, objective), runtime.memory_limit(mesh))
        batches = data.train.batches(start, rows)
        watch = Watch(run, data, objective, preview, workdir, watchdog, total=total, start=start)
        shapes = data.train.spec(rows) if start < total else ()
        specs = (stop.mark(abstract_batch(shape, mesh), mesh) for shape in shapes)
        step_fn.prepare(state, frozen, *specs)
        room.check(step_fn)
        if start == 0:
            best.after(0, watch.begin(states.model_params(frozen, state)).metrics)  # raises
        stop.busy, done, stopping = True, start, False
        after, ended = None, best.over
        for step in range(start, total):
            if step > start and _due(step, every.eval):
                after = watch.evaluate(step, states.model_params(frozen, state))
                best = watch.keep_best(best.after(step, after.metrics), saved)
                if ended := best.over:
                    total = step
                    break
            if step > start and _due(step, every.sample):
                watch.look(step, states.model_params(frozen, state))
            if step > start and (_due(step, every.save) or step == best.step):
                watch.flush()  # counts the step before too
                if not watch.skipped_in_row:  # no sound checkpoint makes room for a doubtful one
                    saved.save(step, state, config, {"next_step": step, **best.state()})
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            placed = stop.mark(place_batch(batch, mesh), mesh)
            state, sums = step_fn(state, frozen, placed)
            flag, done = sums.pop(STOP_FLAG, None), step + 1
            # The numbers are fetched one step late, so that the device never waits for the host.
            watch.train(done, sums, batch, waited, _due(done, every.log))
            if stopping := stop.agreed(flag):
                break
        watch.flush()
        # A resumed run neither evaluates nor samples at its first step.
        left = stopping and done < total and _due(done, every.eval)
        if left and best.measure:  # the checkpoint holds the best step, this one included
            after = watch.evaluate(done, states.model_params(frozen, state))
            best, left = watch.keep_best(best.after(done, after.metrics), saved), False
        if done > start:
            saved.save(done, state, config, {"next_step": done, **best.state()})
        saved.close()
        if stopping or (stop.alone and stop.asked):
            if left:
                watch.evaluate(done, states.model_params(frozen, state))
            if done < total and _due(done, every.sample):
                watch.look(done, states.model_params(frozen, state))
            raise Stopped(f"stopped at step {done} of {total}; the same command resumes")
        stop.busy = False
        params, shown = states.model_params(frozen, state), total
        if total and (after is None or not ended):
            after = watch.evaluate(total, params)
            best = best if ended else best.after(total, after.metrics)
        watch.keep_best(best, saved, ended=total if ended else None)
        if best.step not in (None, total):
            kept = states.best_params(run, plan, workdir, best.step, frozen)
            params, shown = (kept, best.step) if kept else (params, total)
        if cfg.export.kind != "none":
            keys, out, whole = cfg.export, workdir / "export", opening.exported(run, params)
            export_folder(run, whole, out, keys.kind, keys.dtype, workdir, shown)
        watch.close(shown, after, params, time.perf_counter() - began)


def _due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


if __name__ == "__main__":
    processes.restart_with_huge_pages()
    sys.exit(main())
