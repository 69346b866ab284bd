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
from jaxft.core.guards.fingerprint import is_finite
from jaxft.core.params import TEACHER_ROLE, Leaf, Params
from jaxft.weights.files.tensor_files import Tensors
from jaxft.weights.rules import Entry, Rule, Sizes, expected, in_class, plan, to_jax, to_torch


class Part(NamedTuple):
    """One component of a model: its parameters' prefix, and the checkpoint that fills them.

    An export writes it to `folder`, in files whose names begin with `stem`. `whole` are modules
    that an adapter's file may hold beside the low-rank factors. `kept` are tensors that such a file
    has to hold, because the base model has others. `rows` are ids of tokens whose embeddings train
    alone. `class_names` are pairs of starts of names, in the file and in transformers' class: the
    file of an adapter has the latter. An `aid` is a network that only measures: it is loaded
    whatever `init` is, and never exported.
    """

    prefix: str
    name: str
    tensors: Tensors | None
    rules: tuple[Rule, ...]
    sizes: Sizes
    ignore: tuple[str, ...] = ()  # tensors that fill no parameter. An export copies them
    drop: tuple[str, ...] = ()  # tensors that fill none and that training would make stale
    folder: str = ""
    stem: str = "model"
    aid: bool = False
    whole: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    class_names: tuple[tuple[str, str], ...] = ()

    def entries(self, leaves: Mapping[str, Leaf]) -> list[Entry]:
        """Return the plan for this part's parameters, paths with the prefix.

        Parameters that a run adds are left out, because no checkpoint of the model has them, and so
        are those of a teacher inside of the model.
        """
        own = {
            path.removeprefix(self.prefix): leaf
            for path, leaf in leaves.items()
            if path.startswith(self.prefix)
            and not leaf.added
            and (self.aid or leaf.role != TEACHER_ROLE)
        }
        if self.tensors is None:
            found = expected(self.rules, own)
        else:
            names, skipped = self.tensors.keys(), self.ignore + self.drop
            shapes = {key: self.tensors.info(key)[0] for key in names}
            found = plan(self.rules, own, shapes, self.sizes, skipped, self.name)
        return [entry._replace(path=self.prefix + entry.path) for entry in found]

    def named(self, key: str) -> str:
        """Return a tensor's name in the class in memory, by its key in the checkpoint."""
        return in_class(key, self.class_names)

    def class_entries(self, leaves: Mapping[str, Leaf]) -> list[Entry]:
        """Return `entries` with the names of the class in memory."""
        found = self.entries(leaves)
        return [entry._replace(keys=tuple(map(self.named, entry.keys))) for entry in found]


def load(
    part: Part,
    leaves: Mapping[str, Leaf],
    shardings: Mapping[str, NamedSharding],
    dtype: Any,
    wanted: set[str],
) -> Params:
    """Import the `wanted` parameters of a part, sharded, in `dtype`.

    The host holds one tensor at a time beside the parameters. A stacked parameter is filled layer
    by layer in a donated buffer. XLA owns this memory, so the step can donate the arrays too.
    Raises: UserError that names the tensors with numbers that are not finite in `dtype`.
    """
    assert part.tensors is not None
    params: Params = {}
    bad: list[str] = []
    for entry in part.entries(leaves):
        if entry.path not in wanted:
            continue
        target = shardings[entry.path]
        shape = leaves[entry.path].shape
        params[entry.path], found = _load_entry(entry, part, shape, dtype, target)
        bad += found
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(
            f"{part.name}: {', '.join(bad[:5])}{more}: numbers that are NaN or infinite in"
            f" {np.dtype(dtype).name}; the file is damaged or its training diverged, so get it"
            " again or give another model"
        )
    return params


def _load_entry(
    entry: Entry, part: Part, shape: tuple[int, ...], dtype: Any, target: NamedSharding
) -> tuple[jax.Array, list[str]]:
    """Return the parameter, and the keys of its tensors that are not finite."""
    assert part.tensors is not None
    bad: list[str] = []
    one = NamedSharding(target.mesh, PartitionSpec(*target.spec[1:])) if entry.stacked else target
    buffer = _zeros(shape, dtype, target) if entry.stacked else None
    for i, key in enumerate(entry.keys):
        host = to_jax(part.tensors.read(key), entry.layout, part.sizes)
        piece = jax.make_array_from_callback(host.shape, one, host.__getitem__)
        if buffer is None:
            buffer, finite = _place(piece, dtype, one)
        else:
            buffer, finite = _fill(buffer, piece, i, target)
        if not finite:  # waits until the piece is in its place
            bad.append(key)
    assert buffer is not None
    return buffer, bad


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _fill(
    buffer: jax.Array, piece: jax.Array, i: int, sharding: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    made = piece.astype(buffer.dtype)
    filled = buffer.at[i].set(made)
    return jax.lax.with_sharding_constraint(filled, sharding), is_finite(made)


@partial(jax.jit, static_argnums=(1, 2))
def _place(piece: jax.Array, dtype: Any, sharding: NamedSharding) -> tuple[jax.Array, jax.Array]:
    # A piece may share memory with its host array. The copy gives the parameter its own buffer.
    made = jnp.copy(piece.astype(dtype))
    return jax.lax.with_sharding_constraint(made, sharding), is_finite(made)


class Export(NamedTuple):
    """The content of an export: all shapes and dtypes, and an iterator over the tensors."""

    infos: dict[str, tuple[tuple[int, ...], np.dtype]]
    tensors: Iterator[tuple[str, np.ndarray]]


def export(
    part: Part,
    leaves: Mapping[str, Leaf],
    trained: Mapping[str, jax.Array],
    changes: Mapping[str, Callable[[int, np.ndarray], np.ndarray]],
    dtype: np.dtype | None,
) -> Export:
    """Return the part's checkpoint after training, in the order of the source.

    `trained` holds parameters by path. `changes` maps a parameter's path to a function of a layer
    and its fp32 array, which returns the array with the adapter. All other tensors are the source's
    own bytes. `dtype` None keeps the dtype of each tensor. For a part without a source,
    `trained` has to hold all parameters.
    """
    owners = {key: (entry, i) for entry in part.entries(leaves) for i, key in enumerate(entry.keys)}
    keys = list(owners)
    if part.tensors is not None:
        names = part.tensors.keys()
        keys = [key for key in names if not any(re.fullmatch(stale, key) for stale in part.drop)]
    infos = {key: _info(part, leaves, owners.get(key), key, dtype) for key in keys}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for key, (_, wanted) in infos.items():
            array = _tensor(part, trained, changes, owners.get(key), key)
            yield key, _narrow(array, wanted, key)

    return Export(infos, tensors())


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
    changes: Mapping[str, Callable[[int, np.ndarray], np.ndarray]],
    owner: tuple[Entry, int] | None,
    key: str,
) -> np.ndarray:
    entry, i = owner or (None, 0)
    touched = entry is not None and (entry.path in trained or entry.path in changes)
    if not touched:
        assert part.tensors is not None
        return part.tensors.read(key)
    assert entry is not None
    if entry.path in trained:
        array = to_host(trained[entry.path][i] if entry.stacked else trained[entry.path])
    else:
        assert part.tensors is not None
        array = to_jax(part.tensors.read(key), entry.layout, part.sizes)
    if entry.path in changes:
        array = changes[entry.path](i, array.astype(np.float32))
    return to_torch(array, entry.layout, part.sizes)


def _narrow(array: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if not np.isfinite(narrow).all() and np.isfinite(array).all():
        wider = "bfloat16" if dtype == np.float16 else "float32"
        raise UserError(f"tensor {key} overflows {dtype.name}; export with export.dtype={wider}")
    return narrow


def to_host(array: jax.Array) -> np.ndarray:
    """Return the whole array on this host, gathered from all hosts if it is sharded over them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
