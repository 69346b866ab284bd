"""Cached codes: the tokenizer's own, found again, refused when they are another's."""

import numpy as np
import pytest
import torch
from diffusers import VQModel
from tiny_autoencoders import make_vqmodel
from tiny_image_tokens import CODES, GRID, SIZE, make_pictures
from transformers import AutoTokenizer

from jaxft.core.errors import UserError
from jaxft.data.cache import ArrayCache
from jaxft.data.image_sources import open_images
from jaxft.data.images import ImageSet
from jaxft.tasks import image_codes
from jaxft.tasks.image_codes import CodeRows, ImageTokenizer, open_tokenizer
from jaxft.tasks.image_layout import extended

COUNT = 10


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("codes")


@pytest.fixture(scope="module")
def vq(work):
    return open_tokenizer(str(make_vqmodel(work / "vq", CODES)))


@pytest.fixture(scope="module")
def make_rows(work, tokenizer_folder):
    make_pictures(work / "pictures", COUNT)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    layout = extended(320, CODES, (GRID, GRID), "")

    def make(flips=False):
        images = ImageSet(open_images(f"folder:{work / 'pictures'}"), SIZE, 2, False, flips)
        return CodeRows(images, layout, tokenizer)

    return make


@pytest.fixture(scope="module")
def rows(work, make_rows, vq):
    made = make_rows(flips=True)
    made.cache(ArrayCache(work / "cache", vq.fingerprint), vq)
    return made


def test_codes_are_those_of_diffusers_and_a_mirror_has_its_own(rows, work):
    """The encoder does not commute with mirroring, so that the mirrored picture is encoded."""
    model = VQModel.from_pretrained(work / "vq").eval()
    for i in (0, 3, COUNT, COUNT + 3):
        pixels = rows.images[i].pixels
        x = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = model.quantize(model.encode(x).latents)[2][2].reshape(GRID, GRID)
        np.testing.assert_array_equal(rows.stored(i)["codes"], expected.numpy())
        assert rows.stored(i)["codes"].dtype == np.uint16
    mirrored = [rows.stored(i)["codes"][:, ::-1] for i in range(COUNT)]
    assert any((rows.stored(COUNT + i)["codes"] != mirrored[i]).any() for i in range(COUNT))


def test_a_row_holds_the_caption_and_the_codes_in_raster_order(rows):
    row = rows[4]
    assert row["codes"].tolist() == rows.stored(4)["codes"].ravel().tolist()
    said = rows.tokenizer.decode(row["prompt"][: row["length"]])
    assert said == rows.caption(4) and (row["prompt"][row["length"] :] == 323).all()


def test_what_is_cached_is_not_encoded_again_and_another_tokenizer_sees_nothing(
    rows, make_rows, work, vq, monkeypatch
):
    """The cache is keyed by what finds the codes: a stale one cannot be read."""
    again = make_rows(flips=True)
    monkeypatch.setattr(ImageTokenizer, "reconstruct", lambda *_: pytest.fail("encoded again"))
    again.cache(ArrayCache(work / "cache", vq.fingerprint), vq)
    assert (again.stored(3)["codes"] == rows.stored(3)["codes"]).all()
    monkeypatch.undo()
    torch.manual_seed(5)
    other = open_tokenizer(str(make_vqmodel(work / "other", 2 * CODES)))
    assert other.fingerprint != vq.fingerprint
    assert len(ArrayCache(work / "cache", other.fingerprint)) == 0


def test_codes_stay_valid_when_the_decoder_was_trained(rows, make_rows, work, vq, monkeypatch):
    model = VQModel.from_pretrained(work / "vq")
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.startswith(("decoder.", "post_quant_conv.")):
                tensor.add_(torch.randn_like(tensor))
    model.save_pretrained(work / "tuned")
    tuned, again = open_tokenizer(str(work / "tuned")), make_rows(flips=True)
    monkeypatch.setattr(ImageTokenizer, "reconstruct", lambda *_: pytest.fail("encoded again"))
    again.cache(ArrayCache(work / "cache", tuned.fingerprint), tuned)
    assert (again.stored(3)["codes"] == rows.stored(3)["codes"]).all()


def test_memory_is_that_of_a_batch(make_rows, work, vq, monkeypatch):
    sizes = []
    encode = ImageTokenizer.reconstruct

    def counted(self, pixels):
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(ImageTokenizer, "reconstruct", counted)
    monkeypatch.setattr(image_codes, "ROWS", 4)
    make_rows().cache(ArrayCache(work / "small", vq.fingerprint), vq)
    assert sizes == [4, 4, 4]


def test_codes_beyond_the_codebook_are_refused(make_rows, work, vq):
    store = ArrayCache(work / "bad", "x")
    rows = make_rows()
    for i in range(len(rows)):
        codes = np.full((GRID, GRID), CODES, np.uint16)
        store.put(rows.images.key(i), {"codes": codes})
    rows.cache(store, vq)
    with pytest.raises(UserError, match=f"code {CODES}, but the codebook has {CODES} rows"):
        image_codes.code_counts(rows, vq)
    with pytest.raises(UserError, match=f"code {CODES}, but"):
        vq.decode(np.full((1, GRID, GRID), CODES))


def test_counts_and_their_entropy(rows, vq):
    codes = np.concatenate(list(rows.blocks()))
    assert codes.shape == (2 * COUNT, GRID * GRID)
    counts = image_codes.code_counts(rows, vq)
    np.testing.assert_array_equal(counts, np.bincount(codes.ravel(), minlength=CODES))
    shares = np.array([1, 1, 2]) / 4
    expected = -(shares * np.log(shares)).sum()
    assert image_codes.entropy(np.array([5, 0, 5, 10])) == pytest.approx(expected)


def test_a_copy_of_a_training_picture_is_found(rows, monkeypatch):
    monkeypatch.setattr(image_codes, "BLOCK", 7)
    copy = rows.stored(9)["codes"].ravel().copy()
    near = copy.copy()
    near[:4] = (near[:4] + 1) % CODES
    far = np.full_like(copy, CODES + 1)
    found = image_codes.nearest(rows, np.stack([copy, near, far]))
    assert found[0] == 0 and found[1] <= 4 / len(copy) and found[2] == 1


def test_the_ceiling_shows_the_worst_first(rows, vq):
    seen = image_codes.ceiling(rows, vq, 24)
    quality = [float(rows.stored(i)["psnr"]) for i in range(len(rows))]
    assert f"{np.mean(quality):.1f} dB" in seen.text and f"{min(quality):.1f} at worst" in seen.text
    made = vq.reconstruct(np.stack([rows.images[i].pixels for i in range(3)]))
    error = (made.pixels.astype(float) - [rows.images[i].pixels for i in range(3)]) / 127.5
    expected = 10 * np.log10(4 / np.square(error).mean((1, 2, 3)))
    np.testing.assert_allclose(quality[:3], expected, atol=0.1)
    assert seen.worst.ndim == 3 and seen.worst.dtype == np.uint8
