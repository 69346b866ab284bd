"""DDPM's noise, targets, weights, times and samplers against diffusers' DDPMScheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from jaxft.core.errors import UserError
from jaxft.noise.ddpm import DDPM
from jaxft.noise.process import offset_noise
from jaxft.noise.samplers import SAMPLERS
from jaxft.noise.schedule import Schedule
from tests.noise.configs import CONFIGS, SD15, ZTSNR

SIZE = (8, 8)


def latents(seed=0, shape=(6, 5, 4, 3)):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


def process(config, gamma=0.0):
    return DDPM(Schedule.from_hf(config), gamma)


def ddpm(config):
    keys = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr")
    return DDPMScheduler(**{key: config[key] for key in keys if key in config})


@pytest.mark.parametrize("name", CONFIGS)
def test_d02_noise_is_ddpm_whatever_class_the_folder_names(name):
    config = {**CONFIGS[name], "_class_name": "EulerDiscreteScheduler"}
    (x0, noise), t = latents(), np.array([0, 1, 250, 500, 998, 999])
    ours = process(config).add_noise(jnp.array(x0), jnp.array(noise), t)
    theirs = ddpm(config).add_noise(torch.tensor(x0), torch.tensor(noise), torch.tensor(t))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["v", "v ztsnr"])
def test_d03_velocity_target(name):
    (x0, noise), t = latents(), np.array([0, 1, 250, 500, 998, 999])
    ours = process(CONFIGS[name]).target(jnp.array(x0), jnp.array(noise), t)
    theirs = ddpm(CONFIGS[name]).get_velocity(
        torch.tensor(x0), torch.tensor(noise), torch.tensor(t)
    )
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


def test_d03_absent_prediction_type_is_epsilon():
    ours, (x0, noise) = process(SD15), latents()
    assert ours.schedule.prediction == "epsilon"
    np.testing.assert_array_equal(ours.target(x0, noise, jnp.arange(6)), noise)


@pytest.mark.parametrize("name", ["epsilon", "v"])
def test_d03_predictions_give_back_x0(name):
    ours, t = process(CONFIGS[name]), jnp.array([0, 10, 250, 500, 800, 900])
    x0, noise = latents()
    x_t = ours.add_noise(x0, noise, t)
    out, at = ours.target(x0, noise, t), ours.rates(t)
    back = at.signal * x_t - at.noise * out if name == "v" else (x_t - at.noise * out) / at.signal
    np.testing.assert_allclose(back, x0, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_d04_min_snr_weights(name):
    """The published trainer's formula: min(snr, gamma) over snr, or over snr + 1 for v."""
    t, gamma = np.arange(1000), 5.0
    bar = ddpm(CONFIGS[name]).alphas_cumprod.double().numpy()
    snr = bar / (1 - bar)
    wanted = np.minimum(snr, gamma) / (snr if name == "epsilon" else snr + 1)
    ours = process(CONFIGS[name], gamma).weights(jnp.array(t))
    np.testing.assert_allclose(ours, wanted, rtol=5e-4, atol=1e-7)
    assert np.isfinite(ours).all() and ours[999] == pytest.approx(wanted[999], abs=1e-6)
    np.testing.assert_array_equal(process(CONFIGS[name]).weights(jnp.array(t)), np.ones(1000))


def test_d05_zero_terminal_snr():
    schedule, theirs = Schedule.from_hf(ZTSNR), ddpm(ZTSNR).alphas_cumprod.numpy()
    assert schedule.zero_snr and schedule.spacing == "trailing"
    assert schedule.alphas_bar[-1] == 0 and schedule.snr[-1] == 0
    np.testing.assert_allclose(schedule.alphas_bar[0], 0.99915, rtol=1e-5)
    # diffusers subtracts in fp32: exact to 1e-7 of sqrt(alpha_bar).
    np.testing.assert_allclose(np.sqrt(schedule.alphas_bar), np.sqrt(theirs), atol=2e-6)
    x0, noise = latents()
    last = jnp.full((6,), 999)
    np.testing.assert_array_equal(DDPM(schedule).add_noise(x0, noise, last), noise)
    np.testing.assert_array_equal(DDPM(schedule).target(x0, noise, last), -x0)


def test_d29_draws_depend_on_their_own_key():
    keys, ours = jax.random.split(jax.random.key(0), 8), process(SD15)
    every = ours.draw_times(keys, SIZE)
    np.testing.assert_array_equal(ours.draw_times(keys[5:6], SIZE), every[5:6])
    noise = jnp.zeros((8, 4, 4, 3))
    moved = offset_noise(keys, noise, 0.1)
    alone = offset_noise(keys[5:6], noise[5:6], 0.1)
    np.testing.assert_array_equal(alone, moved[5:6])


def test_timesteps_are_uniform_over_all():
    keys = jax.random.split(jax.random.key(1), 200_000)
    t = np.asarray(process(SD15).draw_times(keys, SIZE))
    counts = np.bincount(t, minlength=1000)
    assert t.min() == 0 and t.max() == 999 and counts.shape == (1000,)
    chi = np.sum((counts - 200) ** 2 / 200)
    assert 800 < chi < 1200  # 999 degrees of freedom, standard deviation 45


def test_validation_measures_in_the_middle_of_equal_parts():
    times = process(SD15).evaluation_times(8)
    assert times.dtype == np.int32
    np.testing.assert_array_equal(times, [62, 187, 312, 437, 562, 687, 812, 937])


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_those_of_the_schedule(name):
    made, wanted = process(SD15).sampler(name, 5, SIZE), SAMPLERS[name](Schedule.from_hf(SD15), 5)
    jax.tree.map(np.testing.assert_array_equal, made, wanted)


def test_another_sampler_is_refused():
    with pytest.raises(UserError, match=r"sampler 'heun' is not one of ddim, euler, dpm\+\+"):
        process(SD15).sampler("heun", 5, SIZE)
