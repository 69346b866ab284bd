"""Faults on purpose: which ones a variable names, and that they happen only there."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.core.guards.faults import FAULTS, Fault, inject, planned_faults, with_nan


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill@step:37", Fault("kill", "step", 37, "")),
        ("kill@save:2", Fault("kill", "save", 2, "")),
        ("enospc@save:1", Fault("enospc", "ckpt", 1, "")),
        ("stall@rank1:step5", Fault("stall", "step", 5, "1")),
        ("flip@ckpt", Fault("flip", "ckpt", 1, "")),
        ("nan@step:9", Fault("nan", "step", 9, "")),
    ],
)
def test_faults_by_name(monkeypatch, text, fault):
    monkeypatch.setenv(FAULTS, f"{text},kill@export")
    assert planned_faults() == [fault, Fault("kill", "export", 1, "")]


@pytest.mark.parametrize("text", ["kill", "kill@lunch:3", "nan@save:1", "flip@step:2", "stall@5"])
def test_an_unknown_fault_is_refused(monkeypatch, text):
    monkeypatch.setenv(FAULTS, text)
    with pytest.raises(UserError, match="expected such as kill@step:37"):
        planned_faults()


def test_a_loss_is_nan_at_its_step_and_the_program_has_nothing_of_it_without(monkeypatch):
    monkeypatch.delenv(FAULTS, raising=False)
    plain = jax.make_jaxpr(with_nan)(1.0, 3)
    assert not plain.eqns
    monkeypatch.setenv(FAULTS, "nan@step:4")
    made = [float(with_nan(jnp.float32(1), step)) for step in (2, 3, 4)]
    np.testing.assert_array_equal(made, [1, np.nan, 1])


def test_faults_of_written_checkpoints(monkeypatch, tmp_path):
    file = tmp_path / "7" / "state" / "d" / "numbers"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(9))
    inject("ckpt", 2, 0, tmp_path / "7")
    monkeypatch.setenv(FAULTS, "flip@ckpt:2,enospc@save:3")
    for number, rank in ((1, 0), (2, 1)):
        inject("ckpt", number, rank, tmp_path / "7")
        assert file.read_bytes() == bytes(9)
    inject("ckpt", 2, 0, tmp_path / "7")
    assert sum(file.read_bytes()) == 1, "one bit"
    with pytest.raises(OSError) as raised:
        inject("ckpt", 3, 0, tmp_path / "7")
    assert raised.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["7.orbax-checkpoint-tmp-0"]
