"""Conversion of pixels to the input of networks, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def to_float(pixels: UInt8[Any, "*b h w 3"]) -> Float[Any, "*b h w 3"]:
    """Return pixels 0..255 as float32 in [-1, 1]. Accepts NumPy or JAX arrays."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_pixels(images: Float[Array, "*b h w 3"]) -> UInt8[jax.Array, "*b h w 3"]:
    """Return images in [-1, 1] as pixels 0..255, rounded. Values outside are clipped."""
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
