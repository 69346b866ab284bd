"""config.json from metadata alone. Values that a file has to have are in test_gguf.py."""

import math

import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf_architectures import GGUF_ARCHITECTURES
from jaxft.weights.files.gguf_config import Metadata, model_config, shortest

ENTRIES = {one.class_name: one for one in GGUF_ARCHITECTURES}
SIZES = {
    "block_count": 7,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    "rope.freq_base": 1e5,
}
EXPERTS = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32}
SCALES = {"attention.scale": 0.1, "logit_scale": 4.0}


def config(name, factors=None, keys=(), **values):
    named = {key.replace("__", "."): value for key, value in values.items()}
    return read(name, {**SIZES, **named}, factors, keys)


def read(name, values, factors=None, keys=()):
    entry = ENTRIES[name]
    stated = {f"{entry.name}.{key}": value for key, value in values.items()}
    return model_config(Metadata("m.gguf", entry, stated), keys, 320, factors or {})


def full(kinds):
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


@pytest.mark.parametrize(
    ("name", "more", "found"),
    [
        ("Gemma2", {}, [1, 3, 5]),
        ("Gemma2", {"attention.sliding_window_pattern": 3}, [2, 5]),
        ("Gemma3", {"attention.sliding_window": 9}, [5]),
        ("Gemma3", {}, [*range(7)]),
        ("Gemma3", {"attention.sliding_window": 9, "attention.sliding_window_pattern": 0}, []),
        ("Olmo3", {"attention.sliding_window": 9}, [3]),
        (
            "Olmo3",
            {
                "attention.sliding_window": 9,
                "attention.sliding_window_pattern": [True, True, False] * 3,
            },
            [2, 5],
        ),
        ("GptOss", {"attention.sliding_window": 9, **EXPERTS}, [1, 3, 5]),
    ],
)
def test_patterns_of_windows(name, more, found):
    made = read(name, {**SIZES, **more})
    assert full(made["layer_types"]) == found and len(made["layer_types"]) == 7
    window = 4096 if name == "Gemma2" else more.get("attention.sliding_window")
    assert made["sliding_window"] == window


def test_gemma_has_two_ropes_and_scales_queries_by_its_size():
    made = config("Gemma3", rope__scaling__type="linear", rope__scaling__factor=8.0)
    full, sliding = made["rope_parameters"].values()
    assert full == {"rope_theta": 1e5, "rope_type": "linear", "factor": 8.0}
    assert sliding == {"rope_theta": 1e4, "rope_type": "default"}
    assert made["rope_local_base_freq"] == 1e4 and made["rope_scaling"]["factor"] == 8.0
    sizes = {"attention__key_length": 32, "attention__value_length": 32}
    assert config("Gemma3", **sizes)["query_pre_attn_scalar"] == 32
    assert config("Gemma3", block_count=62, **sizes)["query_pre_attn_scalar"] == 16
    caps = config("Gemma2")
    assert (caps["attn_logit_softcapping"], caps["final_logit_softcapping"]) == (50.0, 30.0)


def test_longrope_is_read_from_its_tensors():
    factors = {
        "rope_factors_long.weight": np.array([1, 1, 2, 2.5, 8, 8.1], np.float32),
        "rope_factors_short.weight": np.array([1, 1, 1.1, 1.1, 1.2, 1.2], np.float32),
    }
    own = math.sqrt(1 + math.log(8) / math.log(64))
    settings = {"rope__scaling__original_context_length": 64, "rope__dimension_count": 12}
    made = config("Phi3", factors, rope__scaling__attn_factor=float(np.float32(own)), **settings)
    rope = made["rope_parameters"]
    assert rope["short_factor"] == [1.0, 1.0, 1.1, 1.1, 1.2, 1.2]
    assert rope["long_factor"] == [1.0, 1.0, 2.0, 2.5, 8.0, 8.1]
    assert "attention_factor" not in rope and made["partial_rotary_factor"] == 0.75
    assert made["original_max_position_embeddings"] == 64
    other = config("Phi3", factors, rope__scaling__attn_factor=1.5, **settings)
    assert other["rope_parameters"]["attention_factor"] == 1.5
    for shape in ((2, 3), (3,)):
        wrong = {**factors, "rope_factors_long.weight": np.ones(shape, np.float32)}
        with pytest.raises(UserError, match=r"m.gguf: tensor rope_factors_long.* 6 frequencies"):
            config("Phi3", wrong, **settings)
    del factors["rope_factors_long.weight"]
    with pytest.raises(UserError, match=r"m.gguf: tensor rope_factors_long.weight is missing"):
        config("Phi3", factors, **settings)


def test_yarn_of_each_family():
    yarn = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 16.0,
        "rope__scaling__original_context_length": 32,
    }
    dense = config("Llama", **yarn, rope__scaling__attn_factor=0.5)["rope_parameters"]
    assert dense["attention_factor"] == pytest.approx(0.5 * (0.1 * math.log(16) + 1))
    large = {"attention__temperature_scale": 0.25, "rope__scaling__yarn_log_multiplier": 1.0}
    rope = config("Ministral3", **yarn, **large)["rope_parameters"]
    assert (rope["llama_4_scaling_beta"], rope["mscale"], rope["mscale_all_dim"]) == (0.25, 1, 1)
    gpt = read("GptOss", {**SIZES, **EXPERTS, "attention.sliding_window": 9} | dotted(yarn))
    assert gpt["rope_parameters"]["truncate"] is False


def dotted(values):
    return {key.replace("__", "."): value for key, value in values.items()}


def test_experts_and_multipliers():
    made = config("Qwen3Moe", **EXPERTS)
    assert made["num_experts"] == made["num_local_experts"] == 8 and made["norm_topk_prob"]
    assert made["moe_intermediate_size"] == 32 and made["num_experts_per_tok"] == 2
    made = config("Granite", **dotted({}), attention__scale=0.1, logit_scale=4.0)
    assert (made["attention_multiplier"], made["logits_scaling"]) == (0.1, 4.0)
    assert made["embedding_multiplier"] == made["residual_multiplier"] == 1.0
    bias = config("Granite", keys=["model.layers.0.self_attn.q_proj.bias"], **UNDERSCORED)
    assert bias["attention_bias"] and not bias["mlp_bias"]


UNDERSCORED = {key.replace(".", "__"): value for key, value in SCALES.items()}


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("Granite", {}, "granite.attention.scale is None; expected one positive number"),
        ("Qwen3Moe", {"expert_used_count": 2}, "qwen3moe.expert_count is None"),
        ("Gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
        ("Gemma3", {"attention.sliding_window": -1}, "sliding_window is -1; expected one positive"),
        ("Gemma2", {"attention.sliding_window_pattern": [True]}, "is no number or list of 7"),
        ("Olmo2", {"rope.dimension_count": 8}, "rotates a part of each head only"),
        ("Phi3", {"rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ("Gemma2", {"block_count": 2**30}, "gemma2.block_count is above"),
    ],
)
def test_wrong_values_are_named(name, values, words):
    with pytest.raises(UserError, match=f"^m.gguf: .*{words}"):
        read(name, {**SIZES, **values})


@pytest.mark.parametrize("rotated", [2, 58, 90, 94, 96])
def test_the_part_of_a_head_that_rotates_is_exact(rotated):
    sizes = {"attention__key_length": 96, "rope__dimension_count": rotated}
    assert int(96 * config("Phi3", **sizes)["partial_rotary_factor"]) == rotated


def test_numbers_are_the_shortest_of_their_float32():
    assert shortest(float(np.float32(1e-6))) == 1e-6 == config("Llama")["rms_norm_eps"]
