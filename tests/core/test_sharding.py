"""The axis table: meshes, specs, what does not divide, and batches equal to the host's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxft.core import sharding
from jaxft.core.errors import UserError
from jaxft.core.params import Leaf, Packed

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2)]


def leaf(shape, axes):
    return Leaf(shape, np.dtype(np.float32), axes)


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((2, 1, -1), (2, 1, 4)),
        ((8, 1, -1), (8, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
    ],
)
def test_minus_one_takes_the_rest(asked, shape):
    mesh = sharding.make_mesh(*asked)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert {d.id for d in mesh.devices.ravel()} == set(range(8))


@pytest.mark.parametrize("asked", [(1, 1, 1), (3, -1, 1), (16, -1, 1), (2, 2, 4)])
def test_a_mesh_that_does_not_match_the_devices(asked):
    with pytest.raises(UserError, match=r"needs \d+ devices, but there are 8 \(cpu\); set one of"):
        sharding.make_mesh(*asked)


@pytest.mark.parametrize("asked", [(-1, -1, 1), (0, -1, 1), (-2, 1, 1)])
def test_sizes_that_make_no_mesh(asked):
    with pytest.raises(UserError, match="at most one may be -1"):
        sharding.make_mesh(*asked)


def test_the_table():
    assert sharding.spec(("embed", "heads", "head_dim")) == P("fsdp", "tensor", None)
    assert sharding.spec(("layers", "mlp", "embed")) == P(None, "tensor", "fsdp")
    assert sharding.spec(("vocab", "embed")) == P("tensor", "fsdp")
    assert sharding.spec(("embed", "lora")) == P("fsdp", None)
    assert sharding.spec(("batch", "length", None)) == P(("data", "fsdp"), None, None)
    with pytest.raises(KeyError, match="hedas"):
        sharding.spec(("hedas",))


def test_parameters_are_cut_as_the_table_says():
    mesh = sharding.make_mesh(2, 2, 2)
    leaves = {"q": leaf((3, 8, 4, 5), ("layers", "embed", "heads", "head_dim"))}
    placed = jax.device_put(jnp.zeros((3, 8, 4, 5)), sharding.shardings(leaves, mesh)["q"])
    assert placed.addressable_shards[0].data.shape == (3, 4, 2, 5)


def test_dims_that_do_not_divide_raise_once_with_the_whole_list():
    mesh = sharding.make_mesh(1, 1, 8)
    axes = ("layers", "embed", "heads", "head_dim")
    leaves = {
        "layers.attn.q.kernel": leaf((4, 64, 8, 8), axes),
        "layers.attn.k.kernel": leaf((4, 64, 4, 8), axes),
        "embed.embedding": leaf((321, 64), ("vocab", "embed")),
    }
    with pytest.raises(UserError) as caught:
        sharding.shardings(leaves, mesh)
    text = str(caught.value)
    expect = "layers.attn.k.kernel: dim 2 of (4, 64, 4, 8) is not divisible by tensor=8"
    assert expect in text and "embed.embedding: dim 0 of (321, 64)" in text
    assert "q.kernel" not in text and "\n" not in text


def test_constrain_outside_a_mesh_does_nothing():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, "batch", None) is x
    text = jax.jit(lambda x: sharding.constrain(x, "batch", None)).lower(x).as_text()
    assert "harding" not in text.replace("mhlo.num_partitions", "")


def test_constrain_pins_what_divides_and_leaves_the_rest_whole():
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        fits = jax.jit(lambda: sharding.constrain(jnp.ones((8, 6)), "batch", "mlp"))()
        odd = jax.jit(lambda: sharding.constrain(jnp.ones((6, 6)), "batch", "mlp"))()
        short = jax.jit(lambda: sharding.constrain(jnp.ones((8, 3)), "batch", "mlp"))()
    assert fits.addressable_shards[0].data.shape == (2, 3)
    assert odd.addressable_shards[0].data.shape == (6, 3)
    assert short.addressable_shards[0].data.shape == (2, 3)


@pytest.mark.parametrize("sizes", MESHES)
def test_a_placed_batch_is_the_host_batch(sizes):
    mesh = sharding.make_mesh(*sizes)
    batch = {
        "tokens": np.arange(16 * 5, dtype=np.int32).reshape(16, 5),
        "images": np.random.default_rng(0).normal(size=(16, 2, 2, 3)).astype(np.float32),
        "sample_ids": np.arange(16, dtype=np.int32)[::-1],
    }
    assert sharding.local_rows(mesh, 16) == slice(0, 16)
    placed = sharding.place_batch(batch, mesh)
    ways = sharding.batch_ways(mesh)
    assert ways == sizes[0] * sizes[1]
    for name, rows in batch.items():
        np.testing.assert_array_equal(placed[name], rows)
        assert placed[name].dtype == rows.dtype
        assert placed[name].addressable_shards[0].data.shape == (16 // ways, *rows.shape[1:])
        assert placed[name].sharding.is_equivalent_to(sharding.batch_sharding(mesh), rows.ndim)


def test_rows_of_a_process_that_holds_the_second_half(monkeypatch):
    """As on the second of two hosts: its devices are the last four of a data axis of eight."""
    mesh = sharding.make_mesh(8, 1, 1)
    whole = sharding.batch_sharding(mesh)

    class Half:
        def addressable_devices_indices_map(self, shape):
            indices = whole.devices_indices_map(shape)
            return {d: index for d, index in indices.items() if d.id >= 4}

    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: Half())
    assert sharding.local_rows(mesh, 16) == slice(8, 16)


def test_blocks_that_a_mesh_does_not_divide_stay_whole():
    """Only where an array holds a packed parameter. Any other is an error."""
    mesh, whole = sharding.make_mesh(2, 2, 2), leaf((64, 6), ("embed", "heads"))
    codes = leaf((6, 1, 32), ("heads", "embed", None))
    packed = codes._replace(packed=Packed(whole, lambda kernel, inputs: kernel))
    assert sharding.shardings({"a.codes": packed}, mesh)["a.codes"].spec == P("tensor", None, None)
    with pytest.raises(UserError, match="not divisible by fsdp=2"):
        sharding.shardings({"a.codes": codes}, mesh)


def test_replicated_is_whole_everywhere():
    mesh = sharding.make_mesh(2, 2, 2)
    assert jax.device_put(jnp.ones((3, 3)), sharding.replicated(mesh)).is_fully_replicated
