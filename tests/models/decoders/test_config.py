"""config.json to DecoderConfig: defaults and layer patterns of transformers, one-line errors."""

import dataclasses

import pytest
from transformers import AutoConfig

from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.models.decoders.config import LayerSpec, layer_scans
from jaxft.models.decoders.families import gemma, granite, llama, mixtral, olmo, phi, qwen

FAMILIES = (llama, qwen, granite, gemma, olmo, phi, mixtral)
KEYS = {kind: keys for family in FAMILIES for kind, keys in family.KEYS.items()}
F, S = LayerSpec(), LayerSpec(window=4)


@pytest.mark.parametrize("kind", KEYS)
def test_absent_keys_take_the_defaults_of_transformers(kind):
    theirs, ours = AutoConfig.for_model(kind), registry.read_decoder({"model_type": kind})
    for name, value in {
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.hidden_size,
        "intermediate_size": ours.intermediate_size,
        "num_hidden_layers": ours.num_layers,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.num_kv_heads,
        "max_position_embeddings": ours.max_positions,
        "rms_norm_eps": ours.rms_norm_eps,
        "initializer_range": ours.initializer_range,
        "tie_word_embeddings": ours.tied,
        "bos_token_id": ours.bos_id,
        "pad_token_id": ours.pad_id,
    }.items():
        assert getattr(theirs, name) == value, name
    eos = theirs.eos_token_id
    assert ours.eos_ids == (() if eos is None else (eos,))
    derived = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or derived)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 7}, [7] * 6),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 6),
        ({"model_type": "qwen2", "sliding_window": 7}, [None] * 6),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}, [None] * 6),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 4,
            },
            [None] * 4 + [7] * 2,
        ),
        (
            {"model_type": "smollm3", "sliding_window": 7, "use_sliding_window": True},
            [None] * 3 + [7] + [None] * 2,
        ),
        (
            {
                "model_type": "smollm3",
                "sliding_window": 7,
                "layer_types": ["sliding_attention"] + ["full_attention"] * 5,
            },
            [7] + [None] * 5,
        ),
    ],
)
def test_windows_by_layer(config, windows):
    layers = registry.read_decoder({"num_hidden_layers": 6, **config}).layers
    assert [layer.window for layer in layers] == windows


def test_nope_layers_and_several_eos_ids():
    base = {"model_type": "smollm3", "num_hidden_layers": 6, "eos_token_id": [5, 6]}
    cfg = registry.read_decoder({**base, "no_rope_layer_interval": 3})
    assert [layer.rope for layer in cfg.layers] == [0, 0, None] * 2 and cfg.eos_ids == (5, 6)
    listed = registry.read_decoder({**base, "no_rope_layers": [1, 0, 1, 1, 0, 1, 1, 1]})
    assert [layer.rope for layer in listed.layers] == [0, None, 0, 0, None, 0]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "model_type=None.*llama, mistral, ministral, ministral3, mistral3, qwen2"),
        ({"model_type": "gemma4_text"}, "model_type='gemma4_text'.*gemma3_text"),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification.*supported are LlamaForCausalLM",
        ),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
        ({"model_type": "llama", "hidden_size": 100}, "hidden_size=100 is not a multiple.*=32"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "=32 is not a multiple.*=5"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "1 entries for 32 layers"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32}, "not set"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 32}, "chunked_attention"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic"}}, "dynamic"),
    ],
)
def test_what_is_not_supported_says_so_in_one_line(config, text):
    with pytest.raises(UserError, match=text) as caught:
        registry.read_decoder(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "scans"),
    [
        ([F] * 32, [(0, [F], 32)]),
        ([F], [(0, [F], 1)]),
        ([S, F] * 3, [(0, [S, F], 3)]),
        (([S] * 5 + [F]) * 5 + [S] * 2, [(0, [S] * 5 + [F], 5), (30, [S], 2)]),
        ([F] * 20 + [S] * 12, [(0, [F], 20), (20, [S], 12)]),
        ([F, F, S, S], [(0, [F, F, S, S], 1)]),
        ([F] * 9 + [S, F] * 3, [(0, [F], 9), (9, [S, F], 3)]),
    ],
    ids=["equal", "one", "alternating", "5:1 and a rest", "from a layer on", "short", "both"],
)
def test_layers_are_cut_into_scans_of_a_period(layers, scans):
    found = layer_scans(tuple(layers))
    assert [(one.start, list(one.period), one.times) for one in found] == scans
    assert [spec for one in found for spec in one.period * one.times] == layers


def test_layers_of_two_shapes_are_no_config():
    layers = (LayerSpec(), LayerSpec(norms="post"))
    cfg = registry.read_decoder({"model_type": "llama"})
    with pytest.raises(ValueError, match="layers with different norms"):
        dataclasses.replace(cfg, layers=layers)
