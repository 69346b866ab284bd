"""The training step: exact sums, clipping, freezing, keys, one compile, donated state."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from jaxft.core import optim, sharding
from jaxft.core.optimizers import adam
from jaxft.core.params import bind, describe, flatten
from jaxft.core.step import (
    StepSpec,
    cast,
    init_state,
    make_step,
    make_update,
    sample_keys,
    state_shardings,
)
from jaxft.nn.linear import Linear, dropout

DIM, ROWS = 8, 16
# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
WEIGHTS = np.array([1e-6, 3.0, 1.0, 200.0] * 4, np.float32)


class Net(nnx.Module):
    def __init__(self, key):
        first, second = jax.random.split(key)
        self.up = Linear((DIM,), (16,), ("embed", "mlp"), key=first, bias=True, std=0.3)
        self.down = Linear((16,), (DIM,), ("mlp", "embed"), key=second, std=0.3)

    def __call__(self, x, keys=None, rate=0.0):
        x = jnp.tanh(self.up(x))
        if rate:
            x = dropout(x, keys, self.down.adapter._replace(dropout=rate))
        return self.down(x)


START = flatten(Net(jax.random.key(1)))
TEMPLATE = jax.eval_shape(Net, jax.random.key(0))
LEAVES = describe(TEMPLATE)


def loss(model, batch, keys, step=0, rate=0.0):
    error = jnp.square(model(batch["x"], keys, rate) - batch["y"]).mean(-1)
    weight = batch["weight"]
    sums = {"doubled": 2 * jnp.sum(error * weight)}
    return (jnp.sum(error * weight), jnp.sum(weight)), sums


def host_batch(order=None):
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(ROWS, DIM)).astype(np.float32),
        "y": rng.normal(size=(ROWS, DIM)).astype(np.float32),
        "weight": WEIGHTS,
        "sample_ids": np.arange(100, 100 + ROWS, dtype=np.int32),
    }
    return {name: rows if order is None else rows[order] for name, rows in batch.items()}


def one_device_mesh():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


class Rig:
    """A model, its optimiser and its compiled step on a mesh."""

    def __init__(
        self,
        sizes=(8, 1, 1),
        micro=1,
        pattern=".*",
        clip=0.0,
        ema=0.0,
        rate=0.0,
        tx=None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        seed=0,
    ):
        self.mesh = sharding.make_mesh(*sizes) if sizes else one_device_mesh()
        shards = sharding.shardings(LEAVES, self.mesh)
        params = {k: v.astype(param_dtype) for k, v in START.items()}
        chosen = {path for path in LEAVES if re.fullmatch(pattern, path)}
        leaves = {path: LEAVES[path] for path in chosen}
        schedule = optax.constant_schedule(0.1)
        if tx is None:
            tx = optax.sgd(schedule)
        if clip:
            tx = optax.chain(optax.clip_by_global_norm(clip), tx)
        placed = {path: jax.device_put(params[path], shards[path]) for path in params}
        self.frozen = {path: placed[path] for path in params if path not in chosen}
        where = state_shardings(tx, leaves, shards, ema, self.mesh)
        with jax.set_mesh(self.mesh):
            init = jax.jit(
                partial(init_state, tx, ema=ema), out_shardings=where, compiler_options=QUICK
            )
            self.state = init({path: jnp.copy(placed[path]) for path in chosen})
        spec = StepSpec(micro, dtype, ema, seed)
        task_loss = partial(loss, rate=rate)
        update = make_update(TEMPLATE, task_loss, tx, schedule, spec)
        self.step = make_step(update, where, self.mesh)
        self.compiled = None

    def run(self, batch=None):
        arguments = (
            self.state,
            self.frozen,
            sharding.place_batch(batch or host_batch(), self.mesh),
        )
        with jax.set_mesh(self.mesh):
            if self.compiled is None:
                self.compiled = self.step.lower(*arguments).compile(compiler_options=QUICK)
            self.state, report = self.compiled(*arguments)
        return {k: np.asarray(v) for k, v in report.items()}

    def params(self):
        return {path: np.asarray(x).astype(np.float32) for path, x in self.state.params.items()}


@pytest.fixture(scope="module")
def oracle():
    """(loss, gradients) of the whole batch in one piece, without any of the step's machinery."""
    batch = host_batch()

    def mean(params):
        error = jnp.square(bind(TEMPLATE, params)(batch["x"]) - batch["y"]).mean(-1)
        return jnp.sum(error * (WEIGHTS / WEIGHTS.sum()))

    return jax.jit(jax.value_and_grad(mean), compiler_options=QUICK)(START)


@pytest.mark.parametrize(
    ("sizes", "micro"), [(None, 1), ((8, 1, 1), 2), ((1, 8, 1), 1), ((2, 2, 2), 2)]
)
def test_t09_t16_gradients_are_those_of_the_whole_batch(oracle, sizes, micro):
    value, grads = oracle
    rig = Rig(sizes, micro)
    before = rig.params()
    report = rig.run()
    np.testing.assert_allclose(report["loss"], value, rtol=2e-6)
    np.testing.assert_allclose(report["doubled"], 2 * value, rtol=2e-6)
    np.testing.assert_allclose(report["weight"], WEIGHTS.sum(), rtol=1e-6)
    np.testing.assert_allclose(report["grad_norm"], optax.tree.norm(grads), rtol=2e-6)
    for path, after in rig.params().items():
        np.testing.assert_allclose((before[path] - after) / 0.1, grads[path], atol=2e-6)


def test_t09_four_micro_batches_of_unequal_weight(oracle):
    """Each micro-batch of four holds one kind of weight: from 4e-6 to 800 in sum."""
    value, grads = oracle
    rig = Rig(None, micro=4)
    before = rig.params()
    assert np.ptp(np.log10(WEIGHTS.reshape(4, 4).sum(0))) > 8
    np.testing.assert_allclose(rig.run()["loss"], value, rtol=2e-6)
    for path, after in rig.params().items():
        np.testing.assert_allclose((before[path] - after) / 0.1, grads[path], atol=2e-6)


@pytest.mark.parametrize("micro", [1, 4])
def test_t16_clips_once_after_accumulation_and_reports_the_norm_before(oracle, micro):
    _, grads = oracle
    norm, clip = float(optax.tree.norm(grads)), 1e-3
    assert norm > 100 * clip
    rig = Rig(None, micro, clip=clip)
    before = rig.params()
    np.testing.assert_allclose(rig.run()["grad_norm"], norm, rtol=2e-6)
    moved = {path: before[path] - after for path, after in rig.params().items()}
    np.testing.assert_allclose(optax.tree.norm(moved), 0.1 * clip, rtol=1e-3)


def test_a_batch_without_weight_moves_nothing():
    rig = Rig(None)
    before = rig.params()
    report = rig.run(host_batch() | {"weight": np.zeros(ROWS, np.float32)})
    assert report["loss"] == 0 and report["grad_norm"] == 0
    for path, after in rig.params().items():
        np.testing.assert_array_equal(after, before[path])


@pytest.mark.parametrize("direction", [adam.adam, adam.adam_8bit])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_d9_a_step_that_is_not_finite_changes_counters_alone(direction, value, monkeypatch):
    """A loss of NaN, and a finite loss whose gradients are not: tanh of infinity has an end."""
    monkeypatch.setattr(adam, "SMALLEST", 1)
    rig = Rig(None, ema=0.9, tx=optax.chain(direction(0.9, 0.99), optax.scale(-0.1)))
    rig.run()
    before = jax.tree.map(np.asarray, rig.state)
    assert (direction is adam.adam) or any(x.dtype == np.int8 for x in jax.tree.leaves(before))
    bad = host_batch()
    bad["x"][3, 2] = value
    report = rig.run(bad)
    assert np.isfinite(report["loss"]) == np.isinf(value) and np.isnan(report["grad_norm"])
    after = jax.tree.map(np.asarray, rig.state)
    assert after.step == 2
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        counter = old.ndim == 0 and old.dtype == np.int32
        np.testing.assert_array_equal(new, old + 1 if counter else old)


def test_t16_frozen_parameters_have_no_moments_and_do_not_move():
    schedule = optax.constant_schedule(0.1)
    tx = optim.make_optimizer(
        "adamw", schedule, b1=0.9, b2=0.999, weight_decay=0.1, clip=1.0, leaves=LEAVES
    )
    rig = Rig((2, 2, 2), pattern=r"up\..*", tx=tx)
    frozen = {path: np.asarray(x) for path, x in rig.frozen.items()}
    before = rig.params()
    rig.run()
    assert frozen.keys() == {"down.kernel"} and before.keys() == {"up.kernel", "up.bias"}
    held = {str(path) for path, _ in jax.tree_util.tree_leaves_with_path(rig.state)}
    assert held and not any("down" in path for path in held)
    np.testing.assert_array_equal(rig.frozen["down.kernel"], frozen["down.kernel"])
    assert all(np.abs(after - before[p]).min() > 0 for p, after in rig.params().items())
    bytes_held = sum(x.nbytes for x in jax.tree.leaves(rig.state.opt))
    assert bytes_held <= 2 * sum(x.nbytes for x in rig.state.params.values()) + 64


def test_the_average_is_neither_the_start_nor_the_parameters():
    rig = Rig((1, 8, 1), ema=0.9)
    start = rig.params()
    for path, average in rig.state.ema.items():
        np.testing.assert_array_equal(average, start[path])
    rig.run()
    first = rig.params()
    rig.run()
    for path, average in rig.state.ema.items():
        after = rig.params()[path]
        assert average.dtype == jnp.float32
        assert np.abs(average - start[path]).max() > 1e-6
        assert np.abs(average - after).max() > 1e-6
        assert average.sharding == rig.state.params[path].sharding
        expect = first[path] + 9 / 11 * (after - first[path])  # diffusers: rate 2 / 11 at step 1
        np.testing.assert_allclose(average, expect, atol=1e-6)


def test_it_compiles_once_and_keeps_its_shardings():
    schedule = optax.constant_schedule(0.1)
    tx = optim.make_optimizer(
        "adamw", schedule, b1=0.9, b2=0.999, weight_decay=0.0, clip=1.0, leaves=LEAVES
    )
    rig = Rig((2, 2, 2), tx=tx, ema=0.9)
    rig.compiled = rig.step  # through jit's own cache
    placed = jax.tree.map(lambda x: x.sharding, rig.state)
    for _ in range(3):
        rig.run()
    assert rig.step._cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, rig.state) == placed
    assert int(rig.state.step) == 3


def test_t20_the_state_is_donated():
    rig = Rig((2, 2, 2), ema=0.9)
    old, frozen = rig.state, rig.frozen
    rig.run()
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert not any(x.is_deleted() for x in frozen.values())


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_t01_gradients_are_summed_in_fp32_whatever_the_dtypes(param_dtype):
    """1024 equal micro-batch gradients: a bf16 running sum stalls long before their total."""
    parts = 1024
    mesh = one_device_mesh()
    params = {"up.kernel": jnp.full((DIM, 16), 0.5, param_dtype)}
    frozen = {"up.bias": jnp.zeros(16), "down.kernel": jnp.zeros((16, DIM))}

    def linear(model, batch, keys, step):
        del keys
        total = jnp.sum(model.up.kernel[...].astype(jnp.float32)[0, 0] * batch["weight"])
        return (total, jnp.sum(batch["weight"])), {}

    leaves = {"up.kernel": LEAVES["up.kernel"]}
    tx = optax.sgd(0.0)
    where = state_shardings(tx, leaves, sharding.shardings(leaves, mesh), 0.0, mesh)
    spec = StepSpec(parts, jnp.bfloat16, 0.0, 0)
    step = make_step(make_update(TEMPLATE, linear, tx, lambda _: 0.0, spec), where, mesh)
    batch = {"weight": jnp.ones(parts), "sample_ids": jnp.arange(parts)}
    with jax.set_mesh(mesh):
        _, report = step(init_state(tx, params, 0.0), frozen, batch)
    np.testing.assert_allclose(report["grad_norm"], 1.0, rtol=1e-6)


def test_compute_dtype_leaves_the_masters_alone():
    rig = Rig(None, dtype=jnp.bfloat16)
    report = rig.run()
    assert all(x.dtype == jnp.float32 for x in rig.state.params.values())
    assert all(value.dtype == np.float32 for value in report.values())
    exact = Rig(None).run()["loss"]
    assert report["loss"] != exact
    np.testing.assert_allclose(report["loss"], exact, rtol=2e-2)
    assert cast({"a": jnp.ones(2)}, jnp.bfloat16)["a"].dtype == jnp.bfloat16


def test_keys_are_of_seed_step_and_sample():
    def data(seed, step, ids):
        return np.asarray(jax.random.key_data(sample_keys(seed, step, jnp.array(ids))))

    base = data(0, 3, [5, 9, 2])
    np.testing.assert_array_equal(data(0, 3, [2, 5, 9]), base[[2, 0, 1]])
    np.testing.assert_array_equal(data(0, jnp.int32(3), [5]), base[:1])
    everything = [base, data(1, 3, [5, 9, 2]), data(0, 4, [5, 9, 2])]
    rows = {row.tobytes() for block in everything for row in block}
    assert len(rows) == 9


@pytest.fixture(scope="module")
def losses(oracle):
    """Of two steps with dropout, in one piece on one device."""
    rig = Rig(None, rate=0.5)
    values = [rig.run()["loss"] for _ in range(2)]
    assert abs(values[0] - oracle[0]) > 1e-2, "the dropout is to be seen"
    return values


@pytest.mark.parametrize(
    ("sizes", "micro", "order"),
    [((8, 1, 1), 2, None), ((2, 2, 2), 1, "shuffled")],
)
def test_t19_dropout_depends_on_the_sample_not_on_place(losses, sizes, micro, order):
    expected_losses = losses
    shuffled = np.random.default_rng(3).permutation(ROWS) if order else None
    rig = Rig(sizes, micro, rate=0.5)
    for expect in expected_losses:
        np.testing.assert_allclose(rig.run(host_batch(shuffled))["loss"], expect, rtol=2e-6)


def test_t19_dropout_differs_from_step_to_step():
    rig = Rig(None, rate=0.5, tx=optax.sgd(0.0))
    assert rig.run()["loss"] != rig.run()["loss"]
