"""Adapters on a model: who gets one, how they start, what merging adds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import bind, describe, flatten
from jaxft.nn import lora
from jaxft.nn.conv import Conv
from jaxft.nn.linear import Linear
from jaxft.weights.adapters import ranks

CFG = Lora(rank=4, alpha=8.0, targets=r".*\.(q|o)_proj")
LAYERS = 3


class Block(nnx.Module):
    def __init__(self, key):
        self.q_proj = Linear((64,), (4, 16), ("embed", "heads", "head_dim"), key=key)
        self.k_proj = Linear((64,), (4, 16), ("embed", "heads", "head_dim"), key=key)
        self.o_proj = Linear((4, 16), (64,), ("heads", "head_dim", "embed"), key=key)


class Model(nnx.Module):
    def __init__(self, key):
        self.layers = jax.vmap(Block)(jax.random.split(key, LAYERS))
        self.lm_head = Linear((64,), (10,), ("embed", "vocab"), key=key)


def make(cfg=CFG):
    model = Model(jax.random.key(0))
    lora.add(model, cfg, jax.random.key(1))
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def test_the_targets_get_factors_with_the_kernels_axes(model):
    leaves = describe(model)
    assert {p for p in leaves if ".lora_" in p} == {
        f"layers.{name}_proj.lora_{side}" for name in "qo" for side in "ab"
    }
    a, b = leaves["layers.q_proj.lora_a"], leaves["layers.q_proj.lora_b"]
    assert (a.shape, a.axes, a.inputs) == ((3, 64, 4), ("layers", "embed", "lora"), 1)
    assert b.shape == (3, 4, 4, 16) and b.axes == ("layers", "lora", "heads", "head_dim")
    a, b = leaves["layers.o_proj.lora_a"], leaves["layers.o_proj.lora_b"]
    assert (a.shape, a.inputs) == ((3, 4, 16, 4), 2)
    assert a.axes == ("layers", "heads", "head_dim", "lora")
    assert (b.shape, b.axes, b.inputs) == ((3, 4, 64), ("layers", "lora", "embed"), 1)
    assert lora.adapted(leaves) == ["layers.o_proj", "layers.q_proj"]


def test_t21_a_is_kaiming_uniform_and_b_zero(model):
    params = flatten(model)
    for name in "qo":
        a = np.asarray(params[f"layers.{name}_proj.lora_a"])
        bound = 1 / 64**0.5  # kaiming_uniform_(a=sqrt 5): sqrt(6 / (1 + 5) / fan_in)
        assert a.dtype == np.float32 and np.abs(a).max() <= bound
        assert np.abs(a).max() > 0.98 * bound
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.06)
        assert not np.asarray(params[f"layers.{name}_proj.lora_b"]).any()
        assert len({layer.tobytes() for layer in a}) == LAYERS
    q, o = (np.asarray(params[f"layers.{name}_proj.lora_a"]).ravel() for name in "qo")
    assert abs(np.corrcoef(q, o)[0, 1]) < 0.15


def test_an_adapter_starts_as_the_base(model):
    base = Model(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    one = jax.tree.map(lambda leaf: leaf[0], model.layers).q_proj
    np.testing.assert_array_equal(one(x), jax.tree.map(lambda leaf: leaf[0], base.layers).q_proj(x))


def test_a_draw_depends_on_its_own_path_only(model):
    """More targets do not change what the others start from."""
    params, more = flatten(model), flatten(make(Lora(rank=4, alpha=8.0, targets=r".*")))
    assert len(more) == len(params) + 4
    for path, value in params.items():
        np.testing.assert_array_equal(more[path], value)


def test_all_linear_leaves_out_the_output_head():
    """As in PEFT, at the root of a model and below."""
    assert lora.adapted(describe(make(Lora(4, 8.0, "all-linear")))) == [
        f"layers.{name}_proj" for name in "koq"
    ]
    for path, inside in (("lm_head", 0), ("language_model.lm_head", 0), ("a.lm_heads.proj", 1)):
        assert bool(re.fullmatch(lora.pattern("all-linear"), path)) == bool(inside)
    own, asked = (Lora(4, 8.0, targets, from_="x") for targets in (r"layers\..*", "all-linear"))
    assert lora.continued(asked, own, ["layers.q_proj", "lm_head"]) == own
    with pytest.raises(UserError, match=r"lora\.targets=all-linear is for language models"):
        lora.check_plain(asked, "diffusion")


def test_rank_zero_adds_nothing():
    assert describe(make(Lora(0, 1.0, "no such"))) == describe(Model(jax.random.key(0)))


def test_no_match_lists_the_projections():
    with pytest.raises(UserError, match=r"lora\.targets='q_proj' matches no projection") as caught:
        make(Lora(4, 8.0, "q_proj"))
    for path in ("lm_head", "layers.k_proj", "layers.o_proj", "layers.q_proj"):
        assert path in str(caught.value)


def test_a_broken_pattern_is_a_user_error():
    with pytest.raises(UserError, match=r"lora\.targets='\(' is not a regular expression"):
        make(Lora(4, 8.0, "("))


def test_t21_scale():
    assert ranks.scale(Lora(16, 32.0, "")) == 2.0
    assert ranks.scale(Lora(16, 32.0, "", rslora=True)) == 8.0


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_delta_merged_acts_as_the_adapter(name, rslora):
    cfg = Lora(rank=4, alpha=8.0, targets=r".*\.(q|o)_proj", rslora=rslora)
    model = make(cfg)
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(size=x.shape), jnp.float32) if "lora_b" in path else x
        for path, x in flatten(model).items()
    }
    adapted = getattr(jax.tree.map(lambda leaf: leaf[1], bind(model, params).layers), name)
    a, b = (np.asarray(params[f"layers.{name}.lora_{side}"])[1] for side in "ab")
    update = lora.delta(a, b, ranks.scale(cfg))
    assert update.shape == adapted.kernel.shape and update.dtype == np.float32
    x = rng.normal(size=(5, *adapted.kernel.shape[: adapted.inputs])).astype(np.float32)
    merged = np.tensordot(x, np.asarray(adapted.kernel[...]) + update, adapted.inputs)
    np.testing.assert_allclose(adapted(x), merged, atol=1e-4)
    assert np.abs(np.tensordot(x, update, adapted.inputs)).max() > 1


class Picture(nnx.Module):
    def __init__(self, key):
        self.blocks = nnx.List([Conv(6, 8, 3, key=key, stride=2, padding=1) for _ in range(2)])


def test_convolutions_get_a_factor_of_their_size_and_a_1x1():
    model = Picture(jax.random.key(0))
    lora.add(model, Lora(4, 8.0, r"blocks\.1"), jax.random.key(1))
    leaves = describe(model)
    assert lora.adapted(leaves) == ["blocks.1"]
    a, b = (leaves[f"blocks.1.lora_{side}"] for side in "ab")
    assert (a.shape, a.axes, a.inputs) == ((3, 3, 6, 4), (None, None, None, "lora"), 3)
    assert (b.shape, b.axes, b.inputs) == ((4, 8), ("lora", "embed"), 1)
    values, bound = np.asarray(flatten(model)["blocks.1.lora_a"]), 1 / (9 * 6) ** 0.5
    assert 0.9 * bound < np.abs(values).max() <= bound


def test_a_convolutions_delta_merged_acts_as_the_adapter():
    model = Picture(jax.random.key(0))
    lora.add(model, Lora(4, 8.0, ".*"), jax.random.key(1))
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(size=x.shape), jnp.float32) if "lora_b" in path else x
        for path, x in flatten(model).items()
    }
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 6)), jnp.float32)
    adapted = bind(model, params).blocks[0](x)
    update = lora.delta(*(np.asarray(params[f"blocks.0.lora_{side}"]) for side in "ab"), 2.0)
    params["blocks.0.kernel"] = params["blocks.0.kernel"] + update
    params["blocks.0.lora_b"] = jnp.zeros_like(params["blocks.0.lora_b"])
    np.testing.assert_allclose(bind(model, params).blocks[0](x), adapted, atol=1e-4)


def test_the_list_of_projections_counts_alike_ones_once():
    with pytest.raises(UserError, match=r"there are: blocks\.N$"):
        lora.add(Picture(jax.random.key(0)), Lora(4, 8.0, "x"), jax.random.key(1))
