"""Tensors under another library's names: there and back bit for bit, misfits shown."""

import numpy as np

from jaxft.weights.relaid import Place, Relaid, relaid
from jaxft.weights.transfer import Export

THERE = {
    "a.v.weight": Place("b.qkv.weight", third=2),
    "a.q.weight": Place("b.qkv.weight", third=0),
    "a.k.weight": Place("b.qkv.weight", third=1),
    "a.table": Place("b.table", "p d -> 1 p d"),
    "a.plain": Place("b.plain"),
}


class Held:
    """Tensors in memory."""

    def __init__(self, arrays):
        self.arrays = arrays

    def keys(self):
        return list(self.arrays)

    def info(self, key):
        return self.arrays[key].shape, self.arrays[key].dtype

    def read(self, key):
        return self.arrays[key]


def test_an_export_moves_there_and_reads_back_bit_for_bit():
    rng = np.random.default_rng(0)
    arrays = {key: rng.standard_normal((4, 6), np.float32) for key in (*THERE, "a.left.out")}
    infos = {key: (array.shape, array.dtype) for key, array in arrays.items()}
    made = relaid(Export(infos, iter(arrays.items())), THERE)
    moved = dict(made.tensors)
    assert {key: (x.shape, x.dtype) for key, x in moved.items()} == made.infos
    thirds = [arrays[f"a.{letter}.weight"] for letter in "qkv"]
    np.testing.assert_array_equal(moved["b.qkv.weight"], np.concatenate(thirds))
    back = {key: Place(place.key, "", place.third) for key, place in THERE.items()}
    back["a.table"] = Place("b.table", "1 p d -> p d")
    view = Relaid(Held(moved), back)
    assert set(view.keys()) == set(THERE)
    for key in THERE:
        assert view.info(key) == infos[key] and view.read(key).tobytes() == arrays[key].tobytes()


def test_a_shape_that_fits_no_layout_is_shown_as_it_is():
    view = Relaid(Held({"b.table": np.zeros((4, 6))}), {"a": Place("b.table", "1 p d -> p d")})
    assert view.info("a")[0] == (4, 6)
