"""Stable Diffusion as a whole: embeddings of captions, predictions, pictures from noise."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.models.autoencoders import vae
from jaxft.models.autoencoders.vae import VAE
from jaxft.models.autoencoders.vae_config import FILE as VAE_FILE
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.denoisers import unet
from jaxft.models.denoisers.unet import Added, UNet
from jaxft.models.denoisers.unet_config import FILE as UNET_FILE
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.text_encoders import clip
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.noise.ddpm import DDPM
from jaxft.noise.samplers import SAMPLERS, Sampler, denoise, guide, guide_edit
from jaxft.noise.schedule import SCHEDULE_CHOICES, ZERO_SNR, Schedule
from jaxft.weights.folders.diffusers import SCHEDULER, TEXT_ENCODERS, Pipeline, legacy_part, part
from jaxft.weights.transfer import Part

# Picture conditioning of a UNet, by its channels beside the noisy latents.
NOTHING, HOLE, SOURCE = "nothing", "hole", "source"
KINDS = {NOTHING: "", HOLE: " inpainting", SOURCE: " InstructPix2Pix"}


class Drawing(NamedTuple):
    """Steps and guidance of a picture, where the caller names none."""

    steps: int = 30
    guidance: float = 7.5


@dataclass(frozen=True)
class PipelineConfig:
    """The configs of a pipeline's networks, its noise schedule, and its kind of null caption.

    `denoiser` is the folder of the network that denoises, and `lora` a regex over the projections
    that a LoRA adapts by default. `free_guidance`: each step of a sampler predicts from the null
    caption too (classifier-free guidance).

    `zero_null`: a null caption is zeros (SDXL's pipeline), and not the embedding of "". `scheduler`
    holds the keys of scheduler_config.json that differ from those of the folder. `clip_skip`: the
    layers that CLIP leaves out for captions, but not for a null caption, as in diffusers.
    """

    unet: UNetConfig
    vae: VAEConfig
    texts: tuple[CLIPTextConfig, ...]
    schedule: Schedule
    sdxl: bool
    zero_null: bool
    scheduler: tuple[tuple[str, Any], ...] = ()
    clip_skip: int = 0
    free_guidance: ClassVar[bool] = True
    drawing: ClassVar[Drawing] = Drawing()
    denoiser: ClassVar[str] = "unet"
    lora: ClassVar[str] = r"unet\..*\.attn[12]\.to_(q|k|v|out)"

    @property
    def multiple(self) -> int:
        """The number of pixels that both sides of a picture have to be a multiple of."""
        return self.vae.factor * 2 ** (len(self.unet.channels) - 1)

    @property
    def in_channels(self) -> int:
        """Channels of the UNet's input: noisy latents, and those of a conditioning."""
        return self.unet.in_channels

    @property
    def sample_size(self) -> int | None:
        """The side of the latents that the UNet was trained on. None if its config names none."""
        return self.unet.sample_size

    @property
    def samplers(self) -> tuple[str, ...]:
        return tuple(SAMPLERS)

    def process(self, min_snr_gamma: float = 0.0) -> DDPM:
        """Return the noise process. min_snr_gamma: as in `DDPM`."""
        return DDPM(self.schedule, min_snr_gamma)

    def describe(self) -> str:
        size = " XL" if self.sdxl else ""
        terminal = ", zero terminal SNR" if self.schedule.zero_snr else ""
        kind = KINDS.get(self.conditioning, "")
        return f"Stable Diffusion{size}{kind}, {self.schedule.prediction}{terminal}"

    @property
    def conditioning(self) -> str:
        """The picture conditioning, by the UNet's input channels.

        It is NOTHING (text-to-image), HOLE (inpainting: a mask and the latents of the masked
        picture), SOURCE (InstructPix2Pix: the latents of a picture), or "" for other channels.
        """
        latent = self.vae.latent_channels
        known = {0: NOTHING, latent + 1: HOLE, latent: SOURCE}
        return known.get(self.unet.in_channels - latent, "")

    @classmethod
    def of(cls, pipeline: Pipeline, prediction: str = "", zero_snr: bool = False):
        """Read every config.json. `prediction` and `zero_snr` replace settings of the folder.

        Raises: UserError if the components do not fit each other, or the two settings the folder.
        """
        changes = _changes(pipeline, prediction, zero_snr)
        sdxl = pipeline.family == "sdxl"
        # As in diffusers: StableDiffusionPipeline corrects these two settings of old folders,
        # inpainting only the first, SDXL and InstructPix2Pix none.
        name, forced = pipeline.index.get("_class_name", ""), {"steps_offset": 1}
        forced |= {} if "Inpaint" in name else {"clip_sample": False}
        forced = {} if sdxl or "Pix2Pix" in name else forced
        names = [name for name in TEXT_ENCODERS if name in pipeline.components]
        configs = {name: source.config for name, source in pipeline.components.items()}
        cfg = cls(
            unet=UNetConfig.from_hf(configs["unet"], f"{pipeline.name}/{UNET_FILE}"),
            vae=VAEConfig.from_hf(configs["vae"], f"{pipeline.name}/{VAE_FILE}"),
            texts=tuple(
                CLIPTextConfig.from_hf(
                    configs[name], pipeline.projects(name), f"{pipeline.name}/{name}/config.json"
                )
                for name in names
            ),
            schedule=Schedule.from_hf(
                {**pipeline.scheduler, **changes, **forced}, f"{pipeline.name}/{SCHEDULER}"
            ),
            sdxl=sdxl,
            zero_null=sdxl and bool(pipeline.index.get("force_zeros_for_empty_prompt", True)),
            scheduler=tuple(changes.items()),
        )
        _check_fit(cfg, pipeline.name)
        return cfg


def _changes(pipeline: Pipeline, prediction: str, zero_snr: bool) -> dict[str, Any]:
    """Return the keys of scheduler_config.json that the two settings of the run change."""
    known = SCHEDULE_CHOICES["prediction_type"]
    if prediction and prediction not in known:
        raise UserError(f"prediction={prediction!r} is not one of {', '.join(known)}, or empty")
    old = {"prediction_type": "epsilon", **pipeline.scheduler}
    if prediction == "epsilon" and old["prediction_type"] == "v_prediction":
        raise UserError(
            f"prediction='epsilon', but {SCHEDULER} of {pipeline.name} has v_prediction, by which"
            " its UNet was trained; leave prediction empty"
        )
    changes: dict[str, Any] = {"prediction_type": prediction} if prediction else {}
    if zero_snr and (prediction or old["prediction_type"]) == "epsilon":
        raise UserError(
            f"zero_snr=True cannot train the epsilon prediction of {pipeline.name} (at SNR 0"
            " nothing is left to predict x0 from); set prediction=v_prediction"
        )
    if zero_snr:
        changes |= ZERO_SNR
    return {key: value for key, value in changes.items() if old.get(key) != value}


def _check_fit(cfg: PipelineConfig, name: str) -> None:
    width = sum(text.hidden_size for text in cfg.texts)
    if set(cfg.unet.context_dims) != {width}:
        raise UserError(
            f"{name}: unet/config.json has cross_attention_dim={sorted(set(cfg.unet.context_dims))}"
            f" but the text encoders give {width}; the folder mixes two models"
        )
    if cfg.unet.out_channels != cfg.vae.latent_channels:
        raise UserError(
            f"{name}: the UNet makes {cfg.unet.out_channels} channels, the VAE has"
            f" latent_channels={cfg.vae.latent_channels}; the folder mixes two models"
        )
    mean, std = cfg.vae.mean, cfg.vae.std
    both = len(mean) == len(std) == cfg.vae.latent_channels
    if (any(mean) or set(std) != {1.0}) and not (cfg.sdxl and both):
        raise UserError(
            f"{name}: vae/config.json has shift_factor, latents_mean or latents_std, which the"
            " pipeline of diffusers does not apply when it samples (SDXL's applies a mean together"
            " with a std); set them to null"
        )
    if (cfg.unet.added_dim is not None) != cfg.sdxl:
        raise UserError(
            f"{name}: model_index.json names {'an' if cfg.sdxl else 'no'} SDXL pipeline, which does"
            " not fit addition_embed_type of unet/config.json"
        )


class Text(NamedTuple):
    """The embeddings of captions, inputs of the denoiser.

    pooled: for SDXL, SD 3 and FLUX.1. lengths: the tokens of each caption, for Z-Image.
    """

    context: Float[Array, "B T D"]
    pooled: Float[Array, "B P"] | None
    lengths: Int[Array, " B"] | None = None


class Conditions(NamedTuple):
    """The inputs of a denoiser beside noisy latents and their times.

    time_ids: sizes and crop of a picture, for SDXL. concat: further input channels of a UNet (see
    `conditioning`). guidance: the scale of guidance, for a model that has it as an input.
    """

    text: Text
    time_ids: Float[Array, "B 6"] | None = None
    concat: Float[Array, "B Y X K"] | None = None
    guidance: Any = None


class StableDiffusion(nnx.Module):
    """UNet, VAE and text encoders under the names of their folders."""

    def __init__(self, cfg: PipelineConfig, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.unet = UNet(cfg.unet, key=keys[0])
        self.vae = VAE(cfg.vae, key=keys[1])
        self.text_encoder = CLIPText(cfg.texts[0], key=keys[2])
        second = CLIPText(cfg.texts[1], key=keys[3]) if len(cfg.texts) > 1 else None
        self.text_encoder_2 = nnx.data(second)

    def encode_text(
        self,
        ids: Int[Array, "B E T"],
        *,
        dtype: Any,
        keys: PRNGKeyArray | None = None,
        skip: int = 0,
    ) -> Text:
        """Return the embeddings of captions, tokenised for each of the E encoders.

        SD 1.x and 2.x: the last hidden states after the final norm. SDXL: the last but one hidden
        states of both encoders, concatenated, without the norm, and the projected end token of the
        second encoder. T may be several times the positions of an encoder, which then encodes each
        chunk alone. The end token is that of the first. keys: one a row, for the dropout of
        adapters. skip: the number of further layers that the states leave out, diffusers'
        clip_skip.
        """
        if self.text_encoder_2 is None:
            made = clip.encode_chunks(self.text_encoder, ids[:, 0], skip, keys, dtype)
            return Text(made.normed, None)
        first = clip.encode_chunks(self.text_encoder, ids[:, 0], 1 + skip, keys, dtype)
        second = clip.encode_chunks(self.text_encoder_2, ids[:, 1], 1 + skip, keys, dtype)
        context = jnp.concatenate([first.hidden, second.hidden], axis=-1)  # [B, T, D]
        return Text(context, second.pooled)

    def predict(
        self,
        latents: Float[Array, "B Y X C"],
        timesteps: Array,
        given: Conditions,
        *,
        dtype: Any,
        keys: PRNGKeyArray | None = None,
        remat: str = "none",
    ) -> Float[Array, "B Y X C"]:
        """Return the UNet's prediction for noisy, scaled latents.

        Guidance is for other pipelines. Other arguments are as in `UNet`.
        """
        text, added = given.text, None
        if given.concat is not None:
            joined = [latents, given.concat.astype(latents.dtype)]
            latents = jnp.concatenate(joined, axis=-1)  # [B, Y, X, C + K]
        if text.pooled is not None:
            assert given.time_ids is not None
            added = Added(text.pooled, given.time_ids)
        return self.unet(
            latents, timesteps, text.context, added, dtype=dtype, keys=keys, remat=remat
        )


def drop_captions(text: Text, null: Text, dropped: Array) -> Text:
    """Return captions, with `null` (of one row or B rows) in the rows where `dropped` [B]."""
    context = jnp.where(
        dropped[:, None, None], null.context.astype(text.context.dtype), text.context
    )
    pooled, lengths = text.pooled, text.lengths
    if pooled is not None and null.pooled is not None:
        pooled = jnp.where(dropped[:, None], null.pooled.astype(pooled.dtype), pooled)
    if lengths is not None and null.lengths is not None:
        lengths = jnp.where(dropped, null.lengths, lengths)
    return Text(context, pooled, lengths)


def zeroed(text: Text) -> Text:
    """Return SDXL's null caption: zeros."""
    return jax.tree.map(jnp.zeros_like, text)


class Guidance(NamedTuple):
    """Settings of guidance, as in `samplers.guide` and `guide_edit`.

    scale: of the caption. A model without free guidance may take it as an input. rescale: the share
    whose contrast is corrected. image: the scale of a source picture.
    """

    scale: Any
    rescale: Any = 0.0
    image: Any = 1.5


def generate(
    model: Any,
    cfg: Any,
    text: Text,
    null: Text,
    noise: Float[Array, "B Y X C"],
    sampler: Sampler,
    guidance: Guidance,
    dtype: Any,
    concat: Float[Array, "B Y X K"] | None = None,
) -> Float[Array, "B Y2 X2 3"]:
    """Return pictures in [-1, 1] from unit noise [B, Y, X, C].

    model: a pipeline of any family, with `cfg`, its config.
    Each step calls the denoiser once, with the rows of null and caption together. With a source
    picture there are rows of the null caption without the picture too (`concat` of zeros). Without
    free guidance there are the rows of the caption alone.
    """
    rows, y, x, _ = noise.shape
    factor = cfg.vae.factor
    # SDXL's time ids: original size, crop, target size, for a picture that was not cropped.
    size = jnp.array([y * factor, x * factor, 0, 0, y * factor, x * factor], jnp.float32)
    texts, concats = ((null, text), (concat, concat)) if cfg.free_guidance else ((text,), (concat,))
    if cfg.conditioning == SOURCE:
        texts, concats = (null, *texts), (jax.tree.map(jnp.zeros_like, concat), *concats)
    every, inputs = _stacked(*texts), _stacked(*concats)
    times_rows = len(texts) * rows  # R
    ids = jnp.broadcast_to(size, (times_rows, 6))  # [R, 6]

    def predict(latents: Array, t: Array) -> Array:
        copies = jnp.concatenate([latents] * len(texts))  # [R, Y, X, C]
        times = jnp.broadcast_to(t, (times_rows,))  # [R]
        given = Conditions(every, ids, inputs, guidance.scale)
        out = model.predict(copies, times, given, dtype=dtype)
        *nulls, cond = jnp.split(out, len(texts))  # [B, Y, X, C] each
        if not nulls:
            return cond
        *first, image = nulls
        if not first:
            return guide(image, cond, guidance.scale, guidance.rescale)
        return guide_edit(first[0], image, cond, guidance.scale, guidance.image, guidance.rescale)

    latents = denoise(predict, noise, sampler)
    images = model.vae.decode(model.vae.unscale(latents).astype(dtype))  # [B, Y2, X2, 3]
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)


def _stacked(*trees: Any) -> Any:
    """Concatenate the rows of trees of arrays. None stays None."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *trees)


def parts(pipeline: Pipeline, cfg: PipelineConfig) -> tuple[Part, ...]:
    """Return the parts of a pipeline, which fill its parameters and which an export writes."""
    tables = {"unet": (unet.rules(cfg.unet), {}), "vae": (vae.RULES, vae.sizes(cfg.vae))}
    found = [part(pipeline, name, table) for name, table in tables.items()]
    for name, text in zip(TEXT_ENCODERS, cfg.texts, strict=False):
        table = (clip.RULES, clip.sizes(text))
        found.append(legacy_part(part(pipeline, name, table, clip.ignore(text))))
    return tuple(found)
