"""Samples that cannot be read: all of them in one round, in a file of the run."""

import json
from pathlib import Path

from PIL import Image

from jaxft import train
from tests.tiny_autoencoders import make_vae

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "autoencoder.py"


def test_item_17_d1_a_refused_set_leaves_the_list_of_its_bad_samples(tmp_path, capsys):
    pictures, work = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    for i in range(90):
        Image.new("RGB", (32, 32), (i, i, i)).save(pictures / f"{i:02}.png")
    for i in range(60):
        (pictures / f"{i:02}.png").write_bytes(b"<html>" if i % 2 else b"")
    make_vae(tmp_path / "model")
    keys = {"model": tmp_path / "model", "data.train": f"folder:{pictures}", "resolution": 32}
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    assert train.main(["--config", str(CONFIG), "--workdir", str(work), *words]) == 2
    assert "60 of 90 images" in capsys.readouterr().err
    listed = [json.loads(line) for line in (work / "bad_samples.jsonl").read_text().splitlines()]
    assert [Path(one["name"]).name for one in listed] == [f"{i:02}.png" for i in range(60)]
    assert "is empty" in listed[0]["error"] and "b'<html>'" in listed[1]["error"]
