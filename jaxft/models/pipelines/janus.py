"""Janus: a language model with a further table, aligner and head for the codes of an image.

Only the parts that generate images are here. An export copies the parts that understand images, and
the output head of text.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.kernels.cross_entropy import linear_cross_entropy
from jaxft.models import registry
from jaxft.models.autoencoders.vq_config import JANUS as VQ_KIND
from jaxft.models.autoencoders.vq_config import VQConfig
from jaxft.models.decoders import decoder
from jaxft.models.decoders.config import DecoderConfig
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.families import llama
from jaxft.models.pipelines.image_decode import score
from jaxft.models.registry import Architecture
from jaxft.nn.linear import Linear, gather_rows
from jaxft.weights.rules import Rule, renamed

KIND, CLASS_NAME = "janus", "JanusForConditionalGeneration"

# Defaults of transformers' vision_config and vq_config for keys that a config.json lacks.
VISION_DEFAULTS = {"image_size": 384, "patch_size": 16, "num_image_tokens": 576}
VQ_DEFAULTS: dict[str, Any] = {
    "projection_dim": 2048,
    "image_token_embed_dim": 2048,
    "num_hidden_layers": 2,
    "hidden_act": "gelu",
}


@dataclass(frozen=True)
class JanusConfig:
    """The configuration of the parts that generate images.

    text: the language model. It is tied, because the head of text is not one of its parameters.
    vq: the image tokenizer. depth: layers of the aligner. grid: codes a side of an image.
    """

    text: DecoderConfig
    vq: VQConfig
    depth: int
    grid: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> "JanusConfig":
        """Read a config.json of model_type janus.

        Raises: UserError for values that no layer here computes.
        """
        if config.get("model_type") != KIND:
            raise UserError(f"{where}: model_type={config.get('model_type')!r} is not {KIND!r}")
        vision = {**VISION_DEFAULTS, **(config.get("vision_config") or {})}
        vq = {**VQ_DEFAULTS, **(config.get("vq_config") or {})}
        _check_sizes("vision_config", vision, VISION_DEFAULTS, where)
        _check_sizes("vq_config", vq, VQ_DEFAULTS.keys() - {"hidden_act"}, where)
        text = registry.read_decoder({"model_type": "llama", **(config.get("text_config") or {})})
        grid = vision["image_size"] // vision["patch_size"]
        _check(vq, vision, text.hidden_size, grid, where)
        return cls(
            text=replace(text, tied=True),
            vq=VQConfig.from_hf({**vq, "model_type": VQ_KIND, "num_patches": grid}, where),
            depth=vq["num_hidden_layers"],
            grid=grid,
        )


def _check_sizes(section: str, values: Mapping, keys: Iterable[str], where: str) -> None:
    for key in keys:
        if type(values[key]) is not int or values[key] < 1:
            raise UserError(
                f"{where}: {section}.{key}={values[key]!r}; expected a whole number above 0, or"
                " leave the key out"
            )


def _check(vq: Mapping, vision: Mapping, width: int, grid: int, where: str) -> None:
    for key in ("projection_dim", "image_token_embed_dim"):
        if vq[key] != width:
            raise UserError(
                f"{where}: vq_config.{key}={vq[key]} must be text_config.hidden_size={width}"
            )
    if vq["hidden_act"] != "gelu":
        raise UserError(
            f"{where}: vq_config.hidden_act={vq['hidden_act']!r} is not supported, only gelu"
        )
    if vision["num_image_tokens"] != grid**2:
        raise UserError(
            f"{where}: vision_config.num_image_tokens={vision['num_image_tokens']} is not the"
            f" {grid}x{grid} that image_size={vision['image_size']} and"
            f" patch_size={vision['patch_size']} make; transformers draws a square of them"
        )


class CodeTable(nnx.Module):
    """A row for each code, other than the tokenizer's codebook. It is replicated on all devices."""

    def __init__(self, codes: int, dim: int, *, key: PRNGKeyArray, std: float):
        table = std * jax.random.normal(key, (codes, dim))
        self.embedding = nnx.Param(table, axes=(None, None))

    def __call__(self, codes: Int[Array, "..."], dtype: Any = None) -> Float[Array, "... C"]:
        table: Array = self.embedding[...]
        return gather_rows(table if dtype is None else table.astype(dtype), codes)


class Aligner(nnx.Module):
    """Rows of codes to the language model's width: linear layers with exact GELU between them."""

    def __init__(self, cfg: JanusConfig, *, key: PRNGKeyArray):
        d, std = (cfg.text.hidden_size,), cfg.text.initializer_range
        first, *keys = jax.random.split(key, cfg.depth)
        inputs = (cfg.vq.code_dim,)
        self.fc1 = Linear(inputs, d, (None, "mlp"), key=first, bias=True, std=std)
        axes = ("mlp", "embed")
        layers = [Linear(d, d, axes, key=one, bias=True, std=std) for one in keys]
        self.hidden_layers = nnx.List(layers)

    def __call__(
        self, x: Float[Array, "... C"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "... D"]:
        x = self.fc1(x, keys)
        for layer in self.hidden_layers:
            x = layer(jax.nn.gelu(x, approximate=False), keys)
        return x


class CodeHead(nnx.Module):
    """Hidden states to logits of codes: linear, exact GELU, linear."""

    def __init__(self, cfg: JanusConfig, *, key: PRNGKeyArray):
        d, v, std = (cfg.text.hidden_size,), (cfg.vq.codes,), cfg.text.initializer_range
        first, second = jax.random.split(key)
        self.proj_out = Linear(d, d, ("embed", "mlp"), key=first, bias=True, std=std)
        self.vision_head = Linear(d, v, ("embed", "vocab"), key=second, bias=True, std=std)

    def features(
        self, hidden: Float[Array, "... D"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "... E"]:
        """Return the input of the last layer. keys: one a row, for the dropout of adapters."""
        x = jax.nn.gelu(self.proj_out(hidden, keys), approximate=False)
        return self.vision_head.wide_input(x, keys)

    def last(self) -> tuple[Float[Array, "E V"], Float[Array, "V"]]:
        """Return the kernel and bias of the last layer."""
        assert self.vision_head.bias is not None
        return self.vision_head.wide_kernel(), self.vision_head.bias[...]


class Janus(nnx.Module):
    """Prompts and codes to the codes that follow. Implements `image_decode.CodeModel`."""

    def __init__(self, cfg: JanusConfig, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.cfg = cfg
        self.language_model = Decoder(cfg.text, key=keys[0])
        std, dim = cfg.text.initializer_range, cfg.vq.code_dim
        self.generation_embeddings = CodeTable(cfg.vq.codes, dim, key=keys[1], std=std)
        self.generation_aligner = Aligner(cfg, key=keys[2])
        self.generation_head = CodeHead(cfg, key=keys[3])

    @property
    def decoder(self) -> Decoder:
        return self.language_model

    def embed(
        self,
        tokens: Int[Array, "B T"],
        images: Bool[Array, "B T"],
        dtype: Any,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the embeddings of tokens, which are codes where `images`, and else ids of text."""
        # Both tables are read at every token. The id of the other kind is replaced, since it may be
        # outside of the table.
        rows = self.generation_embeddings(jnp.where(images, tokens, 0), dtype)  # [B, T, C]
        codes = self.generation_aligner(rows, keys)
        text = self.language_model.embed_tokens(jnp.where(images, 0, tokens), dtype)
        return jnp.where(images[..., None], codes, text)

    def embed_codes(self, codes: Int[Array, "..."], dtype: Any) -> Float[Array, "... D"]:
        return self.generation_aligner(self.generation_embeddings(codes, dtype))

    def cross_entropy(
        self,
        hidden: Float[Array, "B S D"],
        targets: Int[Array, "B S"],
        weights: Float[Array, "B S"],
        z_loss: float,
        keys: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Return `linear_cross_entropy` of codes."""
        kernel, bias = self.generation_head.last()
        features = self.generation_head.features(hidden, keys)
        return linear_cross_entropy(
            features, kernel, targets, weights, vocab_first=False, z_loss=z_loss, bias=bias
        )

    def scorer(self) -> Callable[[Float[Array, "B D"]], Float[Array, "B K"]]:
        head, (kernel, bias) = self.generation_head, self.generation_head.last()
        return lambda hidden: score(head.features(hidden), kernel, bias.astype(jnp.float32))


def known(key: str) -> bool:
    """Return True if transformers' class has a tensor of this name."""
    return any(re.fullmatch(name, key) for name in _OTHERS) or bool(renamed(RULES, key))


def flops_per_token(cfg: JanusConfig, length: int) -> float:
    """Return the matmul FLOPs of one token's forward pass in a row of `length`.

    The head is that of codes.
    """
    d = cfg.text.hidden_size
    # The aligner: depth - 1 matrices [D, D] and one [C, D]. The head has one more [D, D].
    own = cfg.depth * d * d + cfg.vq.code_dim * d
    return decoder.flops_per_token(replace(cfg.text, vocab_size=cfg.vq.codes), length) + 2.0 * own


# Tensors that fill no parameter here: understanding of images, the head of text, the tokenizer.
VQ = "model.vqmodel."
_OTHERS = (
    r"lm_head\.weight",
    r"model\.vision_model\..*",
    r"model\.aligner\..*",
    r"model\.vqmodel\..*",
)
CARRIED = (*_OTHERS, r".*rotary_emb\.inv_freq")
_LM, _DENSE = "language_model.", "o i -> i o"
RULES = (
    *(
        Rule(rule.key.replace("model.", f"model.{_LM}", 1), _LM + rule.path, rule.layout)
        for rule in llama.RULES
        if rule.key != "lm_head.weight"
    ),
    Rule("model.generation_embeddings.weight", "generation_embeddings.embedding"),
    *(
        rule
        for name in (
            "aligner.fc1",
            "aligner.hidden_layers.{n}",
            "head.proj_out",
            "head.vision_head",
        )
        for rule in (
            Rule(f"model.generation_{name}.weight", f"generation_{name}.kernel", _DENSE),
            Rule(f"model.generation_{name}.bias", f"generation_{name}.bias"),
        )
    ),
)
ARCHITECTURE = Architecture(
    family="image_tokens",
    class_name=lambda config: CLASS_NAME,
    config=JanusConfig.from_hf,
    module=Janus,
    rules=lambda cfg: RULES,
    sizes=lambda cfg: llama.sizes(cfg.text),
    ignore=lambda cfg: CARRIED,
    flops=flops_per_token,
    lora=r"language_model\..*_proj",
)
