"""Denoisers of pipelines against diffusers': UNets, and transformers of flow matching."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxft.models.denoisers.flux.flux import FluxTransformer
from jaxft.models.denoisers.flux.flux2 import Flux2Transformer
from jaxft.models.denoisers.flux.flux_config import PATCH
from jaxft.models.denoisers.mmdit.mmdit import MMDiT
from jaxft.models.denoisers.unet import Added, UNet
from jaxft.models.denoisers.zimage.zimage import ZImageTransformer
from jaxft.models.pipelines.flow.common import FlowConfig
from jaxft.models.pipelines.stable_diffusion import PipelineConfig
from jaxft.verify.component import (
    ComponentSubject,
    as_input,
    channels_first,
    channels_last,
    normal,
    stock_class,
)
from jaxft.weights.folders.diffusers import Pipeline
from jaxft.weights.transfer import Part

DENOISED_ROWS = 2
TEXT_ROWS = 40  # no multiple of 32, which Z-Image fills
SIGMAS = (0.96875, 0.03125)  # exact in fp32, and their products with 1000 too
GUIDANCE_SCALES = (3.5, 1.0)  # of guidance, where it is an input
PICTURE_SIZES = (1024, 768, 0, 128, 512, 640)  # a picture's original size, crop and target size


def unet_subject(
    pipeline: Pipeline, part: Part, whole: PipelineConfig, size: tuple[int, int]
) -> ComponentSubject:
    """Return the comparison of a UNet, with SDXL's sizes if it reads them. size: (Y, X)."""
    cfg = whole.unet
    latents = normal(1, DENOISED_ROWS, *size, cfg.in_channels)
    times = np.array([whole.schedule.train_steps - 1, 1], np.int32)
    context = normal(2, DENOISED_ROWS, whole.texts[0].max_positions, cfg.context_dims[0])
    added = None
    if cfg.added_dim is not None and cfg.added_time_dim:
        sizes = np.array([PICTURE_SIZES] * DENOISED_ROWS, np.float32)
        added = (normal(3, DENOISED_ROWS, cfg.added_dim - 6 * cfg.added_time_dim), sizes)

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

    def ours(model: UNet) -> dict[str, Array]:
        x, t, text = jnp.asarray(latents), jnp.asarray(times), jnp.asarray(context)
        more = added and Added(jnp.asarray(added[0]), jnp.asarray(added[1]))
        return {"output": model(x, t, text, more)}

    template = jax.eval_shape(lambda: UNet(cfg, key=jax.random.key(0)))
    stock = ("diffusers", "UNet2DConditionModel")
    return ComponentSubject(
        "unet", pipeline.components["unet"], part, template, stock, theirs, ours
    )


def _mmdit(
    pipeline: Pipeline, part: Part, whole: FlowConfig, size: tuple[int, int]
) -> ComponentSubject:
    cfg = whole.transformer
    latents, context = normal(1, DENOISED_ROWS, *size, cfg.in_channels), _context(cfg.context_dim)
    pooled = normal(3, DENOISED_ROWS, cfg.pooled_dim)
    times = np.array(SIGMAS, np.float32) * np.float32(whole.schedule.train_steps)  # [B]

    def theirs(model: Any) -> dict[str, Any]:
        text, vectors, steps = (as_input(one, model) for one in (context, pooled, times))
        made = model(channels_first(latents, model), text, vectors, steps)
        return {"output": channels_last(made.sample)}

    def ours(model: MMDiT) -> dict[str, Array]:
        return {"output": model(*map(jnp.asarray, (latents, times, context, pooled)))}

    template = jax.eval_shape(lambda: MMDiT(cfg, key=jax.random.key(0)))
    return _transformer(pipeline, part, template, "SD3Transformer2DModel", theirs, ours)


def _flux(
    pipeline: Pipeline, part: Part, whole: FlowConfig, size: tuple[int, int]
) -> ComponentSubject:
    """Return the comparison of FLUX.1's transformer. diffusers' pipeline packs its latents."""
    cfg, (y, x) = whole.transformer, size
    latents, context = normal(1, DENOISED_ROWS, y, x, cfg.in_channels), _context(cfg.context_dim)
    pooled, sigma = normal(3, DENOISED_ROWS, cfg.pooled_dim), np.array(SIGMAS, np.float32)
    scales = np.array(GUIDANCE_SCALES, np.float32) if cfg.guidance else None

    def theirs(model: Any) -> dict[str, Any]:
        pipe = stock_class("diffusers", "FluxPipeline")
        images = channels_first(latents, model).contiguous()
        packed = pipe._pack_latents(images, DENOISED_ROWS, cfg.in_channels, y, x)
        places = pipe._prepare_latent_image_ids(
            DENOISED_ROWS, y // PATCH, x // PATCH, "cpu", model.dtype
        )
        made = model(
            packed,
            encoder_hidden_states=as_input(context, model),
            pooled_projections=as_input(pooled, model),
            timestep=as_input(sigma, model),
            img_ids=places,
            txt_ids=places.new_zeros(TEXT_ROWS, 3),
            guidance=None if scales is None else as_input(scales, model),
        )
        return {"output": channels_last(pipe._unpack_latents(made.sample, y, x, 1))}

    def ours(model: FluxTransformer) -> dict[str, Array]:
        x, t, text, vectors = map(jnp.asarray, (latents, sigma, context, pooled))
        return {
            "output": model(x, t, text, vectors, None if scales is None else jnp.asarray(scales))
        }

    template = jax.eval_shape(lambda: FluxTransformer(cfg, key=jax.random.key(0)))
    return _transformer(pipeline, part, template, "FluxTransformer2DModel", theirs, ours)


def _flux2(
    pipeline: Pipeline, part: Part, whole: FlowConfig, size: tuple[int, int]
) -> ComponentSubject:
    """Return the comparison of FLUX.2 klein's transformer, called as by diffusers' pipeline."""
    cfg = whole.transformer
    latents, context = normal(1, DENOISED_ROWS, *size, cfg.in_channels), _context(cfg.context_dim)
    sigma = np.array(SIGMAS, np.float32)

    def theirs(model: Any) -> dict[str, Any]:
        pipe = stock_class("diffusers", "Flux2KleinPipeline")
        cells = pipe._patchify_latents(channels_first(latents, model).contiguous())
        places, text = pipe._prepare_latent_ids(cells), as_input(context, model)
        words, times = pipe._prepare_text_ids(text), as_input(sigma, model)
        made = model(pipe._pack_latents(cells), text, times, places, words, return_dict=False)[0]
        made = pipe._unpack_latents_with_ids(made, places, *cells.shape[2:])
        return {"output": channels_last(pipe._unpatchify_latents(made))}

    def ours(model: Flux2Transformer) -> dict[str, Array]:
        return {"output": model(*map(jnp.asarray, (latents, sigma, context)))}

    template = jax.eval_shape(lambda: Flux2Transformer(cfg, key=jax.random.key(0)))
    return _transformer(pipeline, part, template, "Flux2Transformer2DModel", theirs, ours)


def _zimage(
    pipeline: Pipeline, part: Part, whole: FlowConfig, size: tuple[int, int]
) -> ComponentSubject:
    """Return the comparison of Z-Image's transformer, with texts of two lengths.

    Its time is that of the data's share, and its output the opposite velocity.
    """
    cfg, lengths = whole.transformer, np.array([TEXT_ROWS, TEXT_ROWS // 2], np.int32)
    latents, context = normal(1, DENOISED_ROWS, *size, cfg.in_channels), _context(cfg.context_dim)
    sigma = np.array(SIGMAS, np.float32)

    def theirs(model: Any) -> dict[str, Any]:
        import torch

        images = channels_first(latents, model)[:, :, None]  # [B, C, 1, Y, X]
        pairs = zip(as_input(context, model), lengths, strict=True)
        texts = [text[:length] for text, length in pairs]
        made = model(list(images), as_input(1 - sigma, model), texts, return_dict=False)[0]
        return {"output": channels_last(-torch.stack(list(made))[:, :, 0])}

    def ours(model: ZImageTransformer) -> dict[str, Array]:
        return {"output": model(*map(jnp.asarray, (latents, sigma, context, lengths)))}

    template = jax.eval_shape(lambda: ZImageTransformer(cfg, key=jax.random.key(0)))
    return _transformer(pipeline, part, template, "ZImageTransformer2DModel", theirs, ours)


def _context(width: int) -> np.ndarray:
    return normal(2, DENOISED_ROWS, TEXT_ROWS, width)


def _transformer(
    pipeline: Pipeline, part: Part, template: Any, kind: str, theirs: Any, ours: Any
) -> ComponentSubject:
    source, stock = pipeline.components["transformer"], ("diffusers", kind)
    return ComponentSubject("transformer", source, part, template, stock, theirs, ours)


# The comparison of a transformer of flow matching, by the family of its pipeline. Each takes the
# pipeline, the transformer's part, the pipeline's config and the latents' (Y, X).
FLOW_SUBJECTS = {"sd3": _mmdit, "flux": _flux, "flux2": _flux2, "zimage": _zimage}
