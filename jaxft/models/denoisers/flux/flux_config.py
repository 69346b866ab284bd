"""Fields of a FLUX.1 transformer/config.json, as one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.weights.fields import ANY, check_axes, fields, refused

FILE = "transformer/config.json"

# Defaults of diffusers' FluxTransformer2DModel for keys that a config.json lacks.
DEFAULTS: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
_ALSO: dict[str, tuple] = {
    **dict.fromkeys(("_class_name", "axes_dims_rope"), ANY),
    "out_channels": (1,),
}
PATCH = 2  # the side of a token in latents. The pipeline packs them, so no config.json has it


@dataclass(frozen=True)
class FluxConfig:
    """The configuration of one FLUX.1 transformer.

    in_channels: of latents, which are a quarter of the file's. num_layers: blocks with projections
    for image and text apart. num_single: blocks after these, with one for both. guidance: the scale
    of guidance is an input (FLUX.1-dev). axes: the dims of a head that rotate by each of the three
    places of a token.
    """

    in_channels: int
    num_layers: int
    num_single: int
    heads: int
    head_dim: int
    context_dim: int
    pooled_dim: int
    guidance: bool
    axes: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> "FluxConfig":
        """Read a transformer/config.json. Absent keys take the defaults of diffusers' class.

        Raises: UserError for values that no layer here computes.
        """
        c = fields(config, DEFAULTS, {"out_channels": None, "guidance_embeds": False}, where, _ALSO)
        _check(c, where)
        return cls(
            in_channels=c["in_channels"] // PATCH**2,
            num_layers=c["num_layers"],
            num_single=c["num_single_layers"],
            heads=c["num_attention_heads"],
            head_dim=c["attention_head_dim"],
            context_dim=c["joint_attention_dim"],
            pooled_dim=c["pooled_projection_dim"],
            guidance=bool(c["guidance_embeds"]),
            axes=tuple(c["axes_dims_rope"]),
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
    wanted = {"_class_name": DEFAULTS["_class_name"], "patch_size": 1}
    for key, value in wanted.items():
        if c[key] != value:
            raise refused(where, key, c[key], value)
    if c["in_channels"] % PATCH**2:
        raise refused(where, "in_channels", c["in_channels"], "a multiple of 4, for 2 x 2 latents")
    if c["out_channels"] not in (None, c["in_channels"]):
        why = f"null or in_channels={c['in_channels']}: FLUX.1 Fill and its kin take more pictures"
        raise refused(where, "out_channels", c["out_channels"], why)
    check_axes(c, "axes_dims_rope", 3, c["attention_head_dim"], "attention_head_dim", where)
