"""Names of other trainers: each leads to a key that exists, in one line, with its value."""

import re
from pathlib import Path

import pytest

from jaxft.core.cli.arguments import parse
from jaxft.core.cli.keys import keys_of_task
from jaxft.core.config import load_config
from jaxft.core.configs.synonyms import (
    AXOLOTL_NAMES,
    DIFFUSERS_NAMES,
    KOHYA_NAMES,
    SYNONYMS,
    TRL_NAMES,
    advice,
)
from jaxft.core.errors import UserError
from jaxft.tasks import OPTIONS

ROOT = Path(__file__).resolve().parents[3]
KEYS = {task: {key.name for key in keys_of_task(task, OPTIONS)} for task in OPTIONS}


@pytest.mark.parametrize("name", SYNONYMS)
def test_a_name_leads_to_a_key_that_takes_its_value(name):
    found = SYNONYMS[name]
    value = next((value for value in found.values if value), "3")
    line = advice(name, value)
    assert line.startswith(name) and "\n" not in line
    if not found.key:
        assert found.note in line and "has no key here" in line
        return
    if found.key.startswith("--"):
        assert f"give {found.key}=3" in line
        return
    task = next(task for task, keys in KEYS.items() if found.key in keys)
    flag = line.partition("give --config.")[2].partition(" (")[0]
    key, _, text = flag.partition("=")
    load_config(str(ROOT / "configs" / f"{task}.py"), [(key, text.strip("\"'"))], OPTIONS)


def test_text_encoders_train_without_the_vae():
    regex = SYNONYMS["train_text_encoder"].form.strip("'")
    paths = ("unet.conv_in.kernel", "text_encoder_2.x", "transformer.x", "vae.encoder.conv_in.bias")
    assert [bool(re.fullmatch(regex, path)) for path in paths] == [True, True, True, False]


def test_no_name_is_a_key_of_every_task():
    """It would be accepted, and no line would translate it."""
    assert not set(SYNONYMS) & set.intersection(*KEYS.values())
    for table in (TRL_NAMES, AXOLOTL_NAMES, DIFFUSERS_NAMES, KOHYA_NAMES):
        assert set(table) <= set(SYNONYMS)


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("epochs", "3", "--config.total=3_epochs"),
        ("num_train_epochs", "3.0", "--config.total=3_epochs"),
        ("num-train-epochs", "0.5", "--config.total=N_epochs"),
        ("max_steps", "500", "--config.total=500_steps"),
        ("learning_rate", "2e-5", "--config.optim.lr=2e-5"),
        ("optim", "adamw_bnb_8bit", "--config.optim.name=adamw_8bit"),
        ("optimizer_type", "AdamW8bit", "--config.optim.name=adamw_8bit"),
        ("mixed_precision", "fp16", "--config.compute_dtype=bfloat16"),
        ("bf16", "True", "--config.compute_dtype=bfloat16"),
        ("gradient_checkpointing", "", "--config.remat=full"),
        ("save_strategy", "epoch", "--config.every.save=1_epochs"),
        ("lora_target_modules", "[q_proj,v_proj]", r'--config.lora.targets=".*\.(q_proj|v_proj)"'),
        ("target_modules", "all-linear", "--config.lora.targets=all-linear"),
        ("validation_prompt", "a cat", "--config.sample.prompts=\"['a cat']\""),
        ("train_data_dir", "pictures", "--config.data.train=folder:pictures"),
        ("network_dim", "32", "--config.lora.rank=32"),
        ("output_dir", "out", "--workdir=out"),
        ("clip_skip", "2", "--config.clip_skip=1"),
        ("max_token_length", "225", "--config.caption_chunks=3"),
        ("SFTConfig.learning_rate", "1", "--config.optim.lr=1"),
    ],
)
def test_values_are_translated(name, value, flag):
    assert f"give {flag}" in advice(name, value)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--lr", "1e-4"], "--config.optim.lr=1e-4"),
        (["--lr=1e-4"], "--config.optim.lr=1e-4"),
        (["lr=1e-4"], "--config.optim.lr=1e-4"),
        (["--workdir", "w", "--bf16", "--lr", "1"], "--config.compute_dtype=bfloat16"),
        (["--seed", "3"], "--config.seed=3"),
        (["--optim.lr=3"], "--config.optim.lr=3"),
        (["--resolution", "512"], "--config.resolution=512"),
        (["--clip_skip", "2"], "--config.clip_skip=1 (it is kohya's number less 1)"),
        (["configs/llm.py"], "--config=configs/llm.py"),
        (["mine.yaml", "--workdir=x"], "--config=mine.yaml"),
    ],
)
def test_words_of_other_command_lines_are_refused(words, flag):
    with pytest.raises(UserError) as caught:
        parse("train", words, OPTIONS)
    assert f"give {flag}" in str(caught.value)


def test_values_of_known_options_are_left_alone():
    options, overrides = parse(
        "sample", ["--prompt", "lr=3", "--raw", "--config.seed", "1"], OPTIONS
    )
    assert options == {"prompt": "lr=3", "raw": "True"} and overrides == [("seed", "1")]


def test_unknown_names_have_no_advice():
    assert advice("no_such_thing", "1") == ""
