"""RMSNorm against transformers' LlamaRMSNorm, in fp32 and with its order of casts in bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

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
