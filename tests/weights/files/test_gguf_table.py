import gguf
import numpy as np
import pytest

from jaxft.weights.files.gguf import GgufFile
from jaxft.weights.files.gguf_architectures import GGUF_ARCHITECTURES
from jaxft.weights.files.gguf_table import stored_shapes, stored_tensors

RNG = np.random.default_rng(0)
ENTRIES = {one.class_name: one for one in GGUF_ARCHITECTURES}
SIZES = {"n": 4, "k": 2, "u": 2}


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def stored(entry, arrays):
    shapes = stored_shapes(entry, {key: array.shape for key, array in arrays.items()}, SIZES)
    made = dict(stored_tensors(entry, arrays.items(), shapes, SIZES))
    assert {name: array.shape for name, array in made.items()} == shapes
    assert all(array.flags.c_contiguous for array in made.values())
    return made


def test_rows_of_q_and_k_are_in_the_order_of_the_converter():
    arrays = {
        f"model.layers.0.self_attn.{name}_proj.{end}": random(rows, 5)[slice(None), 0 : width or 1]
        for name, rows in (("q", 24), ("k", 12))
        for end, width in (("weight", 5), ("bias", 0))
    }
    arrays = {key: x[:, 0] if "bias" in key else x for key, x in arrays.items()}
    made = stored(ENTRIES["Llama"], arrays)
    for name, heads in (("q", 4), ("k", 2)):
        for end in ("weight", "bias"):
            rows = arrays[f"model.layers.0.self_attn.{name}_proj.{end}"]
            halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
            theirs = halves.swapaxes(1, 2).reshape(rows.shape)  # LlamaModel.permute
            assert np.array_equal(made[f"blk.0.attn_{name}.{end}"], theirs)


def test_experts_are_stacked_in_their_order_whatever_order_they_come_in():
    start = "model.layers.3.block_sparse_moe.experts."
    arrays = {f"{start}{e}.w2.weight": random(6, 8) for e in (2, 0, 1)}
    (found,) = stored(ENTRIES["Mixtral"], arrays).values()
    wanted = [arrays[f"{start}{e}.w2.weight"] for e in range(3)]
    assert np.array_equal(found, np.stack(wanted))


def test_a_tensor_of_gate_and_up_becomes_two():
    start = "model.layers.1.mlp.experts."
    arrays = {f"{start}gate_up_proj": random(3, 8, 12), f"{start}gate_up_proj_bias": random(3, 12)}
    made, (matrix, bias) = stored(ENTRIES["GptOss"], arrays), arrays.values()
    for i, name in enumerate(("gate", "up")):  # GptOssModel.modify_tensors
        assert np.array_equal(
            made[f"blk.1.ffn_{name}_exps.weight"], matrix.swapaxes(-1, -2)[:, i::2]
        )
        assert np.array_equal(made[f"blk.1.ffn_{name}_exps.bias"], bias[:, i::2])


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3"])
def test_norms_of_gemma_are_higher_by_one(name):
    arrays = {"model.norm.weight": random(8), "model.layers.0.mlp.up_proj.weight": random(8, 4)}
    made = stored(ENTRIES[name], arrays)
    assert np.array_equal(made["output_norm.weight"], arrays["model.norm.weight"] + 1)
    assert np.array_equal(made["blk.0.ffn_up.weight"], arrays["model.layers.0.mlp.up_proj.weight"])


def test_parts_of_several_types_are_one_array(tmp_path):
    """A quantiser may give each tensor another type."""
    writer, gate, up = (
        gguf.GGUFWriter(tmp_path / "m.gguf", "gpt-oss"),
        random(2, 8, 4),
        random(2, 8, 4),
    )
    writer.add_head_count(4)
    writer.add_expert_count(2)
    writer.add_tensor("token_embd.weight", random(8, 4))
    writer.add_tensor("blk.0.ffn_gate_exps.weight", gate.astype(np.float16))
    writer.add_tensor("blk.0.ffn_up_exps.weight", up)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, key = GgufFile(tmp_path / "m.gguf"), "model.layers.0.mlp.experts.gate_up_proj"
    found = file.read(key)  # [e, d, 2 f], in which the columns of gate and up alternate
    assert file.info(key) == (found.shape, found.dtype) == ((2, 4, 16), np.float32)
    np.testing.assert_array_equal(found[..., ::2], gate.astype(np.float16).swapaxes(1, 2))
    np.testing.assert_array_equal(found[..., 1::2], up.swapaxes(1, 2))
