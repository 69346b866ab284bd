"""Fields of a FLUX.2 klein transformer/config.json, as one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.denoisers.flux.flux_config import PATCH
from jaxft.weights.fields import ANY, check_axes, fields, refused

FILE = "transformer/config.json"

# Defaults of diffusers' Flux2Transformer2DModel for keys that a config.json lacks: FLUX.2-dev's.
DEFAULTS: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": True,
}
_ALSO: dict[str, tuple] = {
    **dict.fromkeys(("_class_name", "axes_dims_rope"), ANY),
    "out_channels": (1,),
    "rope_theta": (2000.0,),
}


@dataclass(frozen=True)
class Flux2Config:
    """The configuration of one FLUX.2 klein transformer.

    in_channels: of latents, which are a quarter of the file's. num_layers: blocks with projections
    for image and text apart. num_single: blocks after these, with one for both. time_dim: sinusoids
    of the time. mlp_dim: the width of every MLP. axes: the dims of a head that rotate by each of
    the four places of a token. theta: the base of that rotation. eps: of every norm.
    """

    in_channels: int
    num_layers: int
    num_single: int
    heads: int
    head_dim: int
    context_dim: int
    time_dim: int
    mlp_dim: int
    axes: tuple[int, ...]
    theta: float
    eps: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> "Flux2Config":
        """Read a transformer/config.json. Absent keys take the defaults of diffusers' class.

        Raises: UserError for values that no layer here computes.
        """
        c = fields(config, DEFAULTS, {"out_channels": None, "guidance_embeds": False}, where, _ALSO)
        _check(c, where)
        heads, head_dim = c["num_attention_heads"], c["attention_head_dim"]
        return cls(
            in_channels=c["in_channels"] // PATCH**2,
            num_layers=c["num_layers"],
            num_single=c["num_single_layers"],
            heads=heads,
            head_dim=head_dim,
            context_dim=c["joint_attention_dim"],
            time_dim=c["timestep_guidance_channels"],
            mlp_dim=int(heads * head_dim * c["mlp_ratio"]),
            axes=tuple(c["axes_dims_rope"]),
            theta=c["rope_theta"],
            eps=c["eps"],
        )

    @property
    def dim(self) -> int:
        """The width of image and text tokens."""
        return self.heads * self.head_dim

    @property
    def qk_norm(self) -> bool:
        """True: queries and keys of every head pass an RMS norm."""
        return True


def _check(c: Mapping[str, Any], where: str) -> None:
    for key, value in {"_class_name": DEFAULTS["_class_name"], "patch_size": 1}.items():
        if c[key] != value:
            raise refused(where, key, c[key], value)
    if c["guidance_embeds"]:
        why = "false, as in FLUX.2 klein: FLUX.2-dev has it, whose text encoder is not supported"
        raise refused(where, "guidance_embeds", True, why)
    if c["in_channels"] % PATCH**2:
        raise refused(where, "in_channels", c["in_channels"], "a multiple of 4, for 2 x 2 latents")
    if c["out_channels"] not in (None, c["in_channels"]):
        expected = f"null or in_channels={c['in_channels']}"
        raise refused(where, "out_channels", c["out_channels"], expected)
    check_axes(c, "axes_dims_rope", 4, c["attention_head_dim"], "attention_head_dim", where)
