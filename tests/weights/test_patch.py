"""Views of a checkpoint: what is laid over it, what is made of it, all else as it was."""

import ml_dtypes
import numpy as np

from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.folders.diffusers import Renamed
from jaxft.weights.patch import Mapped, Overlaid


def files(folder, tensors):
    folder.mkdir()
    infos = {key: (one.shape, one.dtype) for key, one in tensors.items()}
    write_sharded(folder, tensors.items(), infos)
    return TensorFiles.open(folder)


def test_what_lies_over_a_checkpoint_is_read_in_its_place(tmp_path):
    base = files(tmp_path / "a", {"x": np.zeros(2, np.float32), "y": np.arange(3)})
    over = files(tmp_path / "b", {"y": np.ones(4, np.float32), "z": np.arange(5)})
    made = Overlaid(base, Renamed(over, {"y": "y", "new.z": "z"}))
    assert made.keys() == [*base.keys(), "new.z"]
    assert made.info("y") == ((4,), np.float32) and made.read("y").tolist() == [1] * 4
    assert made.read("x").tobytes() == base.read("x").tobytes()
    assert made.read("new.z").tolist() == [0, 1, 2, 3, 4]


def test_what_is_made_of_a_tensor_is_fp32_and_the_others_are_as_they_were(tmp_path):
    half = np.array([1, 2], ml_dtypes.bfloat16)
    made = Mapped(files(tmp_path / "a", {"x": half, "y": half}), {"x": lambda x: x / 3})
    assert made.info("x") == ((2,), np.float32) and made.info("y")[1] == half.dtype
    np.testing.assert_allclose(made.read("x"), [1 / 3, 2 / 3], rtol=1e-7)
    assert made.read("y").tobytes() == half.tobytes()
