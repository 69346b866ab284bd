"""Picture conditioning of a UNet: channels of a masked picture, or of the source of an edit."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxft.models.autoencoders import vae
from jaxft.models.pipelines.families import AnyConfig, AnyPipeline
from jaxft.models.pipelines.stable_diffusion import NOTHING, SOURCE
from jaxft.nn.pixels import to_float

BOXES = 4  # rectangles of a random mask, at most
MASK_SIDES = (0.1, 0.7)  # of a rectangle, as parts of the picture's
WHOLE_SHARE = 0.25  # share of rows whose whole picture is masked, as in RunwayML's training


def condition(
    model: AnyPipeline,
    cfg: AnyConfig,
    batch: Mapping[str, Any],
    keys: PRNGKeyArray | None,
    dtype: jnp.dtype,
) -> Float[Array, "B Y X K"] | None:
    """Return the UNet's channels beside the noisy latents, None for text-to-image.

    They are those of diffusers' trainers and pipelines.

    HOLE: the mask at the top left pixel of each latent, then the scaled latents of `pixels`, which
    are grey where masked. The mask is `mask` of the batch. Without it, the mask is random with
    `keys`, and the centre else. The latents are sampled with `keys`, and the mode else.
    SOURCE: the mode of `source`, unscaled.
    """
    if cfg.conditioning == NOTHING:
        return None
    if cfg.conditioning == SOURCE:
        return model.vae.encode(to_float(batch["source"]).astype(dtype)).mean
    pixels = to_float(batch["pixels"])
    own = None if keys is None else jax.vmap(jax.random.split)(keys)
    mask = _mask(batch, None if own is None else own[:, 0])
    moments = model.vae.encode((pixels * (1.0 - mask)).astype(dtype))
    latents = moments.mean if own is None else vae.sample(moments, own[:, 1])
    factor = cfg.vae.factor
    corners = mask[:, ::factor, ::factor]  # [B, Y, X, 1]
    scaled = model.vae.scale(latents.astype(jnp.float32))
    return jnp.concatenate([corners, scaled], axis=-1)  # [B, Y, X, 1 + C]


def _mask(batch: Mapping[str, Any], keys: PRNGKeyArray | None) -> Float[Array, "B Y X 1"]:
    if "mask" in batch:
        return jnp.asarray(batch["mask"], jnp.float32)
    rows, height, width, _ = batch["pixels"].shape
    if keys is not None:
        return random_masks(keys, (height, width))
    return jnp.broadcast_to(centre_mask((height, width)), (rows, height, width, 1))


def random_masks(keys: PRNGKeyArray, size: tuple[int, int]) -> Float[Array, "B Y X 1"]:
    """Return masks, 1 where a picture is to be filled: up to BOXES rectangles, or all of it.

    A share WHOLE_SHARE of the rows is masked as a whole. keys: one a row.
    """
    return jax.vmap(partial(_random_mask, size=size))(keys)


def _random_mask(key: PRNGKeyArray, size: tuple[int, int]) -> Float[Array, "Y X 1"]:
    count, lengths, places, whole = jax.random.split(key, 4)
    used = jnp.arange(BOXES) < jax.random.randint(count, (), 1, BOXES + 1)
    side = jax.random.uniform(lengths, (2, BOXES, 1), minval=MASK_SIDES[0], maxval=MASK_SIDES[1])
    start = jax.random.uniform(places, (2, BOXES, 1)) - side / 2  # cut at the borders
    ys, xs = ((jnp.arange(n) + 0.5) / n for n in size)
    inside_y = (ys >= start[0]) & (ys < start[0] + side[0])
    inside_x = (xs >= start[1]) & (xs < start[1] + side[1])
    boxes = used[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]  # [BOXES, Y, X]
    masked = boxes.any(axis=0) | (jax.random.uniform(whole) < WHOLE_SHARE)
    return masked[..., None].astype(jnp.float32)


def centre_mask(size: tuple[int, int]) -> Float[np.ndarray, "Y X 1"]:
    """Return the mask of evaluations: 1 in the middle half of both sides."""
    ys, xs = ((np.arange(n) + 0.5) / n for n in size)
    inside = (abs(ys - 0.5) < 0.25)[:, None] & (abs(xs - 0.5) < 0.25)
    return inside[..., None].astype(np.float32)


def captions_dropped(cfg: AnyConfig, drawn: Float[Array, " B"], share: float) -> Bool[Array, " B"]:
    """Return True for the rows that lose their caption.

    drawn: uniform numbers. With a source picture, `share` of the rows lose only the caption, and
    `share` lose the caption and the picture.
    """
    return drawn < (2 * share if cfg.conditioning == SOURCE else share)


def drop_sources(
    cfg: AnyConfig, concat: Array | None, drawn: Float[Array, " B"], share: float
) -> Array | None:
    """Return `concat`, with zeros in rows that lose their source picture.

    Of all rows, `share` lose the picture together with the caption, and `share` the picture alone.
    """
    if concat is None or cfg.conditioning != SOURCE:
        return concat
    dropped = (drawn >= share) & (drawn < 3 * share)
    return jnp.where(dropped[:, None, None, None], 0.0, concat)
