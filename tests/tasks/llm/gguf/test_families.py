"""Each family: its file read again, by transformers, and by llama.cpp's engine."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

import jaxft
from jaxft.models import registry
from jaxft.models.decoders.files import open_decoder
from jaxft.models.decoders.gguf import text_key
from jaxft.weights.files.gguf import GgufFile
from jaxft.weights.files.gguf_tokenizer import CUTS, WHOLE_PIECES
from tests.tasks.llm.gguf.engine import Engine, exported, logits

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    "tied": True,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 20,
    "hidden_activation": "gelu_pytorch_tanh",
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.7,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.5],
    "long_factor": [1.0, 2.5, 8.0],
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64,
}
MINISTRAL3 = {
    **YARN,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
# llama.cpp rounds the ends of YaRN's ramp, and `truncate` of GPT-OSS is false. With this base both
# ends are beyond the head, where rounding has no effect.
OSS = {**YARN, "rope_theta": 2.0, "truncate": False}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
CASES = [
    ("llama", {"tied": True}),
    ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": None, "head_dim": 16}),
    ("qwen2", {"tied": True}),
    ("qwen3", {"head_dim": 16}),
    ("smollm3", {"num_hidden_layers": 4}),
    ("gemma2", {**GEMMA, "num_hidden_layers": 5, "attn_logit_softcapping": 3.0}),
    (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    (
        "gemma3_text",
        {
            **GEMMA,
            "tied": False,
            "final_logit_softcapping": 4.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    (
        "gemma3_text",
        {**GEMMA, "final_logit_softcapping": 4.0, "layer_types": ["full_attention"] * 2},
    ),
    ("qwen3_moe", {**EXPERTS, "head_dim": 16, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    ("mixtral", EXPERTS),
    ("granite", {**GRANITE, "tied": True, "attention_bias": True}),
    ("granite", {**GRANITE, "rope_parameters": YARN}),
    ("olmo2", {}),
    ("olmo3", {"sliding_window": 20, "num_hidden_layers": 5, "rope_theta": 5e5}),
    ("phi3", {"rope_parameters": LONG, "partial_rotary_factor": 0.75}),
    ("phi3", {"tied": True}),
    ("ministral3", {"rope_parameters": MINISTRAL3, "tied": True}),
    ("gpt_oss", {**EXPERTS, "head_dim": 16, "sliding_window": 20, "rope_parameters": OSS}),
]
WRAPPED = [
    ("gemma3", {**GEMMA, "text_type": "gemma3_text", "num_hidden_layers": 7}),
    ("mistral3", {"text_type": "ministral3", "rope_parameters": MINISTRAL3}),
    ("mistral3", {"text_type": "mistral", "head_dim": 16, "sliding_window": None}),
]
NAMES = [f"{name}{i}" for i, (name, _) in enumerate(CASES)]
pytestmark = pytest.mark.usefixtures("quick", "one_thread")


@pytest.mark.parametrize(("name", "changes"), CASES, ids=NAMES)
def test_our_own_reader_gets_the_same_model_back_bit_for_bit(
    name, changes, family, make_config, tmp_path
):
    folder = family(name, **changes)
    file = exported(make_config, folder, tmp_path / "out")
    before, after = open_decoder(str(folder)), open_decoder(str(file))
    assert set(before.tensors.keys()) == set(after.tensors.keys())
    for key in list(before.tensors.keys()):
        one, other = before.tensors.read(key), after.tensors.read(key)
        assert one.dtype == other.dtype and np.array_equal(one, other), key
        assert after.tensors.info(key) == (other.shape, other.dtype)
    ours, theirs = (
        registry.find(x.config, "decoder").config(x.config, "") for x in (before, after)
    )
    for one, other in zip(ours.ropes, theirs.ropes, strict=True):
        np.testing.assert_allclose(one.inv_freq, other.inv_freq, rtol=1e-6)
        assert one.scale == pytest.approx(other.scale, rel=1e-6)
        assert getattr(one.beyond, "limit", None) == getattr(other.beyond, "limit", None)
    same = {"ropes": ours.ropes, "initializer_range": ours.initializer_range}
    assert replace(theirs, **same) == ours
    read_by_transformers = AutoConfig.for_model(**after.config)
    assert read_by_transformers.model_type == {"mistral": "llama"}.get(name, name)
    text = "Every mistake becomes 12 words."
    tokenizers = [AutoTokenizer.from_pretrained(x.tokenizer_dir()) for x in (before, after)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


# transformers has a reader of these, which leaves out soft-caps, ropes and more: the config is
# that of the folder. Its reader of GPT-OSS looks for other names than llama.cpp's.
THEIRS = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3")
READ = [name for name, kind in zip(NAMES, CASES, strict=True) if kind[0] in THEIRS]


@pytest.mark.parametrize("name", READ)
def test_transformers_reads_the_file(name, family, make_config, tmp_path):
    kind, changes = CASES[NAMES.index(name)]
    folder = family(kind, **changes)
    file = exported(make_config, folder, tmp_path / "out")
    config = AutoConfig.from_pretrained(folder)
    np.testing.assert_allclose(logits(file.parent, file, config), logits(folder), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [*CASES, *WRAPPED, ("llama", {"rope_parameters": YARN})],
    ids=[*NAMES, "pictures0", "pictures1", "pictures2", "yarn"],
)
def test_llama_cpp_computes_the_same(name, changes, family, make_config, tmp_path):
    folder = family(name, **changes)
    engine, tokens = Engine(exported(make_config, folder, tmp_path / "out")), np.arange(3, 160)
    ours = np.asarray(jax.nn.log_softmax(jaxft.load(str(folder))(tokens[None])[0]))
    np.testing.assert_allclose(engine.logprobs(tokens), ours, rtol=0, atol=0.02)


TEXTS = [
    "Every mistake becomes 12 words.",
    "aBcDE HTMLParser 12345/\n/ it'S",
    "  two  spaces\n\n\tand I'LL 2023!",
    "<|im_end|>a",
]


@pytest.mark.parametrize(("name", "changes"), WRAPPED)
def test_the_texts_of_a_model_of_pictures(name, changes, family, make_config, tmp_path):
    folder = family(name, **changes)
    file = exported(make_config, folder, tmp_path / "out")
    before, after = open_decoder(str(folder)).tensors, open_decoder(str(file)).tensors
    keys = {text_key(key): key for key in before.keys()}  # noqa: SIM118
    missing = keys.keys() - set(after.keys())
    assert missing and all("vision" in key or "projector" in key for key in missing)
    for key in list(after.keys()):
        assert np.array_equal(before.read(keys[key]), after.read(key)), key
    tokens = np.arange(3, 60)[None]
    ours, theirs = (np.asarray(jaxft.load(str(x))(tokens)) for x in (folder, file))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [name for name in CUTS if name != "default"])
def test_llama_cpp_cuts_texts_alike(cut, family, make_config, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(family("llama"), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    cuts = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in CUTS[cut]
    ]
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cuts.append({**whole, "use_regex": False})
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": cuts}
    content["model"]["ignore_merges"] = cut in WHOLE_PIECES
    (folder / "tokenizer.json").write_text(json.dumps(content))
    file, tokenizer = (
        exported(make_config, folder, tmp_path / "out"),
        AutoTokenizer.from_pretrained(folder),
    )
    assert GgufFile(file).metadata["tokenizer.ggml.pre"] == cut
    engine = Engine(file)
    for text in TEXTS:
        found = engine.vocab.tokenize(text, add_special=True, parse_special=True)
        assert list(found) == tokenizer(text)["input_ids"], text
