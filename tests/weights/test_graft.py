"""The larger vocabulary of a grafted checkpoint: old rows bit for bit, new rows like them."""

import numpy as np

from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.graft import Grafted

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
