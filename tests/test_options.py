"""The keys of each task: light to read, filled in with their defaults, refused where mistyped."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.core.config import load_config, read_config
from jaxft.core.errors import UserError
from jaxft.tasks import TASKS
from jaxft.tasks.options import OPTIONS

ROOT = Path(__file__).resolve().parent.parent


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
    code = "import sys, jaxft.tasks.options; print('jax' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout.strip() == "False", shown.stderr
