"""Normalisation layers; statistics always in fp32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dim, cast to x's dtype before the scale, as Llama does.

    Zhang & Sennrich 2019, arXiv:1910.07467; the order of the cast is transformers' LlamaRMSNorm.
    """

    def __init__(self, dim: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,)), axes=("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return self.scale[...].astype(x.dtype) * normed
