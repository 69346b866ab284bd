"""An autoencoder's folder with its discriminator and perceptual network, opened for training."""

import dataclasses
import re
from collections.abc import Collection

import jax
import numpy as np
from flax import nnx

from jaxft.core import runtime
from jaxft.core.configs.schema import Config
from jaxft.core.errors import UserError
from jaxft.core.params import ADVERSARY_ROLE, mark
from jaxft.models.critics import perceptual
from jaxft.models.critics.discriminator import LEAST, PatchGAN
from jaxft.models.critics.perceptual import PerceptualNetwork
from jaxft.nn.conv import runner
from jaxft.tasks.autoencoder.codec import CODEBOOK_PATH, Codec, open_codec
from jaxft.tasks.autoencoder.options import AutoencoderOptions, Losses
from jaxft.weights.folders.diffusers import open_component


class Trainee(nnx.Module):
    """The autoencoder, the discriminator and the perceptual network, None if unused."""

    def __init__(
        self, codec: Codec, losses: Losses, measure: PerceptualNetwork | None, *, key: jax.Array
    ):
        first, second, third = jax.random.split(key, 3)
        self.vae = codec.module(codec.cfg, key=first)
        self.discriminator = nnx.data(PatchGAN(key=second) if losses.adversarial else None)
        if self.discriminator:
            mark(self.discriminator, ADVERSARY_ROLE)
        self.perceptual = nnx.data(measure.module(key=third) if measure else None)


class OpenedAutoencoder:
    """An autoencoder with its discriminator and its perceptual network.

    Implements `jaxft.tasks.Opened`.
    """

    def __init__(self, cfg: Config):
        self.cfg, self.options = cfg, AutoencoderOptions(**cfg.own)
        self.losses = self.options.loss
        self.source = open_component(cfg.model, "vae", weights=cfg.init == "pretrained")
        self.codec = open_codec(self.source.config, f"{cfg.model}/config.json")
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self._check()
        measures = self.losses.perceptual or cfg.data.eval
        self.measure = perceptual.open_perceptual(self.options.perceptual) if measures else None
        self.template = jax.eval_shape(self.build, jax.random.key(0))
        auxiliary = (self.measure.part()._replace(aid=True),) if self.measure else ()
        self.parts = (self.codec.part(self.source), *auxiliary)

    def build(self, key: jax.Array) -> nnx.Module:
        return Trainee(self.codec, self.losses, self.measure, key=key)

    def initial(self, wanted: Collection[str]) -> dict[str, np.ndarray]:
        return {}

    def describe(self) -> str:
        weights = {k: v for k, v in dataclasses.asdict(self.losses).items() if isinstance(v, float)}
        for other in ("commitment", "revive") if not self.codec.codes else ("kl",):
            weights.pop(other)
        used = " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)
        measure = f" ({self.measure.name})" if self.measure else ""
        cfg, codes = self.codec.cfg, self.codec.codes
        held = f"{codes} codes" if codes else f"{cfg.latent_channels} channels"
        return f"{self.codec.kind} of {cfg.factor} pixels a latent, {held}; loss {used}{measure}"

    def _check(self) -> None:
        """Raise UserError for losses that the model or the trained parameters cannot have."""
        runner("none" if self.cfg.remat == "auto" else self.cfg.remat)  # raises
        losses, trainable = self.losses, self.cfg.trainable or ".*"
        own = self.cfg.lora
        keys = {
            "from": own.from_,
            "rank": own.rank,
            "ranks": own.ranks,
            "layers": own.layers,
            "dora": own.dora,
            "lokr": own.lokr,
            "tokens": own.tokens,
        }
        if given := [f"lora.{key}={value!r}" for key, value in keys.items() if value]:
            raise UserError(
                f"{given[0]}, but an autoencoder takes no adapters; set"
                " lora.rank=0 and name what trains in trainable"
            )
        if not (losses.l1 or losses.l2 or losses.perceptual):
            raise UserError(
                "loss.l1=0.0, loss.l2=0.0 and loss.perceptual=0.0 leave no image to aim at; set one"
            )
        if losses.adversarial and self.options.resolution < LEAST:
            raise UserError(
                f"resolution={self.options.resolution} is too small for the discriminator, which"
                f" needs at least {LEAST} pixels a side; raise it or set loss.adversarial=0.0"
            )
        if losses.adversarial and not re.fullmatch(trainable, "discriminator.conv_out.kernel"):
            raise UserError(
                f"loss.adversarial={losses.adversarial:g} needs a discriminator that trains, but"
                rf" trainable={trainable!r} leaves it out; add |discriminator\..*"
            )
        if losses.revive and not (self.codec.codes and re.fullmatch(trainable, CODEBOOK_PATH)):
            raise UserError(
                f"loss.revive={losses.revive:g} needs a codebook that trains, but"
                + (
                    f" trainable={trainable!r} leaves out {CODEBOOK_PATH}; "
                    if self.codec.codes
                    else f" {self.cfg.model} has none; "
                )
                + "set loss.revive=0.0"
            )
