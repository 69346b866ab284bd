"""One interface for both kinds of autoencoder: continuous latents (KL) and codes (VQ)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.core.params import Params
from jaxft.models import registry
from jaxft.models.autoencoders import vae, vqgan
from jaxft.models.autoencoders.vae import VAE
from jaxft.models.autoencoders.vq_config import JANUS, VQConfig
from jaxft.models.autoencoders.vqgan import Quantized, VQModel
from jaxft.objectives.reconstruction import Made
from jaxft.weights.folders.transformers import Source
from jaxft.weights.rules import Rule
from jaxft.weights.transfer import Part

KL = "AutoencoderKL"
CODEBOOK_PATH = "vae.quantize.embedding"


class Codec(NamedTuple):
    """One kind of autoencoder: its config, module, weight table and reconstruction.

    `reconstruct(model, images, keys, remat)` computes in the dtype of the images. `keys` sample the
    latents in training, one key for each row. Without keys the latents are the likeliest. `remat`
    is that of the model.
    """

    kind: str
    cfg: Any
    module: Callable[..., nnx.Module]
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...]
    reconstruct: Callable[[Any, Array, PRNGKeyArray | None, str], Made]

    @property
    def codes(self) -> int:
        """Size of the codebook, 0 without one."""
        return self.cfg.codes if isinstance(self.cfg, VQConfig) else 0

    @property
    def stem(self) -> str:
        """File stem of the weights in the library that reads the folder."""
        return "model" if self.kind == JANUS else "diffusion_pytorch_model"

    def part(self, source: Source) -> Part:
        """Return the weight table of the parameters under `vae.`, for import and export."""
        return Part(
            "vae.", source.name, source.tensors, self.rules, {}, self.ignore, stem=self.stem
        )

    def exported(self, params: Params) -> Params:
        """Return the parameters as an export writes them. The reason is in vqgan.unit_codebook."""
        if not self.codes or CODEBOOK_PATH not in params:
            return params
        return {**params, CODEBOOK_PATH: vqgan.unit_codebook(self.cfg, params[CODEBOOK_PATH])}


def open_codec(config: Mapping[str, Any], where: str) -> Codec:
    """Return the codec of a config.json.

    Raises UserError for another kind of model, and for images without 3 channels.
    """
    architecture = registry.find({"_class_name": KL, **config}, "autoencoder", where)
    cfg, module = architecture.config(config, where), architecture.module
    rules, ignore = architecture.rules(cfg), architecture.ignore(cfg)
    if isinstance(cfg, VQConfig):
        return Codec(cfg.kind, cfg, module, rules, ignore, _through_codes)
    for key, channels in (("in_channels", cfg.in_channels), ("out_channels", cfg.out_channels)):
        if channels != 3:
            raise UserError(f"{where}: {key}={channels} is not supported; images have 3 channels")
    return Codec(KL, cfg, module, rules, ignore, _through_latents)


def _through_latents(model: VAE, images: Array, keys: PRNGKeyArray | None, remat: str) -> Made:
    moments = model.encode(images, remat)
    latents = moments.mean if keys is None else vae.sample(moments, keys)
    features = model.features(latents.astype(images.dtype), remat)
    kl = 0.5 * jnp.sum(
        jnp.square(moments.mean) + jnp.exp(moments.logvar) - 1.0 - moments.logvar,
        axis=(1, 2, 3),
    )
    return Made(features, model.decoder.conv_out(features), {"kl": kl}, None)


def _through_codes(model: VQModel, images: Array, keys: PRNGKeyArray | None, remat: str) -> Made:
    del keys  # a code is the nearest one, in training too
    found = model.encode(images, remat)
    latents = vqgan.straight_through(found.z, found.quantized)
    features = model.features(latents.astype(images.dtype), remat)
    own = vqgan.losses(found.z, found.quantized)
    stray = jnp.broadcast_to(_stray(model, found), own.codebook.shape)
    latent = {"codebook": own.codebook, "commitment": own.commitment, "revive": stray}
    return Made(features, model.decoder.conv_out(features), latent, found.codes)


def _stray(model: VQModel, found: Quantized) -> Float[Array, ""]:
    """Return the mean squared distance of unused codes to their nearest latents.

    No pixel of the batch chose an unused code. The mean is over the whole codebook, and its
    gradient moves only the codes. These are the anchors of Zheng & Vedaldi 2023, arXiv:2307.15139,
    as a loss, which needs no memory of past batches.
    """
    table = model.quantize.embedding[...].astype(jnp.float32)
    table = vqgan.normalised(table) if model.cfg.l2 else table
    z = jax.lax.stop_gradient(found.z).reshape(-1, table.shape[1])
    distances = jnp.sum(jnp.square(z), axis=-1) - 2 * jax.lax.stop_gradient(table) @ z.T
    nearest = z[jnp.argmin(distances, axis=1)]
    unused = jnp.ones(len(table)).at[found.codes.ravel()].set(0.0)
    return jnp.mean(unused[:, None] * jnp.square(table - nearest))
