"""One step, traced on this CPU for other devices: the forms in its jaxpr are those of the mesh."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.core.sharding import make_mesh, one_device_mesh
from jaxft.kernels.attention.attention import attention
from jaxft.kernels.attention.blockwise_attention import CAUSAL_SPANS
from jaxft.kernels.conv import IM2COL_MIN_CHANNELS
from jaxft.kernels.cross_entropy import linear_cross_entropy
from jaxft.nn.conv import Conv
from jaxft.nn.linear import Linear
from tests.devices import traced_for

B, T, N, H, V = 8, 128, 4, 32, 48
KEY = jax.random.key(0)


def loss(params, x):
    """A convolution, a projection, attention and the loss head, from modules as models use them."""
    conv, linear, head = params
    x = conv(x[:, :, None]).squeeze(2)  # [B, T, N H]
    q = linear(x)  # [B, T, N, H]
    out = attention(q, q, q, causal=True).reshape(B, T, N * H)
    targets, weights = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))
    return linear_cross_entropy(out, head, targets, weights, vocab_first=True)[0]


def operations(context):
    """The step's operations by name, as often as they are written down."""
    wide = IM2COL_MIN_CHANNELS
    assert wide == N * H
    conv = jax.eval_shape(lambda: Conv(wide, wide, 3, key=KEY, padding=1))
    linear = jax.eval_shape(lambda: Linear((wide,), (N, H), ("embed", "heads", None), key=KEY))
    shapes = (conv, linear, jax.ShapeDtypeStruct((V, wide), jnp.float32))
    with context:
        traced = jax.jit(jax.grad(loss)).trace(
            shapes, jax.ShapeDtypeStruct((B, T, wide), jnp.float32)
        )
    text = str(traced.jaxpr)
    names = ("conv_general_dilated", "optimization_barrier", "exp ")
    return {name.strip(): text.count(f" {name}") for name in names}


CPU = {"conv_general_dilated": 0, "optimization_barrier": 9, "exp": 2 * CAUSAL_SPANS + 1}
# fp32 is not for cuDNN. The three kernels of splash have 4 exponentials.
GPU = {"conv_general_dilated": 2, "optimization_barrier": 0, "exp": 2 + 1}
TPU = {**GPU, "exp": 4 + 1}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(("platform", "forms"), [("gpu", GPU), ("tpu", TPU)])
def test_a_step_for_another_device_has_its_forms(platform, forms, sizes):
    assert operations(traced_for(platform, sizes)) == forms


@pytest.mark.parametrize("make", [one_device_mesh, lambda: make_mesh(2, 2, 2)])
def test_a_step_for_this_cpu_has_the_cpus(make):
    assert operations(jax.set_mesh(make())) == CPU


def test_without_a_mesh_the_default_device_answers():
    assert operations(jax.default_device(jax.devices("cpu")[0])) == CPU
