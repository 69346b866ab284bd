"""Stable Diffusion 3 and 3.5 as a whole: embeddings of captions, and velocities of latents."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.models.autoencoders.vae import VAE
from jaxft.models.autoencoders.vae_config import FILE as VAE_FILE
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.denoisers.mmdit.mmdit import MMDiT
from jaxft.models.denoisers.mmdit.mmdit_config import MMDiTConfig
from jaxft.models.pipelines.flow.common import check_latents, check_width
from jaxft.models.pipelines.stable_diffusion import NOTHING, Conditions, Drawing, Text
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.models.text_encoders.t5 import T5Encoder, T5EncoderConfig
from jaxft.noise.flow import FLOW_SAMPLERS, FlowMatching, FlowSchedule, check_snr
from jaxft.weights.folders.diffusers import SCHEDULER, Pipeline

T5_TOKENS = 256  # of a caption: the default of the pipeline in diffusers
TRANSFORMER_FILE = "transformer/config.json"


@dataclass(frozen=True)
class SD3Config:
    """The configs of a pipeline's networks and its noise schedule. `t5` is None without T5."""

    transformer: MMDiTConfig
    vae: VAEConfig
    clips: tuple[CLIPTextConfig, CLIPTextConfig]
    t5: T5EncoderConfig | None
    schedule: FlowSchedule
    conditioning: ClassVar[str] = NOTHING
    zero_null: ClassVar[bool] = False
    scheduler: ClassVar[tuple] = ()
    free_guidance: ClassVar[bool] = True
    samplers: ClassVar[tuple[str, ...]] = FLOW_SAMPLERS
    drawing: ClassVar[Drawing] = Drawing()
    denoiser: ClassVar[str] = "transformer"
    lora: ClassVar[str] = r"transformer\..*\.attn.*\.to_(q|k|v|out)"

    @property
    def texts(self) -> tuple[Any, ...]:
        """The configs of the text encoders, in the order of their folders."""
        return (*self.clips, *((self.t5,) if self.t5 else ()))

    @property
    def multiple(self) -> int:
        """The number of pixels that both sides of a picture have to be a multiple of."""
        return self.vae.factor * self.transformer.patch_size

    @classmethod
    def of(cls, pipeline: Pipeline) -> "SD3Config":
        """Read every config.json. Raises: UserError if the components do not fit each other."""
        configs = {name: source.config for name, source in pipeline.components.items()}
        first, second = (
            CLIPTextConfig.from_hf(configs[name], True, f"{pipeline.name}/{name}/config.json")
            for name in ("text_encoder", "text_encoder_2")
        )
        third = None
        if "text_encoder_3" in configs:
            where = f"{pipeline.name}/text_encoder_3/config.json"
            third = T5EncoderConfig.from_hf(configs["text_encoder_3"], where)
            third = replace(third, max_positions=T5_TOKENS)
        cfg = cls(
            transformer=MMDiTConfig.from_hf(
                configs["transformer"], f"{pipeline.name}/{TRANSFORMER_FILE}"
            ),
            vae=VAEConfig.from_hf(configs["vae"], f"{pipeline.name}/{VAE_FILE}"),
            clips=(first, second),
            t5=third,
            schedule=FlowSchedule.from_hf(pipeline.scheduler, f"{pipeline.name}/{SCHEDULER}"),
        )
        _check_fit(cfg, pipeline.name)
        return cfg

    @property
    def in_channels(self) -> int:
        return self.transformer.in_channels

    @property
    def sample_size(self) -> int:
        """The side of the latents that the transformer was trained on."""
        return self.transformer.sample_size

    def process(self, min_snr_gamma: float = 0.0) -> FlowMatching:
        """Return the noise process. Raises: UserError for weights by SNR, which are DDPM's."""
        check_snr(min_snr_gamma)
        return FlowMatching(self.schedule, self.transformer.patch_size)

    def describe(self) -> str:
        third = "" if self.t5 else " without T5"
        return f"Stable Diffusion 3{third}, flow matching"


def _check_fit(cfg: SD3Config, name: str) -> None:
    denoiser, (first, second) = cfg.transformer, cfg.clips
    pooled = (first.projection_dim or 0) + (second.projection_dim or 0)
    source = "the text encoders give"
    check_width(name, "pooled_projection_dim", denoiser.pooled_dim, pooled, source)
    if cfg.t5:
        check_width(name, "joint_attention_dim", denoiser.context_dim, cfg.t5.hidden_size, source)
    width = first.hidden_size + second.hidden_size
    if width > denoiser.context_dim:
        raise UserError(
            f"{name}: the CLIP encoders give {width} channels, more than joint_attention_dim="
            f"{denoiser.context_dim} of transformer/config.json; the folder mixes two models"
        )
    check_latents(name, denoiser.in_channels, cfg.vae)


class StableDiffusion3(nnx.Module):
    """Transformer, VAE and text encoders under the names of their folders."""

    def __init__(self, cfg: SD3Config, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 5)
        self.transformer = MMDiT(cfg.transformer, key=keys[0])
        self.vae = VAE(cfg.vae, key=keys[1])
        self.text_encoder = CLIPText(cfg.clips[0], key=keys[2])
        self.text_encoder_2 = CLIPText(cfg.clips[1], key=keys[3])
        self.text_encoder_3 = nnx.data(T5Encoder(cfg.t5, key=keys[4]) if cfg.t5 else None)
        self.lengths = tuple(text.max_positions for text in cfg.clips)
        self.context_dim, self.train_steps = cfg.transformer.context_dim, cfg.schedule.train_steps

    def encode_text(
        self, ids: Int[Array, "B E T"], *, dtype: Any, keys: PRNGKeyArray | None = None
    ) -> Text:
        """Return the embeddings of captions, tokenised for each of the E encoders.

        The last but one hidden states of both CLIP encoders, side by side and widened by zeros,
        come before the states of T5, which are zeros without T5. `pooled` is the projected end
        token of both. keys: one a row, for the dropout of adapters. The ids of a CLIP encoder fill
        the beginning of their row.
        """
        one, two = (
            encoder(ids[:, i, :length], skip=1, keys=keys, dtype=dtype)
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
