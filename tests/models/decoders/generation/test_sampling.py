"""Picking tokens against transformers' warpers: the same sets stay, at the same odds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from jaxft.models.decoders.generation.sampling import Sampling, pick

VOCAB, DRAWS = 12, 2000
LOGITS = (np.random.default_rng(0).normal(size=(3, VOCAB)) * 2).astype(np.float32)


def draws(logits, how):
    """(rows, DRAWS) picked ids, each with its own key.

    Always of one shape, so that the operations are compiled once for all tests.
    """
    padding = [(0, 3 - len(logits)), (0, VOCAB - logits.shape[1])]
    padded = np.pad(logits, padding, constant_values=-np.inf)
    padded[len(logits) :] = 0
    keys = jax.random.split(jax.random.key(0), 3 * DRAWS)
    ids = pick(jnp.asarray(padded.repeat(DRAWS, 0)), keys, how)
    return np.asarray(ids).reshape(3, DRAWS)[: len(logits)]


def probabilities(logits, how):
    """transformers' distribution after its warpers, in its order."""
    scores = TemperatureLogitsWarper(how.temperature)(None, torch.from_numpy(logits))
    if how.top_k:
        scores = TopKLogitsWarper(how.top_k)(None, scores)
    if how.top_p < 1:
        scores = TopPLogitsWarper(how.top_p)(None, scores)
    return torch.softmax(scores, -1).numpy()


@pytest.mark.parametrize(
    "how",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(1.0, top_k=3),
        Sampling(1.0, top_k=50),
        Sampling(1.0, top_p=0.8),
        Sampling(2.0, top_p=0.3),
        Sampling(0.7, top_k=5, top_p=0.9),
        Sampling(1.5, top_k=1),
    ],
    ids=str,
)
def test_sets_and_frequencies_are_those_of_transformers(how):
    wanted, ids = probabilities(LOGITS, how), draws(LOGITS, how)
    seen = np.stack([np.bincount(row, minlength=VOCAB) for row in ids]) / DRAWS
    assert not seen[wanted == 0].any(), "a filtered token was picked"
    assert seen[wanted > 3e-3].all(), "a kept token never came"
    np.testing.assert_allclose(seen, wanted, atol=4 * 0.5 / DRAWS**0.5)


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.0, top_k=3, top_p=0.1)])
def test_temperature_zero_is_greedy(how):
    ids = draws(LOGITS, how)
    np.testing.assert_array_equal(ids, LOGITS.argmax(-1)[:, None].repeat(DRAWS, 1))
    assert ids.dtype == np.int32


def test_ties_of_the_kth_stay():
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.2]], np.float32))
    assert set(draws(logits, Sampling(1.0, top_k=2))[0]) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("mass", "kept"), [(0.5, {0, 1}), (0.4, {0}), (0.69, {0, 1}), (0.71, {0, 1, 2}), (0.05, {0})]
)
def test_the_token_that_crosses_the_mass_stays(mass, kept):
    logits = np.log(np.array([[0.45, 0.25, 0.2, 0.1]], np.float32))
    assert set(draws(logits, Sampling(1.0, top_p=mass))[0]) == kept


def test_a_mass_of_zero_keeps_the_best():
    assert set(draws(LOGITS[:1], Sampling(1.0, top_p=0.0))[0]) == {int(LOGITS[0].argmax())}


def test_a_row_depends_on_its_own_key_only():
    keys, how = jax.random.split(jax.random.key(1), 3), Sampling(1.0)
    order = np.array([2, 0, 1])
    ids = np.asarray(pick(jnp.asarray(LOGITS), keys, how))
    np.testing.assert_array_equal(pick(jnp.asarray(LOGITS[order]), keys[order], how), ids[order])
    assert (np.asarray(pick(jnp.asarray(LOGITS), keys[order], how)) != ids).any()


def test_masked_logits_are_never_picked():
    logits = LOGITS.copy()
    logits[:, 4:] = -np.inf
    assert draws(logits, Sampling(3.0, top_k=8, top_p=0.99)).max() < 4
