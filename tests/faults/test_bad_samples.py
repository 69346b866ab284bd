"""Samples that cannot be read: all of them in one round, in a file of the run."""

import json
from pathlib import Path

from PIL import Image

from jaxft import train
from tests.tiny_autoencoders import make_vae

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


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
    assert (
        train.main(["--config", str(CONFIGS / "autoencoder.py"), "--workdir", str(work), *words])
        == 2
    )
    assert "60 of 90 images" in capsys.readouterr().err
    listed = [json.loads(line) for line in (work / "bad_samples.jsonl").read_text().splitlines()]
    assert [Path(one["name"]).name for one in listed] == [f"{i:02}.png" for i in range(60)]
    assert "is empty" in listed[0]["error"] and "b'<html>'" in listed[1]["error"]


def test_item_17_bad_texts_are_told_in_one_round(make_folder, make_flags, tmp_path, capsys):
    rows = [{"prompt": "q", "completion": i if i % 3 else "a"} for i in range(9)]
    file, work = tmp_path / "texts.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = make_flags(make_folder(tied=True), {"data.train": f"jsonl:{file}", "data.eval": ""})
    words = ["--config", str(CONFIGS / "llm.py"), "--workdir", str(work), *flags]
    assert train.main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "6 of 9 records are bad" in line and "texts.jsonl:9: field 'completion'" in line
    listed = [json.loads(line) for line in (work / "bad_samples.jsonl").read_text().splitlines()]
    assert [one["name"].rpartition(":")[2] for one in listed] == ["2", "3", "5", "6", "8", "9"]
