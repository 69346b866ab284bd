"""Fields of a VQ tokenizer's config.json: transformers' JanusVQVAE or diffusers' VQModel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.fields import fields

FILE = "config.json"
JANUS, DIFFUSERS = "janus_vqgan", "VQModel"
JANUS_GROUPS = 32  # of every norm. No config.json has it

# LlamaGen's name of a key that no class of transformers or diffusers reads: see VQConfig.l2.
L2 = "codebook_l2_norm"

# Defaults of transformers' JanusVQVAE for keys that a config.json lacks.
JANUS_DEFAULTS: dict[str, Any] = {
    "embed_dim": 8,
    "num_embeddings": 16384,
    "double_latent": False,
    "latent_channels": 256,
    "in_channels": 3,
    "base_channels": 128,
    "channel_multiplier": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "dropout": 0.0,
    "num_patches": 32,
    "out_channels": 3,
    L2: True,
}
# Defaults of diffusers' VQModel.
DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "sample_size": 32,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "norm_type": "group",
    "mid_block_add_attention": True,
    L2: False,
}
# Keys that may be null although their default is another value, with what null means in diffusers.
NULLS = {"mid_block_add_attention": False}
# The class names of blocks without attention, and with it.
DOWN_BLOCKS = {False: "DownEncoderBlock2D", True: "AttnDownEncoderBlock2D"}
UP_BLOCKS = {False: "UpDecoderBlock2D", True: "AttnUpDecoderBlock2D"}
ATTENDS = {name: attends for table in (DOWN_BLOCKS, UP_BLOCKS) for attends, name in table.items()}


@dataclass(frozen=True)
class VQConfig:
    """The configuration of one tokenizer: encoder and decoder (`vae.Levels`) and the codebook.

    `l2` is the measure by which a code is found. If True, it is the angle between z and the rows of
    the codebook, as LlamaGen and Janus train it. A JanusVQVAE folder without `codebook_l2_norm` has
    True. If False, it is the distance of z and the rows. transformers' JanusVQVAE.encode always
    uses the distance to the stored rows. The two agree where the rows have unit length, so an
    export writes such rows (vqgan.unit_codebook). A VQModel is never l2.
    """

    kind: str  # JANUS or DIFFUSERS, the layout of the folder
    in_channels: int
    out_channels: int
    latent_channels: int
    widths: tuple[int, ...]
    layers: int
    groups: int
    mid_attention: bool
    down_attends: tuple[bool, ...]
    up_attends: tuple[bool, ...]
    codes: int
    code_dim: int
    l2: bool
    size: int  # pixels a side of the images that it was made for. Any multiple of `factor` works

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> "VQConfig":
        """Read a config.json of either kind.

        Raises: UserError for values that are not supported.
        """
        if config.get("model_type") == JANUS:
            return _from_janus(config, where)
        if config.get("_class_name") == DIFFUSERS:
            return _from_diffusers(config, where)
        raise UserError(
            f"{where}: model_type={config.get('model_type')!r},"
            f" _class_name={config.get('_class_name')!r} is no VQ tokenizer; supported are"
            f" model_type {JANUS} (transformers) and _class_name {DIFFUSERS} (diffusers)"
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json of a folder of this kind."""
        return _to_janus(self) if self.kind == JANUS else _to_diffusers(self)

    @property
    def factor(self) -> int:
        """Pixels for one code, in each direction."""
        return 2 ** (len(self.widths) - 1)

    @property
    def moments(self) -> int:
        """Channels of the encoder's output: the latents."""
        return self.latent_channels

    @property
    def unit_lookup(self) -> bool:
        """True if the decoder gets rows of unit length, as in transformers' Janus."""
        return self.kind == JANUS

    @property
    def code_dtype(self) -> np.dtype:
        """The smallest dtype that a file of codes needs."""
        return np.dtype(np.uint16 if self.codes <= 2**16 else np.int32)


def check_codes(codes: np.ndarray, cfg: VQConfig, where: str) -> None:
    """Raise UserError for stored codes outside of this codebook.

    A lookup would clamp them silently. where: the name of the codes' file.
    """
    low, high = int(np.min(codes, initial=0)), int(np.max(codes, initial=0))
    if low < 0 or high >= cfg.codes:
        raise UserError(
            f"{where} has code {low if low < 0 else high}, but the codebook has {cfg.codes} rows;"
            " encode the images again with this tokenizer"
        )


def _from_janus(config: Mapping[str, Any], where: str) -> VQConfig:
    get = fields(config, JANUS_DEFAULTS, {}, where)
    for key in ("double_latent", "dropout"):
        if get[key]:
            raise UserError(f"{where}: {key}={get[key]!r} is not supported; set it to 0")
    if get["channel_multiplier"][0] != 1:
        raise UserError(
            f"{where}: channel_multiplier={list(get['channel_multiplier'])} is not supported;"
            " it has to begin with 1"
        )
    widths = tuple(get["base_channels"] * one for one in get["channel_multiplier"])
    levels = len(widths)
    # JanusVQVAE has attention in the middle, and at the smallest of its levels.
    cfg = VQConfig(
        kind=JANUS,
        in_channels=get["in_channels"],
        out_channels=get["out_channels"],
        latent_channels=get["latent_channels"],
        widths=widths,
        layers=get["num_res_blocks"],
        groups=JANUS_GROUPS,
        mid_attention=True,
        down_attends=(False,) * (levels - 1) + (True,),
        up_attends=(True,) + (False,) * (levels - 1),
        codes=get["num_embeddings"],
        code_dim=get["embed_dim"],
        l2=bool(get[L2]),
        size=get["num_patches"] * 2 ** (levels - 1),
    )
    _check(cfg, where, "base_channels * channel_multiplier")
    return cfg


def _from_diffusers(config: Mapping[str, Any], where: str) -> VQConfig:
    get = fields(config, DIFFUSERS_DEFAULTS, NULLS, where, {"vq_embed_dim": (1,)})
    for key, allowed in (("act_fn", ("silu", "swish")), ("norm_type", ("group",)), (L2, (False,))):
        if get[key] not in allowed:
            raise UserError(
                f"{where}: {key}={get[key]!r} is not supported; it has to be {allowed[0]!r}"
            )
    latents, widths = get["latent_channels"], tuple(get["block_out_channels"])
    cfg = VQConfig(
        kind=DIFFUSERS,
        in_channels=get["in_channels"],
        out_channels=get["out_channels"],
        latent_channels=latents,
        widths=widths,
        layers=get["layers_per_block"],
        groups=get["norm_num_groups"],
        mid_attention=get["mid_block_add_attention"],
        down_attends=_attends(get["down_block_types"], "down", len(widths), where),
        up_attends=_attends(get["up_block_types"], "up", len(widths), where),
        codes=get["num_vq_embeddings"],
        code_dim=latents if get["vq_embed_dim"] is None else get["vq_embed_dim"],
        l2=False,
        size=get["sample_size"],
    )
    _check(cfg, where, "block_out_channels")
    return cfg


def _attends(types: Any, way: str, levels: int, where: str) -> tuple[bool, ...]:
    kinds = [kind for kind in ATTENDS if way in kind.lower()]
    if len(types) != levels or not set(types) <= set(kinds):
        raise UserError(
            f"{where}: {way}_block_types={list(types)} is not supported; it has to be"
            f" {' or '.join(kinds)} for each of the {levels} block_out_channels"
        )
    return tuple(ATTENDS[kind] for kind in types)


def _check(cfg: VQConfig, where: str, key: str) -> None:
    """Raise UserError for images without 3 channels, and for groups that do not divide a width."""
    for name, channels in (("in_channels", cfg.in_channels), ("out_channels", cfg.out_channels)):
        if channels != 3:
            raise UserError(f"{where}: {name}={channels} is not supported; images have 3 channels")
    for width in cfg.widths:
        if width % cfg.groups:
            raise UserError(
                f"{where}: {key} has {width}, which the {cfg.groups} groups of the norms do not"
                " divide"
            )


def _to_janus(cfg: VQConfig) -> dict[str, Any]:
    base = cfg.widths[0]
    return {
        "model_type": JANUS,
        "architectures": ["JanusVQVAE"],
        "embed_dim": cfg.code_dim,
        "num_embeddings": cfg.codes,
        "double_latent": False,
        "latent_channels": cfg.latent_channels,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "base_channels": base,
        "channel_multiplier": [width // base for width in cfg.widths],
        "num_res_blocks": cfg.layers,
        "dropout": 0.0,
        "num_patches": cfg.size // cfg.factor,
        L2: cfg.l2,
    }


def _to_diffusers(cfg: VQConfig) -> dict[str, Any]:
    return {
        "_class_name": DIFFUSERS,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "down_block_types": [DOWN_BLOCKS[attends] for attends in cfg.down_attends],
        "up_block_types": [UP_BLOCKS[attends] for attends in cfg.up_attends],
        "block_out_channels": list(cfg.widths),
        "layers_per_block": cfg.layers,
        "act_fn": "silu",
        "latent_channels": cfg.latent_channels,
        "sample_size": cfg.size,
        "num_vq_embeddings": cfg.codes,
        "norm_num_groups": cfg.groups,
        "vq_embed_dim": cfg.code_dim,
        "norm_type": "group",
        "mid_block_add_attention": cfg.mid_attention,
    }
