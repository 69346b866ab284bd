"""The LLaMA family against transformers: logits, gradients and greedy decoding, fp32 on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxft.core import params as P
from jaxft.models import llama
from jaxft.models.llama import Llama
from jaxft.models.llama_config import LlamaConfig
from jaxft.weights import rules

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
VARIANTS = {
    "llama": {"model_type": "llama"},
    "llama tied llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
    },
    "llama biases linear": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "llama head_dim": {"model_type": "llama", "head_dim": 16, "num_key_value_heads": None},
    "mistral head_dim": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "mistral window": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 windows yarn": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
        "rope_scaling": YARN,
        "rope_theta": 1e6,
    },
    "qwen3 yarn": {"model_type": "qwen3", "rope_scaling": YARN, "rope_theta": 1e6},
    "qwen3 layer_types": {
        "model_type": "qwen3",
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "smollm3": {"model_type": "smollm3"},
    "smollm3 biases": {
        "model_type": "smollm3",
        "attention_bias": True,
        "mlp_bias": True,
        "no_rope_layers": [1, 0, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "tie_word_embeddings": False,
    },
}


def pair(name, **more):
    """The same random weights as a transformers model and as ours."""
    config = {**TINY, **VARIANTS[name], **more}
    torch.manual_seed(0)
    kwargs = {k: v for k, v in config.items() if k != "model_type"}
    hf = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **kwargs), attn_implementation="eager"
    )
    hf = hf.float().eval()
    with torch.no_grad():
        for key, tensor in hf.named_parameters():
            if key.endswith(("bias", "norm.weight")):
                tensor.add_(0.2 * torch.randn_like(tensor))
    cfg = LlamaConfig.from_hf(config)
    template = jax.eval_shape(lambda: Llama(cfg, key=jax.random.key(0)))
    state = {k: v.numpy() for k, v in hf.state_dict().items()}
    return hf, P.bind(template, load(cfg, template, state))


def entries(cfg, template, state):
    leaves = P.describe(template)
    shapes = {k: v.shape for k, v in state.items()}
    return rules.plan(llama.RULES, leaves, shapes, llama.sizes(cfg), llama.ignore(cfg))


def load(cfg, template, state):
    """Parameters by path from torch tensors, through the rules."""
    made = {}
    for entry in entries(cfg, template, state):
        parts = [rules.to_jax(state[k], entry.layout, llama.sizes(cfg)) for k in entry.keys]
        made[entry.path] = jnp.asarray(np.stack(parts) if entry.stacked else parts[0])
    return made


def tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, TINY["vocab_size"], (batch, length), np.int32)


def hf_logits(hf, ids, **kwargs):
    kwargs = {k: torch.tensor(v).long() for k, v in kwargs.items()}
    with torch.no_grad():
        return hf(torch.tensor(ids).long(), use_cache=False, **kwargs).logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_near_and_far(name):
    hf, model = pair(name)
    ids, call = tokens(2, 21), jax.jit(lambda m, *a: m(*a))
    near = hf_logits(hf, ids)
    assert np.abs(near).max() > 1
    np.testing.assert_allclose(call(model, ids), near, atol=1e-4)
    far = np.broadcast_to(np.arange(4096, 4117, dtype=np.int32), ids.shape)
    np.testing.assert_allclose(
        call(model, ids, far), hf_logits(hf, ids, position_ids=far), atol=1e-4
    )
