"""Checkpoints: everything comes back bit for bit, on any mesh, in buffers that can be donated."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.core import sharding
from jaxft.core.errors import UserError
from jaxft.runs.checkpoint import Checkpoints


class Moments(NamedTuple):
    count: Any
    mu: Any
    nothing: tuple


class State(NamedTuple):
    step: Any
    params: dict
    opt: Any


CONFIG = {"optim": {"lr": 1e-3}, "model": "a", "flags": [True, None]}


def host_state(columns=16):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, columns)).astype(np.float32)
    params = {"a.kernel": jnp.asarray(w), "b.kernel": jnp.asarray(w, jnp.bfloat16) * 3}
    moments = Moments(jnp.int32(2**30 + 1), {k: v + 1 for k, v in params.items()}, ())
    return State(jnp.int32(7), params, (moments, ()))


def placed(state, sizes):
    """The state on a mesh: matrices over (fsdp, tensor), scalars everywhere."""
    mesh = sharding.make_mesh(*sizes)

    def place(x):
        spec = P("fsdp", "tensor") if x.ndim == 2 else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_a_state_of_one_mesh_comes_back_bit_for_bit_on_another(tmp_path, sizes):
    state = placed(host_state(), (8, 1, 1))
    saved = Checkpoints(tmp_path)
    assert saved.latest() is None
    saved.save(3, state, CONFIG, {"next_step": 3})
    saved.close()
    target = abstract(placed(host_state(), sizes))
    again = Checkpoints(tmp_path)
    assert again.latest() == 3
    restored, position = again.restore(3, target)
    assert isinstance(restored, State) and isinstance(restored.opt[0], Moments)
    assert_same_bits(restored, host_state())
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, target
    )
    assert position == {"next_step": 3}
    assert again.config(3) == CONFIG
    again.close()


def test_t20_restored_buffers_are_donated_and_reused(tmp_path):
    state = placed(host_state(), (2, 2, 2))
    saved = Checkpoints(tmp_path)
    saved.save(1, state, CONFIG, {})
    saved.wait()
    restored, _ = saved.restore(1, abstract(state))
    saved.close()
    pointers = {
        s.data.unsafe_buffer_pointer() for s in restored.params["a.kernel"].addressable_shards
    }

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda x: x * 2, state)

    after = step(restored)
    assert all(x.is_deleted() for x in jax.tree.leaves(restored))
    reused = {s.data.unsafe_buffer_pointer() for s in after.params["a.kernel"].addressable_shards}
    assert reused == pointers, "the donated memory was not used again"


def test_t20_a_save_survives_the_next_donated_step(tmp_path):
    """Saving is asynchronous, and the very next step overwrites the buffers that it saves."""
    zeros = {"w": jnp.zeros((1024, 1024))}

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda x: x + 1, state)

    state, saved = step(zeros), Checkpoints(tmp_path)
    for number in (1, 2):
        saved.save(number, state, CONFIG, {})
        state = step(state)
    saved.wait()
    for number in (1, 2):
        restored, _ = saved.restore(number, abstract(state))
        np.testing.assert_array_equal(np.unique(restored["w"]), [number])
    saved.close()


def test_a_missing_step_lists_what_there_is(tmp_path):
    saved = Checkpoints(tmp_path)
    state = placed(host_state(), (8, 1, 1))
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; there are: none"):
        saved.restore(5, abstract(state))
    saved.save(2, state, CONFIG, {})
    saved.save(4, state, CONFIG, {})
    saved.wait()
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; there are: 2, 4"):
        saved.restore(5, abstract(state))
    saved.close()


def test_the_newest_three_are_kept_and_a_step_is_saved_once(tmp_path):
    saved = Checkpoints(tmp_path)
    for step in range(1, 6):
        saved.save(step, {"x": jnp.full(3, float(step))}, CONFIG, {"next_step": step})
    saved.save(5, {"x": jnp.zeros(3)}, CONFIG, {})
    saved.close()
    again = Checkpoints(tmp_path)
    assert sorted(again.manager.all_steps()) == [3, 4, 5]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4", "5"]
    target = {"x": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.zeros(3).sharding)}
    restored, position = again.restore(5, target)
    np.testing.assert_array_equal(restored["x"], [5, 5, 5])
    assert position == {"next_step": 5}
    again.close()
