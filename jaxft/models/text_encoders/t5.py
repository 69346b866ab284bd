"""The encoder of T5 v1.1 (T5-XXL of Stable Diffusion 3 and FLUX.1): token ids to hidden states.

Source: Raffel et al. 2019, arXiv:1910.10683, with the gated MLP of Shazeer 2020, arXiv:2002.05202.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.sharding import constrain
from jaxft.kernels.elementwise import recomputed
from jaxft.kernels.loops import unrolls
from jaxft.models.registry import Architecture
from jaxft.nn.linear import Embedding, Linear, gather_rows
from jaxft.nn.norm import RMSNorm
from jaxft.weights.fields import fields, refused
from jaxft.weights.folders.transformers import Source
from jaxft.weights.rules import Rule
from jaxft.weights.views import Renamed

FILE = "text_encoder_3/config.json"

# Defaults of transformers' T5Config for keys that a config.json lacks.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "pad_token_id": 0,
    "eos_token_id": 1,
}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # transformers' names of one function
SHARED, TIED_COPY = "shared.weight", "encoder.embed_tokens.weight"  # names of one table


@dataclass(frozen=True)
class T5EncoderConfig:
    """The configuration of one T5 encoder. heads x head_dim may differ from hidden_size.

    num_buckets: distances between tokens that have a bias of their own, half of them for keys after
    the query. Distances from max_distance on share the last one. max_positions: the tokens of a
    caption, which a pipeline decides. The encoder takes any number.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    num_buckets: int
    max_distance: int
    eps: float
    pad_token_id: int
    eos_token_id: int
    max_positions: int = 512

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> "T5EncoderConfig":
        """Read the config.json of a T5 encoder, or of a whole T5 whose decoder is left out.

        Raises: UserError for values that no layer here computes.
        """
        if config.get("model_type", "t5") != "t5":
            raise refused(where, "model_type", config["model_type"], "t5")
        c = fields(config, DEFAULTS, {}, where)
        _check_mlp(config, c["feed_forward_proj"], where)
        buckets, most = c["relative_attention_num_buckets"], c["relative_attention_max_distance"]
        # A quarter of the buckets are exact. Logarithms need one of these, and some distance.
        if buckets % 4 or most <= buckets // 4:
            expected = f"a multiple of 4 below 4 x relative_attention_max_distance={most}"
            raise refused(where, "relative_attention_num_buckets", buckets, expected)
        return cls(
            vocab_size=c["vocab_size"],
            hidden_size=c["d_model"],
            intermediate_size=c["d_ff"],
            num_layers=c["num_layers"],
            num_heads=c["num_heads"],
            head_dim=c["d_kv"],
            num_buckets=buckets,
            max_distance=most,
            eps=c["layer_norm_epsilon"],
            pad_token_id=c["pad_token_id"],
            eos_token_id=c["eos_token_id"],
        )


def _check_mlp(config: Mapping[str, Any], name: str, where: str) -> None:
    """Raise UserError for another MLP than that of T5 v1.1. name: feed_forward_proj.

    In transformers, the keys is_gated_act and dense_act_fn have priority over it.
    """
    own = {
        "is_gated_act": name.startswith("gated-"),
        "dense_act_fn": TANH_GELU[0] if name == "gated-gelu" else name.rpartition("-")[2],
    }
    for key, values in (("is_gated_act", (True,)), ("dense_act_fn", TANH_GELU)):
        if key in config and config[key] not in values:
            raise refused(where, key, config[key], f"{values[0]!r}, that of T5 v1.1")
        if key not in config and own[key] not in values:
            raise refused(where, "feed_forward_proj", name, "'gated-gelu', that of T5 v1.1")


class T5Attention(nnx.Module):
    """Self-attention of all tokens, padding included, with a bias on the scores and no scale."""

    def __init__(self, cfg: T5EncoderConfig, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        d, heads = (cfg.hidden_size,), (cfg.num_heads, cfg.head_dim)
        axes, std = ("embed", "heads", "head_dim"), cfg.hidden_size**-0.5
        wide = (cfg.num_heads * cfg.head_dim) ** -0.5
        # The scores have no 1 / sqrt(head_dim). It is in the start of q instead.
        self.q = Linear(d, heads, axes, key=keys[0], std=std * cfg.head_dim**-0.5)
        self.k = Linear(d, heads, axes, key=keys[1], std=std)
        self.v = Linear(d, heads, axes, key=keys[2], std=std)
        self.o = Linear(heads, d, (*axes[1:], "embed"), key=keys[3], std=wide)

    def __call__(
        self, x: Float[Array, "B T D"], bias: Float[Array, "N T T"], keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        q, k, v = self.q(x, keys), self.k(x, keys), self.v(x, keys)  # [B, T, N, H]
        # No flash kernel takes a bias that trains. Captions are short, so all scores are computed.
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(v.dtype)  # [B, N, T, S]
        return self.o(jnp.einsum("bnts,bsnh->btnh", weights, v), keys)


class T5MLP(nnx.Module):
    """wo(gelu(wi_0 x) * wi_1 x), with the tanh form of GELU.

    transformers keeps `wo` in fp32 for float16 models, because its outputs exceed float16's range.
    Nothing here is computed in float16, and bfloat16 has the range of fp32.
    """

    def __init__(self, cfg: T5EncoderConfig, *, key: PRNGKeyArray):
        keys, std = jax.random.split(key, 3), cfg.hidden_size**-0.5
        d, f = (cfg.hidden_size,), (cfg.intermediate_size,)
        self.wi_0 = Linear(d, f, ("embed", "mlp"), key=keys[0], std=std)
        self.wi_1 = Linear(d, f, ("embed", "mlp"), key=keys[1], std=std)
        self.wo = Linear(f, d, ("mlp", "embed"), key=keys[2], std=cfg.intermediate_size**-0.5)

    def __call__(self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None) -> Array:
        return self.wo(recomputed(_gated)(self.wi_0(x, keys), self.wi_1(x, keys)), keys)


def _gated(gate: Array, value: Array) -> Array:
    return jax.nn.gelu(gate, approximate=True) * value


class T5Layer(nnx.Module):
    """One pre-norm encoder layer. Its norms divide by the root mean square, without a mean."""

    def __init__(self, cfg: T5EncoderConfig, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        self.attn_norm = RMSNorm(cfg.hidden_size, eps=cfg.eps)
        self.attn = T5Attention(cfg, key=first)
        self.mlp_norm = RMSNorm(cfg.hidden_size, eps=cfg.eps)
        self.mlp = T5MLP(cfg, key=second)

    def __call__(
        self, x: Float[Array, "B T D"], bias: Float[Array, "N T T"], keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        x = x + self.attn(self.attn_norm(x), bias, keys)
        x = x + self.mlp(self.mlp_norm(x), keys)
        return constrain(x, "batch", "length", None)


class T5Encoder(nnx.Module):
    """Token ids to hidden states. The layers are one stacked T5Layer, leaves [L, ...].

    `distance_bias` [buckets, N] is the bias of scores by distance. The file has it in its first
    block, and all layers use it.
    """

    def __init__(self, cfg: T5EncoderConfig, *, key: PRNGKeyArray):
        tokens, biases, layers = jax.random.split(key, 3)
        self.cfg = cfg
        self.token_embedding = Embedding(cfg.vocab_size, cfg.hidden_size, key=tokens, std=1.0)
        shape, std = (cfg.num_buckets, cfg.num_heads), cfg.hidden_size**-0.5
        table = std * jax.random.normal(biases, shape)
        self.distance_bias = nnx.Param(table, axes=(None, "heads"))
        keys = jax.random.split(layers, cfg.num_layers)
        self.layers = jax.vmap(lambda key: T5Layer(cfg, key=key))(keys)  # leaves [L, ...]
        self.final_layer_norm = RMSNorm(cfg.hidden_size, eps=cfg.eps)

    def __call__(
        self,
        ids: Int[Array, "B T"],
        *,
        keys: PRNGKeyArray | None = None,
        dtype: Any = jnp.float32,
    ) -> Float[Array, "B T D"]:
        """Return the last hidden states after the final norm, in `dtype`.

        ids: padded to any length. Padding is attended to, as in the pipelines of diffusers. keys:
        one a row, for the dropout of adapters.
        """
        x = constrain(self.token_embedding(ids, dtype), "batch", "length", None)
        numbers = distance_buckets(ids.shape[1], self.cfg)  # [T, S]
        table = self.distance_bias[...].astype(jnp.float32)
        bias = gather_rows(table, jnp.asarray(numbers)).transpose(2, 0, 1)  # [N, T, S]

        def body(x: Array, xs: tuple[T5Layer, Array]) -> tuple[Array, None]:
            layer, number = xs
            own = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            return layer(x, bias, own), None

        count = self.cfg.num_layers
        unroll = 0 if unrolls(count) else 1
        x, _ = jax.lax.scan(body, x, (self.layers, jnp.arange(count)), unroll=unroll)
        return self.final_layer_norm(x)


def distance_buckets(length: int, cfg: T5EncoderConfig) -> Int[np.ndarray, "T T"]:
    """Return the bucket of the distance from each query (row) to each key (column).

    The lower half is for keys up to the query, the upper half for keys after it. Within a half, the
    first distances have a bucket each, and longer ones share buckets of growing width.
    """
    places = np.arange(length)
    distance = places[None] - places[:, None]  # [T, S]
    half = cfg.num_buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact)
    # In fp32 and in this order, as in transformers: a distance at a border is rounded alike.
    share = np.log(far) / np.float32(math.log(cfg.max_distance / exact)) * np.float32(half - exact)
    wide = np.minimum(exact + share.astype(np.int32), half - 1)
    near = np.abs(distance)
    return np.where(near < exact, near, wide) + half * (distance > 0)


def sizes(cfg: T5EncoderConfig) -> dict[str, int]:
    """Return the dims that RULES' layouts name."""
    return {"n": cfg.num_heads, "h": cfg.head_dim}


# Tensors of a whole T5, of which an encoder has no use.
IGNORE = (r"decoder\..*", r"lm_head\.weight")
_A, _M = "encoder.block.{i}.layer.0.", "encoder.block.{i}.layer.1."
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
RULES = (
    Rule(SHARED, "token_embedding.embedding"),
    Rule(TIED_COPY, "token_embedding.embedding"),
    Rule(_BIAS, "distance_bias"),
    Rule(_A + "layer_norm.weight", "layers.attn_norm.scale"),
    Rule(_A + "SelfAttention.q.weight", "layers.attn.q.kernel", "(n h) d -> d n h"),
    Rule(_A + "SelfAttention.k.weight", "layers.attn.k.kernel", "(n h) d -> d n h"),
    Rule(_A + "SelfAttention.v.weight", "layers.attn.v.kernel", "(n h) d -> d n h"),
    Rule(_A + "SelfAttention.o.weight", "layers.attn.o.kernel", "d (n h) -> n h d"),
    Rule(_M + "layer_norm.weight", "layers.mlp_norm.scale"),
    Rule(_M + "DenseReluDense.wi_{n}.weight", "layers.mlp.wi_{n}.kernel", "o i -> i o"),
    Rule(_M + "DenseReluDense.wo.weight", "layers.mlp.wo.kernel", "o i -> i o"),
    Rule("encoder.final_layer_norm.weight", "final_layer_norm.scale"),
)


def without_copy(source: Source) -> Source:
    """Return a source without the second name of its table of tokens, if it has both.

    Old versions of transformers wrote the tied table twice. transformers 5 reads the first name.
    """
    if source.tensors is None or not {SHARED, TIED_COPY} <= set(source.tensors.keys()):
        return source
    kept = {key: key for key in source.tensors.keys() if key != TIED_COPY}  # noqa: SIM118
    return replace(source, tensors=Renamed(source.tensors, kept))


ARCHITECTURE = Architecture(
    family="text_encoder",
    class_name=lambda config: "T5EncoderModel",
    config=T5EncoderConfig.from_hf,
    module=T5Encoder,
    rules=lambda cfg: RULES,
    sizes=sizes,
    ignore=lambda cfg: IGNORE,
    opened=without_copy,
)
