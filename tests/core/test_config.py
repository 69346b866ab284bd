"""Configs: overrides, types, did-you-mean, durations, claimed folders, and failing fast."""

import copy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxft.core import config as configs
from jaxft.core.config import load_config, override, read_config, resolve_config
from jaxft.core.configs import files
from jaxft.core.errors import UserError
from jaxft.demo import DEMOS, demo_path

ROOT = Path(__file__).resolve().parents[2]
LLM = str(ROOT / "configs" / "llm.py")


@dataclass(frozen=True)
class Own:
    seq_len: int
    pack: bool
    template: str
    eval_examples: int


@pytest.fixture
def config():
    return load_config(LLM)


# ---- overrides ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "2e-5", 2e-5),
        ("optim.lr", "1", 1.0),
        ("seed", "7", 7),
        ("mesh.fsdp", "-1", -1),
        ("lora.rslora", "true", True),
        ("lora.rslora", "False", False),
        ("model", "123", "123"),
        ("template", "", ""),
    ],
)
def test_an_override_changes_one_leaf_to_its_type(config, key, text, value):
    before = configs.flatten_config(config)
    override(config, key, text)
    after = configs.flatten_config(config)
    assert after[key] == value and type(after[key]) is type(value)
    assert {k for k in after if after[k] != before.get(k)} <= {key}
    assert after.keys() == before.keys()


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optm.lr", "optim.lr"),
        ("optim.lrr", "optim.lr"),
        ("sed", "seed"),
        ("data.trian", "data.train"),
        ("batch-size", "batch_size"),
        ("optim.lr.x", "optim.lr"),
    ],
)
def test_a_mistyped_key_names_the_nearest_one(config, key, near):
    with pytest.raises(UserError, match=f"unknown config key '{key}'; did you mean '{near}'"):
        override(config, key, "1")


def test_a_section_cannot_be_overridden(config):
    with pytest.raises(UserError, match="unknown config key 'mesh'"):
        override(config, "mesh", "1")


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        ("seed", "abc", "int"),
        ("seed", "1.5", "int"),
        ("seed", "True", "int"),
        ("optim.lr", "fast", "float"),
        ("optim.lr", "False", "float"),
        ("lora.rslora", "1", "bool"),
        ("lora.rslora", "yes", "bool"),
    ],
)
def test_a_value_of_another_type_is_refused(config, key, text, kind):
    with pytest.raises(UserError, match=rf"config key {key}=.*{text}.* must be {kind}"):
        override(config, key, text)


# ---- reading --------------------------------------------------------------------------------


def test_the_shipped_config_reads(config):
    cfg = read_config(config, Own)
    assert cfg.optim.lr == 1e-3 and cfg.own["seq_len"] == 64
    assert read_config(config).own["seq_len"] == 64  # before the task is imported


def changed(config, key, value):
    config = copy.deepcopy(config)
    *sections, leaf = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    if value is None:
        del node[leaf]
    else:
        node[leaf] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.ler", 1.0, r"unknown config key optim\.'?ler'?.*did you mean 'lr'"),
        ("seqlen", 1, r"unknown config key 'seqlen'; did you mean 'seq_len'"),
        ("optim.lr", None, r"config is missing optim\.lr; add"),
        ("seq_len", None, r"config is missing seq_len"),
        ("seed", "zero", r"config key seed='zero' must be int"),
        ("seq_len", 4.5, r"config key seq_len=4\.5 must be int"),
        ("optim.lr", "1e-3", r"config key optim\.lr='1e-3' must be float"),
        ("lora.rslora", 1, r"config key lora\.rslora=1 must be bool"),
        ("model", 5, r"config key model=5 must be str"),
        ("optim", 5, r"config key optim=5 must be a section"),
        ("seed", {"a": 1}, r"config key seed=.* must be int"),
        ("optim.name", "adam", r"optim\.name='adam' is not known; did you mean 'adamw'"),
        ("remat", "some", r"remat='some' is not known; it is one of"),
        ("compute_dtype", "fp16", r"compute_dtype='fp16' is not known; it is one of"),
        ("batch_size", 0, r"batch_size=0 must be at least 1"),
        ("micro_batches", 3, r"batch_size=8 does not split into micro_batches=3"),
        ("lora.rank", -1, r"lora\.rank=-1 must be at least 0"),
        ("lora.dropout", 1.0, r"lora\.dropout=1\.0 must be at least 0 and below 1"),
        ("optim.ema", 1.0, r"optim\.ema=1\.0 must be at least 0 and below 1"),
        ("optim.lr", -0.1, r"optim\.lr=-0\.1 must be at least 0"),
        ("every.save", "often", r"every\.save='often' is not a duration: write"),
        ("optim.b2", 1.0, r"optim\.b2=1\.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_files_are_told_in_one_line(config, key, value, message):
    with pytest.raises(UserError, match=message) as caught:
        read_config(changed(config, key, value), Own)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_gone_is_read_where_it_was_empty(config):
    config["lora"]["base"] = ""  # as run folders of version 0.1 hold it
    assert resolve_config(config) == load_config(LLM)
    config["lora"]["base"] = "models/base"
    with pytest.raises(UserError, match=r"lora\.base is gone: give the base by model=MODEL"):
        read_config(resolve_config(config), Own)


def test_an_int_stands_for_a_float(config):
    assert read_config(changed(config, "optim.lr", 1), Own).optim.lr == 1.0


# ---- durations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("200_steps", 200),
        ("0_steps", 0),
        ("3_epochs", 38),  # 300 rows in batches of 8
        ("17_examples", 3),
        ("16_examples", 2),
    ],
)
def test_durations(duration, steps):
    assert configs.steps(duration, 8, 100, "total") == steps


@pytest.mark.parametrize("duration", ["10", "-1_steps", "1.5_epochs", "10_step", "steps"])
def test_durations_that_are_none(duration):
    with pytest.raises(UserError, match=f"every.log='{duration}' is not a duration"):
        configs.steps(duration, 8, 100, "every.log")


# ---- files ----------------------------------------------------------------------------------


def test_a_config_is_looked_up_beside_the_package(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    text = (ROOT / "configs" / "llm.py").read_text()
    (tmp_path / "configs" / "mine.py").write_text(text.replace("seed=0", "seed=41"))
    monkeypatch.chdir(tmp_path / "configs")
    monkeypatch.setattr(files, "PACKAGE", tmp_path / "jaxft")
    assert load_config("configs/mine.py")["seed"] == 41
    with pytest.raises(
        UserError, match=r"configs/no\.py does not exist; shipped: configs/mine\.py"
    ):
        load_config("configs/no.py")


@pytest.mark.parametrize(("name", "text"), [("a.py", ""), ("a.py", "x = 1\n")])
def test_a_file_that_is_no_config(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError, match=rf"{name}.* get_config\(\)"):
        load_config(str(file))


def test_loading_twice_gives_independent_configs():
    first = load_config(LLM, [("optim.lr", "1")])
    assert load_config(LLM)["optim"]["lr"] == 1e-3 and first["optim"]["lr"] == 1.0


# ---- the whole command ----------------------------------------------------------------------


def train(*arguments, cwd=ROOT):
    began = time.perf_counter()
    code = (
        "import sys, jaxft.train as t; code = t.main(sys.argv[1:]);"
        "heavy = [m for m in ('jax', 'flax', 'optax', 'transformers') if m in sys.modules];"
        "print(heavy); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True
    )
    return done, time.perf_counter() - began


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.optm.lr=1", "did you mean 'optim.lr'?"),
        ("--config.seed=abc", "config key seed='abc' must be int"),
        ("--config.optim.name=adam", "did you mean 'adamw'?"),
        ("--config.total=soon", "total='soon' is not a duration"),
    ],
)
def test_a_mistake_costs_a_moment_and_one_line(tmp_path, word, message):
    done, seconds = train("--config", "configs/llm.py", f"--workdir={tmp_path}/run", word)
    assert done.returncode == 2
    assert done.stdout.strip() == "[]", "something heavy was imported first"
    assert done.stderr.count("\n") == 1 and message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "a mistake must not claim the folder"
    assert seconds < 5


def test_the_module_command_itself():
    command = [sys.executable, "-m", "jaxft.train", "--config", "configs/llm.py"]
    done = subprocess.run(
        [*command, "--config.optm.lr=1"], cwd=ROOT, capture_output=True, text=True
    )
    line = "jaxft: unknown config key 'optm.lr'; did you mean 'optim.lr'?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize("kind", DEMOS)
def test_what_ships_is_there_by_its_name(kind):
    for place in DEMOS[kind]:
        assert demo_path(f"demo:{place.partition('.')[0]}", kind).exists()
    assert demo_path("folder:emoji/train", kind) is None and demo_path("demo", kind) is None
    with pytest.raises(UserError, match=rf"unknown demo {kind} 'demo:x': expected one of demo:"):
        demo_path("demo:x", kind)
