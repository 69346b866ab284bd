"""The header of a GGUF file, written by the gguf package."""

import subprocess
import sys

import gguf
import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf_header import TYPES, read_header, read_positions

NONE, LINEAR, YARN = (gguf.RopeScalingType[name] for name in ("NONE", "LINEAR", "YARN"))


def write(path, scaling=None, factor=None, factors=False):
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(96)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
    if factor is not None:
        writer.add_rope_scaling_factor(factor)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float16).reshape(2, 32))
    if factors:
        writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_those_of_the_gguf_package(tmp_path):
    path = write(tmp_path / "m.gguf")
    data, metadata, tensors = read_header(path)
    theirs = gguf.GGUFReader(path)
    fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert metadata == {name: field.contents() for name, field in fields.items()}
    (tensor,), (one,) = theirs.tensors, tensors.values()
    assert (one.name, TYPES[one.type][0], one.offset) == (
        tensor.name,
        tensor.tensor_type.name,
        tensor.data_offset,
    )
    assert one.shape == (2, 32) and one.nbytes == tensor.n_bytes
    stored = data[one.offset : one.offset + one.nbytes].view(np.float16)
    assert np.array_equal(stored, np.arange(64))


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, None),
        ({"scaling": NONE}, None),
        ({"scaling": LINEAR, "factor": 1.0}, None),
        ({"scaling": LINEAR, "factor": 4.0}, "linear"),
        ({"scaling": YARN, "factor": 4.0}, "yarn"),
        ({"factors": True}, "llama3"),
    ],
)
def test_positions_and_what_scales_them(tmp_path, fields, kind):
    found = read_positions(write(tmp_path / "m.gguf", **fields))
    assert found["max_position_embeddings"] == 96
    assert found["rope_scaling"] == (kind and {"rope_type": kind})


def test_a_damaged_file_is_named(tmp_path):
    path = write(tmp_path / "m.gguf")
    content = path.read_bytes()
    for size, words in ((0, "not a readable GGUF"), (3, "not a GGUF file"), (60, "ends inside")):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"m\.gguf: .*{words}"):
            read_positions(path)


def test_the_import_takes_no_jax():
    code = "import sys, jaxft.weights.files.gguf_header; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_part_of_a_split_model_says_so(tmp_path):
    """llama-gguf-split writes these keys into each file, and all others into the first alone."""
    writer = gguf.GGUFWriter(tmp_path / "m-00002-of-00003.gguf", "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = r"00002-of-00003\.gguf: one of the 3 files of a split model; join them by llama-gguf"
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "m-00002-of-00003.gguf")
