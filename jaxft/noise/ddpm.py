"""DDPM: the noise process of Stable Diffusion 1, 2 and XL, for epsilon and v-prediction."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.noise.samplers import SAMPLERS, Sampler
from jaxft.noise.schedule import Schedule


class Rates(NamedTuple):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of each row, shaped to multiply images."""

    signal: Float[Array, "B 1 1 1"]
    noise: Float[Array, "B 1 1 1"]


@dataclass(frozen=True)
class DDPM:
    """Noise process of Ho et al. 2020, arXiv:2006.11239. Implements `NoiseProcess`.

    Times are int timesteps from 0 (almost no noise) to train_steps - 1.
    min_snr_gamma: gamma of the row weights of Hang et al. 2023, arXiv:2303.09556. 0: all rows have
    weight 1.
    """

    schedule: Schedule
    min_snr_gamma: float = 0.0

    def draw_times(self, keys: PRNGKeyArray, size: tuple[int, ...]) -> Int[Array, "B"]:
        """Sample a timestep for each key, uniformly over all."""
        del size
        # Upper bounds of the timesteps on [0, 1). A uniform number times `steps` could be rounded
        # up to `steps`, which is no timestep.
        steps = self.schedule.train_steps
        bounds = jnp.asarray(np.arange(1, steps) / steps, jnp.float32)
        draws = jax.vmap(jax.random.uniform)(keys)  # [B]
        return jnp.searchsorted(bounds, draws, side="right").astype(jnp.int32)

    def rates(self, t: Int[Array, "B"]) -> Rates:
        """Return the factors of signal and noise at the timesteps, fp32."""
        bar = self.schedule.alphas_bar
        tables = (jnp.asarray(np.sqrt(x), jnp.float32) for x in (bar, 1.0 - bar))
        signal, noise = (table[t][:, None, None, None] for table in tables)  # [B, 1, 1, 1]
        return Rates(signal, noise)

    def add_noise(
        self, x0: Float[Array, "B Y X C"], noise: Float[Array, "B Y X C"], t: Int[Array, "B"]
    ) -> Float[Array, "B Y X C"]:
        """Return sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise: Ho et al., eq. 4."""
        at = self.rates(t)
        return at.signal * x0 + at.noise * noise

    def target(
        self, x0: Float[Array, "B Y X C"], noise: Float[Array, "B Y X C"], t: Int[Array, "B"]
    ) -> Float[Array, "B Y X C"]:
        """Return the noise, or v (Salimans & Ho 2022, arXiv:2202.00512, appendix D)."""
        if self.schedule.prediction == "epsilon":
            return noise
        at = self.rates(t)
        return at.signal * noise - at.noise * x0

    def weights(self, t: Int[Array, "B"]) -> Float[Array, "B"]:
        """Return min(snr, gamma) / snr for epsilon, and / (snr + 1) for v."""
        if not self.min_snr_gamma:
            return jnp.ones(t.shape, jnp.float32)
        snr = self.schedule.snr
        over = snr if self.schedule.prediction == "epsilon" else snr + 1.0
        return jnp.asarray(np.minimum(snr, self.min_snr_gamma) / over, jnp.float32)[t]

    def evaluation_times(self, count: int) -> Int[np.ndarray, "count"]:
        """Return the timesteps in the middle of `count` equal parts."""
        return ((np.arange(count) + 0.5) * self.schedule.train_steps / count).astype(np.int32)

    def sampler(self, name: str, steps: int, size: tuple[int, ...]) -> Sampler:
        """Return the steps of a sampler of SAMPLERS. Raises: UserError for another name."""
        del size
        if name not in SAMPLERS:
            raise UserError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
        return SAMPLERS[name](self.schedule, steps)
