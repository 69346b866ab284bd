"""LLaMA-family causal language models: Llama, Mistral, Qwen 2, Qwen 3 and SmolLM 3."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.sharding import constrain
from jaxft.kernels.attention import attention
from jaxft.kernels.loops import unrolls, unstacks
from jaxft.models.decoders.llama_config import LlamaConfig
from jaxft.nn import rope
from jaxft.nn.linear import Embedding, Linear
from jaxft.nn.norm import RMSNorm
from jaxft.weights.rules import Rule

UNLIMITED = 2**30  # the window of a full-attention layer among windowed ones


class Cache(NamedTuple):
    """Keys and values of all layers (L, B, K, S, H), or of each (B, K, S, H) where those are apart;
    the slots' segments (0 = empty or padding); the slot that the next token goes to.
    Heads before slots, as attention multiplies them."""

    k: Float[Array, "L B K S H"] | tuple[Float[Array, "B K S H"], ...]
    v: Float[Array, "L B K S H"] | tuple[Float[Array, "B K S H"], ...]
    segments: Int[Array, "B S"]
    index: Int[Array, ""]


def init_cache(
    cfg: LlamaConfig, batch: int, length: int, dtype: Any = jnp.float32, apart: bool = False
) -> Cache:
    """An empty cache for `length` slots a row, padding included; of layers `apart` or stacked."""
    one = jnp.zeros((batch, cfg.num_kv_heads, length, cfg.head_dim), dtype)
    empty = (one,) * cfg.num_layers if apart else jnp.stack([one] * cfg.num_layers)
    return Cache(empty, empty, jnp.zeros((batch, length), jnp.int32), jnp.int32(0))


def lengthened(cache: Cache, length: int) -> Cache:
    """The same cache with empty slots behind its own, `length` in all."""
    new = length - cache.segments.shape[1]

    def longer(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, new), (0, 0)])

    k, v = jax.tree.map(longer, (cache.k, cache.v))
    return cache._replace(k=k, v=v, segments=jnp.pad(cache.segments, ((0, 0), (0, new))))


class Context(NamedTuple):
    """What every layer of one call shares."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    q_segments: Int[Array, "B T"] | None
    kv_segments: Int[Array, "B S"] | None
    index: Int[Array, ""]


class Layer(NamedTuple):
    """What differs from layer to layer; None where all layers agree."""

    index: Int[Array, ""] | int
    rotates: Array | bool
    window: Array | int | None


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions (Qwen 3 norms each head too)."""

    def __init__(self, cfg: LlamaConfig, *, key: PRNGKeyArray):
        d, h, std = (cfg.hidden_size,), cfg.head_dim, cfg.initializer_range
        keys = jax.random.split(key, 4)
        q_shape, kv_shape = (cfg.num_heads, h), (cfg.num_kv_heads, h)
        axes, bias = ("embed", "heads", "head_dim"), cfg.qkv_bias
        self.q_proj = Linear(d, q_shape, axes, key=keys[0], bias=bias, std=std)
        self.k_proj = Linear(d, kv_shape, axes, key=keys[1], bias=bias, std=std)
        self.v_proj = Linear(d, kv_shape, axes, key=keys[2], bias=bias, std=std)
        axes = ("heads", "head_dim", "embed")
        self.o_proj = Linear(q_shape, d, axes, key=keys[3], bias=cfg.o_bias, std=std)
        self.q_norm = nnx.data(RMSNorm(h, eps=cfg.rms_norm_eps) if cfg.qk_norm else None)
        self.k_norm = nnx.data(RMSNorm(h, eps=cfg.rms_norm_eps) if cfg.qk_norm else None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Layer,
        context: Context,
        cache: tuple[Array, Array] | None,
        keys: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        q, k, v = self.q_proj(x, keys), self.k_proj(x, keys), self.v_proj(x, keys)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if layer.rotates is not False:
            cos, sin = _unless_fixed(layer.rotates, context)
            q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        slots = None
        if cache is not None:
            cache, k, v = _remember(cache, k, v, layer.index, context.index)
            slots = context.index + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        out = attention(
            q,
            k,
            v,
            causal=True,
            q_positions=slots,
            q_segments=context.q_segments,
            kv_segments=context.kv_segments,
            window=layer.window,
        )
        return self.o_proj(out, keys), cache


def _unless_fixed(rotates: Array | bool, context: Context) -> tuple[Array, Array]:
    """The layer's cos and sin: the identity where a traced `rotates` is false."""
    if rotates is True:
        return context.cos, context.sin
    return jnp.where(rotates, context.cos, 1.0), jnp.where(rotates, context.sin, 0.0)


def _remember(
    cache: tuple[Array, Array], k: Array, v: Array, layer: Array | int, index: Array
) -> tuple[tuple[Array, Array], Array, Array]:
    """Write this call's k and v in place (only T slots move) and read the layer's whole history."""

    def write(old: Array, new: Array) -> Array:
        new, start = new.swapaxes(1, 2).astype(old.dtype), (0, 0, index, 0)
        if old.ndim == new.ndim:
            return jax.lax.dynamic_update_slice(old, new, start)
        return jax.lax.dynamic_update_slice(old, new[None], (layer, *start))

    def read(x: Array) -> Array:
        own = x if x.ndim == k.ndim else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        return own.swapaxes(1, 2).astype(k.dtype)

    written = write(cache[0], k), write(cache[1], v)
    return written, read(written[0]), read(written[1])


class MLP(nnx.Module):
    """down(silu(gate x) * up x): SwiGLU, Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, cfg: LlamaConfig, *, key: PRNGKeyArray):
        d, f = (cfg.hidden_size,), (cfg.intermediate_size,)
        gate, up, down = jax.random.split(key, 3)
        bias, std = cfg.mlp_bias, cfg.initializer_range
        self.gate_proj = Linear(d, f, ("embed", "mlp"), key=gate, bias=bias, std=std)
        self.up_proj = Linear(d, f, ("embed", "mlp"), key=up, bias=bias, std=std)
        self.down_proj = Linear(f, d, ("mlp", "embed"), key=down, bias=bias, std=std)

    def __call__(self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None) -> Array:
        return self.down_proj(_gated(self.gate_proj(x, keys), self.up_proj(x, keys)), keys)


@jax.checkpoint
def _gated(gate: Array, up: Array) -> Array:
    """Made again for gradients, which else keep three more arrays of this size."""
    return jax.nn.silu(gate) * up


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, cfg: LlamaConfig, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        self.input_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, key=first)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.mlp = MLP(cfg, key=second)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Layer,
        context: Context,
        cache: tuple[Array, Array] | None = None,
        keys: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        x = checkpoint_name(x, "block_input")
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, layer.index)
        attended, cache = self.self_attn(self.input_layernorm(x), layer, context, cache, keys)
        x = x + attended
        x = x + self.mlp(self.post_attention_layernorm(x), keys)
        return constrain(x, "batch", "length", None), cache


class Llama(nnx.Module):
    """Token ids to logits. Layers are one stacked Block (leaves (L, ...)) run by a scan.

    Calling the model gives fp32 logits (B, T, V) for notebooks; training goes through `hidden` and
    `head`, so that the logits never exist whole.
    """

    def __init__(self, cfg: LlamaConfig, *, key: PRNGKeyArray):
        embed, layers, head = jax.random.split(key, 3)
        d, v, std = cfg.hidden_size, cfg.vocab_size, cfg.initializer_range
        self.cfg = cfg
        self.embed_tokens = Embedding(v, d, key=embed, std=std)
        keys = jax.random.split(layers, cfg.num_layers)
        self.layers = jax.vmap(lambda key: Block(cfg, key=key))(keys)
        self.norm = RMSNorm(d, eps=cfg.rms_norm_eps)
        untied = None if cfg.tied else Linear((d,), (v,), ("embed", "vocab"), key=head, std=std)
        self.lm_head = nnx.data(untied)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        hidden, _ = self.hidden(tokens, positions, segment_ids)
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        embeds: Float[Array, "B T D"] | None = None,
        cache: Cache | None = None,
        keys: PRNGKeyArray | None = None,
        remat: str = "none",
        unroll: int | None = None,
        dtype: Any = None,
        blocks: tuple[Block, ...] = (),
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The final norm's output (B, T, D) in `dtype`, and the cache with these tokens in it.

        positions: what rotates, default 0, 1, ... (with a cache: the count of real tokens before).
        segment_ids: tokens see their own segment only; 0 is padding; default one segment.
        embeds: in place of tokens. keys: one a row, turn adapter dropout on. remat: none, or a key
        of REMAT (ValueError else). unroll: layers an iteration of the scan (0: all), by default as
        the machine likes it. blocks: the layers from `apart`, for a cache of the same kind,
        without dropout and remat.
        """
        x = self._embed(tokens, embeds, dtype)
        q_segments, kv_segments, cache = _place(cache, segment_ids, x.shape)
        if positions is None:
            positions = _count(kv_segments, cache, x.shape[1])
        index = jnp.int32(0) if cache is None else cache.index
        inv_freq = rope.frequencies(self.cfg.rope, positions)
        angles = rope.cos_sin(positions, inv_freq, self.cfg.rope.scale)
        context = Context(*angles, q_segments, kv_segments, index)
        if blocks and cache is not None:
            x, cache = self._one_by_one(x, context, cache, blocks)
        else:
            x, cache = self._scan(x, context, cache, keys, remat, unroll)
        return self.norm(x), cache

    def apart(self) -> tuple[Block, ...]:
        """The layers for a loop over tokens, not stacked; none where they had better stay so.

        On a CPU such a loop reads them in place: from a stack it copies each layer for each token.
        """
        size = sum(x.nbytes for x in jax.tree.leaves(self.layers))
        if not unstacks(size):
            return ()
        layers = range(self.cfg.num_layers)
        return tuple(jax.tree.map(lambda x, i=i: x[i], self.layers) for i in layers)

    def _one_by_one(
        self, x: Array, context: Context, cache: Cache, blocks: tuple[Block, ...]
    ) -> tuple[Array, Cache]:
        cfg, memories = self.cfg, []
        for i, block in enumerate(blocks):
            layer = Layer(i, cfg.rotary[i], cfg.windows[i])
            x, memory = block(x, layer, context, (cache.k[i], cache.v[i]))
            memories.append(memory)
        k, v = zip(*memories, strict=True)
        return x, cache._replace(k=k, v=v, index=cache.index + x.shape[1])

    def _embed(self, tokens: Array | None, embeds: Array | None, dtype: Any) -> Array:
        if tokens is not None and embeds is None:
            embeds = self.embed_tokens(tokens, dtype)
        elif tokens is not None or embeds is None:
            raise ValueError("hidden() takes either tokens or embeds")
        x = embeds if dtype is None else embeds.astype(dtype)
        return constrain(x, "batch", "length", None)

    def _scan(
        self,
        x: Array,
        context: Context,
        cache: Cache | None,
        keys: PRNGKeyArray | None,
        remat: str,
        unroll: int | None,
    ) -> tuple[Array, Cache | None]:
        same, varying = _per_layer_inputs(self.cfg)
        if unroll is None:
            unroll = 0 if unrolls(self.cfg.num_layers) else 1

        def body(carry: tuple, xs: tuple) -> tuple[tuple, None]:
            block, arrays = xs
            return block(carry[0], same._replace(**arrays), context, carry[1], keys), None

        memory = None if cache is None else (cache.k, cache.v)
        body = _rematted(body, remat, unroll)
        (x, memory), _ = jax.lax.scan(body, (x, memory), (self.layers, varying), unroll=unroll)
        if cache is None or memory is None:
            return x, None
        return x, cache._replace(k=memory[0], v=memory[1], index=cache.index + x.shape[1])

    def head(self) -> tuple[Array, bool]:
        """The output matrix and whether it is vocab-first: a tied table (V, D), a kernel (D, V).

        It multiplies `features`.
        """
        if self.lm_head is None:
            return self.embed_tokens.embedding[...], True
        return self.lm_head.wide_kernel(), False

    def features(
        self, hidden: Float[Array, "... D"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "... E"]:
        """Input of `head`: hidden states, beside them the LoRA activations of the head's adapter.

        `keys`, one a row, turn that adapter's dropout on.
        """
        return hidden if self.lm_head is None else self.lm_head.wide_input(hidden, keys)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """fp32 logits; the product takes its inputs in hidden's dtype and sums in fp32."""
        matrix, vocab_first = self.head()
        spec = "btd,vd->btv" if vocab_first else "btd,dv->btv"
        matrix = matrix.astype(hidden.dtype)
        features = self.features(hidden)
        return jnp.einsum(spec, features, matrix, preferred_element_type=jnp.float32)


def _place(
    cache: Cache | None, segment_ids: Array | None, shape: tuple[int, ...]
) -> tuple[Array | None, Array | None, Cache | None]:
    """Segments of the queries and of all keys: this call's own, or with a cache every slot's."""
    if cache is None:
        return segment_ids, segment_ids, None
    new = jnp.ones(shape[:2], jnp.int32) if segment_ids is None else segment_ids
    segments = jax.lax.dynamic_update_slice(cache.segments, new, (0, cache.index))
    return new, segments, cache._replace(segments=segments)


def _count(segments: Array | None, cache: Cache | None, length: int) -> Array:
    """Default positions: 0, 1, ...; after a cache, how many real tokens the row already has."""
    if cache is None or segments is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    counted = jnp.cumsum(segments != 0, axis=1, dtype=jnp.int32) - 1
    return jax.lax.dynamic_slice_in_dim(counted, cache.index, length, axis=1)


def _per_layer_inputs(cfg: LlamaConfig) -> tuple[Layer, dict[str, Array]]:
    """What all layers share, and arrays (L,) to scan over for what they do not."""
    varying = {"index": jnp.arange(cfg.num_layers, dtype=jnp.int32)}
    if len(set(cfg.rotary)) > 1:
        varying["rotates"] = jnp.array(cfg.rotary)
    if len(set(cfg.windows)) > 1:
        windows = [UNLIMITED if window is None else window for window in cfg.windows]
        varying["window"] = jnp.array(windows, jnp.int32)
    return Layer(varying["index"][0], cfg.rotary[0], cfg.windows[0]), varying


REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _rematted(body: Any, remat: str, unroll: int) -> Any:
    """`body` that keeps for the backward pass only what the policy names."""
    if remat == "none":
        return body
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r} is not one of none, {', '.join(REMAT)}")
    # Within one iteration XLA would merge the recomputation away; a loop keeps them apart.
    return jax.checkpoint(body, policy=REMAT[remat], prevent_cse=unroll != 1)


def flops_per_token(cfg: LlamaConfig, seq_len: int) -> float:
    """Forward matmul FLOPs of one token in a row of `seq_len`: 2 a weight, attention causal.

    A token sees (seq_len + 1) / 2 keys on average, at most its layer's window.
    """
    d, n, k, h = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    weights = d * h * (2 * n + 2 * k) + 3 * d * cfg.intermediate_size
    seen = 0.0
    for window in cfg.windows:
        w = min(window or seq_len, seq_len)
        seen += w - w * (w - 1) / (2 * seq_len)
    return 2.0 * (cfg.num_layers * weights + d * cfg.vocab_size) + 4.0 * n * h * seen


def sizes(cfg: LlamaConfig) -> dict[str, int]:
    """The dims that RULES' layouts name."""
    return {"n": cfg.num_heads, "k": cfg.num_kv_heads, "h": cfg.head_dim}


def ignore(cfg: LlamaConfig) -> tuple[str, ...]:
    """Tensors that old files hold but no model reads."""
    return (r".*rotary_emb\.inv_freq", *((r"lm_head\.weight",) if cfg.tied else ()))


_T, _J = "model.layers.{i}.self_attn.", "layers.self_attn."
RULES = (
    Rule("model.embed_tokens.weight", "embed_tokens.embedding"),
    Rule("model.layers.{i}.{p}norm.weight", "layers.{p}norm.scale"),
    Rule(_T + "q_proj.weight", _J + "q_proj.kernel", "(n h) d -> d n h"),
    Rule(_T + "k_proj.weight", _J + "k_proj.kernel", "(k h) d -> d k h"),
    Rule(_T + "v_proj.weight", _J + "v_proj.kernel", "(k h) d -> d k h"),
    Rule(_T + "o_proj.weight", _J + "o_proj.kernel", "d (n h) -> n h d"),
    Rule(_T + "q_proj.bias", _J + "q_proj.bias", "(n h) -> n h"),
    Rule(_T + "k_proj.bias", _J + "k_proj.bias", "(k h) -> k h"),
    Rule(_T + "v_proj.bias", _J + "v_proj.bias", "(k h) -> k h"),
    Rule(_T + "o_proj.bias", _J + "o_proj.bias"),
    Rule("model.layers.{i}.mlp.{p}_proj.weight", "layers.mlp.{p}_proj.kernel", "f d -> d f"),
    Rule("model.layers.{i}.mlp.{p}_proj.bias", "layers.mlp.{p}_proj.bias"),
    Rule("model.norm.weight", "norm.scale"),
    Rule("lm_head.weight", "lm_head.kernel", "v d -> d v"),
)
