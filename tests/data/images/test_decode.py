"""Decoding: upright and whole pictures in RGB, or one line that names the picture."""

import ast
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft.core.errors import UserError
from jaxft.data.images import decode as decoding
from jaxft.data.images.decode import decode
from jaxft.data.images.headers import header_size


def encoded(image, format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(h, w, channels=3, seed=0):
    shape = (h, w, channels) if channels > 1 else (h, w)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def pixels_of(content):
    return np.asarray(decode(content, "a.png"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_t31_d3_exif_orientation_is_applied(orientation, format):
    image = Image.fromarray(np.zeros((16, 32, 3), np.uint8))
    image.paste((255, 0, 0), (0, 0, 16, 8))  # the stored top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, format, exif=exif)
    pixels = pixels_of(content)
    assert pixels.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))
    red = pixels[..., 0] > 127
    corner = {
        1: (0, 0),
        2: (0, 1),
        3: (1, 1),
        4: (1, 0),
        5: (0, 0),
        6: (0, 1),
        7: (1, 1),
        8: (1, 0),
    }
    row, column = corner[orientation]
    h, w = red.shape
    assert red[
        row * h // 2 : row * h // 2 + h // 2, column * w // 2 : column * w // 2 + w // 2
    ].all()
    assert red.sum() == h * w // 4


def test_t31_d3_alpha_is_composited_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 255, 51)
    expected = [[255] * 3, [200, 0, 0], [244, 204, 204]]
    np.testing.assert_array_equal(pixels_of(encoded(Image.fromarray(rgba)))[0], expected)


def test_t31_d3_transparent_palettes_and_grey_with_alpha_are_white():
    palette = Image.fromarray(np.asarray([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    content = encoded(palette, transparency=0)
    np.testing.assert_array_equal(pixels_of(content)[0], [[255] * 3, [40, 50, 60]])
    grey = Image.fromarray(np.asarray([[[7, 0], [7, 255]]], np.uint8), "LA")
    np.testing.assert_array_equal(pixels_of(encoded(grey))[0], [[255] * 3, [7] * 3])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_t31_d3_sixteen_bits_are_scaled_not_clipped(format):
    values = np.asarray([[0, 257, 32768, 65535]], np.uint16)
    pixels = pixels_of(encoded(Image.fromarray(values), format))
    np.testing.assert_array_equal(pixels[0], np.asarray([0, 1, 128, 255])[:, None].repeat(3, 1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_t31_d3_other_modes_become_rgb(mode):
    image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    format = "JPEG" if mode == "YCbCr" else "TIFF" if mode == "CMYK" else "PNG"
    pixels = pixels_of(encoded(image, format))
    assert pixels.shape == (8, 8, 3) and (pixels > 250).all()


def test_t31_cmyk_jpeg_keeps_its_colour():
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    red = pixels_of(content)[4, 4]
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


def test_cmyk_is_light_less_ink():
    ink = noise(8, 8, 4).astype(int)
    content = encoded(Image.fromarray(ink.astype(np.uint8), "CMYK"), "TIFF")
    light = 255 - ink[..., 3:]
    expected = light - ink[..., :3] * light / 255
    assert np.abs(pixels_of(content) - expected).max() <= 1


GIF = [Image.fromarray(noise(4, 4, seed=i)) for i in range(2)]
WHOLE = encoded(Image.fromarray(noise(64, 64)))
BAD = {
    "empty": (b"", "empty"),
    "html": (b"<html><body>404</body></html>", "starts with b'<html"),
    "truncated png": (WHOLE[: len(WHOLE) // 2], "cannot decode"),
    "truncated jpeg": (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:1500], "truncated"),
    "flipped byte": (WHOLE[:200] + b"\x00" * 64 + WHOLE[264:], "cannot decode"),
    "gif": (encoded(GIF[0], "GIF", save_all=True, append_images=GIF[1:]), "animated"),
    "apng": (encoded(GIF[0], "PNG", save_all=True, append_images=GIF[1:]), "animated"),
    "webp": (encoded(GIF[0], "WEBP", save_all=True, append_images=GIF[1:]), "animated"),
    "float": (encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "float pixels"),
    "32 bits": (encoded(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"), "32-bit"),
}


@pytest.mark.parametrize("content, words", BAD.values(), ids=BAD)
def test_t31_bad_images_are_one_line_naming_the_image(content, words):
    with pytest.raises(UserError, match=words) as caught:
        decode(content, "folder/cat.png")
    assert str(caught.value).startswith("folder/cat.png: ") and "\n" not in str(caught.value)


def test_t31_d3_two_pictures_in_one_file_give_the_first():
    pictures = [Image.fromarray(noise(16, 16, seed=i)) for i in range(2)]  # as phones write
    content = encoded(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    np.testing.assert_array_equal(pixels_of(content), pixels_of(encoded(pictures[0], "JPEG")))


def test_t31_sixteen_bit_colours_with_alpha_are_scaled():
    row = b"\0" + struct.pack(">8H", 0, 32768, 65535, 65535, 9, 9, 9, 0)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 6, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    np.testing.assert_array_equal(pixels_of(content)[0], [[0, 128, 255], [255] * 3])


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    content = bytearray(encoded(Image.new("1", (20000, 10))))
    content[16:24] = (20000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match=r"^bomb\.png: the image is too large"):
        decode(bytes(content), "bomb.png")


@pytest.mark.parametrize(
    "content, name",
    [
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b'<svg xmlns="http://www.w3.org/2000/svg">', "SVG"),
    ],
)
def test_case_img_11_formats_are_named_by_their_content(content, name):
    with pytest.raises(UserError, match=rf"^a\.jpg: {name} pictures are not read: convert it"):
        decode(content, "a.jpg")


def saved(kind):
    stream = BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["EPS", "PCX", "SGI", "ICO", "IM", "DDS"])
def test_d4_fault_9_the_contents_of_a_file_open_no_rare_format(kind, monkeypatch):
    """EPS bytes under a name of another format would start Ghostscript."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program started"))
    content = saved(kind)
    assert header_size(content) is None
    with pytest.raises(UserError, match=r"a\.png: .*(EPS pictures are not read|cannot decode)"):
        decode(content, "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA"])
def test_d4_fault_9_the_usual_formats_open_under_any_name(kind):
    assert decode(saved(kind), "a.dat").size == (4, 4)


def test_d4_fault_9_every_call_names_the_formats():
    for path in Path(jaxft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert "formats" in {keyword.arg for keyword in node.keywords}, path


BOMB = """
import resource, sys, warnings
from io import BytesIO
from PIL import Image
from jaxft.core.errors import UserError
from jaxft.data.images.decode import decode
from jaxft.data.images.headers import header_size
warnings.simplefilter("ignore")
content = open(sys.argv[1], "rb").read()
assert header_size(content) is None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(content, "bomb.png")
except UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_item_9_d2_a_bomb_is_refused_before_its_pixels_are_decoded(tmp_path):
    """A PNG of 17 kB with 144 million pixels, which needs 1 GB if it is decoded as RGB."""
    file = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(file, optimize=True)
    assert file.stat().st_size < 25_000
    end = subprocess.run([sys.executable, "-c", BOMB, file], capture_output=True, text=True)
    refusal, grown = end.stdout.splitlines()
    assert refusal == (
        "bomb.png: the image is too large: 12000 x 12000 pixels are more than 64 million: resize it"
    ), end.stderr
    assert int(grown) < 20, "MB"


def test_item_9_the_largest_picture_is_read(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 12)
    made = {}
    for width in (4, 5):
        file = BytesIO()
        Image.new("RGB", (width, 3)).save(file, "PNG")
        made[width] = file.getvalue()
    assert decode(made[4], "a.png").size == (4, 3)
    with pytest.raises(UserError, match="5 x 3 pixels"):
        decode(made[5], "a.png")
