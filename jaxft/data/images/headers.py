"""Sizes of pictures from the headers of their files, without decoding pixels."""

import struct
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps

from jaxft.data.images.buckets import Size
from jaxft.data.images.png import SIGNATURE, without_pixels
from jaxft.data.sources.images.records import FORMATS

ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")  # MPO and TIFF hold further pictures, no frames
MAX_PIXELS = 64_000_000  # of a picture: 192 MB as RGB, and below 1 GB while it is decoded
_RANGES = ("F", "I")  # float and 32-bit pixels, of which `decode` refuses some values


def header_size(content: bytes) -> Size | None:
    """Return (height, width) of the upright picture in a file that looks whole.

    Returns None if the picture has to be decoded for a verdict: a file that Pillow does not open,
    a file that seems to be cut or damaged, an animation, pixels without a known range or too many.
    """
    try:
        head = without_pixels(content) if content.startswith(SIGNATURE) else content
        with Image.open(BytesIO(head), formats=FORMATS) as image:
            animated = image.format in ANIMATED_FORMATS and getattr(image, "is_animated", False)
            doubtful = image.mode in _RANGES or image.width * image.height > MAX_PIXELS
            if animated or doubtful or not _is_whole(str(image.format), content):
                return None
            return _upright_size(image)
    except Exception:  # Pillow raises many kinds, and decoding names each
        return None


def _is_whole(kind: str, content: bytes) -> bool:
    """Return True if a file ends as its format does. `without_pixels` checks PNG files."""
    if kind in ("JPEG", "MPO"):
        return content.rstrip(b"\0").endswith(b"\xff\xd9")
    if kind == "GIF":
        return content.rstrip(b"\0").endswith(b";")
    if kind == "WEBP":
        return int.from_bytes(content[4:8], "little") + 8 <= len(content)
    return True


def _upright_size(image: Any) -> Size:
    """Return (height, width) of a picture, by a stand-in of two pixels with its orientation."""
    width, height = image.size
    stand_in: Any = Image.new("L", (1, 2))
    if image.format != "TIFF":  # its size is upright already
        stand_in.info = image.info
    turned = upright(stand_in).size == (2, 1)
    return (width, height) if turned else (height, width)


def upright(image: Image.Image) -> Image.Image:
    """Return the picture turned by the orientation in its EXIF or XMP."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, LookupError, struct.error):
        return image  # broken EXIF, which Pillow ignores in JPEG files, but not in PNG
