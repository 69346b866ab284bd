"""Runs of this and of earlier versions are restored, and go on as they would have then."""

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import golden_checkpoints as golden

ARCHIVES = sorted(golden.ARCHIVES.glob("*.tar.gz"))


def test_s8_there_is_an_archive_of_each_kind_and_all_are_small():
    assert {file.name.split("-")[1].split(".")[0] for file in ARCHIVES} == set(golden.KINDS)
    assert all(file.stat().st_size < 100_000 for file in ARCHIVES)


@pytest.mark.parametrize("file", ARCHIVES, ids=lambda file: file.name)
def test_s8_a_run_of_an_earlier_version_goes_on(file, tmp_path, monkeypatch, capsys):
    with tarfile.open(file) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    golden.write_inputs(tmp_path)
    before = golden.losses(tmp_path / "run")
    made = golden.go_on(Path("run"))
    assert "damaged" not in capsys.readouterr().out
    expected = json.loads((tmp_path / "expected.json").read_text())["losses"]
    assert len(before) == 2 and made[:2] == before, "the first steps are not trained again"
    np.testing.assert_allclose(made, expected, rtol=1e-5)
