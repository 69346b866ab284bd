"""The schedule of a folder: SD's constants, diffusers' defaults, refusals."""

import numpy as np
import pytest
from diffusers import DDPMScheduler

from jaxft.core.errors import UserError
from jaxft.noise.schedule import Schedule
from tests.noise.configs import SD15, ZTSNR


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


def test_d04_zero_snr_with_epsilon_is_refused():
    with pytest.raises(UserError, match=r"rescale_betas_zero_snr.*set prediction_type to v_pred"):
        Schedule.from_hf({**ZTSNR, "prediction_type": "epsilon"})


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
