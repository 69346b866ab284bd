"""scheduler_config.json of the three kinds of noise that Stable Diffusion folders have."""

from jaxft.noise.schedule import ZERO_SNR

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
ZTSNR = {**SD21, **ZERO_SNR}
CONFIGS = {"epsilon": SD15, "v": SD21, "v ztsnr": ZTSNR}
