"""Prodigy against its authors' own code in torch."""

import numpy as np
import torch
from prodigyopt import Prodigy

from jaxft.core import optim
from tests.core.test_optim import DECAYED, LEAVES, arrays, make, run, start


def test_prodigy_without_gradients_stays_finite_and_still():
    params = arrays(0)
    after = run(
        make("prodigy"), params, [{path: np.zeros_like(x) for path, x in params.items()}] * 2
    )
    for path, x in params.items():
        np.testing.assert_allclose(after[path], x, rtol=1e-6)


def test_prodigy_is_its_authors():
    """Two groups, as norms and biases have no weight decay."""
    start_at, grads = start(), [arrays(1)] * 100
    tx = optim.make_optimizer(
        "prodigy", lambda k: 1.0 / (1 + 0.1 * k), b1=0.9, b2=0.99, weight_decay=0.1, clip=0.0,
        leaves=LEAVES,
    )  # fmt: skip
    ours = run(tx, start_at, grads)
    theirs = {path: torch.tensor(x, requires_grad=True) for path, x in start_at.items()}
    groups = [
        {"params": [theirs[p] for p in LEAVES if p in DECAYED], "weight_decay": 0.1},
        {"params": [theirs[p] for p in LEAVES if p not in DECAYED], "weight_decay": 0.0},
    ]
    optimizer = Prodigy(groups, lr=1.0, betas=(0.9, 0.99), use_bias_correction=True)
    for step, one in enumerate(grads):
        for path, tensor in theirs.items():
            tensor.grad = torch.tensor(one[path])
        for group in optimizer.param_groups:
            group["lr"] = 1.0 / (1 + 0.1 * step)
        optimizer.step()
    assert optimizer.param_groups[0]["d"] > 2e-6, "the step size has grown"
    for path, tensor in theirs.items():
        made = ours[path] - start_at[path]
        np.testing.assert_allclose(
            made,
            tensor.detach().numpy() - start_at[path],
            rtol=1e-3,
            atol=1e-3 * np.abs(made).max(),
        )
