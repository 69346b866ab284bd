"""Stable Diffusion 3 and 3.5 as a whole: embeddings of captions, and velocities of latents."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.models.autoencoders.vae import VAE
from jaxft.models.denoisers.mmdit.mmdit import MMDiT
from jaxft.models.denoisers.mmdit.mmdit_config import MMDiTConfig
from jaxft.models.pipelines.flow.common import (
    TRANSFORMER_FILE,
    FlowConfig,
    check_latents,
    check_width,
    read_schedule,
    read_vae,
)
from jaxft.models.pipelines.stable_diffusion import Conditions, Drawing, Text
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.models.text_encoders.t5 import T5Encoder, T5EncoderConfig
from jaxft.weights.folders.diffusers import Pipeline

T5_TOKENS = 256  # of a caption: the default of the pipeline in diffusers


def read(pipeline: Pipeline) -> FlowConfig:
    """Read every config.json. Raises: UserError if the components do not fit each other."""
    name = pipeline.name
    configs = {key: source.config for key, source in pipeline.components.items()}
    denoiser = MMDiTConfig.from_hf(configs["transformer"], f"{name}/{TRANSFORMER_FILE}")
    first, second = (
        CLIPTextConfig.from_hf(configs[key], True, f"{name}/{key}/config.json")
        for key in ("text_encoder", "text_encoder_2")
    )
    pooled = (first.projection_dim or 0) + (second.projection_dim or 0)
    source, texts = "the text encoders give", (first, second)
    check_width(name, "pooled_projection_dim", denoiser.pooled_dim, pooled, source)
    if "text_encoder_3" in configs:
        where = f"{name}/text_encoder_3/config.json"
        t5 = T5EncoderConfig.from_hf(configs["text_encoder_3"], where)
        check_width(name, "joint_attention_dim", denoiser.context_dim, t5.hidden_size, source)
        texts = (*texts, replace(t5, max_positions=T5_TOKENS))
    width = first.hidden_size + second.hidden_size
    if width > denoiser.context_dim:
        raise UserError(
            f"{name}: the CLIP encoders give {width} channels, more than joint_attention_dim="
            f"{denoiser.context_dim} of transformer/config.json; the folder mixes two models"
        )
    vae = read_vae(pipeline)
    check_latents(name, denoiser.in_channels, vae)
    if denoiser.out_channels != denoiser.in_channels:
        raise UserError(
            f"{name}: transformer/config.json has in_channels={denoiser.in_channels} and"
            f" out_channels={denoiser.out_channels}; a velocity has the channels of its latents"
        )
    return FlowConfig(
        family="sd3",
        name=f"Stable Diffusion 3{'' if len(texts) > 2 else ' without T5'}",
        transformer=denoiser,
        vae=vae,
        texts=texts,
        schedule=read_schedule(pipeline),
        lora=r"transformer\..*\.attn.*\.to_(q|k|v|out)",
        drawing=Drawing(),
        patch=denoiser.patch_size,
        even=False,
        side=denoiser.sample_size,
    )


class StableDiffusion3(nnx.Module):
    """Transformer, VAE and text encoders under the names of their folders."""

    def __init__(self, cfg: FlowConfig, *, key: PRNGKeyArray):
        keys, (first, second, *rest) = jax.random.split(key, 5), cfg.texts
        self.transformer = MMDiT(cfg.transformer, key=keys[0])
        self.vae = VAE(cfg.vae, key=keys[1])
        self.text_encoder = CLIPText(first, key=keys[2])
        self.text_encoder_2 = CLIPText(second, key=keys[3])
        self.text_encoder_3 = nnx.data(T5Encoder(rest[0], key=keys[4]) if rest else None)
        self.lengths = tuple(text.max_positions for text in (first, second))
        self.context_dim, self.train_steps = cfg.transformer.context_dim, cfg.schedule.train_steps

    def encode_text(
        self,
        ids: Int[Array, "B E T"],
        *,
        dtype: Any,
        keys: PRNGKeyArray | None = None,
        skip: int = 0,
    ) -> Text:
        """Return the embeddings of captions, tokenised for each of the E encoders.

        The last but one hidden states of both CLIP encoders, side by side and widened by zeros,
        come before the states of T5, which are zeros without T5. `pooled` is the projected end
        token of both. keys: one a row, for the dropout of adapters. skip: the number of further
        layers that the states of CLIP leave out, diffusers' clip_skip. The ids of a CLIP encoder
        fill the beginning of their row.
        """
        one, two = (
            encoder(ids[:, i, :length], skip=1 + skip, keys=keys, dtype=dtype)
            for i, (encoder, length) in enumerate(
                zip((self.text_encoder, self.text_encoder_2), self.lengths, strict=True)
            )
        )
        both = jnp.concatenate([one.hidden, two.hidden], axis=-1)  # [B, T1, D1 + D2]
        wide = jnp.pad(both, ((0, 0), (0, 0), (0, self.context_dim - both.shape[-1])))
        if self.text_encoder_3 is None:
            third = jnp.zeros((len(ids), T5_TOKENS, self.context_dim), wide.dtype)
        else:
            third = self.text_encoder_3(ids[:, 2, :T5_TOKENS], keys=keys, dtype=dtype)
        context = jnp.concatenate([wide, third.astype(wide.dtype)], axis=1)  # [B, T1 + T3, D]
        return Text(context, jnp.concatenate([one.pooled, two.pooled], axis=-1))  # [B, P1 + P2]

    def predict(
        self,
        latents: Float[Array, "B Y X C"],
        timesteps: Float[Array, "B"],
        given: Conditions,
        *,
        dtype: Any,
        keys: PRNGKeyArray | None = None,
        remat: str = "none",
    ) -> Float[Array, "B Y X C"]:
        """Return the velocity of noisy, scaled latents.

        timesteps: sigmas in [0, 1]. The text alone is read of what is given. Other arguments are as
        in `MMDiT`.
        """
        text = given.text
        assert text.pooled is not None
        times = timesteps * self.train_steps  # [B]
        return self.transformer(
            latents, times, text.context, text.pooled, dtype=dtype, keys=keys, remat=remat
        )
