"""Projections whose kernel is quantised: their products, their arrays, what is left as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import bind, describe, flatten, unpacked
from jaxft.kernels.quantised import int8, nf4
from jaxft.nn import lora
from jaxft.nn.linear import Linear
from jaxft.nn.quantised import quantise


class Layer(nnx.Module):
    def __init__(self, width, key):
        axes, (first, second) = ("embed", "heads", "head_dim"), jax.random.split(key)
        self.up = Linear((width,), (4, 32), axes, key=first, bias=True)
        self.out = Linear((4, 32), (width,), (*axes[1:], axes[0]), key=second)


class Model(nnx.Module):
    def __init__(self, width=64):
        keys = jax.random.split(jax.random.key(0), 4)
        self.embed = Linear((width,), (width,), ("embed", "mlp"), key=keys[3])
        self.layers = jax.vmap(lambda key: Layer(width, key))(keys[:2])
        self.lm_head = Linear((width,), (7,), ("embed", "vocab"), key=keys[2])

    def __call__(self, x):
        x = self.embed(x)
        x, _ = jax.lax.scan(lambda x, layer: (layer.out(layer.up(x)), None), x, self.layers)
        return self.lm_head(x)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_model_computes_with_the_decoded_weights(base):
    plain, packed = Model(), Model()
    for model in (plain, packed):
        lora.add(model, Lora(rank=2, targets="all-linear"), jax.random.key(1))
    quantise(packed, base)
    layout = nf4 if base == "nf4" else int8

    def decoded(linear, ins):
        kernel = layout.encode(linear, len(ins))
        made = layout.decode(kernel, ins, jnp.float32)
        return jnp.moveaxis(made, range(-len(ins), 0), range(len(ins)))

    for linear, ins in ((plain.layers.up, (64,)), (plain.layers.out, (4, 32))):
        one = lambda kernel, ins=ins: decoded(kernel, ins)  # noqa: E731
        linear.kernel[...] = jax.vmap(one)(linear.kernel[...])
    x = jax.random.normal(jax.random.key(2), (5, 64))
    values, grads = {}, {}
    for name, model in (("plain", plain), ("packed", packed)):
        params = flatten(model)
        params |= {p: x + 0.1 for p, x in params.items() if ".lora_b" in p}
        tuned = {path: x for path, x in params.items() if "lora_" in path}
        loss = lambda t, x, m=model, p=params: jnp.sum(jnp.sin(bind(m, {**p, **t})(x)))  # noqa: E731
        values[name], grads[name] = jax.jit(jax.value_and_grad(loss, (0, 1)))(tuned, x)
    np.testing.assert_allclose(values["packed"], values["plain"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())),
        grads["packed"], grads["plain"],
    )  # fmt: skip


def test_the_arrays_of_a_kernel_are_parameters_with_their_own_dtypes_and_axes():
    model = Model()
    before = describe(model)
    quantise(model, "nf4")
    leaves = describe(model)
    kernel = {p: x for p, x in leaves.items() if p.startswith("layers.up.kernel.")}
    assert {p.rpartition(".")[2]: (x.shape, x.axes) for p, x in kernel.items()} == {
        "codes": ((2, 4, 32, 1, 32), ("layers", "heads", "head_dim", "embed", None)),
        "scales": ((2, 4, 32, 1), ("layers", "heads", "head_dim", "embed")),
        "nested": ((2, 1), ("layers", None)),
        "offset": ((2,), ("layers",)),
    }
    assert unpacked(leaves) == before
    assert {"embed.kernel", "lm_head.kernel", "layers.up.bias"} <= leaves.keys()
    bound = bind(model, flatten(model), jnp.bfloat16)
    dtypes = {path: x.dtype.name for path, x in flatten(bound).items()}
    assert dtypes["layers.out.kernel.codes"] == "uint8"
    assert dtypes["layers.out.kernel.nested"] == "float32"
    assert dtypes["lm_head.kernel"] == "bfloat16" == dtypes["layers.up.bias"]


def test_the_backward_pass_holds_codes_and_no_weights():
    """Under the scan over layers, in every layer's residuals."""
    model = Model()
    quantise(model, "nf4")
    x = jax.random.normal(jax.random.key(2), (5, 64))
    loss = lambda x: bind(model, flatten(model), jnp.bfloat16)(x).sum()  # noqa: E731
    _, back = jax.vjp(loss, x)
    big = [leaf for leaf in jax.tree.leaves(back) if leaf.size >= 2 * 64 * 128 // 2]
    assert big and all(leaf.dtype == jnp.uint8 for leaf in big), [(b.shape, b.dtype) for b in big]


def test_inputs_that_are_no_whole_blocks_are_named():
    with pytest.raises(UserError, match=r"base=nf4: layers\.up has 48 inputs.*64; set base=int8"):
        quantise(Model(48), "nf4")
    quantise(Model(48), "int8")


def test_a_model_without_stacked_blocks_is_refused():
    with pytest.raises(UserError, match=r"base=int8: .*no stacked blocks.*base=none"):
        quantise(Layer(64, jax.random.key(0)), "int8")
