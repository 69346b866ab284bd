"""Layer patterns and rope kinds of config.json: logits are AutoModelForCausalLM's, or refused.

Rows are longer than each window and than each rope's original length, where kinds differ.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.families import llama
from jaxft.models.decoders.generation.generate import generate
from jaxft.models.decoders.generation.sampling import Sampling
from jaxft.weights import rules

LENGTH, WINDOW = 26, 5
S, F = "sliding_attention", "full_attention"
TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 4.0, 7.0]}
CASES = {
    "mistral window": ("mistral", {"sliding_window": WINDOW}),
    "mistral null window": ("mistral", {"sliding_window": None}),
    "mistral layer types": ("mistral", {"sliding_window": WINDOW, "layer_types": [S, F, S, F]}),
    "mistral full types": ("mistral", {"sliding_window": WINDOW, "layer_types": [F] * 4}),
    "mistral null types": ("mistral", {"sliding_window": WINDOW, "layer_types": None}),
    "mistral old names": (
        "mistral",
        {"sliding_window": WINDOW, "layer_types": ["attention", S, "attention", S]},
    ),
    "mistral ignores use_sliding_window": (
        "mistral",
        {"sliding_window": WINDOW, "use_sliding_window": False, "max_window_layers": 4},
    ),
    "ministral": ("ministral", {"sliding_window": WINDOW, "layer_types": [F, S, F, S]}),
    "llama ignores windows": ("llama", {"sliding_window": WINDOW, "use_sliding_window": True}),
    "qwen2 windows": (
        "qwen2",
        {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "qwen2 all windows": (
        "qwen2",
        {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0},
    ),
    "qwen2 types win over max_window_layers": (
        "qwen2",
        {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": [S, F, F, S]},
    ),
    "qwen3 no use": ("qwen3", {"sliding_window": WINDOW, "max_window_layers": 0}),
    "smollm3 every other": (
        "smollm3",
        {"sliding_window": WINDOW, "use_sliding_window": True, "no_rope_layer_interval": 2},
    ),
    "smollm3 types without use": (
        "smollm3",
        {"sliding_window": WINDOW, "layer_types": [S, F, S, F], "no_rope_layers": [0, 1, 1, 1]},
    ),
    "dynamic below": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "dynamic beyond": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 9},
    ),
    "longrope short": (
        "qwen2",
        {"rope_scaling": {"type": "longrope", **FACTORS}, "max_position_embeddings": 64},
    ),
    "longrope long": (
        "mistral",
        {
            "rope_scaling": {
                "rope_type": "longrope",
                **FACTORS,
                "original_max_position_embeddings": 16,
            },
            "max_position_embeddings": 64,
            "sliding_window": None,
        },
    ),
    "swish": ("llama", {"hidden_act": "swish"}),
}


def pair(kind, changes, folder):
    """AutoModelForCausalLM of the config.json, and ours with its weights."""
    config = {"model_type": kind, **TINY, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    cfg = registry.read_decoder(config)
    template = jax.eval_shape(lambda: Decoder(cfg, key=jax.random.key(0)))
    state, made = {k: v.numpy() for k, v in theirs.state_dict().items()}, {}
    shapes, sizes = {k: v.shape for k, v in state.items()}, llama.sizes(cfg)
    leaves = P.describe(template)
    for entry in rules.plan(llama.RULES, leaves, shapes, sizes, llama.ignore(cfg)):
        parts = [rules.to_jax(state[key], entry.layout, sizes) for key in entry.keys]
        made[entry.path] = jnp.asarray(np.stack(parts) if entry.stacked else parts[0])
    return theirs, P.bind(template, made)


def tokens(length=LENGTH):
    return np.random.default_rng(0).integers(3, TINY["vocab_size"], (2, length), np.int32)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_class(case, tmp_path, quick, one_thread):
    theirs, ours = pair(*CASES[case], tmp_path)
    ids = tokens()
    with torch.no_grad():
        want = theirs(torch.tensor(ids).long(), use_cache=False).logits.numpy()
    got = jax.jit(lambda model, ids: model.logits(model.hidden(ids, unroll=1)[0]))(ours, ids)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("case", ["dynamic beyond", "longrope long", "mistral layer types"])
def test_greedy_decoding_crosses_the_limit_as_transformers_does(case, tmp_path, quick, one_thread):
    """Earlier keys keep the frequencies that they were rotated with, as in transformers' cache."""
    theirs, ours = pair(*CASES[case], tmp_path)
    ids = tokens(6)
    want = theirs.generate(
        torch.tensor(ids).long(), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    keys = jax.random.split(jax.random.key(0), 2)
    made, _ = generate(
        ours, ids, np.ones_like(ids), keys, max_new=12, stop_ids=(), how=Sampling(),
        dtype=jnp.float32,
    )  # fmt: skip
    assert np.asarray(made).tolist() == want[:, 6:].tolist()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"layer_types": [S, F, S, F], "sliding_window": 5}, "transformers' llama trains"),
        ("llama", {"layer_types": [F] * 3}, "3 entries for 4 layers"),
        ("mistral", {"layer_types": [S] * 5}, "5 entries for 4 layers"),
        ("mistral", {"layer_types": [S] * 4, "sliding_window": None}, "sliding_window is not set"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 leaves no key"),
        ("mistral", {"layer_types": ["conv"] * 4}, "layer_types has 'conv'"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 4"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0; expected"),
        ("llama", {"rope_scaling": {"type": "su", **FACTORS}}, "rope type 'su'"),
        ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "'mrope'"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5",
        ),
        ("llama", {"rope_scaling": {"type": "dynamic", "alpha": 9.0}}, "needs the key 'factor'"),
        ("qwen3", {"rope_parameters": {F: {"rope_type": "default"}}}, "one setting for all"),
    ],
)
def test_what_the_class_cannot_build_or_contradicts_is_refused(kind, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        registry.read_decoder({"model_type": kind, **TINY, **changes})
    assert "\n" not in str(caught.value)
