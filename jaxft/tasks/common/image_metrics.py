"""Similarity of images: PSNR and SSIM for pairs, KID for two sets of features."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.errors import UserError

WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window, in pixels
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for a range of 1


def psnr(x: Float[Array, "B Y X C"], y: Float[Array, "B Y X C"]) -> Float[Array, "B"]:
    """Return the PSNR of each image in dB: 10 log10(peak^2 / MSE).

    The range is [-1, 1], so the peak is 2. Infinite for equal images. Computes in fp32, without
    clipping or rounding to grey levels.
    """
    error = jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))
    return 10 * jnp.log10(4 / jnp.mean(error, axis=(1, 2, 3)))


def ssim(x: Float[Array, "B Y X C"], y: Float[Array, "B Y X C"]) -> Float[Array, "B"]:
    """Return the structural similarity of each image, the mean over channels and windows.

    The images lie within [-1, 1] and are rescaled to [0, 1]. Raises UserError for an image smaller
    than the window. Source: Wang et al. 2004, IEEE TIP 13(4), equation 13, with K = (0.01, 0.03)
    and a Gaussian window of 11 pixels and sigma 1.5 that lies wholly inside the image.
    """
    if min(x.shape[1:3]) < WINDOW:
        raise UserError(
            f"SSIM of images of {x.shape[1]}x{x.shape[2]} pixels: expected at least"
            f" {WINDOW}x{WINDOW}, the size of its window; leave SSIM out or use larger images"
        )
    # Halved, not shifted to [0, 1]: E[x^2] - E[x]^2 cancels less around zero.
    x, y = x.astype(jnp.float32) / 2, y.astype(jnp.float32) / 2
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mean_x * mean_x
    var_y = _blurred(y * y) - mean_y * mean_y
    covariance = _blurred(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    light = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return jnp.mean(light * structure, axis=(1, 2, 3))


def _blurred(x: Array) -> Array:
    """Return Gaussian means of all windows inside the image: one pass down, one across."""
    weights = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    line = jnp.asarray(weights / weights.sum(), x.dtype)
    b, height, width, c = x.shape
    planes = x.transpose(0, 3, 1, 2).reshape(b * c, 1, height, width)  # [B C, 1, Y, X]
    for kernel in (line[None, None, :, None], line[None, None, None, :]):
        planes = jax.lax.conv_general_dilated(
            planes, kernel, (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST
        )
    return planes.reshape(b, c, *planes.shape[2:]).transpose(0, 2, 3, 1)  # [B, Y, X, C]


def kid(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """Return the squared distance of two sets of features: unbiased MMD^2.

    The kernel is (x.y / D + 1)^3. Computes over the whole sets in fp64. For two sets of one
    distribution the expectation is zero, so the distance can be slightly negative. Raises UserError
    for a set of fewer than 2 images. With features of EfficientNet-Lite0 the name is `kid-lite0`,
    because the values do not compare with any published KID. Source: Bińkowski et al. 2018,
    arXiv:1801.01401, equation 4.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"KID of {len(a)} and {len(b)} images: expected at least 2 in each set")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return _within(a) + _within(b) - 2 * float(_kernel(a, b).mean())


def _within(x: np.ndarray) -> float:
    """Return the kernel's mean over all pairs of different rows."""
    values = _kernel(x, x)
    return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3
