"""The loss head of language models: projection and cross-entropy, by chunks of the logits."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.core.runtime import device, find_chip
from jaxft.core.sharding import AXES, spec
from jaxft.kernels.elementwise import soft_capped

# Bytes of one chunk's fp32 logits on one device: fixed for a CPU, a share of an accelerator's
# memory. The head's gradient is read and written once a chunk, so few large chunks are better.
CPU_LOGITS, ACCELERATOR_SHARE = 2**26, 1 / 32
LEAST_MEMORY = 2**34  # bytes of an accelerator without known figures
TILE = 8  # rows of a tile in the memory of a TPU
FAR = 1e30  # above all logits, and finite if multiplied by a vocabulary's size


class HeadConfig(NamedTuple):
    """Static settings: the head's layout, time steps a chunk, z-loss, mesh axes larger than 1.

    per_token: the loss of each token is returned too. soft_cap: that of the logits.
    """

    vocab_first: bool
    chunk: int
    z_loss: float = 0.0
    soft_cap: float | None = None
    batch_axes: tuple[str, ...] = ()
    embed_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()
    per_token: bool = False

    @property
    def layout(self) -> str:
        """The letters of the matrix in an einsum."""
        return "vd" if self.vocab_first else "dv"


class Head(NamedTuple):
    """Matrix and bias of the logits, or their gradients, None where no gradient is needed."""

    matrix: Any
    bias: Any = None


FROZEN = Head(False, False)  # no gradient of the head is requested


class Sums(NamedTuple):
    """Weighted sums over tokens: loss (with z-loss), argmax hits, squared log-partition."""

    total: Float[Array, ""]
    correct: Float[Array, ""]
    square: Float[Array, ""]


@jax.named_scope("vocabulary_loss")
def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    vocab_first: bool,
    chunk: int | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    bias: Float[Array, "V"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the sum of weights * (-log softmax(hidden head)[targets] + z_loss * logsumexp^2).

    hidden: [B, T, D]. head: a table [V, D] if `vocab_first`, else a kernel [D, V]. It is cast to
    hidden's dtype, and products are summed in fp32. bias: [V], added to the logits.
    targets, weights: [B, T]. Gradients do not reach `weights`.
    chunk: time steps whose fp32 logits exist at once, by default as many as fit the budget above.
    z_loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    soft_cap: logits x, with their bias, become soft_cap * tanh(x / soft_cap).

    Returns: the sum, and a dict of more sums: `weight`, `correct` (argmax hits) and, with z-loss,
    `z` (its part of the sum).

    The forward pass computes the gradients, those of head and bias only if they are trained. Under
    a mesh each device computes its rows and its part of the vocabulary, with one gather of the head
    and one reduction of its gradient.
    """
    cfg = HeadConfig(vocab_first, 0, z_loss, soft_cap)
    cfg, (hidden, head, targets, weights) = _fit(cfg, chunk, hidden, head, targets, weights)
    weights = weights.astype(jnp.float32)
    sums = _summed(cfg, hidden, Head(head, bias), targets, weights)
    metrics = {"weight": weights.sum(), "correct": jax.lax.stop_gradient(sums.correct)}
    if z_loss:
        metrics["z"] = z_loss * jax.lax.stop_gradient(sums.square)
    return sums.total, metrics


@jax.named_scope("vocabulary_loss")
def linear_log_probs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    vocab_first: bool,
    chunk: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T"]:
    """Return log softmax(hidden head)[targets] of each token, for losses that are not their sum.

    Arguments, chunks and sharding are those of `linear_cross_entropy`. With a frozen head, the
    forward pass computes the gradient, one vector a token. The gradient of a trained head depends
    on the cotangent of each token, so that the backward pass computes the logits a second time.
    """
    ones = jnp.ones(targets.shape, jnp.float32)
    cfg = HeadConfig(vocab_first, 0, soft_cap=soft_cap)
    cfg, inputs = _fit(cfg, chunk, hidden, head, targets, ones)
    made = _token_log_probs(cfg, inputs[0], Head(inputs[1]), *inputs[2:])
    return made[: len(targets)]


def _fit(
    cfg: HeadConfig,
    chunk: int | None,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
) -> tuple[HeadConfig, tuple[Array, ...]]:
    """Return the settings for the mesh in use, and the arrays padded to be divided over it."""
    mesh, rows = jax.sharding.get_abstract_mesh(), len(hidden)
    vocab = head.shape[0 if cfg.vocab_first else 1]
    if not mesh.empty and mesh.size > 1:
        used = [a for a in AXES if mesh.shape[a] > 1]
        cfg = cfg._replace(
            batch_axes=tuple(a for a in used if a != "tensor"),
            embed_axes=tuple(a for a in used if a == "fsdp"),
            vocab_axes=tuple(a for a in used if a == "tensor"),
        )
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        hidden, targets, weights = (_pad(x, 0, ways) for x in (hidden, targets, weights))
        # fsdp may not divide the width of a head with an adapter, D + r.
        hidden = _pad(hidden, 2, mesh.shape["fsdp"])
        head = _pad(head, int(cfg.vocab_first), mesh.shape["fsdp"])
        rows, vocab = len(hidden) // ways, vocab // mesh.shape["tensor"]
    cfg = cfg._replace(chunk=chunk or chunk_length(rows, hidden.shape[1], vocab))
    return cfg, (hidden, head, targets, weights)


def reference(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    vocab_first: bool,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    bias: Float[Array, "V"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the same as `linear_cross_entropy`, by its formula, with all logits at once."""
    matrix = (head.T if vocab_first else head).astype(jnp.float32)  # [D, V]
    logits = hidden.astype(jnp.float32) @ matrix  # [B, T, V]
    logits, _ = soft_capped(logits if bias is None else logits + bias, soft_cap)
    log_partition = jax.nn.logsumexp(logits, -1)  # [B, T]
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]  # [B, T]
    z = z_loss * jnp.square(log_partition)
    hits = logits.argmax(-1) == targets
    metrics = {"weight": weights.sum(), "correct": (weights * hits).sum()}
    if z_loss:
        metrics["z"] = (weights * z).sum()
    return (weights * (log_partition - target + z)).sum(), metrics


def chunk_length(rows: int, length: int, vocab: int) -> int:
    """Return time steps a chunk, whose logits fit the budget of a device, or nearly.

    A power of 2 on a CPU. An accelerator gets chunks of nearly equal size, which leave little of
    the last one empty.
    """
    step, here = 4 * rows * vocab, device()
    if here.platform == "cpu":
        size = 1
        while size < length and 2 * size * step <= CPU_LOGITS:
            size *= 2
        return min(size, length)
    chip = find_chip(here.kind)
    most = max(int(ACCELERATOR_SHARE * (chip.memory if chip else LEAST_MEMORY) / step), 1)
    even = -(-length // -(-length // most))
    return min(-(-even // TILE) * TILE, length)


def _pad(x: Array, axis: int, multiple: int) -> Array:
    """Append zeros up to a multiple. Padded tokens have weight 0, and padded dims add nothing."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, pads) if pads[axis][1] else x


def _plain(cfg: HeadConfig, hidden: Array, head: Head, targets: Array, weights: Array) -> Sums:
    return _run(cfg, hidden, head, targets, weights, False, FROZEN)[0]


def _forward(cfg: HeadConfig, hidden, head, targets, weights) -> tuple[Sums, tuple]:
    """Return sums, and gradients of the arguments that are differentiated.

    A frozen head costs no gradient.
    """
    bias = head.bias
    values = Head(head.matrix.value, None if bias is None else bias.value)
    trained = Head(head.matrix.perturbed, bias is not None and bias.perturbed)
    sums, _, dx, dhead = _run(
        cfg, hidden.value, values, targets.value, weights.value, hidden.perturbed, trained
    )
    return sums, (dx, dhead)


def _backward(cfg: HeadConfig, saved: tuple, cotangent: Sums) -> tuple:
    del cfg
    dx, dhead = jax.tree.map(lambda x: (x * cotangent.total).astype(x.dtype), saved)
    return dx, dhead, None, None


_summed = jax.custom_vjp(_plain, nondiff_argnums=(0,))
_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _each(cfg: HeadConfig, hidden: Array, head: Head, targets: Array, ones: Array) -> Array:
    cfg = cfg._replace(per_token=True)
    losses: Any = _run(cfg, hidden, head, targets, ones, False, FROZEN)[1]
    return -losses


def _each_forward(cfg: HeadConfig, hidden, head, targets, ones) -> tuple[Array, tuple]:
    """Return log-probabilities, and either d(loss)/d(hidden) or, for a trained head, all inputs."""
    cfg, matrix = cfg._replace(per_token=True), Head(head.matrix.value)
    recompute = head.matrix.perturbed
    with_dx = hidden.perturbed and not recompute
    made = _run(cfg, hidden.value, matrix, targets.value, ones.value, with_dx, FROZEN)
    losses: Any = made[1]
    return -losses, (made[2], (hidden.value, matrix, targets.value) if recompute else None)


def _each_backward(cfg: HeadConfig, saved: tuple, cotangent: Array) -> tuple:
    dx, inputs = saved
    if inputs is not None:
        hidden, head, targets = inputs
        _, _, dx, dhead = _run(cfg, hidden, head, targets, -cotangent, True, Head(True, False))
        return dx, dhead, None, None
    dx = None if dx is None else (dx * -cotangent[..., None]).astype(dx.dtype)  # [B, T, D]
    return dx, Head(None), None, None


_token_log_probs = jax.custom_vjp(_each, nondiff_argnums=(0,))
_token_log_probs.defvjp(_each_forward, _each_backward, symbolic_zeros=True)


def _run(
    cfg: HeadConfig,
    hidden: Array,
    head: Head,
    targets: Array,
    weights: Array,
    with_dx: bool,
    trained: Head,
) -> tuple[Sums, Array | None, Array | None, Head]:
    """Return sums, losses of each token and the requested gradients, from all of the mesh."""
    local = partial(_local, cfg, with_dx=with_dx, trained=trained)
    if not cfg.batch_axes + cfg.vocab_axes:
        return local(hidden, head, targets, weights)
    batch = PartitionSpec(cfg.batch_axes)
    matrix = spec(("vocab", "embed") if cfg.vocab_first else ("embed", "vocab"))
    whole = Head(matrix, None if head.bias is None else spec(("vocab",)))
    made = Head(*(one if wanted else None for one, wanted in zip(whole, trained, strict=True)))
    out = (PartitionSpec(), batch if cfg.per_token else None, batch if with_dx else None, made)
    # The gradients are outputs, and nothing inside is differentiated, so vma types are not needed.
    mapped = jax.shard_map(
        local, in_specs=(batch, whole, batch, batch), out_specs=out, check_vma=False
    )
    return mapped(hidden, head, targets, weights)


def _local(
    cfg: HeadConfig,
    hidden: Array,
    head: Head,
    targets: Array,
    weights: Array,
    *,
    with_dx: bool,
    trained: Head,
) -> tuple[Sums, Array | None, Array | None, Head]:
    """Return the sums over the mesh, and one device's part of the losses and gradients.

    The arguments are those of one device: its rows, its slice of the vocabulary and of D.
    """
    length, embed_axis = hidden.shape[1], cfg.layout.index("d")
    matrix = head.matrix.astype(hidden.dtype)
    for name in cfg.embed_axes:
        matrix = jax.lax.all_gather(matrix, name, axis=embed_axis, tiled=True)

    def step(carry: tuple, x: tuple) -> tuple[tuple, tuple]:
        sums, dw, db = carry
        new, losses, dlogits = _chunk_sums(cfg, Head(matrix, head.bias), *x)
        sums = jax.tree.map(jnp.add, sums, new)
        db = None if db is None else db + dlogits.sum((0, 1))
        dlogits = dlogits.astype(matrix.dtype)
        dx = None
        if with_dx:
            dx = _product(f"bcv,{cfg.layout}->bcd", dlogits, matrix)  # [B, chunk, D]
            dx = _psum(dx, cfg.vocab_axes).astype(matrix.dtype)
        if dw is not None:
            dw += _dw(cfg, x[0], dlogits)
        return (sums, dw, db), (losses if cfg.per_token else None, dx)

    zero = Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
    dw = jnp.zeros(matrix.shape, jnp.float32) if trained.matrix else None
    db = jnp.zeros(head.bias.shape, jnp.float32) if trained.bias else None
    chunks = tuple(_cut(_pad(x, 1, cfg.chunk), cfg.chunk) for x in (hidden, targets, weights))
    (sums, dw, db), (losses, dx) = jax.lax.scan(step, (zero, dw, db), chunks)
    if losses is not None:
        losses = losses.swapaxes(0, 1).reshape(len(hidden), -1)[:, :length]  # [B, T]
    if dx is not None:
        dx = dx.swapaxes(0, 1)  # [B, chunks, chunk, D]
        dx = dx.reshape(len(hidden), -1, hidden.shape[2])[:, :length]  # [B, T, D]
    sums = jax.tree.map(partial(_psum, axes=cfg.batch_axes), sums)
    if dw is not None:
        # The sum is over the batch. Each device keeps its part of D.
        for name in cfg.embed_axes:
            dw = jax.lax.psum_scatter(dw, name, scatter_dimension=embed_axis, tiled=True)
        others = tuple(name for name in cfg.batch_axes if name not in cfg.embed_axes)
        dw = _psum(dw, others).astype(head.matrix.dtype)
    if db is not None:
        db = _psum(db, cfg.batch_axes).astype(head.bias.dtype)
    return sums, losses, dx, Head(dw, db)


def _chunk_sums(
    cfg: HeadConfig, head: Head, x: Array, targets: Array, weights: Array
) -> tuple[Sums, Array, Array]:
    """Return one chunk's sums, its losses without weights [B, chunk], and d(total)/d(logits).

    The gradient is [B, chunk, V] of the local vocabulary.
    """
    logits = _product(f"bcd,{cfg.layout}->bcv", x, head.matrix)  # [B, chunk, V]
    logits = logits if head.bias is None else logits + head.bias.astype(jnp.float32)
    logits, cap_slope = soft_capped(logits, cfg.soft_cap)
    vocab = logits.shape[-1]
    # Index of the target in this device's slice of the vocabulary, outside it on other devices.
    local = targets - (jax.lax.axis_index(cfg.vocab_axes) * vocab if cfg.vocab_axes else 0)
    places = jnp.arange(vocab)
    best = logits.max(-1)  # [B, chunk]
    top = jax.lax.pmax(best, cfg.vocab_axes) if cfg.vocab_axes else best
    exponentials = jnp.exp(logits - top[..., None])
    partition = _psum(exponentials.sum(-1), cfg.vocab_axes)
    log_partition = jnp.log(partition) + top
    target = jnp.take_along_axis(logits, jnp.clip(local, 0, vocab - 1)[..., None], -1)[..., 0]
    target = _psum(jnp.where((local >= 0) & (local < vocab), target, 0), cfg.vocab_axes)
    # A hit is the first maximum, as in argmax. A CPU masks three times as fast by a sum.
    later = jnp.minimum(local[..., None] - 1.0, places) - places
    before = (logits + FAR * later).max(-1)
    before = jax.lax.pmax(before, cfg.vocab_axes) if cfg.vocab_axes else before
    hit = (target == top) & (before < top)
    square = jnp.square(log_partition)
    loss = log_partition - target + cfg.z_loss * square
    sums = Sums((weights * loss).sum(), (weights * hit).sum(), (weights * square).sum())
    slope = weights * (1 + 2 * cfg.z_loss * log_partition)
    onehot = places == local[..., None]
    dlogits = exponentials * (slope / partition)[..., None] - onehot * weights[..., None]
    return sums, loss, dlogits if cap_slope is None else dlogits * cap_slope


def _dw(cfg: HeadConfig, x: Array, dlogits: Array) -> Array:
    """Return the gradient of the matrix from one chunk, in the matrix's layout."""
    if device().platform != "cpu":
        return _product(f"bcd,bcv->{cfg.layout}", x, dlogits)
    # Hidden comes first, and the barrier keeps the transpose out: XLA:CPU would copy dlogits.
    made = jax.lax.optimization_barrier(_product("bcd,bcv->dv", x, dlogits))
    return made.T if cfg.vocab_first else made  # [V, D] or [D, V]


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _psum(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def _cut(x: Array, size: int) -> Array:
    """Cut x [B, T, ..] into [chunks, B, size, ..]."""
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])  # [B, chunks, size, ..]
    return x.swapaxes(0, 1)  # [chunks, B, size, ..]
