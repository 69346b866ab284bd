"""DDPM's noise schedule, from the scheduler_config.json of a folder.

All values are computed in fp64 on the host and used as fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.fields import ANY, fields

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
# Defaults of single classes that differ from these, for keys that training reads.
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "HeunDiscreteScheduler": _NARROW,
    "KDPM2DiscreteScheduler": _NARROW,
    "KDPM2AncestralDiscreteScheduler": _NARROW,
    "LCMScheduler": {**_NARROW, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_NARROW, "beta_schedule": "scaled_linear"},
}
# Classes with other noise than DDPM's, by the beginning of their names.
OTHER_NOISE = {
    "FlowMatch": "flow matching, as in SD 3 and FLUX",
    "EDM": "EDM, as in playground-v2.5 and CosXL",
    "CMStochastic": "a consistency model",
    "ScoreSde": "a score SDE",
    "VQDiffusion": "discrete noise",
}
# Meaning of a JSON null, for keys where diffusers' classes compute with None.
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
SCHEDULE_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": (None, "leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "thresholding": (False, None),
}
# Values that Euler and DPM++ support. diffusers computes bh1, bh2 and logrho as midpoint too.
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
# Keys of a folder after training with zero terminal SNR (Lin et al. 2023, arXiv:2305.08891).
ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}


@dataclass(frozen=True)
class Schedule:
    """Settings of a scheduler_config.json, of any scheduler class with DDPM's betas.

    Training always uses the DDPM formulas (Ho et al. 2020, arXiv:2006.11239) with these betas.
    `bent` lists the settings that Euler and DPM++ do not support.
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
        """Read a scheduler_config.json.

        Absent keys take the defaults of the class that the file names. A null has the meaning of
        None in diffusers.
        Raises: UserError for settings that are not supported.
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
        """Remaining share of the signal's variance at each timestep, fp64 [train_steps].

        With zero terminal SNR the last value is 0. "linear" is linear in beta. "scaled_linear",
        which CompVis calls linear, is linear in sqrt(beta).
        """
        if self.trained_betas is not None:
            betas = np.array(self.trained_betas, np.float64)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.train_steps)
        else:
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps) ** 2
        bar = np.cumprod(1.0 - betas)  # [train_steps]
        return zero_terminal_snr(bar) if self.zero_snr else bar

    @property
    def snr(self) -> np.ndarray:
        """Signal to noise ratio alpha_bar / (1 - alpha_bar), fp64 [train_steps]."""
        return self.alphas_bar / (1.0 - self.alphas_bar)


def _read(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return the value of each key of DEFAULTS. Raises: UserError for a value not supported."""
    defaults = {**DEFAULTS, **CLASS_DEFAULTS.get(name, {})}
    # Keys that another key replaces may be null, and may have any value.
    given = config.get("trained_betas") is not None
    unused = ("beta_start", "beta_end", "beta_schedule") if given else ()
    unused += () if config.get("clip_sample", True) else ("clip_sample_range",)
    also = dict.fromkeys((*SCHEDULE_CHOICES, *unused), ANY)
    nulls = {**NULLS, **{key: defaults[key] for key in unused}}
    get = fields(config, defaults, nulls, where, {**also, "trained_betas": ((0.1,),)})
    for key, allowed in SCHEDULE_CHOICES.items():
        value = get.get(key, config.get(key, False))
        if value in allowed and (value is not None or key not in config or key == "thresholding"):
            continue
        if key in unused:
            continue
        named = ", ".join(str(one) for one in allowed if one is not None)
        raise UserError(f"{where}: {key}={value!r} is not supported; it can be {named}")
    return get


def zero_terminal_snr(alphas_bar: np.ndarray) -> np.ndarray:
    """Return alpha_bar, its root shifted and scaled so that the last is 0 and the first is kept.

    Source: Lin et al. 2023, arXiv:2305.08891, Algorithm 1.
    """
    root = np.sqrt(alphas_bar)
    return np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))
