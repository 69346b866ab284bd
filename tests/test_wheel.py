"""The wheel: every file of the package and of configs/, and commands from a folder of its own."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built by what is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", folder, ROOT]
    run(sys.executable, "-m", "pip", "-q", *words)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The commands of a new environment: the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    paths = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", "venv", paths))
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    words = ["install", "-q", "--no-deps", "--no-index", wheel]
    run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *words)
    assert (own / "jaxft" / "py.typed").is_file()
    return folder / "bin"


def run(*command, **options):
    """Run a command without the path of this tree. Returns its output."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=env, **options
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_wheel_holds_the_package_and_the_configs_and_nothing_else(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    there = {name for name in listed.splitlines() if (ROOT / name).is_file()}
    package = {name for name in there if name.startswith("jaxft/")}
    configs = {f"jaxft/{name}" for name in there if name.startswith("configs/")}
    assert inside == package | configs
    assert {"jaxft/py.typed", "jaxft/configs/llm.py", "jaxft/demo/NOTICE.md"} <= inside
    assert any(name.endswith(".ttf") for name in inside)


def test_an_installed_wheel_shows_help_and_data_from_another_folder(
    installed, make_folder, tmp_path
):
    model = make_folder(tied=True)
    place = run(installed / "python", "-c", "import jaxft; print(jaxft.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.parent)
    assert "inspect-data" in run(installed / "jaxft", "--help", cwd=tmp_path)
    shown = run(
        installed / "jaxft", "train", "--config", "configs/preference.py", "--help", cwd=tmp_path
    )
    assert "preference.beta" in shown
    assert "_jaxft" in run(installed / "jaxft", "completion", "bash", cwd=tmp_path)
    rows = [{"prompt": f"{i}: what?", "completion": " water"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model": model, "data.train": "jsonl:rows.jsonl", "data.eval": "", "seq_len": 64}
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    command = [installed / "jaxft", "inspect-data", "--config", "configs/llm.py", *words]
    assert "trained tokens" in run(*command, cwd=tmp_path)
    demo = ["--config.data.train=demo:supersense/train", "--html", "data.html"]
    assert "trained tokens" in run(*command, *demo, cwd=tmp_path)  # a demo that the wheel holds
    assert "<html" in (tmp_path / "data.html").read_text()
