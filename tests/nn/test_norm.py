"""RMSNorm against transformers' LlamaRMSNorm, in fp32 and with its order of casts in bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from jaxft.core.params import bind, describe
from jaxft.nn.norm import RMSNorm

EPS = 1e-5


def pair(x, scale, dtype):
    """(ours, transformers') of the same input, in `dtype` ("float32" or "bfloat16")."""
    oracle = LlamaRMSNorm(x.shape[-1], eps=EPS).to(getattr(torch, dtype))
    with torch.no_grad():
        oracle.weight.copy_(torch.from_numpy(scale))
        theirs = oracle(torch.from_numpy(x).to(getattr(torch, dtype)))
    template = jax.eval_shape(lambda: RMSNorm(x.shape[-1], eps=EPS))
    ours = bind(template, {"scale": jnp.asarray(scale)})(jnp.asarray(x, dtype))
    assert ours.dtype == jnp.dtype(dtype)
    return np.asarray(ours).astype(np.float32), theirs.float().numpy()


def draw(scale_of_x):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 64)).astype(np.float32) * scale_of_x
    return x, rng.normal(1, 0.5, 64).astype(np.float32)


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4])
def test_t02_fp32_equals_transformers(magnitude):
    ours, theirs = pair(*draw(magnitude), "float32")
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_t02_statistics_are_fp32_and_the_cast_comes_before_the_scale():
    ours, theirs = pair(*draw(1.0), "bfloat16")
    # A rounding of the reciprocal root may differ; another order of casts differs in a third.
    assert (ours != theirs).mean() < 0.01
    np.testing.assert_allclose(ours, theirs, rtol=2**-6)


def test_its_parameter():
    leaf = describe(RMSNorm(6, eps=EPS))["scale"]
    assert leaf.shape == (6,) and leaf.axes == ("norm",) and leaf.inputs == 0


@pytest.mark.parametrize(
    ("kind", "stock"),
    [("cast_first", LlamaRMSNorm), ("scale_first", Olmo2RMSNorm), ("one_plus", Gemma3RMSNorm)],
)
def test_c6_norms_cast_where_transformers_does(kind, stock, one_thread):
    """Bit for bit in bf16, where each kind differs from the others."""
    rng = np.random.default_rng(0)
    x, scale = (rng.normal(size=n).astype(np.float32) for n in ((64, 48), (48,)))
    low = torch.tensor(x).bfloat16()
    want = stock(48, eps=1e-5).bfloat16()
    with torch.no_grad():
        want.weight.copy_(torch.tensor(scale))
        rounded, want = want.weight.float().numpy(), want(low).float().numpy()

    def run(kind, scale):
        norm = RMSNorm(48, eps=1e-5, kind=kind)
        norm.scale[...] = jnp.asarray(scale)
        return np.asarray(norm(jnp.asarray(x, jnp.bfloat16)).astype(jnp.float32))

    np.testing.assert_array_equal(run(kind, rounded), want)
    other = "scale_first" if kind == "cast_first" else "cast_first"
    assert (run(other, rounded + (kind == "one_plus")) != want).mean() > 0.01
