"""CLIP text encoders: CLIP-L of SD 1.x, OpenCLIP-H of SD 2.x, and the two encoders of SDXL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.core.params import NEW_TOKEN_ROLE, mark
from jaxft.core.sharding import constrain
from jaxft.kernels.attention.attention import attention
from jaxft.models.registry import Architecture
from jaxft.nn.linear import Embedding, Linear, gather_rows
from jaxft.nn.norm import LayerNorm
from jaxft.weights.fields import ANY, fields
from jaxft.weights.rules import Rule

FILE = "text_encoder/config.json"
LEGACY_EOS = 2  # configs from before transformers #24773, whose true end token is TRUE_EOS
TRUE_EOS = 49407
CLIP_VOCAB = 49408

# Defaults of transformers' CLIPTextConfig for keys that a config.json lacks.
DEFAULTS: dict[str, Any] = {
    "vocab_size": CLIP_VOCAB,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": TRUE_EOS,
}
VISION = r"vision_model\..*|visual_projection\.weight|logit_scale"  # of a whole CLIPModel
CLIP_ACTIVATIONS = ("quick_gelu", "gelu")


@dataclass(frozen=True)
class CLIPTextConfig:
    """The configuration of one text encoder. `projection_dim` is None without a projection.

    The ids of `new_tokens` follow the vocabulary. They have another table (textual inversion).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int
    projection_dim: int | None
    new_tokens: int = 0

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], projects: bool | None = None, where: str = FILE
    ) -> "CLIPTextConfig":
        """Read a config.json.

        projects: True if model_index.json names CLIPTextModelWithProjection. By default this is
        read from config.architectures. where: the name of the file in errors.
        Raises: UserError for values that are not supported.
        """
        if config.get("model_type", "clip") not in ("clip", "clip_text_model"):
            raise UserError(
                f"{where}: model_type={config['model_type']!r} is not supported; expected"
                " clip_text_model, a CLIP text encoder"
            )
        if projects is None:
            projects = "CLIPTextModelWithProjection" in str(config.get("architectures"))
        if config.get("model_type") == "clip":  # a whole CLIPModel: text and vision
            config = config.get("text_config") or {}
            if not isinstance(config, dict):
                raise UserError(f"{where}: text_config={config!r} has to be an object")
        # Without a projection its dim may be null.
        nulls: dict[str, Any] = {} if projects else {"projection_dim": None}
        get = fields(config, DEFAULTS, nulls, where, {"eos_token_id": ANY})
        if get["hidden_act"] not in CLIP_ACTIVATIONS:
            raise UserError(
                f"{where}: hidden_act={get['hidden_act']!r} is not one of"
                f" {', '.join(CLIP_ACTIVATIONS)}"
            )
        if not isinstance(get["eos_token_id"], int):
            raise UserError(f"{where}: eos_token_id={get['eos_token_id']!r} has to be one number")
        if get["hidden_size"] % get["num_attention_heads"]:
            raise UserError(
                f"{where}: hidden_size={get['hidden_size']} is no multiple of"
                f" num_attention_heads={get['num_attention_heads']}"
            )
        return cls(
            vocab_size=get["vocab_size"],
            hidden_size=get["hidden_size"],
            intermediate_size=get["intermediate_size"],
            num_layers=get["num_hidden_layers"],
            num_heads=get["num_attention_heads"],
            max_positions=get["max_position_embeddings"],
            hidden_act=get["hidden_act"],
            layer_norm_eps=get["layer_norm_eps"],
            eos_token_id=get["eos_token_id"],
            projection_dim=get["projection_dim"] if projects else None,
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def takes_highest_id(self) -> bool:
        """True if the pooled position is that of the highest id, as in legacy configs.

        It is False if tokens were added after the true end token: they have higher ids.
        """
        return self.eos_token_id == LEGACY_EOS and self.vocab_size <= CLIP_VOCAB


class EncodedText(NamedTuple):
    """The outputs of a text encoder.

    hidden: hidden_states[-(skip + 1)], without the final norm. normed: the final norm of `hidden`.
    pooled: the final norm of the last layer at the end token, projected if the model has a
    projection. It does not depend on skip.

    SD 1 and 2 use `normed`. SDXL uses `hidden` with skip=1, and `pooled` of its second encoder.
    """

    normed: Float[Array, "B T D"]
    hidden: Float[Array, "B T D"]
    pooled: Float[Array, "B P"]


class SmallTable(nnx.Module):
    """One vector for each position or new token. Its few rows are not sharded over `tensor`."""

    def __init__(self, rows: int, dim: int, *, key: PRNGKeyArray):
        table = 0.02 * jax.random.normal(key, (rows, dim))
        self.embedding = nnx.Param(table, axes=("length", "embed"))

    def __call__(self, numbers: Array, dtype: Any) -> Float[Array, "... D"]:
        return gather_rows(self.embedding[...].astype(dtype), numbers)


class CLIPAttention(nnx.Module):
    """Causal multi-head self-attention with biases. As in SD, padding is not masked."""

    def __init__(self, cfg: CLIPTextConfig, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        d, heads = (cfg.hidden_size,), (cfg.num_heads, cfg.head_dim)
        axes = ("embed", "heads", "head_dim")
        self.q_proj = Linear(d, heads, axes, key=keys[0], bias=True)
        self.k_proj = Linear(d, heads, axes, key=keys[1], bias=True)
        self.v_proj = Linear(d, heads, axes, key=keys[2], bias=True)
        self.out_proj = Linear(heads, d, (*axes[1:], "embed"), key=keys[3], bias=True)

    def __call__(self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None) -> Array:
        q, k, v = self.q_proj(x, keys), self.k_proj(x, keys), self.v_proj(x, keys)  # [B, T, N, H]
        return self.out_proj(attention(q, k, v, causal=True), keys)


class CLIPMLP(nnx.Module):
    """fc2(act(fc1 x)), where act is x sigmoid(1.702 x) or the exact (erf) GELU."""

    def __init__(self, cfg: CLIPTextConfig, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        d, f = (cfg.hidden_size,), (cfg.intermediate_size,)
        self.fc1 = Linear(d, f, ("embed", "mlp"), key=first, bias=True)
        self.fc2 = Linear(f, d, ("mlp", "embed"), key=second, bias=True)
        self.hidden_act = cfg.hidden_act

    def __call__(self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None) -> Array:
        h = self.fc1(x, keys)
        if self.hidden_act == "quick_gelu":
            h = h * jax.nn.sigmoid(1.702 * h)
        else:
            h = jax.nn.gelu(h, approximate=False)
        return self.fc2(h, keys)


class CLIPLayer(nnx.Module):
    """One pre-norm encoder layer."""

    def __init__(self, cfg: CLIPTextConfig, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        self.layer_norm1 = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.self_attn = CLIPAttention(cfg, key=first)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = CLIPMLP(cfg, key=second)

    def __call__(
        self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "B T D"]:
        x = x + self.self_attn(self.layer_norm1(x), keys)
        x = x + self.mlp(self.layer_norm2(x), keys)
        return constrain(x, "batch", "length", None)


class CLIPText(nnx.Module):
    """Token ids to hidden states. The layers are one stacked CLIPLayer, leaves [L, ...]."""

    def __init__(self, cfg: CLIPTextConfig, *, key: PRNGKeyArray):
        tokens, positions, layers, projection = jax.random.split(key, 4)
        d = cfg.hidden_size
        self.cfg = cfg
        self.token_embedding = Embedding(cfg.vocab_size, d, key=tokens)
        self.position_embedding = SmallTable(cfg.max_positions, d, key=positions)
        self.inversion = nnx.data(None)
        if cfg.new_tokens:
            # Not one key more from the split, which would change the other parameters.
            new = jax.random.fold_in(tokens, 1)
            self.inversion = nnx.data(SmallTable(cfg.new_tokens, d, key=new))
            mark(self.inversion, NEW_TOKEN_ROLE)
        keys = jax.random.split(layers, cfg.num_layers)
        self.layers = jax.vmap(lambda key: CLIPLayer(cfg, key=key))(keys)  # leaves [L, ...]
        self.final_layer_norm = LayerNorm(d, eps=cfg.layer_norm_eps)
        self.text_projection = nnx.data(None)
        if cfg.projection_dim is not None:
            shape, axes = (cfg.projection_dim,), ("embed", "mlp")
            self.text_projection = nnx.data(Linear((d,), shape, axes, key=projection, std=d**-0.5))

    def __call__(
        self,
        ids: Int[Array, "B T"],
        *,
        skip: int = 0,
        keys: PRNGKeyArray | None = None,
        unroll: int = 1,
        dtype: Any = jnp.float32,
    ) -> EncodedText:
        """Encode padded ids [B, T], T <= max_positions, computing in `dtype`.

        skip: the number of last layers that `normed` and `hidden` leave out. It is diffusers'
        clip_skip, which for SDXL means one layer more. keys: one a row, for the dropout of
        adapters. unroll: layers in one iteration of the scan.
        Raises: UserError for a skip that is too large and for too many tokens.
        """
        count, length = self.cfg.num_layers, ids.shape[1]
        if not 0 <= skip <= count:
            raise UserError(f"clip skip {skip} is not between 0 and {count}, the encoder's layers")
        if length > self.cfg.max_positions:
            raise UserError(
                f"{length} tokens are more than the text encoder's {self.cfg.max_positions}"
                " positions; truncate the captions"
            )
        x = self._tokens(ids, dtype) + self.position_embedding(jnp.arange(length), dtype)
        x = constrain(x, "batch", "length", None)
        x, hidden = self._scan(x, count - skip, keys, unroll)
        last = self.final_layer_norm(x)
        normed = last if skip == 0 else self.final_layer_norm(hidden)
        return EncodedText(normed, hidden, self._pool(last, ids, keys))

    def _tokens(self, ids: Array, dtype: Any) -> Array:
        """Return rows of the vocabulary's table, and for ids after it rows of the new tokens'."""
        if self.inversion is None:
            return self.token_embedding(ids, dtype)
        number = ids - self.cfg.vocab_size  # of a new token, negative for the vocabulary
        old = self.token_embedding(jnp.where(number < 0, ids, 0), dtype)
        new = self.inversion(jnp.maximum(number, 0), dtype)
        return jnp.where((number < 0)[..., None], old, new)

    def _scan(
        self, x: Array, wanted: int, keys: PRNGKeyArray | None, unroll: int
    ) -> tuple[Array, Array]:
        """Return the output of the last layer and of layer number `wanted` (0: the embeddings)."""

        def body(carry: tuple[Array, Array], xs: tuple[CLIPLayer, Array]) -> tuple:
            (x, hidden), (block, number) = carry, xs
            own = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            x = block(x, own)
            # A scan runs all layers, so the output of `wanted` is kept on the way.
            return (x, jnp.where(number == wanted, x, hidden)), None

        numbers = jnp.arange(1, self.cfg.num_layers + 1)
        (x, hidden), _ = jax.lax.scan(body, (x, x), (self.layers, numbers), unroll=unroll)
        return x, hidden

    def _pool(self, last: Array, ids: Array, keys: PRNGKeyArray | None) -> Array:
        """Return the state at the first end token, or at the highest id for legacy configs."""
        legacy = self.cfg.eos_token_id == LEGACY_EOS
        end = TRUE_EOS if legacy else self.cfg.eos_token_id
        score = ids if self.cfg.takes_highest_id else (ids == end).astype(jnp.int32)
        place = jnp.argmax(score, axis=-1)  # [B], the first maximum
        pooled = jnp.take_along_axis(last, place[:, None, None], axis=1)[:, 0]  # [B, D]
        return pooled if self.text_projection is None else self.text_projection(pooled, keys)


def encode_chunks(
    encoder: CLIPText,
    ids: Int[Array, "B T"],
    skip: int = 0,
    keys: PRNGKeyArray | None = None,
    dtype: Any = jnp.float32,
) -> EncodedText:
    """Encode ids that may be several times the encoder's positions, each chunk [B, T / n] alone.

    States are joined along the tokens [B, T, D]. `pooled` is that of the first chunk. Chunks of a
    row have the same key. Other arguments are as in `CLIPText`.
    """
    rows, length = ids.shape
    n = max(1, length // encoder.cfg.max_positions)
    if n == 1:
        return encoder(ids, skip=skip, keys=keys, dtype=dtype)
    chunks = ids.reshape(rows * n, length // n)  # [B n, T / n]
    every = None if keys is None else keys[jnp.arange(rows * n) // n]  # [B n]
    made = encoder(chunks, skip=skip, keys=every, dtype=dtype)
    normed, hidden = (x.reshape(rows, length, -1) for x in made[:2])  # [B, T, D]
    return EncodedText(normed, hidden, made.pooled[::n])


def sizes(cfg: CLIPTextConfig) -> dict[str, int]:
    """Return the dims that RULES' layouts name."""
    return {"n": cfg.num_heads, "h": cfg.head_dim}


def ignore(cfg: CLIPTextConfig) -> tuple[str, ...]:
    """Return regexes of tensors that transformers does not read from a text encoder's file.

    They are position ids of old files, the other half of a whole CLIPModel, layers beyond the
    config's, and a projection where the model's class has none.
    """
    layers = "|".join(map(str, range(cfg.num_layers)))
    return (
        r"(text_model\.)?embeddings\.position_ids",
        rf"(text_model\.)?encoder\.layers\.(?!({layers})\.)\d+\..*",
        VISION,
        *(() if cfg.projection_dim is not None else (r"text_projection(\.weight)?",)),
    )


_A, _J = "encoder.layers.{i}.self_attn.", "layers.self_attn."
_INNER = (
    Rule("embeddings.token_embedding.weight", "token_embedding.embedding"),
    Rule("embeddings.position_embedding.weight", "position_embedding.embedding"),
    *(
        rule
        for name in "qkv"
        for rule in (
            Rule(f"{_A}{name}_proj.weight", f"{_J}{name}_proj.kernel", "(n h) d -> d n h"),
            Rule(f"{_A}{name}_proj.bias", f"{_J}{name}_proj.bias", "(n h) -> n h"),
        )
    ),
    Rule(_A + "out_proj.weight", _J + "out_proj.kernel", "d (n h) -> n h d"),
    Rule(_A + "out_proj.bias", _J + "out_proj.bias"),
    Rule("encoder.layers.{i}.mlp.fc{n}.weight", "layers.mlp.fc{n}.kernel", "o i -> i o"),
    Rule("encoder.layers.{i}.mlp.fc{n}.bias", "layers.mlp.fc{n}.bias"),
    Rule("encoder.layers.{i}.layer_norm{n}.weight", "layers.layer_norm{n}.scale"),
    Rule("encoder.layers.{i}.layer_norm{n}.bias", "layers.layer_norm{n}.bias"),
    Rule("final_layer_norm.weight", "final_layer_norm.scale"),
    Rule("final_layer_norm.bias", "final_layer_norm.bias"),
)
# transformers 5 writes CLIPTextModel without the prefix, which older versions cannot read.
RULES = (
    *(rule._replace(key="text_model." + rule.key) for rule in _INNER),
    *_INNER,
    Rule("text_projection.weight", "text_projection.kernel", "p d -> d p"),
)

PROJECTED = "CLIPTextModelWithProjection"
ARCHITECTURE = Architecture(
    family="text_encoder",
    class_name=lambda config: (
        PROJECTED if PROJECTED in (config.get("architectures") or ()) else "CLIPTextModel"
    ),
    config=lambda config, where: CLIPTextConfig.from_hf(config, where=where),
    module=CLIPText,
    rules=lambda cfg: RULES,
    sizes=sizes,
    ignore=ignore,
)
