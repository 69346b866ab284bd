"""How often each picture is decoded: once before step 0 with an empty cache, else never."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import ImageFile

from jaxft import export, sample, train
from jaxft.data.images import dataset
from jaxft.runs.compiling import Compiled
from jaxft.runs.watch import Watch
from tests import tiny_diffusion, tiny_image_tokens
from tests.tiny_autoencoders import changes_of, make_vae, make_vqmodel
from tests.tiny_pipelines import make_pipeline

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DATA = {"data.train": "demo:emoji/train", "data.eval": "demo:emoji/valid"}
SIZES = {"total": "1_steps", "eval_examples": 8, "export.kind": "none"}
IMAGES = 192 + 64


@pytest.fixture
def counts(monkeypatch):
    """Counters of decodes and of pixels loaded by Pillow, by file; "before step 0" is a copy."""
    found = {"decodes": Counter(), "loads": Counter(), "before": None, "stops": False}
    decode, load, look = dataset.decode, ImageFile.ImageFile.load, Watch.look

    def counted_decode(content, name):
        found["decodes"][name] += 1
        return decode(content, name)

    def counted_load(self):
        found["loads"]["all"] += bool(self.tile)
        return load(self)

    def counted_look(self, step, params):
        if step:
            return look(self, step, params)
        found["before"] = Counter(found["decodes"])
        if found["stops"]:
            raise KeyboardInterrupt
        assert found["loads"]["all"] == sum(found["decodes"].values()), "a decode behind `decode`"
        return look(self, step, params)

    monkeypatch.setattr(dataset, "decode", counted_decode)
    monkeypatch.setattr(ImageFile.ImageFile, "load", counted_load)
    monkeypatch.setattr(Watch, "look", counted_look)
    step = lambda self, state, frozen, batch: (state, {"loss": 0.0, "grad_norm": 0.0})  # noqa: E731
    monkeypatch.setattr(Compiled, "__call__", step)  # whose compilation is most of a short run
    monkeypatch.setattr(Compiled, "prepare", lambda *_: None)
    return found


@pytest.fixture
def diffusion(tmp_path):
    make_pipeline(tmp_path, "sd").save_pretrained(tmp_path / "model")
    changes = {**SIZES, **DATA, "cache": tmp_path / "cache", "eval_generated": 4}
    return tiny_diffusion.flags_of(tmp_path / "model", "", changes)


@pytest.fixture
def image_tokens(tmp_path, make_folder):
    vq = make_vqmodel(tmp_path / "vq", tiny_image_tokens.CODES)
    changes = {**SIZES, **DATA, "graft": vq, "eval_generated": 4, "flip": True, "crops": 2}
    return tiny_image_tokens.flags_of(make_folder(), "", tmp_path / "cache", changes)


@pytest.fixture
def autoencoder(tmp_path):
    keys = changes_of(make_vae(tmp_path / "model"), "", {**SIZES, **DATA})
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["--config", str(CONFIGS / "autoencoder.py"), *flags]


@pytest.mark.parametrize("task", ["diffusion", "image_tokens", "autoencoder"])
def test_pictures_are_decoded_once_to_start_a_run(task, request, counts, quick, tmp_path):
    flags = request.getfixturevalue(task)
    assert train.main([*flags, "--workdir", str(tmp_path / "first")]) == 0
    assert counts["before"] and max(counts["before"].values()) == 1
    assert sum(counts["before"].values()) == (IMAGES if task != "autoencoder" else 8)
    if task != "autoencoder":  # it has no cache: its evaluation looks at the pictures themselves
        counts["decodes"].clear(), counts["loads"].clear()
        counts["stops"] = True
        assert train.main([*flags, "--workdir", str(tmp_path / "second")]) == 130
        assert not counts["before"], "all that step 0 needs is in the cache"
    counts["decodes"].clear(), counts["loads"].clear()
    run = ["--workdir", str(tmp_path / "first")]
    assert export.main([*run, "--out", str(tmp_path / "out"), "--kind", "folder"]) == 0
    if task != "autoencoder":
        assert sample.main([*run, "--prompt", "a cat"]) == 0
    assert not counts["decodes"] and not counts["loads"]
