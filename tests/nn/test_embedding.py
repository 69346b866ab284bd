"""The embedding of times against diffusers'."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from jaxft.nn.embedding import timestep_embedding, untrained_rows


@pytest.mark.parametrize("dim", [320, 33])
@pytest.mark.parametrize("cos_first, shift", [(True, 0), (False, 1)])
def test_d15_timestep_embedding(dim, cos_first, shift):
    t = np.array([0.0, 1.0, 13.5, 999.0], np.float32)
    ours = timestep_embedding(jnp.array(t), dim, cos_first=cos_first, freq_shift=shift)
    theirs = get_timestep_embedding(torch.tensor(t), dim, cos_first, shift)
    # The angle 999 has an fp32 step of 6e-5, which no sine can be better than.
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1.3e-4)
    np.testing.assert_allclose(ours[:3], theirs.numpy()[:3], atol=2e-6)


def test_d15_time_ids_of_any_shape_are_embedded_apart():
    ids = jnp.array([[512.0, 768, 0, 12, 1024, 1024]])
    ours = timestep_embedding(ids, 256)
    assert ours.shape == (1, 6, 256) and ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours[0, 1], timestep_embedding(ids[0, 1:2], 256)[0])
    np.testing.assert_allclose(ours[0, 2], [1.0] * 128 + [0.0] * 128)


def test_rows_that_are_short_or_the_mean_look_untrained():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((64, 32)).astype("f4") + 2
    table[3] *= 0.01
    table[5] = table.mean(0) + 0.01
    table[7] = 0
    found = untrained_rows(jnp.asarray(table), jnp.array([2, 3, 5, 7, 9]))
    assert found.tolist() == [False, True, True, True, False]
