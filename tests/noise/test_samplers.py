"""Sampler trajectories against diffusers' schedulers, from the same noise and denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from jaxft.core.errors import UserError
from jaxft.noise import samplers
from jaxft.noise import schedule as diffusion
from jaxft.noise.schedule import Schedule

BASE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}
SHAPE = (2, 6, 5, 4)
MIX = np.random.default_rng(7).standard_normal((4, 4)) * 0.3


def noise():
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def model(x, t):
    """Any smooth function of both."""
    return 0.7 * x @ jnp.array(MIX, jnp.float32) + 0.4 * jnp.sin(2 * x + t / 300) + 0.1


trajectory = jax.jit(lambda noise, sampler: samplers.denoise(model, noise, sampler))


def ours(config, name, steps):
    sampler = samplers.SAMPLERS[name](Schedule.from_hf(config), steps)
    return np.asarray(trajectory(noise(), sampler))


def theirs(config, name, steps):
    """As diffusers' pipelines run a scheduler, in fp32, channels moved last."""
    scheduler = SCHEDULERS[name].from_config(config)
    scheduler.set_timesteps(steps)
    x, mix = torch.tensor(noise()) * scheduler.init_noise_sigma, torch.tensor(MIX).float()
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        out = 0.7 * scaled @ mix + 0.4 * torch.sin(2 * scaled + t.float() / 300) + 0.1
        x = scheduler.step(out, t, x).prev_sample
    return x.numpy()


def assert_same(config, name, steps=20, tolerance=1e-4):
    got, wanted = ours(config, name, steps), theirs(config, name, steps)
    assert np.isfinite(wanted).all() and np.std(wanted) > 0.01
    assert np.abs(got - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_twenty_steps(name, prediction, spacing):
    config = {**BASE, "prediction_type": prediction, "timestep_spacing": spacing}
    assert_same(config, name)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_d05_zero_terminal_snr(name):
    assert_same({**BASE, **diffusion.ZERO_SNR}, name)


@pytest.mark.parametrize("steps", [1, 2, 14, 15])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_step_counts_and_class_defaults(name, steps):
    assert_same({**BASE, "prediction_type": "epsilon"}, name, steps)


@pytest.mark.parametrize(
    "name, change",
    [
        ("ddim", {"set_alpha_to_one": True, "steps_offset": 0}),
        ("ddim", {"clip_sample": True, "clip_sample_range": 0.8}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("dpm++", {"final_sigmas_type": "sigma_min"}),
        ("dpm++", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpm++", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpm++", {"solver_type": "bh2"}),
    ],
)
@pytest.mark.parametrize("steps", [8, 20])
def test_final_values_and_clipping(name, change, steps):
    assert_same({**BASE, **change, "prediction_type": "v_prediction"}, name, steps)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 20, 30, 999])
def test_timesteps(name, spacing, steps):
    config = {**BASE, "timestep_spacing": spacing, "steps_offset": 0}
    scheduler = SCHEDULERS[name].from_config(config)
    scheduler.set_timesteps(steps)
    got = samplers.SAMPLERS[name](Schedule.from_hf(config), steps).steps.timestep
    np.testing.assert_allclose(got, scheduler.timesteps.numpy(), rtol=1e-6)


def test_a_perfect_model_gives_its_image():
    """Every sampler is exact for a data set of one image."""
    image = jnp.array(np.random.default_rng(3).standard_normal(SHAPE), jnp.float32)
    config = {**BASE, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    schedule = Schedule.from_hf(config)
    bar = jnp.asarray(schedule.alphas_bar, jnp.float32)

    def perfect(x, t):
        a = bar[t.astype(int)]
        return (x - jnp.sqrt(a) * image) / jnp.sqrt(1 - a)

    run = jax.jit(lambda noise, sampler: samplers.denoise(perfect, noise, sampler))
    for name, make in samplers.SAMPLERS.items():
        out = run(noise(), make(schedule, 20))
        np.testing.assert_allclose(out, image, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance(rescale):
    uncond, cond = (np.random.default_rng(i).standard_normal(SHAPE, np.float32) for i in (1, 2))
    u, c = torch.tensor(uncond), torch.tensor(cond)
    wanted = rescale_noise_cfg(u + 7.5 * (c - u), c, guidance_rescale=rescale)
    got = samplers.guide(jnp.array(uncond), jnp.array(cond), 7.5, rescale)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_guidance_of_flat_outputs_is_finite():
    flat = jnp.zeros(SHAPE)
    np.testing.assert_array_equal(samplers.guide(flat, flat, 7.5, 0.7), flat)


def test_one_table_shape_for_all_samplers():
    """The sampler is data: one compiled trajectory serves all of them."""
    trajectory.clear_cache()
    for name in SCHEDULERS:
        ours(BASE, name, 20)
    assert trajectory._cache_size() == 1


@pytest.mark.parametrize(
    "change, name, steps, words",
    [
        ({}, "ddim", 0, "sample.steps=0 is not between 1 and 1000"),
        ({}, "ddim", 1001, "sample.steps=1001"),
        ({}, "ddim", 1000, "steps_offset=1 asks for timestep 1000"),
        ({"use_karras_sigmas": True}, "euler", 20, "use_karras_sigmas=True.*ddim"),
        ({"algorithm_type": "sde-dpmsolver++"}, "dpm++", 20, "algorithm_type='sde-dpmsolver"),
    ],
)
def test_unsupported_runs_are_refused(change, name, steps, words):
    config = {**BASE, "timestep_spacing": "leading", **change}
    with pytest.raises(UserError, match=words):
        samplers.SAMPLERS[name](Schedule.from_hf(config), steps)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_by_a_source_picture(rescale):
    """As StableDiffusionXLInstructPix2PixPipeline sums three outputs."""
    rng = np.random.default_rng(6)
    arrays = [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(3)]
    u, i, c = (torch.tensor(x).permute(0, 3, 1, 2) for x in arrays)
    wanted = rescale_noise_cfg(u + 7.5 * (c - i) + 1.5 * (i - u), c, guidance_rescale=rescale)
    got = samplers.guide_edit(*map(jnp.array, arrays), 7.5, 1.5, rescale)
    np.testing.assert_allclose(got, wanted.permute(0, 2, 3, 1).numpy(), rtol=1e-4, atol=1e-4)
