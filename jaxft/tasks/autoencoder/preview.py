"""Evaluation of an autoencoder: PSNR, SSIM, perceptual distance, codebook use."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.core.errors import UserError
from jaxft.core.params import Params, bind
from jaxft.core.sharding import constrain, local_rows, place_batch
from jaxft.core.step import Batch, cast
from jaxft.data.images.dataset import collate
from jaxft.data.loader import eval_batches, subset
from jaxft.models.autoencoders.vqgan import codebook_usage
from jaxft.models.critics import perceptual
from jaxft.nn.pixels import to_float, to_pixels
from jaxft.tasks import NOW, Data, Look, Report, Request, Sheet, Unread
from jaxft.tasks.autoencoder.opened import OpenedAutoencoder
from jaxft.tasks.common.image_metrics import psnr, ssim
from jaxft.tasks.common.kid_lite0 import KidLite0
from jaxft.tasks.common.sheets import SHOWN


class AutoencoderPreview:
    """Evaluation and samples of an autoencoder. Implements `jaxft.tasks.Preview`."""

    unread = Unread()

    def __init__(self, opened: OpenedAutoencoder, data: Data):
        self.opened, self.rows = opened, data.held_out
        self.kid = KidLite0() if self.rows else None
        self._worst = np.zeros(0, int)  # indices of the images on the sheet

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        if self.rows is None or self.kid is None or self.opened.measure is None:
            return Report({})
        data = subset(self.rows.images, self.opened.options.eval_examples, self.opened.cfg.seed)
        size = self.opened.cfg.batch_size // self.opened.cfg.micro_batches
        pack = partial(collate, size=self.rows.images.sizes[0])
        parts: list[dict[str, np.ndarray]] = []
        for batch in eval_batches(data, size, pack, local_rows(mesh, size)):
            made = self._measure(params, place_batch(batch, mesh))
            parts.append({k: np.asarray(v) for k, v in made.items()})
        whole = {k: np.concatenate([part[k] for part in parts])[: len(data)] for k in parts[0]}
        names = ("psnr", "ssim", "l1", self.opened.measure.name)
        metrics = {name: float(np.mean(whole[name])) for name in names}
        metrics["kid-lite0"] = self.kid(whole["target"], whole["made"])
        if self.opened.codec.codes:
            metrics |= self._usage(whole["codes"])
        sheet = self._worst_first(whole, self.opened.measure.name)
        return Report(metrics, sheets={"reconstructions": sheet})

    def _worst_first(self, whole: Mapping[str, np.ndarray], name: str) -> Sheet:
        """Return the images that had the largest distance in the first evaluation."""
        if not len(self._worst):
            self._worst = np.argsort(-whole[name])[:SHOWN]
        shown = {key: value[self._worst] for key, value in whole.items()}
        difference = np.abs(shown["target"].astype(np.int16) - shown["made"]).astype(np.uint8)
        measures = zip(shown[name], shown["psnr"], strict=True)
        captions = tuple(f"{name} {far:.3f}, {near:.1f} dB" for far, near in measures)
        columns = {"target": shown["target"], NOW: shown["made"], "difference": 255 - difference}
        return Sheet(captions, columns)

    def _usage(self, codes: np.ndarray) -> dict[str, float]:
        """Return codebook usage over the images. Prints a line if some codes are dead."""
        counts = np.bincount(codes.ravel(), minlength=self.opened.codec.codes)
        usage = codebook_usage(jnp.asarray(counts))
        dead = int(np.sum(counts == 0))
        if dead and jax.process_index() == 0:
            asked = (
                "" if self.opened.losses.revive else "; loss.revive=1.0 pulls them back in training"
            )
            print(
                f"{dead} of {self.opened.codec.codes} codes are dead: none of {codes.size} latents"
                f" of {len(codes)} images chose them{asked}",
                flush=True,
            )
        return {
            "codebook_used": float(usage.used),
            "codebook_perplexity": float(usage.perplexity),
            "dead_codes": float(dead),
        }

    @partial(jax.jit, static_argnums=0)
    def _measure(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Return metrics and pictures of each row, the same on every process."""
        assert self.opened.measure is not None
        exact = {path: x for path, x in params.items() if path.startswith("perceptual.")}
        model = bind(self.opened.template, cast(params, self.opened.dtype) | exact)
        x = to_float(batch["pixels"])
        made = self.opened.codec.reconstruct(model.vae, x.astype(self.opened.dtype), None, "none")
        y = jnp.clip(made.images.astype(jnp.float32), -1.0, 1.0)
        found = {
            "psnr": psnr(x, y),
            "ssim": ssim(x, y),
            "l1": jnp.mean(jnp.abs(x - y), axis=(1, 2, 3)),
            self.opened.measure.name: perceptual.distance(model.perceptual, x, y),
            "target": batch["pixels"],
            "made": to_pixels(y),
        }
        if made.codes is not None:
            found["codes"] = made.codes
        return {name: constrain(value, *(None,) * value.ndim) for name, value in found.items()}

    def sample(self, params: Params) -> Look:
        return Look()  # an evaluation already shows its sheet

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        raise UserError(
            f"{self.opened.cfg.model} is an autoencoder, which takes no prompt; look at"
            " samples/ of its run, or run python -m jaxft.evaluate"
        )
