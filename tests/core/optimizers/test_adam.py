"""Moments of 8 bits: their error, their bytes, their shardings, and training with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.core.configs.files import PACKAGE
from jaxft.core.optimizers import adam
from jaxft.core.optimizers.adam import FIRST, SECOND, Moment
from tests.core.test_optim import LEAVES, arrays, is_spec, make, run, sharded


def trip(x, code):
    return np.asarray(adam._decode(adam._encode(jnp.asarray(x), code), code))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((2, 128, 9, 64), (2, 3)),  # 3 of 9 heads
        ((2, 128, 4, 64), (1, 1)),  # all 4 heads
        ((2, 4, 64, 128), (2, 2)),  # 2 rows of 128
        ((49152, 576), (1, 192)),
        ((2, 128, 8), (1, 32)),
        ((64, 50257), (1, 29)),
        ((4096,), (0, 256)),
    ],
)
def test_a_block_is_a_run_of_at_most_256_elements_of_the_last_dims(shape, block):
    assert adam._block(shape) == block
    dim, part = block
    assert part * np.prod(shape[dim + 1 :], dtype=int) <= 256 and shape[dim] % part == 0


@pytest.mark.parametrize(("code", "tolerance"), [(FIRST, 0.25), (SECOND, 0.1)])
def test_values_over_a_factor_of_1000_are_near(code, tolerance):
    rng = np.random.default_rng(0)
    x = (10.0 ** rng.uniform(-3, 0, (64, 128))).astype("f4")
    x *= 1 if code is SECOND else rng.choice([-1, 1], x.shape)
    x[:, 0] = 1.0
    assert np.max(np.abs(trip(x, code) / x - 1)) < tolerance
    np.testing.assert_array_equal(trip(trip(x, code), code), trip(x, code))


def test_the_largest_of_a_block_is_exact_and_zeros_stay():
    x = np.random.default_rng(0).standard_normal((16, 256)).astype("f4")
    x[3] = 0.0
    found, largest = trip(x, FIRST), np.abs(x).argmax(1)
    rows = np.arange(16)
    np.testing.assert_array_equal(found[rows, largest], x[rows, largest])
    assert not found[3].any()


def test_a_second_moment_above_0_is_not_rounded_to_0():
    x = np.full((16, 256), 1e-30, "f4")
    x[:, 0] = 1.0
    assert (trip(x, SECOND) > 0).all()


def test_small_parameters_and_those_without_blocks_keep_fp32():
    shapes = {"small": (63, 65), "prime": (2, 4099), "large": (64, 64)}
    state = adam.adam_8bit(0.9, 0.99).init({k: jnp.ones(s) for k, s in shapes.items()})
    assert {k for k, m in state.mu.items() if isinstance(m, Moment)} == {"large"}
    small = {"w": jnp.ones((63, 65))}
    grads = {"w": jax.random.normal(jax.random.key(0), (63, 65))}
    found = [one(0.9, 0.99) for one in (adam.adam, adam.adam_8bit)]
    ours, theirs = (tx.update(grads, tx.init(small))[0]["w"] for tx in found)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_the_first_step_is_that_of_adamw_and_the_state_is_a_quarter():
    params, grads = arrays(0), [arrays(1)]
    eight, full = (run(make(name), params, grads) for name in ("adamw_8bit", "adamw"))
    for path in LEAVES:
        np.testing.assert_allclose(eight[path], full[path], rtol=1e-5, atol=1e-6, err_msg=path)
    state, path = make("adamw_8bit").init(params)[0], "layers.q_proj.kernel"
    for moment in (state.mu[path], state.nu[path]):
        assert sum(x.nbytes for x in moment) == params[path].size * (1 + 4 / 256)


def test_codes_and_scales_are_sharded_as_the_parameters():
    *_, state = sharded("adamw_8bit")
    for moments in (state[1].mu, state[1].nu):
        q, head = moments["layers.q_proj.kernel"], moments["layers.q_proj.lora_a"]
        assert is_spec(q.codes, None, "fsdp", "tensor", None)
        assert is_spec(q.scale, None, "fsdp", None, None), "4 heads are one block: not divided"
        assert q.scale.shape == (2, 128, 1, 1) and q.codes.dtype.itemsize == 1
        assert not isinstance(head, Moment), "2 x 128 x 8 is small"
        assert is_spec(moments["layers.o_proj.kernel"].scale, None, "tensor", None, None)


def test_200_steps_stay_within_1_percent_of_adamw():
    """Of a small network that predicts the next character of the demo novel."""
    text = (PACKAGE / "demo" / "novel" / "train.txt").read_text()[:40_000]
    letters = sorted(set(text))
    ids = np.array([letters.index(letter) for letter in text])
    sizes = {"embed": (len(letters), 64), "first": (512, 128), "head": (128, len(letters))}

    def loss(params, x, y):
        hidden = params["embed"][x].reshape(len(x), -1) @ params["first"]
        logits = jax.nn.gelu(hidden) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def train(direction):
        rng, tx = np.random.default_rng(0), optax.chain(direction(0.9, 0.999), optax.scale(-3e-3))
        params = {k: rng.standard_normal(s).astype("f4") / s[0] ** 0.5 for k, s in sizes.items()}
        state, losses = tx.init(params), []

        @jax.jit
        def step(params, state, x, y):
            value, grads = jax.value_and_grad(loss)(params, x, y)
            updates, state = tx.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        for _ in range(200):
            places = rng.integers(0, len(ids) - 9, 128)
            x = ids[places[:, None] + np.arange(8)]
            params, state, value = step(params, state, x, ids[places + 8])
            losses.append(float(value))
        return losses

    eight, full = train(adam.adam_8bit), train(adam.adam)
    assert full[-1] < 0.7 * full[0] and eight != full
    assert abs(np.mean(eight[-20:]) / np.mean(full[-20:]) - 1) < 0.01
