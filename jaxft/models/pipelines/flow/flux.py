"""FLUX.1 dev and schnell as a whole: embeddings of captions, and velocities of latents."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.models.autoencoders.vae import VAE
from jaxft.models.denoisers.flux.flux import FluxTransformer
from jaxft.models.denoisers.flux.flux_config import PATCH, FluxConfig
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

DEV, SCHNELL = Drawing(28, 3.5), Drawing(4, 0.0)
DEV_TOKENS, SCHNELL_TOKENS = 512, 256  # of a caption for T5, as Black Forest Labs' own code has it
# The guidance in training. At 1 the guided prediction is the plain one, whose target is the data's
# velocity. kohya and ai-toolkit have 1 too. diffusers' script starts from 3.5.
TRAIN_GUIDANCE = 1.0
LORA_TARGETS = (
    r"transformer\.((doubles|singles)\.attn.*\.to_(q|k|v|out)|doubles\.ff(_context)?\..*)"
)
DISTILLED = (
    ", distilled to 4 steps: training on pictures undoes a part of that, so keep the run short and"
    " watch pictures of 4 steps, or train FLUX.1-dev"
)


def read(pipeline: Pipeline) -> FlowConfig:
    """Read every config.json. Raises: UserError if the components do not fit each other.

    FLUX.1-schnell has no guidance, and a shift that does not depend on the tokens.
    """
    name = pipeline.name
    configs = {key: source.config for key, source in pipeline.components.items()}
    denoiser = FluxConfig.from_hf(configs["transformer"], f"{name}/{TRANSFORMER_FILE}")
    tokens = DEV_TOKENS if denoiser.guidance else SCHNELL_TOKENS
    where = f"{name}/text_encoder/config.json", f"{name}/text_encoder_2/config.json"
    clip = CLIPTextConfig.from_hf(configs["text_encoder"], False, where[0])
    t5 = T5EncoderConfig.from_hf(configs["text_encoder_2"], where[1])
    vae, schedule = read_vae(pipeline), read_schedule(pipeline)
    pooled, source = denoiser.pooled_dim, "text_encoder gives"
    check_width(name, "pooled_projection_dim", pooled, clip.hidden_size, source)
    width, source = denoiser.context_dim, "text_encoder_2 gives"
    check_width(name, "joint_attention_dim", width, t5.hidden_size, source)
    check_latents(name, denoiser.in_channels, vae)
    schnell = not denoiser.guidance and schedule.shift == 1.0
    return FlowConfig(
        family="flux",
        name=f"FLUX.1 {'with guidance as an input' if denoiser.guidance else 'without guidance'}",
        transformer=denoiser,
        vae=vae,
        texts=(clip, replace(t5, max_positions=tokens)),
        schedule=schedule,
        lora=LORA_TARGETS,
        patch=PATCH,
        drawing=SCHNELL if schnell else DEV,
        free_guidance=False,
        distilled=DISTILLED if schnell else "",
    )


class Flux(nnx.Module):
    """Transformer, VAE and text encoders under the names of their folders."""

    def __init__(self, cfg: FlowConfig, *, key: PRNGKeyArray):
        keys, (clip, t5) = jax.random.split(key, 4), cfg.texts
        self.transformer = FluxTransformer(cfg.transformer, key=keys[0])
        self.vae = VAE(cfg.vae, key=keys[1])
        self.text_encoder = CLIPText(clip, key=keys[2])
        self.text_encoder_2 = T5Encoder(t5, key=keys[3])
        self.lengths = tuple(text.max_positions for text in cfg.texts)

    def encode_text(
        self,
        ids: Int[Array, "B E T"],
        *,
        dtype: Any,
        keys: PRNGKeyArray | None = None,
        skip: int = 0,
    ) -> Text:
        """Return the embeddings of captions, tokenised for both encoders.

        They are the states of T5, and `pooled`, the end token of CLIP without a projection. keys:
        one a row, for the dropout of adapters. `skip` is for other pipelines. The ids of an
        encoder fill the beginning of their row.
        """
        short, long = self.lengths
        pooled = self.text_encoder(ids[:, 0, :short], keys=keys, dtype=dtype).pooled  # [B, P]
        return Text(self.text_encoder_2(ids[:, 1, :long], keys=keys, dtype=dtype), pooled)

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

        timesteps: sigmas in [0, 1]. Text and guidance are read of what is given. Guidance is a
        number, by default TRAIN_GUIDANCE. A model without guidance does not read it. Other
        arguments are as in `FluxTransformer`.
        """
        text = given.text
        assert text.pooled is not None
        scale = jnp.float32(TRAIN_GUIDANCE if given.guidance is None else given.guidance)
        scales = jnp.broadcast_to(scale, timesteps.shape)  # [B]
        return self.transformer(
            latents, timesteps, text.context, text.pooled, scales,
            dtype=dtype, keys=keys, remat=remat,
        )  # fmt: skip
