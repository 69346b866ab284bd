"""Stable Diffusion against diffusers: each network, and pictures from the same noise."""

from functools import partial
from math import lcm
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxft.core.errors import UserError
from jaxft.core.params import bind, describe
from jaxft.models.denoisers.unet import Added, UNet
from jaxft.models.pipelines import families
from jaxft.models.pipelines.ldm import open_model
from jaxft.models.pipelines.stable_diffusion import (
    Guidance,
    PipelineConfig,
    StableDiffusion,
    generate,
    parts,
    zeroed,
)
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.noise.samplers import SAMPLERS
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.verify import rounding
from jaxft.verify.autoencoder import vae_subject
from jaxft.verify.component import (
    ONCE,
    ComponentSubject,
    as_input,
    channels_first,
    channels_last,
    check,
    compare_output,
    load,
    normal,
    open_stock,
    stock_class,
)
from jaxft.verify.report import Check, certificate, start
from jaxft.weights.folders.diffusers import TEXT_ENCODERS, Pipeline
from jaxft.weights.transfer import Part

ORACLES = ("torch", "diffusers", "transformers")
STEPS, PIPELINE_GUIDANCE, SIDE = 5, 4.0, 32  # SIDE: most latents of a picture's long side
CAPTIONS = ("a red circle above a small house", "two cats asleep, seen from far away")
PIPELINE_CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}


class PipelineSubject(NamedTuple):
    """A pipeline under test.

    ids: tokens of CAPTIONS and of "" [B + 1, E, T]. size: the latents' (Y, X).
    """

    pipeline: Pipeline
    cfg: PipelineConfig
    subjects: list[ComponentSubject]
    ids: Int[np.ndarray, "B E T"]
    size: tuple[int, int]

    @property
    def noise(self) -> Float[np.ndarray, "B Y X C"]:
        return normal(4, len(CAPTIONS), *self.size, self.cfg.vae.latent_channels)

    @property
    def sampler(self) -> str:
        """The folder's own sampler if jaxft has it. Otherwise DDIM, which can run any schedule."""
        stated = self.pipeline.scheduler.get("_class_name")
        own = [name for name, cls in PIPELINE_CLASSES.items() if cls == stated]
        return own[0] if own and not self.cfg.schedule.bent else "ddim"


def certify(spec: str) -> tuple[dict[str, Any], list[Check]]:
    """Return (certificate, checks) of a pipeline's folder or single file, both sides in fp32.

    Each network is compared alone, with one side in memory at a time. Then all networks together
    sample pictures.
    """
    start(ORACLES)
    opened = open_pipeline(spec)
    checks, about = [], {}
    with jax.default_matmul_precision("highest"):
        for subject in opened.subjects:
            found = check(subject)
            checks += found.checks
            about[subject.name] = found.about
        if opened.cfg.unet.in_channels == opened.cfg.vae.latent_channels:
            checks.append(_trajectory(opened))
    height, width = (side * opened.cfg.vae.factor for side in opened.size)
    more = {
        "components": about,
        "trajectory": {
            "sampler": opened.sampler,
            "steps": STEPS,
            "guidance": PIPELINE_GUIDANCE,
            "pixels": [height, width],
        },
    }
    return certificate(spec, checks, ORACLES, more), checks


def open_pipeline(spec: str) -> PipelineSubject:
    """Open a pipeline. Every tensor is accounted for before one is read."""
    pipeline = open_model(spec)
    cfg = families.read_config(pipeline)
    if not isinstance(cfg, PipelineConfig):
        raise UserError(
            f"{spec}: verify compares Stable Diffusion 1, 2 and XL, and this is {cfg.describe()};"
            " draw with its pipeline in diffusers and with sample, and compare the pictures"
        )
    unet, autoencoder, *texts = parts(pipeline, cfg)
    ids, size = _tokens(pipeline, cfg), _size(pipeline, cfg)
    subjects = []
    for i, (part, text) in enumerate(zip(texts, cfg.texts, strict=True)):
        subjects.append(_text_subject(pipeline, part, text, ids[:, i]))
    subjects.append(vae_subject(pipeline.components["vae"], autoencoder, cfg.vae))
    subjects.append(_unet_subject(pipeline, unet, cfg, size))
    for subject in subjects:
        subject.part.entries(subject.leaves)
    return PipelineSubject(pipeline, cfg, subjects, ids, size)


def _tokens(pipeline: Pipeline, cfg: PipelineConfig) -> Int[np.ndarray, "B E T"]:
    rows = []
    for i, text in enumerate(cfg.texts):
        tokenizer = _tokenizer(pipeline, i, text)
        ids = tokenizer([*CAPTIONS, ""], padding="max_length", truncation=True).input_ids
        if np.max(ids) >= text.vocab_size:
            raise UserError(
                f"{tokenizer.name_or_path}: gives ids up to {np.max(ids)}, but"
                f" {TEXT_ENCODERS[i]}/config.json has vocab_size={text.vocab_size}; put the"
                " model's own tokenizer there"
            )
        rows.append(ids)
    return np.asarray(rows, np.int32).swapaxes(0, 1)


def _tokenizer(pipeline: Pipeline, i: int, text: CLIPTextConfig) -> Any:
    made = load_tokenizer(pipeline.tokenizer_dir(("tokenizer", "tokenizer_2")[i]), "clip")
    made.model_max_length = text.max_positions
    return made


def _size(pipeline: Pipeline, cfg: PipelineConfig) -> tuple[int, int]:
    """Return the latents' (Y, X), with Y twice X.

    jaxft's UNet and diffusers' pipelines accept this size.
    """
    stated = pipeline.components["unet"].config.get("sample_size") or SIDE
    side = min(*stated, SIDE) if isinstance(stated, list) else min(stated, SIDE)
    unit = lcm(8, cfg.multiple) // cfg.vae.factor
    short = max(side // 2 // unit, 1) * unit
    return 2 * short, short


# ---- the networks -------------------------------------------------------------------------


def _text_subject(
    pipeline: Pipeline, part: Part, cfg: CLIPTextConfig, ids: Int[np.ndarray, "B T"]
) -> ComponentSubject:
    name = part.prefix.removesuffix(".")

    def theirs(model: Any) -> dict[str, Any]:
        import torch

        made = model(torch.from_numpy(ids).long(), output_hidden_states=True)
        pooled = made.text_embeds if cfg.projection_dim else made.pooler_output
        return {
            "last state": made.last_hidden_state,
            "penultimate state": made.hidden_states[-2],
            "pooled": pooled,
        }

    def ours(model: CLIPText) -> dict[str, jax.Array]:
        tokens = jnp.asarray(ids)
        last, inner = model(tokens), model(tokens, skip=1)
        return {
            "last state": last.normed,
            "penultimate state": inner.hidden,
            "pooled": last.pooled,
        }

    template = jax.eval_shape(lambda: CLIPText(cfg, key=jax.random.key(0)))
    kind = "CLIPTextModelWithProjection" if cfg.projection_dim else "CLIPTextModel"
    stock = ("transformers", kind)
    return ComponentSubject(name, pipeline.components[name], part, template, stock, theirs, ours)


def _unet_subject(
    pipeline: Pipeline, part: Part, whole: PipelineConfig, size: tuple[int, int]
) -> ComponentSubject:
    cfg, rows = whole.unet, 2
    latents = normal(1, rows, *size, cfg.in_channels)
    times = np.array([whole.schedule.train_steps - 1, 1], np.int32)
    context = normal(2, rows, whole.texts[0].max_positions, cfg.context_dims[0])
    added = None
    if cfg.added_dim is not None and cfg.added_time_dim:
        sizes = np.array([[1024, 768, 0, 128, 512, 640]] * rows, np.float32)
        added = (normal(3, rows, cfg.added_dim - 6 * cfg.added_time_dim), sizes)

    def theirs(model: Any) -> dict[str, Any]:
        import torch

        more = None
        if added is not None:
            pooled, sizes = (as_input(one, model) for one in added)
            more = {"text_embeds": pooled, "time_ids": sizes}
        made = model(
            channels_first(latents, model),
            torch.from_numpy(times),
            as_input(context, model),
            added_cond_kwargs=more,
        )
        return {"output": channels_last(made.sample)}

    def ours(model: UNet) -> dict[str, jax.Array]:
        x, t, text = jnp.asarray(latents), jnp.asarray(times), jnp.asarray(context)
        more = added and Added(jnp.asarray(added[0]), jnp.asarray(added[1]))
        return {"output": model(x, t, text, more)}

    template = jax.eval_shape(lambda: UNet(cfg, key=jax.random.key(0)))
    stock = ("diffusers", "UNet2DConditionModel")
    return ComponentSubject(
        "unet", pipeline.components["unet"], part, template, stock, theirs, ours
    )


# ---- all of them together -----------------------------------------------------------------


def _trajectory(opened: PipelineSubject) -> Check:
    """Compare pictures by diffusers' pipeline and by jaxft's sampler from the same noise."""
    theirs, *others = _their_pictures(opened)
    ours = _our_pictures(opened)
    free = float(((theirs > 0) & (theirs < 1)).mean())
    name = f"pictures after {STEPS} {opened.sampler} steps"
    return compare_output(name, ours, theirs, others, f"{free:.0%} of the values not clipped")


def _their_pictures(opened: PipelineSubject) -> list[Float[np.ndarray, "B Y X 3"]]:
    """Return the pictures of diffusers' pipeline in fp32 within [0, 1], then rounded otherwise."""
    import torch

    pipe = _their_pipeline(opened)
    height, width = (side * opened.cfg.vae.factor for side in opened.size)
    parts = [one for one in pipe.components.values() if isinstance(one, torch.nn.Module)]

    def draw() -> np.ndarray:
        with torch.no_grad():
            out = pipe(
                prompt=list(CAPTIONS),
                latents=channels_first(opened.noise, pipe.unet),
                num_inference_steps=STEPS,
                guidance_scale=PIPELINE_GUIDANCE,
                height=height,
                width=width,
                output_type="pt",
            )
        return channels_last(out.images).numpy()

    return [draw(), *(draw() for _ in rounding.variants(torch.nn.ModuleList(parts), {}, {}))]


def _their_pipeline(opened: PipelineSubject) -> Any:
    pipeline, cfg = opened.pipeline, opened.cfg
    scheduler = stock_class("diffusers", PIPELINE_CLASSES[opened.sampler])
    made: dict[str, Any] = {one.name: open_stock(one)[0] for one in opened.subjects}
    made["scheduler"] = scheduler.from_config(pipeline.scheduler)
    for i, text in enumerate(cfg.texts):
        made[("tokenizer", "tokenizer_2")[i]] = _tokenizer(pipeline, i, text)
    if cfg.sdxl:
        zero = bool(pipeline.index.get("force_zeros_for_empty_prompt", True))
        made |= {"force_zeros_for_empty_prompt": zero, "add_watermarker": False}
    else:
        made |= {"safety_checker": None, "feature_extractor": None}
        made |= {"requires_safety_checker": False}
    name = "StableDiffusionXLPipeline" if cfg.sdxl else "StableDiffusionPipeline"
    pipe = stock_class("diffusers", name)(**made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _our_pictures(opened: PipelineSubject) -> Float[np.ndarray, "B Y X 3"]:
    """Return the pictures of jaxft's sampler within [0, 1]."""
    cfg = opened.cfg
    template = jax.eval_shape(lambda: StableDiffusion(cfg, key=jax.random.key(0)))
    leaves, params = describe(template), {}
    for subject in opened.subjects:
        params |= load(subject.part, leaves)
    sampler = SAMPLERS[opened.sampler](cfg.schedule, STEPS)

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
