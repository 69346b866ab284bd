"""The protocol of a noise process, and the parts of a loss that every process shares."""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray

from jaxft.noise.samplers import Sampler


class NoiseProcess(Protocol):
    """Noise that a denoiser is trained to predict, and the samplers that remove it.

    The kind of a time t depends on the process: an int timestep in DDPM, a float sigma in flow
    matching. Training, evaluation, samplers and the denoiser use the same kind. `size` is (Y, X) of
    the latents. Some processes shift their times for larger images (SD 3, FLUX). The others ignore
    it.
    """

    def draw_times(self, keys: PRNGKeyArray, size: tuple[int, ...]) -> Num[Array, "B"]:
        """Sample a training time for each key. The time of a row depends only on its key."""
        ...

    def add_noise(
        self, x0: Float[Array, "B Y X C"], noise: Float[Array, "B Y X C"], t: Num[Array, "B"]
    ) -> Float[Array, "B Y X C"]:
        """Return the noisy latents at times t: the input of the denoiser in training."""
        ...

    def target(
        self, x0: Float[Array, "B Y X C"], noise: Float[Array, "B Y X C"], t: Num[Array, "B"]
    ) -> Float[Array, "B Y X C"]:
        """Return the values that the denoiser learns to predict."""
        ...

    def weights(self, t: Num[Array, "B"]) -> Float[Array, "B"]:
        """Return the factor of each row's squared error."""
        ...

    def evaluation_times(self, count: int) -> Num[np.ndarray, "count"]:
        """Return fixed times for validation, equally far apart."""
        ...

    def sampler(self, name: str, steps: int, size: tuple[int, ...]) -> Sampler:
        """Return the steps of a sampler. Raises: UserError for an unknown name."""
        ...


def squared_error(
    out: Float[Array, "B Y X C"],
    target: Float[Array, "B Y X C"],
    mask: Float[Array, "B Y X 1"] | None = None,
) -> Float[Array, "B"]:
    """Return the mean squared error of each row, in fp32. The caller applies row weights.

    mask: weights of the errors. Their mean is not divided out.
    """
    error = jnp.square(out.astype(jnp.float32) - target.astype(jnp.float32))
    error = error if mask is None else error * mask
    return jnp.mean(error, axis=(1, 2, 3))


def offset_noise(
    keys: PRNGKeyArray, noise: Float[Array, "B Y X C"], strength: float
) -> Float[Array, "B Y X C"]:
    """Return noise plus `strength` times one normal number for each row and channel.

    keys: one a row. Source: Guttenberg 2023, "Diffusion with Offset Noise".
    """
    channels = noise.shape[-1:]
    shift = jax.vmap(lambda key: jax.random.normal(key, channels, noise.dtype))(keys)  # [B, C]
    return noise + strength * shift[:, None, None]
