"""Rows of moments and embeddings: what is stored, under which name, and what a row holds."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.data.cache import ArrayCache
from jaxft.data.images.dataset import ImageSet
from jaxft.data.sources.schemes import open_images
from jaxft.tasks.common import encoded
from jaxft.tasks.common.encoded import (
    collate,
    fingerprint,
    ids_key,
    keep_pixels,
    store_pictures,
    store_texts,
)
from jaxft.tasks.diffusion.rows import PictureRows, Share, Stores
from tests.data.images.test_dataset import spoilt
from tests.tiny_diffusion import make_pictures

SIZES = ((24, 20), (20, 48), (16, 16))


def tokenize(caption):
    return np.frombuffer(caption.encode().ljust(40)[:40], np.uint8).astype(np.int32)[None]


class Tokenized:
    """Captions as their letters."""

    new, length = (), 40

    def __call__(self, caption):
        return tokenize(caption)

    def too_long(self, captions):
        return 0


OPENED = SimpleNamespace(captions=Tokenized(), options=SimpleNamespace(mask=""))


def encode(pixels):
    """Moments that tell each picture."""
    mean = pixels.reshape(len(pixels), -1).mean(1)
    return {"mean": mean[:, None].astype(np.float32), "logvar": -mean[:, None].astype(np.float32)}


def embed(ids):
    return {"context": ids.sum(1).astype(np.float32)}


@pytest.fixture
def images(tmp_path):
    spec = make_pictures(tmp_path / "pictures", count=7, sizes=SIZES)
    return ImageSet(open_images(spec), 16, 4, use_buckets=True, flips=True)


def test_stored_rows_are_what_the_encoders_say_of_each_picture(images, tmp_path):
    rows = PictureRows(OPENED, [Share(images)], "demo")
    plain = [rows[i] for i in range(len(rows))]
    moments, texts = ArrayCache(tmp_path, "moments"), ArrayCache(tmp_path, "texts")
    assert list(store_pictures(moments, images, encode, 4))[-1] == (14, 14)
    captions = [rows.caption(i) for i in range(len(rows))]
    assert list(store_texts(texts, captions, tokenize, embed, 4))[-1] == (7, 7), "once a caption"
    rows.use(Stores(moments, texts))
    for i, row in enumerate(plain):
        stored = rows[i]
        assert stored.keys() == {"weights", "mean", "logvar", "time_ids", "context"}
        assert np.array_equal(stored["mean"], encode(row["pixels"][None])["mean"][0])
        assert np.array_equal(stored["context"], embed(row["ids"][None])["context"][0])
        assert np.array_equal(stored["time_ids"], row["time_ids"])
    mirrored = rows[7]
    assert np.array_equal(mirrored["context"], rows[0]["context"])
    again = ArrayCache(tmp_path, "moments")
    assert not list(store_pictures(again, images, encode, 4)), "a second run computes nothing"


def test_a_changed_picture_is_computed_again(tmp_path):
    spec = make_pictures(tmp_path / "pictures", count=4)
    cache = ArrayCache(tmp_path, "moments")

    def fill():
        images = ImageSet(open_images(spec), 16, 4, use_buckets=False)
        return list(store_pictures(cache, images, encode, 4))

    assert fill() == [(4, 4)]
    file, other = tmp_path / "pictures" / "00.png", tmp_path / "pictures" / "01.png"
    file.write_bytes(other.read_bytes() + b"\0")
    assert fill() == [(1, 1)]


def test_a_picture_that_does_not_decode_gets_an_entry_that_says_so(tmp_path, monkeypatch):
    spec = make_pictures(tmp_path / "pictures", count=100)
    file = tmp_path / "pictures" / "07.png"
    file.write_bytes(spoilt(file.read_bytes()))
    moments, pixels = ArrayCache(tmp_path, "moments"), ArrayCache(tmp_path, "pixels")

    def fill():
        images = ImageSet(open_images(spec), 16, 4, use_buckets=False, flips=True)
        keep_pixels(pixels, images, [3, 7])
        made = list(store_pictures(moments, images, encode, 4))
        rows = PictureRows(OPENED, [Share(images)], "demo")
        rows.use(Stores(moments))
        return images, made, rows

    images, made, rows = fill()
    assert made[-1] == (200, 200) and len(pixels) == 2
    for index, other in ((7, 8), (107, 108)):
        assert rows.caption(index) == rows.caption(other)
        assert np.array_equal(rows[index]["mean"], rows[other]["mean"])
    [bad] = rows.bad
    assert bad.name == str(file) and bad.error.startswith(f"{file}: cannot decode")
    assert rows.report()["bad"] == 1 and rows.report()["images"] == 99
    wanted = images[3].pixels
    monkeypatch.setattr("jaxft.data.images.dataset.decode", None)
    images, made, again = fill()
    assert not made and again.bad == rows.bad, "from the cache alone"
    assert np.array_equal(images[3].pixels, wanted)


def test_a_picture_that_changes_while_it_is_encoded_is_refused(tmp_path):
    images = ImageSet(open_images(make_pictures(tmp_path / "pictures", 4)), 16, 4, False)
    file = tmp_path / "pictures" / "02.png"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"a picture of .* changed after the run had opened it"):
        list(store_pictures(ArrayCache(tmp_path, "moments"), images, encode, 4))


def test_embeddings_are_named_by_ids_not_by_captions(tmp_path):
    """A tokenizer that changed in place under the same captions gives other ids."""
    cache = ArrayCache(tmp_path, "texts")
    list(store_texts(cache, ["a", "b"], tokenize, embed, 4))

    def other(caption):
        return tokenize(caption) + 1

    assert list(store_texts(cache, ["a"], other, embed, 4)) == [(1, 1)]
    assert np.array_equal(
        cache.get(ids_key(other("a")))["context"], embed(other("a")[None])["context"][0]
    )


def test_a_mixture_repeats_and_weighs(tmp_path):
    own, prior = (
        ImageSet(open_images(make_pictures(tmp_path / name, count, seed=count)), 16, 4, False)
        for name, count in (("own", 3), ("prior", 7))
    )
    rows = PictureRows(OPENED, [Share(own, 2), Share(prior, 1, 0.5)], "demo")
    assert len(rows) == 13
    assert [float(rows[i]["weights"]) for i in range(13)] == [1.0] * 6 + [0.5] * 7
    assert np.array_equal(rows[0]["pixels"], rows[3]["pixels"])
    assert np.array_equal(rows[6]["pixels"], prior[0].pixels)
    assert rows.caption(8) == prior.caption(2)


def test_sizes_of_a_mixture_are_counted_together(tmp_path):
    wide = make_pictures(tmp_path / "wide", 2, sizes=((16, 32),))
    both = make_pictures(tmp_path / "both", 3, sizes=((32, 16), (16, 32)))
    sets = [ImageSet(open_images(spec), 16, 4, use_buckets=True) for spec in (wide, both)]
    rows = PictureRows(OPENED, [Share(images) for images in sets], "demo")
    for i in range(len(rows)):
        assert rows[i]["pixels"].shape[:2] == rows.sizes[rows.bucket_of[i]]


def test_padding_has_weight_0_even_where_a_host_has_no_row(images):
    rows = PictureRows(OPENED, [Share(images)], "demo")
    batch = collate([rows[0], rows[0]], batch_rows=4)
    assert batch["weights"].tolist() == [1, 1, 0, 0] and batch["pixels"].shape[0] == 4
    alone = collate([], batch_rows=2, filler=rows[0])
    assert alone["weights"].tolist() == [0, 0] and alone.keys() == batch.keys()
    assert float(rows[0]["weights"]) == 1


def test_fingerprints_tell_bits_names_and_dtypes():
    ones = jnp.ones(3)
    params = {"vae.encoder.a": ones, "vae.decoder.b": ones}
    name = fingerprint(params, ("vae.encoder.",), "bf16")
    other = {**params, "vae.decoder.b": jnp.zeros(3)}
    assert fingerprint(other, ("vae.encoder.",), "bf16") == name, "the decoder makes no moments"
    changed = jnp.nextafter(ones, 2 * ones)
    assert fingerprint({"vae.encoder.a": changed}, ("vae.encoder.",), "bf16") != name
    assert fingerprint({"vae.encoder.c": ones}, ("vae.",), "bf16") != name
    assert fingerprint(params, ("vae.encoder.",), "fp32") != name


def test_hosts_wait_for_each_others_shares(tmp_path, monkeypatch):
    mine, theirs = ArrayCache(tmp_path, "moments", 0), ArrayCache(tmp_path, "moments", 1)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        theirs.put("b", {"mean": np.ones(1, np.float32)})
        theirs.flush()

    mine.put("a", {"mean": np.zeros(1, np.float32)})
    monkeypatch.setattr(encoded.jax, "process_count", lambda: 2)
    monkeypatch.setattr(encoded.time, "sleep", nap)
    encoded.wait_for_others(mine, ["a", "b"])
    assert len(naps) == 1 and "b" in mine


def test_hosts_that_share_no_disk_are_told_so(tmp_path, monkeypatch):
    mine, clock = ArrayCache(tmp_path, "moments", 0), iter(range(0, 10**6, 100))
    monkeypatch.setattr(encoded.jax, "process_count", lambda: 2)
    monkeypatch.setattr(encoded.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(encoded.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(UserError, match="nothing from the other hosts for 10 minutes: 1 entries"):
        encoded.wait_for_others(mine, ["a"])


def test_stacking_needs_the_keys_of_one_kind(images):
    rows = PictureRows(OPENED, [Share(images)], "demo")
    with pytest.raises(KeyError):
        collate([rows[0], {"weights": np.float32(1)}], batch_rows=2)
