"""Files that people give by mistake: each is told in one line, without jax, and exits with 2."""

import json
import shlex

import pytest

from jaxft.__main__ import run
from tests.test_mistakes import SHORT, table, told

CONFIGS = {
    "tabs.yaml": "config: configs/llm.py\noptim:\n\tlr: 1e-4\n",
    "empty.yaml": "",
    "own.yaml": "config: own.yaml\n",
    "pair-a.yaml": "config: pair-b.yaml\n",
    "pair-b.yaml": "config: pair-a.yaml\n",
    "twice.yaml": "config: configs/llm.py\noptim:\n  lr: 1\n  lr: 2\n",
    "odd.yaml": "config: configs/llm.py\n? [a, b]\n: 1\n",
    "circle.yaml": "task: llm\nlora: &lora\n  rank: *lora\n",
    "axolotl.yaml": "base_model: path\ndatasets: []\n",
    "absent.py": "import numpy\nimport no_such_module\n",
    "failing.py": "def get_config():\n    return {}['model']\n",
    "asking.py": "def get_config(size):\n    return {'task': size}\n",
    "plain.py": "def get_config():\n    return {'task': 'llm'}\n",
}
COMMAND_LINES = table("""
a YAML with tabs
    train --config=tabs.yaml
    = tabs.yaml:3 | YAML
an empty YAML
    train --config=empty.yaml
    = empty.yaml | config: configs/llm.py
a YAML that changes itself
    train --config=own.yaml
    = own.yaml | config: configs/llm.py
two that change each other
    train --config=pair-a.yaml
    = pair-a.yaml | config: configs/llm.py
a key that is there twice
    train --config=twice.yaml
    = twice.yaml:4 | lr | second time
a key that is a list
    train --config=odd.yaml
    = odd.yaml:2 | unhashable
a value that holds itself
    train --config=circle.yaml
    = circle.yaml | recursion
another trainer's YAML
    train --config=axolotl.yaml
    = axolotl.yaml | config: configs/llm.py
a config that imports what is not there
    train --config=absent.py
    = absent.py:2 | no_such_module
a config that fails
    train --config=failing.py
    = failing.py:2 | KeyError
a config that takes arguments
    train --config=asking.py
    = asking.py fails | get_config() missing 1
a config that returns a dict
    train --config=plain.py
    = plain.py | ConfigDict
two configs
    train LLM --config=configs/diffusion.py
    = --config is given twice | configs/llm.py | configs/diffusion.py
an empty run folder
    train LLM --workdir=
    = --workdir=DIR
a file for a run folder
    train LLM KEYS --workdir=good.jsonl
    = --workdir=good.jsonl | is a file
a file for a run
    evaluate --workdir=good.jsonl
    = good.jsonl | not a run folder
a config of a newer version
    train --workdir=newer
    = 'brand_new' | newer jaxft
a negative seed
    train LLM KEYS --config.seed=-1
    = seed=-1 | at least 0
an enormous seed
    train LLM KEYS --config.seed=99999999999999999999
    = seed=99999999999999999999 | at most 4294967295
an address for data
    train LLM KEYS --config.data.train=https://example.com/a.jsonl
    = https://example.com/a.jsonl | download | hf:OWNER/NAME
a temperature below zero
    sample --workdir=x --prompt=a --temperature=-1
    = --temperature=-1 | at least 0
a seed for another program
    sample --workdir=x --prompt=a --seeds=99999999999
    = --seed=99999999999 | at most 4294967295
no steps
    sample --workdir=x --prompt=a --steps=0
    = --steps=0 | at least 1
no probability
    sample --workdir=x --prompt=a --top_p=0
    = --top_p=0 | above 0
data for a model
    train LLM KEYS --config.model=good.jsonl
    = good.jsonl | .safetensors
""")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of a user, in which there is nothing to train."""
    monkeypatch.chdir(tmp_path)
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    for name, content in (("newer", {"task": "llm", "brand_new": 1}), ("model", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("mistake", COMMAND_LINES)
def test_a_mistaken_file_is_told(mistake, place, capsys):
    words, expected = COMMAND_LINES[mistake]
    there = set(place.iterdir())
    told(words, run(list(words)), capsys.readouterr().err, expected)
    assert set(place.iterdir()) == there, "no folder is made for it"


MODELS = table("""
a pipeline for a language model
    demo:emoji-sd
    = is a pipeline | --config=configs/diffusion.py
a run for a model
    done
    = done is the folder of a run | done/export
""")


@pytest.mark.parametrize("mistake", MODELS)
def test_a_folder_of_another_kind_is_told(mistake, place, capsys):
    [model], expected = MODELS[mistake]
    (place / "newer").rename(place / "done")
    words = shlex.split(f"train {SHORT['LLM']} {SHORT['KEYS']} --config.model={model}")
    told(words, run(words), capsys.readouterr().err, expected)
