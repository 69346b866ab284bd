"""Parts and checks that the pipelines of flow matching share."""

from collections.abc import Sequence
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models.autoencoders import vae
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.registry import Architecture
from jaxft.models.text_encoders import clip, qwen, t5
from jaxft.models.text_encoders.clip import CLIPTextConfig
from jaxft.models.text_encoders.qwen import QwenTextConfig
from jaxft.models.text_encoders.t5 import T5EncoderConfig
from jaxft.weights.folders.diffusers import TEXT_ENCODERS, Pipeline, legacy_part, part
from jaxft.weights.transfer import Part

AnyTextConfig = CLIPTextConfig | T5EncoderConfig | QwenTextConfig


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


def parts(pipeline: Pipeline, cfg: Any, architecture: Architecture) -> tuple[Part, ...]:
    """Return the parts of a pipeline, which fill its parameters and which an export writes.

    cfg: the pipeline's config. architecture: that of its transformer.
    """
    own = architecture.rules(cfg.transformer), architecture.sizes(cfg.transformer)
    denoiser = part(pipeline, "transformer", own)
    decoder = part(pipeline, "vae", (vae.RULES, vae.sizes(cfg.vae)))
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
