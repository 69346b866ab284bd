"""Proofs about adapters of a transformer, for the tests of each of them."""

import jax
import numpy as np
import torch

from jaxft.core import params as P
from jaxft.core.configs.schema import Lora
from jaxft.nn import lora
from jaxft.weights import transfer
from jaxft.weights.adapters import peft


def adapted(architecture, cfg, settings):
    """The shapes of a transformer with adapters."""

    def build():
        model = architecture.module(cfg, key=jax.random.key(0))
        lora.add(model, settings, jax.random.key(1))
        return model

    return jax.eval_shape(build)


def assert_dropout_is_keyed_by_row_and_block(architecture, cfg, targets, inputs):
    """Two rows with the same key are alike, and a block's number is in its key.

    inputs: of one row.
    """
    draw = np.random.default_rng(0).standard_normal
    blank = adapted(architecture, cfg, Lora(rank=2, alpha=2.0, dropout=0.5, targets=targets))
    leaves = P.describe(blank).items()
    model = P.bind(blank, {path: 0.1 * draw(leaf.shape, np.float32) for path, leaf in leaves})
    rows = [np.repeat(one, 2, 0) for one in inputs]
    run = jax.jit(lambda keys: model(*rows, keys=keys))
    keys = jax.random.split(jax.random.key(1), 2)
    first, second = run(keys)
    assert np.abs(first - second).max() > 1e-5
    np.testing.assert_allclose(run(keys[::-1])[1], first, atol=1e-6)


def assert_adapters_have_the_names_and_shapes_of_modules(architecture, cfg, theirs):
    """theirs: diffusers' model, of which every Linear has an adapter."""
    leaves = P.describe(adapted(architecture, cfg, Lora(rank=2, targets=".*")))
    part = transfer.Part("", "here", None, architecture.rules(cfg), {})
    found = {slot.module: slot for slot in peft.slots(part, leaves)}
    modules = {n: one for n, one in theirs.named_modules() if isinstance(one, torch.nn.Linear)}
    assert found.keys() == modules.keys()
    for name, slot in found.items():
        low, up = (leaves[f"{slot.path}.lora_{side}"].shape for side in "ab")
        outputs, inputs = modules[name].weight.shape
        assert low[-2:] == (inputs, 2) and up[-2:] == (2, outputs), name
