"""PatchGAN against the same layers in torch; fp32 on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from jaxft.core import params as P
from jaxft.models.critics.discriminator import LEAST, PatchGAN

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def oracle(widths=(64, 128, 256, 512), groups=32):
    """taming-transformers' NLayerDiscriminator of three layers, with group norm for batch norm."""
    layers, inputs = [], 3
    for i, width in enumerate(widths):
        stride = 1 if i == 3 else 2
        layers.append(nn.Conv2d(inputs, width, 4, stride, padding=1, bias=i == 0))
        if i:
            layers.append(nn.GroupNorm(groups, width))
        layers.append(nn.LeakyReLU(0.2))
        inputs = width
    return nn.Sequential(*layers, nn.Conv2d(inputs, 1, 4, 1, padding=1))


def names():
    """torch's name of each of our parameters."""
    found = {"convs.0.kernel": "0.weight", "convs.0.bias": "0.bias"}
    for i in (1, 2, 3):
        found[f"convs.{i}.kernel"] = f"{3 * i - 1}.weight"
        found[f"norms.{i - 1}.scale"] = f"{3 * i}.weight"
        found[f"norms.{i - 1}.bias"] = f"{3 * i}.bias"
    return found | {"conv_out.kernel": "11.weight", "conv_out.bias": "11.bias"}


def to_torch(params, prefix=""):
    """Our parameters as the oracle's state dict."""
    state = {}
    for ours, theirs in names().items():
        array = np.asarray(params[prefix + ours])
        state[theirs] = torch.tensor(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
    return state


@pytest.fixture(scope="module")
def judge():
    made = PatchGAN(key=jax.random.key(0))
    shaken = {k: v + 0.02 * jax.random.normal(jax.random.key(1), v.shape)
              for k, v in P.flatten(made).items()}  # fmt: skip
    return P.bind(made, shaken)


def images(size):
    return np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)


@pytest.mark.parametrize("size", [(LEAST, 40), (72, 64)])
def test_logits_and_gradients(judge, size):
    x, torch_judge = images(size), oracle()
    torch_judge.load_state_dict(to_torch(P.flatten(judge)))
    theirs_x = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    wanted = torch_judge(theirs_x)[:, 0]
    wanted.square().sum().backward()

    def loss(params, x):
        logits = P.bind(judge, params)(x)
        return jnp.sum(jnp.square(logits)), logits

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK)
    (slopes, slope_x), logits = step(P.flatten(judge), x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(
        logits, wanted.detach(), rtol=0, atol=1e-5 * float(wanted.abs().max())
    )
    close(slope_x, theirs_x.grad.permute(0, 2, 3, 1))
    theirs = {k: v.grad for k, v in torch_judge.named_parameters()}
    for key, slope in to_torch(slopes).items():
        close(slope, theirs[key])


def close(ours, theirs, tolerance=1e-5):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


def test_rows_are_judged_alone(judge):
    """What batch norm would not do; micro-batches and meshes count on it."""
    x = images((LEAST, LEAST))
    alone = jnp.concatenate([judge(x[:1]), judge(x[1:])])
    np.testing.assert_allclose(judge(x), alone, atol=1e-6)


def test_start_is_that_of_taming():
    """Normal weights of 0.02, so the first logits are of about 1, where the hinge still pulls.

    Inside the image 0.02 sqrt(16 x 512 x 0.52) = 1.3: leaky ReLU leaves 0.52 of a unit square.
    """
    start = P.flatten(PatchGAN(key=jax.random.key(3)))
    for path, array in start.items():
        if path.endswith("kernel"):
            assert abs(float(jnp.std(array)) / 0.02 - 1) < 0.05, path
    judge = P.bind(PatchGAN(key=jax.random.key(3)), start)
    logits = judge(images((LEAST, LEAST)))
    assert 0.3 < float(jnp.sqrt(jnp.mean(jnp.square(logits)))) < 1.3
