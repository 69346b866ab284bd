"""A Stable Diffusion folder or file, opened for training."""

import dataclasses
from collections.abc import Collection
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxft.core import runtime
from jaxft.core.configs.schema import Config, Lora
from jaxft.core.errors import UserError
from jaxft.core.params import ADAPTER_ROLE, describe, unpacked
from jaxft.data.sources.schemes import ALPHA, MASK_FILE
from jaxft.models import flops
from jaxft.models.pipelines import families, growing, ldm, stable_diffusion
from jaxft.models.pipelines.families import AnyConfig, AnyPipeline
from jaxft.models.pipelines.flow.common import FlowConfig
from jaxft.models.pipelines.stable_diffusion import Conditions, PipelineConfig, Text
from jaxft.nn import lora
from jaxft.nn.quantised import NF4_BASE, NF4_TABLES, check_base, quantise
from jaxft.noise.process import NoiseProcess
from jaxft.tasks.diffusion import inversion
from jaxft.tasks.diffusion.captions import Captions, load_captions
from jaxft.tasks.diffusion.options import DiffusionOptions
from jaxft.weights.adapters import pipeline as pipeline_lora
from jaxft.weights.adapters.peft import start
from jaxft.weights.adapters.pipeline_file import PipelineLora, load, open_lora
from jaxft.weights.folders.quantised.methods import nf4_scales


class OpenedPipeline:
    """A pipeline with its tokenizers. Implements `jaxft.tasks.Opened`."""

    def __init__(self, cfg: Config):
        self.options = DiffusionOptions(**cfg.own)
        options = self.options
        lora.check_plain(cfg.lora, "diffusion")
        prediction = options.prediction or None
        nf4 = NF4_TABLES if options.base == NF4_BASE else None
        weights = cfg.init == "pretrained"
        read = ldm.open_model(cfg.model, weights, prediction=prediction, nf4=nf4)
        self.pipeline = growing.grow(read, options.grow)
        self.model_cfg = families.read_config(self.pipeline, options.prediction, options.zero_snr)
        check_sampler("sample.sampler", options.sample.sampler, self.model_cfg)
        most = self.model_cfg.schedule.train_steps
        if options.sample.steps > most:
            raise UserError(
                f"config key sample.steps={options.sample.steps} must be at most {most}, the steps"
                " of the model's training"
            )
        check(options.caption_dropout, self.model_cfg)
        _check_mask(options.mask, self.model_cfg)
        if options.sample.rescale and not self.model_cfg.free_guidance:
            raise UserError(
                f"sample.rescale={options.sample.rescale} corrects classifier-free guidance, which"
                f" {self.model_cfg.describe()}, does not have; set it to 0"
            )
        _check_captions(options, self.model_cfg)
        _check_lokr(cfg.lora, self.model_cfg)
        self.model_cfg = dataclasses.replace(self.model_cfg, clip_skip=options.clip_skip)
        self.model_cfg = inversion.extended(self.model_cfg, len(inversion.names(options.inversion)))
        self.process: NoiseProcess = self.model_cfg.process(options.min_snr_gamma)
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self.parts = families.parts(self.pipeline, self.model_cfg)
        self.adapter: PipelineLora | None = None
        if cfg.lora.from_:
            self.adapter, adapted = self._read_adapter(cfg.lora)
            cfg = dataclasses.replace(cfg, lora=adapted)
        elif not cfg.lora.targets:
            targets = dataclasses.replace(cfg.lora, targets=self.model_cfg.lora)
            cfg = dataclasses.replace(cfg, lora=targets)
        if not (cfg.trainable or cfg.lora.rank or options.inversion.token):
            cfg = dataclasses.replace(cfg, trainable=rf"{self.model_cfg.denoiser}\..*")
        elif options.grow != growing.NO_GROWTH and not cfg.trainable:
            cfg = dataclasses.replace(cfg, trainable=growing.TRAINED_BESIDE)
        check_base(options.base, cfg.lora)
        self.cfg = cfg
        self.template = jax.eval_shape(self.build, jax.random.key(0))
        growing.check_trained(options.grow, cfg.trainable, unpacked(describe(self.template)))
        if cfg.export.kind == "lora" or (cfg.export.kind == "all" and cfg.lora.rank):
            pipeline_lora.check(self.parts, unpacked(describe(self.template)))

    @cached_property
    def captions(self) -> Captions:
        """The tokenizers. Raises UserError where they do not fit the encoders or the config."""
        new = inversion.names(self.options.inversion)
        chunks = self.options.caption_chunks
        made = load_captions(self.pipeline, self.model_cfg.texts, new, chunks)
        if new:
            inversion.check(self.cfg, made, describe(self.template))
        made.too_long(self.options.sample.prompts)  # raises for a token without a row
        return made

    @property
    def ids_shape(self) -> tuple[int, int]:
        """Shape [E, T] of a caption's token ids."""
        texts, chunks = self.model_cfg.texts, self.options.caption_chunks
        return len(texts), chunks * max(text.max_positions for text in texts)

    def build(self, key: jax.Array) -> nnx.Module:
        model = families.build(self.model_cfg, key)
        lora.add(model, self.cfg.lora, jax.random.fold_in(key, 1))
        name = self.model_cfg.denoiser
        double = nf4_scales(self.pipeline.components[name].config) != "single"
        quantise(model, self.options.base, double, prefix=f"{name}.")
        return model

    def initial(self, wanted: Collection[str]) -> dict[str, np.ndarray]:
        own, leaves = self.options.inversion, unpacked(describe(self.template))
        made = inversion.initial(own, self.captions, self.parts, leaves) if own.token else {}
        if not self.adapter and self.cfg.lora.dora:
            for part in self.parts:
                made |= start(part, leaves, self.cfg.lora, wanted)
        if self.adapter and any(leaves[path].role == ADAPTER_ROLE for path in wanted):
            made |= load(self.adapter, leaves)
        return made

    def _read_adapter(self, asked: Lora) -> tuple[PipelineLora, Lora]:
        """Open the file of `lora.from`. Returns it with the LoRA settings that it decides."""
        everywhere = Lora(rank=1, targets=".*", dora=True)
        if asked.lokr:
            everywhere = Lora(rank=1, targets=r"unet\..*", lokr=asked.lokr)

        def build(key: jax.Array) -> nnx.Module:
            model = families.build(self.model_cfg, key)
            lora.add(model, everywhere, key)
            return model

        model = jax.eval_shape(build, jax.random.key(0))
        layouts = ldm.layouts(self.pipeline)
        found = open_lora(asked.from_, self.parts, describe(model), layouts, asked.lokr)
        return found, lora.continued(asked, found.lora, lora.projections(model))

    def describe(self) -> str:
        return self.model_cfg.describe()

    def text_shapes(self) -> Text:
        """Return the shapes of one caption's embedding."""
        ids = jax.ShapeDtypeStruct((1, *self.ids_shape), np.int32)

        def encode(model: AnyPipeline, ids: Any) -> Text:
            return model.encode_text(ids, dtype=self.dtype)

        return jax.eval_shape(encode, self.template, ids)

    def image_flops(self) -> float:
        """Return the FLOPs of the denoiser's forward pass for one image at full resolution."""
        cfg, side = self.model_cfg, self.options.resolution // self.model_cfg.vae.factor
        latents = jax.ShapeDtypeStruct((1, side, side, cfg.in_channels), self.dtype)
        times = jax.ShapeDtypeStruct((1, 6), np.float32)

        def forward(model: AnyPipeline, latents: Any, text: Text, times: Any) -> jax.Array:
            given = Conditions(text, times)
            return model.predict(latents, times[:, 0], given, dtype=self.dtype)

        return flops.count(forward, self.template, latents, self.text_shapes(), times)


def _check_captions(options: DiffusionOptions, cfg: AnyConfig) -> None:
    """Raise UserError for chunks and layers of CLIP that the captions of a model cannot have."""
    chunks = options.caption_chunks
    if chunks < 1:
        raise UserError(f"caption_chunks={chunks} must be at least 1")
    if chunks > 1 and not isinstance(cfg, PipelineConfig):
        raise UserError(
            f"caption_chunks={chunks} is for CLIP as the only text encoder, and this is"
            f" {cfg.describe()}; set it to 1"
        )
    if not options.clip_skip:
        return
    sd3 = isinstance(cfg, FlowConfig) and cfg.family == "sd3"
    if not (isinstance(cfg, PipelineConfig) or sd3):
        raise UserError(
            f"clip_skip={options.clip_skip} chooses hidden states of CLIP, which"
            f" {cfg.describe()}, does not read; set it to 0"
        )
    layers = min(text.num_layers for text in cfg.texts[:2])
    most = layers - (1 if sd3 or (isinstance(cfg, PipelineConfig) and cfg.sdxl) else 0)
    if not 0 <= options.clip_skip <= most:
        raise UserError(
            f"clip_skip={options.clip_skip} is not between 0 and {most}: CLIP has {layers} layers"
        )


def _check_lokr(cfg: Lora, model: AnyConfig) -> None:
    """Raise UserError for LoKr of a model whose file it cannot be written to, or with DoRA."""
    if cfg.lokr and not isinstance(model, PipelineConfig):
        raise UserError(
            f"lora.lokr={cfg.lokr} is for the UNets of Stable Diffusion 1, 2 and XL, and this is"
            f" {model.describe()}; leave it out"
        )
    if cfg.lokr < -1:
        raise UserError(f"lora.lokr={cfg.lokr} must be a factor from 1 on, -1 or 0")
    if cfg.lokr and cfg.dora:
        raise UserError(f"lora.lokr={cfg.lokr} does not go with lora.dora=True; leave one out")


def _check_mask(name: str, cfg: AnyConfig) -> None:
    """Raise UserError for an unknown kind of mask, and for a model that reads masks of its own."""
    if name not in ("", MASK_FILE, ALPHA):
        raise UserError(f"mask={name!r} is not one of {MASK_FILE}, {ALPHA}, or empty")
    if name and cfg.conditioning != stable_diffusion.NOTHING:
        raise UserError(
            f"mask={name!r} weights the loss of a model of captions alone, and this is"
            f" {cfg.describe()}; leave it empty"
        )


def check_sampler(key: str, name: str, cfg: AnyConfig) -> None:
    """Raise UserError for an unknown sampler. The error names its config key or option."""
    if name not in cfg.samplers:
        raise UserError(f"{key}={name!r} is not one of {', '.join(cfg.samplers)}")


def check_size(cfg: AnyConfig, size: tuple[int, int]) -> None:
    """Raise UserError for a size (height, width) that the model cannot sample."""
    height, width = size
    if cfg.conditioning != stable_diffusion.NOTHING:
        raise UserError(f"--size={width}x{height}: this model takes the size of --image")
    if height % cfg.multiple or width % cfg.multiple:
        sides = (max(1, round(side / cfg.multiple)) * cfg.multiple for side in (width, height))
        near = "x".join(map(str, sides))
        raise UserError(
            f"--size={width}x{height}: both sides have to be multiples of {cfg.multiple}, such as"
            f" {near}"
        )


def check(share: float, cfg: AnyConfig) -> None:
    """Raise UserError for a UNet of an unknown kind, and an invalid `share` of dropped captions.

    InstructPix2Pix drops this share three times. The sum must not exceed all rows.
    """
    if not 0 <= share < 1:
        raise UserError(f"caption_dropout={share} must be at least 0 and below 1")
    if isinstance(cfg, PipelineConfig) and not cfg.conditioning:
        latent = cfg.vae.latent_channels
        raise UserError(
            f"unet/config.json: in_channels={cfg.unet.in_channels}, but for a VAE with"
            f" latent_channels={latent} a text-to-image UNet takes {latent}, InstructPix2Pix"
            f" {2 * latent}, inpainting {2 * latent + 1}; other kinds are not supported"
        )
    if cfg.conditioning == stable_diffusion.SOURCE and share > 1 / 3:
        raise UserError(
            f"caption_dropout={share} must be at most 1/3 for InstructPix2Pix: as many"
            " rows lose the caption, the picture, and both; the paper has 0.05"
        )
