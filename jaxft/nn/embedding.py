"""Embeddings of numbers, such as a denoiser's time, and tables of embeddings."""

from math import log

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from jaxft.nn.conv import dense

SHORT_ROW = 0.5  # of the median norm of a table's rows. Those of SmolLM2 have at least 0.57
NEAR_MEAN = 0.1  # distance to the mean row, in the same unit


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


class TimeEmbedding(nnx.Module):
    """Two layers with a silu between them, for the sinusoids of a time or for pooled text.

    hidden: the width between the layers, by default that of the output.
    """

    def __init__(
        self, inputs: int, dim: int, *, key: PRNGKeyArray, hidden: int = 0, bias: bool = True
    ):
        first, second = jax.random.split(key)
        self.linear_1 = dense(inputs, hidden or dim, key=first, bias=bias)
        self.linear_2 = dense(hidden or dim, dim, key=second, bias=bias)

    def __call__(
        self, x: Float[Array, "B C"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "B D"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x, keys)), keys)


def untrained_rows(table: Float[Array, "V D"], ids: Int[Array, " n"]) -> Bool[Array, " n"]:
    """Return True for each id whose row looks as if it was never trained.

    Such a row is short beside the others, or it is their mean, with which transformers fills new
    rows. A row that was drawn at random with the norm of the others is not found.
    """
    wide = table.astype(jnp.float32)
    norms = jnp.linalg.norm(wide, axis=1)  # [V]
    distances = jnp.linalg.norm(wide[ids] - wide.mean(0), axis=1)  # [n]
    usual = jnp.median(norms)
    return (norms[ids] < SHORT_ROW * usual) | (distances < NEAR_MEAN * usual)
