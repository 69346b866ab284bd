"""Small models and data that the golden runs read, written from a seed without jaxft."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ("<s>", "</s>", "<pad>")
VOCAB = 264  # 256 bytes, the special tokens, and rows that no token has
WORDS = [
    "stone",
    "river",
    "of",
    "small",
    "bread",
    "that",
    "grows",
    "and",
    "a",
    "person",
    "who",
    "sells",
    "warm",
    "light",
    "in",
    "the",
    "south",
]
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
        _write_decoder(folder / name, config)
    _write_records(folder)
    _write_pictures(folder / "pictures")
    _write_pipeline(folder / "pipeline")
    _write_vq(folder / "vq")


# ---- language models and their records ----------------------------------------------------------


def _write_decoder(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, a byte-level tokenizer and random fp32 weights of one decoder."""
    folder.mkdir(parents=True)
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    class_name = names.get(config["model_type"], "SmolLM3") + "ForCausalLM"
    _write_json(folder / "config.json", {"architectures": [class_name], **config})
    _write_tokenizer(folder)
    rng = np.random.default_rng(0)
    tensors = {
        name: _draw(rng, name, shape) for name, shape in sorted(_decoder_shapes(config).items())
    }
    write_tensors(folder / "model.safetensors", tensors)


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
    _write_json(folder / "tokenizer.json", tokenizer)
    named = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128, **named}
    _write_json(folder / "tokenizer_config.json", about)


def _write_records(folder: Path) -> None:
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


# ---- pictures and their models ------------------------------------------------------------------


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


def _write_pipeline(folder: Path) -> None:
    """Write the configs of the demo pipeline in smaller sizes; `init=random` draws weights."""
    (source,) = (file.parent for file in ROOT.rglob("emoji-sd/model_index.json"))
    unet = {
        "block_out_channels": [16, 32],
        "cross_attention_dim": 32,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "norm_num_groups": 8,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    vae = {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "sample_size": 32,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "projection_dim": 32,
    }
    for name, changes in {"unet": unet, "vae": vae, "text_encoder": text}.items():
        (folder / name).mkdir(parents=True)
        config = json.loads((source / name / "config.json").read_text())
        _write_json(folder / name / "config.json", {**config, **changes})
    for name in ("scheduler", "tokenizer"):
        shutil.copytree(source / name, folder / name)
    shutil.copy(source / "model_index.json", folder)


def _write_vq(folder: Path) -> None:
    """Write the config of a small VQModel; `init=random` draws the weights."""
    folder.mkdir()
    config = {
        "_class_name": "VQModel",
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "num_vq_embeddings": 32,
        "sample_size": 32,
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "vq_embed_dim": 4,
    }
    _write_json(folder / "config.json", config)


# ---- files --------------------------------------------------------------------------------------


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write fp32 arrays as a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
