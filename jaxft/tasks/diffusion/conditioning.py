"""Pictures that samples are conditioned on: held-out ones, or those of a command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.images.buckets import Size, assign
from jaxft.data.images.dataset import fit
from jaxft.data.images.decode import decode
from jaxft.models.pipelines.conditioning import centre_mask
from jaxft.models.pipelines.families import AnyConfig
from jaxft.models.pipelines.stable_diffusion import HOLE, KINDS, NOTHING, SOURCE
from jaxft.tasks import Request
from jaxft.tasks.diffusion.rows import PictureRows

GREY = 128  # a masked pixel, in [0, 255]

Given = Mapping[str, np.ndarray]


def held_out(cfg: AnyConfig, rows: PictureRows | None, ids: Sequence[int] | np.ndarray) -> dict:
    """Return the conditioning of samples from held-out rows.

    An index counts modulo the number of rows. Returns {} for a text-to-image model or without rows,
    otherwise source pictures, or pictures with their centre masked.
    """
    if cfg.conditioning == NOTHING or rows is None:
        return {}
    examples = [rows[int(i) % len(rows)] for i in ids]
    if cfg.conditioning == SOURCE:
        return {"source": np.stack([example["source"] for example in examples])}
    pixels = np.stack([example["pixels"] for example in examples])
    return {"pixels": pixels, "mask": np.stack([centre_mask(x.shape[:2]) for x in pixels])}


def shown(given: Given) -> UInt8[np.ndarray, "B Y X 3"] | None:
    """Return the conditioning as pictures, grey where a mask is to be filled."""
    if "mask" not in given:
        return given.get("source")
    return np.where(given["mask"] > 0.5, np.uint8(GREY), given["pixels"])


def asked(cfg: AnyConfig, request: Request, sizes: Sequence[Size], count: int) -> dict:
    """Return the pictures of `--image` and `--mask`, repeated for each of `count` prompts.

    They are fitted to the nearest of `sizes`. Raises UserError for a picture that is missing,
    unreadable, or not for this model.
    """
    wanted = {NOTHING: (), HOLE: ("image", "mask"), SOURCE: ("image",)}[cfg.conditioning]
    kind = "a text-to-image" if cfg.conditioning == NOTHING else f"an{KINDS[cfg.conditioning]}"
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
    made = {"source" if cfg.conditioning == SOURCE else "pixels": fit(image, size).pixels}
    if cfg.conditioning == HOLE:
        made["mask"] = _read_mask(request.mask or "", image, size)
    return {name: np.repeat(array[None], count, axis=0) for name, array in made.items()}


def _read(path: str) -> Image.Image:
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return decode(content, path)


def _read_mask(path: str, image: Image.Image, size: Size) -> Float[np.ndarray, "Y X 1"]:
    """Return 1 where the file is white, resized and cropped like its picture."""
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
