"""Masks of a loss: areas of latents, fitted as their pictures, and one line for a bad one."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.images.dataset import ImageSet
from jaxft.data.images.masks import loss_mask
from jaxft.data.sources.schemes import open_images

GREY = np.random.default_rng(0).integers(0, 256, (16, 24), np.uint8)


def put(folder, name="one.png", mask=GREY, size=(16, 24)):
    """A picture, with its mask beside it."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(folder / name)
    (folder / name).with_suffix(".txt").write_text("a fish")
    if mask is not None:
        Image.fromarray(mask).save((folder / name).with_suffix(".mask.png"))
    return f"folder:{folder}"


def opened(spec, mask="file", resolution=16, **how):
    return ImageSet(open_images(spec, mask=mask), resolution, 4, how.pop("buckets", False), **how)


def areas(pixels, factor):
    h, w = pixels.shape
    cells = pixels.reshape(h // factor, factor, w // factor, factor) / 255
    return cells.mean(axis=(1, 3))[..., None]


def test_a_latent_has_the_mean_of_its_square_of_pixels(tmp_path):
    spec = put(tmp_path / "a", mask=GREY)
    images = opened(spec)
    assert len(images) == 1, "a mask is no picture of the set"
    made = loss_mask(images, 0, 4)
    assert made.shape == (4, 4, 1) and made.dtype == np.float32
    np.testing.assert_allclose(made, areas(GREY[:, 4:20], 4), atol=1e-6)  # cropped in the middle


def test_it_is_resized_mirrored_and_cropped_as_its_picture(tmp_path):
    """The mask is the picture's own red channel, so that both stay equal."""
    spec = put(tmp_path / "a")
    big = np.random.default_rng(1).integers(0, 256, (40, 60), np.uint8)
    Image.fromarray(np.stack([big] * 3, -1)).save(tmp_path / "a" / "one.png")
    Image.fromarray(big).save(tmp_path / "a" / "one.mask.png")
    for how in ({"flips": True}, {"buckets": True, "flips": True}, {"crops": 3, "flips": True}):
        images = opened(spec, **how)
        for index in range(len(images)):
            pixels = images[index].pixels[..., 0]
            wanted = areas(pixels.astype(np.float32), 2)
            np.testing.assert_allclose(loss_mask(images, index, 2), wanted, atol=1.5 / 255)


def test_a_list_may_name_masks_and_jpeg_pictures_have_png_masks(tmp_path):
    put(tmp_path / "a", "one.jpg")
    Image.fromarray(255 - GREY).save(tmp_path / "a" / "other.png")
    rows = [{"file_name": "one.jpg", "text": "a fish", "mask": "other.png"}]
    listed = tmp_path / "a" / "metadata.jsonl"
    listed.write_text(json.dumps(rows[0]) + "\n")
    named = loss_mask(opened(f"folder:{tmp_path / 'a'}"), 0, 4)
    np.testing.assert_allclose(named, areas(255 - GREY[:, 4:20], 4), atol=1e-6)
    listed.write_text(json.dumps({"file_name": "one.jpg", "text": "a fish"}) + "\n")
    beside = loss_mask(opened(f"folder:{tmp_path / 'a'}"), 0, 4)
    np.testing.assert_allclose(beside, areas(GREY[:, 4:20], 4), atol=1e-6)


def test_alpha_is_the_share_of_what_is_opaque(tmp_path):
    spec = put(tmp_path / "a", mask=None)
    pixels = np.dstack([np.full((16, 24, 3), 90, np.uint8), GREY])
    Image.fromarray(pixels).save(tmp_path / "a" / "one.png")
    images = opened(spec, "alpha")
    np.testing.assert_allclose(loss_mask(images, 0, 4), areas(GREY[:, 4:20], 4), atol=1e-6)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a" / "one.png", transparency=90)
    with pytest.raises(UserError, match=r"one\.png is transparent in all its 16x16 pixels"):
        loss_mask(opened(spec, "alpha"), 0, 4)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (None, r"one\.png has no mask: expected one\.mask\.png beside it, white where to learn"),
        (GREY[:8], r"has 24x16 pixels and its mask 24x8: expected one aspect ratio"),
        (np.zeros_like(GREY), r"one\.mask\.png is black in all its 16x16 pixels"),
    ],
)
def test_a_bad_mask_is_one_line(tmp_path, mask, words):
    spec = put(tmp_path / "a", mask=mask)
    with pytest.raises(UserError, match=words) as caught:
        loss_mask(opened(spec), 0, 4)
    assert "\n" not in str(caught.value)


def test_a_damaged_mask_and_a_picture_without_alpha_are_one_line(tmp_path):
    spec = put(tmp_path / "a")
    with pytest.raises(UserError, match=r"one\.png: no alpha channel, which mask='alpha' reads"):
        loss_mask(opened(spec, "alpha"), 0, 4)
    (tmp_path / "a" / "one.mask.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"one\.mask\.png: cannot decode the image"):
        opened(spec)
    with pytest.raises(UserError, match=r"'demo:emoji/train' has no mask pictures.*'alpha'"):
        open_images("demo:emoji/train", mask="file")
