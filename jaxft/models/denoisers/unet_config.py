"""Fields of a Stable Diffusion unet/config.json, as one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.core.errors import UserError
from jaxft.weights.fields import ANY, fields

FILE = "unet/config.json"

# Defaults of diffusers' UNet2DConditionModel for keys that a config.json lacks.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "time_embedding_dim": None,
}
# Keys that may be null although their default is another value, with what null means in diffusers.
NULLS: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": False,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "upcast_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
    "attention_type": "default",
    "class_embeddings_concat": False,
}
# Keys of which only some values are supported, with these values (the default first).
ONLY: dict[str, tuple] = {
    "_class_name": ("UNet2DConditionModel",),
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0,),
    "act_fn": ("silu", "swish"),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "upcast_attention": (False, True),  # logits and softmax are fp32 for everyone
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type": (None, "text_time"),
}
# Published models that have other values of a key.
BELONGS = {
    "time_cond_proj_dim": "a latent consistency model, whose guidance is an input; train a LoRA on"
    " the model that it was distilled from",
    "encoder_hid_dim": "Kolors, or another model whose text encoder is not CLIP; not supported yet",
    "num_class_embeds": "an upscaler, whose noise level is an input; not supported yet",
    "class_embed_type": "unCLIP, whose picture embedding is an input; not supported yet",
}
# Keys whose default does not show all kinds of values that they have.
_ALSO: dict[str, tuple] = {
    **dict.fromkeys(ONLY, ANY),
    **dict.fromkeys(
        ("layers_per_block", "attention_head_dim", "transformer_layers_per_block"), ((1,),)
    ),
    **dict.fromkeys(
        ("addition_time_embed_dim", "projection_class_embeddings_input_dim", "time_embedding_dim"),
        (1,),
    ),
    "cross_attention_dim": ((1,),),
    "sample_size": (1, (1, 1)),
    "freq_shift": (0.0,),
}
_DEFAULTS = {**{key: values[0] for key, values in ONLY.items()}, **DEFAULTS}


@dataclass(frozen=True)
class UNetConfig:
    """The configuration of one UNet. Tuples have one entry a level, the largest images first.

    `heads` is the number of heads, which the file calls attention_head_dim. `added_time_dim` is the
    width of one embedded time id of SDXL, and `added_dim` the width of the whole input of its
    add_embedding. Both are None in other models.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    depths: tuple[int, ...]
    context_dims: tuple[int, ...]
    down_attends: tuple[bool, ...]
    up_attends: tuple[bool, ...]
    linear_projection: bool
    groups: int
    eps: float
    time_dim: int
    cos_first: bool
    freq_shift: float
    added_time_dim: int | None
    added_dim: int | None
    sample_size: int | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> "UNetConfig":
        """Read a unet/config.json. Absent keys take the defaults of diffusers' class.

        A null has the meaning of None in that class.
        Raises: UserError for values that no layer here computes, and for widths that do not divide.
        """
        c = fields(config, _DEFAULTS, NULLS, where, _ALSO)
        if isinstance(c["only_cross_attention"], list | tuple):
            c["only_cross_attention"] = any(c["only_cross_attention"])  # one entry a level
        for key, values in ONLY.items():
            if c[key] not in values:
                note = f" (this is {BELONGS[key]})" if key in BELONGS else ""
                raise _unsupported(where, key, c[key], " or ".join(map(repr, values)), note)
        channels = tuple(c["block_out_channels"])
        added = c["addition_embed_type"] is not None
        cfg = cls(
            in_channels=c["in_channels"],
            out_channels=c["out_channels"],
            channels=channels,
            layers=_per_level("layers_per_block", c, channels, where),
            heads=_per_level("attention_head_dim", c, channels, where),
            depths=_per_level("transformer_layers_per_block", c, channels, where),
            context_dims=_per_level("cross_attention_dim", c, channels, where),
            down_attends=_attends("down_block_types", c, channels, where),
            up_attends=_attends("up_block_types", c, channels, where),
            linear_projection=bool(c["use_linear_projection"]),
            groups=c["norm_num_groups"],
            eps=c["norm_eps"],
            time_dim=c["time_embedding_dim"] or 4 * channels[0],
            cos_first=bool(c["flip_sin_to_cos"]),
            freq_shift=c["freq_shift"],
            added_time_dim=c["addition_time_embed_dim"] if added else None,
            added_dim=c["projection_class_embeddings_input_dim"] if added else None,
            sample_size=c["sample_size"],
        )
        _check_widths(cfg, where)
        return cfg


def _unsupported(where: str, key: str, value: Any, expected: str, note: str = "") -> UserError:
    return UserError(f"{where}: {key}={value!r} is not supported{note}; expected {expected}")


def _per_level(
    key: str, c: Mapping[str, Any], channels: tuple[int, ...], where: str
) -> tuple[int, ...]:
    """Return one int a level. The file has one for all levels, or a list."""
    value = c[key]
    values = (value,) * len(channels) if isinstance(value, int) else tuple(value or ())
    if len(values) != len(channels) or any(type(one) is not int or one < 1 for one in values):
        raise _unsupported(where, key, value, f"one integer, or {len(channels)} in a list")
    return values


def _attends(
    key: str, c: Mapping[str, Any], channels: tuple[int, ...], where: str
) -> tuple[bool, ...]:
    plain = "DownBlock2D" if key.startswith("down") else "UpBlock2D"
    names = tuple(c[key])
    if len(names) != len(channels) or not set(names) <= {plain, "CrossAttn" + plain}:
        raise _unsupported(where, key, names, f"{len(channels)} of {plain} and CrossAttn{plain}")
    return tuple(name != plain for name in names)


def _check_widths(cfg: UNetConfig, where: str) -> None:
    for level, width in enumerate(cfg.channels):
        if not cfg.groups or width % cfg.groups:
            expected = f"a divisor of block_out_channels={cfg.channels}"
            raise _unsupported(where, "norm_num_groups", cfg.groups, expected)
        if width % cfg.heads[level]:
            expected = f"numbers of heads that divide block_out_channels={cfg.channels}"
            raise _unsupported(where, "attention_head_dim", cfg.heads, expected)
    if (cfg.added_time_dim is None) != (cfg.added_dim is None):
        raise _unsupported(
            where,
            "addition_embed_type",
            "text_time",
            "addition_time_embed_dim and projection_class_embeddings_input_dim beside it",
        )
