"""Adam with an exact bias correction, and the same with moments of 8 bits."""

from math import log, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

ADAM_EPS = 1e-8
SMALLEST = 4096  # elements of a parameter whose moments have 8 bits
LONGEST, SHORTEST = 256, 16  # elements that share a scale, at most and at least


class Moment(NamedTuple):
    """A moment in 8 bits: codes in the shape of the parameter, and one scale a block.

    The scale of a block is the largest magnitude in it. It has the parameter's rank.
    """

    codes: Int[Array, "..."]
    scale: Float[Array, "..."]


class Code(NamedTuple):
    """The value of a code c is scale * sign(c) * (|c| / levels) ** (2 ** roots)."""

    dtype: Any
    levels: int
    roots: int


# The second moment spans more magnitudes, as it is a square, and it is never negative.
FIRST, SECOND = Code(jnp.int8, 127, 1), Code(jnp.uint8, 255, 2)


def adam(b1: float, b2: float) -> optax.GradientTransformation:
    """Return optax's Adam, with an exact bias correction.

    optax computes 1 - b**t in fp32, which makes its first steps wrong by 7e-6 at b2 = 0.999.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        return _direction(mu, nu, count, b1, b2), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2).init, update)


def adam_8bit(b1: float, b2: float) -> optax.GradientTransformation:
    """Return `adam` whose moments are stored in 8 bits.

    A block is a run of at most LONGEST elements that lies within the last dims, so that shards are
    mostly cut between blocks. Parameters of less than SMALLEST elements, and those whose
    last dims have no such run of SHORTEST elements, keep moments of fp32.

    Source: Dettmers et al. 2021, arXiv 2110.02861. Values are a power of the code here.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        def zeros(code: Code) -> dict[str, Any]:
            return {path: _encode(jnp.zeros(x.shape), code) for path, x in params.items()}

        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(FIRST), zeros(SECOND))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = {k: b1 * _decode(state.mu[k], FIRST) + (1 - b1) * g for k, g in updates.items()}
        nu = {k: b2 * _decode(state.nu[k], SECOND) + (1 - b2) * g * g for k, g in updates.items()}
        stored = (
            {path: _encode(x, code) for path, x in moments.items()}
            for moments, code in ((mu, FIRST), (nu, SECOND))
        )
        return _direction(mu, nu, count, b1, b2), optax.ScaleByAdamState(count, *stored)

    return optax.GradientTransformation(init, update)


def _direction(mu: Any, nu: Any, count: Any, b1: float, b2: float) -> Any:
    def debias(b: float) -> Any:
        return -jnp.expm1(count * log(b)) if b else 1.0

    first, second = debias(b1), debias(b2)
    return jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + ADAM_EPS), mu, nu)


def _block(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the dim that is cut into blocks and its size within a block. Later dims are whole."""
    dim, size = len(shape) - 1, 1
    while dim > 0 and size * shape[dim] <= LONGEST:
        size, dim = size * shape[dim], dim - 1
    room = LONGEST // size
    return dim, next(part for part in range(min(room, shape[dim]), 0, -1) if not shape[dim] % part)


def _encode(x: Float[Array, "..."], code: Code) -> Float[Array, "..."] | Moment:
    if x.size < SMALLEST:
        return x
    dim, part = _block(x.shape)
    if part * prod(x.shape[dim + 1 :]) < SHORTEST:
        return x
    cut = x.reshape(*x.shape[:dim], x.shape[dim] // part, part, *x.shape[dim + 1 :])
    scale = jnp.abs(cut).max(range(dim + 1, cut.ndim), keepdims=True)
    share = jnp.abs(cut) / jnp.where(scale > 0, scale, 1.0)
    for _ in range(code.roots):
        share = jnp.sqrt(share)
    codes = jnp.round(share * code.levels)
    if code is SECOND:  # one of 0 beside a first moment that is not would give a huge update
        codes = jnp.maximum(codes, share > 0)
    codes = (jnp.sign(cut) * codes).astype(code.dtype)
    return Moment(codes.reshape(x.shape), scale.squeeze(dim + 1))


def _decode(moment: Float[Array, "..."] | Moment, code: Code) -> Float[Array, "..."]:
    if not isinstance(moment, Moment):
        return moment
    codes, scale = moment.codes.astype(jnp.float32), moment.scale
    dim, part = _block(codes.shape)
    cut = codes.reshape(*codes.shape[:dim], codes.shape[dim] // part, part, *codes.shape[dim + 1 :])
    value = jnp.sign(cut) * (jnp.abs(cut) / code.levels) ** (2**code.roots)
    return (value * jnp.expand_dims(scale, dim + 1)).reshape(codes.shape)
