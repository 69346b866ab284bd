"""Z-Image as a whole: embeddings of captions, and velocities of latents."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.models.autoencoders.vae import VAE
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.denoisers.zimage.zimage import ZImageTransformer
from jaxft.models.denoisers.zimage.zimage_config import TOKEN_SIDE, ZImageConfig
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

# Guidance as everywhere in jaxft: 1 is none. The pipeline of diffusers counts from 0.
BASE_DRAWING, TURBO_DRAWING = Drawing(50, 5.0), Drawing(9, 1.0)
TURBO_SHIFT = 3.0  # of Z-Image-Turbo, whose config.json files are those of Z-Image. That has 6
TURBO_NOTE = (
    ", Z-Image-Turbo by its shift, distilled to 8 steps without guidance: training on pictures"
    " undoes a part of that, so keep the run short and watch pictures of 9 steps, or train Z-Image"
)


def read(pipeline: Pipeline) -> FlowConfig:
    """Read every config.json. Raises: UserError if the components do not fit each other."""
    configs, name = pipeline.components, pipeline.name
    where = f"{name}/text_encoder/config.json"
    denoiser = ZImageConfig.from_hf(configs["transformer"].config, f"{name}/{TRANSFORMER_FILE}")
    text = QwenTextConfig.from_hf(configs["text_encoder"].config, (-2,), True, where)
    vae, schedule = read_vae(pipeline), read_schedule(pipeline)
    source = "text_encoder gives"
    check_width(name, "cap_feat_dim", denoiser.context_dim, text.hidden_size, source)
    check_latents(name, denoiser.in_channels, vae)
    turbo = schedule.shift == TURBO_SHIFT
    return FlowConfig(
        family="zimage",
        name="Z-Image",
        transformer=denoiser,
        vae=vae,
        texts=(text,),
        schedule=schedule,
        lora=r"transformer\..*\.attention\.to_(q|k|v|out)",
        patch=TOKEN_SIDE,
        drawing=TURBO_DRAWING if turbo else BASE_DRAWING,
        distilled=TURBO_NOTE if turbo else "",
    )


class ZImage(nnx.Module):
    """Transformer, VAE and text encoder under the names of their folders."""

    def __init__(self, cfg: FlowConfig, *, key: PRNGKeyArray):
        keys, (self.text_cfg,) = jax.random.split(key, 3), cfg.texts
        self.transformer = ZImageTransformer(cfg.transformer, key=keys[0])
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
        """Return the embeddings of captions: the states before the last layer, and their lengths.

        keys: one a row, for the dropout of adapters. `skip` is for other pipelines.
        """
        made = qwen.encode(self.text_encoder, self.text_cfg, ids[:, 0], dtype=dtype, keys=keys)
        return Text(made[0], None, made[1])

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
        in `ZImageTransformer`.
        """
        text = given.text
        assert text.lengths is not None
        return self.transformer(
            latents, timesteps, text.context, text.lengths, dtype=dtype, keys=keys, remat=remat
        )
