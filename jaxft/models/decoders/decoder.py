"""Causal language models, specified layer by layer, from token ids to logits."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxft.core.sharding import constrain
from jaxft.kernels.attention.attention import saves_attention
from jaxft.kernels.elementwise import soft_capped
from jaxft.kernels.loops import unrolls, unstacks
from jaxft.models.decoders.block import Block, Context, Memory, scaled
from jaxft.models.decoders.config import DecoderConfig, LayerScan, LayerSpec, layer_scans
from jaxft.models.decoders.experts import Routing
from jaxft.models.decoders.generation.cache import Cache, default_positions, place
from jaxft.nn import rope
from jaxft.nn.linear import Embedding, Linear
from jaxft.nn.norm import RMSNorm


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
        self.norm = RMSNorm(d, eps=cfg.rms_norm_eps, kind=cfg.norm)
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
        longest: int = 0,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Return the final norm's output in `dtype`, and the cache with these tokens in it.

        positions: for the rotation. The default is 0, 1, …, and with a cache the number of real
        tokens before. segment_ids: a token attends to its own segment. 0 is padding. The default is
        one segment. embeds: used instead of tokens. keys: one a row, for the dropout of adapters.
        remat: "none" or a key of REMAT. unroll: periods of layers in one iteration of the scan,
        0 for all. blocks: the layers from `unstacked`, for a cache of the same kind, without
        dropout and remat. segments_in_row: the most segments of a row, as in `kernels.attention`.
        longest: as in `rope.frequencies`.
        Raises: ValueError for another remat, and for both or none of tokens and embeds.
        """
        x = self._embed(tokens, embeds, dtype)  # [B, T, D]
        q_segments, kv_segments, cache = place(cache, segment_ids, x.shape)
        if positions is None:
            positions = default_positions(kv_segments, cache, x.shape[1])
        index = jnp.int32(0) if cache is None else cache.index
        angles, growth = self._by_position(positions, longest)
        others = None if cache is None else kv_segments  # None: keys have the queries' own segments
        context = Context(angles, q_segments, others, index, segments_in_row, growth)
        if blocks and cache is not None:
            x, cache = self._one_by_one(x, context, cache, blocks)
            return self.norm(x), cache
        memory = None if cache is None else (cache.k, cache.v)
        x, memory, _ = self._every_layer(x, memory, context, keys, remat, unroll)
        if cache is not None and memory is not None:
            cache = cache._replace(k=memory[0], v=memory[1], index=cache.index + x.shape[1])
        return self.norm(x), cache

    def routed(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        counted: Bool[Array, "B T"],
        *,
        keys: PRNGKeyArray | None = None,
        remat: str = "none",
        dtype: Any = None,
        segments_in_row: int = 0,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Return the final norm's output as `hidden`, and the sums of all routers, [L, E].

        counted: the tokens in these sums. The model has experts.
        """
        x = self._embed(tokens, None, dtype)  # [B, T, D]
        if positions is None:
            positions = default_positions(None, None, x.shape[1])
        angles, growth = self._by_position(positions)
        context = Context(angles, segment_ids, None, jnp.int32(0), segments_in_row, growth, counted)
        x, _, routing = self._every_layer(x, None, context, keys, remat, None)
        assert routing is not None
        return self.norm(x), routing

    def states(
        self,
        tokens: Int[Array, "B T"],
        real: Bool[Array, "B T"],
        wanted: Sequence[int],
        *,
        keys: PRNGKeyArray | None = None,
        dtype: Any = None,
    ) -> list[Float[Array, "B T D"]]:
        """Return the hidden states after so many layers, without the final norm.

        wanted: numbers of layers, rising. As in transformers' `hidden_states`, 0 is the embeddings.
        real: False for padding, which no token attends to. All tokens have their index as position.
        keys: one a row, for the dropout of adapters.
        """
        x = self._embed(tokens, None, dtype)  # [B, T, D]
        angles, growth = self._by_position(default_positions(None, None, x.shape[1]))
        everywhere, seen = jnp.ones_like(tokens), real.astype(jnp.int32)
        context = Context(angles, everywhere, seen, jnp.int32(0), growth=growth)
        carry, done, made = (x, None), 0, []
        for count in wanted:
            for part in layer_scans(self.cfg.layers[done:count], done):
                unroll = 0 if unrolls(part.times) else 1
                carry, _ = self._scan(part, carry, context, keys, "none", unroll)
            done = count
            made.append(carry[0])
        return made

    def _by_position(self, positions: Array, longest: int = 0) -> tuple[Any, Array | None]:
        """Return cos and sin of every rope, and the factor of queries. Layers pick their own."""
        angles = tuple(
            rope.cos_sin(positions, rope.frequencies(one, positions, longest), one.scale)
            for one in self.cfg.ropes
        )
        scaling = self.cfg.query_scaling
        if scaling is None:
            return angles, None
        spans = (positions // scaling.original).astype(jnp.float32)  # [B, T]
        return angles, 1.0 + scaling.beta * jnp.log1p(spans)

    def _every_layer(
        self,
        x: Array,
        memory: Any,
        context: Context,
        keys: PRNGKeyArray | None,
        remat: str,
        unroll: int | None,
    ) -> tuple[Array, Any, Routing | None]:
        """Return hidden states, the cache's memory, and the sums of all routers, if counted."""
        if unroll is None:
            unroll = 0 if unrolls(self.cfg.num_layers) else 1
        carry, routings = (x, memory), []
        for part in layer_scans(self.cfg.layers):
            carry, routing = self._scan(part, carry, context, keys, remat, unroll)
            routings.append(routing)
        routing = jax.tree.map(lambda *each: jnp.concatenate(each), *routings)  # [L, E]
        return carry[0], carry[1], routing

    def scaled_embeddings(self, rows: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Return rows of the table times `embedding_scale`, the input of the first layer."""
        scale = self.cfg.embedding_scale
        return rows if scale == 1.0 else rows * jnp.asarray(scale, rows.dtype)

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
            x, memory, _ = block(x, spec, i, context, (cache.k[i], cache.v[i]))
            memories.append(memory)
        k, v = zip(*memories, strict=True)
        return x, cache._replace(k=k, v=v, index=cache.index + x.shape[1])

    def _embed(self, tokens: Array | None, embeds: Array | None, dtype: Any) -> Array:
        if tokens is not None and embeds is None:
            embeds = self.scaled_embeddings(self.embed_tokens(tokens, dtype))
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
    ) -> tuple[tuple[Array, Memory | None], Routing | None]:
        """Run the layers of one scan, a period an iteration, on the hidden states and the cache.

        Second are the sums of their routers, [layers, E].
        """
        size = len(part.period)
        numbers = jnp.arange(self.cfg.num_layers, dtype=jnp.int32)
        stop = part.start + size * part.times
        inputs = jax.tree.map(lambda x: x[part.start : stop], (self.layers, numbers))
        if size > 1:
            split = (part.times, size)
            inputs = jax.tree.map(lambda x: x.reshape(*split, *x.shape[1:]), inputs)  # [L/P, P, ..]

        def run(spec: LayerSpec, carry: tuple, block: Block, layer: Array) -> tuple:
            x, memory, routing = block(carry[0], spec, layer, context, carry[1], keys)
            return (x, memory), routing

        runs = [_rematted(partial(run, spec), remat, size * unroll) for spec in part.period]

        def body(carry: tuple, inputs: tuple) -> tuple[tuple, Routing | None]:
            if size == 1:
                return runs[0](carry, *inputs)
            routings = []
            for i, one in enumerate(runs):
                carry, routing = one(carry, *jax.tree.map(lambda x, i=i: x[i], inputs))
                routings.append(routing)
            return carry, jax.tree.map(lambda *each: jnp.stack(each), *routings)

        carry, routing = jax.lax.scan(body, carry, inputs, unroll=unroll)
        if size > 1:
            routing = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), routing)  # [L, E]
        return carry, routing

    def head(self) -> tuple[Array, bool, float | None]:
        """Return the output matrix for `features`, and True if the vocabulary is its first dim.

        It is a tied table [V, D], or a kernel [D, V]. With an adapter it is [D + r, V]. Third is
        the soft-cap of its logits, or None.
        """
        soft_cap = self.cfg.logits_soft_cap
        if self.lm_head is None:
            return self.embed_tokens.table(), True, soft_cap  # [V, D]
        return self.lm_head.wide_kernel(), False, soft_cap  # [D, V] or [D + r, V]

    def features(
        self, hidden: Float[Array, "... D"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "... E"]:
        """Return the input of `head`: hidden states, concatenated with its adapter's activations.

        keys: one a row, for the dropout of that adapter. It is divided by `logits_divisor` here,
        because every product with `head` has this input. For a power of 2 this is exact.
        """
        wide = hidden if self.lm_head is None else self.lm_head.wide_input(hidden, keys)
        return scaled(wide, 1.0 / self.cfg.logits_divisor)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return fp32 logits. The inputs of the product are in hidden's dtype, its sums in fp32."""
        matrix, vocab_first, soft_cap = self.head()
        spec = "btd,vd->btv" if vocab_first else "btd,dv->btv"
        matrix = matrix.astype(hidden.dtype)
        features = self.features(hidden)
        logits = jnp.einsum(spec, features, matrix, preferred_element_type=jnp.float32)
        return soft_capped(logits, soft_cap)[0]  # [B, T, V]

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
    # q, o, k and v projections, and the three matrices of the MLP or of a token's experts.
    experts, width = cfg.layers[0].experts, cfg.intermediate_size
    if experts is not None:
        width = experts.active * experts.width
    routers = 0 if experts is None else d * experts.count
    weights = d * h * (2 * n + 2 * k) + 3 * d * width + routers
    attended = 0.0
    for layer in cfg.layers:
        w = min(layer.window or seq_len, seq_len)
        attended += w - w * (w - 1) / (2 * seq_len)  # the first w - 1 tokens have fewer keys
    # Each key costs a product with q and one with its weight: 4 n h.
    head = 0 if cfg.num_labels else d * cfg.vocab_size
    return 2.0 * (cfg.num_layers * weights + head) + 4.0 * n * h * attended
