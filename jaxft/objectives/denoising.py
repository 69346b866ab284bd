"""Denoising: the squared error of a denoiser's prediction at a random time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.params import Leaf
from jaxft.core.step import Batch, Metrics, stream
from jaxft.models.autoencoders import vae
from jaxft.models.autoencoders.vae import Moments
from jaxft.models.pipelines import conditioning
from jaxft.models.pipelines.families import AnyConfig, AnyPipeline
from jaxft.models.pipelines.stable_diffusion import Conditions, Text, drop_captions, zeroed
from jaxft.nn.pixels import to_float
from jaxft.noise.process import NoiseProcess, offset_noise, squared_error

# Streams of a row's own key.
LATENT, NOISE, TIME, DROP, OFFSET, ADAPTER, PICTURE = range(7)


@dataclass(frozen=True, eq=False)
class Denoising:
    """Prediction of a noise process's target by a latent diffusion model.

    empty_ids: int32 [E, T], the token ids of the empty caption. empty_text: its embedding
    [1, T, D], None to encode it by the text encoders. unread: as in `tasks.Objective`. dropout:
    adapters use dropout. image_flops: FLOPs of a forward pass, an image.
    """

    cfg: AnyConfig
    process: NoiseProcess
    dtype: Any
    empty_ids: np.ndarray
    empty_text: Text | None = None
    unread: tuple[str, ...] = ()
    caption_dropout: float = 0.0
    noise_offset: float = 0.0
    dropout: bool = False
    image_flops: float = 0.0
    remat: str = "none"
    unit: ClassVar[str] = "images"

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return len(batch["weights"])

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        """Return FLOPs an image: the denoiser's forward pass and both halves of backward.

        With a frozen base, backward has one half: its weights get no gradients.
        """
        passes = 2 if all(leaf.added for leaf in trained.values()) else 3
        return passes * self.image_flops

    def loss(
        self, model: AnyPipeline, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return the sum of weighted squared errors, and the sum of the weights.

        With a mask, errors and weights are those of the latents: sum(error mask) / sum(mask).
        """
        cfg, share = self.cfg, self.caption_dropout
        latents = self.latents(model, batch, stream(keys, LATENT))
        noise = normal(stream(keys, NOISE), latents.shape[1:])
        if self.noise_offset:
            noise = offset_noise(stream(keys, OFFSET), noise, self.noise_offset)
        t = self.process.draw_times(stream(keys, TIME), latents.shape[1:3])
        adapter = stream(keys, ADAPTER) if self.dropout else None
        text = self.text(model, batch, adapter)
        extra = conditioning.condition(model, cfg, batch, stream(keys, PICTURE), self.dtype)
        if share:
            drawn = jax.vmap(jax.random.uniform)(stream(keys, DROP))
            dropped = conditioning.captions_dropped(cfg, drawn, share)
            text = drop_captions(text, self.null(model), dropped)
            extra = conditioning.drop_sources(cfg, extra, drawn, share)
        errors = self.errors(model, batch, latents, noise, t, text, extra, adapter)
        errors *= self.process.weights(t)
        rows = batch["weights"]
        return (jnp.sum(errors * rows), jnp.sum(rows * counted(batch))), {}

    def errors(
        self,
        model: AnyPipeline,
        batch: Batch,
        latents: jax.Array,
        noise: jax.Array,
        t: jax.Array,
        text: Text,
        extra: jax.Array | None,
        keys: jax.Array | None,
    ) -> jax.Array:
        """Return the mean squared error of each row [B] at timestep `t`.

        Errors are multiplied by the mask of the batch, if it has one.
        """
        noisy = self.process.add_noise(latents, noise, t)
        given = Conditions(text, batch["time_ids"], extra)
        out = model.predict(noisy, t, given, dtype=self.dtype, keys=keys, remat=self.remat)
        return squared_error(out, self.process.target(latents, noise, t), batch.get("loss_mask"))

    def latents(self, model: AnyPipeline, batch: Batch, keys: Any) -> jax.Array:
        """Return scaled fp32 latents: posterior samples with `keys`, or its mode without.

        For FLUX.2 they are the mode, as in diffusers' script.
        """
        if "mean" in batch:
            moments = Moments(batch["mean"], batch["logvar"])
        else:
            moments = model.vae.encode(to_float(batch["pixels"]).astype(self.dtype))
        mode = self.cfg.vae.takes_mode
        drawn = moments.mean if keys is None or mode else vae.sample(moments, keys)
        return model.vae.scale(drawn.astype(jnp.float32))

    def text(self, model: AnyPipeline, batch: Batch, keys: Any) -> Text:
        """Return the encoded captions: from the batch if cached, or else by the text encoders."""
        if "context" in batch:
            return Text(batch["context"], batch.get("pooled"), batch.get("lengths"))
        skip = self.cfg.clip_skip
        return model.encode_text(batch["ids"], dtype=self.dtype, keys=keys, skip=skip)

    def null(self, model: AnyPipeline) -> Text:
        """Return the null caption [1, T, D], by the current weights of the text encoders.

        Where embeddings are cached, no text encoder trains, and that of the empty caption is among
        them.
        """
        made = self.empty_text
        if made is None:
            empty = jnp.asarray(self.empty_ids)[None]
            made = model.encode_text(empty, dtype=self.dtype)
        return zeroed(made) if self.cfg.zero_null else made


def counted(batch: Batch) -> jax.Array:
    """Return the share of each row's latents that counts [B]: the mean of its mask, or 1."""
    if "loss_mask" not in batch:
        return jnp.ones_like(batch["weights"])
    return jnp.mean(batch["loss_mask"], axis=(1, 2, 3))


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return fp32 noise [B, *shape]. Each row has its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
