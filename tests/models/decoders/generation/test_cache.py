"""The KV cache: stacked or a layer each, slots and segments, positions after padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import registry
from jaxft.models.decoders.generation.cache import (
    append,
    default_positions,
    init_cache,
    lengthened,
    place,
)

CFG = registry.read_decoder(
    {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
)


@pytest.mark.parametrize("unstacked", [False, True])
def test_tokens_go_to_the_slots_behind_those_there_are(unstacked):
    cache, layer = init_cache(CFG, 2, 5, unstacked=unstacked), 1
    memory = (cache.k[1], cache.v[1]) if unstacked else (cache.k, cache.v)
    k, v = np.random.default_rng(0).normal(size=(2, 2, 2, 4, 8)).astype(np.float32)
    written, keys, values = append(memory, k, v, layer, jnp.int32(2))
    np.testing.assert_array_equal(keys[:, 2:4], k)
    np.testing.assert_array_equal(values[:, 2:4], v)
    assert not keys[:, :2].any() and not keys[:, 4:].any()
    if not unstacked:
        assert not written[0][0].any() and written[0][1].any() and not written[0][2].any()


def test_segments_and_positions_follow_the_real_tokens():
    cache = init_cache(CFG, 2, 6)
    segments = jnp.array([[0, 0, 1], [1, 1, 1]])
    queries, keys, cache = place(cache, segments, (2, 3, 32))
    assert queries is segments and keys[:, :3].tolist() == segments.tolist()
    assert default_positions(keys, cache, 3).tolist() == [[-1, -1, 0], [0, 1, 2]]
    cache = cache._replace(index=jnp.int32(3))
    _, keys, cache = place(cache, None, (2, 1, 32))
    assert default_positions(keys, cache, 1).tolist() == [[1], [3]]
    assert place(None, None, (2, 3, 32)) == (None, None, None)


def test_a_longer_cache_keeps_its_tokens():
    cache = init_cache(CFG, 1, 2)._replace(segments=jnp.ones((1, 2), jnp.int32))
    longer = lengthened(cache, 5)
    assert longer.k.shape == (3, 1, 4, 5, 8) and longer.segments.tolist() == [[1, 1, 0, 0, 0]]
