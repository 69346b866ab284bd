"""The one loss head of the project: projection and cross-entropy without the whole logits."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.core.sharding import AXES, spec

# Bytes of one chunk's fp32 logits on one device.
CPU_LOGITS, ACCELERATOR_LOGITS = 2**26, 2**29
FAR = 1e30  # above all logits, and finite when times a vocabulary


class How(NamedTuple):
    """All that is static: the head's layout, steps a chunk, z-loss, mesh axes larger than 1."""

    vocab_first: bool
    chunk: int
    z_loss: float
    batch_axes: tuple[str, ...] = ()
    embed_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        return "vd" if self.vocab_first else "dv"


class Head(NamedTuple):
    """What makes the logits; of its gradient a leaf is None where it is not asked for."""

    matrix: Any
    bias: Any = None


class Sums(NamedTuple):
    """Weighted sums over tokens: loss (z-loss included), argmax hits, squared log-partition."""

    total: Float[Array, ""]
    correct: Float[Array, ""]
    square: Float[Array, ""]


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    vocab_first: bool,
    chunk: int | None = None,
    z_loss: float = 0.0,
    bias: Float[Array, "V"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """sum of weights * (-log softmax(hidden head)[targets] + z_loss * logsumexp^2), unreduced.

    `head` is a table (V, D) if `vocab_first`, else a kernel (D, V); it is cast to hidden's dtype,
    and products are summed in fp32. `bias` is added to the logits. fp32 logits exist for `chunk`
    time steps at once (default: what fits the budget above); gradients come out of the same pass,
    head's and bias's only if they are trained. Metrics are sums too: `weight`, `correct` (argmax
    hits) and, with z-loss, `z` (its part of the total). Gradients do not reach `weights`. Under a
    mesh every device works on its rows and its part of the vocabulary, with one gather of the head
    and one reduction of its gradient.
    z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    """
    how = How(vocab_first, 0, z_loss)
    mesh, rows = jax.sharding.get_abstract_mesh(), len(hidden)
    vocab = head.shape[0 if vocab_first else 1]
    if not mesh.empty and mesh.size > 1:
        used = [a for a in AXES if mesh.shape[a] > 1]
        how = How(
            vocab_first,
            0,
            z_loss,
            batch_axes=tuple(a for a in used if a != "tensor"),
            embed_axes=tuple(a for a in used if a == "fsdp"),
            vocab_axes=tuple(a for a in used if a == "tensor"),
        )
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        hidden, targets, weights = (_pad(x, 0, ways) for x in (hidden, targets, weights))
        # A head widened by an adapter need not divide over fsdp.
        hidden = _pad(hidden, 2, mesh.shape["fsdp"])
        head = _pad(head, int(vocab_first), mesh.shape["fsdp"])
        rows, vocab = len(hidden) // ways, vocab // mesh.shape["tensor"]
    how = how._replace(chunk=chunk or _chunk(rows, hidden.shape[1], vocab))
    weights = weights.astype(jnp.float32)
    sums = _summed(how, hidden, Head(head, bias), targets, weights)
    metrics = {"weight": weights.sum(), "correct": jax.lax.stop_gradient(sums.correct)}
    if z_loss:
        metrics["z"] = z_loss * jax.lax.stop_gradient(sums.square)
    return sums.total, metrics


def _chunk(rows: int, length: int, vocab: int) -> int:
    budget = CPU_LOGITS if jax.default_backend() == "cpu" else ACCELERATOR_LOGITS
    size = 1
    while size < length and 2 * size * rows * vocab * 4 <= budget:
        size *= 2
    return min(size, length)


def _pad(x: Array, axis: int, multiple: int) -> Array:
    """Zeros up to a multiple; padded tokens have weight 0, and padded dims add nothing."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, pads) if pads[axis][1] else x


def _plain(how: How, hidden: Array, head: Head, targets: Array, weights: Array) -> Sums:
    return _run(how, hidden, head, targets, weights, False, Head(False, False))[0]


def _forward(how: How, hidden, head, targets, weights) -> tuple[Sums, tuple]:
    """Arguments say whether they are differentiated: a frozen head costs no gradient."""
    bias = head.bias
    values = Head(head.matrix.value, None if bias is None else bias.value)
    trained = Head(head.matrix.perturbed, bias is not None and bias.perturbed)
    sums, dx, dhead = _run(
        how, hidden.value, values, targets.value, weights.value, hidden.perturbed, trained
    )
    return sums, (dx, dhead)


def _backward(how: How, saved: tuple, cotangent: Sums) -> tuple:
    del how
    dx, dhead = jax.tree.map(lambda x: (x * cotangent.total).astype(x.dtype), saved)
    return dx, dhead, None, None


_summed = jax.custom_vjp(_plain, nondiff_argnums=(0,))
_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(
    how: How,
    hidden: Array,
    head: Head,
    targets: Array,
    weights: Array,
    with_dx: bool,
    trained: Head,
) -> tuple[Sums, Array | None, Head]:
    """Sums and the gradients asked for, on one device or on every device of the mesh."""
    local = partial(_local, how, with_dx=with_dx, trained=trained)
    if not how.batch_axes + how.vocab_axes:
        return local(hidden, head, targets, weights)
    batch = PartitionSpec(how.batch_axes)
    matrix = spec(("vocab", "embed") if how.vocab_first else ("embed", "vocab"))
    whole = Head(matrix, None if head.bias is None else spec(("vocab",)))
    made = Head(*(one if wanted else None for one, wanted in zip(whole, trained, strict=True)))
    out = (PartitionSpec(), batch if with_dx else None, made)
    # Not differentiated inside (the gradients are outputs), so nothing depends on vma types.
    mapped = jax.shard_map(
        local, in_specs=(batch, whole, batch, batch), out_specs=out, check_vma=False
    )
    return mapped(hidden, head, targets, weights)


def _local(
    how: How,
    hidden: Array,
    head: Head,
    targets: Array,
    weights: Array,
    *,
    with_dx: bool,
    trained: Head,
) -> tuple[Sums, Array | None, Head]:
    """One device: its rows, its slice of the vocabulary, all of D."""
    length, embed_axis = hidden.shape[1], how.head.index("d")
    matrix = head.matrix.astype(hidden.dtype)
    for name in how.embed_axes:
        matrix = jax.lax.all_gather(matrix, name, axis=embed_axis, tiled=True)

    def step(carry: tuple, x: tuple) -> tuple[tuple, Array | None]:
        sums, dw, db = carry
        new, dlogits = _chunk_sums(how, Head(matrix, head.bias), *x)
        sums = jax.tree.map(jnp.add, sums, new)
        db = None if db is None else db + dlogits.sum((0, 1))
        dlogits = dlogits.astype(matrix.dtype)
        dx = _dx(how, dlogits, matrix) if with_dx else None
        if dw is not None:
            dw += _dw(how, x[0], dlogits)
        return (sums, dw, db), dx

    zero = Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
    dw = jnp.zeros(matrix.shape, jnp.float32) if trained.matrix else None
    db = jnp.zeros(head.bias.shape, jnp.float32) if trained.bias else None
    chunks = tuple(_cut(_pad(x, 1, how.chunk), how.chunk) for x in (hidden, targets, weights))
    (sums, dw, db), dx = jax.lax.scan(step, (zero, dw, db), chunks)
    if dx is not None:
        dx = dx.swapaxes(0, 1).reshape(len(hidden), -1, hidden.shape[2])[:, :length]
    sums = jax.tree.map(partial(_psum, axes=how.batch_axes), sums)
    if dw is not None:
        dw = _reduced(how, dw, embed_axis).astype(head.matrix.dtype)
    if db is not None:
        db = _psum(db, how.batch_axes).astype(head.bias.dtype)
    return sums, dx, Head(dw, db)


def _chunk_sums(
    how: How, head: Head, x: Array, targets: Array, weights: Array
) -> tuple[Sums, Array]:
    """One chunk's sums and d(total)/d(logits), (b, c, V) fp32 of the local vocabulary."""
    logits = _product(f"bcd,{how.head}->bcv", x, head.matrix)
    logits = logits if head.bias is None else logits + head.bias.astype(jnp.float32)
    vocab = logits.shape[-1]
    local = targets - _offset(how, vocab)
    places = jnp.arange(vocab)
    best = logits.max(-1)
    top = jax.lax.pmax(best, how.vocab_axes) if how.vocab_axes else best
    exponentials = jnp.exp(logits - top[..., None])
    partition = _psum(exponentials.sum(-1), how.vocab_axes)
    log_partition = jnp.log(partition) + top
    target = _psum(_at(logits, local), how.vocab_axes)
    # The first maximum wins, as in argmax; a sum masks three times as fast as a select on a CPU.
    later = jnp.minimum(local[..., None] - 1.0, places) - places
    before = (logits + FAR * later).max(-1)
    before = jax.lax.pmax(before, how.vocab_axes) if how.vocab_axes else before
    hit = (target == top) & (before < top)
    square = jnp.square(log_partition)
    loss = log_partition - target + how.z_loss * square
    sums = Sums((weights * loss).sum(), (weights * hit).sum(), (weights * square).sum())
    slope = weights * (1 + 2 * how.z_loss * log_partition)
    onehot = places == local[..., None]
    dlogits = exponentials * (slope / partition)[..., None] - onehot * weights[..., None]
    return sums, dlogits


def _at(logits: Array, local: Array) -> Array:
    """logits[..., local], 0 where that is another device's."""
    vocab = logits.shape[-1]
    found = jnp.take_along_axis(logits, jnp.clip(local, 0, vocab - 1)[..., None], -1)[..., 0]
    return jnp.where((local >= 0) & (local < vocab), found, 0)


def _dx(how: How, dlogits: Array, matrix: Array) -> Array:
    dx = _psum(_product(f"bcv,{how.head}->bcd", dlogits, matrix), how.vocab_axes)
    return dx.astype(matrix.dtype)


def _dw(how: How, x: Array, dlogits: Array) -> Array:
    if jax.default_backend() != "cpu":
        return _product(f"bcd,bcv->{how.head}", x, dlogits)
    # Hidden first, and no transpose folded in: XLA:CPU would copy the wide dlogits.
    made = jax.lax.optimization_barrier(_product("bcd,bcv->dv", x, dlogits))
    return made.T if how.vocab_first else made


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _offset(how: How, vocab: int) -> Array | int:
    """The first token id of this device's slice of the vocabulary."""
    return jax.lax.axis_index(how.vocab_axes) * vocab if how.vocab_axes else 0


def _psum(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def _reduced(how: How, dw: Array, embed_axis: int) -> Array:
    """Sum the head's gradient over the batch, each device keeping its part of D."""
    for name in how.embed_axes:
        dw = jax.lax.psum_scatter(dw, name, scatter_dimension=embed_axis, tiled=True)
    return _psum(dw, tuple(name for name in how.batch_axes if name not in how.embed_axes))


def _cut(x: Array, size: int) -> Array:
    """(B, T, ...) as (chunks, B, size, ...)."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)
