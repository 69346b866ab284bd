import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import quantize

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf_header import TYPES
from jaxft.weights.files.gguf_writer import type_name, write_gguf

RNG = np.random.default_rng(0)
KIND = gguf.GGMLQuantizationType
METADATA = {
    "general.architecture": "llama",
    "a.text": "Zürich 🙂",
    "a.flag": True,
    "a.count": 2**32 - 1,
    "a.number": 1e-5,
    "a.texts": ["", "a b", "▁x"],
    "a.kinds": np.array([1, -2, 3], np.int32),
    "a.scores": np.array([0, -1.5], np.float32),
}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_the_gguf_package_reads_every_value_and_tensor(tmp_path, kind):
    arrays = {
        "one": RNG.standard_normal((3, 64)).astype(np.float32),
        "vector": RNG.standard_normal(5).astype(np.float32),  # the next one has to be aligned
        "two": RNG.standard_normal((2, 3, 32)).astype(np.float32),
    }
    infos = {x: (y.shape, "F32" if y.ndim == 1 else kind) for x, y in arrays.items()}
    write_gguf(tmp_path / "m.gguf", METADATA, infos, reversed(arrays.items()))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    values = {key: field.contents() for key, field in reader.fields.items() if "GGUF." not in key}
    assert values.keys() == METADATA.keys()
    for key, value in METADATA.items():
        wanted = np.float32(value) if isinstance(value, float) else value
        assert np.array_equal(values[key], wanted), key
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, array in arrays.items():
        stored = KIND[infos[name][1]]
        assert tensors[name].tensor_type == stored and tensors[name].data_offset % 32 == 0
        assert tensors[name].shape.tolist() == list(array.shape[::-1])
        assert np.asarray(tensors[name].data).tobytes() == quantize(array, stored).tobytes()


def test_tensors_that_were_not_announced_or_do_not_fit_are_errors(tmp_path):
    infos = {"one": ((2, 32), "F16")}
    zeros = np.zeros((2, 32), np.float32)
    for tensors in ([], [("one", zeros[:1])], [("one", zeros), ("one", zeros)]):
        with pytest.raises(ValueError, match="one"):
            write_gguf(tmp_path / "m.gguf", {}, infos, tensors)
    with pytest.raises(UserError, match=r"one overflows float16; export with export\.dtype"):
        write_gguf(tmp_path / "m.gguf", {}, infos, [("one", zeros + 1e6)])


def test_types_by_name_shape_and_dtype():
    half, exact, name = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float64), "blk.0.ffn_up.weight"
    assert type_name(name, (4,), half, "Q8_0") == type_name(name, (4,), half, "") == "F32"
    assert type_name(name, (4, 64), half, "") == "BF16"
    assert type_name(name, (4, 64), exact, "") == type_name(name, (4, 48), half, "Q8_0") == "F32"
    assert type_name(name, (4, 64), half, "Q4_0") == "Q4_0"
    for other in ("blk.0.ffn_gate_inp.weight", "blk.0.ffn_up_exps.bias"):
        assert type_name(other, (4, 64), half, "Q4_0") == "F32"
    assert {row[0] for row in TYPES.values()} > {"F32", "F16", "BF16", "Q8_0"}
