"""The traps of GPT-OSS, S1 to S6, one by one, and the shapes of its published sizes."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.nn.gated import Clamp, clamped
from jaxft.weights import rules
from tests.families import GPT_OSS, Pair, jit, logits, tokens

OPENAI = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 32,
    "num_hidden_layers": 24,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "initial_context_length": 4096,
    "experts_per_token": 4,
    "swiglu_limit": 7.0,
    "router_aux_loss_coef": 0.9,
    "eos_token_id": 200002,
    "pad_token_id": 199999,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory, one_thread):
    return Pair("gpt_oss", tmp_path_factory.mktemp("model"))


def ours(model, ids):
    return np.asarray(jit(lambda m: m.logits(m.hidden(ids, unroll=1)[0]))(model))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers.self_attn.sinks", 1.0),  # S1
        ("layers.mlp.router.bias", [0.5, 0, 0, 0, -0.5]),  # S4
        ("layers.mlp.experts.down_proj.bias", 0.3),  # S2
        ("layers.self_attn.o_proj.bias", 0.3),  # S5
    ],
)
def test_s1_s2_s4_s5_each_part_changes_the_logits_as_theirs(name, value, pair):
    """More of one parameter, on both sides."""
    ids, leaf = tokens(2, 40), pair.leaves[name]
    step = np.broadcast_to(np.float32(value), leaf.shape)
    (entry,) = (one for one in pair.part.entries(pair.leaves) if one.path == name)
    state = dict(pair.theirs.named_parameters())
    before = logits(pair.theirs, ids)
    changed = {key: torch.tensor(step[i]) for i, key in enumerate(entry.keys)}
    with torch.no_grad():
        for key, more in changed.items():
            state[key] += more
    want = logits(pair.theirs, ids)
    with torch.no_grad():
        for key, more in changed.items():
            state[key] -= more
    params = {**pair.params, name: pair.params[name] + step}
    got = ours(P.bind(pair.template, params), ids)
    assert np.abs(want - before).max() > 0.02
    np.testing.assert_allclose(got, want, atol=5e-5)


def test_s2_gate_and_up_are_alternating_columns(pair):
    key = "model.layers.3.mlp.experts.gate_up_proj"
    (entry,) = (one for one in pair.part.entries(pair.leaves) if key in one.keys)
    kernel = np.asarray(pair.params[entry.path])[3]  # [E, D, 2, F]
    fused = pair.theirs.get_parameter(key).detach().numpy()
    np.testing.assert_array_equal(kernel[:, :, 0], fused[..., ::2])
    np.testing.assert_array_equal(kernel[:, :, 1], fused[..., 1::2])
    back = rules.to_torch(kernel, entry.layout, pair.part.sizes)
    np.testing.assert_array_equal(back, fused)


def test_s3_slope_and_limit_are_those_of_the_file_or_of_the_class():
    config = {"model_type": "gpt_oss", **GPT_OSS}
    assert registry.read_decoder(config).layers[0].experts.clamp == Clamp(1.702, 7.0)
    made = registry.read_decoder({**config, "swiglu_alpha": 1.0, "swiglu_limit": 3.0})
    assert made.layers[0].experts.clamp == Clamp(1.0, 3.0)
    with pytest.raises(UserError, match="swiglu_limit=0 leaves nothing of gate and up"):
        registry.read_decoder({**config, "swiglu_limit": 0})


def test_c4_the_first_of_two_layers_slides_and_windows_are_read():
    windows = [layer.window for layer in registry.read_decoder(OPENAI).layers]
    assert windows == [128, None] * 12
    types = ["full_attention", "sliding_attention"] * 12
    other = registry.read_decoder({**OPENAI, "layer_types": types, "sliding_window": 9})
    assert [layer.window for layer in other.layers] == [None, 9] * 12
    assert all(layer.sinks and layer.experts.fused for layer in other.layers)


@pytest.mark.parametrize(
    "rope", ["published", "absent", {"rope_parameters": {}}, {"rope_parameters": None}]
)
def test_s6_frequencies_are_transformers(rope, tmp_path):
    config = dict(OPENAI)
    if rope != "published":
        del config["rope_theta"], config["rope_scaling"]
        config |= {} if rope == "absent" else rope
    (found,) = registry.read_decoder(config).ropes
    small = {
        **copy.deepcopy(config),
        "num_hidden_layers": 1,
        "num_local_experts": 4,
        "vocab_size": 8,
    }
    small |= {"pad_token_id": None, "hidden_size": 8, "intermediate_size": 8}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small)).model.rotary_emb
    np.testing.assert_allclose(found.inv_freq, theirs.inv_freq.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.scale, theirs.attention_scaling, rtol=1e-7)
    whole = rope == {"rope_parameters": {}}
    assert found.scale == pytest.approx(1.0 if whole else 0.1 * np.log(32) + 1)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 20_914_757_184),
        ({"num_hidden_layers": 36, "num_local_experts": 128}, 116_829_156_672),
    ],
)
def test_the_published_sizes_are_transformers(changes, parameters):
    """Names and shapes, on torch's meta device. Nothing is allocated."""
    config = {**OPENAI, **changes}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).state_dict()
    architecture, cfg = registry.find(config, "decoder"), registry.read_decoder(config)
    template = jax.eval_shape(lambda key: architecture.module(cfg, key=key), jax.random.key(0))
    leaves, table = P.describe(template), architecture.rules(cfg)
    shapes = {key: tuple(one.shape) for key, one in theirs.items()}
    entries = rules.plan(table, leaves, shapes, architecture.sizes(cfg))
    assert {key for entry in entries for key in entry.keys} == shapes.keys()
    assert sum(one.numel() for one in theirs.values()) == parameters
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == parameters
    assert cfg.router_loss == 0.9 and cfg.eos_ids == (200002,) and cfg.norm == "scale_first"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_experts_per_tok": 33}, "num_experts_per_tok=33, but there are 32 experts"),
        ({"num_experts": 8, "num_local_experts": 9}, "two numbers of experts"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"head_dim": None}, "head_dim is null"),
        ({"rope_parameters": {"rope_type": "ntk"}, "rope_scaling": None}, "rope type 'ntk'"),
        ({"architectures": ["GptOssForTokenClassification"]}, "is not a causal language"),
    ],
)
def test_what_no_layer_computes_is_refused(changes, text):
    with pytest.raises(UserError, match=text) as caught:
        registry.read_decoder({**OPENAI, **changes})
    assert "\n" not in str(caught.value)


def test_the_clamp_has_the_derivatives_of_torch():
    random = np.random.default_rng(0)
    gate, up, slope = (3 * random.normal(size=(3, 40)).astype(np.float32) for _ in range(3))
    inputs = [torch.tensor(one, requires_grad=True) for one in (gate, up)]
    low, high = inputs[0].clamp(max=2.0), inputs[1].clamp(-2.0, 2.0)
    want = (high + 1) * low * torch.sigmoid(1.702 * low)
    (want * torch.tensor(slope)).sum().backward()
    got, vjp = jax.vjp(lambda a, b: clamped(a, b, Clamp(1.702, 2.0)), gate, up)
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)
    for mine, theirs in zip(vjp(jnp.asarray(slope)), inputs, strict=True):
        np.testing.assert_allclose(mine, theirs.grad.numpy(), atol=1e-5)
