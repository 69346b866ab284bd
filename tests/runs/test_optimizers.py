"""Runs with 8-bit moments, with a schedule-free average and with learning rates by regex."""

import shutil

import jax
import numpy as np
import pytest

from jaxft import train
from jaxft.core.optimizers.adam import Moment
from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.folders.workdir import read_config_file
from jaxft.runs.opening import open_run
from jaxft.runs.state import abstract_state
from tests.runs.test_train import CONFIG, timeless, weights

COMMON = {
    "lora.rank": 0, "optim.lr": 1e-2, "optim.schedule": "constant", "total": "6_steps",
    "every.save": "3_steps", "every.eval": "2_steps", "batch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", ["adamw_8bit", "schedule_free"])
def test_a_run_resumes_bitwise_from_its_state(make_folder, make_flags, tmp_path, quick, name):
    keys = {**COMMON, "optim.name": name, "optim.lr_by": ".*embedding=0.1, .*norm.*=2"}
    arguments = [*CONFIG, *make_flags(make_folder(), keys)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train.main([*arguments, "--workdir", str(whole)]) == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "6")
    shutil.rmtree(broken / "export")
    assert train.main([*arguments, "--workdir", str(broken)]) == 0
    assert timeless(whole) == timeless(broken)
    a, b = (weights(place / "export") for place in (whole, broken))
    assert all(a[key].tobytes() == b[key].tobytes() for key in a)


def test_the_state_and_the_exported_weights(make_folder, make_flags, tmp_path, quick):
    """The export is the average, and the checkpoint keeps the point at which gradients are."""
    found = {}
    for name in ("adamw_8bit", "schedule_free"):
        work = tmp_path / name
        flags = make_flags(make_folder(), {**COMMON, "optim.name": name})
        assert train.main([*CONFIG, "--workdir", str(work), *flags]) == 0
        run = open_run(read_config_file(work))
        with jax.set_mesh(run.mesh):
            state, _ = Checkpoints(work).restore(6, abstract_state(run))
        made = weights(work / "export")["model.norm.weight"]
        found[name] = state, made, np.asarray(state.params["norm.scale"])
    state, made, params = found["adamw_8bit"]
    np.testing.assert_array_equal(made, params)
    assert any(isinstance(x, Moment) for x in state.opt[1].mu.values())
    state, made, params = found["schedule_free"]
    z = np.asarray(state.opt[1].z["norm.scale"])
    np.testing.assert_allclose(made, (params - 0.1 * z) / 0.9, rtol=1e-6)
    assert not np.array_equal(made, params)
