"""Models inside installed packages."""

import sys

import pytest

from jaxft.core.errors import UserError
from jaxft.weights.packages import package_folders


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
