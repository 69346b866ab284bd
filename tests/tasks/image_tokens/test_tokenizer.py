"""Cached codes: the tokenizer's own, found again, refused when they are another's."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import VQModel
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, JanusVQVAE

from jaxft.core.errors import UserError
from jaxft.data.cache import ArrayCache
from jaxft.data.images.dataset import ImageSet
from jaxft.data.sources.schemes import open_images
from jaxft.tasks.image_tokens import rows as row_module
from jaxft.tasks.image_tokens import tokenizer
from jaxft.tasks.image_tokens.layout import extended
from jaxft.tasks.image_tokens.rows import CodeRows
from jaxft.tasks.image_tokens.tokenizer import ImageTokenizer, open_tokenizer
from tests.tiny_autoencoders import make_janus, make_vqmodel
from tests.tiny_image_tokens import CODES, GRID, SIZE, make_pictures

COUNT = 10


def opened_of(layout, tokenizer):
    model = SimpleNamespace(
        tokenizer=tokenizer, vq=SimpleNamespace(cfg=SimpleNamespace(code_dtype=np.uint16))
    )
    return SimpleNamespace(cfg=None, options=None, layout=layout, model=model)


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
        return CodeRows(opened_of(layout, tokenizer), images, "demo")

    return make


@pytest.fixture(scope="module")
def rows(work, make_rows, vq):
    made = make_rows(flips=True)
    made.cache(ArrayCache(work / "cache", vq.fingerprint), vq)
    return made


def test_prompts_are_padded_to_the_longest_of_the_set(rows):
    lengths = [int(rows[i]["length"]) for i in range(len(rows))]
    assert rows.width == max(lengths) < rows.layout.max_caption_tokens
    assert all(rows[i]["prompt"].shape == (rows.width,) for i in range(len(rows)))


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


def test_memory_is_that_of_a_batch(work, make_rows, vq, monkeypatch):
    """However many pictures there are: those of one batch, and of the few that are read ahead."""
    make_pictures(work / "many", 60)
    images, alive, most, sizes = (
        ImageSet(open_images(f"folder:{work / 'many'}"), SIZE, 2, False),
        0,
        0,
        [],
    )
    made = CodeRows(opened_of(make_rows().layout, make_rows().tokenizer), images, "demo")
    load = ImageSet.__getitem__

    def freed():
        nonlocal alive
        alive -= 1

    def counted(self, index):
        nonlocal alive, most
        example = load(self, index)
        weakref.finalize(example.pixels, freed)
        alive += 1
        most = max(most, alive)
        return example

    def encode(self, pixels):
        sizes.append(len(pixels))
        shape = len(pixels), GRID, GRID
        return tokenizer.CodedPictures(np.zeros(shape, int), pixels, *np.zeros((2, len(pixels))))

    monkeypatch.setattr(ImageSet, "__getitem__", counted)
    monkeypatch.setattr(ImageTokenizer, "reconstruct", encode)
    monkeypatch.setattr(row_module, "CODED_TOGETHER", 3)
    made.cache(ArrayCache(work / "small", "x"), vq)
    gc.collect()
    assert sizes == [3] * 20 and most <= 3 * 8 and alive <= 3 * 8
    assert made.stored(0).keys() == {"codes", "psnr", "ssim", "time_ids"}, "and no pixels"


def test_trap1_an_exported_tokenizer_has_rows_of_unit_length(work):
    """Only so does transformers' own search find our codes; all else stays byte for byte."""
    source, out = make_janus(work / "janus", CODES), work / "exported"
    tokenizer = open_tokenizer(str(source))
    for name, content in tokenizer.files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(content, out / name)
    before, after = (load_file(f / "model.safetensors") for f in (source, out / "vq"))
    differ = [key for key in before if before[key].tobytes() != after[key].tobytes()]
    assert differ == ["quantize.embedding.weight"] and before.keys() == after.keys()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    stock = JanusVQVAE.from_pretrained(out / "vq").eval()
    x = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = stock.encode(x).image_tokens.view(4, 16, 16).numpy()
    made = tokenizer.reconstruct(pixels).codes
    np.testing.assert_array_equal(made, found)
    assert len(np.unique(made)) > CODES // 3
    again = open_tokenizer(str(out))
    assert again.fingerprint == tokenizer.fingerprint
    assert all(isinstance(one, Path) for one in again.files.values())
    assert again.files["vq/model.safetensors"] == out / "vq" / "model.safetensors", "as it is"


def test_llamagens_own_names_are_read_and_written_as_transformers_has_them(work):
    """`vq_ds16_t2i` after torch.load: conv_blocks, res, mid.0 and statistics of its training."""
    stock, folder = make_janus(work / "stock", CODES), work / "llamagen"
    folder.mkdir()
    own = load_file(stock / "model.safetensors")
    pairs = {".down.": ".conv_blocks.", ".up.": ".conv_blocks.", ".block.": ".res."}
    pairs |= {"mid.block_1": "mid.0", "mid.attn_1": "mid.1", "mid.block_2": "mid.2"}
    theirs = {"quantize.codebook_used": np.zeros(9, np.float32)}
    for key, tensor in own.items():
        for one, other in pairs.items():
            key = key.replace(one, other)
        theirs[key] = tensor
    assert len(theirs) == len(own) + 1 and "encoder.conv_blocks.0.res.0.conv1.weight" in theirs
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(stock / "config.json", folder)
    made, wanted = open_tokenizer(str(folder)), open_tokenizer(str(stock))
    assert made.fingerprint == wanted.fingerprint
    written = load_file(made.files["vq/model.safetensors"])
    expected = load_file(wanted.files["vq/model.safetensors"])
    assert {k: v.tobytes() for k, v in written.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }


def test_a_fingerprint_tells_how_codes_are_found(work):
    """The same weights by direction and by distance are two tokenizers to a cache."""
    folder = make_janus(work / "direction", CODES)
    plain = Path(shutil.copytree(folder, work / "distance"))
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "codebook_l2_norm": False}))
    first, second = (open_tokenizer(str(one)) for one in (folder, plain))
    assert first.fingerprint != second.fingerprint
    assert second.files["vq/model.safetensors"] == plain / "model.safetensors"


def test_codes_beyond_the_codebook_are_refused(make_rows, work, vq):
    store = ArrayCache(work / "bad", "x")
    rows = make_rows()
    for i in range(len(rows)):
        codes = np.full((GRID, GRID), CODES, np.uint16)
        store.put(rows.images.key(i), {"codes": codes})
    with pytest.raises(UserError, match=f"code {CODES}, but the codebook has {CODES} rows"):
        rows.cache(store, vq)
    with pytest.raises(UserError, match=f"code {CODES}, but"):
        vq.decode(np.full((1, GRID, GRID), CODES))


def test_counts_and_their_entropy(rows, vq):
    codes = np.concatenate(list(rows.blocks()))
    assert codes.shape == (2 * COUNT, GRID * GRID)
    np.testing.assert_array_equal(rows.counts, np.bincount(codes.ravel(), minlength=CODES))
    shares = np.array([1, 1, 2]) / 4
    expected = -(shares * np.log(shares)).sum()
    assert row_module.entropy(np.array([5, 0, 5, 10])) == pytest.approx(expected)


def test_a_copy_of_a_training_picture_is_found(rows, monkeypatch):
    monkeypatch.setattr(row_module, "BLOCK", 7)
    copy = rows.stored(9)["codes"].ravel().copy()
    near = copy.copy()
    near[:4] = (near[:4] + 1) % CODES
    far = np.full_like(copy, CODES + 1)
    found = row_module.nearest(rows, np.stack([copy, near, far]))
    assert found[0] == 0 and found[1] <= 4 / len(copy) and found[2] == 1


def test_the_ceiling_shows_the_worst_first(rows, vq):
    text, sheet = row_module.ceiling(rows), row_module.worst_pictures(rows, vq)
    quality = [float(rows.stored(i)["psnr"]) for i in range(len(rows))]
    assert f"{np.mean(quality):.1f} dB" in text and f"{min(quality):.1f} at worst" in text
    made = vq.reconstruct(np.stack([rows.images[i].pixels for i in range(3)]))
    error = (made.pixels.astype(float) - [rows.images[i].pixels for i in range(3)]) / 127.5
    expected = 10 * np.log10(4 / np.square(error).mean((1, 2, 3)))
    np.testing.assert_allclose(quality[:3], expected, atol=0.1)
    assert sheet.captions[0].endswith(f"({min(quality):.1f} dB)")
    assert tuple(sheet.columns) == ("target", "reconstruction")
    assert all(one.ndim == 4 and one.dtype == np.uint8 for one in sheet.columns.values())
