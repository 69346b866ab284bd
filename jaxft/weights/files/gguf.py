"""GGUF files of llama, Qwen 2 and Qwen 3, read as a Hugging Face folder would be."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf_header import TYPES, GgufTensor, read_header
from jaxft.weights.files.gguf_tokenizer import GgufTokenizer
from jaxft.weights.files.tensor_files import Info

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
READ = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # starts of class names


class GgufFile:
    """A GGUF file of one of these models: tensors under Hugging Face keys, config and side files.

    Opening reads only the header. `read` dequantises one tensor. Quantised types are read as
    float32, and the others keep their dtype.
    Raises: UserError that names the file, if it is damaged or of another architecture.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._data, self.metadata, stored = read_header(self.path)
        self._kind = str(self.metadata.get("general.architecture"))
        experts = self.metadata.get(f"{self._kind}.expert_count")
        if self._kind not in READ or experts:
            kind = f"{self._kind} with experts" if experts else repr(self._kind)
            raise self._error(
                f"architecture {kind}; expected a dense {', '.join(READ)}; use its HF folder"
            )
        self.tokenizer = GgufTokenizer(self.path, self.metadata)
        self._heads = {"attn_q": self._integer("attention.head_count")}
        self._heads["attn_k"] = self._integer("attention.head_count_kv", self._heads["attn_q"])
        self._rope_factors = stored.pop("rope_freqs.weight", None)
        self._tensors: dict[str, GgufTensor] = {}
        for tensor in stored.values():
            self._tensors[self._key(tensor.name)] = tensor
            heads = self._heads_of(tensor)
            if heads and tensor.shape[0] % (2 * heads):
                raise self._error(f"{tensor.name} of shape {tensor.shape} has no {heads} heads")
        if "model.embed_tokens.weight" not in self._tensors:
            raise self._error("tensor token_embd.weight is missing; download the file again")

    def _error(self, text: str) -> UserError:
        return UserError(f"{self.path}: {text}")

    def _key(self, name: str) -> str:
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if layer and layer[2] in LAYER:
            return f"model.layers.{layer[1]}.{LAYER[layer[2]]}.{layer[3]}"
        if name in TOP:
            return TOP[name]
        raise self._error(f"tensor {name!r} is not part of a {self._kind} model; use its HF folder")

    def _heads_of(self, tensor: GgufTensor) -> int | None:
        """Return the number of heads of a tensor whose rows llama.cpp permutes, else None."""
        return self._heads.get(tensor.name.split(".")[-2]) if self._kind == "llama" else None

    def keys(self) -> Sequence[str]:
        return list(self._tensors)

    def info(self, key: str) -> Info:
        """Return (shape, dtype) of the array that `read` returns."""
        tensor = self._tensors[key]
        return tensor.shape, TYPES[tensor.type][3]

    def read(self, key: str) -> np.ndarray:
        """Return the tensor in the layout of transformers."""
        tensor = self._tensors[key]
        array = self._array(tensor)
        heads = self._heads_of(tensor)
        if heads is None:
            return array
        # RoPE of llama.cpp rotates pairs of neighbouring rows, that of transformers pairs row i
        # with row i + H / 2 of a head.
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)

    def _array(self, tensor: GgufTensor) -> np.ndarray:
        name, block, _, dtype = TYPES[tensor.type]
        raw = np.asarray(self._data[tensor.offset : tensor.offset + tensor.nbytes])
        if block == 1:
            return raw.view(dtype).copy().reshape(tensor.shape)
        from gguf import GGMLQuantizationType, quants  # 0.2 s that others do not need

        # It takes 16 rows at a time. Wider ones take half the time.
        rows = math.prod(tensor.shape) // tensor.shape[-1]
        wide = raw.reshape(rows // math.gcd(rows, 16), -1)
        with np.errstate(all="ignore"):  # numbers that are not finite are refused later, by name
            return quants.dequantize(wide, GGMLQuantizationType[name]).reshape(tensor.shape)

    def _integer(self, name: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self._kind}.{name}", default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self._error(f"{self._kind}.{name} is {value!r}; expected one positive integer")
        return value

    def _decimal(self, name: str, default: float) -> float:
        """Return the shortest decimal of a stored float32: 1e-05, not 9.999999747378752e-06."""
        value = self.metadata.get(f"{self._kind}.{name}", default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._error(f"{self._kind}.{name} is {value!r}; expected one positive number")
        return float(str(np.float32(value)))

    def config(self) -> dict[str, Any]:
        """Return config.json with the keys of both transformers 4 and 5."""
        width, heads = self._integer("embedding_length"), self._heads["attn_q"]
        head_dim = self._integer("attention.key_length", width // heads)
        if self._integer("rope.dimension_count", head_dim) != head_dim:
            raise self._error("rotates a part of each head only; use its HF folder")
        theta, scaling = self._decimal("rope.freq_base", 10000.0), self._rope_scaling(head_dim)
        dtype = self._dtype().name
        return {
            "architectures": [f"{READ[self._kind]}ForCausalLM"],
            "model_type": self._kind,
            "vocab_size": self._tensors["model.embed_tokens.weight"].shape[0],
            "hidden_size": width,
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._heads["attn_k"],
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._integer("context_length"),
            "rms_norm_eps": self._decimal("attention.layer_norm_rms_epsilon", 1e-5),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._tensors,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": self.tokenizer.token_id("bos"),
            "eos_token_id": self.tokenizer.token_id("eos"),
            "pad_token_id": self.tokenizer.token_id("padding"),
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    def _dtype(self) -> np.dtype:
        """Return the dtype of most elements. Norms are float32 even in half-precision files."""
        sizes: dict[np.dtype, int] = {}
        for tensor in self._tensors.values():
            dtype = TYPES[tensor.type][3]
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensor.shape)
        return max(sizes, key=lambda dtype: sizes[dtype])

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        if self._rope_factors is not None:
            return self._llama3_scaling(head_dim)
        kind = self.metadata.get(f"{self._kind}.rope.scaling.type", "none")
        factor = self._decimal("rope.scaling.factor", 1.0)
        if kind == "none" or (kind == "linear" and factor == 1.0):
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            length = self._integer("rope.scaling.original_context_length")
            return {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": length,
            }
        raise self._error(f"rope scaling {kind!r}; expected none, linear or yarn")

    def _llama3_scaling(self, head_dim: int) -> dict[str, Any] | None:
        """Return Llama 3.1's RoPE scaling, from the divisor that the file stores per frequency.

        The other constants of the formula are assumed, and the stored values are checked by them.
        """
        assert self._rope_factors is not None
        stored = self._array(self._rope_factors)
        factor, low, high, length = float(stored.max()), 1.0, 4.0, 8192
        theta = self._decimal("rope.freq_base", 10000.0)
        turns = length / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
            raise self._error("rope_freqs.weight is not of the Llama 3.1 form; use its HF folder")
        if factor == 1.0:
            return None
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }

    def side_files(self) -> dict[str, bytes]:
        """Return the files that save_pretrained writes beside the weights."""
        config = json.dumps(self.config(), indent=2) + "\n"
        length = self._integer("context_length")
        return {"config.json": config.encode(), **self.tokenizer.files(length)}
