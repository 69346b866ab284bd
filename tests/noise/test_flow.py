"""Flow matching against diffusers' scheduler: tables, trajectories, and the density of times."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from jaxft.core.errors import UserError
from jaxft.noise import samplers
from jaxft.noise.flow import FlowMatching, FlowSchedule, shifted

STATIC = {"shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
SIZE = (64, 48)  # of latents: 32 x 24 tokens
SHAPE = (2, 6, 5, 4)
MIX = np.random.default_rng(7).standard_normal((4, 4)) * 0.3


def process(config, **changes):
    return FlowMatching(FlowSchedule.from_hf({**config, **changes}))


def timesteps(config, steps):
    """diffusers' scheduler, set as the pipeline of SD 3 sets it for pictures of SIZE."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    own, mu = scheduler.config, None
    if own.use_dynamic_shifting:
        lengths = own.base_image_seq_len, own.max_image_seq_len
        mu = calculate_shift(SIZE[0] * SIZE[1] // 4, *lengths, own.base_shift, own.max_shift)
    scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def noise():
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def ours(config, name, steps):
    def model(x, t):
        return 0.7 * x @ jnp.array(MIX, jnp.float32) + 0.4 * jnp.sin(2 * x + t * 3) + 0.1

    sampler = process(config).sampler(name, steps, SIZE)
    return np.asarray(jax.jit(lambda x: samplers.denoise(model, x, sampler))(noise()))


def theirs(scheduler, trained):
    x, mix = torch.tensor(noise()), torch.tensor(MIX).float()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        out = 0.7 * x @ mix + 0.4 * torch.sin(2 * x + sigma * trained) + 0.1
        x = scheduler.step(out, t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
@pytest.mark.parametrize(
    "config",
    [
        {},
        STATIC,
        {**STATIC, "shift_terminal": 0.1},
        DYNAMIC,
        {**DYNAMIC, "time_shift_type": "linear"},
        {**DYNAMIC, "base_shift": 0.25, "max_shift": 3.0, "max_image_seq_len": 1000},
        {**STATIC, "num_train_timesteps": 500},
    ],
)
def test_t05_t06_the_table_of_euler_is_the_pipelines(config, steps):
    if config.get("shift_terminal") and steps == 1:
        pytest.skip("the scheduler divides by 0")
    table = process(config).sampler("euler", steps, SIZE).steps
    scheduler = timesteps(config, steps)
    sigmas = scheduler.sigmas.numpy()
    np.testing.assert_allclose(table.timestep, sigmas[:-1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(table.x_out, np.diff(sigmas), rtol=0, atol=1e-6)
    train = config.get("num_train_timesteps", 1000)
    np.testing.assert_allclose(scheduler.timesteps, sigmas[:-1] * train, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
@pytest.mark.parametrize("config", [{}, STATIC, DYNAMIC, {**DYNAMIC, "time_shift_type": "linear"}])
def test_t06_the_even_table_of_euler_is_that_of_flux(config, steps):
    own = FlowMatching(FlowSchedule.from_hf(config), even=True)
    table = own.sampler("euler", steps, SIZE).steps
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(SIZE[0] * SIZE[1] // 4)
    )
    np.testing.assert_allclose(table.timestep, scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(table.x_out, np.diff(scheduler.sigmas), rtol=0, atol=1e-6)


def test_t06_four_steps_at_1024_pixels():
    own = FlowMatching(FlowSchedule.from_hf(DYNAMIC), even=True)
    sigmas = own.sampler("euler", 4, (128, 128)).steps.timestep
    np.testing.assert_allclose(sigmas, [1, 0.90453, 0.75951, 0.51284], atol=5e-6)


def test_t05_a_static_shift_is_shifted_twice_at_its_end():
    sigmas = process(STATIC).sampler("euler", 4, SIZE).steps.timestep
    np.testing.assert_allclose(sigmas, [1, 0.85769, 0.60215, 0.00893], atol=5e-6)


@pytest.mark.parametrize("config", [STATIC, DYNAMIC])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_trajectories_of_euler(config, steps):
    wanted = theirs(timesteps(config, steps), 3)
    np.testing.assert_allclose(ours(config, "euler", steps), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_trajectories_of_dpm_solver(steps):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    wanted = theirs(scheduler, 3)
    np.testing.assert_allclose(ours(STATIC, "dpm++", steps), wanted, rtol=0, atol=2e-5)


def picked(config, mean=0.0):
    """100 000 sigmas as diffusers' scripts draw them with weighting_scheme=logit_normal."""
    table = FlowMatchEulerDiscreteScheduler.from_config(config).sigmas.numpy()
    normal = torch.normal(mean, 1, (100_000,), generator=torch.manual_seed(0))
    return table[(torch.sigmoid(normal).numpy() * 1000).astype(int)]


def test_t01_the_shift_is_in_the_times_of_training():
    """Sigma 1 is noise."""
    keys = jax.random.split(jax.random.key(0), 100_000)
    for config, mean in (({}, 0.501), (STATIC, 0.715)):
        drawn, wanted = np.asarray(process(config).draw_times(keys, SIZE)), picked(config)
        assert abs(drawn.mean() - wanted.mean()) < 3e-3 and abs(drawn.mean() - mean) < 3e-3
        quantiles = np.linspace(0.02, 0.98, 9)
        found, wanted = np.quantile(drawn, quantiles), np.quantile(wanted, quantiles)
        np.testing.assert_allclose(found, wanted, atol=6e-3)
        assert drawn.min() > 0 and drawn.max() < 1
    assert abs(picked(DYNAMIC).mean() - 0.501) < 3e-3, "that table is shifted when it samples"


def test_t02_a_larger_draw_is_more_noise_as_in_the_paper():
    """The table of diffusers' scripts descends, so that there a larger draw is less noise."""
    keys = jax.random.split(jax.random.key(0), 100_000)
    normal = np.asarray(jax.vmap(jax.random.normal)(keys))
    for config in ({}, STATIC):
        drawn = np.asarray(process(config).draw_times(keys, SIZE))
        assert (np.diff(drawn[np.argsort(normal)]) > -1e-6).all(), "but for rounding"
    half = shifted(1 / (1 + np.exp(-normal - 1)), 1.0)
    assert abs(half.mean() - 0.696) < 3e-3 and abs(picked({}, 1.0).mean() - 0.304) < 3e-3


def test_t06_a_dynamic_shift_follows_the_tokens():
    keys = jax.random.split(jax.random.key(0), 20_000)
    small, large = (process(DYNAMIC).draw_times(keys, (n, n)).mean() for n in (32, 128))
    schedule = FlowSchedule.from_hf(DYNAMIC)
    assert [round(np.log(schedule.shift_for(n)), 6) for n in (256, 4096)] == [0.5, 1.15]
    normal = jax.vmap(jax.random.normal)(keys)
    wanted = [shifted(jax.nn.sigmoid(normal), float(np.exp(mu))).mean() for mu in (0.5, 1.15)]
    np.testing.assert_allclose([small, large], wanted, rtol=1e-5)


@pytest.mark.parametrize("tokens", [16, 1024, 4300, 4301, 16384])
def test_t06_the_shift_of_flux_2_follows_tokens_and_steps(tokens):
    schedule = replace(FlowSchedule.from_hf(DYNAMIC), by_steps=True)
    for steps in (1, 4, 10, 50, 200):
        wanted = compute_empirical_mu(tokens, steps)
        np.testing.assert_allclose(np.log(schedule.shift_for(tokens, steps)), wanted, rtol=1e-12)
    assert schedule.shift_for(tokens) == schedule.shift_for(tokens, 50)
    static = replace(FlowSchedule.from_hf(STATIC), by_steps=True)
    assert static.shift_for(tokens, 4) == 3.0
    shifts = np.log([schedule.shift_for(4096, steps) for steps in (4, 10)])
    np.testing.assert_allclose(shifts, [2.291, 2.256], atol=1e-3)


def test_t03_at_a_fixed_sigma_noise_and_target_are_those_of_the_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(STATIC)
    rng = np.random.default_rng(0)
    x0, eps = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    t = scheduler.timesteps[torch.tensor([30, 800])]
    wanted = scheduler.scale_noise(torch.tensor(x0), t, torch.tensor(eps))
    own = process(STATIC)
    found = own.add_noise(x0, eps, jnp.asarray(t.numpy() / 1000))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    velocity = own.target(x0, eps, jnp.asarray(t.numpy()))
    np.testing.assert_allclose(
        found - (t.numpy() / 1000)[:, None, None, None] * velocity, x0, atol=1e-5
    )
    np.testing.assert_array_equal(own.weights(t.numpy()), 1)


def test_t03_sigmas_of_training_are_continuous_and_no_rows_of_a_table():
    drawn = process(STATIC).draw_times(jax.random.split(jax.random.key(0), 4000), SIZE)
    table = FlowMatchEulerDiscreteScheduler.from_config(STATIC).sigmas.numpy()
    assert len(np.unique(np.asarray(drawn))) > 3900 and len(table) == 1000
    assert np.isin(np.asarray(drawn), table).mean() < 0.01


def test_evaluation_times_are_fixed_sigmas():
    np.testing.assert_allclose(process({}).evaluation_times(4), [0.125, 0.375, 0.625, 0.875])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"_class_name": "EulerDiscreteScheduler"},
            "EulerDiscreteScheduler does not go with a flow",
        ),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True is not supported"),
        ({"time_shift_type": "cubic"}, "time_shift_type='cubic' .* exponential or linear"),
        ({"shift": None}, "shift=null is not supported"),
    ],
)
def test_a_scheduler_that_is_not_supported(config, words):
    with pytest.raises(UserError, match=f"s.json: {words}"):
        FlowSchedule.from_hf(config, "s.json")


@pytest.mark.parametrize(("name", "steps"), [("ddim", 4), ("euler", 0), ("euler", 1001)])
def test_a_sampler_that_is_not_there(name, steps):
    with pytest.raises(UserError, match=r"is not (one of those|between 1 and 1000)"):
        process({}).sampler(name, steps, SIZE)
