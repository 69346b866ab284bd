"""Autoencoders: reconstruction, perceptual and adversarial losses for a VAE or VQ tokenizer."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

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
from jaxft.core.sharding import constrain, local_rows, place_batch
from jaxft.core.step import Batch, Metrics, cast
from jaxft.data.images.dataset import Bad, ImageSet, collate, to_float
from jaxft.data.loader import eval_batches, subset, train_loader
from jaxft.data.sources.images import open_images
from jaxft.models.autoencoders.vqgan import codebook_usage
from jaxft.models.critics import perceptual
from jaxft.models.critics.discriminator import LEAST, PatchGAN
from jaxft.models.critics.perceptual import Opened
from jaxft.nn.conv import runner
from jaxft.objectives.adversarial import Pull, adaptive_weight, hinge, pull, steer
from jaxft.tasks import Look, Report, Request
from jaxft.tasks.autoencoder.codec import CODEBOOK, Codec, Made, open_codec, side_files
from jaxft.tasks.common.image_metrics import psnr, ssim
from jaxft.tasks.common.kid_lite0 import KidLite0
from jaxft.tasks.common.pictures import grid
from jaxft.tasks.options import AutoencoderOptions, Losses
from jaxft.weights.folders.diffusers import open_component

SHOWN = 8  # rows of a picture grid
CELL = 96  # least pixels of a cell in it


class Trainee(nnx.Module):
    """The autoencoder, the discriminator and the perceptual network: None where unused."""

    def __init__(self, codec: Codec, losses: Losses, measure: Opened | None, *, key: jax.Array):
        first, second, third = jax.random.split(key, 3)
        self.vae = codec.module(codec.cfg, key=first)
        self.discriminator = nnx.data(PatchGAN(key=second) if losses.adversarial else None)
        self.perceptual = nnx.data(measure.module(key=third) if measure else None)


class Autoencoder:
    """Fine-tuning an autoencoder, or training one from nothing; see `jaxft.tasks.Task`."""

    Options = AutoencoderOptions
    EXPORT_KINDS = ("folder", "none")
    unit = "images"

    def __init__(self, cfg: Config):
        self.cfg, self.options = cfg, AutoencoderOptions(**cfg.own)
        self.losses = self.options.loss
        self.source = open_component(cfg.model, "vae", weights=cfg.init == "pretrained")
        self.codec = open_codec(self.source.config, f"{cfg.model}/config.json")
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self.remat = runtime.resolve_remat(cfg.remat)
        self._check()
        measures = self.losses.perceptual or cfg.data.eval
        self.measure = perceptual.open_perceptual(self.options.perceptual) if measures else None
        self.template = jax.eval_shape(self.build, jax.random.key(0))
        aids = (self.measure.part()._replace(aid=True),) if self.measure else ()
        self.parts = (self.codec.part(self.source), *aids)
        self.train_set = self._read(cfg.data.train, flips=True)
        self.eval_set = self._read(cfg.data.eval, flips=False) if cfg.data.eval else None
        self.start = self._adversarial_start()
        self.kid = KidLite0()

    def build(self, key: jax.Array) -> nnx.Module:
        return Trainee(self.codec, self.losses, self.measure, key=key)

    def initial(self) -> dict[str, np.ndarray]:
        return {}

    def describe(self) -> str:
        weights = {k: v for k, v in dataclasses.asdict(self.losses).items() if isinstance(v, float)}
        for other in ("commitment", "revive") if not self.codec.codes else ("kl",):
            weights.pop(other)
        used = " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)
        measure = f" ({self.measure.name})" if self.measure else ""
        cfg, codes = self.codec.cfg, self.codec.codes
        return (
            f"{self.codec.kind} of {cfg.factor} pixels a latent, "
            + (f"{codes} codes" if codes else f"{cfg.latent_channels} channels")
            + f"; {self.cfg.data.train}: {len(self.train_set.records)} images, mirrored too;"
            f" loss {used}{measure}"
        )

    def data_report(self) -> dict[str, int]:
        return self.train_set.report

    def bad_samples(self) -> tuple[Bad, ...]:
        return self.train_set.bad + (self.eval_set.bad if self.eval_set else ())

    def n_examples(self) -> int:
        return len(self.train_set)

    def prepare(self, params: Params, trained: set[str]) -> None:
        """Nothing: every step reads the images themselves."""

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
        return side_files(self.codec, self.source, dtype, "vae." in rewritten)

    def exported(self, params: Params) -> Params:
        return self.codec.exported(params)

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
        made = self.codec.reconstruct(model.vae, images, keys, self.remat)
        rec = pull(partial(self._terms, model, rows, images), made.images)
        latent = self._latent(made, rows)
        moving = sum(latent.values(), start=jnp.zeros(()))
        value, gradient, terms = rec.value + moving, rec.gradient, {**rec.terms, **latent}
        if model.discriminator is not None:
            adv, factor, judged = self._adversarial(model, images, made, rec, rows, step)
            value, gradient = value + factor * adv.value, gradient + factor * adv.gradient
            terms |= {**adv.terms, "discriminator": judged, "factor": factor * jnp.sum(rows)}
            moving = moving + judged
        moving = moving + steer(made.images, gradient)
        # What moves the parameters, under the value that a reader expects.
        total = moving + jax.lax.stop_gradient(value - moving)
        return (total, jnp.sum(rows)), jax.lax.stop_gradient(terms)

    def _terms(
        self, model: Trainee, rows: jax.Array, x: jax.Array, y: jax.Array
    ) -> dict[str, jax.Array]:
        """The weighted reconstruction terms of a batch, as sums over its rows."""
        difference = y.astype(jnp.float32) - x.astype(jnp.float32)
        terms, over = {}, (1, 2, 3)
        if self.losses.l1:
            terms["l1"] = self.losses.l1 * rows @ jnp.mean(jnp.abs(difference), axis=over)
        if self.losses.l2:
            terms["l2"] = self.losses.l2 * rows @ jnp.mean(jnp.square(difference), axis=over)
        if self.losses.perceptual:
            assert model.perceptual is not None
            distance = perceptual.distance(model.perceptual, x, y)
            terms["perceptual"] = self.losses.perceptual * rows @ distance
        return terms

    def _latent(self, made: Made, rows: jax.Array) -> dict[str, jax.Array]:
        """The weighted terms of the latents, likewise; what weighs nothing is never computed."""
        weights = self.losses.latent()
        return {k: weights[k] * rows @ v for k, v in made.latent.items() if weights[k]}

    def _adversarial(
        self,
        model: Trainee,
        images: jax.Array,
        made: Made,
        rec: Pull,
        rows: jax.Array,
        step: jax.Array,
    ) -> tuple[Pull, jax.Array, jax.Array]:
        """The generator's pull, its factor (adaptive, 0 at first), the discriminator's own loss."""
        judge = model.discriminator
        assert judge is not None
        fixed = jax.lax.stop_gradient(judge)
        adv = pull(
            lambda y: {"adversarial": -jnp.sum(rows * jnp.mean(fixed(y), axis=(1, 2)))}, made.images
        )
        last = model.vae.decoder.conv_out
        make = partial(last.convolve, jax.lax.stop_gradient(made.features))
        weight = adaptive_weight(make, last.kernel[...], rec.gradient, adv.gradient, jnp.sum(rows))
        active = (step >= self.start).astype(jnp.float32)
        fake = judge(jax.lax.stop_gradient(made.images))
        judged = active * jnp.sum(rows * hinge(judge(images), fake))
        return adv, active * self.losses.adversarial * weight, judged

    # ---- looking --------------------------------------------------------------------------

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        if self.eval_set is None or self.measure is None:
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
        if self.codec.codes:
            metrics |= self._usage(whole["codes"])
        return Report(metrics, pictures={"reconstructions": _worst_first(whole, self.measure.name)})

    def _usage(self, codes: np.ndarray) -> dict[str, float]:
        """How much of the codebook the images use; says it where part of it is dead."""
        counts = np.bincount(codes.ravel(), minlength=self.codec.codes)
        usage = codebook_usage(jnp.asarray(counts))
        dead = int(np.sum(counts == 0))
        if dead and jax.process_index() == 0:
            asked = "" if self.losses.revive else "; loss.revive=1.0 pulls them back in training"
            print(
                f"{dead} of {self.codec.codes} codes are dead: none of {codes.size} latents of"
                f" {len(codes)} images chose them{asked}",
                flush=True,
            )
        return {
            "codebook_used": float(usage.used),
            "codebook_perplexity": float(usage.perplexity),
            "dead_codes": float(dead),
        }

    @partial(jax.jit, static_argnums=0)
    def _measure(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Numbers and pictures of each row, on every process."""
        assert self.measure is not None
        exact = {path: x for path, x in params.items() if path.startswith("perceptual.")}
        model = bind(self.template, cast(params, self.dtype) | exact)
        x = to_float(batch["pixels"])
        made = self.codec.reconstruct(model.vae, x.astype(self.dtype), None, "none")
        y = jnp.clip(made.images.astype(jnp.float32), -1.0, 1.0)
        found = {
            "psnr": psnr(x, y),
            "ssim": ssim(x, y),
            "l1": jnp.mean(jnp.abs(x - y), axis=(1, 2, 3)),
            self.measure.name: perceptual.distance(model.perceptual, x, y),
            "target": batch["pixels"],
            "made": jnp.round((y + 1.0) * 127.5).astype(jnp.uint8),
        }
        if made.codes is not None:
            found["codes"] = made.codes
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
        return ImageSet(records, self.options.resolution, self.codec.cfg.factor, False, flips)

    def _check(self) -> None:
        """Refuse what could not do as it is asked to."""
        runner(self.remat)
        losses, trainable = self.losses, self.cfg.trainable or ".*"
        if self.cfg.lora.rank:
            raise UserError(
                f"lora.rank={self.cfg.lora.rank}, but an autoencoder takes no adapters; set"
                " lora.rank=0 and name what trains in trainable"
            )
        if not (losses.l1 or losses.l2 or losses.perceptual):
            raise UserError(
                "loss.l1=0.0, loss.l2=0.0 and loss.perceptual=0.0 leave no image to aim at; set one"
            )
        if losses.adversarial and self.options.resolution < LEAST:
            raise UserError(
                f"resolution={self.options.resolution} is too small for the discriminator, which"
                f" judges at least {LEAST} pixels a side; raise it or set loss.adversarial=0.0"
            )
        if losses.adversarial and not re.fullmatch(trainable, "discriminator.conv_out.kernel"):
            raise UserError(
                f"loss.adversarial={losses.adversarial:g} needs a discriminator that trains, but"
                rf" trainable={trainable!r} leaves it out; add |discriminator\..*"
            )
        if losses.revive and not (self.codec.codes and re.fullmatch(trainable, CODEBOOK)):
            raise UserError(
                f"loss.revive={losses.revive:g} needs a codebook that trains, but"
                + (
                    f" trainable={trainable!r} leaves out {CODEBOOK}; "
                    if self.codec.codes
                    else f" {self.cfg.model} has none; "
                )
                + "set loss.revive=0.0"
            )

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
