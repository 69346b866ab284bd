"""Views of a checkpoint: what they read, and what an export puts back."""

import ml_dtypes
import numpy as np

from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.transfer import Export
from jaxft.weights.views import (
    THIRDS,
    Grafted,
    InMemory,
    Mapped,
    MoreInputs,
    Overlaid,
    Place,
    Relaid,
    Renamed,
    RowSpan,
    relaid,
)

THERE = {
    "a.v.weight": Place("b.qkv.weight", rows=THIRDS[2]),
    "a.q.weight": Place("b.qkv.weight", rows=THIRDS[0]),
    "a.k.weight": Place("b.qkv.weight", rows=THIRDS[1]),
    "a.wide": Place("b.both", rows=RowSpan(1, 3, 3)),
    "a.narrow": Place("b.both", rows=RowSpan(0, 1, 3)),
    "a.table": Place("b.table", "p d -> 1 p d"),
    "a.plain": Place("b.plain"),
    "a.halves": Place("b.halves", swapped=True),
}


def test_an_export_moves_there_and_reads_back_bit_for_bit():
    rng = np.random.default_rng(0)
    arrays = {key: rng.standard_normal((4, 6), np.float32) for key in (*THERE, "a.left.out")}
    arrays["a.wide"] = rng.standard_normal((8, 6), np.float32)
    infos = {key: (array.shape, array.dtype) for key, array in arrays.items()}
    made = relaid(Export(infos, iter(arrays.items())), THERE)
    moved = dict(made.tensors)
    assert {key: (x.shape, x.dtype) for key, x in moved.items()} == made.infos
    thirds = [arrays[f"a.{letter}.weight"] for letter in "qkv"]
    np.testing.assert_array_equal(moved["b.qkv.weight"], np.concatenate(thirds))
    both = arrays["a.narrow"], arrays["a.wide"]
    np.testing.assert_array_equal(moved["b.both"], np.concatenate(both))
    halves = arrays["a.halves"][2:], arrays["a.halves"][:2]
    np.testing.assert_array_equal(moved["b.halves"], np.concatenate(halves))
    back = {**THERE, "a.table": Place("b.table", "1 p d -> p d")}
    view = Relaid(InMemory(moved), back)
    assert set(view.keys()) == set(THERE)
    for key in THERE:
        assert view.info(key) == infos[key] and view.read(key).tobytes() == arrays[key].tobytes()


def test_a_shape_that_fits_no_layout_is_shown_as_it_is():
    view = Relaid(InMemory({"b.table": np.zeros((4, 6))}), {"a": Place("b.table", "1 p d -> p d")})
    assert view.info("a")[0] == (4, 6)


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


def test_more_inputs_are_zeros_of_the_same_dtype_behind_the_others():
    half = np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2)
    made = MoreInputs(InMemory({"x": half, "y": half}), "x", 2)
    assert made.info("x") == ((2, 5, 2, 2), np.float16) and made.info("y") == (
        half.shape,
        half.dtype,
    )
    kernel = made.read("x")
    assert kernel.dtype == np.float16 and not kernel[:, 3:].any()
    assert np.array_equal(kernel[:, :3], half) and made.read("y") is half
    assert list(made.keys()) == ["x", "y"]


TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def test_old_rows_stay_and_new_rows_are_drawn_like_them(make_folder):
    base = TensorFiles.open(make_folder(dtype="bfloat16"))
    grafted = Grafted(base, TABLES, 4000, seed=1)
    assert list(grafted.keys()) == list(base.keys())
    for key in base.keys():  # noqa: SIM118
        old, new = base.read(key), grafted.read(key)
        assert grafted.info(key) == (new.shape, new.dtype) and new.dtype == old.dtype
        assert new[: len(old)].tobytes() == old.tobytes(), key
        assert len(new) - len(old) == (4000 if key in TABLES else 0)
    old, new = (x.read(TABLES[0]).astype(np.float32) for x in (base, grafted))
    added = new[len(old) :]
    np.testing.assert_allclose(added.mean(0), old.mean(0), atol=4 * old.std() / 4000**0.5)
    np.testing.assert_allclose(added.std(0), old.std(0), rtol=0.06)


def test_the_seed_decides_the_rows_and_tables_differ(make_folder):
    base = TensorFiles.open(make_folder())
    first, again, other = (Grafted(base, TABLES, 8, seed) for seed in (1, 1, 2))
    rows = {key: first.read(key)[-8:] for key in TABLES}
    assert all(rows[key].tobytes() == again.read(key)[-8:].tobytes() for key in TABLES)
    assert all((rows[key] != other.read(key)[-8:]).all() for key in TABLES)
    assert abs(np.corrcoef(rows[TABLES[0]].ravel(), rows[TABLES[1]].ravel())[0, 1]) < 0.3


def test_a_tied_model_has_one_table_to_extend(make_folder):
    base = TensorFiles.open(make_folder(tied=True))
    assert "lm_head.weight" not in set(base.keys())
    assert Grafted(base, TABLES[:1], 8, 0).info(TABLES[0])[0] == (328, 32)
