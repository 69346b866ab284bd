"""Headers: the size that decoding finds, and doubt wherever a file may be damaged."""

import numpy as np
import pytest
from PIL import Image

from jaxft.data.images.decode import decode
from jaxft.data.images.headers import header_size
from tests.data.images.test_dataset import CASES, oriented, spoilt
from tests.data.images.test_decode import BAD, WHOLE, encoded, noise

PICTURE = Image.fromarray(noise(40, 80))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format, kind", [*CASES, ("PNG", "behind"), ("JPEG", "behind")])
def test_the_size_is_that_of_the_upright_picture(format, kind, orientation):
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    content = oriented(format, kind, orientation)
    assert header_size(content) == decode(content, "a").size[::-1]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.97])
def test_a_cut_file_is_in_doubt(format, kept):
    content = encoded(PICTURE, format)
    assert header_size(content) == (40, 80)
    assert header_size(content[: int(len(content) * kept)]) is None


@pytest.mark.parametrize("content", [one for one, _ in BAD.values()], ids=BAD)
def test_bad_files_are_in_doubt(content):
    assert header_size(content) is None


def test_bytes_behind_a_whole_picture_do_no_harm():
    for format in ("PNG", "WEBP"):
        assert header_size(encoded(PICTURE, format) + b"trailing") == (40, 80)
    assert header_size(encoded(PICTURE, "JPEG") + bytes(9)) == (40, 80)


def test_only_decoding_finds_bad_pixels_behind_right_checksums():
    assert header_size(WHOLE) == header_size(spoilt(WHOLE)) == (64, 64)


def test_deep_greys_have_a_size_and_32_bits_are_in_doubt():
    deep = Image.fromarray(np.full((4, 6), 9, np.uint16))
    assert header_size(encoded(deep, "TIFF")) == (4, 6)
    assert header_size(encoded(Image.fromarray(np.full((4, 6), 9, np.int32)), "TIFF")) is None
