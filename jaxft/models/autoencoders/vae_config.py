"""Fields of the config.json of an AutoencoderKL, or of FLUX.2's, as one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.errors import UserError
from jaxft.weights.fields import ANY, fields, refused

FILE = "vae/config.json"

# Defaults of diffusers' AutoencoderKL for keys that a config.json lacks.
DEFAULTS: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "sample_size": 32,
}
# Those of AutoencoderKLFlux2, whose latents are normalised by statistics that its weights hold.
FLUX2_CLASS = "AutoencoderKLFlux2"
FLUX2_DEFAULTS: dict[str, Any] = {
    "_class_name": FLUX2_CLASS,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "decoder_block_out_channels": None,
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "batch_norm_eps": 1e-4,
    "batch_norm_momentum": 0.1,
    "patch_size": (2, 2),
}
_FLUX2_PATCH = [2, 2]
# Keys that may be null although their default is another value, with what null means in diffusers.
NULLS: dict[str, Any] = dict.fromkeys(
    ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), False
)


_NUMBERS = ((0.0,),)
_ALSO: dict[str, tuple] = {
    "shift_factor": (0.0,),
    "latents_mean": _NUMBERS,
    "latents_std": _NUMBERS,
    "sample_size": ANY,  # not used here, and a list in some files
    "decoder_block_out_channels": ((128,),),
}


@dataclass(frozen=True)
class VAEConfig:
    """The configuration of one autoencoder, with the scaling of its latents for diffusion.

    norm_eps: added to the variance of FLUX.2's latents. None for other autoencoders, whose scaling
    is in their config.json. It is left out of the text that names a cache of unscaled latents.
    """

    in_channels: int
    out_channels: int
    latent_channels: int
    widths: tuple[int, ...]
    layers: int
    groups: int
    mid_attention: bool
    quant_conv: bool
    post_quant_conv: bool
    force_upcast: bool  # fp16 overflows, bf16 does not
    scaling_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm_eps: float | None = field(default=None, repr=False)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> "VAEConfig":
        """Read a config.json. Raises: UserError for values that are not supported."""
        flux2 = config.get("_class_name") == FLUX2_CLASS
        get = fields(config, FLUX2_DEFAULTS if flux2 else DEFAULTS, NULLS, where, _ALSO)
        if flux2:
            # No scaling: that of its latents is in the weights.
            get = {**DEFAULTS, "scaling_factor": 1.0, "force_upcast": False, **get}
            _check_flux2(get, where)
        _check(get, where)
        mean, channels = get["latents_mean"], get["latent_channels"]
        if mean is None:
            mean = (get["shift_factor"] or 0.0,)
        return cls(
            in_channels=get["in_channels"],
            out_channels=get["out_channels"],
            latent_channels=channels,
            widths=tuple(get["block_out_channels"]),
            layers=get["layers_per_block"],
            groups=get["norm_num_groups"],
            mid_attention=get["mid_block_add_attention"],
            quant_conv=get["use_quant_conv"],
            post_quant_conv=get["use_post_quant_conv"],
            force_upcast=get["force_upcast"],
            scaling_factor=get["scaling_factor"],
            mean=tuple(mean),
            std=tuple(get["latents_std"] or (1.0,)),
            norm_eps=get.get("batch_norm_eps"),
        )

    @property
    def factor(self) -> int:
        """Pixels for one latent, in each direction."""
        return 2 ** (len(self.widths) - 1)

    @property
    def takes_mode(self) -> bool:
        """True for FLUX.2, which is trained on the mode of the posterior and not on samples."""
        return self.norm_eps is not None

    @property
    def moments(self) -> int:
        """Channels of the encoder's output: mean and log variance of each latent channel."""
        return 2 * self.latent_channels

    @property
    def down_attends(self) -> tuple[bool, ...]:
        """Attention of each level: none. Only the middle block has it."""
        return (False,) * len(self.widths)

    @property
    def up_attends(self) -> tuple[bool, ...]:
        """Attention of each level on the way up: none."""
        return self.down_attends

    def scale(self, latents: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Return latents scaled for the diffusion model: (z - mean) scaling_factor / std."""
        mean, std = jnp.array(self.mean, latents.dtype), jnp.array(self.std, latents.dtype)
        return (latents - mean) * (self.scaling_factor / std)

    def unscale(self, latents: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Return latents for the decoder: the inverse of `scale`."""
        mean, std = jnp.array(self.mean, latents.dtype), jnp.array(self.std, latents.dtype)
        return latents * (std / self.scaling_factor) + mean


def _check_flux2(get: Mapping[str, Any], where: str) -> None:
    widths, own = list(get["block_out_channels"]), get["decoder_block_out_channels"]
    if own is not None and list(own) != widths:
        raise refused(where, "decoder_block_out_channels", own, f"null or {widths}")
    if list(get["patch_size"]) != _FLUX2_PATCH:
        raise refused(where, "patch_size", get["patch_size"], _FLUX2_PATCH)


def _check(get: Mapping[str, Any], where: str) -> None:
    """Raise UserError for values that are not supported, or that contradict each other."""
    if get["_class_name"] not in ("AutoencoderKL", FLUX2_CLASS):
        raise UserError(
            f"{where}: _class_name={get['_class_name']!r} is not supported; expected AutoencoderKL,"
            " the VAE that the model was trained with"
        )
    levels = len(get["block_out_channels"])
    for key, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        if tuple(get[f"{key}_block_types"]) != (kind,) * levels:
            raise UserError(
                f"{where}: {key}_block_types={list(get[f'{key}_block_types'])} is not supported;"
                f" it has to be {kind} for each of the {levels} block_out_channels"
            )
    if get["act_fn"] not in ("silu", "swish"):
        raise UserError(f"{where}: act_fn={get['act_fn']!r} is not supported; it has to be silu")
    for width in get["block_out_channels"]:
        if width % get["norm_num_groups"]:
            raise UserError(
                f"{where}: block_out_channels has {width}, which norm_num_groups="
                f"{get['norm_num_groups']} does not divide"
            )
    if get["shift_factor"] and get["latents_mean"]:
        raise UserError(f"{where}: shift_factor and latents_mean are both set; keep one of them")
    for key in ("latents_mean", "latents_std"):
        if get[key] and len(get[key]) != get["latent_channels"]:
            raise UserError(
                f"{where}: {key} has {len(get[key])} numbers for"
                f" latent_channels={get['latent_channels']}"
            )
