"""Z-Image as a whole: embeddings of captions, and velocities of latents."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.models.autoencoders.vae import VAE
from jaxft.models.autoencoders.vae_config import FILE as VAE_FILE
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.denoisers.zimage.zimage import ZImageTransformer
from jaxft.models.denoisers.zimage.zimage_config import FILE as ZIMAGE_FILE
from jaxft.models.denoisers.zimage.zimage_config import TOKEN_SIDE, ZImageConfig
from jaxft.models.pipelines.flow.common import check_latents, check_width
from jaxft.models.pipelines.stable_diffusion import NOTHING, Conditions, Drawing, Text
from jaxft.models.text_encoders import qwen
from jaxft.models.text_encoders.qwen import QwenTextConfig
from jaxft.noise.flow import FLOW_SAMPLERS, FlowMatching, FlowSchedule, check_snr
from jaxft.weights.folders.diffusers import SCHEDULER, Pipeline

# Guidance as everywhere in jaxft: 1 is none. The pipeline of diffusers counts from 0.
BASE_DRAWING, TURBO_DRAWING = Drawing(50, 5.0), Drawing(9, 1.0)
TURBO_SHIFT = 3.0  # of Z-Image-Turbo, whose config.json files are those of Z-Image. That has 6
TURBO_NOTE = (
    ", Z-Image-Turbo by its shift, distilled to 8 steps without guidance: training on pictures"
    " undoes a part of that, so keep the run short and watch pictures of 9 steps, or train Z-Image"
)


@dataclass(frozen=True)
class ZImagePipelineConfig:
    """The configs of a pipeline's networks and its noise schedule."""

    transformer: ZImageConfig
    vae: VAEConfig
    text: QwenTextConfig
    schedule: FlowSchedule
    conditioning: ClassVar[str] = NOTHING
    zero_null: ClassVar[bool] = False
    scheduler: ClassVar[tuple] = ()
    free_guidance: ClassVar[bool] = True
    samplers: ClassVar[tuple[str, ...]] = FLOW_SAMPLERS
    denoiser: ClassVar[str] = "transformer"
    lora: ClassVar[str] = r"transformer\..*\.attention\.to_(q|k|v|out)"

    @property
    def texts(self) -> tuple[QwenTextConfig, ...]:
        """The configs of the text encoders, in the order of their folders."""
        return (self.text,)

    @property
    def multiple(self) -> int:
        """The number of pixels that both sides of a picture have to be a multiple of."""
        return self.vae.factor * TOKEN_SIDE

    @classmethod
    def of(cls, pipeline: Pipeline) -> "ZImagePipelineConfig":
        """Read every config.json. Raises: UserError if the components do not fit each other."""
        configs, name = pipeline.components, pipeline.name
        where = f"{name}/text_encoder/config.json"
        cfg = cls(
            transformer=ZImageConfig.from_hf(
                configs["transformer"].config, f"{name}/{ZIMAGE_FILE}"
            ),
            vae=VAEConfig.from_hf(configs["vae"].config, f"{name}/{VAE_FILE}"),
            text=QwenTextConfig.from_hf(configs["text_encoder"].config, (-2,), True, where),
            schedule=FlowSchedule.from_hf(pipeline.scheduler, f"{name}/{SCHEDULER}"),
        )
        denoiser, width = cfg.transformer, cfg.text.hidden_size
        check_width(name, "cap_feat_dim", denoiser.context_dim, width, "text_encoder gives")
        check_latents(name, denoiser.in_channels, cfg.vae)
        return cfg

    @property
    def in_channels(self) -> int:
        return self.transformer.in_channels

    @property
    def sample_size(self) -> int:
        """The side of latents of 1024 pixels, because no config names any."""
        return 1024 // self.vae.factor

    @property
    def distilled(self) -> bool:
        """True for Z-Image-Turbo."""
        return self.schedule.shift == TURBO_SHIFT

    @property
    def drawing(self) -> Drawing:
        return TURBO_DRAWING if self.distilled else BASE_DRAWING

    def process(self, min_snr_gamma: float = 0.0) -> FlowMatching:
        """Return the noise process. Raises: UserError for weights by SNR, which are DDPM's."""
        check_snr(min_snr_gamma)
        return FlowMatching(self.schedule, TOKEN_SIDE, even=True)

    def describe(self) -> str:
        return f"Z-Image, flow matching{TURBO_NOTE if self.distilled else ''}"


class ZImage(nnx.Module):
    """Transformer, VAE and text encoder under the names of their folders."""

    def __init__(self, cfg: ZImagePipelineConfig, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.transformer = ZImageTransformer(cfg.transformer, key=keys[0])
        self.vae = VAE(cfg.vae, key=keys[1])
        self.text_encoder = Decoder(cfg.text.decoder, key=keys[2])
        self.text_cfg = cfg.text

    def encode_text(
        self, ids: Int[Array, "B E T"], *, dtype: Any, keys: PRNGKeyArray | None = None
    ) -> Text:
        """Return the embeddings of captions: the states before the last layer, and their lengths.

        keys: one a row, for the dropout of adapters.
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
