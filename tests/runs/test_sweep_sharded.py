"""A sweep on eight devices: rows and base are sharded, and the axis of members is not."""

import pytest

from jaxft import train
from tests.runs.test_sweep import CONFIG, KEYS, compare, own_run


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"mesh.fsdp": 8}, {"mesh.fsdp": 4, "mesh.tensor": 2}], ids=str)
def test_a_member_equals_its_own_run_on_the_same_mesh(make_folder, make_flags, tmp_path, shape):
    folder, keys = make_folder(), {**KEYS, "sweep": "lora.rank=2,4 seed=0,3", **shape}
    flags = make_flags(folder, {**keys, "optim.lr": 2e-2})
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "a"), *flags]) == 0
    own_run(folder, make_flags, tmp_path / "b", "lr2e-2-rank2-seed3", **shape)
    compare(tmp_path / "a", tmp_path / "b", "rank2-seed3")
