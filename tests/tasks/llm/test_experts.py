"""Runs of a mixture of experts: what trains, its records, exports, and what is refused."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import jaxft
from jaxft import train
from jaxft.core.config import load_config
from jaxft.core.errors import UserError
from jaxft.kernels.quantised import int8
from jaxft.runs import opening
from jaxft.tasks import OPTIONS
from jaxft.weights.folders.transformers import open_source
from tests import whole as runs

CONFIG = str(Path(__file__).resolve().parents[3] / "configs" / "llm.py")
KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
)


@pytest.fixture(scope="module")
def mixture(make_folder, tmp_path_factory):
    """A small random Mixtral with the tests' tokenizer."""
    folder = tmp_path_factory.mktemp("mixture") / "model"
    shutil.copytree(make_folder(), folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(1)
    own = {"vocab_size": 330, "num_local_experts": 8, "router_aux_loss_coef": 0.25}
    made = MixtralConfig(**{key: config[key] for key in KEPT}, **own)
    MixtralForCausalLM(made).save_pretrained(folder)
    return folder


@pytest.fixture
def config(small_run):
    """`config(folder, {"lora.rank": 2})`: the keys of a run."""
    return lambda folder, changes: load_config(
        CONFIG, [(key, str(x)) for key, x in small_run(folder, changes).items()], OPTIONS
    )


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits.numpy()


def test_a_whole_run_and_its_export(mixture, make_flags, tmp_path):
    """Everything trains, with the checkpoint's weight of the loss of routers."""
    keys = {"lora.rank": 0, "total": "2_steps", "every.log": "1_steps", "optim.warmup": "0_steps"}
    flags = ["--config", CONFIG, *make_flags(mixture, keys), "--workdir", str(tmp_path)]
    assert train.main(flags) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    record = next(one for one in records if "router_loss" in one)
    assert 2.0 < record["router_loss"] < 8.0 and 1 / 8 <= record["busiest_expert"] < 1
    assert 0 < record["router_entropy"] <= 1
    out = tmp_path / "export"
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    ours = jaxft.load(str(out))
    np.testing.assert_allclose(ours(np.arange(3, 60)[None]), logits(theirs), atol=1e-4)
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        key = f"model.layers.0.mlp.{name}"
        assert (theirs.state_dict()[key] - before.state_dict()[key]).abs().max() > 0, name


@pytest.mark.parametrize(
    ("changes", "weight"),
    [
        ({"lora.rank": 0}, 0.25),
        ({"lora.rank": 0, "trainable": r".*self_attn.*"}, 0.0),
        ({"lora.rank": 2}, 0.0),
        ({"lora.rank": 2, "router_loss": 0.5}, 0.5),
        ({"lora.rank": 0, "router_loss": 0.0}, 0.0),
    ],
)
def test_the_weight_of_the_loss_of_routers(changes, weight, mixture, config):
    run = runs.open_run(config(mixture, changes))
    assert run.objective.router_loss == weight


def test_an_adapter_of_attention_in_peft(mixture, make_flags, tmp_path):
    keys = {"lora.rank": 2, "total": "2_steps", "export.kind": "adapter", "optim.lr": 0.1}
    flags = ["--config", CONFIG, *make_flags(mixture, keys), "--workdir", str(tmp_path)]
    assert train.main(flags) == 0
    out = tmp_path / "export"
    base = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    untouched = logits(base)
    theirs = PeftModel.from_pretrained(base, out)
    adapted = (key.partition(".lora_A")[0] for key in theirs.state_dict() if ".lora_A" in key)
    assert {path.rpartition(".")[2] for path in adapted} == {f"{name}_proj" for name in "qkvo"}
    assert np.abs(logits(theirs) - untouched).max() > 1e-3


def test_experts_in_8_bits_are_those_of_the_file(mixture, make_flags, config, tmp_path):
    """Each tensor of an expert has its own codes. A merged export has the file's own experts."""
    keys = {"lora.rank": 2, "base": "int8", "total": "1_steps", "optim.lr": 0.1}
    run = runs.open_run(config(mixture, keys))
    params, tensors = opening.load_params(run), open_source(str(mixture)).tensors
    for i, expert, name, own in ((0, 0, "gate", "w1"), (1, 7, "down", "w2"), (1, 3, "up", "w3")):
        read = tensors.read(f"model.layers.{i}.block_sparse_moe.experts.{expert}.{own}.weight")
        want = int8.encode(jnp.asarray(read.T), 1)
        for field, array in want._asdict().items():
            held = params[f"layers.mlp.experts.{name}_proj.kernel.{field}"]
            np.testing.assert_array_equal(held[i, expert], array)
    keys |= {"optim.warmup": "0_steps", "export.kind": "merged"}
    flags = ["--config", CONFIG, *make_flags(mixture, keys), "--workdir", str(tmp_path)]
    assert train.main(flags) == 0
    after = open_source(str(tmp_path / "export")).tensors
    for key in tensors.keys():  # noqa: SIM118
        same = after.read(key).tobytes() == tensors.read(key).tobytes()
        assert same == ("self_attn" not in key), key


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lora.targets": r".*_proj"}, r"lora.targets=.* matches layers\.mlp\.experts\.gate_proj"),
        ({"lora.targets": r".*router"}, r"matches layers\.mlp\.router, and an adapter of PEFT"),
        ({"trainable": r".*lora.*|.*experts.*"}, r"trainable=.* matches layers\.mlp\.experts"),
        ({"base": "nf4"}, r"base=nf4: layers\.\w+\.\S+ has 32 inputs, which is no multiple of 64"),
        ({"objective": "dpo", "router_loss": 0.1}, "router_loss=0.1 belongs to objective=sft"),
        ({"router_loss": -2.0}, "router_loss=-2.0 must be at least 0, or -1"),
    ],
)
def test_what_a_mixture_does_not_have_is_refused(changes, text, mixture, config):
    with pytest.raises(UserError, match=text) as caught:
        opening.open_run(config(mixture, {"lora.rank": 2, **changes}))
    assert "\n" not in str(caught.value)


def test_all_linear_is_attention_alone(mixture, config):
    run = opening.open_run(config(mixture, {"lora.rank": 2, "lora.targets": "all-linear"}))
    assert all("self_attn" in path for path in run.chosen)


def test_a_model_without_experts_has_no_loss_of_routers(make_folder, config):
    with pytest.raises(UserError, match=r"router_loss=0\.1: .* has no experts"):
        opening.open_run(config(make_folder(), {"router_loss": 0.1}))
