"""The table from logical axes to mesh axes. The mesh shape alone sets the strategy."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxft.core.errors import UserError
from jaxft.core.params import Leaf

AXES = ("data", "fsdp", "tensor")
AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "fsdp",
    "length": None,
    "layers": None,
    "head_dim": None,
    "norm": None,
    "lora": None,
}


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return a (data, fsdp, tensor) mesh over all devices, or over `devices`.

    A size of -1 is the number of devices divided by the other sizes.
    Raises: UserError if the sizes do not give the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = [data, fsdp, tensor]
    asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {asked}: sizes are at least 1, and at most one may be -1 (the rest)")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, count // prod(size for size in sizes if size != -1))
    if prod(sizes) != count:
        platform = (devices or jax.devices())[0].platform
        raise UserError(
            f"mesh {asked} needs {prod(sizes)} devices, but there are {count}"
            f" ({platform}); set one of mesh.data, mesh.fsdp, mesh.tensor to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * 3, devices=devices)


def one_device_mesh() -> Mesh:
    """Return a mesh of this process's first device, for work that needs no other process."""
    return jax.make_mesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, devices=jax.local_devices()[:1])


def plain_mesh() -> AbstractMesh:
    """Return the mesh in use, or one device, of a kind that has no kernels of its own.

    Under it the plain formulas are traced.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = (1, 1, 1) if mesh.empty else mesh.axis_sizes
    plain = AbstractDevice(device_kind="plain", num_cores=None, platform="plain")
    return AbstractMesh(sizes, AXES, (AxisType.Auto,) * 3, abstract_device=plain)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Return the mesh axes of a parameter or activation with these logical axes."""
    return PartitionSpec(*(AXIS_RULES[axis] if axis else None for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its sharding. A dim that the mesh does not divide stays whole.

    Without this at the ends of blocks, XLA may gather the whole batch on every device. Outside a
    mesh (in a notebook) it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    names = [
        axis if axis and x.shape[dim] % _ways(AXIS_RULES[axis], mesh.shape) == 0 else None
        for dim, axis in enumerate(axes)
    ]
    return jax.lax.with_sharding_constraint(x, spec(tuple(names)))


def shardings(leaves: Mapping[str, Leaf], mesh: Mesh) -> dict[str, NamedSharding]:
    """Return a sharding for every parameter.

    A dim of a packed parameter that the mesh does not divide, such as its blocks, stays whole.
    Raises: UserError that lists every dim of the others which the mesh does not divide.
    """
    plain = {path: leaf for path, leaf in leaves.items() if not leaf.packed}
    bad = [line for path, leaf in plain.items() for line in _indivisible(path, leaf, mesh)]
    if bad:
        raise UserError(f"mesh {dict(mesh.shape)} does not fit this model: " + "; ".join(bad))
    places = {path: NamedSharding(mesh, spec(leaf.axes)) for path, leaf in leaves.items()}
    return {
        path: place if path in plain else fitted(place, leaves[path].shape)
        for path, place in places.items()
    }


def fitted(given: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Return it for dims of other sizes. One that the mesh does not divide stays whole."""
    sizes = given.mesh.shape
    axes = [None if shape[i] % _ways(axis, sizes) else axis for i, axis in enumerate(given.spec)]
    return NamedSharding(given.mesh, PartitionSpec(*axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: dim 0 over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(AXIS_RULES["batch"]))


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """Return the rows of a global batch that this process's devices hold."""
    index_map = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    bounds = [index[0].indices(batch_size)[:2] for index in index_map.values() if index]
    return slice(min(low for low, _ in bounds), max(high for _, high in bounds))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict:
    """Return arrays of the global batch, made from this process's rows on the host."""
    sharding, ways = batch_sharding(mesh), batch_ways(mesh)
    own = local_rows(mesh, ways)

    def place(rows: np.ndarray) -> jax.Array:
        size = len(rows) * ways // (own.stop - own.start)
        first = own.start * size // ways

        def window(index: Any) -> np.ndarray:
            low, high, _ = index[0].indices(size)
            return rows[low - first : high - first]

        return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, window)

    return {name: place(rows) for name, rows in batch.items()}


def abstract_batch(spec: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict:
    """Return shapes of the global batch, of which `spec` is this process's rows."""
    sharding, ways = batch_sharding(mesh), batch_ways(mesh)
    own = local_rows(mesh, ways)

    def whole(rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        size = rows.shape[0] * ways // (own.stop - own.start)
        return jax.ShapeDtypeStruct((size, *rows.shape[1:]), rows.dtype, sharding=sharding)

    return {name: whole(rows) for name, rows in spec.items()}


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of parts that the global batch is cut into."""
    return _ways(AXIS_RULES["batch"], mesh.shape)


def _ways(rule: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> int:
    names = (rule,) if isinstance(rule, str) else rule or ()
    return prod(sizes[name] for name in names)


def _indivisible(path: str, leaf: Leaf, mesh: Mesh) -> list[str]:
    lines = []
    for dim, axis in enumerate(leaf.axes):
        rule = AXIS_RULES[axis] if axis else None
        if leaf.shape[dim] % _ways(rule, mesh.shape):
            lines.append(
                f"{path}: dim {dim} of {leaf.shape} is not divisible by"
                f" {rule}={_ways(rule, mesh.shape)}"
            )
    return lines
