"""FLUX.2 klein as a whole: embeddings of captions, and velocities of latents."""

from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.models.autoencoders.vae import VAE
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.denoisers.flux.flux2 import Flux2Transformer
from jaxft.models.denoisers.flux.flux2_config import Flux2Config
from jaxft.models.denoisers.flux.flux_config import PATCH
from jaxft.models.pipelines.flow.common import (
    TRANSFORMER_FILE,
    FlowConfig,
    check_latents,
    check_width,
    read_schedule,
    read_vae,
)
from jaxft.models.pipelines.stable_diffusion import Conditions, Drawing, Text
from jaxft.models.text_encoders import qwen
from jaxft.models.text_encoders.qwen import QwenTextConfig
from jaxft.weights.folders.diffusers import Pipeline

KLEIN_STATES = (9, 18, 27)  # of Qwen 3, side by side
KLEIN_BASE, KLEIN_DISTILLED = Drawing(50, 4.0), Drawing(4, 1.0)
# Those of diffusers' script: attention of the image, and the fused projections of the last blocks.
KLEIN_LORA = r"transformer\.(doubles\.attn\.to_(q|k|v|out)|singles\.(to_qkv_mlp_proj|to_out))"
KLEIN_NOTE = (
    ", distilled to 4 steps without guidance: training on pictures undoes a part of that, so keep"
    " the run short and watch pictures of 4 steps, or train FLUX.2-klein-base"
)


def read(pipeline: Pipeline) -> FlowConfig:
    """Read every config.json. Raises: UserError if the components do not fit each other.

    `is_distilled` of model_index.json tells the two variants apart.
    """
    configs, name = pipeline.components, pipeline.name
    where = f"{name}/text_encoder/config.json"
    denoiser = Flux2Config.from_hf(configs["transformer"].config, f"{name}/{TRANSFORMER_FILE}")
    text = QwenTextConfig.from_hf(configs["text_encoder"].config, KLEIN_STATES, False, where)
    vae, width, source = read_vae(pipeline), denoiser.context_dim, "text_encoder gives"
    check_width(name, "joint_attention_dim", width, text.hidden_size, source)
    check_latents(name, denoiser.in_channels, vae)
    distilled = bool(pipeline.index.get("is_distilled"))
    return FlowConfig(
        family="flux2",
        name="FLUX.2 klein",
        transformer=denoiser,
        vae=vae,
        texts=(text,),
        schedule=replace(read_schedule(pipeline), by_steps=True),
        lora=KLEIN_LORA,
        patch=PATCH,
        drawing=KLEIN_DISTILLED if distilled else KLEIN_BASE,
        free_guidance=not distilled,
        distilled=KLEIN_NOTE if distilled else "",
    )


class Klein(nnx.Module):
    """Transformer, VAE and text encoder under the names of their folders."""

    def __init__(self, cfg: FlowConfig, *, key: PRNGKeyArray):
        keys, (self.text_cfg,) = jax.random.split(key, 3), cfg.texts
        self.transformer = Flux2Transformer(cfg.transformer, key=keys[0])
        self.vae = VAE(cfg.vae, key=keys[1])
        self.text_encoder = Decoder(self.text_cfg.decoder, key=keys[2])

    def encode_text(
        self,
        ids: Int[Array, "B E T"],
        *,
        dtype: Any,
        keys: PRNGKeyArray | None = None,
        skip: int = 0,
    ) -> Text:
        """Return the embeddings of captions: KLEIN_STATES, of tokens and padding alike.

        keys: one a row, for the dropout of adapters. `skip` is for other pipelines.
        """
        made = qwen.encode(self.text_encoder, self.text_cfg, ids[:, 0], dtype=dtype, keys=keys)
        return Text(made[0], None)

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
        in `Flux2Transformer`.
        """
        context = given.text.context
        return self.transformer(latents, timesteps, context, dtype=dtype, keys=keys, remat=remat)
