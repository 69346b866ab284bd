"""Images: decoded upright and whole, resized without aliasing, keyed by all that counts."""

import json
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxft.core.errors import UserError
from jaxft.data.images.dataset import (
    ImageSet,
    collate,
    drop_bad,
    fit,
    time_ids,
)
from jaxft.data.images.decode import decode
from jaxft.data.sources.schemes import open_images
from jaxft.nn.pixels import to_float
from tests.data.images.test_decode import encoded, noise


def test_t31_downscaling_is_antialiased():
    stripes = Image.fromarray(np.tile(np.asarray([[0], [255]], np.uint8), (64, 128)).T[:128])
    small = fit(stripes.convert("RGB"), (16, 16)).pixels
    inner = small[:, 2:-2].astype(int)
    assert abs(inner - 127).max() <= 2  # sampling without a filter gives 0 or 255


def test_fitting_a_crop_equals_resizing_all_and_cropping():
    image = Image.fromarray(noise(45, 133))
    fitted = fit(image, (24, 32))
    whole = np.asarray(image.resize((71, 24), Image.Resampling.LANCZOS))
    assert fitted.crop == (0, 19) and fitted.original == (45, 133) and fitted.target == (24, 32)
    assert np.abs(fitted.pixels.astype(int) - whole[:, 19 : 19 + 32]).max() <= 1


@pytest.mark.parametrize("h, w", [(64, 64), (1, 1), (3, 1000), (1000, 3), (65, 64), (17, 31)])
def test_every_picture_fills_its_target(h, w):
    fitted = fit(Image.new("RGB", (w, h), (9, 8, 7)), (16, 24))
    assert fitted.pixels.shape == (16, 24, 3) and fitted.pixels.dtype == np.uint8
    assert (fitted.pixels == (9, 8, 7)).all() and min(fitted.crop) >= 0


def test_a_picture_of_the_target_size_is_unchanged():
    image = noise(16, 24)
    np.testing.assert_array_equal(fit(Image.fromarray(image), (16, 24)).pixels, image)


def test_t28_time_ids_are_original_crop_target_and_the_flip_comes_before_the_crop():
    image = Image.fromarray(noise(16, 27))
    plain, mirrored = fit(image, (16, 16)), fit(image, (16, 16), flip=True)
    np.testing.assert_array_equal(time_ids(plain), [16, 27, 0, 5, 16, 16])
    assert time_ids(mirrored).tolist() == time_ids(plain).tolist()
    assert time_ids(plain).dtype == np.float32
    stored = np.asarray(image)
    np.testing.assert_array_equal(plain.pixels, stored[:, 5:21])
    np.testing.assert_array_equal(mirrored.pixels, stored[:, ::-1][:, 5:21])


def test_to_float_spans_minus_one_to_one():
    values = to_float(np.asarray([[[0, 255, 127]]], np.uint8))
    assert values.dtype == np.float32 and values.ravel()[:2].tolist() == [-1, 1]


@pytest.fixture
def folder(tmp_path):
    rows = []
    for i, (h, w) in enumerate([(64, 64), (40, 80), (80, 40), (30, 30), (64, 65)]):
        Image.fromarray(noise(h, w, seed=i)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path


def image_set(folder, *, buckets=True, resolution=64, flips=False):
    return ImageSet(open_images(f"folder:{folder}"), resolution, 8, buckets, flips)


def test_examples_have_their_buckets_size(folder):
    images = image_set(folder)
    assert set(images.sizes) == {(64, 64), (48, 80), (80, 48)}
    assert [images.sizes[b] for b in images.bucket_of] == [
        (64, 64), (48, 80), (80, 48), (64, 64), (64, 64)
    ]  # fmt: skip
    for i, bucket in enumerate(images.bucket_of):
        assert images[i].pixels.shape[:2] == images.sizes[bucket]
        assert images[i].caption == images.caption(i) == f"picture {i}"
        assert images[i].time_ids[4:].tolist() == list(images.sizes[bucket])
    assert images.report == {
        "images": 5, "bad": 0, "cropped": 3, "smaller_than_target": 3,
        "bucket_48x80": 1, "bucket_64x64": 3, "bucket_80x48": 1,
    }  # fmt: skip


def test_without_buckets_all_are_squares(folder):
    images = image_set(folder, buckets=False)
    assert images.sizes == ((64, 64),) and images.bucket_of.tolist() == [0] * 5
    assert {images[i].pixels.shape for i in range(5)} == {(64, 64, 3)}
    assert images.report == {
        "images": 5, "bad": 0, "cropped": 3, "smaller_than_target": 3, "bucket_64x64": 5
    }  # fmt: skip


def test_flips_are_the_second_half(folder):
    plain, flipped = image_set(folder), image_set(folder, flips=True)
    assert len(plain) == 5 and len(flipped) == 10
    assert flipped.bucket_of.tolist() == plain.bucket_of.tolist() * 2
    np.testing.assert_array_equal(flipped[0].pixels[:, ::-1], flipped[5].pixels)
    assert flipped.caption(7) == flipped[7].caption == "picture 2"
    assert [flipped[i].key for i in range(5)] == [plain[i].key for i in range(5)]
    assert flipped.report == plain.report


def test_crops_are_corners_of_a_slightly_larger_centre(folder):
    """LlamaGen's: 1.1 times the size, then each corner; a mirrored half holds all of them again."""
    images = ImageSet(open_images(f"folder:{folder}"), 40, 8, False, True, 5)
    assert len(images) == 50 and images.report["images"] == 5
    assert len({images.key(i) for i in range(50)}) == 50
    plain = ImageSet(open_images(f"folder:{folder}"), 40, 8, False)
    assert [images.key(i) for i in range(5)] == [plain.key(i) for i in range(5)]
    for i in range(5):
        for first in (0, 25):  # the second half is mirrored before the crop
            larger = fit(decode(images.records[i].content, "x"), (44, 44), first > 0).pixels
            corners = larger[:40, :40], larger[:40, 4:], larger[4:, :40], larger[4:, 4:]
            for k, corner in enumerate(corners, 1):
                found = images[first + 5 * k + i].pixels.astype(int)
                assert np.abs(found - corner).max() <= 1, (i, k)
        assert images[5 + i].caption == images[i].caption
    assert images[5].key == images.key(5)


def test_the_key_changes_with_all_that_determines_the_pixels(folder):
    images = image_set(folder, flips=True)
    keys = [images.key(i) for i in range(10)]
    assert len(set(keys)) == 10 and keys == [images[i].key for i in range(10)]
    assert image_set(folder, resolution=32).key(0) != keys[0]
    assert image_set(folder, buckets=False).key(1) != keys[1]
    assert image_set(folder, buckets=False).key(0) == keys[0]  # the same pixels
    content = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(content + b"\0")
    assert image_set(folder, flips=True).key(0) != keys[0]
    (folder / "copy.png").write_bytes(content)
    lines = '{"file_name": "copy.png", "text": "another caption"}'
    (folder / "metadata.jsonl").write_text(lines)
    assert image_set(folder, buckets=False).key(0) == keys[0]  # one entry for equal pictures


def test_collate_pads_with_weight_zero(folder):
    images = image_set(folder, buckets=False)
    batch = collate([images[0], images[1]], batch_rows=3)
    assert batch["pixels"].shape == (3, 64, 64, 3) and batch["pixels"].dtype == np.uint8
    assert batch["weights"].tolist() == [1, 1, 0] and batch["time_ids"].shape == (3, 6)
    np.testing.assert_array_equal(batch["pixels"][1], images[1].pixels)
    empty = collate([], batch_rows=2, size=images.sizes[0])
    assert empty["pixels"].shape == (2, 64, 64, 3) and not empty["weights"].any()
    with pytest.raises(ValueError, match="pass size"):
        collate([], batch_rows=2)
    with pytest.raises(ValueError, match="broadcast"):
        collate([images[0], image_set(folder)[1]], batch_rows=2)


def test_opening_a_set_decodes_nothing_and_copies_share_a_decode(folder, monkeypatch):
    decoded = []

    def counted(content, name):
        decoded.append(name)
        return decode(content, name)

    monkeypatch.setattr("jaxft.data.images.dataset.decode", counted)
    images = image_set(folder, flips=True)
    assert images.report["images"] == 5 and len(images.keys) == 10 and not decoded
    plain, mirrored, other = images.attempts([0, 5, 1])
    assert len(decoded) == 2 and other.caption == "picture 1"
    np.testing.assert_array_equal(plain.pixels, images[0].pixels)
    np.testing.assert_array_equal(mirrored.pixels, images[5].pixels)


def spoilt(content):
    """A PNG file whose pixels do not inflate, though every checksum is right."""
    start = content.index(b"IDAT") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    body = bytearray(content[start + 4 : end - 4])
    body[20:60] = bytes(40)
    return content[: start + 4] + body + zlib.crc32(body).to_bytes(4, "big") + content[end:]


@pytest.fixture
def many(tmp_path):
    """Two hundred pictures in two buckets, of which number 7 fails to decode."""
    rows = []
    for i in range(200):
        size = (16, 32) if i % 2 else (32, 16)
        Image.fromarray(noise(*size, seed=i)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    spoil(tmp_path, 7)
    return tmp_path


def spoil(folder, number):
    (folder / f"{number}.png").write_bytes(spoilt((folder / f"{number}.png").read_bytes()))


def test_a_picture_that_fails_later_is_replaced_by_the_next_of_its_bucket(many, capfd):
    images = image_set(many, resolution=32, flips=True)
    assert len(images) == 400 and not images.bad and images.report["images"] == 200
    assert images.caption(7) == "picture 7"
    for index, other in ((7, 9), (207, 209)):
        np.testing.assert_array_equal(images[index].pixels, images[other].pixels)
        assert images[index].caption == images.caption(index) == "picture 9"
    assert len(images) == 400 and images.report["images"] == 199 and images.report["bad"] == 1
    assert sum(n for name, n in images.report.items() if name.startswith("bucket_")) == 199
    [bad] = images.bad
    assert bad.name == str(many / "7.png") and "7.png: cannot decode" in bad.error
    assert capfd.readouterr().out.count("replaced 1 bad images") == 1


def test_pictures_that_fail_later_count_towards_the_limit(many):
    spoil(many, 20), spoil(many, 199)
    images = image_set(many, resolution=32)
    assert images[199].caption == "picture 1", "round and round"
    assert images[20].caption == "picture 22"
    with pytest.raises(UserError, match=r"3 of 200 images of .* more than 1%.*20\.png: cannot"):
        images[7]


def test_a_size_behind_a_long_header_is_found(folder):
    picture = Image.fromarray(noise(40, 80))
    content = encoded(picture, "JPEG", icc_profile=bytes(200_000))
    (folder / "0.png").write_bytes(content)
    assert image_set(folder).originals[0].tolist() == [40, 80]


def test_bad_pictures_are_left_out_and_named(folder):
    whole = open_images(f"folder:{folder}")
    assert drop_bad(whole) == (whole, ())
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-100])
    kept, (bad,) = drop_bad(whole, limit=0.2)
    assert [kept.caption(i) for i in range(4)] == [f"picture {i}" for i in (0, 2, 3, 4)]
    assert [kept[i] for i in range(4)] == [whole[i] for i in (0, 2, 3, 4)]
    assert bad.name == str(folder / "1.png") and "cannot decode" in bad.error
    images = ImageSet(kept, 64, 8, True)
    assert len(images) == 4 and images[1].pixels.shape == (80, 48, 3)
    with pytest.raises(UserError, match=r"1 of 5 images of .* more than 1%.*1\.png: cannot decode"):
        ImageSet(whole, 64, 8, True)


def oriented(format, kind, orientation):
    """A picture of 40 x 80 whose orientation stands in EXIF, in XMP, or behind its pixels."""
    image = Image.fromarray(noise(40, 80))
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = b'<x:xmpmeta tiff:Orientation="%d"></x:xmpmeta>' % orientation
    if kind == "exif":
        return encoded(image, format, exif=exif)
    if kind == "xmp":
        return encoded(image, format, xmp=xmp)
    body = exif.tobytes()
    if format == "JPEG":  # the segment behind a large profile
        plain = encoded(image, format, icc_profile=bytes(200_000))
        at = plain.index(b"\xff\xdb")
        return plain[:at] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + plain[at:]
    plain, body = encoded(image, "PNG"), body[6:]
    chunk = len(body).to_bytes(4, "big") + b"eXIf" + body
    end = plain.index(b"IEND") - 4
    return plain[:end] + chunk + zlib.crc32(chunk[4:]).to_bytes(4, "big") + plain[end:]


CASES = [(f, k) for f in ("JPEG", "WEBP", "TIFF", "AVIF", "PNG", "MPO") for k in ("exif", "xmp")]
CASES = [case for case in CASES if case not in [("PNG", "xmp"), ("TIFF", "xmp"), ("MPO", "xmp")]]


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize("format, kind", [*CASES, ("PNG", "behind"), ("JPEG", "behind")])
def test_case_img_02_bucket_time_ids_and_pixels_agree(tmp_path, format, kind, orientation):
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    content = oriented(format, kind, orientation)
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "a.txt").write_text("x")
    with Image.open(BytesIO(content)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert upright.size == ((80, 40) if orientation < 5 else (40, 80))
    images = ImageSet(open_images(f"folder:{tmp_path}"), 64, 8, True)
    size = (48, 80) if orientation < 5 else (80, 48)
    assert images.sizes == (size,) and images.originals.tolist() == [[*upright.size[::-1]]]
    assert images[0].time_ids[[0, 1, 4, 5]].tolist() == [*upright.size[::-1], *size]
    np.testing.assert_array_equal(images[0].pixels, fit(upright, size).pixels)


def test_all_bad_pictures_are_named_in_one_round(folder, monkeypatch, tmp_path):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for i in (0, 3):
        (folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        image_set(folder)
    assert str(caught.value).startswith("2 of 5 images") and "\n" not in str(caught.value)
    assert "0.png: the image file is empty" in str(caught.value) and "3.png: the" in str(
        caught.value
    )
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines + lines[:1] * 500))
    with pytest.raises(UserError) as caught:
        image_set(folder)
    message = str(caught.value)
    assert message.startswith("502 of 505 images") and len(message) < 800
    listed = message.rpartition("listed in ")[2].partition(", one a line")[0]
    with open(listed) as file:
        names = {json.loads(line)["name"] for line in file}
    assert names == {str(folder / "0.png"), str(folder / "3.png")}
