"""Fields of a Z-Image transformer/config.json, as one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.weights.fields import ANY, check_axes, fields, refused

FILE = "transformer/config.json"

# Defaults of diffusers' ZImageTransformer2DModel for keys that a config.json lacks.
DEFAULTS: dict[str, Any] = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "siglip_feat_dim": None,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": (32, 48, 48),
    "axes_lens": (1024, 512, 512),
}
_ALSO: dict[str, tuple] = {
    **dict.fromkeys(("_class_name", "siglip_feat_dim", "axes_dims"), ANY),
    **dict.fromkeys(("all_patch_size", "all_f_patch_size"), ANY),
}
TOKEN_SIDE = 2  # the side of a token in latents


@dataclass(frozen=True)
class ZImageConfig:
    """The configuration of one Z-Image transformer.

    num_layers: blocks of image and text in one sequence. num_refiners: blocks before these, of the
    image alone, and as many of the text alone. context_dim: the width of the text encoder's states.
    axes: the dims of a head that rotate by each of the three places of a token. theta: the base of
    that rotation. time_scale: the factor of times before their sinusoids.
    """

    in_channels: int
    dim: int
    num_layers: int
    num_refiners: int
    heads: int
    eps: float
    qk_norm: bool
    context_dim: int
    theta: float
    time_scale: float
    axes: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> "ZImageConfig":
        """Read a transformer/config.json. Absent keys take the defaults of diffusers' class.

        Raises: UserError for values that no layer here computes.
        """
        c = fields(config, DEFAULTS, {"qk_norm": False, "siglip_feat_dim": None}, where, _ALSO)
        _check(c, where)
        return cls(
            in_channels=c["in_channels"],
            dim=c["dim"],
            num_layers=c["n_layers"],
            num_refiners=c["n_refiner_layers"],
            heads=c["n_heads"],
            eps=c["norm_eps"],
            qk_norm=bool(c["qk_norm"]),
            context_dim=c["cap_feat_dim"],
            theta=c["rope_theta"],
            time_scale=c["t_scale"],
            axes=tuple(c["axes_dims"]),
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def mlp_dim(self) -> int:
        """The width of the MLPs, rounded as diffusers' class rounds it."""
        return int(self.dim / 3 * 8)


def _check(c: Mapping[str, Any], where: str) -> None:
    wanted = {
        "_class_name": DEFAULTS["_class_name"],
        "all_patch_size": [TOKEN_SIDE],
        "all_f_patch_size": [1],
        "siglip_feat_dim": None,
        "n_kv_heads": c["n_heads"],
    }
    for key, value in wanted.items():
        found = list(c[key]) if isinstance(c[key], tuple) else c[key]
        if found != value:
            raise refused(where, key, found, value)
    check_axes(c, "axes_dims", 3, c["dim"] / c["n_heads"], "dim / n_heads", where)
