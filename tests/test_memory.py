"""Host memory: importing a model costs its bytes in the parameter dtype and little more."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxft.weights.files.tensor_files import write_sharded

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import resource, sys
import jax, jaxft
jax.devices()
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = jaxft.load(sys.argv[1], dtype=sys.argv[2])
jax.block_until_ready(model.params)
print(start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def random_llama(folder, layers, dim, ffn, vocab, dtype):
    """A folder of random weights, written tensor by tensor; returns the parameter count."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": dim // 64,
        "num_key_value_heads": dim // 256,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {at + f"self_attn.{x}_proj.weight": (dim, dim) for x in "qo"}
        shapes |= {at + f"self_attn.{x}_proj.weight": (dim // 4, dim) for x in "kv"}
        shapes |= {at + f"mlp.{x}_proj.weight": (ffn, dim) for x in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (dim, ffn)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[at + f"{norm}.weight"] = (dim,)
    rng = np.random.default_rng(0)
    infos = {key: (shape, np.dtype(dtype)) for key, shape in shapes.items()}
    tensors = (
        (key, rng.standard_normal(shape, np.float32).astype(dtype)) for key, shape in shapes.items()
    )
    write_sharded(folder, tensors, infos)
    return sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_importing_a_billion_parameters_peaks_at_their_bytes_and_a_gibibyte(tmp_path, dtype):
    count = random_llama(tmp_path, 16, 2048, 8192, 32768, ml_dtypes.bfloat16)
    assert count > 1.0e9
    command = [sys.executable, "-c", LOAD, str(tmp_path), dtype]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    start, peak = (int(word) * 1024 for word in ran.stdout.split()[-2:])
    size = count * np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else "float32").itemsize
    over = (peak - size) / 2**30
    print(
        f"{count / 1e9:.2f} B parameters as {dtype}: {size / 2**30:.2f} GiB;"
        f" peak {peak / 2**30:.2f} GiB, {over:.2f} more ({start / 2**30:.2f} before the import)"
    )
    assert over < 1.0
