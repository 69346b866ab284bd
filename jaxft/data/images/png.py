"""Corrections to PNG files for Pillow: large texts before, transparent colours after reading."""

import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # Pillow refuses a file with more than 1 MiB in one
_ORIENTATION_KEYS = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # those that Pillow reads
_TEXT_LIMIT = 1 << 25  # bytes of an inflated text, below the 64 MiB that Pillow takes of all texts


def without_texts(content: bytes) -> bytes:
    """Return a PNG file without texts and colour profile, and another format unchanged.

    Texts that can hold an orientation stay, inflated. Neither texts nor profile change a pixel.
    """
    if not content.startswith(SIGNATURE):
        return content
    view, place = memoryview(content), len(SIGNATURE)
    kept: list[bytes | memoryview] = [SIGNATURE]
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(view[place : place + 4], "big")
        kind = bytes(view[place + 4 : place + 8])
        if end > len(content) or kind == b"IEND":
            break
        if kind in _TEXTS:
            kept.append(_orientation_text(kind, bytes(view[place + 8 : end - 4])))
        else:
            kept.append(view[place:end])
        place = end
    return b"".join((*kept, view[place:]))


def without_pixels(content: bytes) -> bytes:
    """Return the headers of a PNG file: all of its chunks but texts and pixels.

    Raises ValueError for a chunk that is cut or has a wrong checksum, and for a file without pixels
    or end.
    """
    content = without_texts(content)
    view, place, kind, pixels = memoryview(content), len(SIGNATURE), b"", 0
    kept: list[bytes | memoryview] = [SIGNATURE]
    while kind != b"IEND":
        end = place + 12 + int.from_bytes(view[place : place + 4], "big")
        kind = bytes(view[place + 4 : place + 8])
        found = int.from_bytes(view[end - 4 : end], "big")
        if end > len(content) or zlib.crc32(view[place + 4 : end - 4]) != found:
            raise ValueError(f"the PNG chunk at byte {place} is damaged")
        if kind == b"IDAT":
            pixels += end - place - 12
        else:
            kept.append(view[place:end])
        place = end
    if not pixels:
        raise ValueError("the PNG file has no pixels")
    return b"".join(kept)


def _orientation_text(kind: bytes, data: bytes) -> bytes:
    """Return a text chunk without compression if it can hold an orientation, or else b""."""
    key, _, rest = data.partition(b"\0")
    if kind == b"iCCP" or key not in _ORIENTATION_KEYS:
        return b""
    try:
        if kind == b"zTXt":
            kind, rest = b"tEXt", _inflated(rest[1:])
        elif kind == b"iTXt" and rest[:1] == b"\1":
            language, translated, text = rest[2:].split(b"\0", 2)
            rest = b"\0\0" + language + b"\0" + translated + b"\0" + _inflated(text)
    except (zlib.error, ValueError):
        return b""
    if len(rest) >= _TEXT_LIMIT:
        return b""
    data = key + b"\0" + rest
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def _inflated(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, _TEXT_LIMIT)


def correct_transparency(image: Image.Image, content: bytes) -> None:
    """Scale the transparent colour of a loaded PNG like its pixels, in place.

    Pillow keeps the colour (tRNS) in the bits of the file. For greys of 2 and 4 bits and colours of
    16 bits, it then matches other pixels, or none. Colours of 16 bits become an alpha channel.
    """
    colour: Any = image.info.get("transparency")
    if image.format != "PNG" or colour is None:
        return
    bits = content[24]  # after signature, IHDR's head, width and height
    if image.mode == "L":
        most = 2**bits - 1
        image.info["transparency"] = (colour & most) * 255 // most
    elif image.mode == "RGB" and bits == 8:
        image.info["transparency"] = tuple(value & 255 for value in colour)
    elif image.mode == "RGB":
        with Image.open(
            BytesIO(content), formats=("PNG",)
        ) as low:  # the same file, its lower bytes
            tiles: Any = [(*tile[:3], "RGB;16L") for tile in low.tile]
            low.tile = tiles
            values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
        opaque = (values != np.asarray(colour)).any(axis=-1)
        del image.info["transparency"]
        image.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
