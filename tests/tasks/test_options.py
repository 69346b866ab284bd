"""The keys of each task: light to read, filled in with their defaults, refused where mistyped."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.core.config import flatten_config, load_config, read_config
from jaxft.core.configs.schema import Config
from jaxft.core.errors import UserError
from jaxft.tasks import OPTIONS, TASKS

ROOT = Path(__file__).resolve().parents[2]


def config(task, *overrides):
    return load_config(str(ROOT / "configs" / f"{task}.py"), overrides, OPTIONS)


def test_every_task_has_its_keys():
    assert OPTIONS.keys() == TASKS.keys()


@pytest.mark.parametrize("task", OPTIONS)
def test_a_shipped_config_is_whole(task):
    assert read_config(config(task), OPTIONS[task]).task == task


def test_what_a_file_leaves_out_can_be_overridden():
    made = config("diffusion", ("prior.weight", "0.5"), ("lora.dropout", "0.1"), ("flip", "True"))
    cfg = read_config(made, OPTIONS["diffusion"])
    assert (cfg.own["prior"].weight, cfg.lora.dropout, cfg.own["flip"]) == (0.5, 0.1, True)
    assert cfg.own["noise_offset"] == 0.0


@pytest.mark.parametrize(
    ("task", "key", "value", "word"),
    [
        ("diffusion", "min_snr", "5.0", "min_snr_gamma"),
        ("autoencoder", "loss.percept", "1.0", "loss.perceptual"),
        ("diffusion", "sample.steps", "many", "int"),
    ],
)
def test_a_mistyped_key_or_type_is_named(task, key, value, word):
    with pytest.raises(UserError, match=word):
        read_config(config(task, (key, value)), OPTIONS[task])


def test_no_task_is_imported_for_it():
    code = "import sys, jaxft.tasks; print('jax' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout.strip() == "False", shown.stderr


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.py")))
def test_case_img_15_every_file_in_configs_is_read_and_every_key_can_be_given(name):
    made = config(name, ("model", "x"), ("data.train", "folder:x"))
    own = OPTIONS[made["task"]]
    cfg = read_config(made, own)
    assert 0 <= cfg.optim.ema < 1
    for key in leaves_of(Config) | leaves_of(own):
        value = flatten_config(made)[key]  # each key is there, with its default
        text = value if isinstance(value, str) else repr(value)
        assert config(name, ("model", "x"), ("data.train", "folder:x"), (key, text)) == made


def leaves_of(schema, prefix=""):
    found = set()
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            found |= leaves_of(f.type, f"{prefix}{f.name}.")
        elif f.name != "own":
            found.add(prefix + f.name.removesuffix("_"))
    return found


def test_a_key_that_the_file_lacks_can_be_given(tmp_path):
    """A section too, and a key without a default."""
    text = (ROOT / "configs" / "diffusion.py").read_text()
    cut = re.sub(r"            (export|sample)=.*\n| +lr=3e-5,\n| +min_snr_gamma=.*\n", "", text)
    (tmp_path / "mine.py").write_text(cut)
    given = {
        "optim.lr": "1",
        "min_snr_gamma": "5",
        "export.kind": "none",
        "export.dtype": "source",
        "sample.prompts": "['a red fox']",
        "sample.steps": "3",
        "sample.guidance": "4",
    }
    made = load_config(str(tmp_path / "mine.py"), given.items(), OPTIONS)
    cfg = read_config(made, OPTIONS["diffusion"])
    assert (cfg.optim.lr, cfg.own["min_snr_gamma"], cfg.export.kind) == (1.0, 5.0, "none")
    assert cfg.own["sample"].prompts == ("a red fox",) and cfg.own["sample"].sampler == "dpm++"
    with pytest.raises(UserError, match=r"config is missing (export|min_snr_gamma|sample)"):
        read_config(load_config(str(tmp_path / "mine.py"), (), OPTIONS), OPTIONS["diffusion"])
    with pytest.raises(UserError, match=r"unknown config key 'optim\.lrr'; did you mean"):
        load_config(str(tmp_path / "mine.py"), [("optim.lrr", "1")], OPTIONS)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a red fox", "must be a list, such as"), ("['a', 1]", r"prompts\[1\]=1 must be str")],
)
def test_prompts_are_a_list_of_texts(text, words):
    with pytest.raises(UserError, match=words):
        config("diffusion", ("sample.prompts", text))
