"""LoRA on a quantised base beside torch: bitsandbytes' weights, PEFT's adapters and gradients."""

import json
import shutil
from pathlib import Path

import bitsandbytes.functional as F
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from jaxft import evaluate, export, sample, train
from jaxft.core.config import load_config
from jaxft.core.errors import UserError
from jaxft.core.params import bind, unpacked
from jaxft.kernels.quantised.nf4 import NF4
from jaxft.runs import opening
from jaxft.tasks import OPTIONS
from jaxft.weights.adapters import peft

CONFIG = ["--config", str(Path(__file__).resolve().parents[2] / "configs" / "llm.py")]
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
LORA = {"lora.targets": "all-linear", "lora.rank": 4, "lora.alpha": 8.0}


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder(tied=False, dtype="float16", **SHAPE)


def open_base(make_config, folder, base, mesh=(1, 1, 8)):
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    config = make_config(folder, {**LORA, **sizes})
    return opening.open_run(load_config(CONFIG[1]) | config | {"base": base})


def with_adapter(run):
    """All parameters, with adapters that change something."""
    params = opening.load_params(run)
    key = jax.random.key(1)
    for path in sorted(run.chosen):
        if path.endswith("lora_b"):
            key, own = jax.random.split(key)
            made = 0.05 * jax.random.normal(own, params[path].shape)
            params[path] = jax.device_put(made, run.shardings[path])
    return params


def dequantised(folder, run, params):
    """transformers' model with our codes, as bitsandbytes decodes them."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for entry in run.opened.parts[0].entries(run.leaves):
        arrays = {name: params.get(f"{entry.path}.{name}") for name in NF4._fields}
        for i, key in enumerate(entry.keys if arrays["codes"] is not None else ()):
            held = {x: torch.tensor(np.asarray(y[i])) for x, y in arrays.items() if y is not None}
            weight = model.get_parameter(key)
            if "nested" in held:
                table = F.create_dynamic_map()
                state = F.QuantState(
                    held["scales"].reshape(-1), weight.shape, F.get_4bit_type("nf4", "cpu"), 64,
                    "nf4", torch.float32, held["offset"],
                    F.QuantState(held["nested"], code=table, blocksize=256, dtype=torch.float32),
                )  # fmt: skip
                weight.data = F.dequantize_4bit(held["codes"].reshape(-1, 1), state)
            else:
                codes = held["codes"].reshape(weight.shape)
                weight.data = F.int8_vectorwise_dequant(codes, held["scales"].reshape(-1))
    return model


def loss_and_gradients(run, params, tokens):
    def loss(tuned):
        model = bind(run.opened.template, {**params, **tuned}, jnp.float32)
        logits = jax.nn.log_softmax(model(tokens[:, :-1]))
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)
        return -picked.mean(), logits

    tuned = {path: params[path] for path in run.chosen}
    with jax.set_mesh(run.mesh):
        (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(tuned)
    return float(value), np.asarray(logits), jax.tree.map(np.asarray, grads)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_logits_and_gradients_of_adapters_are_pefts(base, folder, make_config, tmp_path):
    run = open_base(make_config, folder, base, (2, 2, 2))
    params = with_adapter(run)
    part, leaves = run.opened.parts[0], unpacked(run.leaves)
    arrays = {path: np.asarray(params[path]) for path in run.chosen}
    peft.write(tmp_path, part, leaves, arrays, run.cfg.lora, str(folder))
    tokens = np.random.default_rng(0).integers(3, 320, (4, 24))
    value, logits, grads = loss_and_gradients(run, params, tokens)

    model = dequantised(folder, run, params)
    model = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    ids = torch.tensor(tokens)
    theirs = torch.log_softmax(model(ids[:, :-1]).logits, -1)
    loss = -theirs.gather(-1, ids[:, 1:, None]).mean()
    loss.backward()
    assert abs(value - loss.item()) < 1e-5
    np.testing.assert_allclose(logits, theirs.detach().numpy(), atol=1e-5 * np.abs(logits).max())
    slots = {
        f"{slot.module}.lora_{x}": (slot, x) for slot in peft.slots(part, leaves) for x in "AB"
    }
    checked = 0
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            continue
        short = name.removeprefix("base_model.model.").removesuffix(".default.weight")
        slot, letter = slots[short]
        own = grads[f"{slot.path}.lora_{letter.lower()}"][slot.layer]
        wanted = parameter.grad.numpy()
        own = own.reshape(-1, 4).T if letter == "A" else own.reshape(4, -1).T
        assert np.linalg.norm(own - wanted) < 1e-5 * max(np.linalg.norm(wanted), 1), name
        checked += 1
    assert checked == 2 * 7 * 2


def test_a_mesh_of_eight_holds_the_same_weights_and_computes_the_same(folder, make_config):
    tokens = np.random.default_rng(0).integers(3, 320, (8, 24))
    found = {}
    for mesh in ((1, 8, 1), (2, 2, 2)):  # 8 devices do not divide the two blocks of a row
        run = open_base(make_config, folder, "nf4", mesh)
        params = with_adapter(run)
        found[mesh] = params, loss_and_gradients(run, params, tokens)
    (one, (loss, _, grads)), (eight, (other, _, others)) = found.values()
    assert abs(loss - other) < 1e-5
    for path, array in one.items():
        if path.endswith((".codes", ".nested", ".offset", ".scales")):
            assert array.dtype == eight[path].dtype
    codes = [path for path in one if path.endswith(".codes")]
    assert len(codes) == 7 and all(
        len({str(s.index) for s in eight[path].addressable_shards}) == 4 for path in codes
    )
    for path in codes:
        np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(eight[path]))
    for path, grad in grads.items():
        np.testing.assert_allclose(others[path], grad, atol=1e-5 * max(1, np.abs(grad).max()))


@pytest.fixture(scope="module")
def finished(folder, make_flags, tmp_path_factory, quick):
    """A run of four steps at once, and the flags of its command."""
    work = tmp_path_factory.mktemp("runs") / "run"
    changes = {**LORA, "total": "4_steps", "every.save": "2_steps", "optim.lr": 0.01, "base": "nf4"}
    flags = make_flags(folder, {**changes, "every.sample": "0_steps"})
    assert train.main([*CONFIG, "--workdir", str(work), *flags]) == 0
    return work, flags


def test_a_run_resumes_exactly_evaluates_and_samples(finished, tmp_path, capsys):
    work, flags = finished
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line and line["step"]]
    assert losses[-1] < losses[0]
    (tmp_path / "run").mkdir()
    shutil.copy(work / "config.json", tmp_path / "run")
    shutil.copytree(work / "checkpoints" / "2", tmp_path / "run" / "checkpoints" / "2")
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "run"), *flags]) == 0
    assert "resumed from step 2" in capsys.readouterr().out
    again = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    again = [json.loads(line) for line in again]
    assert [x["loss"] for x in again if "loss" in x and x["step"]] == losses[2:]
    assert evaluate.main(["--workdir", str(work)]) == 0
    assert json.loads((work / "evaluation-4.json").read_text())["loss"] == lines[-1]["eval_loss"]
    assert sample.main(["--workdir", str(work), "--prompt=a small", "--max_new=4"]) == 0


def test_exports_lie_on_the_weights_before_quantisation(finished, folder, tmp_path, make_config):
    work, _ = finished
    out = tmp_path / "adapter"
    assert export.main(["--workdir", str(work), "--kind=adapter", "--out", str(out)]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        untouched = plain(tokens).logits
        adapted = PeftModel.from_pretrained(plain, out).merge_and_unload()
        merged = AutoModelForCausalLM.from_pretrained(work / "export", dtype=torch.float32)
        assert (adapted(tokens).logits - untouched).abs().max() > 1e-2
    theirs = adapted.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name].half().float(), rtol=1e-3, atol=1e-6)
    config = make_config(folder, {"mesh.fsdp": 1, "mesh.data": 8, "lora.rank": 0})
    config["lora"] = {"from": str(out), "alpha": 0.0}
    run = opening.open_run(load_config(CONFIG[1]) | config | {"base": "nf4"})
    again = opening.load_params(run, run.chosen)["layers.mlp.up_proj.lora_b"]
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    np.testing.assert_array_equal(again[1].T, load_file(out / "adapter_model.safetensors")[key])


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        ("nf5", {}, "base='nf5' is not known; did you mean 'nf4'"),
        ("nf4", {"lora.rank": 0}, "base=nf4 is frozen, so it needs adapters; set lora.rank"),
        ("int8", {"lora.dora": True}, "lora.dora=True does not go with base=int8"),
        ("nf4", {"trainable": ".*"}, r"trainable='\.\*' matches layers\.mlp\.down_proj\.kernel"),
    ],
)
def test_a_base_that_would_have_to_train_is_refused(base, changes, words, folder, make_config):
    config = load_config(CONFIG[1], [("lora.dora", "False"), ("base", "none")], OPTIONS)
    for key, value in {"model": str(folder), "base": base, **changes}.items():
        section, _, leaf = key.rpartition(".")
        (config[section] if section else config)[leaf] = value
    with pytest.raises(UserError, match=words):
        opening.open_run(config)
