"""The jitted training step: sums over micro-batches and the mesh, one division, one update."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxft.core import optim
from jaxft.core.guards.faults import with_nan
from jaxft.core.guards.stopping import STOP_FLAG
from jaxft.core.params import Leaf, Params, bind_some
from jaxft.core.runtime import compiler_options
from jaxft.core.sharding import constrain, replicated

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
BATCH_MEANS = "batch_means"  # in a batch: means over all of its micro-batches, the same in each row


class State(NamedTuple):
    """The state of training: optimiser step count, trained parameters, moments, EMA or {}.

    The same tuple holds arrays, their shapes or their shardings. The dicts are by path.
    """

    step: Any
    params: dict[str, Any]
    opt: Any
    ema: dict[str, Any]


class Loss(Protocol):
    """A task's loss as an unreduced sum and its weight, with further sums to report.

    `keys` holds one PRNG key a row, made from (seed, step, sample id), so that results do not
    depend on the mesh or on the number of micro-batches. `step` counts updates from 0, for terms
    of a loss that start late.
    """

    def __call__(
        self, model: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]: ...


class Measure(Protocol):
    """Sums over a part of the batch and their weight, for a loss that needs means over the whole.

    They have no gradient.
    """

    def __call__(self, model: Any, batch: Batch) -> tuple[jax.Array, jax.Array]: ...


class StepSpec(NamedTuple):
    """The parts of a run's config that the step is compiled for."""

    micro_batches: int
    compute_dtype: Any
    ema: float
    seed: int


def init_state(tx: optax.GradientTransformation, params: Params, ema: float) -> State:
    """Return the state before step 0. `ema` is the decay of the average, 0 for none."""
    average = {path: jnp.copy(x).astype(jnp.float32) for path, x in params.items()} if ema else {}
    return State(jnp.zeros((), jnp.int32), params, tx.init(params), average)


def state_shardings(
    tx: optax.GradientTransformation,
    leaves: Mapping[str, Leaf],
    shardings: Mapping[str, NamedSharding],
    ema: float,
    mesh: Mesh,
) -> State:
    """Return the shardings of `init_state`'s result.

    Moments and the average are sharded like their parameters.
    """
    whole = replicated(mesh)
    opt = optim.state_shardings(tx, leaves, shardings, whole)
    own = {path: shardings[path] for path in leaves}
    return State(whole, own, opt, own if ema else {})


def cast(params: Mapping[str, jax.Array], dtype: Any) -> Params:
    """Return the parameters in the compute dtype. The given ones do not change."""
    return {path: x.astype(dtype) for path, x in params.items()}


def make_update(
    template: nnx.Module,
    loss: Loss,
    tx: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    spec: StepSpec,
    measure: Measure | None = None,
) -> Callable[[State, Params, Batch], tuple[State, Metrics]]:
    """Return `step(state, frozen, batch) -> state, metrics`.

    Metrics are fp32 scalars: `loss` (sum / weight over the whole global batch), `grad_norm`
    (before clipping), `lr`, `weight`, and the task's sums divided by the weight. If the batch has
    STOP_FLAG, its maximum over the rows of all processes is among them, as int32. If there is a
    `measure`, all micro-batches are measured first, and the loss gets the means as BATCH_MEANS.

    If the loss or the norm of the gradients is not finite, parameters, moments and averages stay as
    they were. Only the counters go on, so that the data and the schedule end where they should.
    """

    def gradients(state: State, frozen: Params, batch: Batch, keys: jax.Array) -> tuple:
        def objective(trained: Params) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
            model = bind_some(template, {**frozen, **trained}, spec.compute_dtype)
            (total, weight), metrics = loss(model, batch, keys, state.step)
            return total, (weight, metrics)

        (total, aux), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        # Sums over micro-batches are fp32 even where the masters are bf16.
        return cast(grads, jnp.float32), total, *aux

    def train_step(state: State, frozen: Params, batch: Batch) -> tuple[State, Metrics]:
        keys = sample_keys(spec.seed, state.step, batch["sample_ids"])
        run = partial(gradients, state, frozen)
        plain = {name: x for name, x in batch.items() if name != STOP_FLAG}
        if measure is not None and spec.micro_batches > 1:
            model = bind_some(template, {**frozen, **state.params}, spec.compute_dtype)
            plain[BATCH_MEANS] = _measured(partial(measure, model), plain, keys, spec.micro_batches)
        grads, total, weight, metrics = _accumulate(run, plain, keys, spec.micro_batches)
        total = with_nan(total, state.step)
        divisor = jnp.maximum(weight, 1e-8)
        grads = jax.tree.map(lambda g: g / divisor, grads)
        after = _after(tx, state, grads, spec)
        mean, norm = total / divisor, optax.tree.norm(grads)
        fine = jnp.isfinite(mean) & jnp.isfinite(norm)
        after = jax.tree.map(partial(_unless_skipped, fine), after, state)
        report = {
            "loss": mean,
            "grad_norm": norm,
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "weight": weight,
            **{name: value / divisor for name, value in metrics.items()},
        }
        if STOP_FLAG in batch:
            report[STOP_FLAG] = jnp.max(batch[STOP_FLAG])
        return after, report

    return train_step


def make_step(
    update: Callable[[State, Params, Batch], tuple[State, Metrics]], shardings: State, mesh: Mesh
) -> Any:
    """Return a step jitted for a mesh. It donates `state`."""
    # Inputs keep their shardings. Without named outputs the second step would compile again.
    places, options = (shardings, replicated(mesh)), compiler_options(mesh)
    return jax.jit(update, out_shardings=places, donate_argnums=0, compiler_options=options)


def _after(tx: optax.GradientTransformation, state: State, grads: Params, spec: StepSpec) -> State:
    """Return the state after an update with these gradients."""
    with jax.named_scope("optimizer"):
        updates, opt = tx.update(grads, state.opt, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema = optim.ema_update(state.ema, params, state.step, spec.ema) if spec.ema else {}
    return State(state.step + 1, params, opt, ema)


def _unless_skipped(fine: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Return `new`, or `old` if the step is not `fine`. Counters go on."""
    counter = new.ndim == 0 and jnp.issubdtype(new.dtype, jnp.integer)  # 8-bit moments are none
    return new if counter else jnp.where(fine, new, old)


def sample_keys(seed: int, step: jax.Array | int, sample_ids: jax.Array) -> jax.Array:
    """Return one PRNG key a row, made from (seed, step, sample id)."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda sample: jax.random.fold_in(base, sample))(sample_ids)


def stream(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Return another key for each row, for another use of randomness in the same step."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _accumulate(run: Callable, batch: Batch, keys: jax.Array, parts: int) -> Any:
    """Sum `run` over `parts` micro-batches with one scan."""
    if parts == 1:
        return run(batch, keys)
    cut = partial(_cut, parts=parts)
    pieces = (jax.tree.map(cut, dict(batch)), _cut(keys, parts))
    first = jax.tree.map(lambda x: x[0], pieces)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run, *first))

    def body(sums: Any, piece: tuple) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, run(*piece)), None

    return jax.lax.scan(body, zeros, pieces)[0]


def _measured(measure: Callable, batch: Batch, keys: jax.Array, parts: int) -> jax.Array:
    """Return the means over all micro-batches, once for each row [B, n]."""
    sums, weight = _accumulate(lambda part, _: measure(part), batch, keys, parts)
    return jnp.tile(sums / jnp.maximum(weight, 1e-8), (len(keys), 1))  # [B, n]


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """Reshape (B, …) to (parts, B / parts, …), each part sharded over the mesh like the whole."""
    pieces = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return constrain(pieces, None, "batch", *(None,) * (x.ndim - 1))
