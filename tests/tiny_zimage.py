"""Tiny random pipelines of Z-Image as diffusers saves them: the base and Turbo."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.tiny_pipelines import shaken
from tests.tiny_sd3 import make_flow_vae

TRANSFORMER = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [8, 8, 8],
    "axes_lens": [544, 32, 32],
}
SHIFTS = {"base": 6.0, "turbo": 3.0}
SPECIALS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"]
# Qwen 3's own, for one user's turn.
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}"""


def make_qwen_tokenizer():
    """One token a byte and those of a chat; the size of its vocabulary."""
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    made = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": SPECIALS})
    made.chat_template = TEMPLATE
    return made, len(made)


QWEN = {  # of width 16
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def make_qwen(words, layers=3):
    """A random Qwen 3."""
    config = Qwen3Config(vocab_size=words, num_hidden_layers=layers, **QWEN)
    return shaken(Qwen3Model(config))


def calmed(denoiser):
    """Times are embedded through 1024 units, so that shaken weights would change all of a block."""
    with torch.no_grad():
        for name, tensor in denoiser.named_parameters():
            tensor.mul_(0.2 if "t_embedder.mlp.2" in name or "adaLN" in name else 1.0)
    return denoiser


def make_zimage(kind="base", **transformer):
    """A ZImagePipeline; saves nothing."""
    torch.manual_seed(0)
    tokenizer, words = make_qwen_tokenizer()
    scheduler = {"shift": SHIFTS.get(kind, 1.0), "use_dynamic_shifting": kind == "dynamic"}
    return ZImagePipeline(
        transformer=calmed(shaken(ZImageTransformer2DModel(**{**TRANSFORMER, **transformer}))),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=shaken(make_flow_vae(0.3611, 0.1159)),
        text_encoder=make_qwen(words),
        tokenizer=tokenizer,
    )
