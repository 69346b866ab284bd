"""Names and tied tables of a language model's files, against what transformers loads from them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM

from jaxft import load, sample, train
from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.models import registry
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.files import as_decoder, open_decoder, with_prefix
from jaxft.models.decoders.generation.generate import generate
from jaxft.models.decoders.generation.sampling import Sampling
from jaxft.tasks.image_tokens.opened import open_model
from jaxft.tasks.image_tokens.options import ImageTokenOptions, TokenSample
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders.transformers import HEAD, TABLE, open_source
from tests.tiny_autoencoders import make_vqmodel

IDS = np.array([[5, 9, 60, 70, 80, 90, 100]], np.int32)


def theirs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS).long()).logits.numpy()


def ours(folder):
    return np.asarray(load(str(folder), "float32")(jnp.asarray(IDS)))


def without_prefix(tensors):
    return {key.removeprefix("model."): value for key, value in tensors.items()}


def with_head(tensors, change):
    return {**tensors, HEAD: change(tensors[TABLE])}


def only_head(tensors):
    return {HEAD: tensors.pop(TABLE), **tensors}


def other(table):
    torch.manual_seed(7)
    return torch.randn_like(table) * 0.2


SPELLINGS = {
    "equal head": lambda t: with_head(t, torch.clone),
    "equal head of another dtype": lambda t: with_head(t, lambda x: x.double()),
    "another head": lambda t: with_head(t, other),
    "another head of another dtype": lambda t: with_head(t, lambda x: other(x).bfloat16()),
    "base model": without_prefix,
    "base model and another head": lambda t: with_head(t, other) and without_prefix(
        with_head(t, other)
    ),
    "only the head": only_head,
    "base model, only the head": lambda t: without_prefix(only_head(t)),
    "twice the prefix": lambda t: {f"model.{key}": value for key, value in t.items()},
    "prefix on the head": lambda t: {**t, "model.lm_head.weight": other(t[TABLE])},
    "frequencies of old files": lambda t: {
        **without_prefix(t), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tied(make_folder):
    return make_folder(tied=True)


def respelled(folder, target, name):
    shutil.copytree(folder, target)
    tensors = SPELLINGS[name](load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", SPELLINGS)
def test_cases_llm_03_and_12_tensors_are_those_that_transformers_loads(name, tied, tmp_path):
    folder = respelled(tied, tmp_path / "model", name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_decoder(str(folder))
    own_head = "another head" in name or name == "prefix on the head"
    assert bool(model.all_tied_weights_keys) is not own_head
    assert source.config["tie_word_embeddings"] is not own_head
    cfg = registry.read_decoder(source.config)
    template = jax.eval_shape(lambda: Decoder(cfg, key=jax.random.key(0)))
    part = registry.find(source.config, "decoder").part(source, cfg)
    entries = part.entries(describe(template))
    names = {key for entry in entries for key in entry.keys}
    state = model.state_dict()
    assert names == set(state) - (set() if own_head else {HEAD})
    for key in names:
        np.testing.assert_array_equal(source.tensors.read(key).astype(np.float32), state[key])


def test_case_llm_12_what_safetensors_save_model_keeps_of_a_tied_model(tied, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tied)
    shutil.copy(tied / "config.json", tmp_path)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert TABLE not in load_file(tmp_path / "model.safetensors")
    tensors = open_decoder(str(tmp_path)).tensors
    assert set(tensors.keys()) == set(load_file(tied / "model.safetensors"))
    np.testing.assert_array_equal(tensors.read(TABLE), model.lm_head.weight.detach().numpy())


@pytest.fixture(scope="module")
def another_head(tied, tmp_path_factory):
    return respelled(tied, tmp_path_factory.mktemp("models") / "model", "another head")


def run(folder, make_flags, workdir, **keys):
    keys = {"total": "2_steps", "batch_size": 8, "every.save": "0_steps", **keys}
    argv = ["--config", "configs/llm.py", "--workdir", str(workdir), *make_flags(folder, keys)]
    assert train.main(argv) == 0
    return workdir / "export"


@pytest.mark.parametrize(
    "keys",
    [
        {"lora.rank": 0, "total": "0_steps"},
        {"lora.rank": 0, "optim.lr": 1e-2},
        {"lora.rank": 2, "optim.lr": 1e-2, "lora.targets": ".*(q_proj|lm_head)"},
    ],
    ids=["untrained", "full", "lora"],
)
def test_case_llm_03_tied_flag_with_a_head_of_its_own(
    keys, another_head, make_flags, tmp_path, quick
):
    """It trains and exports with its own head, under a flag that older libraries read right."""
    export = run(another_head, make_flags, tmp_path / "run", **keys)
    before, after = (load_file(f / "model.safetensors") for f in (another_head, export))
    assert list(after) == list(before)
    assert torch.equal(after[HEAD], before[HEAD]) is (keys.get("total") == "0_steps")
    assert not torch.equal(after[HEAD], after[TABLE])
    assert json.loads((export / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_allclose(ours(export), theirs(export), atol=2e-5)
    if keys.get("total") == "0_steps":
        np.testing.assert_array_equal(theirs(export), theirs(another_head))


def test_case_llm_03_it_samples_as_transformers_does(another_head, quick):
    model, ids = load(str(another_head)).model, IDS[:, :4]
    made, _ = generate(
        model, ids, np.ones_like(ids), jax.random.split(jax.random.key(0), 1), max_new=6,
        stop_ids=(), how=Sampling(), dtype=jnp.float32,
    )  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(another_head, dtype=torch.float32)
    want = stock.generate(
        torch.tensor(ids).long(), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert np.asarray(made).tolist() == want[:, 4:].tolist()


def test_case_llm_03_a_graft_lengthens_both_tables(another_head, tied, tmp_path):
    vq = make_vqmodel(tmp_path / "vq", 16)
    options = ImageTokenOptions(
        resolution=16, cache="x", caption_dropout=0.1, max_caption_tokens=24, graft=str(vq),
        sample=TokenSample((), 3.0),
    )  # fmt: skip
    for folder, is_tied in ((another_head, False), (tied, True)):
        model = open_model(str(folder), options, True, 0)
        rows, infos = model.layout.vocab_size, model.part.tensors.info
        assert rows == 320 + 4 + 16 and model.cfg.tied is is_tied
        assert infos(TABLE)[0][0] == rows
        files = model.side_files(None)
        assert json.loads(files["config.json"])["tie_word_embeddings"] is is_tied
        assert (HEAD in set(model.part.tensors.keys())) is not is_tied
        if not is_tied:
            assert infos(HEAD)[0][0] == rows


def test_case_llm_12_a_base_model_trains_and_is_exported_as_a_causal_one(
    tied, make_flags, tmp_path, quick
):
    folder = respelled(tied, tmp_path / "model", "base model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    export = run(folder, make_flags, tmp_path / "run", **{"lora.rank": 0, "optim.lr": 1e-2})
    assert json.loads((export / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert set(load_file(export / "model.safetensors")) == set(
        load_file(tied / "model.safetensors")
    )
    _, report = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_allclose(ours(export), theirs(export), atol=2e-5)
    argv = ["--workdir", str(tmp_path / "run"), "--prompt=water", "--max_new=2"]
    assert sample.main(argv) == 0


def test_an_untied_base_model_has_no_head(make_folder, tmp_path):
    folder = Path(shutil.copytree(make_folder(), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[HEAD]
    save_file(without_prefix(tensors), folder / "model.safetensors")
    with pytest.raises(UserError, match=r"missing tensor lm_head\.weight: .* base model") as caught:
        load(str(folder), "float32")
    assert "\n" not in str(caught.value)


def test_a_head_of_another_size_is_named(tied, tmp_path):
    folder = Path(shutil.copytree(tied, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, HEAD: tensors[TABLE][:300].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor lm_head\.weight \(300, 32\) gives"):
        load(str(folder), "float32")


def test_two_names_of_one_tensor_and_names_of_other_libraries(tied, tmp_path):
    """transformers takes no other prefix off: what it would leave out is listed."""
    tensors = load_file(tied / "model.safetensors")
    twice = {**tensors, "norm.weight": tensors["model.norm.weight"].clone()}
    save_file(twice, tmp_path / "model.safetensors")
    shutil.copy(tied / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"model\.norm\.weight and norm\.weight are both model\.n"):
        open_decoder(str(tmp_path))
    save_file({f"transformer.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected tensor transformer\.model"):
        load(str(tmp_path), "float32")


def test_a_source_that_needs_nothing_stays_as_it_is(tied):
    source = open_source(str(tied))
    opened = as_decoder(source)
    assert opened.tensors is source.tensors and opened.config == source.config
    assert opened.side_files == source.side_files
    assert with_prefix(source.tensors, lambda key: True, "x") is not source.tensors
    part = registry.find(opened.config, "decoder").part(opened, load(str(tied)).config)
    assert isinstance(part.tensors, TensorFiles)
