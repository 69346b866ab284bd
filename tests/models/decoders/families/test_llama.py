"""Each key of config.json against transformers' own classes: absent, null, of a wrong type."""

import itertools
import json

import pytest

from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.models.decoders.config import COMMON
from jaxft.models.decoders.families import (
    gemma,
    gpt_oss,
    granite,
    llama,
    mixtral,
    olmo,
    phi,
    qwen,
    wrapped,
)
from tests.stock_llama import ours, theirs

FAMILIES = (llama, qwen, granite, gemma, olmo, phi, mixtral, gpt_oss)
KEYS = {kind: keys for family in FAMILIES for kind, keys in family.KEYS.items()}
ROPE = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
ALL = sorted({*ROPE, *itertools.chain.from_iterable(KEYS.values()), "architectures", "dtype"})
TINY = {
    "num_hidden_layers": 6,  # one full layer of Gemma 3 too
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 130,
    "pad_token_id": 3,
}


@pytest.mark.parametrize("kind", KEYS)
def test_null_is_what_the_class_makes_of_it_or_is_refused_by_name(kind):
    """Either the effective values are equal for every key, or both sides refuse the null."""
    refused = []
    for key in ALL:
        config = {"model_type": kind, **TINY, "head_dim": 16, key: None}
        if key == "layer_types" and kind == "mistral":
            continue  # AutoConfig takes another class: test_llama_layers has it
        try:
            want = theirs(config)
        except Exception:
            with pytest.raises(UserError, match=rf"{key}( is |=)null"):
                registry.read_decoder(config)
            refused.append(key)
        else:
            assert ours(config) == want, key
    assert {"vocab_size", "tie_word_embeddings"} <= set(refused)
    assert ("rope_theta" in refused) == (kind != "ministral3"), "its default rope has a theta"
    assert len(refused) < len(ALL) - 8


@pytest.mark.parametrize("kind", KEYS)
def test_absent_keys_are_those_of_the_class(kind):
    config = {"model_type": kind, "num_hidden_layers": 2}
    if kind == "ministral":  # transformers cannot build one without
        config["head_dim"] = 128
    assert ours(config) == theirs(config)


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("wrong", ["text", -1, 1.5, {"a": 1}, [None], True])
def test_a_wrong_type_is_one_line(kind, wrong):
    for key in {*KEYS[kind], *ROPE}:
        try:
            registry.read_decoder({"model_type": kind, **TINY, key: wrong})
        except UserError as error:
            assert "\n" not in str(error) and key.split("_")[0] in str(error), key


def test_case_llm_17_base_and_other_architectures():
    names = registry.class_names("decoder")
    for kind, causal in zip(registry.MODEL_TYPES["decoder"], names, strict=True):
        if kind in wrapped.CLASSES:
            continue  # test_wrapped has them
        assert kind in KEYS
        for name in (causal.replace("ForCausalLM", "Model"), causal):
            registry.read_decoder({"model_type": kind, **TINY, "architectures": [name]})
        other = [causal.replace("CausalLM", "SequenceClassification")]
        with pytest.raises(UserError, match=r"SequenceClassification.*supported are Llama"):
            registry.read_decoder({"model_type": kind, **TINY, "architectures": other})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": False}, "is_causal=false lets tokens"),
        ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config is not supported"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        registry.read_decoder({"model_type": "llama", **TINY, **changes})


def test_the_table_names_values_that_json_has():
    for keys in KEYS.values():
        assert set(COMMON) <= set(keys)
        json.dumps({name: key.default for name, key in keys.items()})
