"""Configs in YAML and JSON give the same keys as Python and the command line."""

import json
from pathlib import Path

import pytest

from jaxft.core.config import load_config, read_config
from jaxft.core.configs.files import find_config
from jaxft.core.errors import UserError
from jaxft.tasks import OPTIONS

ROOT = Path(__file__).resolve().parents[3]
LLM = str(ROOT / "configs" / "llm.py")


def test_yaml_changes_a_shipped_config(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "config: configs/llm.py\nmodel: path\ntotal: 3_epochs\npack: false\nchat: on\n"
        "optim:\n  lr: 1e-4  # a text in YAML 1.1\n  weight_decay: 0\nlora.rank: 4\n"
        "data:\n  eval:\n"
    )
    flags = {"model": "path", "total": "3_epochs", "pack": "false", "chat": "on"}
    flags |= {"optim.lr": "1e-4", "optim.weight_decay": "0", "lora.rank": "4", "data.eval": ""}
    found = load_config(str(file), [("seed", "5")], OPTIONS)
    assert found == load_config(LLM, [*flags.items(), ("seed", "5")], OPTIONS)
    assert found["optim"]["lr"] == 1e-4 and found["chat"] == "on" and found["pack"] is False


def test_a_list_in_yaml(tmp_path):
    file = tmp_path / "mine.yml"
    file.write_text("config: configs/diffusion.py\nsample:\n  prompts: [a cat, 3 dogs]\n")
    assert load_config(str(file), (), OPTIONS)["sample"]["prompts"] == ["a cat", "3 dogs"]


def test_d8_a_complete_yaml_and_a_runs_json_stand_alone(tmp_path):
    config = load_config(LLM, (), OPTIONS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "all.yaml").write_text(json.dumps(config))  # JSON is YAML
    for name in ("config.json", "all.yaml"):
        found = load_config(str(tmp_path / name), (), OPTIONS)
        assert found == config
        read_config(found, OPTIONS["llm"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "config: configs/llm.py\noptim: [\n", "a.yaml:3 is not valid YAML"),
        ("a.yaml", "just words\n", "must hold config keys"),
        ("a.yaml", "config: configs/lm.py\n", "configs/llm.py"),
        ("a.yaml", "config: configs/llm.py\nnum_epochs: 3\n", "give --config.total=3_epochs"),
        ("a.yaml", "config: configs/llm.py\noptim:\n  learning_rate: 3\n", "--config.optim.lr=3"),
        ("a.yaml", "config: configs/llm.py\nresolution: 64\n", "task=autoencoder or diffusion"),
        ("a.yaml", "config: configs/diffusion.py\nseq_len: 64\n", "belongs to task=llm, not to"),
        ("a.yaml", "config: configs/llm.py\nseed: abc\n", "config key seed='abc' must be int"),
        ("a.yaml", "config: configs/llm.py\nseed: [1]\n", "config key seed=['1'] must be int"),
        ("a.yaml", "task: llm\nmodel: x\n", "begin a YAML file with `config: configs/llm.py`"),
        ("a.json", '{"model_type": "llama"}', "is not the config of a run"),
        ("a.json", '{"task": ', "is not valid JSON"),
        ("a.toml", "", "is not .py, .yaml or .json"),
        ("a.py", "def get_config(:\n", "a.py:1 is not Python"),
        ("a.py", "x = 1\n", "defines no get_config()"),
    ],
)
def test_files_that_are_no_config(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        config = load_config(str(tmp_path / name), (), OPTIONS)
        read_config(config, OPTIONS["llm"])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_shipped_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/llm.py").samefile(LLM)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"give --config=run/config\.json"):
        find_config("run")
