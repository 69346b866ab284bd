"""Published config.json files: read as transformers reads them, and run in small."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxft import load, train
from jaxft.core.errors import UserError
from jaxft.models import registry
from tests.published import FOLDER, RUN, language_model_configs, language_models

CONFIGS = language_model_configs()
REFUSED = {"gemma3_1b_it", "phi-4-mini-reasoning"}
# Keys of the hub's own config.json that the copies lack.
LACKING = {
    "Llama-3.2-1B-Instruct": {
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    }
}


def test_every_published_language_model_is_right_or_refused_by_name():
    """Effective values, frequencies, and all tensors' names and shapes at the full size."""
    rows = {row.checkpoint: row for row in language_models()}
    assert len(rows) == 16
    for name, row in rows.items():
        assert (row.works == "refused") is (name in REFUSED), row
        assert name in (FOLDER / "SOURCES.md").read_text()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_another_family_says_which_ones_there_are(name):
    kind = CONFIGS[name]["model_type"]
    reasons = "is not supported.*give a model of|without an object text_config.*set model_type to"
    with pytest.raises(UserError, match=rf"model_type='{kind}' ({reasons})"):
        registry.read_decoder(CONFIGS[name])


def narrow(name):
    """The published keys with a small model's numbers, and layers enough that patterns show."""
    config = {**CONFIGS[name], **LACKING.get(name, {})}
    layers = 4 if config["model_type"] == "smollm3" else 2
    small = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    for key, value in small.items():
        config[key] = value if key in config and config[key] is not None else config.get(key)
    rope = config.get("rope_scaling") or {}
    if factors := {key: rope[key][:4] for key in ("short_factor", "long_factor") if key in rope}:
        config["rope_scaling"] = {**rope, **factors}  # one for each pair of a head
    for key in ("layer_types", "no_rope_layers"):
        if config.get(key):
            config[key] = config[key][:layers]
    return {key: value for key, value in config.items() if key in CONFIGS[name] or value}


@pytest.mark.parametrize("name", RUN)
def test_a_narrow_one_opens_trains_exports_and_is_the_same_in_transformers(
    name, tmp_path, tokenizer_folder, make_flags, quick, one_thread
):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "model")
    text = json.dumps(narrow(name), indent=2)
    (folder / "config.json").write_text(text)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    kind = getattr(torch, CONFIGS[name]["torch_dtype"])
    size = 2 * sum(x.numel() for x in model.parameters())
    model.to(kind).save_pretrained(folder, max_shard_size=size // RUN[name] + 4000)
    (folder / "config.json").write_text(text)
    assert (len(list(folder.glob("model*.safetensors"))) > 1) is (RUN[name] > 1)
    keys = {"total": "2_steps", "batch_size": 8, "lora.rank": 0, "every.save": "0_steps"}
    flags = make_flags(folder, {**keys, "optim.lr": 1e-2, "optim.warmup": "0_steps"})
    argv = ["--config", "configs/llm.py", "--workdir", str(tmp_path / "run"), *flags]
    assert train.main([*argv, "--config.data.eval="]) == 0
    export = tmp_path / "run" / "export"
    stock, report = AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = np.random.default_rng(0).integers(3, 320, (1, 40), np.int32)
    with torch.no_grad():
        want = stock.eval()(torch.tensor(ids).long()).logits.numpy()
        before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert np.abs(before(torch.tensor(ids).long()).logits.numpy() - want).max() > 1e-3
    got = load(str(export), "float32")(jnp.asarray(ids))
    np.testing.assert_allclose(got, want, atol=5e-5)
    written = json.loads((export / "config.json").read_text())
    assert written.items() >= {k: v for k, v in json.loads(text).items() if v is not None}.items()
