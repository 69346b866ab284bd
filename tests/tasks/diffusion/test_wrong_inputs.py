"""What a user of the diffusion task gets wrong: keys, folders and pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxft import train
from jaxft.core.guards.watchdog import Watchdog
from jaxft.runs.watch import Watch
from jaxft.tasks import Data
from tests.data.images.test_dataset import spoilt
from tests.tiny_diffusion import flags_of, make_pictures

NO_TARGETS = {"lora.rank": 2, "lora.targets": "nothing", "trainable": ""}


@pytest.fixture
def fails(plain, pictures, tmp_path, capfd):
    """`fails(words, key=value…)`: the run stops with 2 and one line that holds all words."""

    def check(words, changes):
        arguments = flags_of(plain, pictures, {"total": "1_steps", **changes})
        assert train.main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
        error = capfd.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("jaxft: "), error
        for word in words:
            assert str(word) in error[0], f"{word!r} is not in {error[0]!r}"

    return check


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["resolution=18", "multiple of 4"], {"resolution": 18}),
        (["28 fewer than one batch", "batch_size=40"], {"batch_size": 40}),
        (["sample.sampler='plms'", "ddim"], {"sample.sampler": "plms"}),
        (["sample.steps=0 must be at least 1"], {"sample.steps": 0}),
        (["sample.steps=1001 must be at most 1000"], {"sample.steps": 1001}),
        (["prediction='sample'", "epsilon", "v_prediction"], {"prediction": "sample"}),
        (["zero_snr", "prediction=v_prediction"], {"zero_snr": True}),
        (["lora.targets='nothing'", "matches no projection"], NO_TARGETS),
        (["caption_dropout=1.5"], {"caption_dropout": 1.5}),
        (["trains the VAE"], {"trainable": r"vae\..*"}),
        (["/no/such"], {"data.train": "folder:/no/such"}),
        (["cache", "/proc/nowhere"], {"cache": "/proc/nowhere"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_in_the_config(fails, words, changes):
    fails(words, changes)


def test_folder_without_model_index(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(["model_index.json", tmp_path / "empty"], {"model": tmp_path / "empty"})


@pytest.mark.parametrize("name", ["vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_folder_with_a_missing_component(fails, plain, tmp_path, name):
    Path(shutil.copytree(plain, tmp_path / "part"))
    shutil.rmtree(tmp_path / "part" / name)
    fails([tmp_path / "part" / name, "missing"], {"model": tmp_path / "part"})


def test_a_pickle_is_refused_with_the_way_to_convert(fails, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    fails([tmp_path / "model.ckpt", "pickle", "safetensors"], {"model": tmp_path / "model.ckpt"})


def test_epsilon_on_a_model_of_the_other_prediction(fails, plain, tmp_path):
    other = Path(shutil.copytree(plain, tmp_path / "v"))
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    words = ["prediction='epsilon'", f"scheduler_config.json of {other}", "v_prediction"]
    fails(words, {"model": other, "prediction": "epsilon"})


def test_a_bucket_smaller_than_a_batch_and_long_captions_are_told(opened, tmp_path):
    spec = make_pictures(tmp_path / "pictures", 9, ((24, 20), (24, 20), (16, 32)))
    file = tmp_path / "pictures" / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["text"], rows[4]["text"], rows[5]["text"] = "long " * 30, "b" * 76, "b" * 75
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.train": spec, "data.eval": "", "buckets": True, "batch_size": 4, "flip": True}
    run, _ = opened(changes)
    assert run.train.report()["truncated_captions"] == 2, "each picture once"
    told = run.describe()
    assert "; 2 captions longer than 77 tokens, cut" in told
    assert "fewer than batch_size" not in told, "12 and 6"
    run, _ = opened({**changes, "batch_size": 8})
    height, width = run.train.sizes[int(np.argmin(np.bincount(run.train.bucket_of)))]
    words = f"; bucket {height}x{width} has 6 images, fewer than batch_size=8: repeated"
    assert words in run.describe()


def test_components_of_two_models(fails, plain, tmp_path):
    mixed = Path(shutil.copytree(plain, tmp_path / "mixed"))
    file = mixed / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "cross_attention_dim": 24}))
    fails([mixed, "cross_attention_dim=[24]", "16"], {"model": mixed})


def test_folders_of_pictures(fails, tmp_path):
    bare, mute = tmp_path / "bare", tmp_path / "mute"
    bare.mkdir()
    fails(["holds no image", bare], {"data.train": f"folder:{bare}"})
    make_pictures(mute, 2)
    (mute / "metadata.jsonl").unlink()
    fails(["00.png has no caption"], {"data.train": f"folder:{mute}"})


def test_bad_pictures_are_left_out_up_to_one_in_a_hundred(fails, opened, tmp_path, capfd):
    spec = make_pictures(tmp_path / "pictures", 100)
    (tmp_path / "pictures" / "07.png").write_bytes(b"<html>")
    run, _ = opened({"data.train": spec})
    assert len(run.train) == 99 and run.train.report()["bad"] == 1
    assert run.train.report()["truncated_captions"] == 0 and "tokens, cut" not in run.describe()
    assert "left out 1 bad images" in capfd.readouterr().out
    data = Data(run.train, run.held_out)
    Watch(run, data, run.objective, run.preview, tmp_path, Watchdog(tmp_path), total=1, start=0)
    line = json.loads((tmp_path / "bad_samples.jsonl").read_text())
    assert line["name"].endswith("07.png") and "decode" in line["error"]
    (tmp_path / "pictures" / "08.png").write_bytes(b"")
    fails(["2 of 100 images", "07.png"], {"data.train": spec})


def test_a_picture_that_fails_in_training_is_recorded(opened, tmp_path):
    spec = make_pictures(tmp_path / "pictures", 100)
    file = tmp_path / "pictures" / "07.png"
    file.write_bytes(spoilt(file.read_bytes()))
    run, _ = opened({"data.train": spec})
    data = Data(run.train, run.held_out)
    watch = Watch(
        run, data, run.objective, run.preview, tmp_path, Watchdog(tmp_path), total=1, start=0
    )
    assert not (tmp_path / "bad_samples.jsonl").exists()
    assert np.array_equal(run.train[7]["pixels"], run.train[8]["pixels"])
    watch.flush()
    assert json.loads((tmp_path / "bad_samples.jsonl").read_text())["name"] == str(file)
    counts = json.loads((tmp_path / "manifest.json").read_text())["data"]
    assert (counts["images"], counts["bad"]) == (99, 1)
