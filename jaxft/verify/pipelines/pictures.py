"""Pictures of a whole pipeline by diffusers and by jaxft, from the same noise."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxft.core.params import bind, describe
from jaxft.models.pipelines import families
from jaxft.models.pipelines.families import AnyConfig
from jaxft.models.pipelines.flow.common import FlowConfig
from jaxft.models.pipelines.stable_diffusion import Guidance, PipelineConfig, generate, zeroed
from jaxft.noise.flow import CLASS as FLOW_SCHEDULER
from jaxft.noise.samplers import Sampler
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.tasks.diffusion.captions import TOKENIZERS
from jaxft.verify import rounding
from jaxft.verify.component import (
    ONCE,
    ComponentSubject,
    channels_first,
    channels_last,
    compare_output,
    load,
    normal,
    open_stock,
    stock_class,
)
from jaxft.verify.report import Check
from jaxft.weights.folders.diffusers import Pipeline

STEPS, PIPELINE_GUIDANCE = 5, 4.0
CAPTIONS = ("a red circle above a small house", "two cats asleep, seen from far away")
PIPELINE_CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
FLOW_PIPELINES = {
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "flux2": "Flux2KleinPipeline",
    "zimage": "ZImagePipeline",
}


class PipelineSubject(NamedTuple):
    """A pipeline under test.

    ids: tokens of CAPTIONS and of "" [B + 1, E, T]. size: the latents' (Y, X).
    """

    pipeline: Pipeline
    cfg: AnyConfig
    subjects: list[ComponentSubject]
    ids: Int[np.ndarray, "B E T"]
    size: tuple[int, int]

    @property
    def noise(self) -> Float[np.ndarray, "B Y X C"]:
        return normal(4, len(CAPTIONS), *self.size, self.cfg.vae.latent_channels)

    @property
    def sampler(self) -> str:
        """The folder's own sampler if jaxft has it. Otherwise DDIM, which can run any schedule."""
        if not isinstance(self.cfg, PipelineConfig):
            return "euler"
        stated = self.pipeline.scheduler.get("_class_name")
        own = [name for name, cls in PIPELINE_CLASSES.items() if cls == stated]
        return own[0] if own and not self.cfg.schedule.bent else "ddim"


def trajectory(opened: PipelineSubject) -> Check:
    """Compare pictures by diffusers' pipeline and by jaxft's sampler from the same noise."""
    theirs, *others = _their_pictures(opened)
    ours = _our_pictures(opened)
    free = float(((theirs > 0) & (theirs < 1)).mean())
    name = f"pictures after {STEPS} {opened.sampler} steps"
    return compare_output(name, ours, theirs, others, f"{free:.0%} of the values not clipped")


def _their_pictures(opened: PipelineSubject) -> list[Float[np.ndarray, "B Y X 3"]]:
    """Return the pictures of diffusers' pipeline in fp32 within [0, 1], then rounded otherwise."""
    import torch

    pipe, cfg = _their_pipeline(opened), opened.cfg
    height, width = (side * cfg.vae.factor for side in opened.size)
    modules = [one for one in pipe.components.values() if isinstance(one, torch.nn.Module)]

    def draw() -> np.ndarray:
        given: dict[str, Any] = {"guidance_scale": PIPELINE_GUIDANCE}
        latents = channels_first(opened.noise, getattr(pipe, cfg.denoiser))
        family = cfg.family if isinstance(cfg, FlowConfig) else ""
        if family == "flux2":
            latents = pipe._patchify_latents(latents.contiguous())
        if family == "zimage":
            given = {"guidance_scale": PIPELINE_GUIDANCE - 1}  # there, 0 is no guidance
            latents = latents.float()  # its pipeline takes no other
        if family == "flux":
            given["max_sequence_length"] = cfg.texts[-1].max_positions  # of T5
            shape = tuple(latents.shape)
            latents = pipe._pack_latents(latents.contiguous(), *shape)
        with torch.no_grad():
            out = pipe(
                prompt=list(CAPTIONS),
                latents=latents,
                num_inference_steps=STEPS,
                height=height,
                width=width,
                output_type="pt",
                **given,
            )
        return channels_last(out.images).numpy()

    return [draw(), *(draw() for _ in rounding.variants(torch.nn.ModuleList(modules), {}, {}))]


def _their_pipeline(opened: PipelineSubject) -> Any:
    pipeline, cfg = opened.pipeline, opened.cfg
    made: dict[str, Any] = {one.name: open_stock(one)[0] for one in opened.subjects}
    for i, text in enumerate(cfg.texts):
        name = f"tokenizer_{i + 1}" if i else "tokenizer"
        made[name] = load_tokenizer(pipeline.tokenizer_dir(name), TOKENIZERS[type(text)])
        made[name].model_max_length = text.max_positions
    if isinstance(cfg, FlowConfig):
        scheduler, name = FLOW_SCHEDULER, FLOW_PIPELINES[cfg.family]
        if cfg.family == "flux2":
            made["is_distilled"] = not cfg.free_guidance
        if cfg.family == "sd3" and len(cfg.texts) == 2:
            made |= {"text_encoder_3": None, "tokenizer_3": None}
    elif cfg.sdxl:
        scheduler, name = PIPELINE_CLASSES[opened.sampler], "StableDiffusionXLPipeline"
        zero = bool(pipeline.index.get("force_zeros_for_empty_prompt", True))
        made |= {"force_zeros_for_empty_prompt": zero, "add_watermarker": False}
    else:
        scheduler, name = PIPELINE_CLASSES[opened.sampler], "StableDiffusionPipeline"
        made |= {"safety_checker": None, "feature_extractor": None}
        made |= {"requires_safety_checker": False}
    made["scheduler"] = stock_class("diffusers", scheduler).from_config(pipeline.scheduler)
    pipe = stock_class("diffusers", name)(**made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _our_pictures(opened: PipelineSubject) -> Float[np.ndarray, "B Y X 3"]:
    """Return the pictures of jaxft's sampler within [0, 1]."""
    cfg = opened.cfg
    template = jax.eval_shape(lambda: families.build(cfg, jax.random.key(0)))
    leaves, params = describe(template), {}
    for subject in opened.subjects:
        params |= load(subject.part, leaves)
    sampler: Sampler = cfg.process().sampler(opened.sampler, STEPS, opened.size)

    @partial(jax.jit, compiler_options=ONCE)
    def call(params: Any, ids: jax.Array, noise: jax.Array) -> jax.Array:
        model = bind(template, params)
        every = model.encode_text(ids, dtype=jnp.float32)
        text = jax.tree.map(lambda x: x[:-1], every)
        null = jax.tree.map(lambda x: jnp.repeat(x[-1:], len(noise), axis=0), every)
        null = zeroed(null) if cfg.zero_null else null
        guidance = Guidance(PIPELINE_GUIDANCE)
        return generate(model, cfg, text, null, noise, sampler, guidance, jnp.float32)

    return (np.asarray(call(params, opened.ids, opened.noise)) + 1) / 2
