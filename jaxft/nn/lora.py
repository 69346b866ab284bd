"""Low-rank adapters: their addition to projections by a regex, and their change of a kernel."""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod, sqrt
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import ADAPTER_ROLE, SCALE_ROLE
from jaxft.nn.conv import Conv
from jaxft.nn.linear import Adapter, Embedding, Linear, TrainedRows
from jaxft.weights.adapters import lokr, ranks

PATHS = r".*\.(?:lora_[abkm]|tokens\.embedding)"  # a regex of all parameters of adapters
ALL_LINEAR = "all-linear"  # PEFT's word for every projection but the output head
NO_HEAD = r"(?!(?:.*\.)?(?:lm_head|score)$).*"


def add(model: nnx.Module, cfg: Lora, key: PRNGKeyArray) -> None:
    """Add an adapter to each projection whose whole path matches the regex `cfg.targets`.

    "all-linear" stands for every projection but the output head, as in PEFT. Rank 0 adds none. A is
    Kaiming-uniform (a = sqrt 5) and B zero, as in PEFT. Both are fp32 and keep the leading "layers"
    dim of their kernel. `cfg.ranks` and `cfg.layers` give layers other ranks, or none. Their
    factors lie in one array, in which zeros fill up the smaller ones. A zero column of A and its
    zero row of B have no gradient, so that they stay zero. With `cfg.dora` the norms m of the
    kernel's outputs are added. With `cfg.lokr` the update is that of LoKr.
    Raises: UserError for a bad regex, and for one without a match, with a list of all projections.
    """
    if cfg.rank == 0:
        for name in ("ranks", "layers", "dora", "lokr"):
            if value := vars(cfg)[name]:
                raise UserError(f"lora.{name}={value!r} needs lora.rank > 0; set it")
        return
    linears = projections(model)
    try:
        chosen = [path for path in linears if re.fullmatch(pattern(cfg.targets), path)]
    except re.error as error:
        raise UserError(
            f"lora.targets={cfg.targets!r} is not a regular expression: {error}"
        ) from None
    if not chosen:
        alike = sorted({re.sub(r"\.\d+(?=\.|$)", ".N", path) for path in linears})
        raise UserError(
            f"lora.targets={cfg.targets!r} matches no projection; there are: {', '.join(alike)}"
        )
    if heads := [path for path in chosen if cfg.dora and not re.fullmatch(NO_HEAD, path)]:
        raise UserError(
            f"lora.dora=True does not go with an adapter of {heads[0]}, whose product is computed"
            f" by chunks; leave it out of lora.targets, as {ALL_LINEAR} does"
        )
    ranks.check(cfg, [(path, layer_count(linears[path])) for path in chosen])
    if not any(
        one.rank for path in chosen for one in ranks.sizes(cfg, path, layer_count(linears[path]))
    ):
        raise UserError(
            f"lora.ranks={cfg.ranks!r} and lora.layers={cfg.layers!r} leave no projection of"
            f" lora.targets={cfg.targets!r}; set a rank above 0"
        )
    attach = _attach_kronecker if cfg.lokr else _attach
    for path in chosen:
        # A key by path: the start of an adapter does not depend on the other targets.
        attach(linears[path], cfg, jax.random.fold_in(key, crc32(path.encode())), path)


def add_scales(model: nnx.Module) -> None:
    """Hold alpha / r of every adapter in a parameter. Members of a sweep have different ones."""
    for linear in projections(model).values():
        if isinstance(linear, Linear) and linear.lora_a is not None and linear.lora_s is None:
            layers = layer_count(linear)
            scale = jnp.full((layers,) if layers else (), linear.adapter.scale)
            linear.lora_s = nnx.data(nnx.Param(scale, axes=(), role=SCALE_ROLE))


def add_rows(table: Embedding, ids: tuple[int, ...]) -> None:
    """Let the rows of these tokens train while the others of an embedding are frozen."""
    if ids:
        table.tokens = nnx.data(TrainedRows(table.embedding[...], ids))


def pattern(targets: str) -> str:
    """Return the regex that `lora.targets` stands for."""
    return NO_HEAD if targets == ALL_LINEAR else targets


def check_plain(cfg: Lora, task: str) -> None:
    """Raise UserError for settings that only language models have."""
    for key, value in (
        ("ranks", cfg.ranks),
        ("layers", cfg.layers),
        ("tokens", cfg.tokens),
    ):
        if value:
            raise UserError(
                f"lora.{key}={value!r} is for language models; leave it out with task={task}"
            )
    if cfg.targets == ALL_LINEAR:
        raise UserError(
            f"lora.targets={ALL_LINEAR} is for language models; give task={task} a regex over"
            " projections, such as .*"
        )


def projections(model: nnx.Module) -> dict[str, Linear | Conv]:
    """Return every Linear and Conv by dotted path."""
    found = sorted((".".join(map(str, path)), m) for path, m in nnx.iter_modules(model))
    return {path: m for path, m in found if isinstance(m, Linear | Conv)}


def layer_count(linear: Linear | Conv) -> int:
    """Return the number of layers of a stacked kernel, and 0 for any other."""
    shape, axes = linear.kernel.shape, linear.kernel.get_metadata()["axes"]
    return shape[0] if len(shape) > len(axes) else 0


def _attach(linear: Any, cfg: Lora, key: PRNGKeyArray, path: str) -> None:
    """Add A [*lead, *ins, r] and B [*lead, r, *outs] to a kernel [*lead, *ins, *outs]."""
    layers, n = layer_count(linear), linear.inputs
    found = [size.rank for size in ranks.sizes(cfg, path, layers)]
    rank = max(found)
    if not rank:
        return
    axes, shape = linear.kernel.get_metadata()["axes"], linear.kernel.shape
    lead = shape[:1] if layers else ()
    ins, outs = shape[len(lead) : len(lead) + n], shape[len(lead) + n :]
    bound = 1 / sqrt(prod(ins))
    a = jax.random.uniform(key, (*lead, *ins, rank), minval=-bound, maxval=bound)
    if min(found) < rank:
        used = np.arange(rank) < np.array(found)[:, None]  # [*lead, r]
        a = jnp.where(used.reshape(*lead, *[1] * n, rank), a, 0)  # [*lead, *ins, r]
    linear.lora_a = nnx.data(nnx.Param(a, axes=(*axes[:n], "lora"), inputs=n, role=ADAPTER_ROLE))
    b = jnp.zeros((*lead, rank, *outs))
    linear.lora_b = nnx.data(nnx.Param(b, axes=("lora", *axes[n:]), inputs=1, role=ADAPTER_ROLE))
    if cfg.dora:
        over = tuple(range(len(lead), len(lead) + n))
        m = jnp.sqrt(jnp.square(linear.kernel[...].astype(jnp.float32)).sum(over))  # [*lead, *outs]
        m = jnp.where(np.array(found).reshape(*lead, *[1] * len(outs)) > 0, m, 0)
        linear.lora_m = nnx.data(nnx.Param(m, axes=axes[n:], role=ADAPTER_ROLE))
    scales = ranks.scales(cfg, path, layers)
    if len({one for one in scales if one}) > 1:
        linear.lora_s = nnx.data(nnx.Param(jnp.array(scales), axes=(), role=SCALE_ROLE))  # [L]
    linear.adapter = Adapter(max(scales), cfg.dropout, crc32(path.encode()))


def _attach_kronecker(linear: Any, cfg: Lora, key: PRNGKeyArray, path: str) -> None:
    """Add K [*lead, Q, P], A [*lead, *size, in / Q, r] and B [*lead, r, out / P] to a kernel.

    K is W1 of LoKr, transposed, and A B is W2. They start as in LyCORIS: A zero, the others random.
    The kernel is [*lead, *size, in, out]. Raises: UserError for a rank at which W2 would be whole
    in LyCORIS, whose readers expect it so.
    """
    axes, shape = linear.kernel.get_metadata()["axes"], linear.kernel.shape
    lead = shape[:1] if layer_count(linear) else ()
    if len(axes) - linear.inputs != 1 or linear.inputs not in (1, 3):
        raise UserError(f"lora.lokr={cfg.lokr}: {path} has no plain rows and columns; leave it out")
    size, (ins, outs), rank = shape[len(lead) : -2], shape[-2:], cfg.rank
    (q, low), (p, high) = (lokr.factorization(n, cfg.lokr) for n in (ins, outs))
    if 2 * rank >= max(low, high):
        raise UserError(
            f"lora.rank={rank} with lora.lokr={cfg.lokr} is not below half the size of W2, {high} x"
            f" {low}, at {path}; lower one of them, or leave {path} out of lora.targets"
        )
    first, second = jax.random.split(key)
    # Kaiming-uniform (a = sqrt 5) of W1 [P, Q] and of the first factor of W2 [out / P, r].
    k = jax.random.uniform(first, (*lead, q, p), minval=-(q**-0.5), maxval=q**-0.5)
    b = jax.random.uniform(second, (*lead, rank, high), minval=-(rank**-0.5), maxval=rank**-0.5)
    a, n = jnp.zeros((*lead, *size, low, rank)), linear.inputs
    whole = (None,) * n
    linear.lora_a = nnx.data(nnx.Param(a, axes=(*whole, "lora"), inputs=n, role=ADAPTER_ROLE))
    linear.lora_b = nnx.data(nnx.Param(b, axes=("lora", None), inputs=1, role=ADAPTER_ROLE))
    linear.lora_k = nnx.data(nnx.Param(k, axes=(None, None), inputs=1, role=ADAPTER_ROLE))
    linear.adapter = Adapter(ranks.scale(cfg), cfg.dropout, crc32(path.encode()))


def continued(asked: Lora, own: Lora, linears: Mapping[str, Linear | Conv]) -> Lora:
    """Return the settings of an adapter that training continues, with the run's dropout if set.

    `asked` holds the settings of the run, `own` those of the adapter, `linears` all projections.
    Raises: UserError for a setting of the run that contradicts the adapter.
    """
    # A setting of the run that is 0 or empty is not set, and takes the adapter's value.
    name = asked.from_
    for key, value in (
        ("rank", asked.rank),
        ("alpha", asked.alpha),
        ("rslora", asked.rslora),
        ("dora", asked.dora),
        ("lokr", asked.lokr),
    ):
        if value and value != getattr(own, key):
            raise UserError(
                f"lora.{key}={value}, but {name} has {key} {getattr(own, key):g}; leave it out, or"
                " give another lora.from"
            )
    if asked.targets:
        for path in linears:
            wanted, there = (re.fullmatch(pattern(one.targets), path) for one in (asked, own))
            if bool(wanted) != bool(there):
                also = "adapts" if there else "does not adapt"
                raise UserError(
                    f"lora.targets={asked.targets!r}, but {name} {also} {path}; leave it out"
                )
    for key, value, wanted in (
        ("ranks", asked.ranks, replace(own, ranks=asked.ranks)),
        ("layers", asked.layers, replace(own, layers=asked.layers)),
    ):
        for path in filter(re.compile(pattern(own.targets)).fullmatch, linears if value else ()):
            count = layer_count(linears[path])
            if ranks.sizes(wanted, path, count) != ranks.sizes(own, path, count):
                raise UserError(
                    f"lora.{key}={value!r}, but {name} has other ranks at {path}; leave it out"
                )
    return replace(own, dropout=asked.dropout or own.dropout, from_=name)


def adapted(paths: Mapping) -> list[str]:
    """Return the paths of projections with an adapter, from the paths of parameters."""
    return [path.removesuffix(".lora_a") for path in paths if path.endswith(".lora_a")]


def delta(a: np.ndarray, b: np.ndarray, factor: float) -> np.ndarray:
    """Return factor * A B of one layer in fp32, in the shape of its kernel [*ins, *outs].

    a: [*ins, r], for a convolution [size, size, in, r]. b: [r, *outs].
    """
    return factor * np.tensordot(a.astype(np.float32), b.astype(np.float32), 1)  # [*ins, *outs]


def expanded(a: np.ndarray, b: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return A [*size, in, Q r] and B [Q r, out] of a LoRA with the product of a LoKr.

    a: [*size, in / Q, r], b: [r, out / P], k: [Q, P], of one layer.
    """
    own = np.eye(len(k), dtype=np.float32)
    wide = np.einsum("pq,...ir->...piqr", own, a.astype(np.float32))  # [*size, Q, in / Q, Q, r]
    *size, blocks, low, _, rank = wide.shape
    wide = wide.reshape(*size, blocks * low, blocks * rank)  # [*size, in, Q r]
    return wide, np.kron(k.astype(np.float32), b.astype(np.float32))


def merged(
    kernel: np.ndarray, a: np.ndarray, b: np.ndarray, m: np.ndarray | None, factor: float
) -> np.ndarray:
    """Return the kernel of one layer with its adapter, fp32.

    m: DoRA's norm of each output, 0 in a layer without an adapter. None is plain LoRA.
    """
    made = kernel.astype(np.float32) + delta(a, b, factor)  # [*ins, *outs]
    if m is None:
        return made
    norm = np.sqrt(np.square(made).sum(tuple(range(a.ndim - 1))))  # [*outs]
    return made * np.where(m == 0, 1, m / np.where(norm == 0, 1, norm))
