"""Pictures that a UNet sees beside the noisy latents: a masked one, or the source of an edit."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.core.step import Batch
from jaxft.data.images.buckets import Size, assign
from jaxft.data.images.dataset import decode, fit, to_float
from jaxft.models.autoencoders import vae
from jaxft.models.pipelines.stable_diffusion import (
    HOLE,
    NOTHING,
    SOURCE,
    PipelineConfig,
    StableDiffusion,
)
from jaxft.tasks import Request
from jaxft.tasks.diffusion.latents import Rows

KINDS = {NOTHING: "", HOLE: " inpainting", SOURCE: " InstructPix2Pix"}
BOXES = 4  # rectangles of a random mask, at most
SIDES = (0.1, 0.7)  # of a rectangle, as parts of the picture's
WHOLE = 0.25  # share of rows whose whole picture is masked, as in RunwayML's training
GREY = 128  # what a masked pixel is in [0, 255]

Given = Mapping[str, np.ndarray]


def check(cfg: PipelineConfig, caption_dropout: float) -> None:
    """Raise UserError for a UNet of another kind, and for shares that are more than all rows."""
    if not cfg.sees:
        latent = cfg.vae.latent_channels
        raise UserError(
            f"unet/config.json: in_channels={cfg.unet.in_channels}, but of a VAE with"
            f" latent_channels={latent} a text-to-image UNet takes {latent}, InstructPix2Pix"
            f" {2 * latent}, inpainting {2 * latent + 1}; other kinds are not supported"
        )
    if cfg.sees == SOURCE and caption_dropout > 1 / 3:
        raise UserError(
            f"caption_dropout={caption_dropout} must be at most 1/3 for InstructPix2Pix: as many"
            " rows lose the caption, the picture, and both; the paper has 0.05"
        )


# ---- what the UNet sees -------------------------------------------------------------------


def see(
    model: StableDiffusion,
    cfg: PipelineConfig,
    batch: Batch,
    keys: PRNGKeyArray | None,
    dtype: jnp.dtype,
) -> Float[Array, "B Y X K"] | None:
    """The UNet's channels beside the noisy latents, as diffusers' trainers and pipelines have them.

    HOLE: the mask's pixel at the corner of each latent's, then the scaled latents of `pixels`,
    grey where masked; the mask is `mask` of the batch, else drawn with `keys`, else the centre.
    With `keys` latents are drawn, else they are the mode. SOURCE: the mode of `source`, unscaled.
    """
    if cfg.sees == NOTHING:
        return None
    if cfg.sees == SOURCE:
        return model.vae.encode(to_float(batch["source"]).astype(dtype)).mean
    pixels = to_float(batch["pixels"])
    own = None if keys is None else jax.vmap(jax.random.split)(keys)
    mask = _mask(batch, None if own is None else own[:, 0])
    moments = model.vae.encode((pixels * (1.0 - mask)).astype(dtype))
    latents = moments.mean if own is None else vae.sample(moments, own[:, 1])
    factor = cfg.vae.factor
    corners = mask[:, ::factor, ::factor]
    return jnp.concatenate([corners, cfg.vae.scale(latents.astype(jnp.float32))], axis=-1)


def _mask(batch: Batch, keys: PRNGKeyArray | None) -> Float[Array, "B Y X 1"]:
    if "mask" in batch:
        return jnp.asarray(batch["mask"], jnp.float32)
    rows, height, width, _ = batch["pixels"].shape
    if keys is not None:
        return random_masks(keys, (height, width))
    return jnp.broadcast_to(centre_mask((height, width)), (rows, height, width, 1))


def random_masks(keys: PRNGKeyArray, size: Size) -> Float[Array, "B Y X 1"]:
    """1 where a picture is to be filled: up to BOXES rectangles, or (WHOLE of the rows) all."""
    return jax.vmap(partial(_random_mask, size=size))(keys)


def _random_mask(key: PRNGKeyArray, size: Size) -> Float[Array, "Y X 1"]:
    count, lengths, places, whole = jax.random.split(key, 4)
    used = jnp.arange(BOXES) < jax.random.randint(count, (), 1, BOXES + 1)
    side = jax.random.uniform(lengths, (2, BOXES, 1), minval=SIDES[0], maxval=SIDES[1])
    start = jax.random.uniform(places, (2, BOXES, 1)) - side / 2  # cut at the borders
    ys, xs = ((jnp.arange(n) + 0.5) / n for n in size)
    inside_y = (ys >= start[0]) & (ys < start[0] + side[0])
    inside_x = (xs >= start[1]) & (xs < start[1] + side[1])
    boxes = used[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]
    masked = boxes.any(axis=0) | (jax.random.uniform(whole) < WHOLE)
    return masked[..., None].astype(jnp.float32)


def centre_mask(size: Size) -> Float[np.ndarray, "Y X 1"]:
    """1 in the middle half of both sides: what evaluations have to fill."""
    ys, xs = ((np.arange(n) + 0.5) / n for n in size)
    inside = (abs(ys - 0.5) < 0.25)[:, None] & (abs(xs - 0.5) < 0.25)
    return inside[..., None].astype(np.float32)


def captions_dropped(
    cfg: PipelineConfig, drawn: Float[Array, " B"], share: float
) -> Bool[Array, " B"]:
    """Which rows lose their caption; with a source picture `share` lose it alone, `share` both."""
    return drawn < (2 * share if cfg.sees == SOURCE else share)


def drop_sources(
    cfg: PipelineConfig, seen: Array | None, drawn: Float[Array, " B"], share: float
) -> Array | None:
    """Zeros for the source pictures of the rows that lose it alone or with the caption."""
    if seen is None or cfg.sees != SOURCE:
        return seen
    dropped = (drawn >= share) & (drawn < 3 * share)
    return jnp.where(dropped[:, None, None, None], 0.0, seen)


# ---- pictures to draw on ------------------------------------------------------------------


def held_out(cfg: PipelineConfig, rows: Rows | None, ids: Sequence[int] | np.ndarray) -> dict:
    """What these rows, counted round and round, give to be drawn on.

    Nothing for a text-to-image model, else a picture with its centre masked or a source.
    """
    if cfg.sees == NOTHING or rows is None:
        return {}
    examples = [rows[int(i) % len(rows)] for i in ids]
    if cfg.sees == SOURCE:
        return {"source": np.stack([example["source"] for example in examples])}
    pixels = np.stack([example["pixels"] for example in examples])
    return {"pixels": pixels, "mask": np.stack([centre_mask(x.shape[:2]) for x in pixels])}


def shown(given: Given) -> UInt8[np.ndarray, "B Y X 3"] | None:
    """The same to be looked at: a masked picture is grey where it is to be filled."""
    if "mask" not in given:
        return given.get("source")
    return np.where(given["mask"] > 0.5, np.uint8(GREY), given["pixels"])


def asked(cfg: PipelineConfig, request: Request, sizes: Sequence[Size], count: int) -> dict:
    """`--image` and `--mask` for each of `count` prompts, fitted to that of `sizes` nearest.

    UserError for one that is absent, unreadable, or not for this model.
    """
    wanted = {NOTHING: (), HOLE: ("image", "mask"), SOURCE: ("image",)}[cfg.sees]
    kind = "a text-to-image" if cfg.sees == NOTHING else f"an{KINDS[cfg.sees]}"
    for name in ("image", "mask"):
        path = getattr(request, name)
        if (name in wanted) != (path is not None):
            raise UserError(
                f"--{name}=PATH is missing: {kind} model needs it"
                if name in wanted
                else f"--{name}={path}: {kind} model takes none"
            )
    if not wanted:
        return {}
    image = _read(request.image or "")
    size = sizes[assign((image.height, image.width), sizes)]
    made = {"source" if cfg.sees == SOURCE else "pixels": fit(image, size).pixels}
    if cfg.sees == HOLE:
        made["mask"] = _read_mask(request.mask or "", image, size)
    return {name: np.repeat(array[None], count, axis=0) for name, array in made.items()}


def _read(path: str) -> Image.Image:
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return decode(content, path)


def _read_mask(path: str, image: Image.Image, size: Size) -> Float[np.ndarray, "Y X 1"]:
    """1 where the file is white; resized and cropped as its picture was."""
    mask = _read(path)
    if mask.size != image.size:
        raise UserError(
            f"--mask={path} has {mask.width}x{mask.height} pixels, the image"
            f" {image.width}x{image.height}: expected a mask of the image's size"
        )
    values = np.asarray(mask)
    if (np.ptp(values, axis=-1) > 2).any():
        raise UserError(
            f"--mask={path} has colours: expected white where to fill and black elsewhere"
        )
    if not (values >= GREY).any():
        raise UserError(f"--mask={path} is black all over: expected white where to fill")
    return (fit(mask, size).pixels[..., :1] >= GREY).astype(np.float32)
