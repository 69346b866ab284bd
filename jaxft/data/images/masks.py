"""Masks of a loss: the share of each latent of a picture that counts."""

import hashlib
from io import BytesIO

import numpy as np
from jaxtyping import Float
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.images.dataset import PIXEL_RULE, ImageSet, fit
from jaxft.data.images.decode import decode
from jaxft.data.images.headers import upright
from jaxft.data.images.png import correct_transparency
from jaxft.data.sources.images.records import FORMATS


def loss_mask(images: ImageSet, index: int, factor: int) -> Float[np.ndarray, "Y X 1"]:
    """Return the weights 0 ... 1 of an example's latents: averages over squares of pixels.

    White or opaque pixels have the weight 1. A mask is resized, cropped and mirrored as its
    picture. factor: the side of a latent in pixels. Raises: UserError for a mask that does not
    decode, has no alpha, or leaves nothing to train on.
    """
    records, place = images.records, images.place(index)
    masks = records.masks
    assert masks is not None
    record = place % len(records)
    name, content = masks.name(record), masks.content(record)
    grey = _alpha(content, name) if records.alpha else decode(content, name).convert("L")
    h, w = size = images.how(place)[0]
    pixels = fit(grey, *images.how(place)).pixels.astype(np.float32) / 255.0  # [h, w]
    cells = pixels.reshape(h // factor, factor, w // factor, factor)  # [Y, f, X, f]
    made = cells.mean(axis=(1, 3), dtype=np.float32)[..., None]  # [Y, X, 1]
    if not made.any():
        kind = "is transparent" if records.alpha else "is black"
        raise UserError(
            f"{name} {kind} in all its {size[1]}x{size[0]} pixels of training, so that nothing of"
            " the picture would count; mark what to learn, or leave the picture out"
        )
    return made


def mask_key(images: ImageSet, index: int, factor: int) -> str:
    """Return a name of an example's weights, by the bytes of the mask and its place in them."""
    masks, rule = images.records.masks, f"|{factor}|{images.records.alpha}"
    assert masks is not None
    if images.records.alpha:  # the picture itself
        return hashlib.sha256((images.key(index) + rule).encode()).hexdigest()
    content, rule = masks.content(index % len(images.records)), f"|{PIXEL_RULE}{rule}"
    return hashlib.sha256(content + f"|{images.how(index)}{rule}".encode()).hexdigest()


def _alpha(content: bytes, name: str) -> Image.Image:
    """Return the upright alpha channel. Raises UserError for a picture without one."""
    decode(content, name)  # raises for what is no sound picture
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        image.load()
        correct_transparency(image, content)
        whole = upright(image)
        if not whole.has_transparency_data:
            raise UserError(
                f"{name}: no alpha channel, which mask='alpha' reads; save it with transparency, or"
                " take mask='file' with a mask picture beside it"
            )
        return whole.convert("RGBA").getchannel("A")
