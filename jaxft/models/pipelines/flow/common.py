"""Parts and checks that the pipelines of flow matching share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxft.core.errors import UserError
from jaxft.models.autoencoders import vae
from jaxft.models.autoencoders.vae_config import FILE as VAE_FILE
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.pipelines.stable_diffusion import NOTHING, Drawing
from jaxft.models.registry import Architecture
from jaxft.models.text_encoders import clip, qwen, t5
from jaxft.models.text_encoders.clip import CLIPTextConfig
from jaxft.models.text_encoders.qwen import QwenTextConfig
from jaxft.models.text_encoders.t5 import T5EncoderConfig
from jaxft.noise.flow import FLOW_SAMPLERS, FlowMatching, FlowSchedule, check_snr
from jaxft.weights.folders.diffusers import (
    SCHEDULER,
    TEXT_ENCODERS,
    Pipeline,
    legacy_part,
    part,
)
from jaxft.weights.transfer import Part

AnyTextConfig = CLIPTextConfig | T5EncoderConfig | QwenTextConfig
TRANSFORMER_FILE = "transformer/config.json"
USUAL_PIXELS = 1024  # the side of a picture, for models whose config.json names no size


@dataclass(frozen=True)
class FlowConfig:
    """The configs of a pipeline's networks and its noise schedule.

    family: a key of `families.FLOW`. name: the model's. texts: in the order of their folders.
    patch: the side of a token in latents. even: as in `FlowMatching`. drawing, free_guidance,
    clip_skip, denoiser and lora are as in `PipelineConfig`. distilled: "", or what training does to
    a model that is distilled to few steps. side: of the latents of a picture, 0 for USUAL_PIXELS.
    """

    family: str
    name: str
    transformer: Any
    vae: VAEConfig
    texts: tuple[Any, ...]
    schedule: FlowSchedule
    lora: str
    drawing: Drawing
    patch: int = 2
    even: bool = True
    free_guidance: bool = True
    distilled: str = ""
    side: int = 0
    clip_skip: int = 0
    conditioning: ClassVar[str] = NOTHING
    zero_null: ClassVar[bool] = False
    scheduler: ClassVar[tuple] = ()
    samplers: ClassVar[tuple[str, ...]] = FLOW_SAMPLERS
    denoiser: ClassVar[str] = "transformer"

    @property
    def multiple(self) -> int:
        """The number of pixels that both sides of a picture have to be a multiple of."""
        return self.vae.factor * self.patch

    @property
    def in_channels(self) -> int:
        return self.transformer.in_channels

    @property
    def sample_size(self) -> int:
        """The side of the latents of a picture, if none is asked for."""
        return self.side or USUAL_PIXELS // self.vae.factor

    def process(self, min_snr_gamma: float = 0.0) -> FlowMatching:
        """Return the noise process. Raises: UserError for weights by SNR, which are DDPM's."""
        check_snr(min_snr_gamma)
        return FlowMatching(self.schedule, self.patch, self.even)

    def describe(self) -> str:
        return f"{self.name}, flow matching{self.distilled}"


def read_vae(pipeline: Pipeline) -> VAEConfig:
    """Read vae/config.json."""
    return VAEConfig.from_hf(pipeline.components["vae"].config, f"{pipeline.name}/{VAE_FILE}")


def read_schedule(pipeline: Pipeline) -> FlowSchedule:
    """Read scheduler_config.json."""
    return FlowSchedule.from_hf(pipeline.scheduler, f"{pipeline.name}/{SCHEDULER}")


def check_width(name: str, key: str, found: int, given: int, source: str) -> None:
    """Raise UserError if a width in the transformer's config.json is not that of the encoders.

    source: subject and verb, such as "text_encoder gives".
    """
    if found != given:
        raise UserError(
            f"{name}: transformer/config.json has {key}={found} but {source} {given};"
            " the folder mixes two models"
        )


def check_latents(name: str, channels: int, cfg: VAEConfig) -> None:
    """Raise UserError if the transformer's latents are not those of the VAE."""
    if channels != cfg.latent_channels:
        raise UserError(
            f"{name}: the transformer takes latents of {channels} channels, the VAE has"
            f" latent_channels={cfg.latent_channels}; the folder mixes two models"
        )


def parts(pipeline: Pipeline, cfg: FlowConfig, architecture: Architecture) -> tuple[Part, ...]:
    """Return the parts of a pipeline, which fill its parameters and which an export writes.

    cfg: the pipeline's config. architecture: that of its transformer.
    """
    own = architecture.rules(cfg.transformer), architecture.sizes(cfg.transformer)
    denoiser = part(pipeline, "transformer", own)
    decoder = part(pipeline, "vae", (vae.RULES, vae.sizes(cfg.vae)), vae.VAE_IGNORE)
    return (denoiser, decoder, *text_parts(pipeline, cfg.texts))


def text_parts(pipeline: Pipeline, texts: Sequence[AnyTextConfig]) -> tuple[Part, ...]:
    """Return the parts of the text encoders, in the order of their folders."""
    found = []
    for name, text in zip(TEXT_ENCODERS, texts, strict=False):
        if isinstance(text, CLIPTextConfig):
            table = (clip.RULES, clip.sizes(text))
            found.append(legacy_part(part(pipeline, name, table, clip.ignore(text))))
        elif isinstance(text, T5EncoderConfig):
            source = t5.without_copy(pipeline.components[name])
            made = part(pipeline, name, (t5.RULES, t5.sizes(text)), t5.IGNORE)
            found.append(made._replace(tensors=source.tensors))
        else:
            found.append(qwen.text_part(pipeline, name, text))
    return tuple(found)
