"""The projection: any number of input and output dims, its adapter, dropout by row, the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.core import sharding
from jaxft.core.params import bind, describe, flatten
from jaxft.nn.linear import Adapter, Embedding, Linear, dropout

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("ins", "outs", "subscripts"),
    [
        ((6,), (4,), "btd,df->btf"),
        ((6,), (2, 3), "btd,dnh->btnh"),
        ((2, 3), (6,), "btnh,nhd->btd"),
        ((2, 3), (4, 5), "btnh,nhdf->btdf"),
    ],
)
def test_it_is_an_einsum_over_the_trailing_dims(ins, outs, subscripts):
    axes = ("embed",) * (len(ins) + len(outs))
    linear = Linear(ins, outs, axes, key=KEY, bias=True, std=0.5)
    params = flatten(linear) | {"bias": jnp.asarray(normal(*outs, seed=1))}
    x = normal(2, 3, *ins)
    expect = np.einsum(subscripts, x, params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(bind(linear, params)(x), expect, atol=1e-5)
    assert describe(linear)["kernel"].inputs == len(ins)
    assert describe(linear)["bias"].axes == axes[len(ins) :]


def adapted(rate=0.0, scale=0.5):
    linear = Linear((2, 3), (6,), ("heads", "head_dim", "embed"), key=KEY)
    linear.lora_a = nnx.data(nnx.Param(normal(2, 3, 4), axes=("heads", "head_dim", "lora")))
    linear.lora_b = nnx.data(nnx.Param(normal(4, 6, seed=1), axes=("lora", "embed")))
    linear.adapter = Adapter(scale, rate, stream=2**32 - 1)
    return linear


def test_an_adapter_adds_scaled_ab():
    linear, x = adapted(), normal(5, 2, 3)
    low = np.einsum("bnh,nhr->br", x, linear.lora_a[...])
    expect = np.einsum("bnh,nhd->bd", x, linear.kernel[...]) + 0.5 * low @ linear.lora_b[...]
    np.testing.assert_allclose(linear(x), expect, atol=1e-5)


def test_the_dtype_is_that_of_the_input():
    x = jnp.asarray(normal(5, 2, 3), jnp.bfloat16)
    assert adapted()(x).dtype == jnp.bfloat16
    assert dropout(x, jax.random.split(KEY, 5), Adapter(1.0, 0.3)).dtype == jnp.bfloat16


def head(rank=3):
    """A projection of 8 to 16, with an adapter far below its kernel's last bit in bf16."""
    linear = Linear((8,), (16,), ("embed", "vocab"), key=KEY, std=1.0)
    linear.lora_a = nnx.data(nnx.Param(normal(8, rank), axes=("embed", "lora")))
    linear.lora_b = nnx.data(nnx.Param(1e-4 * normal(rank, 16, seed=1), axes=("lora", "vocab")))
    linear.adapter = Adapter(0.5)
    return linear


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_wide_product_keeps_an_adapter_that_a_merged_kernel_loses(dtype):
    linear = head()
    linear = bind(linear, {path: x.astype(dtype) for path, x in flatten(linear).items()})
    kernel, a, b = (
        x[...].astype(jnp.float32) for x in (linear.kernel, linear.lora_a, linear.lora_b)
    )
    x = jnp.asarray(normal(5, 8, seed=2), dtype)
    wide = linear.wide_input(x), linear.wide_kernel()
    assert [part.dtype for part in wide] == [dtype, dtype]
    made = jnp.tensordot(*wide, 1, preferred_element_type=jnp.float32) - x @ kernel
    update = 0.5 * x @ a @ b
    np.testing.assert_allclose(made, update, atol=0.02 * np.abs(update).max())
    merged = (kernel + 0.5 * a @ b).astype(dtype).astype(jnp.float32)
    lost = jnp.linalg.norm(x @ (merged - kernel) - update) / jnp.linalg.norm(update)
    assert (lost > 0.3) == (dtype == jnp.bfloat16)


def test_without_an_adapter_nothing_is_widened():
    linear, x = Linear((8,), (16,), ("embed", "vocab"), key=KEY), jnp.asarray(normal(5, 8))
    assert linear.wide_input(x) is x
    np.testing.assert_array_equal(linear.wide_kernel(), linear.kernel[...])


def test_dropout_touches_the_adapter_only_and_needs_keys():
    linear, x, keys = adapted(rate=0.5), normal(5, 2, 3), jax.random.split(KEY, 5)
    base = np.einsum("bnh,nhd->bd", x, linear.kernel[...])
    np.testing.assert_allclose(linear(x), adapted()(x))
    dropped = dropout(jnp.asarray(x), keys, linear.adapter)
    expect = (
        base + adapted(scale=0.5)(dropped) - np.einsum("bnh,nhd->bd", dropped, linear.kernel[...])
    )
    np.testing.assert_allclose(linear(x, keys), expect, atol=1e-5)
    assert np.abs(linear(x, keys) - linear(x)).max() > 0.1


def test_dora_with_dropout_is_pefts():
    """The mask acts on the adapter's input alone, and the base's output keeps its own gain of 1."""
    linear, x, keys = adapted(rate=0.5), normal(5, 2, 3), jax.random.split(KEY, 5)
    linear.lora_m = nnx.data(nnx.Param(jnp.asarray(1 + normal(6, seed=2)), axes=("embed",)))
    kernel, a, b = (np.asarray(p[...]) for p in (linear.kernel, linear.lora_a, linear.lora_b))
    update = linear.adapter.scale * np.tensordot(a, b, 1)
    gain = linear.lora_m[...] / np.sqrt(np.square(kernel + update).sum((0, 1)))
    np.testing.assert_allclose(
        linear(x), gain * np.einsum("bnh,nhd->bd", x, kernel + update), atol=1e-5
    )
    dropped = dropout(jnp.asarray(x), keys, linear.adapter)
    base, own, low = (
        np.einsum("bnh,nhd->bd", *pair)
        for pair in ((x, kernel), (dropped, kernel), (dropped, update))
    )
    np.testing.assert_allclose(linear(x, keys), base + (gain - 1) * own + gain * low, atol=1e-5)
    linear.lora_m = nnx.data(nnx.Param(jnp.zeros(6), axes=("embed",)))
    np.testing.assert_allclose(linear(x), adapted()(x), atol=1e-6)


def test_dropout_keeps_the_expectation_and_drops_the_share():
    x, keys = jnp.ones((64, 400)), jax.random.split(KEY, 64)
    out = np.asarray(dropout(x, keys, Adapter(1.0, 0.25)))
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.75], rtol=1e-6)
    assert abs((out == 0).mean() - 0.25) < 0.01
    assert len({row.tobytes() for row in out}) == 64


def test_t19_a_row_keeps_its_mask_wherever_it_stands():
    x, keys, adapter = normal(5, 2, 3), jax.random.split(KEY, 5), Adapter(1.0, 0.5, 7)
    order = np.array([4, 0, 1, 3, 2])
    whole = np.asarray(dropout(jnp.asarray(x), keys, adapter))
    np.testing.assert_array_equal(
        dropout(jnp.asarray(x)[order], keys[order], adapter), whole[order]
    )


def test_two_projections_drop_differently():
    x, keys = jnp.ones((64, 400)), jax.random.split(KEY, 64)
    first, second = (dropout(x, keys, Adapter(1.0, 0.5, stream)) for stream in (1, 2))
    assert (np.asarray(first) != np.asarray(second)).mean() > 0.3


def test_an_embedding_is_a_row_of_its_table():
    table = Embedding(10, 4, key=KEY)
    ids = np.array([[0, 9], [3, 3]])
    np.testing.assert_array_equal(table(ids), np.asarray(table.embedding[...])[ids])
    assert table(ids, jnp.bfloat16).dtype == jnp.bfloat16
    assert describe(table)["embedding"].axes == ("vocab", "embed")


def test_a_sharded_table_gathers_the_same_rows_without_a_full_rematerialisation(capfd):
    table, ids = Embedding(16, 8, key=KEY), np.arange(16).reshape(8, 2) % 11
    expect = np.asarray(table.embedding[...])[ids]
    mesh = sharding.make_mesh(2, 2, 2)
    params = jax.device_put(flatten(table), sharding.shardings(describe(table), mesh))

    def loss(params, ids):
        out = sharding.constrain(bind(table, params)(ids), "batch", "length", None)
        return out.sum(), out

    with jax.set_mesh(mesh):
        placed = sharding.place_batch({"ids": ids}, mesh)["ids"]
        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, placed)
    np.testing.assert_array_equal(out, expect)
    counts = np.bincount(ids.ravel(), minlength=16)
    np.testing.assert_array_equal(grads["embedding"], np.repeat(counts[:, None], 8, 1))
    assert "full rematerialization" not in capfd.readouterr().err


def test_case_llm_08_the_wide_product_drops_as_the_plain_one_does():
    linear = Linear((8,), (16,), ("embed", "vocab"), key=KEY, std=1.0)
    linear.lora_a = nnx.data(nnx.Param(normal(8, 3), axes=("embed", "lora")))
    linear.lora_b = nnx.data(nnx.Param(normal(3, 16, seed=1), axes=("lora", "vocab")))
    linear.adapter = Adapter(0.5, 0.5, 3)
    x, keys = jnp.asarray(normal(4, 5, 8)), jax.random.split(KEY, 4)
    made = linear.wide_input(x, keys) @ linear.wide_kernel()
    np.testing.assert_allclose(made, linear(x, keys), atol=1e-4)
    assert np.abs(made - linear(x)).max() > 0.1
