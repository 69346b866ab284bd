"""The gated product by its formulas, in torch."""

import jax
import numpy as np
import pytest
import torch

from jaxft.nn.gated import ACTIVATIONS, gated

TORCH = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients(name):
    pair = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    theirs = torch.tensor(pair, requires_grad=True)
    made = TORCH[name](theirs[0]) * theirs[1]
    made.sum().backward()
    np.testing.assert_allclose(gated(*pair, name), made.detach(), atol=1e-6)
    grads = jax.grad(lambda *a: gated(*a, name).sum(), (0, 1))(*pair)
    np.testing.assert_allclose(np.stack(grads), theirs.grad, atol=1e-6)
