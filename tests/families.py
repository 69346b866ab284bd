"""The decoder families of the parity tests: a config for each trap, and a model of both sides.

A config has two periods of its layers and one more. Numbers such as R1 name the traps.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from jaxft.core import params as P
from jaxft.core import sharding
from jaxft.models import registry
from jaxft.nn import lora
from jaxft.weights import transfer
from jaxft.weights.folders.transformers import open_source

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = partial(jax.jit, compiler_options=QUICK)
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.7,
}
GEMMA = {"sliding_window": 5, "head_dim": 12, "query_pre_attn_scalar": 20, "rms_norm_eps": 1e-5}
MINISTRAL3 = {
    "factor": 16.0,
    "original_max_position_embeddings": 12,
    "max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
LONG = {
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 12.0],
}
# Models of pictures and text: the keys of config.json around text_config.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
OUTER = {
    "gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4,
        "image_token_index": 2,
    },
    "mistral3": {
        "vision_config": {"model_type": "pixtral", "head_dim": 8, **VISION},
        "image_token_index": 2,
        "tie_word_embeddings": False,
    },
}
CASES = {
    "granite": ("granite", {**GRANITE, "rope_theta": 1e5}),
    "granite tied": (
        "granite",
        {
            **GRANITE,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "rope_parameters": {**YARN, "rope_theta": 1e5},
        },
    ),
    "granite without multipliers": ("granite", {"num_key_value_heads": None, "rope_scaling": YARN}),
    # G1 to G4, C4: a full layer after each sliding one, caps that most scores and logits feel.
    "gemma2": (
        "gemma2",
        {
            **GEMMA,
            "num_hidden_layers": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
            "rope_theta": 1e5,
        },
    ),
    "gemma2 untied": (
        "gemma2",
        {
            **GEMMA,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {**YARN, "rope_theta": 1e5},
        },
    ),
    # N1 to N3: yarn whose attention factor is 1, queries that grow beyond `original` positions.
    "ministral3": (
        "ministral3",
        {"head_dim": 12, "rope_parameters": {**MINISTRAL3, "type": "yarn", "rope_theta": 1e5}},
    ),
    "ministral3 tied": (
        "ministral3",
        {
            "head_dim": 6,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "rope_theta": 1e5,
            "rope_scaling": {**MINISTRAL3, "type": "yarn"},
        },
    ),
    # P1, P2, P4: fused projections, `su` is longrope, 3/4 of each head rotate. P3: rows of 64 are
    # beyond `original`.
    "phi3": (
        "phi3",
        {
            "hidden_size": 64,
            "initializer_range": 0.15,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "su", "original_max_position_embeddings": 32, **LONG},
            "sliding_window": 7,
        },
    ),
    # P3: all rows are within `original`, and have the short factors. P5: a window without effect.
    "phi3 tied": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": None,
            "hidden_size": 48,
            "original_max_position_embeddings": 6000,
            "sliding_window": 262144,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e5, **LONG},
        },
    ),
    "phi3 default": ("phi3", {"rope_theta": 1e5}),
    # C1, G2, G5: two ropes, a window of 5, scores by their own scale. Layers are 2 periods and 1.
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 5,
            "sliding_window_pattern": 2,
            "rope_theta": 1e5,
            "rope_local_base_freq": 1e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    # C4: 5 sliding layers to 1 full one. C5: attn_logit_softcapping has no effect.
    "gemma3 untied": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 13,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 1e5, "truncate": False},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    # C1: a `type` of transformers 4 is not read, and a missing dict has the class's theta.
    "gemma3 old type": (
        "gemma3_text",
        {
            **GEMMA,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_scaling": {"type": "linear", "factor": 8.0},
        },
    ),
    # O1, O2: post norms alone, q and k normed over all heads.
    "olmo2": ("olmo2", {"rope_theta": 5e5, "rms_norm_eps": 1e-6}),
    "olmo2 tied": (
        "olmo2",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "head_dim": 6,
            "rope_parameters": {**YARN, "rope_theta": 1e5},
        },
    ),
    # O4, C1, C2: YaRN on full layers alone, without its `truncate`. The theta is theirs, too.
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 9,
            "sliding_window": 5,
            "rope_theta": 1e4,
            "rope_scaling": {**YARN, "truncate": False},
        },
    ),
    "olmo3 new": (
        "olmo3",
        {
            "num_hidden_layers": 5,
            "num_key_value_heads": None,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            "rope_parameters": {
                "full_attention": {**YARN, "truncate": False},
                "sliding_attention": {"rope_theta": 1e3},
            },
        },
    ),
    # W1: the outer class ties, whatever text_config says. It has no soft-cap of logits.
    "gemma3 wrapped": (
        "gemma3",
        {
            **GEMMA,
            "model_type": "gemma3_text",
            "num_hidden_layers": 5,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 4.0,
        },
    ),
    "mistral3 wrapped": (
        "mistral3",
        {
            "model_type": "ministral3",
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rope_parameters": {**MINISTRAL3, "rope_type": "yarn", "rope_theta": 1e5},
        },
    ),
}
# X1, X2, X4: every layer has experts. C3: their number has two names.
MIXTRAL = {"num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
QWEN3_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,  # torch's grouped product in bf16 takes multiples of 8
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
CASES |= {
    "mixtral": ("mixtral", {**MIXTRAL, "rope_theta": 1e5, "sliding_window": None}),
    "mixtral tied": (
        "mixtral",
        {
            **MIXTRAL,
            "tie_word_embeddings": True,
            "head_dim": 6,
            "sliding_window": 5,
            "rope_parameters": {**YARN, "rope_theta": 1e5},
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**QWEN3_MOE, "head_dim": 12, "norm_topk_prob": True, "rope_scaling": YARN},
    ),
    "qwen3_moe not normalised": (
        "qwen3_moe",
        {
            **QWEN3_MOE,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
    ),
}
# S1 to S6, C4: windows from layer 0 on, the rope of the class, the slope and limit of the class.
GPT_OSS = {**MIXTRAL, "head_dim": 12, "sliding_window": 5, "num_hidden_layers": 5}
CASES |= {
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss tied": (
        "gpt_oss",
        {
            **GPT_OSS,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "swiglu_alpha": 1.1,
            "swiglu_limit": 0.4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_theta": 1e5,
            "rope_scaling": {**YARN, "truncate": False},
        },
    ),
}
WRAPPED = ("gemma3 wrapped", "mistral3 wrapped")
ONE_EACH = (*WRAPPED, "phi3", "ministral3", "granite", "gemma2", "gemma3 untied", "olmo2", "olmo3")
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
ONE_EACH = (*MIXTURES, *ONE_EACH)


class Pair:
    """The same random weights as a folder, as transformers reads it, and as ours."""

    def __init__(self, case, folder, dtype=torch.float32):
        kind, changes = CASES[case]
        self.config = {"model_type": kind, **TINY, **changes}
        self.auto = AutoModelForCausalLM
        if case in WRAPPED:
            self.config = {"model_type": kind, **OUTER[kind], "text_config": {**TINY, **changes}}
            self.auto = AutoModelForImageTextToText
        self.folder = str(folder)
        (folder / "config.json").write_text(json.dumps(self.config))
        torch.manual_seed(0)
        read = AutoConfig.from_pretrained(folder)
        made = self.auto.from_config(read, attn_implementation="eager").to(dtype)
        with torch.no_grad():
            for key, tensor in made.named_parameters():
                if key.endswith(("bias", "norm.weight")):
                    tensor.add_(0.2 * torch.randn_like(tensor))
        made.save_pretrained(folder, max_shard_size=20000)
        (folder / "config.json").write_text(json.dumps(self.config))
        self.theirs = made.eval()
        self.architecture = registry.find(self.config, "decoder")
        self.cfg = registry.read_decoder(self.config)
        self.template = jax.eval_shape(self.build)
        self.leaves = P.describe(self.template)
        source = self.architecture.opened(open_source(self.folder))
        self.part = self.architecture.part(source, self.cfg)
        where = sharding.shardings(self.leaves, sharding.one_device_mesh())
        self.params = transfer.load(self.part, self.leaves, where, jnp.float32, set(self.leaves))
        self.ours = P.bind(self.template, self.params)

    def in_file(self, state):
        """Arrays by names of the class in memory under those of the file, which has each expert."""
        made, (start, names) = {}, ("mlp.", ("gate_proj", "up_proj", "down_proj"))
        if self.config["model_type"] == "gpt_oss":
            return dict(state)
        if self.config["model_type"] == "mixtral":
            start, names = "block_sparse_moe.", ("w1", "w3", "w2")
        for key, array in state.items():
            layer, _, end = key.partition("mlp.")
            if end == "experts.gate_up_proj":
                for half, name in zip(array.chunk(2, dim=1), names, strict=False):
                    made |= {
                        f"{layer}{start}experts.{i}.{name}.weight": x for i, x in enumerate(half)
                    }
            elif end == "experts.down_proj":
                made |= {
                    f"{layer}{start}experts.{i}.{names[2]}.weight": x for i, x in enumerate(array)
                }
            else:
                made[f"{layer}{start}{end}" if end else key] = array
        return made

    def build(self):
        return self.architecture.module(self.cfg, key=jax.random.key(0))

    def adapted(self, cfg):
        """Template and leaves of our model with adapters."""

        def build():
            model = self.build()
            lora.add(model, cfg, jax.random.key(1))
            return model

        template = jax.eval_shape(build)
        return template, P.describe(template)


def tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(3, TINY["vocab_size"], (rows, length), np.int32)


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids).long(), use_cache=False).logits.float().numpy()
