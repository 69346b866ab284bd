"""Autoencoders against diffusers' AutoencoderKL and VQModel and transformers' JanusVQVAE."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxft.models.autoencoders import vae, vqgan
from jaxft.models.autoencoders.vae import VAE
from jaxft.models.autoencoders.vae_config import FLUX2_CLASS, VAEConfig
from jaxft.models.autoencoders.vq_config import JANUS, VQConfig
from jaxft.models.autoencoders.vqgan import UNIT_TOLERANCE, VQModel
from jaxft.tasks.autoencoder.codec import KL
from jaxft.verify.component import ComponentSubject, channels_first, channels_last, check, normal
from jaxft.verify.report import Check, certificate, start
from jaxft.weights.folders.diffusers import open_component
from jaxft.weights.folders.transformers import Source
from jaxft.weights.transfer import Part

VERIFIED_ROWS, GRID = 2, (8, 6)  # pictures, and latents of each, not square to reveal a transpose


def certify(spec: str) -> tuple[dict[str, Any], list[Check]]:
    """Return (certificate, checks) of an autoencoder's folder, both sides in fp32."""
    source = open_component(spec, "vae")
    if source.config.get("_class_name") == KL:
        cfg = VAEConfig.from_hf(source.config, f"{spec}/config.json")
        part = Part("vae.", source.name, source.tensors, vae.RULES, vae.sizes(cfg))
        subject = vae_subject(source, part, cfg)
    else:
        subject = vq_subject(source, VQConfig.from_hf(source.config, f"{spec}/config.json"))
    janus = source.config.get("model_type") == JANUS
    oracles = ("torch", "transformers" if janus else "diffusers")
    start(oracles)
    with jax.default_matmul_precision("highest"):
        found = check(subject)
    about = {"components": {subject.name: found.about}}
    return certificate(spec, found.checks, oracles, about), found.checks


def vae_subject(source: Source, part: Part, cfg: VAEConfig) -> ComponentSubject:
    """Return the comparison of an AutoencoderKL.

    It compares moments of pictures, and pictures of latents that are not theirs.
    """
    images = _images(cfg.factor)
    latents = np.asarray(
        cfg.unscale(jnp.asarray(normal(1, VERIFIED_ROWS, *GRID, cfg.latent_channels)))
    )

    def theirs(model: Any) -> dict[str, Any]:
        found = model.encode(channels_first(images, model)).latent_dist
        back = model.decode(channels_first(latents, model)).sample
        outputs = {"mean": found.mean, "logvar": found.logvar, "pictures": back}
        return {name: channels_last(one) for name, one in outputs.items()}

    def ours(model: VAE) -> dict[str, jax.Array]:
        found = model.encode(jnp.asarray(images))
        back = model.decode(jnp.asarray(latents))
        return {"mean": found.mean, "logvar": found.logvar, "pictures": back}

    template = jax.eval_shape(lambda: VAE(cfg, key=jax.random.key(0)))
    stock = ("diffusers", KL if cfg.norm_eps is None else FLUX2_CLASS)
    return ComponentSubject("vae", source, part, template, stock, theirs, ours)


def vq_subject(source: Source, cfg: VQConfig) -> ComponentSubject:
    """Return the comparison of a VQ tokenizer.

    It compares latents and codes of pictures, and pictures of other codes.
    """
    stem = "model" if cfg.kind == JANUS else "diffusion_pytorch_model"
    rules = vqgan.rules(cfg)
    part = Part("vae.", source.name, source.tensors, rules, {}, vqgan.IGNORE, stem=stem)
    images = _images(cfg.factor)
    codes = np.random.default_rng(1).integers(0, cfg.codes, (VERIFIED_ROWS, *GRID), np.int32)

    def theirs(model: Any) -> dict[str, Any]:
        latents = model.quant_conv(model.encoder(channels_first(images, model)))
        found = _their_codes(model, latents.detach(), cfg)
        back = channels_last(_their_pictures(model, codes, cfg))
        return {"latents": channels_last(latents), "codes": found, "pictures": back}

    def ours(model: VQModel) -> dict[str, jax.Array]:
        x = jnp.asarray(images)
        latents = model.quant_conv(model.encoder(x))
        back = model.decode_codes(jnp.asarray(codes))
        return {"latents": latents, "codes": model.encode(x).codes, "pictures": back}

    template = jax.eval_shape(lambda: VQModel(cfg, key=jax.random.key(0)))
    stock = ("transformers", "JanusVQVAE") if cfg.kind == JANUS else ("diffusers", "VQModel")
    return ComponentSubject("tokenizer", source, part, template, stock, theirs, ours)


def _their_codes(model: Any, latents: Any, cfg: VQConfig) -> Any:
    """Return the codes of latents [B, C, Y, X] that the stock class finds.

    The stock class compares the codebook's rows as they are stored. An export stores rows of unit
    length for a model that searches by direction. For rows of other lengths, the search by
    direction is computed here.
    """
    import torch

    table = model.quantize.embedding.weight.detach()
    if cfg.l2 and bool(((table.norm(dim=-1) - 1).abs() >= UNIT_TOLERANCE).any()):
        z = torch.nn.functional.normalize(channels_last(latents).flatten(0, 2), dim=-1)
        found = torch.cdist(z, torch.nn.functional.normalize(table, dim=-1)).argmin(-1)
    else:
        found = model.quantize(latents)[2]
        found = found[2] if isinstance(found, tuple) else found
    return found.view(VERIFIED_ROWS, *GRID).int()


def _their_pictures(model: Any, codes: np.ndarray, cfg: VQConfig) -> Any:
    import torch

    flat = torch.from_numpy(codes).long()
    if cfg.kind == JANUS:
        model.quantize.quant_state_dims = list(GRID)  # otherwise it assumes square pictures
        return model.decode(flat.flatten(1))
    model.register_to_config(lookup_from_codebook=True)
    shape = (VERIFIED_ROWS, *GRID, cfg.code_dim)
    return model.decode(flat.flatten(), force_not_quantize=True, shape=shape).sample


def _images(factor: int) -> Float[np.ndarray, "B Y X C"]:
    """Return noise over a ramp along one diagonal. Every flip or transpose changes it."""
    height, width = (side * factor for side in GRID)
    y, x = np.mgrid[:height, :width] / max(height, width)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (VERIFIED_ROWS, height, width, 3))
    return (noise + (y + 2 * x)[..., None] / 3 - 0.5).astype(np.float32)
