"""Parameters as one flat dict by dotted path. NNX modules only describe structure."""

from __future__ import annotations  # Leaf and Packed name each other

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from jaxft.core.errors import UserError

Params = dict[str, jax.Array]
Module = TypeVar("Module", bound=nnx.Module)

# Roles of parameters that are not the model's own, as metadata of the leaf.
ADAPTER_ROLE = "adapter"  # a factor of a low-rank update
SCALE_ROLE = "scale"  # the constant factors of adapters whose layers have different ones
NEW_TOKEN_ROLE = "new_token"  # the embedding of a new word, or of a token that trains alone
CONSTANT_ROLE = "constant"  # a table that the model's checkpoint holds, and that never trains
TEACHER_ROLE = "teacher"  # another model, whose outputs are the targets of a loss
ADVERSARY_ROLE = "adversary"  # a second player's, whose gradients are not the model's


class Leaf(NamedTuple):
    """The description of one parameter.

    `axes` are logical names, one a dim ("layers" first on a stacked leaf). `inputs` counts the
    contracting dims of a kernel, which come after "layers". It is 0 for any other parameter.
    `role` is "" for a parameter of the model itself. `packed` is set on the arrays that hold a
    frozen parameter in fewer bits.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    inputs: int = 0
    role: str = ""
    packed: Packed | None = None

    @property
    def stacked(self) -> bool:
        return bool(self.axes) and self.axes[0] == "layers"

    @property
    def added(self) -> bool:
        """True for a parameter that a run adds to a model: fp32, and in no checkpoint of it."""
        return self.role in (ADAPTER_ROLE, SCALE_ROLE, NEW_TOKEN_ROLE)

    def held_in(self, dtype: Any) -> Any:
        """Return the dtype of the array in a run whose parameters are of `dtype`."""
        return self.dtype if self.added or self.packed else dtype


class Packed(NamedTuple):
    """A parameter that several arrays hold in fewer bits. Their paths are its own and their names.

    whole: the description of the parameter. encode: returns the arrays in a NamedTuple, whose
    fields are their names, from one kernel [*ins, *outs] and the number of its inputs.
    """

    whole: Leaf
    encode: Callable[[jax.Array, int], Any]

    def encoded(self, array: jax.Array) -> dict[str, jax.Array]:
        """Return the arrays of the parameter or of a part: a layer, or an expert of it."""
        one: Callable[[jax.Array], Any] = lambda kernel: self.encode(kernel, self.whole.inputs)  # noqa: E731
        stacked = [axis for axis in self.whole.axes if axis in ("layers", "expert")]
        for _ in range(array.ndim - (len(self.whole.axes) - len(stacked))):
            one = jax.vmap(one)
        return {name: x for name, x in one(array)._asdict().items() if x is not None}


def unpacked(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Return the parameters of the model, with one leaf for the arrays that hold one parameter."""
    return {
        path.rpartition(".")[0] if leaf.packed else path: leaf.packed.whole if leaf.packed else leaf
        for path, leaf in leaves.items()
    }


def mark(module: nnx.Module, role: str) -> None:
    """Give every parameter of a module a role."""
    for _, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        param.set_metadata(role=role)


def dotted(key_path: tuple) -> str:
    """Return a pytree key path as `layers.self_attn.q_proj.kernel`, without NNX's inner `value`."""
    names = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in key_path]
    return ".".join(names[:-1] if names[-1] == "value" else names)


def describe(module: nnx.Module) -> dict[str, Leaf]:
    """Return the description of every parameter of a module (concrete or abstract), by path."""
    described = {}
    for names, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        axes, shape = tuple(param.get_metadata()["axes"]), tuple(param.shape)
        axes = ("layers",) * (len(shape) - len(axes)) + axes
        about = param.get_metadata()
        about = about.get("inputs", 0), about.get("role", ""), about.get("packed")
        described[".".join(map(str, names))] = Leaf(shape, param.dtype, axes, *about)
    return described


def flatten(module: nnx.Module) -> Params:
    """Return the module's arrays as a flat dict."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    return {dotted(path): leaf for path, leaf in leaves}


def bind(template: Module, params: Mapping[str, Any], dtype: Any = None) -> Module:
    """Return a module with the structure of `template` that holds `params`.

    It is plain Python, so that it can be called inside a traced function. dtype: the dtype of the
    parameters in the module, None for that of each. Arrays that hold one in fewer bits keep theirs.
    Raises KeyError for a parameter that `params` lacks.
    """
    if gone := flatten(template).keys() - params.keys():
        raise KeyError(min(gone))
    return bind_some(template, params, dtype)


def bind_some(template: Module, params: Mapping[str, Any], dtype: Any = None) -> Module:
    """Return `bind` for a function that does not read every parameter.

    One that `params` lacks stays that of the template. It is abstract, so that its use fails while
    the function is traced.
    """
    if dtype is not None:
        params = {
            path: params[path] if leaf.packed else params[path].astype(dtype)
            for path, leaf in describe(template).items()
            if path in params
        }
    places, treedef = jax.tree_util.tree_flatten_with_path(template)
    return treedef.unflatten([params.get(dotted(path), leaf) for path, leaf in places])


def select(pattern: str, paths: Mapping[str, Any], key: str = "trainable") -> set[str]:
    """Return the paths that a regex matches as a whole. `key` is its config key, for messages.

    Raises: UserError, with some of the paths, for a bad regex or one that matches none.
    """
    try:
        chosen = {path for path in paths if re.fullmatch(pattern, path)}
    except re.error as error:
        raise UserError(f"{key}={pattern!r} is not a regular expression: {error}") from None
    if not chosen:
        some = ", ".join(sorted(paths)[:8])
        raise UserError(f"{key}={pattern!r} matches no parameter; paths look like: {some}")
    return chosen


def named(paths: Sequence[str]) -> str:
    """Return the first of some paths, and the number of the others, for a message."""
    others = len(paths) - 1
    return f"{paths[0]} and {others} more" if others else paths[0]


def describe_trained(leaves: Mapping[str, Leaf], chosen: set[str]) -> str:
    """Return a line with the number of trained parameters and their share of all."""
    every = unpacked(leaves)
    total = sum(_size(leaf) for leaf in every.values())
    trained = sum(_size(leaves[path]) for path in chosen)
    return (
        f"trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)"
        f" in {len(chosen)} of {len(every)} arrays, such as {min(chosen, default='none')}"
    )


def _size(leaf: Leaf) -> int:
    size = 1
    for dim in leaf.shape:
        size *= dim
    return size
