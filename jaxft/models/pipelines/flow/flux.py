"""FLUX.1 dev and schnell as a whole: embeddings of captions, and velocities of latents."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.models.autoencoders.vae import VAE
from jaxft.models.autoencoders.vae_config import FILE as VAE_FILE
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.denoisers.flux.flux import FluxTransformer
from jaxft.models.denoisers.flux.flux_config import FILE as FLUX_FILE
from jaxft.models.denoisers.flux.flux_config import PATCH, FluxConfig
from jaxft.models.pipelines.flow.common import check_latents, check_width
from jaxft.models.pipelines.stable_diffusion import NOTHING, Conditions, Drawing, Text
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.models.text_encoders.t5 import T5Encoder, T5EncoderConfig
from jaxft.noise.flow import FLOW_SAMPLERS, FlowMatching, FlowSchedule, check_snr
from jaxft.weights.folders.diffusers import SCHEDULER, Pipeline

DEV, SCHNELL = Drawing(28, 3.5), Drawing(4, 0.0)
DEV_TOKENS, SCHNELL_TOKENS = 512, 256  # of a caption for T5, as Black Forest Labs' own code has it
# The guidance in training. At 1 the guided prediction is the plain one, whose target is the data's
# velocity. kohya and ai-toolkit have 1 too. diffusers' script starts from 3.5.
TRAIN_GUIDANCE = 1.0
DISTILLED = (
    ", distilled to 4 steps: training on pictures undoes a part of that, so keep the run short and"
    " watch pictures of 4 steps, or train FLUX.1-dev"
)


@dataclass(frozen=True)
class FluxPipelineConfig:
    """The configs of a pipeline's networks and its noise schedule."""

    transformer: FluxConfig
    vae: VAEConfig
    clip: CLIPTextConfig
    t5: T5EncoderConfig
    schedule: FlowSchedule
    conditioning: ClassVar[str] = NOTHING
    zero_null: ClassVar[bool] = False
    scheduler: ClassVar[tuple] = ()
    free_guidance: ClassVar[bool] = False
    samplers: ClassVar[tuple[str, ...]] = FLOW_SAMPLERS
    denoiser: ClassVar[str] = "transformer"
    lora: ClassVar[str] = (
        r"transformer\.((doubles|singles)\.attn.*\.to_(q|k|v|out)|doubles\.ff(_context)?\..*)"
    )

    @property
    def texts(self) -> tuple[Any, ...]:
        """The configs of the text encoders, in the order of their folders."""
        return self.clip, self.t5

    @property
    def multiple(self) -> int:
        """The number of pixels that both sides of a picture have to be a multiple of."""
        return self.vae.factor * PATCH

    @classmethod
    def of(cls, pipeline: Pipeline) -> "FluxPipelineConfig":
        """Read every config.json. Raises: UserError if the components do not fit each other."""
        configs = {
            name: (source.config, f"{pipeline.name}/{name}/config.json")
            for name, source in pipeline.components.items()
        }
        denoiser = FluxConfig.from_hf(configs["transformer"][0], f"{pipeline.name}/{FLUX_FILE}")
        tokens = DEV_TOKENS if denoiser.guidance else SCHNELL_TOKENS
        config, where = configs["text_encoder"]
        cfg = cls(
            transformer=denoiser,
            vae=VAEConfig.from_hf(configs["vae"][0], f"{pipeline.name}/{VAE_FILE}"),
            clip=CLIPTextConfig.from_hf(config, False, where),
            t5=replace(T5EncoderConfig.from_hf(*configs["text_encoder_2"]), max_positions=tokens),
            schedule=FlowSchedule.from_hf(pipeline.scheduler, f"{pipeline.name}/{SCHEDULER}"),
        )
        _check_fit(cfg, pipeline.name)
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
        """True for FLUX.1-schnell: no guidance, and a shift that does not depend on the tokens."""
        return not self.transformer.guidance and self.schedule.shift == 1.0

    @property
    def drawing(self) -> Drawing:
        return SCHNELL if self.distilled else DEV

    def process(self, min_snr_gamma: float = 0.0) -> FlowMatching:
        """Return the noise process. Raises: UserError for weights by SNR, which are DDPM's."""
        check_snr(min_snr_gamma)
        return FlowMatching(self.schedule, PATCH, even=True)

    def describe(self) -> str:
        kind = "with guidance as an input" if self.transformer.guidance else "without guidance"
        return f"FLUX.1 {kind}, flow matching{DISTILLED if self.distilled else ''}"


def _check_fit(cfg: FluxPipelineConfig, name: str) -> None:
    denoiser, pooled, width = cfg.transformer, cfg.clip.hidden_size, cfg.t5.hidden_size
    source = "text_encoder gives"
    check_width(name, "pooled_projection_dim", denoiser.pooled_dim, pooled, source)
    source = "text_encoder_2 gives"
    check_width(name, "joint_attention_dim", denoiser.context_dim, width, source)
    check_latents(name, denoiser.in_channels, cfg.vae)


class Flux(nnx.Module):
    """Transformer, VAE and text encoders under the names of their folders."""

    def __init__(self, cfg: FluxPipelineConfig, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.transformer = FluxTransformer(cfg.transformer, key=keys[0])
        self.vae = VAE(cfg.vae, key=keys[1])
        self.text_encoder = CLIPText(cfg.clip, key=keys[2])
        self.text_encoder_2 = T5Encoder(cfg.t5, key=keys[3])
        self.lengths = tuple(text.max_positions for text in cfg.texts)

    def encode_text(
        self, ids: Int[Array, "B E T"], *, dtype: Any, keys: PRNGKeyArray | None = None
    ) -> Text:
        """Return the embeddings of captions, tokenised for both encoders.

        They are the states of T5, and `pooled`, the end token of CLIP without a projection. keys:
        one a row, for the dropout of adapters. The ids of an encoder fill the beginning of their
        row.
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
