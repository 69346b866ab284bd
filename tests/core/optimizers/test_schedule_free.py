"""Schedule-free AdamW against its authors' own code in torch, and what is evaluated of it."""

import jax
import numpy as np
import optax
import pytest
import torch
from schedulefree import AdamWScheduleFree

from jaxft.core import optim
from jaxft.core.errors import UserError
from jaxft.core.optimizers.schedule_free import average
from tests.core.test_optim import DECAYED, LEAVES, arrays, start

LR, WARMUP, STEPS = 1e-2, 4, 30


def make(factors=optim.NO_FACTORS):
    lr = optim.schedule("constant", LR, WARMUP, STEPS)
    return optim.make_optimizer(
        "schedule_free", lr, b1=0.9, b2=0.99, weight_decay=0.1, clip=0.0, leaves=LEAVES,
        factors=factors,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["", ".*_proj.*=0.1, norm.*=2"])
def test_it_is_its_authors_at_both_points(text):
    """Groups of torch have own learning rates, and none for norms and biases has weight decay."""
    first = {path: x / 20 for path, x in start().items()}  # fp32 rounds what larger ones move
    params, factors = first, optim.lr_factors(text, LEAVES)
    theirs = {path: torch.tensor(x, requires_grad=True) for path, x in params.items()}
    groups = [
        {"params": [w], "lr": LR * factors.get(p, 1.0), "weight_decay": 0.1 * (p in DECAYED)}
        for p, w in theirs.items()
    ]
    optimizer = AdamWScheduleFree(groups, lr=LR, betas=(0.9, 0.99), warmup_steps=WARMUP)
    tx = make(factors)
    state, update = tx.init(params), jax.jit(tx.update)
    optimizer.train()
    for k in range(STEPS):
        grads = arrays(k + 1)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for path, weight in theirs.items():
            weight.grad = torch.tensor(grads[path])
        optimizer.step()
    for ours in (params, average(state, params)):
        for path, weight in theirs.items():
            want = weight.detach().numpy()
            error = np.linalg.norm(ours[path] - want) / np.linalg.norm(want - first[path])
            assert error < 1e-5, f"{path}: differs by {error:.1e} of what it moved"
        optimizer.eval()
    moved = np.abs(params["norm.scale"] - average(state, params)["norm.scale"]).max()
    assert moved > 1e-4, "both points differ"


def test_before_the_first_step_the_average_is_the_parameters_bit_for_bit():
    params = arrays(0)
    for path, x in average(make().init(params), params).items():
        np.testing.assert_array_equal(x, params[path])


def test_other_optimisers_have_no_average():
    params = arrays(0)
    assert average(optax.adam(1e-3).init(params), params) == {}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"schedule": "cosine"}, r"needs optim\.schedule=constant, not cosine"),
        ({"ema": 0.9}, r"needs optim\.ema=0\.0, not 0\.9"),
        ({"b1": 0.0}, r"optim\.b1 above 0"),
    ],
)
def test_contradictions_are_refused(keys, text):
    usual = {"lr": 1e-3, "schedule": "constant", "warmup": "0_steps", "weight_decay": 0.0}
    cfg = optim.Optim(**{"name": "schedule_free", **usual, "clip": 1.0, **keys})
    with pytest.raises(UserError, match=text):
        optim.check_optimizer(cfg, "float32")
    with pytest.raises(UserError, match="needs param_dtype=float32"):
        good = optim.Optim(name="schedule_free", **usual, clip=1.0)
        optim.check_optimizer(good, "bfloat16")
