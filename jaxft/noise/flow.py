"""Flow matching: the noise process of Stable Diffusion 3 and FLUX.1, with Euler and DPM++ tables.

All tables are computed in fp64 on the host and used as fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.noise.samplers import Sampler, Step
from jaxft.noise.schedule import FILE
from jaxft.weights.fields import fields

CLASS = "FlowMatchEulerDiscreteScheduler"
# Defaults of diffusers' class for keys that a scheduler_config.json lacks.
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}
NULLS = {"use_dynamic_shifting": False, "shift_terminal": None}
OFF = (
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)
FLOW_SAMPLERS = ("euler", "dpm++")
# Steps by which training draws sigmas of FLUX.2: those of pictures of the base model.
USUAL_STEPS = 50
FLUX2_MOST_TOKENS = 4300  # of images whose shift depends on the steps


@dataclass(frozen=True)
class FlowSchedule:
    """Settings of a scheduler_config.json of FlowMatchEulerDiscreteScheduler.

    shift: s of sigma = s t / (1 + (s - 1) t). 0 stands for a shift e^mu by the number of image
    tokens: mu is linear in it, through the points (tokens, mu) `low` and `high`. `linear` is mu in
    the place of e^mu. by_steps: mu is that of FLUX.2, by the tokens and a sampler's steps.
    terminal: the last sigma of a sampler before 0, or 0 for that of its table.
    """

    train_steps: int = 1000
    shift: float = 1.0
    low: tuple[float, float] = (256, 0.5)
    high: tuple[float, float] = (4096, 1.15)
    linear: bool = False
    by_steps: bool = False
    terminal: float = 0.0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> "FlowSchedule":
        """Read a scheduler_config.json. Raises UserError for settings that are not supported."""
        name = config.get("_class_name", CLASS)
        if name != CLASS:
            raise UserError(
                f"{where}: {name} does not go with a flow matching model; expected {CLASS}, as in"
                " the original folder"
            )
        get = fields(config, DEFAULTS, NULLS, where, {"shift_terminal": (0.1,)})
        if on := [key for key in OFF if config.get(key)]:
            raise UserError(f"{where}: {on[0]}={config[on[0]]!r} is not supported; set it to false")
        if get["time_shift_type"] not in ("exponential", "linear"):
            raise UserError(
                f"{where}: time_shift_type={get['time_shift_type']!r} is not supported; it can be"
                " exponential or linear"
            )
        return cls(
            train_steps=get["num_train_timesteps"],
            shift=0.0 if get["use_dynamic_shifting"] else get["shift"],
            low=(get["base_image_seq_len"], get["base_shift"]),
            high=(get["max_image_seq_len"], get["max_shift"]),
            linear=get["time_shift_type"] == "linear",
            terminal=get["shift_terminal"] or 0.0,
        )

    def shift_for(self, tokens: int, steps: int = USUAL_STEPS) -> float:
        """Return the shift s for an image of so many tokens, and a sampler of so many steps."""
        if self.shift:
            return self.shift
        (x0, y0), (x1, y1) = self.low, self.high
        mu = (y1 - y0) / (x1 - x0) * tokens + (y0 - (y1 - y0) / (x1 - x0) * x0)
        mu = flux2_mu(tokens, steps) if self.by_steps else mu
        return mu if self.linear else exp(mu)


def flux2_mu(tokens: int, steps: int) -> float:
    """Return mu of FLUX.2, linear in the tokens, and in the steps for images of few tokens.

    Source: black-forest-labs/flux2, src/flux2/sampling.py, compute_empirical_mu.
    """
    many = 0.00016927 * tokens + 0.45666666  # at 200 steps
    if tokens > FLUX2_MOST_TOKENS:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333  # at 10 steps
    slope = (many - few) / 190
    return slope * steps + many - 200 * slope


def shifted(t: Any, shift: float) -> Any:
    """Return sigma = s t / (1 + (s - 1) t). Source: Esser et al. 2024, arXiv:2403.03206, eq. 23."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow of Esser et al. 2024, arXiv:2403.03206. Implements `NoiseProcess`.

    Times are sigmas in (0, 1), the share of noise: z = (1 - sigma) x0 + sigma noise. Training draws
    shift(sigmoid(n)) for a normal n, with the model's own shift, which diffusers' trainers have in
    their table of sigmas. patch: the side of a token in latents. even: before the shift, the sigmas
    of N steps of Euler's method are 1 ... 1 / N, as in FLUX's pipeline. Otherwise their ends are
    those of the training table, as in that of SD 3.
    """

    schedule: FlowSchedule
    patch: int = 2
    even: bool = False

    def _tokens(self, size: tuple[int, ...]) -> int:
        return (size[0] // self.patch) * (size[1] // self.patch)

    def draw_times(self, keys: PRNGKeyArray, size: tuple[int, ...]) -> Float[Array, "B"]:
        """Sample a sigma for each key: the shifted logit-normal density."""
        draws = jax.vmap(jax.random.normal)(keys)  # [B]
        return shifted(jax.nn.sigmoid(draws), self.schedule.shift_for(self._tokens(size)))

    def add_noise(
        self, x0: Float[Array, "B Y X C"], noise: Float[Array, "B Y X C"], t: Float[Array, "B"]
    ) -> Float[Array, "B Y X C"]:
        """Return (1 - sigma) x0 + sigma noise."""
        sigma = t[:, None, None, None]
        return (1.0 - sigma) * x0 + sigma * noise

    def target(
        self, x0: Float[Array, "B Y X C"], noise: Float[Array, "B Y X C"], t: Float[Array, "B"]
    ) -> Float[Array, "B Y X C"]:
        """Return the velocity noise - x0."""
        del t
        return noise - x0

    def weights(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        return jnp.ones(t.shape, jnp.float32)

    def evaluation_times(self, count: int) -> Float[np.ndarray, "count"]:
        """Return the sigmas in the middle of `count` equal parts."""
        return ((np.arange(count) + 0.5) / count).astype(np.float32)

    def sampler(self, name: str, steps: int, size: tuple[int, ...]) -> Sampler:
        """Return the steps of a sampler of FLOW_SAMPLERS. Raises: UserError for another name."""
        if name not in FLOW_SAMPLERS:
            raise UserError(
                f"sampler {name!r} is not one of those of flow matching: {', '.join(FLOW_SAMPLERS)}"
            )
        if not 1 <= steps <= self.schedule.train_steps:
            raise UserError(
                f"sample.steps={steps} is not between 1 and {self.schedule.train_steps}, the"
                " training's steps"
            )
        shift = self.schedule.shift_for(self._tokens(size), steps)
        if name == "euler":
            columns = _euler(self.schedule, shift, self._unshifted(steps))
        else:
            columns = _dpm_solver(self.schedule, shift, steps)
        arrays = Step(*(jnp.asarray(column, jnp.float32) for column in columns))
        return Sampler(arrays, jnp.float32(1.0), jnp.float32(inf))

    def _unshifted(self, steps: int) -> Float[np.ndarray, "steps"]:
        """Return the sigmas that diffusers' pipeline passes to its scheduler, which shifts them.

        A static shift is in SD 3's already, which are shifted twice.
        """
        if self.even:
            return np.linspace(1.0, 1.0 / steps, steps)
        ends = np.array([1.0, 1.0 / self.schedule.train_steps])
        first, last = shifted(ends, self.schedule.shift) if self.schedule.shift else ends
        return np.linspace(first, last, steps)


def check_snr(min_snr_gamma: float) -> None:
    """Raise UserError for weights by SNR, which are those of DDPM noise."""
    if min_snr_gamma:
        raise UserError(
            f"min_snr_gamma={min_snr_gamma} weights the rows of DDPM noise, but this model is"
            " trained by flow matching; set it to 0"
        )


def _euler(schedule: FlowSchedule, shift: float, unshifted: Float[np.ndarray, "steps"]) -> Step:
    """Return Euler's method on sigmas, which are shifted first."""
    steps, sigma = len(unshifted), shifted(unshifted, shift)
    if schedule.terminal:
        sigma = 1.0 - (1.0 - sigma) * (1.0 - schedule.terminal) / (1.0 - sigma[-1])
    zero, one = np.zeros(steps), np.ones(steps)
    return Step(sigma, one, one, -sigma, one, np.append(sigma[1:], 0.0) - sigma, zero, zero)


def _dpm_solver(schedule: FlowSchedule, shift: float, steps: int) -> Step:
    """Return DPM-Solver++(2M), midpoint, with diffusers' `use_flow_sigmas`.

    Source: Lu et al. 2022, arXiv:2211.01095, Algorithm 2, with alpha = 1 - sigma.
    """
    last = 1.0 - 1.0 / schedule.train_steps
    sigma = np.append(shifted(np.linspace(last, 0.0, steps + 1)[:-1], shift), 0.0)
    now, after = sigma[:-1], sigma[1:]
    size = (1.0 - after) - (1.0 - now) * after / now  # alpha (1 - e^-h)
    second = np.zeros(steps)  # h / (2 h_before), the first and last step are of first order
    h = np.diff(np.log1p(-sigma[:-1]) - np.log(sigma[:-1]))  # [steps - 1]
    second[1:-1] = h[1:] / h[:-1] / 2.0
    zero, one = np.zeros(steps), np.ones(steps)
    return Step(now, one, one, -now, after / now, zero, size * (1 + second), -size * second)
