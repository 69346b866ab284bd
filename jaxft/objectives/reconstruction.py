"""Reconstruction: pixel, perceptual, latent and adversarial terms of an autoencoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.params import Leaf, Params, bind, describe
from jaxft.core.step import Batch, Metrics
from jaxft.models.critics import perceptual
from jaxft.models.flops import count
from jaxft.nn.pixels import to_float
from jaxft.objectives.adversarial import Pull, adaptive_weight, hinge, pull, steer


class Made(NamedTuple):
    """A reconstruction and the values that its losses need.

    features: input of the last layer. latent: losses of the latents of each row, by name and
    without weights. codes: codebook indices of a VQ tokenizer, None for a VAE.
    """

    features: Float[Array, "B Y X F"]
    images: Float[Array, "B Y X C"]
    latent: dict[str, Float[Array, "B"]]
    codes: Int[Array, "B Y2 X2"] | None


class Weights(Protocol):
    """Weights of the terms, as in the config. `latent` returns the latents' weights by name."""

    @property
    def l1(self) -> float: ...
    @property
    def l2(self) -> float: ...
    @property
    def perceptual(self) -> float: ...
    @property
    def adversarial(self) -> float: ...

    def latent(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Reconstruction:
    """Losses of an autoencoder and of its discriminator.

    reconstruct(vae, images, keys, remat): returns a `Made`. start: first step with adversarial
    terms. template: the abstract model, and side: pixels of a square image, to count FLOPs.
    """

    reconstruct: Callable[[Any, Array, PRNGKeyArray | None, str], Made]
    losses: Weights
    start: int
    dtype: Any
    template: Any
    side: int
    remat: str = "none"
    unit: ClassVar[str] = "images"
    unread: tuple[str, ...] = ()

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return len(batch["pixels"])

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        """Return FLOPs an image of the losses and their gradient, counted in the traced program.

        Scores of attention count once more than elsewhere: its backward pass computes them again.
        """
        plain = replace(self, remat="none")
        shapes = {
            k: jax.ShapeDtypeStruct(leaf.shape, self.dtype)
            for k, leaf in describe(self.template).items()
        }
        chosen = {path: shapes.pop(path) for path in trained}
        batch = {
            "pixels": jax.ShapeDtypeStruct((1, self.side, self.side, 3), np.uint8),
            "weights": jax.ShapeDtypeStruct((1,), np.float32),
        }

        def total(chosen: Params, frozen: Params, batch: Batch) -> jax.Array:
            keys = jax.random.split(jax.random.key(0), 1)
            model = bind(self.template, {**frozen, **chosen})
            return plain.loss(model, batch, keys, jnp.zeros((), jnp.int32))[0][0]

        return count(jax.grad(total), chosen, shapes, batch)

    def loss(
        self, model: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return the summed terms of a batch and its weight, with the terms as metrics.

        The gradient is that of the autoencoder's losses and of the discriminator's. Each network
        is a constant in the other's loss, so one gradient serves both. This is LlamaGen's
        alternating update, in which both losses come from one forward pass.
        """
        rows = batch["weights"]
        images = to_float(batch["pixels"]).astype(self.dtype)
        made = self.reconstruct(model.vae, images, keys, self.remat)
        rec = pull(partial(self.terms, model, rows, images), made.images)
        weights = self.losses.latent()
        latent = {k: weights[k] * rows @ v for k, v in made.latent.items() if weights[k]}
        moving = sum(latent.values(), start=jnp.zeros(()))
        value, gradient, terms = rec.value + moving, rec.gradient, {**rec.terms, **latent}
        if model.discriminator is not None:
            adv, factor, judged = self._adversarial(model, images, made, rec, rows, step)
            value, gradient = value + factor * adv.value, gradient + factor * adv.gradient
            terms |= {**adv.terms, "discriminator": judged, "factor": factor * jnp.sum(rows)}
            moving = moving + judged
        moving = moving + steer(made.images, gradient)
        # The gradient is that of `moving`, and the value that of the terms, as logs expect.
        total = moving + jax.lax.stop_gradient(value - moving)
        return (total, jnp.sum(rows)), jax.lax.stop_gradient(terms)

    def terms(
        self, model: Any, rows: jax.Array, x: jax.Array, y: jax.Array
    ) -> dict[str, jax.Array]:
        """Return the weighted reconstruction terms of a batch, as sums over its rows."""
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

    def _adversarial(
        self,
        model: Any,
        images: jax.Array,
        made: Made,
        rec: Pull,
        rows: jax.Array,
        step: jax.Array,
    ) -> tuple[Pull, jax.Array, jax.Array]:
        """Return the generator's adversarial `Pull`, its factor, and the discriminator's loss.

        The factor is adaptive. Factor and loss are 0 before `start`.
        """
        judge = model.discriminator
        assert judge is not None
        fixed = jax.lax.stop_gradient(judge)  # the generator's loss must not train the judge
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
