"""Causal language models, specified layer by layer, from token ids to logits."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.sharding import constrain
from jaxft.kernels.attention import attention, saves_attention
from jaxft.kernels.loops import unrolls, unstacks
from jaxft.models.decoders.cache import Cache, append, default_positions, place
from jaxft.models.decoders.config import DecoderConfig, LayerScan, LayerSpec, layer_scans
from jaxft.nn import rope
from jaxft.nn.linear import Embedding, Linear
from jaxft.nn.norm import RMSNorm

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}

Memory = tuple[Array, Array]  # keys and values of the cache, as `Cache` holds them


class Context(NamedTuple):
    """The inputs that all layers of one call share.

    angles: cos and sin of every rope. segments_in_row: as in `kernels.attention`.
    """

    angles: tuple[tuple[Float[Array, "B T half"], Float[Array, "B T half"]], ...]
    q_segments: Int[Array, "B T"] | None
    kv_segments: Int[Array, "B S"] | None
    index: Int[Array, ""]
    segments_in_row: int = 0


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions, and RMSNorms of q and k by the config."""

    def __init__(self, cfg: DecoderConfig, *, key: PRNGKeyArray):
        d, h, std = (cfg.hidden_size,), cfg.head_dim, cfg.initializer_range
        keys = jax.random.split(key, 4)
        q_shape, kv_shape = (cfg.num_heads, h), (cfg.num_kv_heads, h)
        axes, bias = ("embed", "heads", "head_dim"), cfg.qkv_bias
        self.q_proj = Linear(d, q_shape, axes, key=keys[0], bias=bias, std=std)
        self.k_proj = Linear(d, kv_shape, axes, key=keys[1], bias=bias, std=std)
        self.v_proj = Linear(d, kv_shape, axes, key=keys[2], bias=bias, std=std)
        axes = ("heads", "head_dim", "embed")
        self.o_proj = Linear(q_shape, d, axes, key=keys[3], bias=cfg.o_bias, std=std)
        normed = cfg.layers[0].qk_norm
        self.q_norm = nnx.data(RMSNorm(h, eps=cfg.rms_norm_eps) if normed else None)
        self.k_norm = nnx.data(RMSNorm(h, eps=cfg.rms_norm_eps) if normed else None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        spec: LayerSpec,
        layer: Int[Array, ""] | int,
        context: Context,
        memory: Memory | None,
        keys: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], Memory | None]:
        q, k, v = self.q_proj(x, keys), self.k_proj(x, keys), self.v_proj(x, keys)  # [B, T, N|K, H]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.rope is not None:
            cos, sin = context.angles[spec.rope]
            q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        slots = None
        if memory is not None:
            memory, k, v = append(memory, k, v, layer, context.index)  # [B, S, K, H]
            slots = context.index + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        out = attention(
            q,
            k,
            v,
            causal=True,
            q_positions=slots,
            q_segments=context.q_segments,
            kv_segments=context.kv_segments,
            window=spec.window,
            segments_in_row=context.segments_in_row,
        )  # [B, T, N, H]
        return self.o_proj(out, keys), memory


class MLP(nnx.Module):
    """down(act(gate x) * up x), SwiGLU for SiLU: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, cfg: DecoderConfig, *, key: PRNGKeyArray):
        d, f = (cfg.hidden_size,), (cfg.intermediate_size,)
        gate, up, down = jax.random.split(key, 3)
        bias, std = cfg.mlp_bias, cfg.initializer_range
        self.gate_proj = Linear(d, f, ("embed", "mlp"), key=gate, bias=bias, std=std)
        self.up_proj = Linear(d, f, ("embed", "mlp"), key=up, bias=bias, std=std)
        self.down_proj = Linear(f, d, ("mlp", "embed"), key=down, bias=bias, std=std)

    def __call__(
        self, x: Float[Array, "B T D"], activation: str, keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        gate, up = self.gate_proj(x, keys), self.up_proj(x, keys)  # [B, T, F]
        return self.down_proj(_gated(gate, up, activation), keys)


@partial(jax.checkpoint, static_argnums=2)
def _gated(gate: Array, up: Array, activation: str) -> Array:
    """Return act(gate) * up. The gradients recompute it instead of saving three more arrays."""
    return ACTIVATIONS[activation](gate) * up


class Block(nnx.Module):
    """One decoder layer. `LayerSpec.norms` decides which of the four norms it has."""

    def __init__(self, cfg: DecoderConfig, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        norms, shape, eps = cfg.layers[0].norms, cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = nnx.data(RMSNorm(shape, eps=eps) if norms != "post" else None)
        self.self_attn = Attention(cfg, key=first)
        # transformers' name for the norm before a pre-norm MLP, too.
        self.post_attention_layernorm = RMSNorm(shape, eps=eps)
        self.pre_feedforward_layernorm = nnx.data(
            RMSNorm(shape, eps=eps) if norms == "sandwich" else None
        )
        self.mlp = MLP(cfg, key=second)
        self.post_feedforward_layernorm = nnx.data(
            RMSNorm(shape, eps=eps) if norms != "pre" else None
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        spec: LayerSpec,
        layer: Int[Array, ""] | int,
        context: Context,
        memory: Memory | None = None,
        keys: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], Memory | None]:
        """Return the layer's output, and the cache's memory with the keys of this call in it.

        layer: the index of this layer, for the cache and for the PRNG keys of its dropout.
        """
        x = checkpoint_name(x, "block_input")  # for the remat policy "offload"
        if keys is not None:
            # The layers of a scan share the keys, but not their dropout masks.
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
        normed = _normed(self.input_layernorm, x)
        attended, memory = self.self_attn(normed, spec, layer, context, memory, keys)
        if spec.norms == "pre":
            x = x + attended
            normed = self.post_attention_layernorm(x)
        else:
            x = x + self.post_attention_layernorm(attended)
            normed = _normed(self.pre_feedforward_layernorm, x)
        x = x + _normed(self.post_feedforward_layernorm, self.mlp(normed, spec.activation, keys))
        return constrain(x, "batch", "length", None), memory


def _normed(norm: RMSNorm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """Token ids to logits. The layers are one stacked Block, leaves [L, ...].

    A call of the model returns fp32 logits [B, T, V], for notebooks. Training calls `hidden` and
    `head` instead, so that all logits never exist at once.
    """

    def __init__(self, cfg: DecoderConfig, *, key: PRNGKeyArray):
        embed, layers, head = jax.random.split(key, 3)
        d, v, std = cfg.hidden_size, cfg.vocab_size, cfg.initializer_range
        self.cfg = cfg
        self.embed_tokens = Embedding(v, d, key=embed, std=std)
        keys = jax.random.split(layers, cfg.num_layers)
        self.layers = jax.vmap(lambda key: Block(cfg, key=key))(keys)  # leaves [L, ...]
        self.norm = RMSNorm(d, eps=cfg.rms_norm_eps)
        untied = None if cfg.tied else Linear((d,), (v,), ("embed", "vocab"), key=head, std=std)
        self.lm_head = nnx.data(untied)
        self.score = nnx.data(None)
        if cfg.num_labels:
            self.score = Linear((d,), (cfg.num_labels,), ("embed", None), key=head, std=std)

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
        segments_in_row: int = 0,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Return the final norm's output in `dtype`, and the cache with these tokens in it.

        positions: for the rotation. The default is 0, 1, …, and with a cache the number of real
        tokens before. segment_ids: a token attends to its own segment. 0 is padding. The default is
        one segment. embeds: used instead of tokens. keys: one a row, for the dropout of adapters.
        remat: "none" or a key of REMAT. unroll: periods of layers in one iteration of the scan,
        0 for all. blocks: the layers from `unstacked`, for a cache of the same kind, without
        dropout and remat. segments_in_row: the most segments of a row, as in `kernels.attention`.
        Raises: ValueError for another remat, and for both or none of tokens and embeds.
        """
        x = self._embed(tokens, embeds, dtype)  # [B, T, D]
        q_segments, kv_segments, cache = place(cache, segment_ids, x.shape)
        if positions is None:
            positions = default_positions(kv_segments, cache, x.shape[1])
        index = jnp.int32(0) if cache is None else cache.index
        # The angles of all kinds of rope are computed once, and every layer picks its own.
        angles = tuple(
            rope.cos_sin(positions, rope.frequencies(one, positions), one.scale)
            for one in self.cfg.ropes
        )
        others = None if cache is None else kv_segments  # None: keys have the queries' own segments
        context = Context(angles, q_segments, others, index, segments_in_row)
        if blocks and cache is not None:
            x, cache = self._one_by_one(x, context, cache, blocks)
            return self.norm(x), cache
        if unroll is None:
            unroll = 0 if unrolls(self.cfg.num_layers) else 1
        carry: tuple[Array, Any] = x, None if cache is None else (cache.k, cache.v)
        for part in layer_scans(self.cfg.layers):
            carry = self._scan(part, carry, context, keys, remat, unroll)
        x, memory = carry
        if cache is not None and memory is not None:
            cache = cache._replace(k=memory[0], v=memory[1], index=cache.index + x.shape[1])
        return self.norm(x), cache

    def unstacked(self) -> tuple[Block, ...]:
        """Return the layers one by one, for a loop over tokens, or () where they stay stacked.

        On a CPU the loop reads them in place. From a stack it copies each layer for each token.
        """
        size = sum(x.nbytes for x in jax.tree.leaves(self.layers))
        if not unstacks(size):
            return ()
        layers = range(self.cfg.num_layers)
        return tuple(jax.tree.map(lambda x, i=i: x[i], self.layers) for i in layers)

    def _one_by_one(
        self, x: Array, context: Context, cache: Cache, blocks: tuple[Block, ...]
    ) -> tuple[Array, Cache]:
        memories = []
        for i, (block, spec) in enumerate(zip(blocks, self.cfg.layers, strict=True)):
            x, memory = block(x, spec, i, context, (cache.k[i], cache.v[i]))
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
        part: LayerScan,
        carry: tuple[Array, Memory | None],
        context: Context,
        keys: PRNGKeyArray | None,
        remat: str,
        unroll: int,
    ) -> tuple[Array, Memory | None]:
        """Run the layers of one scan, a period an iteration, on the hidden states and the cache."""
        size = len(part.period)
        numbers = jnp.arange(self.cfg.num_layers, dtype=jnp.int32)
        stop = part.start + size * part.times
        inputs = jax.tree.map(lambda x: x[part.start : stop], (self.layers, numbers))
        if size > 1:
            split = (part.times, size)
            inputs = jax.tree.map(lambda x: x.reshape(*split, *x.shape[1:]), inputs)  # [L/P, P, ..]

        def run(spec: LayerSpec, carry: tuple, block: Block, layer: Array) -> tuple:
            return block(carry[0], spec, layer, context, carry[1], keys)

        runs = [_rematted(partial(run, spec), remat, size * unroll) for spec in part.period]

        def body(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            if size == 1:
                return runs[0](carry, *inputs), None
            for i, one in enumerate(runs):
                carry = one(carry, *jax.tree.map(lambda x, i=i: x[i], inputs))
            return carry, None

        carry, _ = jax.lax.scan(body, carry, inputs, unroll=unroll)
        return carry

    def head(self) -> tuple[Array, bool]:
        """Return the output matrix for `features`, and True if the vocabulary is its first dim.

        It is a tied table [V, D], or a kernel [D, V]. With an adapter it is [D + r, V].
        """
        if self.lm_head is None:
            return self.embed_tokens.table(), True  # [V, D]
        return self.lm_head.wide_kernel(), False  # [D, V] or [D + r, V]

    def features(
        self, hidden: Float[Array, "... D"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "... E"]:
        """Return the input of `head`: hidden states, concatenated with its adapter's activations.

        keys: one a row, for the dropout of that adapter.
        """
        return hidden if self.lm_head is None else self.lm_head.wide_input(hidden, keys)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return fp32 logits. The inputs of the product are in hidden's dtype, its sums in fp32."""
        matrix, vocab_first = self.head()
        spec = "btd,vd->btv" if vocab_first else "btd,dv->btv"
        matrix = matrix.astype(hidden.dtype)
        features = self.features(hidden)
        return jnp.einsum(spec, features, matrix, preferred_element_type=jnp.float32)  # [B, T, V]

    def scores(self, hidden: Float[Array, "... D"]) -> Float[Array, "... C"]:
        """Return the fp32 output of the head of scores, which a model with `num_labels` has."""
        assert self.score is not None
        features, kernel = self.score.wide_input(hidden), self.score.wide_kernel()
        return jnp.einsum(
            "...d,dc->...c", features, kernel.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )  # [..., C]  # fmt: skip


REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, saves_attention
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _rematted(run: Any, remat: str, layers: int) -> Any:
    """Return `run` that saves for the backward pass only the arrays of the policy.

    layers: the number of calls in one iteration of the loop. Among several, XLA would merge the
    recomputation with the first computation. A loop with one call keeps them apart.
    Raises: ValueError for an unknown policy.
    """
    if remat == "none":
        return run
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r} is not one of none, {', '.join(REMAT)}")
    return jax.checkpoint(run, policy=REMAT[remat], prevent_cse=layers != 1)


def flops_per_token(cfg: DecoderConfig, seq_len: int) -> float:
    """Return the matmul FLOPs of one token's forward pass in a row of `seq_len`, 2 a weight.

    A causal token attends to (seq_len + 1) / 2 keys on average, and at most to its window. A head
    of scores is read at one token of an example, and does not count.
    """
    d, n, k, h = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    # q, o, k and v projections, and the three matrices of the MLP.
    weights = d * h * (2 * n + 2 * k) + 3 * d * cfg.intermediate_size
    attended = 0.0
    for layer in cfg.layers:
        w = min(layer.window or seq_len, seq_len)
        attended += w - w * (w - 1) / (2 * seq_len)  # the first w - 1 tokens have fewer keys
    # Each key costs a product with q and one with its weight: 4 n h.
    head = 0 if cfg.num_labels else d * cfg.vocab_size
    return 2.0 * (cfg.num_layers * weights + head) + 4.0 * n * h * attended
