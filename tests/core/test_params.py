"""Parameters as one flat dict: names, descriptions, binding, selecting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.core.errors import UserError
from jaxft.core.params import (
    ADAPTER_ROLE,
    ADVERSARY_ROLE,
    NEW_TOKEN_ROLE,
    Leaf,
    bind,
    bind_some,
    describe,
    describe_trained,
    flatten,
    mark,
    select,
)
from jaxft.nn.linear import Linear
from jaxft.nn.norm import RMSNorm


class Block(nnx.Module):
    def __init__(self, key):
        self.norm = RMSNorm(6, eps=1e-6)
        self.up = Linear((6,), (2, 3), ("embed", "heads", "head_dim"), key=key, bias=True)


class Model(nnx.Module):
    def __init__(self, key):
        self.layers = jax.vmap(Block)(jax.random.split(key, 4))
        self.out = Linear((2, 3), (6,), ("heads", "head_dim", "embed"), key=key)

    def __call__(self, x):
        x, _ = jax.lax.scan(lambda x, b: (b.up(b.norm(x)).reshape(x.shape), None), x, self.layers)
        return self.out(x.reshape(-1, 2, 3))


@pytest.fixture(scope="module")
def model():
    return Model(jax.random.key(0))


def test_describe_is_the_same_concrete_and_abstract(model):
    abstract = jax.eval_shape(Model, jax.random.key(0))
    assert describe(model) == describe(abstract)
    assert describe(model)["layers.up.kernel"] == Leaf(
        (4, 6, 2, 3), np.dtype("float32"), ("layers", "embed", "heads", "head_dim"), 1
    )
    assert describe(model)["out.kernel"].inputs == 2
    assert describe(model)["layers.norm.scale"] == Leaf(
        (4, 6), np.dtype("float32"), ("layers", "norm"), 0
    )
    assert describe(model)["layers.up.bias"].axes == ("layers", "heads", "head_dim")
    stacked = {path for path, leaf in describe(model).items() if leaf.stacked}
    assert stacked == {"layers.up.kernel", "layers.up.bias", "layers.norm.scale"}


def test_flatten_and_bind_are_inverse(model):
    params = flatten(model)
    assert params.keys() == describe(model).keys()
    template = jax.eval_shape(Model, jax.random.key(0))
    x = jnp.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(bind(template, params)(x), model(x))
    doubled = bind(template, {path: 2 * value for path, value in params.items()})
    for path, value in flatten(doubled).items():
        np.testing.assert_array_equal(value, 2 * params[path])


def test_a_part_of_the_parameters_is_bound_for_a_function_that_reads_no_other(model):
    template = jax.eval_shape(Model, jax.random.key(0))
    some = {path: x for path, x in flatten(model).items() if path.startswith("out.")}
    found = bind_some(template, some, jnp.bfloat16)
    x = jnp.ones((1, 2, 3))
    wanted = bind(template, flatten(model), jnp.bfloat16).out(x)
    np.testing.assert_array_equal(found.out(x), wanted)
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        jax.jit(lambda: found.layers.norm(x))()


def test_bind_takes_extra_parameters_and_misses_none(model):
    params = flatten(model)
    template = jax.eval_shape(Model, jax.random.key(0))
    bind(template, {**params, "more": jnp.zeros(1)})
    del params["out.kernel"]
    with pytest.raises(KeyError, match=r"out\.kernel"):
        bind(template, params)


def test_gradients_flow_through_a_bound_model(model):
    template, x = jax.eval_shape(Model, jax.random.key(0)), jnp.ones((2, 6))
    grads = jax.jit(jax.grad(lambda p: bind(template, p)(x).sum()))(flatten(model))
    assert all(float(jnp.abs(g).max()) > 0 for g in grads.values())


PATHS = dict.fromkeys(["unet.a.kernel", "unet.a.lora_a", "unet.a.lora_b", "text.kernel"])


@pytest.mark.parametrize(
    ("pattern", "count"),
    [(".*", 4), (r"unet\..*", 3), (r".*\.lora_[ab]", 2), ("text.kernel", 1), ("unet.*|text.*", 4)],
)
def test_select_matches_whole_paths(pattern, count):
    assert len(select(pattern, PATHS)) == count


@pytest.mark.parametrize("pattern", ["", "unet", "kernel", r"unet\.b\..*"])
def test_a_pattern_that_matches_nothing_shows_paths(pattern):
    with pytest.raises(UserError, match=r"matches no parameter; paths look like: text\.kernel, "):
        select(pattern, PATHS)


def test_a_broken_pattern_is_a_user_error():
    with pytest.raises(UserError, match=r"trainable='\(' is not a regular expression"):
        select("(", PATHS)


def test_the_line_on_trained_parameters_counts_them(model):
    leaves = describe(model)
    total = 4 * 6 + 4 * 36 + 4 * 6 + 36
    text = describe_trained(leaves, {"out.kernel"})
    assert text.startswith(f"trainable: 36 of {total} parameters ({3600 / total:.2f} %)")
    assert text.endswith("in 1 of 4 arrays, such as out.kernel") and "\n" not in text


def test_roles_tell_what_a_run_adds_from_the_model_and_from_an_adversary():
    model = Linear((2,), (3,), ("embed", "mlp"), key=jax.random.key(0), bias=True)
    assert {leaf.role for leaf in describe(model).values()} == {""}
    for role, added in ((ADAPTER_ROLE, True), (NEW_TOKEN_ROLE, True), (ADVERSARY_ROLE, False)):
        mark(model, role)
        found = describe(model).values()
        assert {(leaf.role, leaf.added) for leaf in found} == {(role, added)}
