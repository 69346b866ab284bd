"""Adversarial training as one function of the parameters: no second step, no second gradient."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MOST_WEIGHT = 1e4  # bound of the adaptive weight, as in taming-transformers


class Pull(NamedTuple):
    """A loss of images as sums over the batch, and its gradient with respect to the images."""

    terms: dict[str, Float[Array, ""]]
    gradient: Float[Array, "B Y X C"]

    @property
    def value(self) -> Float[Array, ""]:
        """Return the sum of the terms."""
        return sum(self.terms.values(), start=jnp.zeros(()))


def pull(loss: Callable[[Array], dict[str, Array]], images: Float[Array, "B Y X C"]) -> Pull:
    """Return the loss at fixed images and its gradient. `steer` carries the gradient back."""

    def total(y: Array) -> tuple[Array, dict[str, Array]]:
        terms = loss(y)
        return sum(terms.values(), start=jnp.zeros(())), terms

    gradient, terms = jax.grad(total, has_aux=True)(jax.lax.stop_gradient(images))
    return Pull(terms, gradient)


def steer(images: Float[Array, "B Y X C"], gradient: Float[Array, "B Y X C"]) -> Float[Array, ""]:
    """Return 0, with `gradient` as its derivative with respect to `images`.

    Several losses of the images thus need one backward pass through the autoencoder, and their
    gradients can be weighed before it.
    """
    product = jnp.sum(images.astype(jnp.float32) * jax.lax.stop_gradient(gradient))
    return product - jax.lax.stop_gradient(product)


def adaptive_weight(
    last: Callable[[Array], Array],
    kernel: Array,
    rec: Float[Array, "B Y X C"],
    adv: Float[Array, "B Y X C"],
    rows: Float[Array, ""],
) -> Float[Array, ""]:
    """Return |d rec / d kernel| / |d adv / d kernel| within [0, 1e4], as a constant.

    `last` computes the images from the last layer's `kernel`. `rec` and `adv` are the gradients of
    both losses with respect to the images, as sums over a batch. Division by `rows` gives means,
    because taming-transformers adds its 1e-4 to the norm of a mean. Source: Esser et al. 2021,
    eq. 7.
    """
    back = jax.vjp(last, jax.lax.stop_gradient(kernel))[1]
    rec_norm, adv_norm = (
        jnp.linalg.norm(back(gradient)[0].astype(jnp.float32)) / rows for gradient in (rec, adv)
    )
    return jax.lax.stop_gradient(jnp.clip(rec_norm / (adv_norm + 1e-4), 0.0, MOST_WEIGHT))


def hinge(real: Float[Array, "B Y X"], fake: Float[Array, "B Y X"]) -> Float[Array, "B"]:
    """Return the discriminator's loss of each row, half the hinge loss as in taming-transformers.

    Source: Lim & Ye 2017, arXiv:1705.02894.
    """
    terms = jnp.stack([jax.nn.relu(1.0 - real), jax.nn.relu(1.0 + fake)])  # [2, B, Y, X]
    return 0.5 * jnp.sum(jnp.mean(terms, axis=(2, 3)), axis=0)
