"""Weights between a source and sharded parameters: streaming import, export tensor by tensor."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.core.errors import UserError
from jaxft.core.params import Leaf, Params
from jaxft.weights.files.tensor_files import Tensors
from jaxft.weights.rules import Entry, Rule, Sizes, expected, plan, to_jax, to_torch


class Part(NamedTuple):
    """One component of a model: its parameters' prefix, and the checkpoint that fills them.

    `folder` and `stem` say where an export writes it. `whole` are modules that an adapter's file
    may hold whole beside the adapters. `kept` are tensors that it has to hold, since the base has
    others. An aid (a network that only measures) is
    loaded whatever `init` says, and never exported.
    """

    prefix: str
    name: str
    tensors: Tensors | None
    rules: tuple[Rule, ...]
    sizes: Sizes
    ignore: tuple[str, ...] = ()  # tensors that make no parameter; an export copies them
    drop: tuple[str, ...] = ()  # tensors that make none and that training would leave stale
    folder: str = ""
    stem: str = "model"
    aid: bool = False
    whole: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def entries(self, leaves: Mapping[str, Leaf]) -> list[Entry]:
        """The plan for this part's own parameters (none that a run adds), paths with the prefix."""
        own = {
            path.removeprefix(self.prefix): leaf
            for path, leaf in leaves.items()
            if path.startswith(self.prefix) and not leaf.added
        }
        if self.tensors is None:
            found = expected(self.rules, own)
        else:
            names, skipped = self.tensors.keys(), self.ignore + self.drop
            shapes = {key: self.tensors.info(key)[0] for key in names}
            found = plan(self.rules, own, shapes, self.sizes, skipped, self.name)
        return [entry._replace(path=self.prefix + entry.path) for entry in found]


def load(
    part: Part,
    leaves: Mapping[str, Leaf],
    shardings: Mapping[str, NamedSharding],
    dtype: Any,
    wanted: set[str],
) -> Params:
    """Import the `wanted` parameters of a part, sharded, in `dtype`.

    Host memory beside the parameters: one tensor. A stacked parameter is filled layer by layer
    in a donated buffer, so that its arrays are XLA's own and can be donated by the step.
    """
    assert part.tensors is not None
    params: Params = {}
    for entry in part.entries(leaves):
        if entry.path not in wanted:
            continue
        target = shardings[entry.path]
        params[entry.path] = _load_entry(entry, part, leaves[entry.path].shape, dtype, target)
    return params


def _load_entry(
    entry: Entry, part: Part, shape: tuple[int, ...], dtype: Any, target: NamedSharding
) -> jax.Array:
    assert part.tensors is not None
    one = NamedSharding(target.mesh, PartitionSpec(*target.spec[1:])) if entry.stacked else target
    buffer = _zeros(shape, dtype, target) if entry.stacked else None
    for i, key in enumerate(entry.keys):
        host = to_jax(part.tensors.read(key), entry.layout, part.sizes)
        piece = jax.make_array_from_callback(host.shape, one, partial(_window, host))
        buffer = _place(piece, dtype, one) if buffer is None else _fill(buffer, piece, i, target)
        buffer.block_until_ready()
    assert buffer is not None
    return buffer


def _window(host: np.ndarray, index: Any) -> np.ndarray:
    return host[index]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _fill(buffer: jax.Array, piece: jax.Array, i: int, sharding: NamedSharding) -> jax.Array:
    filled = buffer.at[i].set(piece.astype(buffer.dtype))
    return jax.lax.with_sharding_constraint(filled, sharding)


@partial(jax.jit, static_argnums=(1, 2))
def _place(piece: jax.Array, dtype: Any, sharding: NamedSharding) -> jax.Array:
    # The copy makes the buffer XLA's own: a piece may alias the host array it came from.
    return jax.lax.with_sharding_constraint(jnp.copy(piece.astype(dtype)), sharding)


class Export(NamedTuple):
    """What an export writes: shapes and dtypes first, then the tensors, one at a time."""

    infos: dict[str, tuple[tuple[int, ...], np.dtype]]
    tensors: Iterator[tuple[str, np.ndarray]]


def export(
    part: Part,
    leaves: Mapping[str, Leaf],
    trained: Mapping[str, jax.Array],
    deltas: Mapping[str, Callable[[int], np.ndarray]],
    dtype: np.dtype | None,
) -> Export:
    """The part's checkpoint after training, in the source's order.

    Tensors that training did not touch are the source's own bytes; a kernel in `deltas` is the
    source's tensor plus its adapter, added in fp32; `dtype` None keeps each tensor's dtype.
    Parameters of a part without a source come from `trained`, which then holds all of them.
    """
    owners = {key: (entry, i) for entry in part.entries(leaves) for i, key in enumerate(entry.keys)}
    infos = {key: _info(part, leaves, owners.get(key), key, dtype) for key in _order(part, owners)}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for key, (_, wanted) in infos.items():
            array = _tensor(part, trained, deltas, owners.get(key), key)
            yield key, _narrow(array, wanted, key)

    return Export(infos, tensors())


def _order(part: Part, owners: Mapping[str, Any]) -> list[str]:
    if part.tensors is None:
        return list(owners)
    names = part.tensors.keys()
    return [key for key in names if not any(re.fullmatch(stale, key) for stale in part.drop)]


def _info(
    part: Part,
    leaves: Mapping[str, Leaf],
    owner: tuple[Entry, int] | None,
    key: str,
    dtype: np.dtype | None,
) -> tuple[tuple[int, ...], np.dtype]:
    if part.tensors is not None:
        shape, own = part.tensors.info(key)
        given = dtype if jnp.issubdtype(own, jnp.floating) else None  # index buffers stay integers
        return tuple(shape), np.dtype(given or own)
    assert owner is not None
    entry, leaf = owner[0], leaves[owner[0].path]
    one = np.broadcast_to(np.int8(0), leaf.shape[1:] if entry.stacked else leaf.shape)
    return to_torch(one, entry.layout, part.sizes).shape, np.dtype(dtype or np.float32)


def _tensor(
    part: Part,
    trained: Mapping[str, jax.Array],
    deltas: Mapping[str, Callable[[int], np.ndarray]],
    owner: tuple[Entry, int] | None,
    key: str,
) -> np.ndarray:
    entry, i = owner or (None, 0)
    touched = entry is not None and (entry.path in trained or entry.path in deltas)
    if not touched:
        assert part.tensors is not None
        return part.tensors.read(key)
    assert entry is not None
    if entry.path in trained:
        array = to_host(trained[entry.path][i] if entry.stacked else trained[entry.path])
    else:
        assert part.tensors is not None
        array = to_jax(part.tensors.read(key), entry.layout, part.sizes)
    if entry.path in deltas:
        array = array.astype(np.float32) + deltas[entry.path](i)
    return to_torch(array, entry.layout, part.sizes)


def _narrow(array: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(narrow).all() and np.isfinite(array).all():
        raise UserError(f"tensor {key} overflows float16; export with export.dtype=bfloat16")
    return narrow


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array on this host, gathered from all hosts where it is spread over them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
