"""Fields of a Stable Diffusion 3 transformer/config.json, as one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from jaxft.weights.fields import ANY, fields, refused

FILE = "transformer/config.json"

# Defaults of diffusers' SD3Transformer2DModel for keys that a config.json lacks.
DEFAULTS: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
NO_OUT_CHANNELS = 0  # the meaning of out_channels=null: those of the input
_ALSO: dict[str, tuple] = dict.fromkeys(("_class_name", "dual_attention_layers", "qk_norm"), ANY)
QK_NORMS = (None, "rms_norm")


class BlockRun(NamedTuple):
    """Consecutive blocks of one shape, which are stacked. `layers` are their numbers in the file.

    dual: a second attention among image tokens alone. last: the last block of the model, whose text
    is not computed any further.
    """

    layers: range
    dual: bool
    last: bool


@dataclass(frozen=True)
class MMDiTConfig:
    """The configuration of one MMDiT. `sample_size` counts pixels of latents, like UNetConfig's.

    max_patches: rows and columns of the table of positions. dual_layers: the blocks with a second
    attention. qk_norm: queries and keys of a head pass an RMS norm.
    """

    in_channels: int
    out_channels: int
    patch_size: int
    num_layers: int
    heads: int
    head_dim: int
    context_dim: int
    pooled_dim: int
    max_patches: int
    dual_layers: tuple[int, ...]
    qk_norm: bool
    sample_size: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> "MMDiTConfig":
        """Read a transformer/config.json. Absent keys take the defaults of diffusers' class.

        Raises: UserError for values that no layer here computes.
        """
        c = fields(config, DEFAULTS, {"out_channels": NO_OUT_CHANNELS}, where, _ALSO)
        c["out_channels"] = c["out_channels"] or c["in_channels"]
        _check(c, where)
        return cls(
            in_channels=c["in_channels"],
            out_channels=c["out_channels"],
            patch_size=c["patch_size"],
            num_layers=c["num_layers"],
            heads=c["num_attention_heads"],
            head_dim=c["attention_head_dim"],
            context_dim=c["joint_attention_dim"],
            pooled_dim=c["pooled_projection_dim"],
            max_patches=c["pos_embed_max_size"],
            dual_layers=tuple(sorted(c["dual_attention_layers"])),
            qk_norm=c["qk_norm"] is not None,
            sample_size=c["sample_size"],
        )

    @property
    def dim(self) -> int:
        """The width of image and text tokens."""
        return self.heads * self.head_dim

    @property
    def runs(self) -> tuple[BlockRun, ...]:
        """The blocks in their order, as runs of blocks that have the same parameters."""

        def kind(layer: int) -> tuple[bool, bool]:
            return layer in self.dual_layers, layer == self.num_layers - 1

        found = []
        for (dual, last), layers in groupby(range(self.num_layers), kind):
            numbers = list(layers)
            found.append(BlockRun(range(numbers[0], numbers[-1] + 1), dual, last))
        return tuple(found)


def _check(c: Mapping[str, Any], where: str) -> None:
    if c["_class_name"] != DEFAULTS["_class_name"]:
        raise refused(where, "_class_name", c["_class_name"], DEFAULTS["_class_name"])
    if c["qk_norm"] not in QK_NORMS:
        raise refused(where, "qk_norm", c["qk_norm"], "null or 'rms_norm'")
    dim = c["num_attention_heads"] * c["attention_head_dim"]
    if c["caption_projection_dim"] != dim:
        expected = f"{dim}, which is num_attention_heads x attention_head_dim"
        raise refused(where, "caption_projection_dim", c["caption_projection_dim"], expected)
    duals = c["dual_attention_layers"]
    numbers = range(c["num_layers"])
    if not isinstance(duals, list | tuple) or any(
        type(one) is not int or one not in numbers for one in duals
    ):
        expected = f"a list of numbers below num_layers={c['num_layers']}"
        raise refused(where, "dual_attention_layers", duals, expected)
