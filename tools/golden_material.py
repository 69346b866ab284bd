"""Small models and data that the golden runs read, written from a seed without jaxft."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from golden_pictures import write_json, write_pipeline, write_vq
from PIL import Image
from safetensors.numpy import save_file

SPECIAL = ("<s>", "</s>", "<pad>")
VOCAB = 264  # 256 bytes, the special tokens, and rows that no token has
WORDS = ("stone", "river", "of", "bread", "that", "grows", "and", "a", "person", "warm", "light")
LABELS = ("plant", "person", "act", "artifact")
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "llama-deep": {"num_hidden_layers": 10},  # more layers than a CPU's step unrolls
    "mistral": {"model_type": "mistral", "sliding_window": 12},
    "qwen2-alternating": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "tie_word_embeddings": True},
}


def write_material(folder: Path) -> None:
    """Write every model and data set that the cases name, each in a folder of its own."""
    for name, changes in DECODERS.items():
        config = {"model_type": "llama", **SHAPE, **changes}
        write_decoder(folder / name, config)
    write_records(folder)
    _write_pictures(folder / "pictures")
    write_pipeline(folder / "pipeline")
    write_vq(folder / "vq")


# ---- language models and their records ----------------------------------------------------------


def write_decoder(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, a byte-level tokenizer and random fp32 weights of one decoder."""
    folder.mkdir(parents=True)
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    class_name = names.get(config["model_type"], "SmolLM3") + "ForCausalLM"
    write_json(folder / "config.json", {"architectures": [class_name], **config})
    _write_tokenizer(folder)
    rng = np.random.default_rng(0)
    tensors = {
        name: _draw(rng, name, shape) for name, shape in sorted(_decoder_shapes(config).items())
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _decoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of transformers' class by name."""
    width, ffn, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", width // heads)
    shapes = {"model.embed_tokens.weight": (VOCAB, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, width)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        for name, size in rows.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, width)
            if kind == "qwen2":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, heads * head_dim)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (ffn, width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, ffn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (width,)
        if kind == "qwen3":
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    return shapes


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    drawn = 0.1 * rng.standard_normal(shape)
    return (drawn + 1.0 if "norm" in name else drawn).astype(np.float32)


def _write_tokenizer(folder: Path) -> None:
    """Write a BPE tokenizer without merges: each byte is a token, by GPT-2's table of letters."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    added = [{"id": 256 + i, "content": text, **flags} for i, text in enumerate(SPECIAL)]
    bytes_only = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": bytes_only,
        "decoder": bytes_only,
        "model": {
            "type": "BPE",
            "vocab": {letters[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)
    named = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128, **named}
    write_json(folder / "tokenizer_config.json", about)


def write_records(folder: Path) -> None:
    """Write labelled.jsonl (a text and its label, of unequal lengths) and texts.jsonl (long)."""
    rng = np.random.default_rng(1)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    labelled = [
        {"text": words(1 + i % 6), "label": LABELS[rng.integers(len(LABELS))]} for i in range(48)
    ]
    texts = [{"text": words(12 + i % 5)} for i in range(48)]
    for name, rows in (("labelled", labelled), ("texts", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)


# ---- pictures ------------------------------------------------------------------


def _write_pictures(folder: Path) -> None:
    """Write sixteen smooth pictures with captions, every third one wider than high."""
    folder.mkdir()
    rng = np.random.default_rng(2)
    rows = []
    for i in range(16):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        size = (48, 40) if i % 3 == 0 else (40, 40)
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
        rows.append({"file_name": f"{i:02}.png", "text": " ".join(rng.choice(WORDS, 1 + i % 5))})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
