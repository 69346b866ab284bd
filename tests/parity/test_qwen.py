"""Qwen 3 as a text encoder against transformers: hidden states by index, fp32."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.families import llama
from jaxft.models.text_encoders import qwen
from jaxft.models.text_encoders.qwen import QwenTextConfig
from jaxft.weights import rules
from tests.parity.twins import QUICK, moved, numpy_state, worst

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_theta": 1e6,
}
PAD = 95


@cache
def make_torch():
    torch.manual_seed(0)
    return moved(Qwen3Model(Qwen3Config(**TINY)))


def config():
    return make_torch().config.to_dict()


def made(states):
    """Our states of two captions of 3 and 8 tokens, padded to 8, and the same of transformers."""
    cfg = QwenTextConfig.from_hf(config(), states, True, "text_encoder/config.json")
    template = jax.eval_shape(lambda: Decoder(cfg.decoder, key=jax.random.key(0)))
    state = {f"model.{key}": x for key, x in numpy_state(make_torch()).items()}
    used = {f"model.layers.{i}." for i in range(cfg.decoder.num_layers)}
    kept = {k: x for k, x in state.items() if ".layers." not in k or k[:15] in used}
    shapes, sizes, params = {k: x.shape for k, x in kept.items()}, llama.sizes(cfg.decoder), {}
    for entry in rules.plan(llama.RULES, P.describe(template), shapes, sizes):
        parts = [rules.to_jax(kept[key], entry.layout, sizes) for key in entry.keys]
        params[entry.path] = np.stack(parts) if entry.stacked else parts[0]
    ids = np.random.default_rng(0).integers(0, PAD, (2, 8)).astype(np.int32)
    mask = np.arange(8) < np.array([[3], [8]])
    ours = np.where(mask, ids, -1 - PAD)

    def encode(params, ids):
        return qwen.encode(P.bind(template, params), cfg, ids, dtype=jnp.float32)

    out, lengths = jax.jit(encode).lower(params, ours).compile(QUICK)(params, ours)
    with torch.no_grad():
        theirs = make_torch()(
            input_ids=torch.from_numpy(np.where(mask, ids, PAD)).long(),
            attention_mask=torch.from_numpy(mask).long(),
            output_hidden_states=True,
        ).hidden_states
    np.testing.assert_array_equal(lengths, [3, 8])
    return out, torch.cat([theirs[one] for one in states], dim=-1), cfg


@pytest.mark.parametrize("states", [(-2,), (1, 2, 4), (0, 3)])
def test_t28_t32_states_by_index_are_those_of_transformers_at_pads_too(states):
    out, theirs, cfg = made(states)
    assert out.shape == theirs.shape == (2, 8, cfg.hidden_size)
    assert worst(out, theirs) < 1e-5
    assert cfg.decoder.num_layers == max(one % 6 for one in states)


def test_another_model_or_too_few_layers_are_refused():
    where = "z/text_encoder/config.json"
    with pytest.raises(UserError, match=r"z/text_encoder/config\.json: model_type='llama'.* qwen3"):
        QwenTextConfig.from_hf({**config(), "model_type": "llama"}, (-2,), True, where)
    with pytest.raises(UserError, match=r"num_hidden_layers=5, .* after layer 27"):
        QwenTextConfig.from_hf(config(), (9, 18, 27), False, where)
