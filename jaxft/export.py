"""Give weights back: `python -m jaxft.export --workdir DIR [--step N] [--out DIR] [--kind …]`."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices

from jaxft.core import config as configs
from jaxft.core import runtime
from jaxft.core.errors import UserError
from jaxft.core.params import ADDED, NEW_TOKENS
from jaxft.models.pipelines import ldm
from jaxft.nn import lora
from jaxft.runs import run as runs
from jaxft.runs.run import Run
from jaxft.tasks.diffusion import inversion
from jaxft.weights import transfer
from jaxft.weights.adapters import peft as adapters
from jaxft.weights.adapters import pipeline as pipeline_lora
from jaxft.weights.files.tensor_files import STEMS, write_sharded
from jaxft.weights.folders import janus_original as janus_layout
from jaxft.weights.folders import single_file
from jaxft.weights.folders.diffusers import OPTIONAL
from jaxft.weights.graft import Grafted
from jaxft.weights.transfer import Part

# What a kind that is no whole model can hold.
PARTIAL = {"adapter": ADDED, "lora": ADDED, "inversion": NEW_TOKENS}
# Where transformers and diffusers split.
SHARD_BYTES: dict[str, int] = {STEMS[0]: 5 * 10**9, STEMS[1]: 10**10}


class Job(NamedTuple):
    """An export under way: of what, under which name, in which dtype, into which folder."""

    run: Run
    params: Mapping[str, jax.Array]
    name: str
    dtype: str
    folder: Path

    @property
    def parts(self) -> list[Part]:
        return [part for part in self.run.task.parts if not part.aid]


def main(argv: list[str] | None = None) -> int:
    """Export any checkpoint step, merged or as an adapter, in any dtype."""
    return runtime.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    parsed = configs.parse_arguments(argv, ("workdir", "step", "out", "kind", "dtype"))
    options = parsed.options
    if "workdir" not in options:
        raise UserError("--workdir is missing: python -m jaxft.export --workdir DIR")
    dtypes = configs.CHOICES["export.dtype"]
    if options.get("dtype", "source") not in dtypes:
        raise UserError(f"--dtype={options['dtype']!r} is not one of {', '.join(dtypes)}")
    if options.get("kind", "merged") not in WRITERS:
        raise UserError(f"--kind={options['kind']!r} is not one of {', '.join(WRITERS)}")
    workdir = Path(options["workdir"])
    run, params, step = runs.restore_run(workdir, runs.step_option(options), parsed.overrides)
    kind = options.get("kind", run.cfg.export.kind)
    if kind not in (kinds := [kind for kind in run.task.EXPORT_KINDS if kind != "none"]):
        raise UserError(f"--kind={kind!r} is not one of {', '.join(kinds)}")
    out = Path(options.get("out", workdir / "export"))
    with jax.set_mesh(run.mesh):
        export_folder(run, params, out, kind, options.get("dtype", run.cfg.export.dtype))
    print(f"step {step} of {workdir} exported to {out}")


def export_folder(
    run: Run, params: Mapping[str, jax.Array], out: Path, kind: str, dtype: str
) -> None:
    """Write what `kind` names and rename it in place.

    "merged" and "folder" are a Hugging Face folder, adapters merged; "adapter" is a PEFT folder;
    "original" a Janus as its authors' code reads it; "single_file" NAME.safetensors in LDM's
    layout, with its configs and tokenizers; "lora" a LoRA in diffusers' format and in kohya's;
    "inversion" the rows of a new word, which all other kinds of such a run hold too; "all" the
    folder, the single file in it, and under lora/ the LoRA, where there is one. `params` holds at
    least what was trained. Nothing stands under `out` until all is written. NAME is the
    run folder's. Of many processes all have to call this, for they gather what is spread over
    them; the first one writes, and all return when the folder stands.
    """
    check_kind(run, kind)
    place = out.absolute()
    name = place.parent.name if place.name == "export" else place.name
    made = run.task.exported(dict(params))
    if jax.process_index() == 0:
        temporary = out.with_name(f"{out.name}.partial-{os.getpid()}")
        for stale in out.parent.glob(f"{out.name}.partial-*"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
        _write(Job(run, made, name, dtype, temporary), kind)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    else:
        with tempfile.TemporaryDirectory() as aside:
            _write(Job(run, made, name, dtype, Path(aside)), kind)
    sync_global_devices("exported")


def _write(job: Job, kind: str) -> None:
    WRITERS[kind](job)
    if kind != "inversion" and _new_tokens(job.run):
        _write_inversion(job)


def check_kind(run: Run, kind: str) -> None:
    """UserError where `kind` leaves out something that trained, or there is nothing of it."""
    if kind not in PARTIAL:
        return
    instead = run.task.EXPORT_KINDS[0]
    if kind == "inversion" and not _new_tokens(run):
        raise UserError(f"export.kind={kind!r} needs inversion.token; use export.kind={instead!r}")
    if kind != "inversion" and not run.cfg.lora.rank:
        raise UserError(f"export.kind={kind!r} needs lora.rank > 0; use export.kind={instead!r}")
    if any(isinstance(part.tensors, Grafted) for part in run.task.parts):
        raise UserError(
            f"export.kind={kind!r} needs a base to lie beside, but the vocabulary was grafted onto"
            f" {run.cfg.model}; use export.kind={instead!r}"
        )
    kept = tuple(f"{name}." for part in run.task.parts for name in part.whole)
    beside = {path for path in run.chosen if not re.fullmatch(PARTIAL[kind], path)}
    if more := sorted(path for path in beside if not path.startswith(kept)):
        raise UserError(
            f"export.kind={kind!r} would leave out {more[0]} and {len(more) - 1} more that train"
            f" too; use export.kind={instead!r}"
        )


# ---- folders ----------------------------------------------------------------------------------


def _write_folder(job: Job) -> None:
    touched = {part.prefix for part in job.parts if _touched(job.run, part, job.dtype)}
    files = _side_files(job, touched)
    for part in job.parts:
        if part.prefix in touched or not _has_weights(files, part.folder):
            made, folder = _merged(job, part), job.folder / part.folder
            folder.mkdir(exist_ok=True)
            write_sharded(folder, made.tensors, made.infos, SHARD_BYTES[part.stem], part.stem)
    _copy(files, job.folder)


def _touched(run: Run, part: Part, dtype: str) -> bool:
    """Whether a part's files differ from the source's; the others are copied as they are."""
    inside = (path for path in run.chosen if path.startswith(part.prefix))
    trained = any(not re.fullmatch(NEW_TOKENS, path) for path in inside)
    return trained or part.tensors is None or dtype != "source" or not part.prefix


def _side_files(job: Job, touched: set[str]) -> dict[str, Path | bytes]:
    return job.run.task.side_files(None if job.dtype == "source" else job.dtype, touched)


def _has_weights(files: Mapping[str, Any], folder: str) -> bool:
    """Whether a copy serves; a part that is read in another layout has none that would."""
    paths = map(PurePath, files)
    return any(p.parent == PurePath(folder) and p.suffix == ".safetensors" for p in paths)


def _merged(job: Job, part: Part) -> transfer.Export:
    run, whole = job.run, part.tensors is None
    np_dtype = None if job.dtype == "source" else np.dtype(runtime.resolve_dtype(job.dtype))
    trained = {p: job.params[p] for p in run.leaves if whole or p in run.chosen}
    return transfer.export(part, run.leaves, trained, _deltas(run, job.params), np_dtype)


def _deltas(run: Run, params: Mapping) -> dict[str, Callable[[int], np.ndarray]]:
    """The fp32 update of every adapted kernel, layer by layer."""
    factor = lora.scale(run.cfg.lora) if run.cfg.lora.rank else 0.0
    deltas: dict[str, Callable[[int], np.ndarray]] = {}
    for path in lora.adapted(run.leaves):
        a, b = (transfer.to_host(params[f"{path}.lora_{x}"]) for x in "ab")
        stacked = run.leaves[f"{path}.kernel"].stacked
        deltas[f"{path}.kernel"] = partial(_layer_delta, a, b, factor, stacked)
    return deltas


def _layer_delta(a: np.ndarray, b: np.ndarray, factor: float, stacked: bool, i: int) -> np.ndarray:
    return lora.delta(a[i], b[i], factor) if stacked else lora.delta(a, b, factor)


# ---- adapters ---------------------------------------------------------------------------------


def _write_adapter(job: Job) -> None:
    run = job.run
    for part in job.parts:
        adapters.write(job.folder, part, run.leaves, _adapters(job), run.cfg.lora, part.name)
    files = _side_files(job, {part.prefix for part in job.parts})
    base = ("config.json", "generation_config.json")
    _copy({name: content for name, content in files.items() if name not in base}, job.folder)


def _adapters(job: Job) -> dict[str, np.ndarray]:
    """The adapters, and what trained beside them (`check_kind` lets through what can go)."""
    run = job.run
    paths = [path for path in run.leaves if re.fullmatch(ADDED, path) or path in run.chosen]
    return {path: transfer.to_host(job.params[path]) for path in paths}


def _write_lora(job: Job) -> None:
    leaves, cfg, task = job.run.leaves, job.run.cfg, _pipeline_task(job.run)
    pipeline_lora.check(job.parts, leaves)
    arrays, scale, kind = _adapters(job), lora.scale(cfg.lora), ldm.kind(task.pipeline)
    pipeline_lora.write_peft(job.folder, job.parts, leaves, arrays, scale)
    rank, alpha = cfg.lora.rank, scale * cfg.lora.rank
    stated = pipeline_lora.metadata(kind, job.name, cfg.model, rank, alpha)
    stated |= _modelspec(job, "lora")
    pipeline_lora.write_kohya(job.folder, job.name, job.parts, leaves, arrays, scale, stated)


# ---- new words --------------------------------------------------------------------------------


def _new_tokens(run: Run) -> bool:
    return any(re.fullmatch(NEW_TOKENS, path) for path in run.leaves)


def _write_inversion(job: Job) -> None:
    """`learned_embeds.safetensors`, as diffusers' load_textual_inversion reads it."""
    word = _pipeline_task(job.run).options.inversion
    dtype = np.float32 if job.dtype == "source" else runtime.resolve_dtype(job.dtype)
    learned = inversion.learned(word.token, job.params)
    tensors = {key: rows.astype(np.dtype(dtype)) for key, rows in learned.items()}
    infos = {key: (rows.shape, rows.dtype) for key, rows in tensors.items()}
    about = {"token": word.token, "init": word.init, "base": Path(job.run.cfg.model).name}
    write_sharded(job.folder, tensors.items(), infos, stem=inversion.STEM, metadata=about)


# ---- single files -----------------------------------------------------------------------------


def _write_single_file(job: Job) -> None:
    """The weights in one file, and beside it the configs that diffusers and jaxft read it with."""
    _write_ldm(job)
    files = _side_files(job, {part.prefix for part in job.parts})
    left_out = ("README.md", *(f"{name}/" for name in OPTIONAL))
    kept = {name: content for name, content in files.items() if not name.startswith(left_out)}
    _copy(kept, job.folder)


def _write_ldm(job: Job) -> None:
    task = _pipeline_task(job.run)
    layouts, parts = ldm.layouts(task.pipeline), {}
    for part in job.parts:
        parts[part.folder] = _merged(job, part), layouts[part.folder]
    file, markers = job.folder / f"{job.name}.safetensors", single_file.markers(_scheduler(task))
    single_file.write(file, parts, markers, _modelspec(job))


def _write_all(job: Job) -> None:
    _write_folder(job)
    _write_ldm(job)
    if job.run.cfg.lora.rank:  # a folder of its own: these are merged in what lies above
        (job.folder / "lora").mkdir()
        _write_lora(job._replace(folder=job.folder / "lora"))


def _modelspec(job: Job, adapter: str = "") -> dict[str, str]:
    task = _pipeline_task(job.run)
    kind, size = ldm.kind(task.pipeline), task.options.resolution
    return single_file.modelspec(kind, job.name, size, _scheduler(task), adapter)


def _scheduler(task: Any) -> dict[str, Any]:
    return {**task.pipeline.scheduler, **dict(task.model_cfg.scheduler)}


def _pipeline_task(run: Run) -> Any:
    """The task as the one that has a `pipeline`: no other offers these kinds."""
    return run.task


def _write_original(job: Job) -> None:
    """A Janus under its authors' names."""
    files = _image_task(job.run).original_files(None if job.dtype == "source" else job.dtype)
    (part,) = job.parts
    made = janus_layout.original(_merged(job, part))
    write_sharded(job.folder, made.tensors, made.infos, SHARD_BYTES[part.stem], part.stem)
    _copy(files, job.folder)


def _image_task(run: Run) -> Any:
    """The task as the one that has `original_files`: no other offers this kind."""
    return run.task


WRITERS = {
    "merged": _write_folder,
    "folder": _write_folder,
    "adapter": _write_adapter,
    "original": _write_original,
    "single_file": _write_single_file,
    "lora": _write_lora,
    "inversion": _write_inversion,
    "all": _write_all,
}


def _copy(files: Mapping[str, Path | bytes], folder: Path) -> None:
    for name, content in files.items() if jax.process_index() == 0 else ():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)


if __name__ == "__main__":
    sys.exit(main())
