"""A config.json as transformers' class and ours read it, and its tensors by both."""

import json
from dataclasses import replace

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

FIRST, SECOND = "post_attention_layernorm", "post_feedforward_layernorm"
NORMS = {
    "pre": ("input_layernorm", FIRST),
    "post": (FIRST, SECOND),
    "sandwich": ("input_layernorm", FIRST, SECOND, "pre_feedforward_layernorm"),
}
KINDS = {
    "Gemma2RMSNorm": "one_plus",
    "Gemma3RMSNorm": "one_plus",
    "Olmo2RMSNorm": "scale_first",
    "Olmo3RMSNorm": "scale_first",
    "GptOssRMSNorm": "scale_first",
}
ACTIVATIONS = {"silu": "SiLUActivation", "gelu_tanh": "GELUTanh"}


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
    granite = c.model_type == "granite"  # other classes ignore its keys
    gemma = c.model_type in ("gemma2", "gemma3_text")  # likewise
    scale = getattr(model.model.embed_tokens, "scalar_embed_scale", 1.0)
    attention, head_dim, eos = layer.self_attn, layer.self_attn.head_dim, c.eos_token_id
    fused = hasattr(attention, "qkv_proj")
    q, k = (attention.qkv_proj,) * 2 if fused else (attention.q_proj, attention.k_proj)
    heads = attention.o_proj.weight.shape[1] // head_dim
    kv_heads = (k.weight.shape[0] // head_dim - heads * fused) // (1 + fused)
    experts = getattr(layer.mlp, "experts", None)
    mlp = experts or layer.mlp
    return {
        "vocab_size": model.lm_head.weight.shape[0],
        "hidden_size": model.lm_head.weight.shape[1],
        "intermediate_size": c.intermediate_size if experts else mlp.down_proj.weight.shape[1],
        "experts": _experts(layer.mlp),
        "router_loss": c.router_aux_loss_coef if experts else 0.0,
        "num_layers": len(model.model.layers),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "fused": fused,
        "rope_by_end": fused,
        "head_dim": head_dim,
        "max_positions": c.max_position_embeddings,
        "rms_norm_eps": _eps(layer.post_attention_layernorm),
        "initializer_range": c.initializer_range,
        "tied": bool(model.all_tied_weights_keys),
        "qkv_bias": q.bias is not None,
        "o_bias": layer.self_attn.o_proj.bias is not None,
        "mlp_bias": not experts and mlp.down_proj.bias is not None,
        "sinks": hasattr(attention, "sinks"),
        "norms": tuple(sorted(name for name, _ in layer.named_children() if "norm" in name)),
        "qk_norm": _qk_norm(layer.self_attn),
        "activation": _activation(mlp),
        "attention_scale": layer.self_attn.scaling,
        # C5: Gemma 3's code does not use its attn_logit_softcapping.
        "soft_cap": c.attn_logit_softcapping if c.model_type == "gemma2" else None,
        "logits_soft_cap": c.final_logit_softcapping if gemma else None,
        "query_scaling": _query_scaling(c),
        "image_ids": (),
        "residual_scale": c.residual_multiplier if granite else 1.0,
        "embedding_scale": c.embedding_multiplier if granite else scale,
        "logits_divisor": c.logits_scaling if granite else 1.0,
        "windows": tuple(windows),
        "rotary": tuple(bool(getattr(x.self_attn, "use_rope", True)) for x in model.model.layers),
        "norm": KINDS.get(type(model.model.norm).__name__, "cast_first"),
        "ropes": _ropes(c, type(model.model.rotary_emb)),
        "bos_id": c.bos_token_id,
        "eos_ids": (eos,) if isinstance(eos, int) else tuple(eos or ()),
        "pad_id": c.pad_token_id,
    }


def _experts(mlp):
    """Count, how many a token has, width, whether its weights sum to 1, one matrix, its clamp."""
    if not hasattr(mlp, "experts"):
        return None
    router, made = getattr(mlp, "gate", None) or mlp.router, mlp.experts
    weights = router(torch.ones(1, router.hidden_dim, device="meta"))[1]
    fused = hasattr(made, "gate_up_proj_bias")  # GPT-OSS: its matrices are (in, out)
    width = made.down_proj.shape[1 if fused else 2]
    clamp = (made.alpha, made.limit) if fused else None
    normalised = getattr(router, "norm_topk_prob", True)
    return made.down_proj.shape[0], weights.shape[1], width, normalised, fused, clamp


def _activation(mlp):
    """Name of the class; GPT-OSS has none, as its clamp stands in for it."""
    kind = getattr(mlp, "activation_fn", None) or getattr(mlp, "act_fn", None)
    return type(kind).__name__ if kind else "SiLUActivation"


def ours(config):
    """The fields of our config by name, frequencies as a tuple that compares approximately."""
    cfg = registry.read_decoder(config)
    made = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}
    layers, ropes = made.pop("layers"), made.pop("ropes")
    assert made.pop("num_labels") == 0, "a head of scores is no key of a causal language model"
    (same,) = {replace(layer, window=None, rope=None) for layer in layers}
    return {
        **made,
        "num_layers": len(layers),
        "norms": NORMS[same.norms],
        "qk_norm": same.qk_norm,
        "experts": same.experts,
        "activation": ACTIVATIONS[same.activation],
        "attention_scale": pytest.approx(same.attention_scale or cfg.head_dim**-0.5),
        "soft_cap": same.soft_cap,
        "sinks": same.sinks,
        "residual_scale": same.residual_scale,
        "windows": tuple(layer.window for layer in layers),
        "rotary": tuple(layer.rope is not None for layer in layers),
        "ropes": tuple(
            (one.scale, pytest.approx(one.inv_freq, rel=1e-6))
            for one in (ropes[layer.rope or 0] for layer in layers)
        ),
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
    architecture, skipped = registry.find(config, "decoder"), llama.ignore(cfg)
    table, sizes = architecture.rules(cfg), architecture.sizes(cfg)
    entries = rules.plan(table, leaves, shapes, sizes, skipped)
    covered = {key for entry in entries for key in entry.keys}
    assert shapes.keys() - covered == ({"lm_head.weight"} if cfg.tied else set())
    return len(shapes)


def _class(config):
    return CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))


def _ropes(c, kind):
    """Scale and frequencies of each layer. On the CPU: meta buffers have no values."""
    made = kind(c)
    if hasattr(made, "inv_freq"):
        return ((made.attention_scaling, tuple(made.inv_freq.tolist())),) * c.num_hidden_layers
    scales = {kind: getattr(made, f"{kind}_attention_scaling") for kind in made.layer_types}
    inv_freqs = {kind: getattr(made, f"{kind}_inv_freq") for kind in made.layer_types}
    return tuple((scales[kind], tuple(inv_freqs[kind].tolist())) for kind in c.layer_types)


def _query_scaling(c):
    keys = "llama_4_scaling_beta", "original_max_position_embeddings"
    return tuple(map(c.rope_parameters.get, keys)) if c.model_type == "ministral3" else None


def _eps(norm):
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def _qk_norm(attention):
    """None without norms of q and k, else the width of one: a head's, or all of the projection."""
    if not hasattr(attention, "q_norm"):
        return None
    size = attention.q_norm.weight.shape[0]
    return "head" if size == attention.head_dim else "width"
