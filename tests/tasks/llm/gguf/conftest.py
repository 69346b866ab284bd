"""Small random models of each family, with the tests' tokenizer."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.families import OUTER

KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    "tie_word_embeddings",
)


@pytest.fixture(scope="module")
def family(make_folder, tmp_path_factory):
    """`family("qwen3", head_dim=16)`: a folder of that model_type."""

    def make(name, **changes):
        base = make_folder(tied=changes.pop("tied", False), **({} if name != "llama" else changes))
        if name == "llama":
            return base
        config = json.loads((base / "config.json").read_text())
        torch.manual_seed(1)
        folder = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(base, folder)
        (folder / "model.safetensors").unlink()
        settings = {key: config[key] for key in KEPT} | {"vocab_size": 330, **changes}
        if name in OUTER:
            text = {"model_type": settings.pop("text_type"), **settings}
            outer = {**OUTER[name], "text_config": text, "image_token_index": 329}
            outer["tie_word_embeddings"] = text["tie_word_embeddings"]
            net = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **outer))
        else:
            net = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))
        centre = 0.0 if name.startswith("gemma") else 1.0
        for key, value in net.named_parameters():
            if key.endswith((".bias", "norm.weight", "_bias", "sinks")):
                torch.nn.init.normal_(value, centre, 0.3)
            if name.startswith("gemma") and "norm" in key:  # a file holds 1 + w in float32
                value.data = value.data.bfloat16().float()
        net.save_pretrained(folder)
        return folder

    return make
