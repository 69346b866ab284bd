"""The noise algebra against the constants of SD's schedule, diffusers' DDPM and its embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding

from jaxft.core.errors import UserError
from jaxft.noise import ddpm as diffusion
from jaxft.noise.ddpm import Schedule

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
ZTSNR = {**SD21, **diffusion.ZERO_SNR}
CONFIGS = {"epsilon": SD15, "v": SD21, "v ztsnr": ZTSNR}


def latents(seed=0, shape=(6, 5, 4, 3)):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


def ddpm(config):
    keys = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr")
    return DDPMScheduler(**{key: config[key] for key in keys if key in config})


def test_d01_scaled_linear_constants():
    schedule = Schedule.from_hf(SD15)
    bar, snr = schedule.alphas_bar, schedule.snr
    assert bar.dtype == np.float64 and bar.shape == (1000,)
    np.testing.assert_allclose(bar[[0, 500, 999]], [0.99915, 0.276, 0.0046601], rtol=1.5e-3)
    np.testing.assert_allclose([bar[0], bar[999]], [0.99915, 0.0046601], rtol=1e-5)
    np.testing.assert_allclose([snr[0], snr[999]], [1175.5, 0.00468], rtol=5e-4)
    plain = Schedule.from_hf({**SD15, "beta_schedule": "linear"}).alphas_bar
    np.testing.assert_allclose(plain[500], 0.161, rtol=5e-3)


def test_d01_given_betas_and_class_defaults():
    betas = np.linspace(1e-3, 2e-2, 50).tolist()
    given = Schedule.from_hf({**SD15, "trained_betas": betas})
    assert given.train_steps == 50
    np.testing.assert_allclose(given.alphas_bar, np.cumprod(1 - np.array(betas)), rtol=1e-12)
    ours, theirs = Schedule.from_hf({}).alphas_bar, DDPMScheduler().alphas_cumprod
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_d02_noise_is_ddpm_whatever_class_the_folder_names(name):
    config = {**CONFIGS[name], "_class_name": "EulerDiscreteScheduler"}
    (x0, noise), t = latents(), np.array([0, 1, 250, 500, 998, 999])
    ours = diffusion.add_noise(Schedule.from_hf(config), jnp.array(x0), jnp.array(noise), t)
    theirs = ddpm(config).add_noise(torch.tensor(x0), torch.tensor(noise), torch.tensor(t))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["v", "v ztsnr"])
def test_d03_velocity_target(name):
    (x0, noise), t = latents(), np.array([0, 1, 250, 500, 998, 999])
    schedule = Schedule.from_hf(CONFIGS[name])
    ours = diffusion.target(schedule, jnp.array(x0), jnp.array(noise), t)
    theirs = ddpm(CONFIGS[name]).get_velocity(
        torch.tensor(x0), torch.tensor(noise), torch.tensor(t)
    )
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


def test_d03_absent_prediction_type_is_epsilon():
    schedule = Schedule.from_hf(SD15)
    x0, noise = latents()
    assert schedule.prediction == "epsilon"
    np.testing.assert_array_equal(diffusion.target(schedule, x0, noise, jnp.arange(6)), noise)


@pytest.mark.parametrize("name", ["epsilon", "v"])
def test_d03_predictions_give_back_x0(name):
    schedule, t = Schedule.from_hf(CONFIGS[name]), jnp.array([0, 10, 250, 500, 800, 900])
    x0, noise = latents()
    x_t = diffusion.add_noise(schedule, x0, noise, t)
    out, at = diffusion.target(schedule, x0, noise, t), diffusion.rates(schedule, t)
    back = at.signal * x_t - at.noise * out if name == "v" else (x_t - at.noise * out) / at.signal
    np.testing.assert_allclose(back, x0, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_d04_min_snr_weights(name):
    """The published trainer's formula: min(snr, gamma) over snr, or over snr + 1 for v."""
    schedule, t, gamma = Schedule.from_hf(CONFIGS[name]), np.arange(1000), 5.0
    bar = ddpm(CONFIGS[name]).alphas_cumprod.double().numpy()
    snr = bar / (1 - bar)
    wanted = np.minimum(snr, gamma) / (snr if name == "epsilon" else snr + 1)
    ours = diffusion.min_snr_weights(schedule, jnp.array(t), gamma)
    np.testing.assert_allclose(ours, wanted, rtol=5e-4, atol=1e-7)
    assert np.isfinite(ours).all() and ours[999] == pytest.approx(wanted[999], abs=1e-6)


def test_d04_zero_snr_with_epsilon_is_refused():
    with pytest.raises(UserError, match=r"rescale_betas_zero_snr.*set prediction_type to v_pred"):
        Schedule.from_hf({**ZTSNR, "prediction_type": "epsilon"})


def test_d05_zero_terminal_snr():
    schedule, theirs = Schedule.from_hf(ZTSNR), ddpm(ZTSNR).alphas_cumprod.numpy()
    assert schedule.zero_snr and schedule.spacing == "trailing"
    assert schedule.alphas_bar[-1] == 0 and schedule.snr[-1] == 0
    np.testing.assert_allclose(schedule.alphas_bar[0], 0.99915, rtol=1e-5)
    # diffusers subtracts in fp32: exact to 1e-7 of sqrt(alpha_bar).
    np.testing.assert_allclose(np.sqrt(schedule.alphas_bar), np.sqrt(theirs), atol=2e-6)
    x0, noise = latents()
    last = jnp.full((6,), 999)
    np.testing.assert_array_equal(diffusion.add_noise(schedule, x0, noise, last), noise)
    np.testing.assert_array_equal(diffusion.target(schedule, x0, noise, last), -x0)


def test_d06_each_sample_has_its_own_mean_in_fp32():
    out, wanted = (jnp.asarray(x, jnp.bfloat16) for x in latents())
    got = diffusion.squared_error(out, wanted)
    true = np.mean((np.asarray(out, np.float32) - np.asarray(wanted, np.float32)) ** 2, (1, 2, 3))
    assert got.dtype == jnp.float32 and got.shape == (6,)
    np.testing.assert_allclose(got, true, rtol=1e-6)


@pytest.mark.parametrize("dim", [320, 33])
@pytest.mark.parametrize("cos_first, shift", [(True, 0), (False, 1)])
def test_d15_timestep_embedding(dim, cos_first, shift):
    t = np.array([0.0, 1.0, 13.5, 999.0], np.float32)
    ours = diffusion.timestep_embedding(jnp.array(t), dim, cos_first=cos_first, freq_shift=shift)
    theirs = get_timestep_embedding(torch.tensor(t), dim, cos_first, shift)
    # The angle 999 has an fp32 step of 6e-5, which no sine can be better than.
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1.3e-4)
    np.testing.assert_allclose(ours[:3], theirs.numpy()[:3], atol=2e-6)


def test_d15_time_ids_of_any_shape_are_embedded_apart():
    ids = jnp.array([[512.0, 768, 0, 12, 1024, 1024]])
    ours = diffusion.timestep_embedding(ids, 256)
    assert ours.shape == (1, 6, 256) and ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours[0, 1], diffusion.timestep_embedding(ids[0, 1:2], 256)[0])
    np.testing.assert_allclose(ours[0, 2], [1.0] * 128 + [0.0] * 128)


def test_d29_draws_depend_on_their_own_key():
    keys, schedule = jax.random.split(jax.random.key(0), 8), Schedule.from_hf(SD15)
    every = diffusion.draw_timesteps(keys, schedule)
    np.testing.assert_array_equal(diffusion.draw_timesteps(keys[5:6], schedule), every[5:6])
    noise = jnp.zeros((8, 4, 4, 3))
    moved = diffusion.offset_noise(keys, noise, 0.1)
    alone = diffusion.offset_noise(keys[5:6], noise[5:6], 0.1)
    np.testing.assert_array_equal(alone, moved[5:6])


def test_timesteps_are_uniform_over_all():
    keys = jax.random.split(jax.random.key(1), 200_000)
    t = np.asarray(diffusion.draw_timesteps(keys, Schedule.from_hf(SD15)))
    counts = np.bincount(t, minlength=1000)
    assert t.min() == 0 and t.max() == 999 and counts.shape == (1000,)
    chi = np.sum((counts - 200) ** 2 / 200)
    assert 800 < chi < 1200  # 999 degrees of freedom, standard deviation 45


def test_offset_noise_is_one_number_a_channel():
    keys = jax.random.split(jax.random.key(3), 500)
    shift = np.asarray(diffusion.offset_noise(keys, jnp.zeros((500, 4, 4, 3)), 0.1))
    np.testing.assert_array_equal(shift, np.broadcast_to(shift[:, :1, :1], shift.shape))
    assert shift[:, 0, 0].std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prediction_type": "sample"}, "prediction_type='sample'.*epsilon, v_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squared.*linear, scaled_linear"),
        ({"timestep_spacing": "log"}, "timestep_spacing='log'"),
        ({"thresholding": True}, "thresholding=True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch.* has no DDPM betas"),
    ],
)
def test_unsupported_schedules_are_refused_in_one_line(change, words):
    with pytest.raises(UserError, match=words) as caught:
        Schedule.from_hf({**SD15, **change}, "sd/scheduler/scheduler_config.json")
    assert str(caught.value).startswith("sd/scheduler/") and "\n" not in str(caught.value)
