"""Noise: the schedule that a folder names, the DDPM algebra of training, timestep embeddings.

Everything of a schedule is computed in fp64 on the host and used as fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf, log
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.weights.fields import fields

FILE = "scheduler_config.json"

# Defaults of diffusers' scheduler classes for keys that a scheduler_config.json lacks.
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": None,  # depends on the sampler
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "euler_at_final": False,
}
# Other defaults of single classes, as far as training reads them.
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "HeunDiscreteScheduler": _NARROW,
    "KDPM2DiscreteScheduler": _NARROW,
    "KDPM2AncestralDiscreteScheduler": _NARROW,
    "LCMScheduler": {**_NARROW, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_NARROW, "beta_schedule": "scaled_linear"},
}
# Classes without the betas of DDPM, by the beginning of their names, and models that have them.
OTHER_NOISE = {
    "FlowMatch": "flow matching, as in SD 3 and FLUX",
    "EDM": "EDM, as in playground-v2.5 and CosXL",
    "CMStochastic": "a consistency model",
    "ScoreSde": "a score SDE",
    "VQDiffusion": "discrete noise",
}
# JSON null where diffusers' classes can compute with None although the default is another value.
NULLS: dict[str, Any] = dict.fromkeys(
    (
        "rescale_betas_zero_snr",
        "set_alpha_to_one",
        "clip_sample",
        "lower_order_final",
        "euler_at_final",
    ),
    False,
)
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": (None, "leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "thresholding": (False, None),
}
# Euler and DPM++ refuse other values of these; bh1, bh2 and logrho are midpoint to diffusers too.
PLAIN = {
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete", None),
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_type": ("midpoint", "bh1", "bh2", "logrho"),
    "solver_order": (2,),
}
# What a folder has to say after training with zero terminal SNR (Lin et al. 2023, 2305.08891).
ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}


@dataclass(frozen=True)
class Schedule:
    """What a folder's scheduler_config.json says, whatever scheduler class it names.

    Training always uses the DDPM algebra (Ho et al. 2020, arXiv:2006.11239) of these betas.
    """

    train_steps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: tuple[float, ...] | None
    prediction: str
    zero_snr: bool
    spacing: str | None
    steps_offset: int
    set_alpha_to_one: bool
    clip: float
    final_sigma: str
    lower_order_final: bool
    euler_at_final: bool
    bent: tuple[str, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> "Schedule":
        """Read a scheduler_config.json; UserError where it asks for what is not supported.

        Absent keys take the defaults of the class that the file names. A null is read as diffusers
        reads None.
        """
        name = str(config.get("_class_name", ""))
        if kind := next((OTHER_NOISE[one] for one in OTHER_NOISE if name.startswith(one)), None):
            raise UserError(
                f"{where}: {name} has no DDPM betas (its noise is {kind}), and jaxft trains DDPM"
                " noise only; give a Stable Diffusion 1.x, 2.x or XL folder"
            )
        get = _read(config, name, where)
        if get["rescale_betas_zero_snr"] and get["prediction_type"] == "epsilon":
            raise UserError(
                f"{where}: rescale_betas_zero_snr with prediction_type=epsilon cannot work (nothing"
                " is left to predict x0 from at SNR 0); set prediction_type to v_prediction"
            )
        betas = get["trained_betas"]
        wanted = {key: config[key] for key in PLAIN if key in config}
        return cls(
            train_steps=get["num_train_timesteps"] if betas is None else len(betas),
            beta_start=get["beta_start"],
            beta_end=get["beta_end"],
            beta_schedule=get["beta_schedule"],
            trained_betas=None if betas is None else tuple(betas),
            prediction=get["prediction_type"],
            zero_snr=bool(get["rescale_betas_zero_snr"]),
            spacing=get["timestep_spacing"],
            steps_offset=get["steps_offset"],
            set_alpha_to_one=get["set_alpha_to_one"],
            clip=get["clip_sample_range"] if get["clip_sample"] else inf,
            final_sigma=get["final_sigmas_type"],
            lower_order_final=get["lower_order_final"],
            euler_at_final=get["euler_at_final"],
            bent=tuple(f"{key}={v!r}" for key, v in wanted.items() if v not in PLAIN[key]),
        )

    @cached_property
    def alphas_bar(self) -> np.ndarray:
        """Signal variance kept at each timestep, (train_steps,) fp64; the last is 0 with zero SNR.

        "linear" is linear in beta, "scaled_linear" in sqrt(beta) (what CompVis calls linear).
        """
        if self.trained_betas is not None:
            betas = np.array(self.trained_betas, np.float64)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.train_steps)
        else:
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps) ** 2
        bar = np.cumprod(1.0 - betas)
        return zero_terminal_snr(bar) if self.zero_snr else bar

    @property
    def snr(self) -> np.ndarray:
        """Signal to noise ratio alpha_bar / (1 - alpha_bar) at each timestep, fp64."""
        return self.alphas_bar / (1.0 - self.alphas_bar)


def _read(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return the value of each of DEFAULTS; UserError for one that is none of its CHOICES."""
    defaults = {**DEFAULTS, **CLASS_DEFAULTS.get(name, {})}
    given = config.get("trained_betas") is not None
    unused = ("beta_start", "beta_end", "beta_schedule") if given else ()
    unused += () if config.get("clip_sample", True) else ("clip_sample_range",)
    nulls = {**NULLS, **{key: defaults[key] for key in unused}}
    get = fields(config, defaults, nulls, where)
    for key, allowed in CHOICES.items():
        value = get.get(key, config.get(key, False))
        if value in allowed and (value is not None or key not in config or key == "thresholding"):
            continue
        if key in unused:
            continue
        named = ", ".join(str(one) for one in allowed if one is not None)
        raise UserError(f"{where}: {key}={value!r} is not supported; it can be {named}")
    return get


def zero_terminal_snr(alphas_bar: np.ndarray) -> np.ndarray:
    """Shift sqrt(alpha_bar) so that the last is 0, keep the first: Lin et al., Algorithm 1."""
    root = np.sqrt(alphas_bar)
    return np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))


class Rates(NamedTuple):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of each row, shaped to multiply images."""

    signal: Float[Array, "B 1 1 1"]
    noise: Float[Array, "B 1 1 1"]


def rates(schedule: Schedule, t: Int[Array, "B"]) -> Rates:
    """How much signal and how much noise the timesteps mean, fp32."""
    bar = schedule.alphas_bar
    tables = (jnp.asarray(np.sqrt(x), jnp.float32) for x in (bar, 1.0 - bar))
    signal, noise = (table[t][:, None, None, None] for table in tables)
    return Rates(signal, noise)


def add_noise(
    schedule: Schedule,
    x0: Float[Array, "B Y X C"],
    noise: Float[Array, "B Y X C"],
    t: Int[Array, "B"],
) -> Float[Array, "B Y X C"]:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise: Ho et al., eq. 4."""
    at = rates(schedule, t)
    return at.signal * x0 + at.noise * noise


def target(
    schedule: Schedule,
    x0: Float[Array, "B Y X C"],
    noise: Float[Array, "B Y X C"],
    t: Int[Array, "B"],
) -> Float[Array, "B Y X C"]:
    """What the model learns to predict: the noise, or v (Salimans & Ho, 2202.00512, app. D)."""
    if schedule.prediction == "epsilon":
        return noise
    at = rates(schedule, t)
    return at.signal * noise - at.noise * x0


def squared_error(
    out: Float[Array, "B Y X C"], wanted: Float[Array, "B Y X C"]
) -> Float[Array, "B"]:
    """Each sample's own mean in fp32, so that weights can come before the batch's."""
    error = jnp.square(out.astype(jnp.float32) - wanted.astype(jnp.float32))
    return jnp.mean(error, axis=(1, 2, 3))


def min_snr_weights(schedule: Schedule, t: Int[Array, "B"], gamma: float) -> Float[Array, "B"]:
    """min(snr, gamma) / snr for epsilon, / (snr + 1) for v: Hang et al. 2023, arXiv:2303.09556."""
    snr = schedule.snr
    over = snr if schedule.prediction == "epsilon" else snr + 1.0
    return jnp.asarray(np.minimum(snr, gamma) / over, jnp.float32)[t]


def offset_noise(
    keys: PRNGKeyArray, noise: Float[Array, "B Y X C"], strength: float
) -> Float[Array, "B Y X C"]:
    """Add one normal number a sample and channel, times `strength`; `keys` one a sample."""
    channels = noise.shape[-1:]
    shift = jax.vmap(lambda key: jax.random.normal(key, channels, noise.dtype))(keys)
    return noise + strength * shift[:, None, None]


def draw_timesteps(keys: PRNGKeyArray, schedule: Schedule) -> Int[Array, "B"]:
    """One training timestep a key, uniform; a row's depends on its own key alone."""
    # The bounds between timesteps on [0, 1), without the 1, which fp32 could round a draw to.
    bounds = jnp.asarray(np.arange(1, schedule.train_steps) / schedule.train_steps, jnp.float32)
    draws = jax.vmap(jax.random.uniform)(keys)
    return jnp.searchsorted(bounds, draws, side="right").astype(jnp.int32)


def timestep_embedding(
    t: Array, dim: int, *, cos_first: bool = True, freq_shift: float = 0.0
) -> Float[Array, "... D"]:
    """Sinusoids of numbers of any shape, fp32: (...) -> (..., dim), cosines first.

    `cos_first` is flip_sin_to_cos; frequencies fall from 1 towards 1/10000 (Ho et al., Vaswani).
    """
    half = dim // 2
    decay = np.exp(-log(10000.0) * np.arange(half) / (half - freq_shift))
    angles = t.astype(jnp.float32)[..., None] * jnp.asarray(decay, jnp.float32)
    pair = (jnp.cos(angles), jnp.sin(angles)) if cos_first else (jnp.sin(angles), jnp.cos(angles))
    embedding = jnp.concatenate(pair, axis=-1)
    return jnp.pad(embedding, [(0, 0)] * t.ndim + [(0, dim % 2)])
