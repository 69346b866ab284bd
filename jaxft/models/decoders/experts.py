"""A mixture of experts: a router, and gated MLPs of which each token has a few. None is dropped."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxft.core.sharding import AXIS_RULES, batch_ways, spec
from jaxft.kernels.grouped_matmul import GroupedRows, group_rows, grouped_matmul
from jaxft.kernels.matmul import Kernel
from jaxft.kernels.quantised import int8, nf4
from jaxft.kernels.quantised.int8 import Int8
from jaxft.kernels.quantised.nf4 import NF4
from jaxft.models.decoders.config import DecoderConfig, ExpertSpec
from jaxft.nn.gated import clamped, gated


class Routing(NamedTuple):
    """Sums over tokens for each expert: how many have it, and its probabilities.

    They are those of one layer, [E], or of all layers, [L, E].
    """

    tokens: Float[Array, "*L E"]
    probabilities: Float[Array, "*L E"]


class Matrix(nnx.Module):
    """A matrix [in, *out], or one for each expert, [E, in, *out]. No adapter has a slot here."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        key: PRNGKeyArray,
        std: float,
        bias: bool = False,
    ):
        made = std * jax.random.normal(key, shape)
        self.kernel: Any = nnx.Param(made, axes=axes, inputs=1)  # or quantised, as in `Linear`
        at = int(axes[0] == "expert")  # the dim of inputs, which a bias does not have
        zeros, rest = jnp.zeros(shape[:at] + shape[at + 1 :]), axes[:at] + axes[at + 1 :]
        self.bias = nnx.data(nnx.Param(zeros, axes=rest) if bias else None)

    def values(self) -> tuple[Any, Array | None]:
        """Return the matrix, which may be quantised, and its bias or None."""
        return self.kernel[...], None if self.bias is None else self.bias[...]


class ExpertWeights(NamedTuple):
    """Matrices with their biases or None: gate and up, or both in one, and down."""

    wide: tuple[tuple[Kernel, Array | None], ...]
    down: tuple[Kernel, Array | None]


class Experts(nnx.Module):
    """The gated MLPs of a layer, stacked over experts: [E, D, F], [E, D, F] and [E, F, D].

    Fused gate and up are one matrix, [E, D, 2, F], so that each device has its part of both.
    """

    def __init__(self, cfg: DecoderConfig, experts: ExpertSpec, *, key: PRNGKeyArray):
        count, d, f, fused = experts.count, cfg.hidden_size, experts.width, experts.fused
        gate, up, down = jax.random.split(key, 3)
        matrix = partial(Matrix, std=cfg.initializer_range, bias=fused)
        wide = partial(matrix, (count, d, f), ("expert", None, "mlp"))
        both = partial(matrix, (count, d, 2, f), ("expert", None, None, "mlp"))
        self.gate_up_proj = nnx.data(both(key=gate) if fused else None)
        self.gate_proj = nnx.data(None if fused else wide(key=gate))
        self.up_proj = nnx.data(None if fused else wide(key=up))
        self.down_proj = matrix((count, f, d), ("expert", "mlp", None), key=down)

    def weights(self) -> ExpertWeights:
        """Return the matrices and biases."""
        wide = (self.gate_up_proj, self.gate_proj, self.up_proj)
        return ExpertWeights(
            tuple(one.values() for one in wide if one is not None), self.down_proj.values()
        )


class ExpertMLP(nnx.Module):
    """The weighted sum of a token's experts: Shazeer et al. 2017, arXiv:1701.06538."""

    def __init__(self, cfg: DecoderConfig, experts: ExpertSpec, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        shape, std = (cfg.hidden_size, experts.count), cfg.initializer_range
        self.router = Matrix(shape, ("embed", None), key=first, std=std, bias=experts.fused)
        self.experts = Experts(cfg, experts, key=second)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        experts: ExpertSpec,
        activation: str,
        counted: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Return the output in x's dtype, and the sums over the `counted` tokens, if given."""
        router, bias = self.router.values()
        logits = jnp.einsum(
            "btd,de->bte", x, router.astype(x.dtype), preferred_element_type=jnp.float32
        )  # [B, T, E]
        logits = logits if bias is None else logits + bias.astype(jnp.float32)
        # The logits are rounded to x's dtype, as transformers' are. Softmax is fp32.
        logits = logits.astype(x.dtype).astype(jnp.float32)
        shares, chosen = chosen_experts(logits, experts)

        def act(gate: Array, up: Array) -> Array:
            clamp = experts.clamp
            return clamped(gate, up, clamp) if clamp else gated(gate, up, activation)

        out = _on_mesh(x, shares, chosen, self.experts.weights(), act, experts.count)
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


Activation = Callable[[Array, Array], Array]


def _on_mesh(
    x: Array,
    shares: Array,
    chosen: Array,
    weights: ExpertWeights,
    activation: Activation,
    count: int,
) -> Array:
    """Return the output of the experts, for each device's own rows.

    A device sorts only its own tokens, so none are exchanged. It gathers the experts of a layer
    from the devices that hold them, and computes its part of their width.
    """
    mesh = jax.sharding.get_abstract_mesh()
    local = partial(_outputs, activation=activation, count=count)
    if mesh.empty or mesh.size == 1:
        return local(x, shares, chosen, weights)
    rows = spec(("batch" if len(x) % batch_ways(mesh) == 0 else None, None, None))
    split = jax.vmap(nf4.with_plain_scales)
    plain = lambda one: split(one) if isinstance(one, NF4) else one  # noqa: E731
    weights = jax.tree.map(plain, weights, is_leaf=lambda one: isinstance(one, NF4))
    # The width is the last dim of gate and up, and of their biases.
    lead = (None,) * (len(weights.wide) == 1)
    wide: Any = tuple(
        (_specs(kernel, (None, *lead, "mlp")), None if bias is None else spec((None, *lead, "mlp")))
        for kernel, bias in weights.wide
    )
    bias = None if weights.down[1] is None else spec((None, None))
    narrow: Any = _specs(weights.down[0], ("mlp", None)), bias
    mapped = jax.shard_map(
        partial(local, width_axis=AXIS_RULES["mlp"]),
        in_specs=(rows, rows, rows, ExpertWeights(wide, narrow)),
        out_specs=rows,
        check_vma=False,
    )
    return mapped(x, shares, chosen, weights)


def _specs(kernel: Kernel, axes: tuple[str | None, ...]) -> Any:
    """Return the mesh axes of the experts' kernels, by the logical axes of one."""
    if isinstance(kernel, NF4):
        found = nf4.axes(axes, inputs=1)
        return NF4(spec((None, *found.codes)), spec((None, *found.scales)))
    if isinstance(kernel, Int8):
        return Int8(*(spec((None, *one)) for one in int8.axes(axes, inputs=1)))
    return spec((None, *axes))


def _outputs(
    x: Float[Array, "B T D"],
    shares: Float[Array, "B T A"],
    chosen: Int[Array, "B T A"],
    weights: ExpertWeights,
    *,
    activation: Activation,
    count: int,
    width_axis: Any = None,
) -> Float[Array, "B T D"]:
    """Return the weighted sums of `count` experts. width_axis: the mesh axis that splits F."""
    down, down_bias = weights.down
    active = chosen.shape[-1]
    groups = group_rows(chosen.reshape(-1), count)  # of B T A rows
    tokens = groups.rows // active  # past the last token where a place is padding
    flat = x.reshape(-1, x.shape[-1])  # [B T, D]
    rows = jnp.take(flat, tokens, axis=0, mode="fill", fill_value=0)  # [R, D]
    wide = [_projected(rows, *one, groups) for one in weights.wide]  # each [R, F], or one [R, 2 F]
    gate, up = wide if len(wide) == 2 else jnp.split(wide[0], 2, axis=-1)  # [R, F]
    made = grouped_matmul(activation(gate, up), down, groups)[groups.places]  # [B T A, D]
    made = made.reshape(*chosen.shape, -1)  # [B, T, A, D]
    out = jnp.einsum("bta,btad->btd", shares, made.astype(jnp.float32))
    out = out if width_axis is None else jax.lax.psum(out, width_axis)
    if down_bias is not None:
        sparse = jnp.einsum("bta,btae->bte", shares, jax.nn.one_hot(chosen, count))
        out += jnp.einsum("bte,ed->btd", sparse, down_bias.astype(jnp.float32))
    return out.astype(x.dtype)  # [B, T, D]


def _projected(
    rows: Float[Array, "R D"], kernel: Kernel, bias: Array | None, groups: GroupedRows
) -> Float[Array, "R F"]:
    """Return the product of each row with its expert's matrix, with its bias."""
    made = grouped_matmul(rows, kernel, groups)  # [R, F or 2 F]
    if bias is None:
        return made
    own = bias.reshape(len(bias), -1).astype(rows.dtype)[groups.owners]  # [blocks, F or 2 F]
    return made + jnp.repeat(own, len(rows) // len(own), axis=0)
