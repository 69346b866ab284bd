"""The step compiled ahead: once for each shape of batch, by the first policy that fits."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.core.errors import UserError
from jaxft.runs.compiling import Compiled, needed_bytes

BATCH = {"x": jnp.ones((3, 2))}


def summed(state, frozen, batch):
    return state + batch["x"].sum()


class Refused:
    """A step that the compiler of a TPU refuses."""

    def lower(self, *_):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: used 20.5G of 15.75G hbm")


class Broken(Refused):
    def compile(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: another fault")


def test_a_batch_of_a_shape_that_nobody_foretold_is_compiled_when_it_comes(capsys):
    step = Compiled({"none": jax.jit(summed)})
    for rows in (3, 4, 3):
        assert step(jnp.zeros(()), {}, {"x": jnp.ones((rows, 2))}) == 2 * rows
    said = capsys.readouterr().out
    assert all(f"compiled the step for a batch of {rows} x 2 in" in said for rows in (3, 4))
    assert said.count("compiled") == 2


def test_a_step_that_does_not_fit_makes_room_for_the_next_policy(capsys):
    def large(state, frozen, batch):
        return state + jnp.sin(jnp.arange(2**20) + batch["x"].sum()).sort().sum()

    most = needed_bytes(jax.jit(large).lower(0.0, {}, BATCH).compile().memory_analysis())
    least = needed_bytes(jax.jit(summed).lower(0.0, {}, BATCH).compile().memory_analysis())
    assert most > 2**20 > 2 * least, "the two steps differ in memory"
    step = Compiled({"none": jax.jit(large), "full": jax.jit(summed)}, 2 * least)
    assert step(jnp.zeros(()), {}, BATCH) == 6 and step.remat == "full"
    said = capsys.readouterr().out
    assert (
        "remat=none needs 0.0" in said
        and "trying full" in said
        and "(remat full, attention blockwise)" in said
    )
    roomy = Compiled({"none": jax.jit(large), "full": jax.jit(summed)}, 2 * most)
    roomy.prepare(jnp.zeros(()), {}, BATCH)
    assert roomy.remat == "none"


def test_a_step_that_the_compiler_refuses_makes_room_too():
    step = Compiled({"none": Refused(), "full": jax.jit(summed)}, 2**20)
    assert step(jnp.zeros(()), {}, BATCH) == 6
    with pytest.raises(UserError, match=r"does not fit on a device with remat=full; lower batch"):
        Compiled({"full": Refused()}, 2**20).prepare(jnp.zeros(()), {}, BATCH)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another fault"):
        Compiled({"none": Broken(), "full": jax.jit(summed)}).prepare(jnp.zeros(()), {}, BATCH)
