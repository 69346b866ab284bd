"""Autoencoders: reconstruction, perceptual and adversarial losses for a diffusion model's VAE."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxft.core import config as configs
from jaxft.core import runtime
from jaxft.core.config import Config
from jaxft.core.errors import UserError
from jaxft.core.params import Params, bind
from jaxft.core.pictures import grid
from jaxft.core.sharding import constrain, local_rows, place_batch
from jaxft.core.step import Batch, Metrics, cast
from jaxft.data.image_sources import open_images
from jaxft.data.images import ImageSet, collate
from jaxft.data.loader import eval_batches, subset, train_loader
from jaxft.models import perceptual, vae
from jaxft.models.discriminator import PatchGAN
from jaxft.models.vae import VAE, VAEConfig
from jaxft.nn.adversarial import adaptive_weight, hinge, pull, steer
from jaxft.nn.image_metrics import psnr, ssim
from jaxft.tasks import Look, Report, Request
from jaxft.tasks.kid_lite0 import KidLite0
from jaxft.weights.pipeline import open_component
from jaxft.weights.sources import export_config
from jaxft.weights.transfer import Part

SHOWN = 8  # rows of a picture grid
CELL = 96  # least pixels of a cell in it


@dataclasses.dataclass(frozen=True)
class Losses:
    """Weights of the terms: means over pixels of |x - y| and (x - y)^2, the perceptual distance,
    KL (a sum over the latents, as in diffusers' training), and the adversarial term, whose weight
    multiplies the adaptive one, from `adversarial_start` on."""

    l1: float
    l2: float
    perceptual: float
    kl: float
    adversarial: float
    adversarial_start: str


@dataclasses.dataclass(frozen=True)
class Options:
    """`resolution` in pixels a side; `perceptual` is the network that measures."""

    resolution: int
    eval_examples: int
    perceptual: str
    loss: Losses


class Trainee(nnx.Module):
    """The autoencoder, the discriminator (None without an adversarial loss) and the aids."""

    def __init__(self, cfg: VAEConfig, losses: Losses, measure: Any, *, key: jax.Array):
        first, second, third = jax.random.split(key, 3)
        self.vae = VAE(cfg, key=first)
        self.discriminator = nnx.data(PatchGAN(key=second) if losses.adversarial else None)
        self.perceptual = measure.module(key=third)


class Made(NamedTuple):
    """A reconstruction on its way: what the last layer sees, and the latents' own loss a row."""

    features: jax.Array
    images: jax.Array
    latent: jax.Array


class Autoencoder:
    """Fine-tuning an autoencoder, or training one from nothing; see `jaxft.tasks.Task`."""

    Options = Options
    EXPORT_KINDS = ("folder", "none")
    unit = "images"

    def __init__(self, cfg: Config):
        self.cfg, self.options = cfg, Options(**cfg.own)
        self.losses = self.options.loss
        self.source = open_component(cfg.model, "vae", weights=cfg.init == "pretrained")
        self.model_cfg = VAEConfig.from_hf(self.source.config, f"{cfg.model}/config.json")
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self.measure = perceptual.open_perceptual(self.options.perceptual)
        self.template = jax.eval_shape(self.build, jax.random.key(0))
        own = Part(
            "vae.", cfg.model, self.source.tensors, vae.RULES, vae.sizes(self.model_cfg),
            stem="diffusion_pytorch_model",
        )  # fmt: skip
        self.parts = (own, self.measure.part()._replace(aid=True))
        self.train_set = self._read(cfg.data.train, flips=True)
        self.eval_set = self._read(cfg.data.eval, flips=False) if cfg.data.eval else None
        self.start = self._adversarial_start()
        self.kid = KidLite0()

    def build(self, key: jax.Array) -> nnx.Module:
        return Trainee(self.model_cfg, self.losses, self.measure, key=key)

    def initial(self) -> dict[str, np.ndarray]:
        return {}

    def describe(self) -> str:
        terms = {k: v for k, v in dataclasses.asdict(self.losses).items() if isinstance(v, float)}
        used = " + ".join(f"{weight:g} {name}" for name, weight in terms.items() if weight)
        return (
            f"AutoencoderKL of {self.model_cfg.factor} pixels a latent,"
            f" {self.model_cfg.latent_channels} channels; {self.cfg.data.train}:"
            f" {len(self.train_set.records)} images, mirrored too; loss {used}"
            f" ({self.measure.name})"
        )

    def data_report(self) -> dict[str, int]:
        return self.train_set.report

    def n_examples(self) -> int:
        return len(self.train_set)

    def train_batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return train_loader(
            self.train_set,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            start_step=start_step,
            collate_fn=collate,
            rows=rows,
        )

    def shapes(self, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return itertools.islice(self.train_batches(0, rows), 1)

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return len(batch["pixels"])

    def flops_per_unit(self, chosen: set[str]) -> float:
        return 0.0

    def side_files(self, dtype: str | None, rewritten: set[str]) -> dict[str, Path | bytes]:
        if "vae." not in rewritten:
            return dict(self.source.side_files)
        config = export_config(self.source.config, dtype)
        config.setdefault("_class_name", "AutoencoderKL")
        return {"config.json": (json.dumps(config, indent=2) + "\n").encode()}

    # ---- the loss -------------------------------------------------------------------------

    def loss(
        self, model: Trainee, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Reconstruction, latent and adversarial terms; the discriminator's beside them.

        Each of the two players sees the other as a constant, so one gradient serves both:
        LlamaGen's alternating update, in which both losses come from one forward pass.
        """
        rows = batch["weights"]
        images = to_float(batch["pixels"]).astype(self.dtype)
        made = self._reconstruct(model, images, keys)
        terms = {k: rows @ v for k, v in self._terms(model, images, made.images).items()}
        rec = pull(lambda y: rows @ sum(self._terms(model, images, y).values()), made.images)
        value, gradient = rec.value + rows @ made.latent, rec.gradient
        terms["latent"] = rows @ made.latent
        judged = jnp.zeros(())
        if model.discriminator is not None:
            active = (step >= self.start).astype(jnp.float32)
            adv, weight, judged = self._adversarial(model, images, made, rec, rows)
            factor, judged = active * self.losses.adversarial * weight, active * judged
            value, gradient = value + factor * adv.value, gradient + factor * adv.gradient
            terms |= {"adversarial": adv.value, "adaptive_weight": weight * jnp.sum(rows)}
            terms["discriminator"] = judged
        moved = steer(made.images, gradient) + rows @ made.latent + judged
        # What moves the parameters, under the value that a reader expects.
        total = moved + jax.lax.stop_gradient(value - moved)
        return (total, jnp.sum(rows)), jax.lax.stop_gradient(terms)

    def _reconstruct(self, model: Trainee, images: jax.Array, keys: jax.Array | None) -> Made:
        """`keys` draw the latents; without them they are the posterior's mode."""
        moments = model.vae.encode(images)
        latents = moments.mean if keys is None else vae.sample(moments, keys)
        features = model.vae.features(latents.astype(self.dtype))
        kl = 0.5 * jnp.sum(
            jnp.square(moments.mean) + jnp.exp(moments.logvar) - 1.0 - moments.logvar,
            axis=(1, 2, 3),
        )
        return Made(features, model.vae.decoder.conv_out(features), self.losses.kl * kl)

    def _terms(self, model: Trainee, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        """The weighted reconstruction terms of each row."""
        difference = y.astype(jnp.float32) - x.astype(jnp.float32)
        terms = {}
        if self.losses.l1:
            terms["l1"] = self.losses.l1 * jnp.mean(jnp.abs(difference), axis=(1, 2, 3))
        if self.losses.l2:
            terms["l2"] = self.losses.l2 * jnp.mean(jnp.square(difference), axis=(1, 2, 3))
        if self.losses.perceptual:
            distance = perceptual.distance(model.perceptual, x, y)
            terms["perceptual"] = self.losses.perceptual * distance
        return terms

    def _adversarial(
        self, model: Trainee, images: jax.Array, made: Made, rec: Any, rows: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array]:
        """The generator's pull, its adaptive weight, and the discriminator's own loss."""
        judge = model.discriminator
        assert judge is not None
        fixed = jax.lax.stop_gradient(judge)
        adv = pull(lambda y: -jnp.sum(rows * jnp.mean(fixed(y), axis=(1, 2))), made.images)
        last = model.vae.decoder.conv_out
        features = jax.lax.stop_gradient(made.features)
        weight = adaptive_weight(
            partial(last.convolve, features), last.kernel[...], rec, adv, jnp.sum(rows)
        )
        fake = judge(jax.lax.stop_gradient(made.images))
        return adv, weight, jnp.sum(rows * hinge(judge(images), fake))

    # ---- looking --------------------------------------------------------------------------

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        if self.eval_set is None:
            return Report({})
        data = subset(self.eval_set, self.options.eval_examples, self.cfg.seed)
        size = self.cfg.batch_size // self.cfg.micro_batches
        pack = partial(collate, size=self.eval_set.sizes[0])
        parts: list[dict[str, np.ndarray]] = []
        for batch in eval_batches(data, size, pack, local_rows(mesh, size)):
            made = self._measure(params, place_batch(batch, mesh))
            parts.append({k: np.asarray(v) for k, v in made.items()})
        whole = {k: np.concatenate([part[k] for part in parts])[: len(data)] for k in parts[0]}
        names = ("psnr", "ssim", "l1", self.measure.name)
        metrics = {name: float(np.mean(whole[name])) for name in names}
        metrics["kid-lite0"] = self.kid(whole["target"], whole["made"])
        return Report(metrics, pictures={"reconstructions": _worst_first(whole, self.measure.name)})

    @partial(jax.jit, static_argnums=0)
    def _measure(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Numbers and pictures of each row, on every process."""
        model = bind(self.template, cast(params, self.dtype))
        x = to_float(batch["pixels"])
        y = self._reconstruct(model, x.astype(self.dtype), None).images.astype(jnp.float32)
        y = jnp.clip(y, -1.0, 1.0)
        found = {
            "psnr": psnr(x, y),
            "ssim": ssim(x, y),
            "l1": jnp.mean(jnp.abs(x - y), axis=(1, 2, 3)),
            self.measure.name: perceptual.distance(model.perceptual, x, y),
            "target": batch["pixels"],
            "made": jnp.round((y + 1.0) * 127.5).astype(jnp.uint8),
        }
        return {name: constrain(value, *(None,) * value.ndim) for name, value in found.items()}

    def sample(self, params: Params) -> Look:
        return Look()  # the grid of an evaluation shows all there is

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        raise UserError(
            f"{self.cfg.model} is an autoencoder, which makes nothing of a prompt; look at"
            " samples/ of its run, or run python -m jaxft.evaluate"
        )

    # ---- shared pieces --------------------------------------------------------------------

    def _read(self, spec: str, flips: bool) -> ImageSet:
        records = open_images(spec, captions=False)
        return ImageSet(records, self.options.resolution, self.model_cfg.factor, False, flips)

    def _adversarial_start(self) -> int:
        cfg = self.cfg
        start = self._steps(self.losses.adversarial_start, "loss.adversarial_start")
        if self.losses.adversarial and start >= self._steps(cfg.total, "total") > 0:
            print(
                f"warning: loss.adversarial_start={self.losses.adversarial_start!r} is not before"
                f" the end of the run ({cfg.total}): the discriminator will never train"
            )
        return start

    def _steps(self, duration: str, key: str) -> int:
        return configs.steps(duration, self.cfg.batch_size, len(self.train_set), key)


def to_float(pixels: jax.Array) -> jax.Array:
    """uint8 as fp32 within [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def _worst_first(whole: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """target | reconstruction | difference of the images that came out worst, by distance."""
    worst = np.argsort(-whole[name])[:SHOWN]
    rows, captions = [], []
    for i in worst:
        x, y = whole["target"][i], whole["made"][i]
        difference = np.abs(x.astype(np.int16) - y).astype(np.uint8)
        rows.append([x, y, 255 - difference])
        captions.append(f"{name} {whole[name][i]:.3f}, {whole['psnr'][i]:.1f} dB")
    return grid(rows, captions, ("target", "made", "difference"), CELL)
