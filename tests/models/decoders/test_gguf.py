"""What a GGUF file says of an architecture. tests/tasks/llm/test_gguf.py runs llama.cpp on it."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.models.decoders.gguf import gguf_architecture, model_metadata, rope_factors

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

UNEVEN = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
OSS = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 128}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}


def opened(kind, **changes):
    config = {"model_type": kind, **SIZES, **changes}
    return config, registry.find(config, "decoder").config(config, "config.json")


def test_the_keys_of_a_llama():
    assert model_metadata(*opened("llama", rope_theta=5e5)) == {
        "llama.block_count": 4,
        "llama.context_length": 4096,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 5e5,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.vocab_size": 320,
        "llama.rope.dimension_count": 16,
    }


def test_a_window_ends_the_context_and_a_head_dim_is_stated():
    made = model_metadata(*opened("mistral", sliding_window=128, head_dim=32))
    assert made["llama.context_length"] == 128 and made["llama.rope.dimension_count"] == 32
    assert made["llama.attention.key_length"] == made["llama.attention.value_length"] == 32
    assert model_metadata(*opened("qwen3"))["qwen3.rope.dimension_count"] == 128


@pytest.mark.parametrize("old", [True, False])
def test_scaled_ropes(old):
    def keys(**rope):
        theta = rope.pop("rope_theta", 1e4)
        given = {"rope_theta": theta, "rope_scaling": rope}
        made = given if old else {"rope_parameters": {"rope_theta": theta, **rope}}
        found = model_metadata(*opened("llama", **made))
        assert found["llama.rope.freq_base"] == theta
        return {x.removeprefix("llama.rope."): y for x, y in found.items() if "scaling" in x}

    assert keys(rope_type="linear", factor=2.0, rope_theta=7e4) == {
        "scaling.type": "linear",
        "scaling.factor": 2.0,
    }
    assert keys(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024) == {
        "scaling.type": "yarn",
        "scaling.factor": 4.0,
        "scaling.original_context_length": 1024,
    }
    assert keys(**LLAMA3) == {}


def test_divisors_of_llama_3_1():
    assert rope_factors(*opened("llama")) == {}
    (made,) = rope_factors(*opened("llama", rope_parameters=LLAMA3)).values()
    reference = LlamaConfig(**SIZES, rope_parameters=LLAMA3)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](reference, "cpu")[0].numpy()
    np.testing.assert_allclose(made, 5e5 ** (-np.arange(0, 16, 2) / 16) / scaled, rtol=1e-6)
    assert made.dtype == np.float32 and made.max() > 31


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("ministral", {"head_dim": 16}, "model_type='ministral'"),
        (
            "gemma2",
            {"final_logit_softcapping": None},
            r"logits_soft_cap=None \(but 30.0\) is",
        ),
        ("gemma2", {"attn_logit_softcapping": None}, r"soft_cap=None \(but 50.0\)"),
        ("gemma2", {"query_pre_attn_scalar": 64}, r"attention_scale=0.125 \(but 0.0625\)"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings=false is not in"),
        ("gemma3_text", {"layer_types": UNEVEN, "sliding_window": 64}, r"window=64 \(but None\)"),
        ("gemma2", {"layer_types": ["sliding_attention"] * 4}, "a window in every layer is not in"),
        ("gemma3_text", {"attention_bias": True}, "qkv_bias, o_bias, a window in every"),
        ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings=true"),
        ("olmo2", {"head_dim": 32}, "head_dim=32 is not in llama.cpp's olmo2"),
        ("olmo3", {"rope_theta": 1e4}, "rope type 'default' of {'rope_theta': 10000.0"),
        ("phi3", {"head_dim": 32}, "head_dim=32"),
        ("granite", {"attention_multiplier": 0.0}, "granite.attention.scale is 0.0"),
        ("granite", {"rope_parameters": LONG}, "rope scaling 'longrope'"),
        ("qwen3_moe", {"num_experts_per_tok": 2}, "experts=.*normalised=False.*normalised=True"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "experts=.*limit=5.0.*limit=7.0"),
        ("gpt_oss", {"rope_parameters": {**OSS, "truncate": True}}, "rope type 'yarn'"),
        ("mixtral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("qwen3", {"attention_bias": True}, "qkv_bias, o_bias"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "other layers without rope"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope type 'llama3'"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0}},
            "'beta_fast': 16.0",
        ),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)
def test_others_are_refused_by_name(kind, changes, words):
    with pytest.raises(UserError, match=f"^export.kind='gguf'.*{words}"):
        gguf_architecture(*opened(kind, **changes))


def test_biases_and_layers_without_rope_that_llama_cpp_has():
    for kind, changes in (("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {})):
        assert gguf_architecture(*opened(kind, **changes)).name == kind
    assert gguf_architecture(*opened("smollm3")).name == "smollm3"


@pytest.mark.parametrize(
    ("kind", "changes", "keys"),
    [
        (
            "gemma3_text",
            {"head_dim": 16, "query_pre_attn_scalar": 16, "rope_local_base_freq": 1e3}
            | {"sliding_window_pattern": 3},
            {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e3, "attention.sliding_window": 4096}
            | {"attention.sliding_window_pattern": 3, "final_logit_softcapping": None},
        ),
        (
            "gemma2",
            {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
            {"attention.sliding_window_pattern": 4, "attn_logit_softcapping": 50.0},
        ),
        (
            "phi3",
            {"rope_parameters": LONG, "original_max_position_embeddings": 1024},
            {"rope.scaling.original_context_length": 1024, "rope.scaling.attn_factor": 1.0488088},
        ),
        (
            "granite",
            {"logits_scaling": 8.0},
            {"logit_scale": 8.0, "attention.scale": 1.0, "embedding_scale": 1.0},
        ),
        (
            "mixtral",
            {"num_local_experts": 4},
            {"expert_count": 4, "expert_used_count": 2, "feed_forward_length": 96},
        ),
        (
            "ministral3",
            {"max_position_embeddings": 262144},
            {"attention.temperature_scale": 0.1, "rope.scaling.yarn_log_multiplier": 1.0}
            | {"rope.scaling.attn_factor": None, "attention.key_length": 128},
        ),
        (
            "olmo3",
            {"rope_scaling": {**OSS, "attention_factor": 2.0}},
            {"rope.scaling.attn_factor": 2.0 / (0.1 * np.log(32) + 1)},
        ),
        (
            "gpt_oss",
            {},
            {"expert_feed_forward_length": 96, "attention.sliding_window": 128}
            | {"rope.scaling.factor": 32.0, "attention.sliding_window_pattern": 2},
        ),
    ],
)
def test_keys_of_other_families(kind, changes, keys):
    name = gguf_architecture(*opened(kind, **changes)).name
    made = model_metadata(*opened(kind, **changes))
    for key, value in keys.items():
        assert made.get(f"{name}.{key}") == (value and pytest.approx(value)), key
