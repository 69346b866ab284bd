"""PNG files beyond Pillow's own reading: large texts, and transparent colours of any bit depth."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from jaxft.core.errors import UserError
from jaxft.data.images.decode import decode
from jaxft.data.images.png import without_texts

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make(size, bits, colour_type, rows, before=(), after=()):
    """A PNG of raw rows with chunks before and after its pixels."""
    header = struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    parts = [chunk(b"IHDR", header), *before, chunk(b"IDAT", pixels), *after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_chunks(*before, after=()):
    return make((4, 4), 8, 2, PIXELS.reshape(4, 12), before, after)


BIG = b"x" * 1_100_000
LARGE = {
    "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(BIG)),
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(BIG)),
    "iCCP": chunk(b"iCCP", b"icc\0\0" + zlib.compress(BIG)),
    "tEXt": chunk(b"tEXt", b"parameters\0" + BIG),
    "bomb": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(BIG)),
    "XMP bomb": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(80_000_000))),
    "torn": chunk(b"zTXt", b"a\0\0torn"),
    "torn XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0torn"),
    "short XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1"),
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_case_img_07_large_texts_do_not_make_a_picture_bad(text, where):
    content = with_chunks(text) if where == "before" else with_chunks(after=[text])
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    assert (np.asarray(decode(content, "a.png")) == PIXELS).all()
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_case_img_07_many_texts_are_read_past():
    texts = [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 70
    assert (np.asarray(decode(with_chunks(*texts), "a.png")) == PIXELS).all()


def test_other_files_and_torn_ones_are_returned_as_they_are():
    whole = with_chunks()
    jpeg = io.BytesIO()
    Image.fromarray(PIXELS).save(jpeg, "JPEG")
    for content in (b"", b"x", jpeg.getvalue(), whole, whole[:-20], whole + b"more", whole[:40]):
        assert without_texts(content) == content


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def test_an_orientation_in_a_large_text_counts():
    long = b"<a>" + BIG + b"</a>" + XMP
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(long))
    upright = np.rot90(PIXELS, -1)
    for content in (with_chunks(text), with_chunks(after=[text])):
        assert (np.asarray(decode(content, "a.png")) == upright).all()


def exif(orientation, profile=False):
    found = Image.Exif()
    found[0x0112] = orientation
    body = found.tobytes()
    if not profile:
        return body[6:]
    return b"\nexif\n%8d\n" % len(body) + body.hex().encode() + b"\n"


def orientations(n):
    name, profile = b"Raw profile type exif\0", exif(n, True)
    xmp = XMP.replace(b"6", b"%d" % n)
    tag = b"<tiff:Orientation>%d</tiff:Orientation>" % n
    return {
        "eXIf": chunk(b"eXIf", exif(n)),
        "raw profile tEXt": chunk(b"tEXt", name + profile),
        "raw profile zTXt": chunk(b"zTXt", name + b"\0" + zlib.compress(profile)),
        "raw profile iTXt": chunk(b"iTXt", name + b"\0\0\0\0" + profile),
        "raw profile packed iTXt": chunk(b"iTXt", name + b"\1\0\0\0" + zlib.compress(profile)),
        "APP1 zTXt": chunk(b"zTXt", b"Raw profile type APP1\0\0" + zlib.compress(profile)),
        "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        "XMP packed": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(xmp)),
        "XMP element": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + tag),
        "XMP tEXt": chunk(b"tEXt", b"XML:com.adobe.xmp\0" + xmp),
        "eXIf over XMP": chunk(b"eXIf", exif(1))
        + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
@pytest.mark.parametrize("kind", orientations(6))
@pytest.mark.parametrize("where", ["before", "after"])
def test_case_img_02_orientation_is_that_of_pillow_wherever_it_stands(kind, where, orientation):
    block = orientations(orientation)[kind]
    content = with_chunks(block) if where == "before" else with_chunks(after=[block])
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert (np.asarray(decode(content, "a.png")) == expected).all()


def rgb(alpha, colour):
    """Numpy's alpha over white, rounded as 8-bit compositing does."""
    return np.round(colour * alpha[..., None] + 255 * (1 - alpha[..., None])).astype(np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("turned", [False, True])
def test_transparent_greys_of_every_depth_become_white(bits, turned):
    most = 2**bits - 1
    values = np.random.default_rng(bits).integers(0, most + 1, (4, 16))
    values[0, :2] = most, 0
    if bits == 16:
        values[1, 0] = values[1, 1] + 1  # the same grey in 8 bits
        rows = values.astype(">u2").view(np.uint8)
    else:
        digits = (values[..., None] >> np.arange(bits)[::-1] & 1).reshape(4, -1)
        rows = np.packbits(digits.astype(np.uint8), axis=1)
    for key in {0, most, int(values[1, 1])}:
        after = [chunk(b"eXIf", exif(6))] if turned else []
        content = make((16, 4), bits, 0, rows, [chunk(b"tRNS", struct.pack(">H", key))], after)
        grey = (values + 128) // 257 if bits == 16 else values * 255 // most
        expected = np.where(values == key, 255, grey)[..., None].repeat(3, axis=2)
        expected = np.rot90(expected, -1) if turned else expected
        np.testing.assert_array_equal(np.asarray(decode(content, "a.png")), expected)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("turned", [False, True])
def test_a_transparent_colour_becomes_white_in_its_own_bits(bits, turned):
    values = np.random.default_rng(bits).integers(0, 2**bits, (4, 5, 3))
    values[1, 1] = values[0, 0] + (0, 0, 1 if values[0, 0, 2] % 256 < 255 else -1)
    rows = values.astype(f">u{bits // 8}").reshape(4, -1).view(np.uint8)
    key = chunk(b"tRNS", struct.pack(">3H", *values[0, 0]))
    after = [chunk(b"eXIf", exif(6))] if turned else []
    pixels = np.asarray(decode(make((5, 4), bits, 2, rows, [key], after), "a.png"))
    expected = values >> (bits - 8)
    expected[0, 0] = 255
    np.testing.assert_array_equal(pixels, np.rot90(expected, -1) if turned else expected)


@pytest.mark.parametrize("bits, colour_type", [(8, 4), (16, 4), (8, 6), (16, 6)])
def test_alpha_of_greys_and_colours_is_over_white(bits, colour_type):
    channels = {4: 2, 6: 4}[colour_type]
    values = np.random.default_rng(bits).integers(0, 2**bits, (4, 5, channels))
    values[0, 0, -1], values[0, 1, -1] = 0, 2**bits - 1
    rows = values.astype(f">u{bits // 8}").reshape(4, -1).view(np.uint8)
    pixels = np.asarray(decode(make((5, 4), bits, colour_type, rows), "a.png")).astype(int)
    high = values >> (bits - 8)
    colour = high[..., :-1].repeat(3 if channels == 2 else 1, axis=2)
    assert np.abs(pixels - rgb(high[..., -1] / 255, colour)).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_with_transparency_bytes_are_over_white(bits):
    size = 2**bits
    palette = np.random.default_rng(bits).integers(0, 256, (size, 3))
    alpha = np.full(size, 255)
    alpha[: size // 2] = np.linspace(0, 255, size // 2, dtype=int) if size > 2 else 0
    values = np.arange(16).reshape(2, 8) % size
    digits = (values[..., None] >> np.arange(bits)[::-1] & 1).reshape(2, -1)
    before = [
        chunk(b"PLTE", palette.astype(np.uint8).tobytes()),
        chunk(b"tRNS", alpha[: size // 2].astype(np.uint8).tobytes()),
    ]
    content = make((8, 2), bits, 3, np.packbits(digits.astype(np.uint8), axis=1), before)
    expected = rgb(alpha[values] / 255, palette[values]).astype(int)
    assert np.abs(np.asarray(decode(content, "a.png")).astype(int) - expected).max() <= 1


def test_palette_with_alpha_is_over_white():
    image = Image.new("PA", (2, 1))
    image.putpalette([10, 20, 30])
    image.putalpha(Image.fromarray(np.asarray([[0, 255]], np.uint8)))
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    assert np.asarray(decode(buffer.getvalue(), "a"))[0].tolist() == [[255] * 3, [10, 20, 30]]


@pytest.mark.parametrize(
    "block",
    [
        chunk(b"eXIf", b"garbage, not a TIFF header"),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 10\nzz\n"),
        chunk(b"eXIf", b""),
    ],
)
def test_a_picture_with_broken_exif_is_taken_as_it_lies(block):
    for content in (with_chunks(block), with_chunks(after=[block])):
        assert (np.asarray(decode(content, "a.png")) == PIXELS).all()


def test_a_damaged_picture_with_texts_stays_bad():
    content = bytearray(with_chunks(LARGE["tEXt"]))
    content[-30] ^= 255
    with pytest.raises(UserError, match=r"a\.png: cannot decode"):
        decode(bytes(content), "a.png")
