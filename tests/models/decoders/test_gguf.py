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
    assert rope_factors(*opened("llama")) is None
    made = rope_factors(*opened("llama", rope_parameters=LLAMA3))
    reference = LlamaConfig(**SIZES, rope_parameters=LLAMA3)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](reference, "cpu")[0].numpy()
    np.testing.assert_allclose(made, 5e5 ** (-np.arange(0, 16, 2) / 16) / scaled, rtol=1e-6)
    assert made.dtype == np.float32 and made.max() > 31


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("granite", {}, "model_type='granite'"),
        ("gemma2", {}, "model_type='gemma2'"),
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
    assert gguf_architecture(*opened("llama", attention_bias=True, mlp_bias=True)) == "llama"
    assert gguf_architecture(*opened("qwen2")) == "qwen2"
    assert gguf_architecture(*opened("smollm3")) == "smollm3"
