"""Samplers: DDIM, Euler and DPM-Solver++ as tables of coefficients for one `lax.scan`.

The tables are computed in fp64 on the host, with diffusers' rounding and final values.
"""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.errors import UserError
from jaxft.noise.schedule import FILE, Schedule

TINY = 2.0**-24  # diffusers' last alpha_bar instead of 0, so that its sigma is finite


class Step(NamedTuple):
    """Coefficients of one sampler step, or of all of them [steps].

    Every sampler is linear in the latents x, the model's output and the last two estimates of x0:

        out = model(model_x x, timestep)
        x0  = x0_x x + x0_out out, clipped
        x  <- x_x x + x_out out + x_x0 x0 + x_before x0_of_the_step_before
    """

    timestep: Any
    model_x: Any
    x0_x: Any
    x0_out: Any
    x_x: Any
    x_out: Any
    x_x0: Any
    x_before: Any


class Sampler(NamedTuple):
    """Table of steps (fp32), the factor of the initial unit noise, the bound on x0 (often inf)."""

    steps: Step
    start: Any
    clip: Any


def take_step(
    step: Step, clip: Array, x: Array, out: Array, before: Array
) -> tuple[Float[Array, "B Y X C"], Float[Array, "B Y X C"]]:
    """Return the next x, and this step's estimate of x0, which is `before` in the next step."""
    x0 = jnp.clip(step.x0_x * x + step.x0_out * out, -clip, clip)
    return step.x_x * x + step.x_out * out + step.x_x0 * x0 + step.x_before * before, x0


def denoise(
    model: Callable[[Array, Array], Array], noise: Float[Array, "B Y X C"], sampler: Sampler
) -> Float[Array, "B Y X C"]:
    """Return latents sampled from unit noise.

    model: a function of latents [B, Y, X, C] and a time, a fp32 scalar of the noise process. It
    returns its prediction, in the shape of the latents.
    """
    x = sampler.start * noise.astype(jnp.float32)

    def body(carry: tuple[Array, Array], step: Step) -> tuple[tuple[Array, Array], None]:
        x, before = carry
        out = model(step.model_x * x, step.timestep).astype(jnp.float32)
        return take_step(step, sampler.clip, x, out, before), None

    (x, _), _ = jax.lax.scan(body, (x, jnp.zeros_like(x)), sampler.steps)
    return x


def guide(
    uncond: Float[Array, "B Y X C"],
    cond: Float[Array, "B Y X C"],
    guidance: float | Array,
    rescale: float | Array = 0.0,
) -> Float[Array, "B Y X C"]:
    """Return the output of classifier-free guidance.

    guidance: 1 is the conditional output alone. rescale: in [0, 1], the share of the guided output
    that is scaled to the standard deviation of cond, against too much contrast.
    Sources: Ho & Salimans 2022, arXiv:2207.12598, and for rescale Lin et al. 2023,
    arXiv:2305.08891, section 3.4.
    """
    uncond, cond = uncond.astype(jnp.float32), cond.astype(jnp.float32)
    return _rescaled(uncond + guidance * (cond - uncond), cond, rescale)


def guide_edit(
    uncond: Float[Array, "B Y X C"],
    image: Float[Array, "B Y X C"],
    cond: Float[Array, "B Y X C"],
    guidance: float | Array,
    image_guidance: float | Array,
    rescale: float | Array = 0.0,
) -> Float[Array, "B Y X C"]:
    """Return the output of guidance by a source picture and by the text.

    uncond, image, cond: outputs without conditioning, with the picture alone, and with both.
    rescale: as in `guide`.
    Source: InstructPix2Pix (Brooks et al. 2022, arXiv:2211.09800), eq. 3.
    """
    uncond, image, cond = (x.astype(jnp.float32) for x in (uncond, image, cond))
    guided = uncond + image_guidance * (image - uncond) + guidance * (cond - image)
    return _rescaled(guided, cond, rescale)


def _rescaled(guided: Array, cond: Array, rescale: float | Array) -> Array:
    # Without the bound, outputs of zero spread (an untrained model) would give 0 / 0.
    spread = jnp.maximum(jnp.std(guided, axis=(1, 2, 3), keepdims=True), 1e-12)
    ratio = jnp.std(cond, axis=(1, 2, 3), keepdims=True) / spread  # [B, 1, 1, 1]
    return guided * (rescale * ratio + (1.0 - rescale))


def ddim(schedule: Schedule, steps: int) -> Sampler:
    """Return deterministic DDIM.

    Source: Song et al. 2020, arXiv:2010.02502, eq. 12 with sigma = 0.
    """
    times = _times(schedule, steps, schedule.spacing or "leading", extra=0)
    t = times.round().astype(int)
    # As in diffusers, a step goes back by a fixed number of timesteps, whatever the spacing is.
    before, bar = t - schedule.train_steps // steps, schedule.alphas_bar
    last = 1.0 if schedule.set_alpha_to_one else bar[0]
    next_bar = np.where(before >= 0, bar[before.clip(0)], last)
    a, s = np.sqrt(bar[t]), np.sqrt(1.0 - bar[t])
    next_a, next_s = np.sqrt(next_bar), np.sqrt(1.0 - next_bar)
    zero, one = np.zeros(steps), np.ones(steps)
    if schedule.prediction == "epsilon":
        table = Step(t, one, 1.0 / a, -s / a, zero, next_s, next_a, zero)
    else:
        table = Step(t, one, a, -s, next_s * s, next_s * a, next_a, zero)
    return _sampler(table, 1.0, schedule.clip)


def euler(schedule: Schedule, steps: int) -> Sampler:
    """Return Euler's method on x0 + sigma noise.

    Source: Karras et al. 2022, arXiv:2206.00364, Algorithm 1.
    """
    spacing = schedule.spacing or "linspace"
    times = _times(schedule, steps, spacing, extra=0)
    sigma = _sigmas(schedule, times)
    now, ratio = sigma[:-1], sigma[1:] / sigma[:-1]  # [steps]
    # The model gets x0 + sigma noise divided by `length`, as in training: DDPM's latents.
    length = np.sqrt(now**2 + 1.0)
    x0_x, x0_out = _x0_of_sigma_space(schedule, now)
    zero = np.zeros(steps)
    table = Step(times, 1.0 / length, x0_x, x0_out, ratio, zero, 1.0 - ratio, zero)
    start = now.max() if spacing in ("linspace", "trailing") else np.sqrt(now.max() ** 2 + 1.0)
    return _sampler(table, start, inf)


def dpm_solver(schedule: Schedule, steps: int) -> Sampler:
    """Return DPM-Solver++(2M), midpoint.

    Source: Lu et al. 2022, arXiv:2211.01095, Algorithm 2.
    """
    times = _times(schedule, steps, schedule.spacing or "linspace", extra=1).round()
    sigma = _sigmas(schedule, times)
    now, ratio = sigma[:-1], sigma[1:] / sigma[:-1]
    a, next_a = 1.0 / np.sqrt(now**2 + 1.0), 1.0 / np.sqrt(sigma[1:] ** 2 + 1.0)
    x0_x, x0_out = _x0_of_sigma_space(schedule, now)
    second = np.zeros(steps)  # h / (2 h_before), with h = log(sigma / next sigma)
    second[1:-1] = np.log(ratio[1:-1]) / np.log(ratio[:-2]) / 2.0
    # The first step has no step before it. The last is of first order in these cases.
    first_order_end = schedule.euler_at_final or schedule.final_sigma == "zero"
    if not (first_order_end or (schedule.lower_order_final and steps < 15)) and steps > 1:
        second[-1] = np.log(ratio[-1]) / np.log(ratio[-2]) / 2.0
    size = next_a * (1.0 - ratio)
    table = Step(
        timestep=times,
        model_x=np.ones(steps),
        x0_x=x0_x / a,
        x0_out=x0_out,
        x_x=ratio * next_a / a,
        x_out=np.zeros(steps),
        x_x0=size * (1.0 + second),
        x_before=-size * second,
    )
    return _sampler(table, 1.0, inf)


SAMPLERS = {"ddim": ddim, "euler": euler, "dpm++": dpm_solver}


def _sampler(table: Step, start: float, clip: float) -> Sampler:
    arrays = Step(*(jnp.asarray(column, jnp.float32) for column in table))
    return Sampler(arrays, jnp.float32(start), jnp.float32(clip))


def _times(schedule: Schedule, steps: int, spacing: str, extra: int) -> np.ndarray:
    """Return the timesteps of a sampler, descending, with diffusers' rounding.

    extra: 1 for DPM++, which spaces "leading" and "linspace" for one step more, and then leaves out
    the last timestep.
    Raises: UserError for more steps than training had.
    Source: Lin et al. 2023, arXiv:2305.08891, table 2.
    """
    count = schedule.train_steps
    if not 1 <= steps <= count:
        raise UserError(f"sample.steps={steps} is not between 1 and {count}, the training's steps")
    if spacing == "linspace":
        times = np.linspace(0, count - 1, steps + extra)[::-1]
    elif spacing == "leading":
        times = np.arange(steps + extra)[::-1] * (count // (steps + extra)) + schedule.steps_offset
    else:
        times = np.round(np.arange(count, 0, -count / steps)) - 1
    times = times[:steps].astype(np.float64)
    if times[0] >= count:
        raise UserError(
            f"sample.steps={steps} with steps_offset={schedule.steps_offset} asks for timestep"
            f" {times[0]:.0f}, but training had {count}; take fewer steps"
        )
    return times


def _sigmas(schedule: Schedule, times: np.ndarray) -> np.ndarray:
    """Return the ratio of noise to signal at each time and after the last step, fp64 [steps + 1].

    Raises: UserError for a schedule that Euler and DPM++ do not support.
    """
    if schedule.bent:
        raise UserError(
            f"{FILE}: {', '.join(schedule.bent)} is not supported by this sampler;"
            " take sample.sampler=ddim, which has no such setting"
        )
    bar = np.maximum(schedule.alphas_bar, TINY if schedule.zero_snr else 0.0)  # [train_steps]
    sigmas = np.sqrt((1.0 - bar) / bar)
    last = 0.0 if schedule.final_sigma == "zero" else sigmas[0]
    return np.append(np.interp(times, np.arange(len(sigmas)), sigmas), last)


def _x0_of_sigma_space(schedule: Schedule, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors [steps] of x and of the model's output in x0, for x = x0 + sigma noise."""
    if schedule.prediction == "epsilon":
        return np.ones_like(sigma), -sigma
    return 1.0 / (sigma**2 + 1.0), -sigma / np.sqrt(sigma**2 + 1.0)
