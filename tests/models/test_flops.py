"""FLOPs of traced functions: products, convolutions, loops, and the published UNets."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.models.denoisers.unet import Added, UNet
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.flops import count
from jaxft.weights.folders.known_configs import KNOWN_COMPONENTS
from tests.devices import traced_for


def test_products_of_any_form():
    a, b = jnp.ones((5, 3, 4)), jnp.ones((5, 4, 7))
    assert count(jnp.matmul, a, b) == 2 * 5 * 3 * 4 * 7
    assert count(lambda a, b: jnp.einsum("bij,bjk->ik", a, b), a, b) == 2 * 5 * 3 * 4 * 7
    assert count(jnp.add, a, a) == 0


def test_convolutions_strided_and_grouped():
    def conv(x, kernel, stride, groups):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    x = jnp.ones((2, 8, 8, 6))
    plain = count(lambda x, k: conv(x, k, 2, 1), x, jnp.ones((3, 3, 6, 10)))
    assert plain == 2 * (2 * 4 * 4 * 10) * (3 * 3 * 6)
    kernel = jnp.ones((3, 3, 6, 10))
    pulled = count(jax.grad(lambda x: jnp.sum(conv(x, kernel, 2, 1) ** 2)), x)
    assert pulled == 2 * plain, "the input's gradient has no more products than the output"
    depthwise = count(lambda x, k: conv(x, k, 1, 6), x, jnp.ones((3, 3, 1, 6)))
    assert depthwise == 2 * (2 * 8 * 8 * 6) * 9


def test_loops_branches_and_what_is_wrapped():
    w = jnp.ones((4, 4))

    def loop(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.matmul)(x, w), None), x, length=7)[0]

    assert count(jax.jit(loop), w) == 7 * 2 * 4**3
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, loop, lambda x: x, x)  # noqa: E731
    assert count(branch, w) == 7 * 2 * 4**3
    gradient = count(jax.grad(lambda x: jnp.sum((x @ w) ** 2)), w)
    assert gradient == 2 * 2 * 4**3  # forward and back, w is a constant


# specs: torch's FlopCounterMode over diffusers' UNet, batch 1, 77 tokens, in TFLOP.
@pytest.mark.parametrize(
    ("kind", "side", "expected"),
    [("sd1", 64, 0.803), ("sd2", 64, 0.804), ("sd2", 96, 2.149), ("sdxl", 128, 6.761)],
)
def test_published_unets(kind, side, expected):
    cfg = UNetConfig.from_hf(KNOWN_COMPONENTS[kind]["unet"])
    template = jax.eval_shape(lambda key: UNet(cfg, key=key), jax.random.key(0))
    added = Added(jnp.zeros((1, 1280)), jnp.zeros((1, 6))) if cfg.added_dim else None
    x, t = jnp.zeros((1, side, side, 4)), jnp.zeros((1,))
    context = jnp.zeros((1, 77, cfg.context_dims[0]))

    def forward(module):
        return module(x, t, context, added)

    with traced_for("gpu"):  # a CPU's products make sums too
        found = count(forward, template)
    assert found / 1e12 == pytest.approx(expected, rel=1e-3)
