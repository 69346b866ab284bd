"""A config.json as transformers' class and ours read it, and its tensors by both."""

import importlib
import json

import jax
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jaxft.core.params import describe
from jaxft.models import registry
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.families import llama
from jaxft.weights import rules


def theirs(config):
    """The effective values of transformers' class, in our names; an exception where it has none."""
    c = _class(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(c, attn_implementation="eager")
    layer = model.model.layers[0]
    types = getattr(c, "layer_types", None)
    windows = [getattr(c, "sliding_window", None)] * c.num_hidden_layers
    if c.model_type == "llama":
        windows = [None] * c.num_hidden_layers
    elif types is not None:
        windows = [w if t == "sliding_attention" else None for w, t in zip(windows, types)]  # noqa: B905
    head_dim, eos = layer.self_attn.head_dim, c.eos_token_id
    return {
        "vocab_size": model.lm_head.weight.shape[0],
        "hidden_size": model.lm_head.weight.shape[1],
        "intermediate_size": layer.mlp.down_proj.weight.shape[1],
        "num_layers": len(model.model.layers),
        "num_heads": layer.self_attn.q_proj.weight.shape[0] // head_dim,
        "num_kv_heads": layer.self_attn.k_proj.weight.shape[0] // head_dim,
        "head_dim": head_dim,
        "max_positions": c.max_position_embeddings,
        "rms_norm_eps": layer.input_layernorm.variance_epsilon,
        "initializer_range": c.initializer_range,
        "tied": bool(model.all_tied_weights_keys),
        "qkv_bias": layer.self_attn.q_proj.bias is not None,
        "o_bias": layer.self_attn.o_proj.bias is not None,
        "mlp_bias": layer.mlp.up_proj.bias is not None,
        "qk_norm": hasattr(layer.self_attn, "q_norm"),
        "windows": tuple(windows),
        "rotary": tuple(bool(getattr(x.self_attn, "use_rope", True)) for x in model.model.layers),
        "rope": (model.model.rotary_emb.attention_scaling, _frequencies(c)),
        "bos_id": c.bos_token_id,
        "eos_ids": (eos,) if isinstance(eos, int) else tuple(eos or ()),
        "pad_id": c.pad_token_id,
    }


def ours(config):
    """The fields of our config by name, frequencies as a tuple that compares approximately."""
    cfg = registry.read_decoder(config)
    made = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}
    layers, (rope,) = made.pop("layers"), made.pop("ropes")
    assert made.pop("num_labels") == 0, "a head of scores is no key of a causal language model"
    assert {(layer.norms, layer.activation) for layer in layers} == {("pre", "silu")}
    return {
        **made,
        "num_layers": len(layers),
        "qk_norm": layers[0].qk_norm,
        "windows": tuple(layer.window for layer in layers),
        "rotary": tuple(layer.rope is not None for layer in layers),
        "rope": (rope.scale, pytest.approx(rope.inv_freq, rel=1e-6)),
    }


def fits(config):
    """The names and shapes of transformers' model are those that our weight table makes.

    Raises UserError where one is missing, left over or of another shape. Returns their count.
    """
    cfg = registry.read_decoder(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_class(config))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    leaves = describe(jax.eval_shape(lambda: Decoder(cfg, key=jax.random.key(0))))
    skipped = llama.ignore(cfg)
    entries = rules.plan(llama.RULES, leaves, shapes, llama.sizes(cfg), skipped)
    covered = {key for entry in entries for key in entry.keys}
    assert shapes.keys() - covered == ({"lm_head.weight"} if cfg.tied else set())
    return len(shapes)


def _class(config):
    return CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))


def _frequencies(c):
    """On the CPU: buffers on the meta device have no values."""
    module = importlib.import_module(f"transformers.models.{c.model_type}.modeling_{c.model_type}")
    name = type(c).__name__.removesuffix("Config") + "RotaryEmbedding"
    return tuple(getattr(module, name)(c).inv_freq.tolist())
