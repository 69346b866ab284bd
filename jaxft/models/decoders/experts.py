"""A mixture of experts: a router, and gated MLPs of which each token has a few. None is dropped."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxft.core.sharding import batch_ways, spec
from jaxft.kernels.grouped_matmul import group_rows, grouped_matmul
from jaxft.models.decoders.config import DecoderConfig, ExpertSpec
from jaxft.nn.gated import gated


class Routing(NamedTuple):
    """Sums over tokens for each expert: how many have it, and its probabilities.

    They are those of one layer, [E], or of all layers, [L, E].
    """

    tokens: Float[Array, "*L E"]
    probabilities: Float[Array, "*L E"]


class Matrix(nnx.Module):
    """A matrix [in, out], or one for each expert, [E, in, out]. No adapter has a slot here."""

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], *, key: PRNGKeyArray, std: float
    ):
        self.kernel = nnx.Param(std * jax.random.normal(key, shape), axes=axes, inputs=1)


class Experts(nnx.Module):
    """The gated MLPs of a layer, stacked over experts: [E, D, F], [E, D, F] and [E, F, D]."""

    def __init__(self, cfg: DecoderConfig, experts: ExpertSpec, *, key: PRNGKeyArray):
        count, d, f = experts.count, cfg.hidden_size, experts.width
        gate, up, down = jax.random.split(key, 3)
        wide = partial(Matrix, (count, d, f), ("expert", None, "mlp"), std=cfg.initializer_range)
        self.gate_proj, self.up_proj = wide(key=gate), wide(key=up)
        axes = ("expert", "mlp", None)
        self.down_proj = Matrix((count, f, d), axes, key=down, std=cfg.initializer_range)


class ExpertMLP(nnx.Module):
    """The weighted sum of a token's experts: Shazeer et al. 2017, arXiv:1701.06538."""

    def __init__(self, cfg: DecoderConfig, experts: ExpertSpec, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        shape, std = (cfg.hidden_size, experts.count), cfg.initializer_range
        self.router = Matrix(shape, ("embed", None), key=first, std=std)
        self.experts = Experts(cfg, experts, key=second)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        experts: ExpertSpec,
        activation: str,
        counted: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Return the output in x's dtype, and the sums over the `counted` tokens, if given."""
        router = self.router.kernel[...].astype(x.dtype)
        # The logits are rounded to x's dtype, as transformers' are. Softmax is fp32.
        logits = jnp.einsum("btd,de->bte", x, router).astype(jnp.float32)  # [B, T, E]
        weights, chosen = chosen_experts(logits, experts)
        gate, up, down = self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj
        kernels = gate.kernel[...], up.kernel[...], down.kernel[...]
        out = _on_mesh(x, weights, chosen, kernels, activation)
        return out, None if counted is None else _sums(logits, chosen, counted)


def chosen_experts(
    logits: Float[Array, "B T E"], experts: ExpertSpec
) -> tuple[Float[Array, "B T A"], Int[Array, "B T A"]]:
    """Return weights and indices of the `active` experts of each token, the best first.

    Of equal ones the first is chosen. If `normalised`, the weights are a softmax over the chosen
    alone, which are those over all experts, divided by their sum.
    """
    top, chosen = jax.lax.top_k(logits, experts.active)
    if experts.normalised:
        return jax.nn.softmax(top, -1), chosen
    return jnp.exp(top - jax.nn.logsumexp(logits, -1, keepdims=True)), chosen


def balance_loss(routing: Routing, counted: Float[Array, ""]) -> Float[Array, ""]:
    """Return E times the sum over experts of their share of tokens and their mean probability.

    The rows of all layers are one set, as in transformers. Even routing gives the number of experts
    of a token. counted: the number of tokens.
    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6.
    """
    layers, count = routing.tokens.shape
    rows = layers * jnp.maximum(counted, 1.0)
    tokens, probabilities = (one.sum(0) / rows for one in routing)  # [E]
    return count * (tokens * probabilities).sum()


def routing_metrics(routing: Routing) -> dict[str, Float[Array, ""]]:
    """Return the busiest expert's share of assignments, and their entropy, both means over layers.

    The entropy is divided by that of even routing, so that it is 1 there.
    """
    shares = routing.tokens / jnp.maximum(routing.tokens.sum(-1, keepdims=True), 1.0)  # [L, E]
    entropy = -(shares * jnp.log(jnp.maximum(shares, 1e-30))).sum(-1) / jnp.log(shares.shape[-1])
    return {"busiest_expert": shares.max(-1).mean(), "router_entropy": entropy.mean()}


def _sums(
    logits: Float[Array, "B T E"], chosen: Int[Array, "B T A"], counted: Bool[Array, "B T"]
) -> Routing:
    real = counted.astype(jnp.float32)
    had = jax.nn.one_hot(chosen, logits.shape[-1]).sum(2)  # [B, T, E]
    every = (had, jax.nn.softmax(logits, -1))
    return Routing(*(jnp.einsum("bt,bte->e", real, one) for one in every))


Kernels = tuple[Array, Array, Array]  # gate, up and down of all experts


def _on_mesh(x: Array, weights: Array, chosen: Array, kernels: Kernels, activation: str) -> Array:
    """Return the output of the experts, for each device's own rows.

    A device sorts only its own tokens, so none are exchanged. It gathers the experts of a layer
    from the devices that hold them, and computes its part of their width.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _outputs(x, weights, chosen, kernels, activation=activation)
    rows = spec(("batch" if len(x) % batch_ways(mesh) == 0 else None, None, None))
    wide, narrow = spec((None, None, "mlp")), spec((None, "mlp", None))
    local = partial(_outputs, activation=activation, width_axis=wide[-1])
    mapped = jax.shard_map(
        local, in_specs=(rows, rows, rows, (wide, wide, narrow)), out_specs=rows, check_vma=False
    )
    return mapped(x, weights, chosen, kernels)


def _outputs(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T A"],
    chosen: Int[Array, "B T A"],
    kernels: Kernels,
    *,
    activation: str,
    width_axis: str | None = None,
) -> Float[Array, "B T D"]:
    """Return the weighted sums. width_axis: the mesh axis over which F is split."""
    gate, up, down = kernels
    active = chosen.shape[-1]
    groups = group_rows(chosen.reshape(-1), len(gate))  # of B T A rows
    tokens = groups.rows // active  # past the last token where a place is padding
    flat = x.reshape(-1, x.shape[-1])  # [B T, D]
    rows = jnp.take(flat, tokens, axis=0, mode="fill", fill_value=0)  # [R, D]
    wide = (grouped_matmul(rows, one, groups) for one in (gate, up))  # [R, F]
    made = grouped_matmul(gated(*wide, activation), down, groups)[groups.places]  # [B T A, D]
    made = made.reshape(*chosen.shape, -1)  # [B, T, A, D]
    out = jnp.einsum("bta,btad->btd", weights, made.astype(jnp.float32))
    out = out if width_axis is None else jax.lax.psum(out, width_axis)
    return out.astype(x.dtype)  # [B, T, D]
