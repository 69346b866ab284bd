"""Exports of a diffusion model: folder, single file, LoRA, the rows of a new word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.core import runtime
from jaxft.core.params import NEW_TOKEN_ROLE
from jaxft.models.pipelines import ldm
from jaxft.models.pipelines.growing import NO_GROWTH
from jaxft.tasks import Job, Writer
from jaxft.tasks.common import writers
from jaxft.tasks.diffusion import inversion
from jaxft.tasks.diffusion.opened import OpenedPipeline
from jaxft.weights.adapters import pipeline as pipeline_lora
from jaxft.weights.adapters import ranks
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.folders import single_file
from jaxft.weights.folders.diffusers import OPTIONAL, Changes, pipeline_files
from jaxft.weights.transfer import narrowed


def side_files(job: Job, rewritten: set[str]) -> writers.SideFiles:
    """Return configs, tokenizers, scheduler and the weights of parts that did not change."""
    names = frozenset(prefix.removesuffix(".") for prefix in rewritten)
    changes = Changes(names, dict(job.opened.model_cfg.scheduler))
    return dict(pipeline_files(job.opened.pipeline, changes))


def _write_folder(job: Job) -> None:
    """Write a diffusers folder, adapters merged."""
    writers.write_folder(job, side_files)


def _write_single_file(job: Job) -> None:
    """Write NAME.safetensors in LDM's layout, and its configs and tokenizers beside it."""
    _write_ldm(job)
    files = side_files(job, {part.prefix for part in writers.parts(job)})
    left_out = ("README.md", *(f"{name}/" for name in OPTIONAL))
    kept = {name: content for name, content in files.items() if not name.startswith(left_out)}
    writers.copy(kept, job.folder)


def _write_ldm(job: Job) -> None:
    layouts, parts = ldm.layouts(job.opened.pipeline), {}
    for part in writers.parts(job):
        if part.folder in layouts:
            parts[part.folder] = writers.merged(job, part), layouts[part.folder]
    markers = single_file.markers(_scheduler(job.opened))
    single_file.write(job.folder / f"{job.name}.safetensors", parts, markers, _modelspec(job))


def _write_lora(job: Job) -> None:
    """Write the adapters in diffusers' format and in kohya's.

    Those of a transformer are also written under its original names, for ComfyUI. A LoKr is one
    file in LyCORIS' layout.
    """
    leaves, cfg, parts = job.leaves, job.opened.cfg, writers.parts(job)
    pipeline_lora.check(parts, leaves)
    arrays, scale = {**job.params, **writers.adapters(job)}, ranks.scale(cfg.lora)
    layouts = ldm.transformer_layouts(job.opened.pipeline)
    kind = ldm.kind(job.opened.pipeline)
    sizes = cfg.lora.rank, scale * cfg.lora.rank, cfg.lora.lokr
    stated = pipeline_lora.metadata(kind, job.name, cfg.model, *sizes)
    stated |= _modelspec(job, "lora")
    if cfg.lora.lokr:
        pipeline_lora.write_lokr(job.folder, job.name, parts, leaves, arrays, scale, stated)
        return
    pipeline_lora.write_peft(job.folder, parts, leaves, arrays, scale)
    given = (job.folder, job.name, parts, leaves, arrays, scale, stated, layouts)
    kohya = pipeline_lora.write_kohya(*given)
    if layouts:
        pipeline_lora.write_original(*given)
    if kind == "sd3":
        print(
            f"{kohya.name} is for kohya's scripts and ComfyUI. diffusers does not read kohya's"
            f" files of Stable Diffusion 3: give it {pipeline_lora.LORA_STEM}.safetensors",
            flush=True,
        )


def _write_inversion(job: Job) -> None:
    """Write `learned_embeds.safetensors`, which diffusers' load_textual_inversion reads."""
    word = job.opened.options.inversion
    dtype = np.float32 if job.dtype == "source" else runtime.resolve_dtype(job.dtype)
    learned = inversion.learned(word.token, job.params, job.leaves)
    tensors = {key: narrowed(rows, np.dtype(dtype), key) for key, rows in learned.items()}
    infos = {key: (rows.shape, rows.dtype) for key, rows in tensors.items()}
    about = {"token": word.token, "init": word.init, "base": Path(job.opened.cfg.model).name}
    write_sharded(job.folder, tensors.items(), infos, stem=inversion.EMBEDS_STEM, metadata=about)


def _write_all(job: Job) -> None:
    """Write the folder with the single file in it, and the LoRA, if any, under lora/.

    The LoRA of a grown UNet is left out, because its new inputs train beside it.
    """
    _write_folder(job)
    _write_ldm(job)
    grown = job.opened.options.grow != NO_GROWTH
    if job.opened.cfg.lora.rank and not grown:  # apart, because the files above have it merged
        (job.folder / "lora").mkdir()
        _write_lora(job._replace(folder=job.folder / "lora"))


def _modelspec(job: Job, adapter: str = "") -> dict[str, str]:
    opened = job.opened
    kind, size = ldm.kind(opened.pipeline), opened.options.resolution
    return single_file.modelspec(kind, job.name, size, _scheduler(opened), adapter)


def _scheduler(opened: OpenedPipeline) -> dict[str, Any]:
    return {**opened.pipeline.scheduler, **dict(opened.model_cfg.scheduler)}


def _with_new_word(write: Callable[[Job], None]) -> Callable[[Job], None]:
    """Return a writer that also writes the rows of a new word, if the run has one."""

    def both(job: Job) -> None:
        write(job)
        if any(leaf.role == NEW_TOKEN_ROLE for leaf in job.leaves.values()):
            _write_inversion(job)

    return both


WRITERS = {
    "folder": Writer(_with_new_word(_write_folder)),
    "single_file": Writer(_with_new_word(_write_single_file)),
    "lora": writers.adapter(_with_new_word(_write_lora)),
    "inversion": Writer(_write_inversion, "inversion.token", NEW_TOKEN_ROLE, (NEW_TOKEN_ROLE,)),
    "all": Writer(_with_new_word(_write_all)),
}
