"""LoKr trained: sizes, updates and files are those of LyCORIS, and training goes on from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from lycoris.functional.general import factorization as their_factorization
from lycoris.modules.lokr import LokrModule

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import flatten
from jaxft.nn import lora
from jaxft.nn.conv import Conv
from jaxft.nn.linear import Linear
from jaxft.weights.adapters.lokr import as_kronecker, factorization
from jaxft.weights.views import InMemory

RANK, ALPHA, FACTOR = 2, 3.0, 4
LINEAR, CONV = (24, 40), (12, 20)  # inputs, outputs


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 8, 16, 1000])
def test_sizes_are_those_of_the_package(factor):
    sizes = (1, 2, 7, 12, 16, 127, 128, 250, 320, 360, 512, 640, 768, 1024, 1280, 2048, 10240)
    assert {n: factorization(n, factor) for n in sizes} == {
        n: their_factorization(n, factor) for n in sizes
    }


def module(kind, stride=1):
    """A module of jaxft with a LoKr of random factors, and its torch twin."""
    key = jax.random.key(3)
    if kind == "linear":
        own = Linear((LINEAR[0],), (LINEAR[1],), ("embed", "mlp"), key=key, bias=True)
        twin = torch.nn.Linear(*LINEAR)
    else:
        own = Conv(*CONV, 3, key=key, stride=stride, padding=1)
        twin = torch.nn.Conv2d(*CONV, 3, stride, 1)
    model = nnx.Module()
    model.one = own
    lora.add(model, Lora(rank=RANK, alpha=ALPHA, targets="one", lokr=FACTOR), key)
    with torch.no_grad():
        kernel = np.array(own.kernel[...])
        twin.weight.copy_(
            torch.tensor(kernel.T if kind == "linear" else kernel.transpose(3, 2, 0, 1))
        )
        twin.bias.zero_()
    return model, twin


def theirs(kind, twin, params):
    """LyCORIS' module over the twin, with these factors."""
    made = LokrModule("x", twin, 1.0, RANK, ALPHA, factor=FACTOR)
    assert made.use_w1 and not made.use_w2
    a = np.asarray(params["one.lora_a"])
    a = a.T if kind == "linear" else a.transpose(3, 2, 0, 1).reshape(RANK, -1)
    with torch.no_grad():
        made.lokr_w1.copy_(torch.tensor(np.asarray(params["one.lora_k"]).T))
        made.lokr_w2_a.copy_(torch.tensor(np.asarray(params["one.lora_b"]).T))
        made.lokr_w2_b.copy_(torch.tensor(np.ascontiguousarray(a)))
    return made


def over(model, factors):
    """The module with these factors."""
    made = jax.tree.map(lambda x: x, model)
    for name, value in factors.items():
        getattr(made.one, name.removeprefix("one."))[...] = value
    return made.one


def close(ours, wanted, share=1e-5):
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=share * np.abs(wanted).max())


@pytest.mark.parametrize(("kind", "stride"), [("linear", 1), ("conv", 1), ("conv", 2)])
def test_outputs_gradients_and_merged_weights_are_those_of_the_package(kind, stride):
    model, twin = module(kind, stride)
    params = flatten(model)
    names = sorted(name for name in params if ".lora_" in name)
    assert names == ["one.lora_a", "one.lora_b", "one.lora_k"]
    assert not params["one.lora_a"].any() and all(params[name].any() for name in names[1:])
    keys = jax.random.split(jax.random.key(5), 3)
    drawn = {n: jax.random.normal(k, params[n].shape) for n, k in zip(names, keys, strict=True)}
    their = theirs(kind, twin, drawn)
    shape = (2, 5, LINEAR[0]) if kind == "linear" else (2, 6, 7, CONV[0])
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def loss(factors):
        out = over(model, factors)(jnp.asarray(x))
        return (out**2).sum(), out

    (_, ours), gradients = jax.value_and_grad(loss, has_aux=True)(drawn)
    their.apply_to()
    out = twin(torch.tensor(x if kind == "linear" else x.transpose(0, 3, 1, 2)))
    (out**2).sum().backward()
    wanted = out.detach().numpy()
    close(ours, wanted if kind == "linear" else wanted.transpose(0, 2, 3, 1))
    close(gradients["one.lora_k"].T, their.lokr_w1.grad.numpy())
    close(gradients["one.lora_b"].T, their.lokr_w2_a.grad.numpy())
    down = np.asarray(gradients["one.lora_a"])
    down = down.T if kind == "linear" else down.transpose(3, 2, 0, 1).reshape(RANK, -1)
    close(down, their.lokr_w2_b.grad.numpy())
    a, b, k = (np.asarray(drawn[f"one.lora_{n}"]) for n in "abk")
    kernel = np.asarray(model.one.kernel[...])
    merged = lora.merged(kernel, *lora.expanded(a, b, k), None, ALPHA / RANK)
    weight = (their.get_weight(twin.weight.shape) + twin.weight).detach().numpy()
    close(merged, weight.T if kind == "linear" else weight.transpose(2, 3, 1, 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "lora.lokr=4 needs lora.rank > 0"),
        ({"rank": 5}, r"lora.rank=5 with lora.lokr=4 is not below half .* W2, 10 x 6, at one"),
    ],
)
def test_sizes_that_are_no_lokr_are_refused_in_one_line(changes, words):
    model = nnx.Module()
    model.one = Linear((24,), (40,), ("embed", "mlp"), key=jax.random.key(0))
    cfg = Lora(**{"rank": 2, "targets": "one", "lokr": 4, **changes})
    with pytest.raises(UserError, match=words):
        lora.add(model, cfg, jax.random.key(0))
    model.one = Linear((24,), (4, 10), ("embed", "heads", None), key=jax.random.key(0))
    with pytest.raises(UserError, match=r"lora\.lokr=4: one has no plain rows and columns"):
        lora.add(model, Lora(rank=2, targets="one", lokr=4), jax.random.key(0))


def test_a_file_is_read_under_the_names_of_lora():
    """W2 of low rank alone: a whole one, a core and plain LoRA are refused by name."""
    w1, up, down = (
        np.random.default_rng(i).random(n) for i, n in enumerate([(2, 3), (5, 2), (2, 36)])
    )
    own = {"x.lokr_w1": w1, "x.lokr_w2_a": up, "x.lokr_w2_b": down, "x.alpha": np.array(2.0)}
    made = as_kronecker("f", InMemory(own), {"x": (3, 3)})
    assert made.read("x.lora_up.weight").shape == (5, 2, 1, 1)
    assert np.array_equal(made.read("x.lora_down.weight"), down.reshape(2, 4, 3, 3))
    assert made.read("x.lokr_w1") is w1 and set(made.keys()) >= {"x.lokr_w1", "x.alpha"}
    for odd in ("x.lokr_w2", "x.lokr_t2", "x.lokr_w1_a", "x.lora_up.weight", "x.dora_scale"):
        with pytest.raises(UserError, match=f"f: {odd} is not of a LoKr with a whole W1"):
            as_kronecker("f", InMemory({**own, odd: w1}), {})
