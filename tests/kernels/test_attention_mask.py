"""Masks: causal, windowed, by segments, and None where every key counts."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.attention_mask import Coordinates, attention_mask


def sides(positions, segments=None):
    """Queries [T, 1] and keys [1, T] at the same coordinates."""
    positions = jnp.array(positions)
    segments = None if segments is None else jnp.array(segments)
    queries = Coordinates(positions[:, None], None if segments is None else segments[:, None])
    return queries, Coordinates(positions[None], None if segments is None else segments[None])


def test_every_key_counts_without_a_mask():
    assert attention_mask(*sides(range(4)), causal=False) is None


def test_causal_by_positions():
    mask = attention_mask(*sides([2, 0, 1]), causal=True)
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize("window", [2, jnp.int32(2)])
def test_a_window_counts_the_query_itself(window):
    mask = attention_mask(*sides(range(4)), causal=True, window=window)
    np.testing.assert_array_equal(mask, np.tri(4) - np.tri(4, k=-2))


def test_segments_with_and_without_order():
    queries, keys = sides([0, 1, 0, 1], [1, 1, 2, 2])
    same = np.kron(np.eye(2), np.ones((2, 2)))
    np.testing.assert_array_equal(attention_mask(queries, keys, causal=False), same)
    np.testing.assert_array_equal(attention_mask(queries, keys, causal=True), same * np.tri(4))
