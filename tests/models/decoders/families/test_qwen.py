"""What Qwen's config.json says that Llama's does not: windows from a layer on, norms of q and k."""

import pytest

from jaxft.models.decoders.families import llama, qwen

TINY = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}


@pytest.mark.parametrize(("kind", "normed"), [("qwen2", False), ("qwen3", True)])
def test_q_and_k_have_a_norm_or_a_bias(kind, normed):
    cfg = qwen.read({"model_type": kind, **TINY})
    assert {layer.qk_norm for layer in cfg.layers} == {"head" if normed else None}
    assert (cfg.qkv_bias, cfg.o_bias) == (not normed, False)


def test_windows_begin_at_max_window_layers_and_only_where_asked_for():
    asked = {"use_sliding_window": True, "max_window_layers": 3}
    cfg = qwen.read({"model_type": "qwen2", **TINY, **asked})
    assert [layer.window for layer in cfg.layers] == [None, None, None, 8]
    unasked = qwen.read({"model_type": "qwen2", **TINY, "max_window_layers": 3})
    assert [layer.window for layer in unasked.layers] == [None] * 4


def test_tensors_are_those_of_llama():
    assert qwen.ARCHITECTURE.rules is llama.ARCHITECTURE.rules
    assert qwen.ARCHITECTURE.class_name({"model_type": "qwen3"}) == "Qwen3ForCausalLM"
