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
from jaxft.core.params import TEACHER_ROLE, Leaf, Packed, Params, unpacked
from jaxft.core.sharding import fitted, spec
from jaxft.weights.files.tensor_files import Tensors
from jaxft.weights.folders.quantised.nf4 import PackedTensors
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
            for path, leaf in unpacked(leaves).items()
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
    by layer in a donated buffer. XLA owns this memory, so the step can donate the arrays too. A
    packed parameter is encoded tensor by tensor, so that the devices hold one in full at a time.
    Raises: UserError that names the tensors with numbers that are not finite in `dtype`.
    """
    assert part.tensors is not None
    params: Params = {}
    bad: list[str] = []
    held: dict[str, dict[str, Leaf]] = {}  # the arrays of each parameter, by the ends of paths
    for path, leaf in leaves.items():
        whole, _, name = path.rpartition(".") if leaf.packed else (path, "", "")
        held.setdefault(whole, {})[name] = leaf
    for entry in part.entries(leaves):
        paths = {name: f"{entry.path}.{name}" if name else entry.path for name in held[entry.path]}
        if wanted.isdisjoint(paths.values()):
            continue
        places = {name: shardings[path] for name, path in paths.items()}
        made, found = _load_entry(entry, part, held[entry.path], dtype, places)
        params |= {path: made[name] for name, path in paths.items()}
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
    entry: Entry,
    part: Part,
    leaves: Mapping[str, Leaf],
    dtype: Any,
    targets: Mapping[str, NamedSharding],
) -> tuple[Params, list[str]]:
    """Return the arrays of a parameter by name, and the keys of its tensors that are not finite.

    A parameter that is not packed is one array, named "".
    """
    assert part.tensors is not None
    bad: list[str] = []
    packed = next(iter(leaves.values())).packed
    named = tuple(targets.items())
    ones, buffers = targets, None
    if entry.stacked:
        ones = {
            x: NamedSharding(y.mesh, PartitionSpec(*entry.one(tuple(y.spec)))) for x, y in named
        }
        shapes = tuple((leaf.shape, leaf.held_in(dtype)) for leaf in leaves.values())
        buffers = dict(zip(leaves, _zeros(shapes, tuple(targets.values())), strict=True))
    for i, key in enumerate(entry.keys):
        if packed and isinstance(part.tensors, PackedTensors):
            shapes = {x: entry.one(y.shape) for x, y in leaves.items()}
            found = part.tensors.packed(key, shapes)
            pieces = {name: _placed(found[name], ones[name]) for name in shapes}
        else:
            host = to_jax(part.tensors.read(key), entry.layout, part.sizes)
            pieces = {"": _placed(host, _whole(packed, ones, host.shape))}
        if buffers is None:
            buffers, finite = _place(pieces, packed, dtype, named)
        else:
            buffers, finite = _fill(buffers, pieces, entry.place(i), packed, named)
        if not finite:  # waits until the piece is in its place
            bad.append(key)
    assert buffers is not None
    return buffers, bad


def _placed(host: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def _whole(
    packed: Packed | None, ones: Mapping[str, NamedSharding], shape: tuple[int, ...]
) -> NamedSharding:
    """Return the sharding of one tensor before it is encoded."""
    one = next(iter(ones.values()))
    if packed is None:
        return one
    axes = packed.whole.axes[-len(shape) :]
    return fitted(NamedSharding(one.mesh, spec(axes)), shape)


@partial(jax.jit, static_argnums=(0, 1))
def _zeros(shapes: tuple, targets: tuple[NamedSharding, ...]) -> list[jax.Array]:
    made = [jnp.zeros(*one) for one in shapes]
    return jax.lax.with_sharding_constraint(made, list(targets))


Targets = tuple[tuple[str, NamedSharding], ...]  # names and shardings, hashable


@partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _fill(
    buffers: Params,
    pieces: Params,
    place: tuple[int, ...],
    packed: Packed | None,
    targets: Targets,
) -> tuple[Params, jax.Array]:
    made = _encoded(pieces, packed, buffers[""].dtype if "" in buffers else None)
    filled = {name: buffers[name].at[place].set(made[name]) for name in buffers}
    return jax.lax.with_sharding_constraint(filled, dict(targets)), _all_finite(made)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _place(
    pieces: Params, packed: Packed | None, dtype: Any, targets: Targets
) -> tuple[Params, jax.Array]:
    # A piece may share memory with its host array. The copy gives the parameter its own buffer.
    made = jax.tree.map(jnp.copy, _encoded(pieces, packed, dtype))
    return jax.lax.with_sharding_constraint(made, dict(targets)), _all_finite(made)


def _encoded(pieces: Params, packed: Packed | None, dtype: Any) -> Params:
    """Return the arrays that hold one tensor, by name. `pieces` holds the tensor, or them."""
    if "" not in pieces:
        return pieces
    if packed is None:
        return {"": pieces[""].astype(dtype)}
    return packed.encoded(pieces[""])


def _all_finite(arrays: Params) -> jax.Array:
    """Return True if no number is NaN or infinite. A scale is finite only if its weights are."""
    floats = [x for x in arrays.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([is_finite(x) for x in floats]).all()


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
    `trained` has to hold all parameters. A line counts what float16 makes zero or subnormal.
    """
    owners = {key: (entry, i) for entry in part.entries(leaves) for i, key in enumerate(entry.keys)}
    keys = list(owners)
    if part.tensors is not None:
        names = part.tensors.keys()
        keys = [key for key in names if not any(re.fullmatch(stale, key) for stale in part.drop)]
    infos = {key: _info(part, leaves, owners.get(key), key, dtype) for key in keys}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        lost = np.zeros(2, np.int64)
        for key, (_, wanted) in infos.items():
            array = _tensor(part, trained, changes, owners.get(key), key)
            made = narrowed(array, wanted, key)
            if wanted == np.float16 and array.dtype != wanted:
                lost += _lost(array, made)
            yield key, made
        if lost.any():
            print(
                f"{part.name}: float16 makes {lost[0]} numbers 0, and {lost[1]} subnormal (below"
                " 6.1e-05, with fewer digits)",
                flush=True,
            )

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
    one = np.broadcast_to(np.int8(0), entry.one(leaf.shape))
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
        array = to_host(
            trained[entry.path][entry.place(i)] if entry.stacked else trained[entry.path]
        )
    else:
        assert part.tensors is not None
        array = to_jax(part.tensors.read(key), entry.layout, part.sizes)
    if entry.path in changes:
        array = changes[entry.path](i, array.astype(np.float32))
    return to_torch(array, entry.layout, part.sizes)


def _lost(array: np.ndarray, half: np.ndarray) -> tuple[int, int]:
    """Return how many numbers become 0 in float16, and how many become subnormal."""
    small = (np.abs(half) < np.finfo(np.float16).tiny) & (array != 0)
    zeros = int(np.sum(small & (half == 0)))
    return zeros, int(np.sum(small)) - zeros


def narrowed(array: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    """Return an array in another dtype.

    key: the tensor's name in errors. Raises: UserError for a number beyond the range of `dtype`.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    beyond = not np.isfinite(narrow).all() and np.isfinite(array).all()
    if dtype == np.float16:  # numbers below 65520 would be rounded to it
        most = np.finfo(np.float16).max  # 65504
        beyond = bool(((np.abs(array.astype(np.float32)) > most) & np.isfinite(array)).any())
    if beyond:
        wider = "bfloat16" if dtype == np.float16 else "float32"
        raise UserError(f"tensor {key} overflows {dtype.name}; export with export.dtype={wider}")
    return narrow


def to_host(array: jax.Array) -> np.ndarray:
    """Return the whole array on this host, gathered from all hosts if it is sharded over them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
