"""Help, version and completion come from one table, in a moment, and miss no option and no key."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxft.__main__ import run
from jaxft.core.cli.commands import COMMANDS
from jaxft.core.cli.keys import entries, keys_of_task
from jaxft.core.config import flatten_config, load_config
from jaxft.core.configs.schema import CHOICES, Config
from jaxft.tasks import OPTIONS

ROOT = Path(__file__).resolve().parents[3]
ALL = [key for task in OPTIONS for key in keys_of_task(task, OPTIONS)]


@pytest.fixture
def shown(capsys):
    def show(*words):
        assert run(list(words)) == 0
        return capsys.readouterr().out

    return show


def test_a_reader_that_stops_early_is_no_error():
    command = [sys.executable, "-m", "jaxft", "train", "--config", "configs/llm.py", "--help"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(60)
    process.stderr.close()


def test_every_key_is_described():
    def walk(schema):
        names = {f.name.removesuffix("_") for f in dataclasses.fields(schema)}
        nested = {f.name for f in dataclasses.fields(schema) if dataclasses.is_dataclass(f.type)}
        assert set(entries(schema)) == names - nested - {"own"}, schema
        for field in dataclasses.fields(schema):
            if dataclasses.is_dataclass(field.type):
                walk(field.type)

    for schema in (Config, *OPTIONS.values()):
        walk(schema)
    assert {key.name for key in ALL} >= CHOICES.keys()


@pytest.mark.parametrize("task", OPTIONS)
def test_the_help_of_train_has_every_key_with_the_value_of_the_config(task, shown):
    config = f"configs/{task}.py"
    text = " ".join(shown("train", "--config", config, "--help").split())
    leaves = flatten_config(load_config(str(ROOT / config), (), OPTIONS))
    assert leaves.keys() == {key.name for key in keys_of_task(task, OPTIONS)}
    for name, value in leaves.items():
        value = '""' if value == "" else str(value).replace("\n", "\\n")
        assert f" {name} {value[:40]}" in text, name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command(name, shown):
    command = COMMANDS[name]
    text = shown(name, "--help")
    assert command.example in text and text.startswith(f"usage: jaxft {name}")
    assert all(f"--{one.name}" in text for one in command.options)
    assert max(map(len, text.splitlines())) <= 100
    assert shown(name.replace("-", "_"), "-h") == text


@pytest.mark.parametrize("columns", [80, 99])
@pytest.mark.parametrize("name", ["", "completion", *COMMANDS])
def test_a_help_keeps_to_a_narrow_terminal(name, columns, shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    whole = shown(*filter(None, [name]), "--help")
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(*filter(None, [name]), "--help")
    assert max(map(len, text.splitlines())) <= columns
    words = text.replace("(", " ").replace(")", " ").split()
    assert sorted(words) == sorted(whole.replace("(", " ").replace(")", " ").split())


def test_the_help_of_a_run_shows_its_own_values(tmp_path, shown):
    config = load_config(str(ROOT / "configs" / "llm.py"), [("seed", "77")], OPTIONS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert re.search(r"seed +77\s", shown("train", "--workdir", str(tmp_path), "--help"))


def test_help_and_version_need_neither_jax_nor_half_a_second():
    code = (
        "import sys; from jaxft.__main__ import run; run(sys.argv[1:]);"
        "print([m for m in ('jax', 'numpy', 'transformers', 'ml_collections') if m in sys.modules])"
    )
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        spent.append(time.perf_counter() - began)
        assert done.stdout.splitlines()[-1] == "[]" and "train" in done.stdout, done.stderr
    assert min(spent) < 0.5 * slowness()


def slowness() -> float:
    """How much longer than 0.1 s a start of Python takes here: other work may share the cores."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import json, re, dataclasses"])
    return max(1.0, (time.perf_counter() - began) / 0.1)


def test_the_module_runs_and_refuses_unknown_commands(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "jaxft", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout == "jaxft 0.1.0\n"
    assert run(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert run(["completion", "csh"]) == 2
    assert "bash|zsh|fish" in capsys.readouterr().err
    assert run([]) == 0
    assert "COMMAND --help" in capsys.readouterr().out


def test_a_command_of_the_table_is_a_module_with_a_main():
    for command in COMMANDS.values():
        path = ROOT / command.module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert "def main(argv: list[str] | None = None) -> int:" in file.read_text()


# ---- completion -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], ["train"]),
        (["train", "--w"], ["--workdir"]),
        (["train", "--config.lora.ra"], ["--config.lora.rank=", "--config.lora.ranks="]),
        (["train", "--config.remat", "=", ""], list(CHOICES["remat"])),
        (["train", "--config.remat", "=", "fu"], ["full"]),
        (["train", "--config.remat", "="], list(CHOICES["remat"])),
        (["train", "--config.pack", "=", "T"], ["True"]),
        (["sample", "--raw", "--temp"], ["--temperature"]),
        (["train", "--workdir", ""], []),  # files, by -o default
        (["verify", "--config."], []),
    ],
)
def test_bash_completes(words, found, shown):
    script = f'{shown("completion", "bash")}\nCOMP_WORDS=("jaxft" "$@"); COMP_CWORD=$#; _jaxft\n'
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script, "-", *words], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.split() == found


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells_hold_all_and_parse(shell, shown, tmp_path):
    text = shown("completion", shell)
    assert all(f"config.{key.name}" in text and name in text for key in ALL for name in COMMANDS)
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
