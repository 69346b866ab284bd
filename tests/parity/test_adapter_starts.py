"""New adapters: how they start, on any mesh, and which of their settings are refused."""

import json

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from jaxft.core.errors import UserError
from jaxft.core.params import bind
from jaxft.export import check_kind
from jaxft.tasks import Job
from jaxft.tasks.llm.exports import WRITERS
from jaxft.weights.adapters import peft_folder
from tests import plain_torch
from tests import whole as runs
from tests.parity.test_adapters import (
    ALL,
    LAYER,
    OPTIONS,
    ROWS,
    TOKENS,
    Case,
    assert_near,
    gradients,
    logits,
    torch_logits,
)


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_a_new_dora_starts_as_the_base_with_pefts_norms(make_folder, make_config, init):
    """Also with random weights, whose norms no file holds. A layer left out has none."""
    folder = make_folder()
    keys = {"init": init, "lora.rank": 4, "lora.targets": "all-linear", "param_dtype": "float32"}
    run = runs.open_run(make_config(folder, {**keys, "lora.dora": True, "lora.layers": "1"}))
    plain = runs.open_run(make_config(folder, {"init": init, "lora.rank": 0}))
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        base = {path: x for path, x in params.items() if path in plain.leaves}
        assert_near(logits(run, params), logits(plain, base))
    for path in (path for path in params if path.endswith(".lora_m")):
        kernel = np.asarray(params[path.replace("lora_m", "kernel")], np.float64)
        inputs = run.leaves[path.replace("lora_m", "kernel")].inputs
        norm = np.sqrt(np.square(kernel).sum(tuple(range(1, 1 + inputs))))
        norm[0] = 0
        np.testing.assert_allclose(params[path], norm, rtol=1e-5)
    assert run.chosen == {path for path in run.leaves if ".lora_" in path}
    if init == "pretrained":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=4, target_modules=ALL, use_dora=True)
        theirs = get_peft_model(model, config).state_dict()
        key = f"base_model.model.{LAYER}.lora_magnitude_vector.default.weight"
        own = np.asarray(params["layers.self_attn.q_proj.lora_m"])[1]
        np.testing.assert_allclose(own.ravel(), theirs[key].numpy(), rtol=1e-6)


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_start_as_those_of_the_table(make_folder, make_config, tied, init):
    keys = {"init": init, "lora.rank": 4, "lora.tokens": "</s>, e,<s>"}
    run = runs.open_run(make_config(make_folder(tied=tied), keys))
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
    path, ids = "embed_tokens.tokens.embedding", run.opened.parts[0].rows
    assert ids == (1, run.opened.tokenizer.convert_tokens_to_ids("e"), 0)
    table = np.asarray(params["embed_tokens.embedding"])
    np.testing.assert_array_equal(params[path], table[list(ids)])
    assert run.chosen == {path, *(path for path in run.leaves if ".lora_" in path)}
    model = bind(run.opened.template, {**params, path: params[path] + 1}).embed_tokens
    expected = table.copy()
    expected[list(ids)] += 1
    np.testing.assert_array_equal(model.table(), expected)
    np.testing.assert_array_equal(model(TOKENS), expected[TOKENS])
    np.testing.assert_array_equal(model(np.array([ids])), expected[[ids]])


def test_a_mesh_computes_what_one_device_does(make_folder, make_config, monkeypatch):
    """All kinds at once, sharded: the same loss, gradients and merged export."""
    keys = {
        "lora.rank": 4,
        "lora.targets": "all-linear",
        "lora.dora": True,
        "lora.layers": "1",
        "lora.ranks": ".*mlp.*=8/32",
        "lora.tokens": "e,a",
        "batch_size": ROWS,
        "trainable": "",
    }
    folder, found = make_folder(tied=True), []
    for shape in ((1, 1, 1), (2, 2, 2)):
        with monkeypatch.context() as patch:
            if shape == (1, 1, 1):
                patch.setattr(jax, "device_count", lambda *_: 1)
            mesh = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape, strict=True))
            run = runs.open_run(make_config(folder, {**keys, **mesh}))
            (batch,) = plain_torch.first_batches(run, 1, ROWS)
            with jax.set_mesh(run.mesh):
                params, rng = runs.load_params(run), np.random.default_rng(0)
                for path, x in sorted(params.items()):
                    noise = np.asarray(
                        rng.normal(0, 0.1, x.shape) * (np.asarray(x) != 0), np.float32
                    )
                    params[path] = jax.device_put(np.asarray(x) + noise, x.sharding)
                found.append(gradients(run, params, batch))
    assert found[0].keys() == run.chosen
    for path, one in found[0].items():
        assert_near(np.asarray(found[1][path]), np.asarray(one), 1e-4)


def test_whole_modules_beside_a_new_adapter_are_saved(make_folder, make_config, tmp_path):
    """By `trainable`, as PEFT's modules_to_save. A run that continues them trains them again."""
    folder = make_folder()
    keys = {"lora.rank": 4, "export.kind": "adapter"}
    pattern = r".*\.lora_[ab]|lm_head\..*|norm\..*"
    run = runs.open_run(make_config(folder, {**keys, "trainable": pattern}))
    check_kind(run, "adapter")
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        moved = {path: params[path] + 0.1 for path in run.chosen}
        wanted = logits(run, {**params, **moved})
    job = Job(run.opened, run.leaves, run.chosen, {**params, **moved}, "x", "source", tmp_path)
    WRITERS["adapter"].write(job)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["modules_to_save"] == ["lm_head", "model.norm"]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(stock, tmp_path, low_cpu_mem_usage=False)
    assert_near(torch_logits(model), wanted)
    again = runs.open_run(make_config(tmp_path, {}))
    assert again.chosen == run.chosen
    with jax.set_mesh(again.mesh):
        assert_near(logits(again, runs.load_params(again)), wanted)
    for more in (r"|layers\.self_attn\.q_proj\.kernel", r"|embed_tokens\..*"):
        both = {**keys, "lora.tokens": "e", "trainable": pattern + more}
        with pytest.raises(UserError, match=r"export\.kind='adapter' would leave out"):
            check_kind(runs.open_run(make_config(folder, both)), "adapter")


@pytest.mark.parametrize(
    ("tied", "saved", "words"),
    [
        (
            False,
            ["score"],
            r"modules_to_save=\['score'\] is not supported: score is not in the base",
        ),
        (False, ["layers.0.input_layernorm"], "is in some layers of a stack alone; merge it"),
        (True, ["embed_tokens"], "half of a tied pair, without ensure_weight_tying"),
        (True, ["lm_head"], "lm_head is not in the base"),
    ],
)
def test_modules_that_cannot_be_saved_are_named(
    make_folder, make_config, tmp_path, tied, saved, words
):
    base = AutoModelForCausalLM.from_pretrained(make_folder(tied=tied), dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": saved}))
    with pytest.raises(UserError, match=words):
        runs.open_run(make_config(tmp_path, {}))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora.tokens": "<|none|>"}, r"lora\.tokens: '<\|none\|>' is no token of the tokenizer; "),
        ({"lora.tokens": "e,"}, r"lora\.tokens: '' is no token"),
        ({"lora.tokens": "e", "lora.rank": 0}, r"lora\.tokens='e' needs lora\.rank > 0"),
    ],
)
def test_wrong_tokens_are_named(make_folder, make_config, keys, words):
    with pytest.raises(UserError, match=words):
        runs.open_run(make_config(make_folder(), {"lora.rank": 4, **keys}))


def test_rows_of_an_adapter_are_not_contradicted(make_folder, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    base = make_folder()
    case = Case(base, OPTIONS["tokens"], tmp_path, make_config)
    with pytest.raises(
        UserError, match=r"lora\.tokens='e', but .* trains the rows \[271, 261, 28\]"
    ):
        keys = {"lora.from": str(tmp_path / "in"), "lora.tokens": "e", "mesh.fsdp": 1}
        none = {"lora.rank": 0, "lora.alpha": 0.0, "lora.targets": ""}
        runs.open_run(make_config(base, {**keys, **none}))
    file = tmp_path / "in" / "adapter_config.json"
    config = json.loads(file.read_text())
    for rows in ({"lm_head": [1]}, {"embed_tokens": [1], "lm_head": [2]}):
        file.write_text(json.dumps({**config, "trainable_token_indices": rows}))
        with pytest.raises(
            UserError, match=r"trainable_token_indices=.* names rows of other modules"
        ):
            peft_folder.read(file.parent)
    file.write_text(json.dumps({**config, "trainable_token_indices": [1]}))
    with pytest.raises(UserError, match=r"tokens_delta is missing or not of the shape \(1, 32\)"):
        runs.load_params(runs.open_run(make_config(tmp_path / "in", {"mesh.fsdp": 1})))
    assert case.run.opened.parts[0].rows == (271, 261, 28)
