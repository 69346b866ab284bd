"""The architectures of llama.cpp that are read and written.

A new one is an entry of GGUF_ARCHITECTURES. Source: llama.cpp's `conversion/` and `src/models/`.
"""

from jaxft.weights.files.gguf_table import IN_ROPE, GgufArchitecture, MetadataKey, TensorName

SILU = {"hidden_act": "silu"}
GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}

# The rows of q and k in llama.cpp's llama, whose rope rotates neighbours. transformers rotates row
# i with row i + H / 2 of a head.
_Q, _K = "(n u h) d -> (n h u) d", "(k u h) d -> (k h u) d"
_B, _L = "blk.{i}.", "model.layers.{i}."
_TABLES = (
    TensorName("token_embd.weight", "model.embed_tokens.weight"),
    TensorName("output.weight", "lm_head.weight"),
)
_LAST = (TensorName("output_norm.weight", "model.norm.weight"),)
_FIRST_NORM = (TensorName(_B + "attn_norm.weight", _L + "input_layernorm.weight"),)
_NORMS = (
    *_FIRST_NORM,
    TensorName(_B + "ffn_norm.weight", _L + "post_attention_layernorm.weight"),
)
_POST_NORMS = (
    TensorName(_B + "post_attention_norm.weight", _L + "post_attention_layernorm.weight"),
    TensorName(_B + "post_ffw_norm.weight", _L + "post_feedforward_layernorm.weight"),
)
_QK_NORMS = (
    TensorName(_B + "attn_q_norm.weight", _L + "self_attn.q_norm.weight"),
    TensorName(_B + "attn_k_norm.weight", _L + "self_attn.k_norm.weight"),
)
_OUTPUT = (TensorName(_B + "attn_output.weight", _L + "self_attn.o_proj.weight"),)
_VALUES = (TensorName(_B + "attn_v.weight", _L + "self_attn.v_proj.weight"), *_OUTPUT)
_ATTENTION = (
    TensorName(_B + "attn_q.weight", _L + "self_attn.q_proj.weight"),
    TensorName(_B + "attn_k.weight", _L + "self_attn.k_proj.weight"),
    *_VALUES,
)
_PERMUTED = (
    TensorName(_B + "attn_q.weight", _L + "self_attn.q_proj.weight", _Q),
    TensorName(_B + "attn_k.weight", _L + "self_attn.k_proj.weight", _K),
    *_VALUES,
)
_OV_BIAS = (
    TensorName(_B + "attn_v.bias", _L + "self_attn.v_proj.bias"),
    TensorName(_B + "attn_output.bias", _L + "self_attn.o_proj.bias"),
)
_QKV_BIAS = (
    TensorName(_B + "attn_q.bias", _L + "self_attn.q_proj.bias"),
    TensorName(_B + "attn_k.bias", _L + "self_attn.k_proj.bias"),
    _OV_BIAS[0],
)
_PERMUTED_BIAS = (
    TensorName(_B + "attn_q.bias", _L + "self_attn.q_proj.bias", "(n u h) -> (n h u)"),
    TensorName(_B + "attn_k.bias", _L + "self_attn.k_proj.bias", "(k u h) -> (k h u)"),
    *_OV_BIAS,
)
_MLP = (
    TensorName(_B + "ffn_gate.weight", _L + "mlp.gate_proj.weight"),
    TensorName(_B + "ffn_up.weight", _L + "mlp.up_proj.weight"),
    TensorName(_B + "ffn_down.weight", _L + "mlp.down_proj.weight"),
)
_MLP_BIAS = (
    TensorName(_B + "ffn_gate.bias", _L + "mlp.gate_proj.bias"),
    TensorName(_B + "ffn_up.bias", _L + "mlp.up_proj.bias"),
    TensorName(_B + "ffn_down.bias", _L + "mlp.down_proj.bias"),
)
_MIXTRAL = (
    TensorName(_B + "ffn_gate_inp.weight", _L + "block_sparse_moe.gate.weight"),
    TensorName(_B + "ffn_gate_exps.weight", _L + "block_sparse_moe.experts.{e}.w1.weight"),
    TensorName(_B + "ffn_up_exps.weight", _L + "block_sparse_moe.experts.{e}.w3.weight"),
    TensorName(_B + "ffn_down_exps.weight", _L + "block_sparse_moe.experts.{e}.w2.weight"),
)
_QWEN_EXPERTS = (
    TensorName(_B + "ffn_gate_inp.weight", _L + "mlp.gate.weight"),
    TensorName(_B + "ffn_gate_exps.weight", _L + "mlp.experts.{e}.gate_proj.weight"),
    TensorName(_B + "ffn_up_exps.weight", _L + "mlp.experts.{e}.up_proj.weight"),
    TensorName(_B + "ffn_down_exps.weight", _L + "mlp.experts.{e}.down_proj.weight"),
)
# The columns of gate and up alternate in transformers, and llama.cpp has (out, in) for (in, out).
_GATE_UP, _GATE_UP_BIAS = "e d (f u) -> u e f d", "e (f u) -> u e f"
_GPT_OSS = (
    TensorName(_B + "post_attention_norm.weight", _L + "post_attention_layernorm.weight"),
    TensorName(_B + "attn_sinks.weight", _L + "self_attn.sinks"),
    TensorName(_B + "ffn_gate_inp.weight", _L + "mlp.router.weight"),
    TensorName(_B + "ffn_gate_inp.bias", _L + "mlp.router.bias"),
    TensorName(_B + "ffn_gate_exps.weight", _L + "mlp.experts.gate_up_proj", _GATE_UP, 0),
    TensorName(_B + "ffn_up_exps.weight", _L + "mlp.experts.gate_up_proj", _GATE_UP, 1),
    TensorName(_B + "ffn_gate_exps.bias", _L + "mlp.experts.gate_up_proj_bias", _GATE_UP_BIAS, 0),
    TensorName(_B + "ffn_up_exps.bias", _L + "mlp.experts.gate_up_proj_bias", _GATE_UP_BIAS, 1),
    TensorName(_B + "ffn_down_exps.weight", _L + "mlp.experts.down_proj", "e f d -> e d f"),
    TensorName(_B + "ffn_down_exps.bias", _L + "mlp.experts.down_proj_bias"),
)
_PHI3 = (
    TensorName(_B + "attn_qkv.weight", _L + "self_attn.qkv_proj.weight"),
    *_OUTPUT,
    TensorName(_B + "ffn_up.weight", _L + "mlp.gate_up_proj.weight"),
    TensorName(_B + "ffn_down.weight", _L + "mlp.down_proj.weight"),
)
_GEMMA_NORMS = (
    *_LAST,
    *_FIRST_NORM,
    *_POST_NORMS,
    TensorName(_B + "ffn_norm.weight", _L + "pre_feedforward_layernorm.weight"),
)
_ENDS = (*_TABLES, *_LAST)

_KEYS = (
    MetadataKey("block_count", "num_hidden_layers"),
    MetadataKey("context_length", "max_position_embeddings"),
    MetadataKey("embedding_length", "hidden_size"),
    MetadataKey("feed_forward_length", "intermediate_size"),
    MetadataKey("attention.head_count", "num_attention_heads"),
    MetadataKey("attention.head_count_kv", "num_key_value_heads", null=True),
    MetadataKey("attention.layer_norm_rms_epsilon", "rms_norm_eps", float, 1e-5),
    MetadataKey("rope.freq_base", "rope_theta", float, 1e4),
)
_WINDOW = MetadataKey("attention.sliding_window", "sliding_window")
_EXPERTS = (
    MetadataKey("expert_count", "num_local_experts"),
    MetadataKey("expert_used_count", "num_experts_per_tok"),
)
_EXPERT_WIDTH = MetadataKey("expert_feed_forward_length", "moe_intermediate_size")
_SCALES = (
    MetadataKey("embedding_scale", "embedding_multiplier", float, 1.0),
    MetadataKey("attention.scale", "attention_multiplier", float),
    MetadataKey("residual_scale", "residual_multiplier", float, 1.0),
    MetadataKey("logit_scale", "logits_scaling", float),
)
_MISTRAL3 = (
    MetadataKey("attention.temperature_scale", IN_ROPE + "llama_4_scaling_beta", float),
    MetadataKey("rope.scaling.yarn_log_multiplier", IN_ROPE + "mscale_all_dim", float, null=True),
)
_ROPES = ("linear", "yarn", "llama3")
_LLAMA = (*_ENDS, *_NORMS, *_PERMUTED)
GGUF_ARCHITECTURES = (
    GgufArchitecture(
        "llama",
        "Llama",
        ("llama", "mistral"),
        (*_LLAMA, *_PERMUTED_BIAS, *_MLP, *_MLP_BIAS),
        _KEYS,
        SILU,
        ropes=_ROPES,
    ),
    GgufArchitecture(
        "llama",
        "Mixtral",
        ("mixtral",),
        (*_LLAMA, *_MIXTRAL),
        (*_KEYS, *_EXPERTS),
        SILU,
        marker="expert_count",
        ropes=_ROPES,
    ),
    GgufArchitecture(
        "qwen2", "Qwen2", ("qwen2",), (*_ENDS, *_NORMS, *_ATTENTION, *_QKV_BIAS, *_MLP), _KEYS, SILU
    ),
    GgufArchitecture(
        "qwen3", "Qwen3", ("qwen3",), (*_ENDS, *_NORMS, *_ATTENTION, *_QK_NORMS, *_MLP), _KEYS, SILU
    ),
    GgufArchitecture(
        "qwen3moe",
        "Qwen3Moe",
        ("qwen3_moe",),
        (*_ENDS, *_NORMS, *_ATTENTION, *_QK_NORMS, *_QWEN_EXPERTS),
        (*_KEYS, *_EXPERTS, _EXPERTS[0]._replace(key="num_experts"), _EXPERT_WIDTH),
        # llama.cpp always divides the weights of a token's experts by their sum.
        {**SILU, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        marker="expert_count",
    ),
    GgufArchitecture(
        "smollm3",
        "SmolLM3",
        ("smollm3",),
        (*_LLAMA, *_MLP),
        _KEYS,
        {**SILU, "no_rope_layer_interval": 4},
        ropes=_ROPES,
    ),
    GgufArchitecture(
        "gemma2",
        "Gemma2",
        ("gemma2",),
        (_TABLES[0], *(one._replace(shift=1.0) for one in _GEMMA_NORMS), *_ATTENTION, *_MLP),
        (
            *_KEYS,
            _WINDOW._replace(default=4096),
            MetadataKey("attn_logit_softcapping", "attn_logit_softcapping", float, 50.0),
            MetadataKey("final_logit_softcapping", "final_logit_softcapping", float, 30.0),
        ),
        GELU,
        period=2,
        head=False,
        wide_layers=46,
    ),
    GgufArchitecture(
        "gemma3",
        "Gemma3",
        ("gemma3_text",),
        (
            *_TABLES,
            *(one._replace(shift=1.0) for one in (*_GEMMA_NORMS, *_QK_NORMS)),
            *_ATTENTION,
            *_MLP,
        ),
        (
            *_KEYS,
            _WINDOW._replace(null=True),
            MetadataKey("final_logit_softcapping", "final_logit_softcapping", float, null=True),
            MetadataKey("rope.freq_base_swa", "rope_local_base_freq", float, 1e4),
        ),
        GELU,
        period=6,
        two_ropes=True,
        wide_layers=62,
    ),
    GgufArchitecture(
        "phi3",
        "Phi3",
        ("phi3",),
        (*_ENDS, *_NORMS, *_PHI3),
        _KEYS,
        SILU,
        ropes=("longrope",),
        partial=True,
        square=True,
    ),
    GgufArchitecture(
        "olmo2",
        "Olmo2",
        ("olmo2",),
        (*_ENDS, *_POST_NORMS, *_ATTENTION, *_QK_NORMS, *_MLP),
        _KEYS,
        SILU,
        head=True,
        square=True,
    ),
    GgufArchitecture(
        "olmo2",
        "Olmo3",
        ("olmo3",),
        (*_ENDS, *_POST_NORMS, *_ATTENTION, *_QK_NORMS, *_MLP),
        (*_KEYS, _WINDOW),
        SILU,
        marker=_WINDOW.name,
        period=4,
        two_ropes=True,
        head=True,
        square=True,
    ),
    GgufArchitecture(
        "granite",
        "Granite",
        ("granite",),
        (*_LLAMA, *_PERMUTED_BIAS, *_MLP, *_MLP_BIAS),
        (*_KEYS, *_SCALES),
        SILU,
        ropes=_ROPES,
    ),
    GgufArchitecture(  # the text model of a Mistral Small 3
        "mistral3",
        "Mistral",
        ("mistral",),
        (*_LLAMA, *_MLP),
        _KEYS,
        {**SILU, "sliding_window": None},
        ropes=_ROPES,
    ),
    GgufArchitecture(
        "mistral3",
        "Ministral3",
        ("ministral3",),
        (*_LLAMA, *_MLP),
        (*_KEYS, *_MISTRAL3),
        {**SILU, "sliding_window": None},
        marker=_MISTRAL3[0].name,
        ropes=("yarn",),
        yarn={"mscale": 1.0},
    ),
    GgufArchitecture(
        "gpt-oss",
        "GptOss",
        ("gpt_oss",),
        (*_ENDS, *_FIRST_NORM, *_ATTENTION, *_QKV_BIAS, _OV_BIAS[1], *_GPT_OSS),
        (*_KEYS, *_EXPERTS, _EXPERT_WIDTH._replace(key="intermediate_size"), _WINDOW),
        SILU,
        marker="expert_count",
        yarn={"truncate": False},
        period=2,
        head=True,
    ),
)
