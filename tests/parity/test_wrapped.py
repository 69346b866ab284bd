"""Models of pictures and text by the commands: their text is trained, the rest is copied."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from jaxft import load, train
from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.models.decoders.classifier import open_classifier
from jaxft.models.decoders.files import open_decoder
from jaxft.tasks.image_tokens.opened import open_folder
from jaxft.weights.adapters.peft_folder import open_adapted
from tests.families import GEMMA, MINISTRAL3, OUTER

TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
TEXTS = {
    "gemma3": {**TEXT, **GEMMA, "model_type": "gemma3_text", "dtype": "bfloat16"},
    "mistral3": {
        **TEXT,
        "model_type": "ministral3",
        "head_dim": 8,
        "rope_parameters": {**MINISTRAL3, "rope_type": "yarn", "rope_theta": 1e5},
    },
}
IMAGE = "\x01"  # a token that no data of the tests holds


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_folder, one_thread):
    """`folders[kind]`: a random model in bf16 in two shards, with a file of its processor."""
    made, tokenizer = {}, AutoTokenizer.from_pretrained(tokenizer_folder)
    (image,) = tokenizer(IMAGE, add_special_tokens=False)["input_ids"]
    for kind, text in TEXTS.items():
        folder = shutil.copytree(tokenizer_folder, tmp_path_factory.mktemp(kind) / "model")
        outer = {"model_type": kind, **OUTER[kind], "image_token_index": image}
        config = json.dumps({**outer, "dtype": "bfloat16", "text_config": text})
        (folder / "config.json").write_text(config)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        model.bfloat16().save_pretrained(folder, max_shard_size=40000)
        (folder / "config.json").write_text(config)
        (folder / "preprocessor_config.json").write_text('{"size": 28}')
        made[kind] = folder
    return made


def tensors(folder):
    """All tensors of a folder's files, bf16 as transformers reads it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids).long()).logits.float().numpy()


def run(folder, workdir, make_flags, changes):
    keys = {"total": "2_steps", "batch_size": 8, "lora.rank": 0, "every.save": "0_steps"}
    more = {"optim.lr": 1e-2, "optim.warmup": "0_steps", **changes}
    argv = ["--config", "configs/llm.py", "--workdir", str(workdir)]
    flags = make_flags(folder, {**keys, **more})
    return train.main([*argv, *flags, "--config.data.eval="])


@pytest.mark.parametrize("kind", TEXTS)
def test_w2_training_changes_the_text_and_copies_the_rest(
    kind, folders, tmp_path, make_flags, quick
):
    assert run(folders[kind], tmp_path / "run", make_flags, {}) == 0
    export = tmp_path / "run" / "export"
    before, after = tensors(folders[kind]), tensors(export)
    assert before.keys() == after.keys() and len(list(folders[kind].glob("*.safetensors"))) > 1
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if not key.startswith("language_model.")} == same
    for name in ("preprocessor_config.json", "tokenizer.json"):
        assert (export / name).read_bytes() == (folders[kind] / name).read_bytes()
    stock, report = AutoModelForImageTextToText.from_pretrained(
        export, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = np.random.default_rng(0).integers(3, 320, (1, 40), np.int32)
    got = load(str(export), "float32")(jnp.asarray(ids))
    np.testing.assert_allclose(got, logits(stock, ids), atol=5e-5)
    assert json.loads((export / "config.json").read_text())["text_config"] == TEXTS[kind]


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("beside", ["", "embed_tokens"])
def test_w2_an_adapter_has_the_names_of_the_outer_class(
    kind, beside, folders, tmp_path, make_flags, quick
):
    """The modules of pictures have such names too, and get no adapter."""
    changes = {"lora.rank": 2, "optim.lr": 0.1, "export.kind": "adapter"}
    if beside:
        changes["trainable"] = r".*\.lora_.*|embed_tokens\.embedding"
    assert run(folders[kind], tmp_path / "run", make_flags, changes) == 0
    export = tmp_path / "run" / "export"
    names = load_file(export / "adapter_model.safetensors").keys()
    layer = r"base_model\.model\.model\.language_model\.layers\.\d\.self_attn\..*"
    factors = {name for name in names if ".lora_" in name}
    assert factors and all(re.fullmatch(layer, name) for name in factors)
    base = AutoModelForImageTextToText.from_pretrained(folders[kind], dtype=torch.float32)
    ids = np.random.default_rng(0).integers(3, 320, (1, 40), np.int32)
    plain = logits(base, ids)
    theirs = PeftModel.from_pretrained(base, str(export))
    adapted = {key for key, _ in theirs.named_parameters() if ".lora_" in key}
    assert len(adapted) == len(factors)
    want = logits(theirs, ids)
    assert np.abs(want - plain).max() > 0.05
    config = {"lora.from": str(export), "total": "0_steps", "export.dtype": "float32"}
    assert run(folders[kind], tmp_path / "again", make_flags, config) == 0
    merged = tmp_path / "again" / "export"
    np.testing.assert_allclose(load(str(merged), "float32")(ids), want, atol=1e-4)


def test_w2_adapters_of_older_transformers_have_the_names_of_the_file(
    folders, tmp_path, make_flags, quick
):
    changes = {"lora.rank": 2, "optim.lr": 0.1, "export.kind": "adapter"}
    assert run(folders["gemma3"], tmp_path / "run", make_flags, changes) == 0
    export = tmp_path / "run" / "export"
    file = export / "adapter_model.safetensors"
    new = open_adapted(str(export), opener=open_decoder).adapter.tensors
    old = {
        key.replace("model.language_model.", "language_model.model."): one
        for key, one in load_file(file).items()
    }
    save_file(old, file)
    found = open_adapted(str(export), opener=open_decoder).adapter.tensors
    assert sorted(found.keys()) == sorted(new.keys())


@pytest.mark.parametrize("kind", TEXTS)
def test_w1_an_own_head_counts_though_config_json_ties_it(kind, folders, tmp_path):
    """A class of transformers ties unless its file has another head, and so does this."""
    folder = shutil.copytree(folders[kind], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)  # both classes tie by default
    (folder / "config.json").write_text(json.dumps(config))
    head = {"language_model.lm_head.weight": torch.randn(320, 32).bfloat16()}
    state = {key: x for key, x in tensors(folder).items() if key not in head} | head
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", {"format": "pt"})
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ids = np.arange(3, 43, dtype=np.int32)[None]
    np.testing.assert_allclose(load(str(folder), "float32")(ids), logits(stock, ids), atol=5e-5)
    assert open_decoder(str(folder)).config["tie_word_embeddings"] is False


def test_files_with_the_names_of_the_class_open_too(folders, tmp_path):
    folder = shutil.copytree(folders["gemma3"], tmp_path / "model")
    state = tensors(folder)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    from safetensors.torch import save_file

    named = {
        re.sub(r"^language_model\.model|^(?=vision|multi)", "model.language_model", key)
        if key.startswith("language_model")
        else f"model.{key}": tensor
        for key, tensor in state.items()
    }
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    ids = np.arange(3, 43, dtype=np.int32)[None]
    want = load(str(folders["gemma3"]), "float32")(ids)
    np.testing.assert_array_equal(load(str(folder), "float32")(ids), want)


def test_w3_a_text_with_the_token_of_a_picture_is_refused(
    folders, tmp_path, make_flags, quick, capsys
):
    data = tmp_path / "data.jsonl"
    texts = ({"text": text} for text in ("plain words", f"a picture {IMAGE}"))
    data.write_text("".join(json.dumps(text) + "\n" for text in texts))
    changes = {"data.train": str(data)}
    assert run(folders["gemma3"], tmp_path / "run", make_flags, changes) == 2
    assert re.search(r"data.jsonl.*stands for a picture", capsys.readouterr().err)


def test_what_is_not_supported_is_refused_by_name(folders):
    config = json.loads((folders["gemma3"] / "config.json").read_text())
    for changes, text in (
        ({"text_config": None}, "without an object text_config.*set model_type to gemma3_text"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "only Gemma3ForConditionalGen"),
        ({"text_config": {"model_type": "llama"}}, "'llama' is not supported in gemma3, only"),
        ({"tie_word_embeddings": 3}, "tie_word_embeddings=3; expected true or false"),
        ({"text_config": {**TEXTS["gemma3"], "head_dim": 7}}, "head_dim=7 is odd"),
    ):
        with pytest.raises(UserError, match=text):
            registry.read_decoder({**config, **changes})
    text = {"model_type": "mistral", "layer_types": None}
    with pytest.raises(UserError, match="without layer_types"):
        registry.read_decoder({"model_type": "mistral3", "text_config": text})
    with pytest.raises(UserError, match="no sequence classifier for Gemma3ForConditional"):
        open_classifier(str(folders["gemma3"]), labels=("a", "b"))
    with pytest.raises(UserError, match="give a model of texts alone"):
        open_folder(str(folders["gemma3"]))
