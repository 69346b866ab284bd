"""The protocol of a noise process: one loss and one sampling loop for DDPM and a rectified flow."""

import inspect
from dataclasses import dataclass
from functools import partial
from math import exp, inf

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from jaxft.noise.ddpm import DDPM
from jaxft.noise.process import NoiseProcess, offset_noise, squared_error
from jaxft.noise.samplers import Sampler, Step, denoise
from jaxft.noise.schedule import Schedule
from tests.noise.configs import CONFIGS, SD15


@dataclass(frozen=True)
class RectifiedFlow:
    """A toy of flow matching: sigmas, logit-normal, shifted by a constant or by image tokens."""

    constant: float = 1.0
    by_tokens: bool = False

    def shift(self, sigma, size):
        tokens = size[0] * size[1] / 4  # patches of 2 x 2
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        factor = exp(mu) if self.by_tokens else self.constant
        return factor * sigma / (1 + (factor - 1) * sigma)

    def draw_times(self, keys, size):
        return self.shift(jax.nn.sigmoid(jax.vmap(jax.random.normal)(keys)), size)

    def add_noise(self, x0, noise, t):
        t = t[:, None, None, None]
        return (1 - t) * x0 + t * noise

    def target(self, x0, noise, t):
        return noise - x0

    def weights(self, t):
        return 2 / (np.pi * (1 - 2 * t + 2 * t**2))  # cosmap

    def evaluation_times(self, count):
        return np.float32((np.arange(count) + 0.5) / count)

    def sampler(self, name, steps, size):
        assert name == "euler"
        least = 1 / steps if self.by_tokens else self.shift(1 / 1000, size)
        sigma = np.append(self.shift(np.linspace(1, least, steps), size), 0)
        now, zero, one = sigma[:-1], np.zeros(steps), np.ones(steps)
        table = Step(now, one, one, -now, one, np.diff(sigma), zero, zero)
        return Sampler(jax.tree.map(jnp.float32, table), jnp.float32(1), jnp.float32(inf))


PROCESSES: dict[str, NoiseProcess] = {
    **{name: DDPM(Schedule.from_hf(config), 5.0) for name, config in CONFIGS.items()},
    "equal weights": DDPM(Schedule.from_hf(SD15)),
    "flow": RectifiedFlow(),
    "shifted flow": RectifiedFlow(3.0),
    "flow by tokens": RectifiedFlow(by_tokens=True),
}
# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MEMBERS = [name for name in vars(NoiseProcess) if not name.startswith("_")]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def loss(process: NoiseProcess, model, x0, keys):
    """What an objective does with any process."""
    t = process.draw_times(keys, x0.shape[1:3])
    noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)
    out = model(process.add_noise(x0, noise, t), t)
    return jnp.sum(squared_error(out, process.target(x0, noise, t)) * process.weights(t))


def knowing(process: NoiseProcess, x0):
    """The perfect denoiser of rows that all are x0, from the process alone."""

    def model(x, t):
        t = jnp.broadcast_to(t, len(x)).astype(process.evaluation_times(1).dtype)
        rows = jnp.broadcast_to(x0, x.shape)
        signal = process.add_noise(rows, jnp.zeros_like(x), t)
        share = process.add_noise(jnp.zeros_like(x), jnp.ones_like(x), t)
        return process.target(rows, (x - signal) / share, t)

    return model


def test_the_protocol_has_at_most_six_members():
    assert len(MEMBERS) <= 6


@pytest.mark.parametrize("process", [DDPM, RectifiedFlow])
def test_a_process_takes_the_arguments_of_the_protocol(process):
    for name in MEMBERS:
        theirs = inspect.signature(getattr(NoiseProcess, name)).parameters
        assert list(inspect.signature(getattr(process, name)).parameters) == list(theirs), name


@pytest.mark.parametrize("name", PROCESSES)
def test_a_perfect_denoiser_has_no_loss_and_another_has_gradients(name):
    process, keys = PROCESSES[name], jax.random.split(jax.random.key(0), 64)
    x0 = normal(1, 4, 6, 3)
    rows = jnp.broadcast_to(x0, (64, 4, 6, 3))
    perfect = knowing(process, x0)

    @partial(jax.jit, compiler_options=QUICK)
    @jax.value_and_grad
    def scaled(factor):
        return loss(process, lambda x, t: factor * perfect(x, t), rows, keys)

    assert scaled(1.0)[0] < 1e-3 * scaled(0.0)[0]
    assert scaled(0.5)[1] < 0 < scaled(1.5)[1]


@pytest.mark.parametrize("name", PROCESSES)
def test_a_perfect_denoiser_samples_its_image(name):
    process, x0 = PROCESSES[name], normal(1, 4, 6, 3)
    sampler = process.sampler("euler", 10, x0.shape[1:3])
    draw = jax.jit(
        lambda noise: denoise(knowing(process, x0), noise, sampler), compiler_options=QUICK
    )
    made = draw(normal(5, 4, 6, 3, seed=1))
    np.testing.assert_allclose(made, jnp.broadcast_to(x0, made.shape), atol=2e-3)


@pytest.mark.parametrize("name", PROCESSES)
def test_evaluation_times_are_fixed_and_in_range(name):
    process = PROCESSES[name]
    times = process.evaluation_times(8)
    drawn = process.draw_times(jax.random.split(jax.random.key(1), 1000), (32, 32))
    assert times.shape == (8,) and len(set(times)) == 8
    assert drawn.min() < times[1] and times[-2] < drawn.max()
    assert jnp.issubdtype(drawn.dtype, jnp.floating) == np.issubdtype(times.dtype, np.floating)


def test_times_may_depend_on_the_images_size():
    keys = jax.random.split(jax.random.key(2), 20_000)
    flow, shifted, by_tokens = (PROCESSES[n] for n in ("flow", "shifted flow", "flow by tokens"))
    assert float(flow.draw_times(keys, (64, 64)).mean()) == pytest.approx(0.5, abs=0.01)
    # The mean of a shifted uniform is 0.676; that of a shifted logit-normal (0, 1) is this.
    assert float(shifted.draw_times(keys, (64, 64)).mean()) == pytest.approx(0.715, abs=0.01)
    small, large = (by_tokens.draw_times(keys, (side, side)).mean() for side in (32, 128))
    assert large > small + 0.1


@pytest.mark.parametrize("name", ["shifted flow", "flow by tokens"])
def test_a_flows_sampler_table_is_diffusers(name):
    """Both shifts, SD 3's and FLUX's, fit the table. 4,096 tokens shift by mu = 1.15."""
    sampler = PROCESSES[name].sampler("euler", 4, (128, 128))
    if name == "shifted flow":
        theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
        theirs.set_timesteps(4)
    else:
        theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), mu=1.15)
    sigmas = theirs.sigmas.numpy()
    np.testing.assert_allclose(sampler.steps.timestep, sigmas[:-1], rtol=1e-5)
    np.testing.assert_allclose(sampler.steps.x_out, np.diff(sigmas), rtol=1e-4)


def test_d06_each_sample_has_its_own_mean_in_fp32():
    out, wanted = (normal(6, 5, 4, 3, seed=seed).astype(jnp.bfloat16) for seed in (0, 1))
    got = squared_error(out, wanted)
    true = np.mean((np.asarray(out, np.float32) - np.asarray(wanted, np.float32)) ** 2, (1, 2, 3))
    assert got.dtype == jnp.float32 and got.shape == (6,)
    np.testing.assert_allclose(got, true, rtol=1e-6)


def test_offset_noise_is_one_number_a_channel():
    keys = jax.random.split(jax.random.key(3), 500)
    shift = np.asarray(offset_noise(keys, jnp.zeros((500, 4, 4, 3)), 0.1))
    np.testing.assert_array_equal(shift, np.broadcast_to(shift[:, :1, :1], shift.shape))
    assert shift[:, 0, 0].std() == pytest.approx(0.1, rel=0.05)
