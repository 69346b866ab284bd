"""Embeddings of numbers, such as a denoiser's time."""

from math import log

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num


def timestep_embedding(
    t: Num[Array, "..."], dim: int, *, cos_first: bool = True, freq_shift: float = 0.0
) -> Float[Array, "... D"]:
    """Return sinusoids of numbers [...] of any shape: fp32 [..., dim].

    Frequencies fall from 1 towards 1 / 10000. The first half are cosines and the second sines, or
    the reverse without `cos_first` (diffusers' flip_sin_to_cos). An odd dim ends with 0.
    Source: Ho et al. 2020, arXiv:2006.11239, after Vaswani et al. 2017, arXiv:1706.03762,
    section 3.5.
    """
    half = dim // 2
    decay = np.exp(-log(10000.0) * np.arange(half) / (half - freq_shift))
    angles = t.astype(jnp.float32)[..., None] * jnp.asarray(decay, jnp.float32)  # [..., half]
    pair = (jnp.cos(angles), jnp.sin(angles)) if cos_first else (jnp.sin(angles), jnp.cos(angles))
    embedding = jnp.concatenate(pair, axis=-1)  # [..., 2 half]
    return jnp.pad(embedding, [(0, 0)] * t.ndim + [(0, dim % 2)])
