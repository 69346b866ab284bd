"""One decoder layer by its spec: attention, gated MLP, and the norms around them."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxft.core.sharding import constrain
from jaxft.kernels.attention.attention import attention
from jaxft.models.decoders.config import DecoderConfig, LayerSpec
from jaxft.models.decoders.experts import ExpertMLP, Routing
from jaxft.models.decoders.generation.cache import append
from jaxft.nn import rope
from jaxft.nn.gated import gated
from jaxft.nn.linear import Linear
from jaxft.nn.norm import RMSNorm

Memory = tuple[Array, Array]  # keys and values of the cache, as `Cache` holds them


class Context(NamedTuple):
    """The inputs that all layers of one call share.

    angles: cos and sin of every rope. segments_in_row: as in `kernels.attention`. growth: the
    factor of queries by position, None for 1. counted: the tokens that the sums of a router count,
    None for no sums.
    """

    angles: tuple[tuple[Float[Array, "B T half"], Float[Array, "B T half"]], ...]
    q_segments: Int[Array, "B T"] | None
    kv_segments: Int[Array, "B S"] | None
    index: Int[Array, ""]
    segments_in_row: int = 0
    growth: Float[Array, "B T"] | None = None
    counted: Bool[Array, "B T"] | None = None


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions, and RMSNorms of q and k by the config."""

    def __init__(self, cfg: DecoderConfig, *, key: PRNGKeyArray):
        d, h, std = (cfg.hidden_size,), cfg.head_dim, cfg.initializer_range
        keys = jax.random.split(key, 4)
        q_shape, kv_shape = (cfg.num_heads, h), (cfg.num_kv_heads, h)
        axes, bias = ("embed", "heads", "head_dim"), cfg.qkv_bias
        linear = partial(Linear, d, axes=axes, bias=bias, std=std)
        self.heads, self.kv_heads = cfg.num_heads, cfg.num_kv_heads
        fused = (self.heads + 2 * self.kv_heads, h)  # the heads of q, k and v
        self.qkv_proj = nnx.data(linear(fused, key=keys[0]) if cfg.fused else None)
        self.q_proj = nnx.data(None if cfg.fused else linear(q_shape, key=keys[0]))
        self.k_proj = nnx.data(None if cfg.fused else linear(kv_shape, key=keys[1]))
        self.v_proj = nnx.data(None if cfg.fused else linear(kv_shape, key=keys[2]))
        axes = ("heads", "head_dim", "embed")
        self.o_proj = Linear(q_shape, d, axes, key=keys[3], bias=cfg.o_bias, std=std)
        normed, norm = cfg.layers[0].qk_norm, _norms(cfg)
        q_width, k_width = (1, 1) if normed == "head" else (cfg.num_heads, cfg.num_kv_heads)
        self.q_norm = nnx.data(norm(q_width * h) if normed else None)
        self.k_norm = nnx.data(norm(k_width * h) if normed else None)
        self.sinks = nnx.data(None)
        if cfg.layers[0].sinks:
            drawn = std * jax.random.normal(jax.random.fold_in(key, 4), q_shape[:1])
            self.sinks = nnx.data(nnx.Param(drawn, axes=("heads",)))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        spec: LayerSpec,
        layer: Int[Array, ""] | int,
        context: Context,
        memory: Memory | None,
        keys: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], Memory | None]:
        q, k, v = self._projected(x, keys)  # [B, T, N|K, H]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed_heads(self.q_norm, q, spec), _normed_heads(self.k_norm, k, spec)
        if spec.rope is not None:
            cos, sin = context.angles[spec.rope]
            q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        if context.growth is not None:
            q = q * context.growth[..., None, None].astype(q.dtype)  # [B, T, N, H]
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
            scale=spec.attention_scale,
            soft_cap=spec.soft_cap,
            sinks=None if self.sinks is None else self.sinks[...],
            segments_in_row=context.segments_in_row,
        )  # [B, T, N, H]
        return self.o_proj(out, keys), memory

    def _projected(self, x: Array, keys: PRNGKeyArray | None) -> tuple[Array, ...]:
        if self.qkv_proj is not None:
            every = self.qkv_proj(x, keys)  # [B, T, N + 2 K, H]
            return tuple(jnp.split(every, (self.heads, self.heads + self.kv_heads), axis=2))
        assert self.q_proj is not None and self.k_proj is not None and self.v_proj is not None
        return self.q_proj(x, keys), self.k_proj(x, keys), self.v_proj(x, keys)


class MLP(nnx.Module):
    """down(act(gate x) * up x), SwiGLU for SiLU: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, cfg: DecoderConfig, *, key: PRNGKeyArray):
        d, f = (cfg.hidden_size,), (cfg.intermediate_size,)
        gate, up, down = jax.random.split(key, 3)
        bias, std = cfg.mlp_bias, cfg.initializer_range
        linear = partial(Linear, d, bias=bias, std=std)
        # gate and up are a dim of their own, so that each device has its part of both.
        both, axes = (2, cfg.intermediate_size), ("embed", None, "mlp")
        self.gate_up_proj = nnx.data(linear(both, axes, key=gate) if cfg.fused else None)
        axes = ("embed", "mlp")
        self.gate_proj = nnx.data(None if cfg.fused else linear(f, axes, key=gate))
        self.up_proj = nnx.data(None if cfg.fused else linear(f, axes, key=up))
        self.down_proj = Linear(f, d, ("mlp", "embed"), key=down, bias=bias, std=std)

    def __call__(
        self, x: Float[Array, "B T D"], activation: str, keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        if self.gate_up_proj is not None:
            both = self.gate_up_proj(x, keys)  # [B, T, 2, F]
            gate, up = both[..., 0, :], both[..., 1, :]  # [B, T, F]
        else:
            assert self.gate_proj is not None and self.up_proj is not None
            gate, up = self.gate_proj(x, keys), self.up_proj(x, keys)  # [B, T, F]
        return self.down_proj(gated(gate, up, activation), keys)


class Block(nnx.Module):
    """One decoder layer. `LayerSpec.norms` decides which of the four norms it has."""

    def __init__(self, cfg: DecoderConfig, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        norms, shape, norm = cfg.layers[0].norms, cfg.hidden_size, _norms(cfg)
        self.input_layernorm = nnx.data(norm(shape) if norms != "post" else None)
        self.self_attn = Attention(cfg, key=first)
        # transformers' name for the norm before a pre-norm MLP, too.
        self.post_attention_layernorm = norm(shape)
        self.pre_feedforward_layernorm = nnx.data(norm(shape) if norms == "sandwich" else None)
        experts = cfg.layers[0].experts
        self.mlp = MLP(cfg, key=second) if experts is None else ExpertMLP(cfg, experts, key=second)
        self.post_feedforward_layernorm = nnx.data(norm(shape) if norms != "pre" else None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        spec: LayerSpec,
        layer: Int[Array, ""] | int,
        context: Context,
        memory: Memory | None = None,
        keys: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], Memory | None, Routing | None]:
        """Return the layer's output, and the cache's memory with the keys of this call in it.

        Third are the sums of its router, if it has one and `context` has tokens to count.
        layer: the index of this layer, for the cache and for the PRNG keys of its dropout.
        """
        x = checkpoint_name(x, "block_input")  # for the remat policy "offload"
        if keys is not None:
            # The layers of a scan share the keys, but not their dropout masks.
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
        normed = _normed(self.input_layernorm, x)
        attended, memory = self.self_attn(normed, spec, layer, context, memory, keys)
        if spec.norms == "pre":
            x = x + scaled(attended, spec.residual_scale)
            normed = self.post_attention_layernorm(x)
        else:
            x = x + scaled(self.post_attention_layernorm(attended), spec.residual_scale)
            normed = _normed(self.pre_feedforward_layernorm, x)
        routing = None
        if isinstance(self.mlp, ExpertMLP):
            assert spec.experts is not None
            made, routing = self.mlp(normed, spec.experts, spec.activation, context.counted)
        else:
            made = self.mlp(normed, spec.activation, keys)
        made = _normed(self.post_feedforward_layernorm, made)
        x = x + scaled(made, spec.residual_scale)
        return constrain(x, "batch", "length", None), memory, routing


def _norms(cfg: DecoderConfig) -> Callable[[int], RMSNorm]:
    """Return the norms of a decoder by their width."""
    return partial(RMSNorm, eps=cfg.rms_norm_eps, kind=cfg.norm)


def _normed_heads(norm: RMSNorm, x: Array, spec: LayerSpec) -> Array:
    """Normalise x [B, T, N, H] over each head, or over all heads of a token."""
    if spec.qk_norm == "head":
        return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)  # [B, T, N H], [B, T, N, H]


def _normed(norm: RMSNorm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


def scaled(x: Array, factor: float) -> Array:
    """Return x times a factor that is not rounded to x's dtype, as torch multiplies by a number."""
    return x if factor == 1.0 else (factor * x.astype(jnp.float32)).astype(x.dtype)
