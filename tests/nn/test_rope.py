"""Rotary embeddings against transformers' own frequencies and rotation."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxft.core.errors import UserError
from jaxft.nn import rope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES = {
    "absent": {},
    "theta": {"rope_theta": 5e5},
    "v4 linear by `type`": {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "v4 llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "v5 llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "v5 theta inside wins": {
        "rope_theta": 7.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 2e6},
    },
    "v5 theta outside": {
        "rope_theta": 3e5,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
    "both dialects": {
        "rope_scaling": YARN,
        "rope_theta": 1e6,
        "rope_parameters": {**YARN, "rope_theta": 1e6},
    },
    "both, in conflict": {
        "rope_scaling": {**YARN, "rope_theta": 9e5},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 4e5},
    },
    "yarn": {"rope_theta": 1e6, "rope_scaling": YARN},
    "yarn, not truncated": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn betas": {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2}},
    "yarn attention factor": {"rope_scaling": {**YARN, "attention_factor": 1.25}},
    "yarn mscale": {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.9}},
    "yarn original outside": {"rope_scaling": YARN, "original_max_position_embeddings": 4096},
    "yarn original from max": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "dynamic": {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn factor from lengths": {
        "rope_scaling": {**YARN, "factor": None},
        "max_position_embeddings": 131072,
    },
}


@pytest.mark.parametrize("head_dim", [16, 96, 128])
@pytest.mark.parametrize("case", CASES)
def test_t4_frequencies_are_those_of_transformers(case, head_dim):
    config = {"max_position_embeddings": 40960, **CASES[case]}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**_copy(config), head_dim=head_dim))
    ours = rope.from_hf(config, head_dim)
    np.testing.assert_allclose(ours.inv_freq, theirs.inv_freq.numpy(), rtol=3e-7)
    assert ours.scale == pytest.approx(theirs.attention_scaling, rel=1e-12)


LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 3.0},
        LONG,
        {**LONG, "original_max_position_embeddings": 32},
        {**LONG, "factor": 5.0},
        {**LONG, "attention_factor": 1.5},
    ],
)
@pytest.mark.parametrize("last", [7, 31, 32, 63, 64, 200])
def test_case_llm_17_frequencies_of_a_batch_up_to_and_beyond_the_limit(scaling, last):
    config = {"max_position_embeddings": 64, "rope_scaling": scaling, "rope_theta": 5e4}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**_copy(config), head_dim=16))
    positions = np.array([[0, 3], [1, last]], np.int32)
    theirs(torch.zeros(1), torch.tensor(positions).long())
    ours = rope.from_hf(config, 16)
    got = rope.frequencies(ours, jnp.asarray(positions))
    np.testing.assert_allclose(got, theirs.inv_freq.numpy(), rtol=5e-7)
    assert ours.scale == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_default_theta_is_the_callers():
    assert rope.from_hf({}, 8, 2e6) == rope.from_hf({"rope_theta": 2e6}, 8)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "'su'.*default, linear, dynamic, llama3"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope.*needs the key 'short_factor'"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": []}},
            "short_factor has 1 numbers; expected 32",
        ),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor=null; expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'factor="2"; expected a number'),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "needs the key 'original_max_pos"),
        (
            {"rope_scaling": {**YARN, "factor": 2.0}, "rope_theta": 1},
            "rope type 'yarn': .*division by zero",
        ),
        ({"rope_scaling": [1]}, "no object of rope parameters"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs the key 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs the key 'low_freq"),
    ],
)
def test_what_is_not_supported_says_so_in_one_line(config, text):
    with pytest.raises(UserError, match=text) as caught:
        rope.from_hf(config, 64)
    assert "\n" not in str(caught.value)


def test_t3_rotation_at_far_positions_matches_transformers():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=1 << 17)
    positions = np.array([[0, 1, 4095, 4096, 100_000]], np.int32)
    x = np.random.default_rng(0).normal(size=(1, 5, 3, 16)).astype(np.float32)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions).long())
    theirs, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), cos, sin, unsqueeze_dim=2)
    ours = rope.rotate(x, *rope.cos_sin(positions, rope.from_hf({}, 16).inv_freq))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


def test_t3_bf16_activations_get_fp32_angles():
    cos, sin = rope.cos_sin(jnp.array([[4095, 4096]]), rope.from_hf({}, 8).inv_freq)
    assert cos.dtype == sin.dtype == jnp.float32
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    turned = rope.rotate(x, cos, sin)
    assert turned.dtype == jnp.bfloat16
    wide = rope.rotate(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(turned, wide.astype(jnp.bfloat16))


def _copy(config):
    return {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}


def test_t16_neighbours_are_rotated_by_places_on_three_axes_as_in_diffusers():
    dims, places = (4, 6, 6), np.array([[0, 0, 0], [0, 63, 2], [0, 5, 127], [7, 1, 1]])
    table = FluxPosEmbed(10000, dims)(torch.tensor(places))
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 16)).astype(np.float32)
    wanted = apply_rotary_emb(torch.from_numpy(x), table, sequence_dim=1)
    cos, sin = map(jnp.asarray, rope.grid_cos_sin(places, dims, 10000.0))
    np.testing.assert_allclose(rope.rotate_neighbours(jnp.asarray(x), cos, sin), wanted, atol=1e-6)
    assert rope.rotate_neighbours(jnp.asarray(x, jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
