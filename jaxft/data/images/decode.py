"""Decoding of an image file's bytes to an upright RGB picture."""

from io import BytesIO

import numpy as np
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.images.headers import ANIMATED_FORMATS, MAX_PIXELS, upright
from jaxft.data.images.png import correct_transparency, without_texts
from jaxft.data.sources.images.records import FORMATS

# First bytes of formats that Pillow does not open: (place, bytes, name).
_FOREIGN_FORMATS = (
    (4, b"ftyphei", "HEIC"), (4, b"ftyphev", "HEIC"), (4, b"ftypmif1", "HEIC"),
    (4, b"ftypmsf1", "HEIC"), (0, b"\xff\x0a", "JPEG XL"), (4, b"JXL ", "JPEG XL"),
    (0, b"<svg", "SVG"), (0, b"<?xml", "SVG"), (0, b"%!PS", "EPS"), (0, b"\xc5\xd0\xd3\xc6", "EPS"),
)  # fmt: skip


def decode(content: bytes, name: str) -> Image.Image:
    """Return the upright RGB picture, with alpha over white, and 8 bits a channel.

    Greys of 16 bits are rounded to 8. Colours of 16 bits keep the higher byte. Pillow's
    `exif_transpose` turns the loaded picture upright, by EXIF or XMP anywhere in the file.
    Raises UserError that names a picture which is corrupt, truncated, animated, no image or
    larger than MAX_PIXELS. Pixels of a larger one are never decoded.
    """
    try:
        content = without_texts(content)
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            if image.format in ANIMATED_FORMATS and getattr(image, "is_animated", False):
                raise UserError(f"{name}: the image is animated: expected a still picture")
            if image.width * image.height > MAX_PIXELS:  # a file of 17 kB can hold 144 million
                raise UserError(
                    f"{name}: the image is too large: {image.width} x {image.height} pixels are"
                    f" more than {MAX_PIXELS // 10**6} million: resize it"
                )
            image.load()
            correct_transparency(image, content)
            return _to_rgb(upright(image), name)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds, and each becomes one line
        raise _unreadable(content, name, error) from error


def _unreadable(content: bytes, name: str, error: Exception) -> UserError:
    if not content:
        return UserError(f"{name}: the image file is empty (0 bytes)")
    if isinstance(error, Image.DecompressionBombError):
        return UserError(f"{name}: the image is too large: {error}")
    for place, start, known in _FOREIGN_FORMATS:
        if content[place:].startswith(start):
            return UserError(f"{name}: {known} pictures are not read: convert it to PNG or JPEG")
    reason = next(iter(str(error).replace("<_io.BytesIO object", "<").splitlines()), "")
    if isinstance(error, Image.UnidentifiedImageError):
        reason = f"starts with {content[:12]!r}"
    return UserError(
        f"{name}: cannot decode the image ({type(error).__name__}: {reason}): "
        "expected a whole PNG, JPEG, WebP or other image file"
    )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{name}: float pixels have no known range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{name}: 32-bit pixels have no known range: save it with 16 bits")
        opaque = values != image.info.get("transparency", -1)
        grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        image = Image.merge("LA", (grey, Image.fromarray(opaque.astype(np.uint8) * 255)))
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")
