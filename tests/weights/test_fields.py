"""JSON null in the config files of the image families, with the PyTorch classes as the judges.

Each key of a class is set to null in turn. Where the class computes, jaxft computes the same or
refuses the key by name. Where the class fails, jaxft refuses the key by name.
"""

import inspect
import json

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, VQModel
from transformers import CLIPTextConfig as HFText
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from jaxft.core.errors import UserError
from jaxft.models.autoencoders import vae_config, vq_config
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.autoencoders.vq_config import VQConfig
from jaxft.models.denoisers import unet_config
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.text_encoders.clip import CLIPTextConfig
from jaxft.noise import schedule as diffusion
from jaxft.noise.schedule import Schedule
from jaxft.weights.fields import fields

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = {"block_out_channels": [8, 16], "norm_num_groups": 4}
CODER = {
    **LEVELS,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
SD = {
    **LEVELS,
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SDXL = {
    **SD,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 68,
    "use_linear_projection": True,
}
# Keys that jaxft does not read: no layer of a supported model depends on them.
UNREAD = {
    UNet2DConditionModel: {"addition_embed_type_num_heads"},
    VQModel: {"lookup_from_codebook", "scaling_factor", "force_upcast"},
}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def output(model, config, run):
    """What the class computes with fixed random weights."""
    torch.manual_seed(0)
    made = model.from_config(dict(config)).eval()
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.copy_(0.2 * torch.randn_like(tensor))
        return run(made)


def denoised(unet):
    added = {"text_embeds": normal(1, 20), "time_ids": torch.ones(1, 6)}
    return unet(normal(1, 4, 8, 8), 7, normal(1, 5, 16), added_cond_kwargs=added).sample


def reconstructed(autoencoder):
    return autoencoder(normal(1, 3, 8, 8)).sample


def read_vq(config):
    return VQConfig.from_hf({"_class_name": "VQModel", **config})


CASES = {
    "unet": (UNet2DConditionModel, SDXL, denoised, UNetConfig.from_hf, unet_config.NULLS),
    "vae": (AutoencoderKL, CODER, reconstructed, VAEConfig.from_hf, vae_config.NULLS),
    "vq": (VQModel, CODER, reconstructed, read_vq, vq_config.NULLS),
}


@pytest.mark.parametrize("name", CASES)
def test_case_img_01_null_is_read_as_the_class_reads_none(name):
    model, base, run, read, nulls = CASES[name]
    parameters = inspect.signature(model.__init__).parameters
    computed = set()
    for key in parameters.keys() - {"self"} - UNREAD.get(model, set()):
        if parameters[key].default is None and key not in base:
            continue
        try:
            theirs = output(model, {**base, key: None}, run)
        except (TypeError, ValueError, AttributeError):
            with pytest.raises(UserError, match=rf"\b{key}"):
                read({**base, key: None})
            continue
        try:
            ours = read({**base, key: None})
        except UserError as error:
            assert key in str(error)
            continue
        computed.add(key)
        value = nulls.get(key, parameters[key].default)
        assert ours == read({**base, key: value}), key
        torch.testing.assert_close(output(model, {**base, key: value}, run), theirs, msg=key)
    assert nulls.keys() <= computed


def test_a_null_mid_block_or_scaling_factor_is_refused_though_the_class_builds():
    with pytest.raises(UserError, match="mid_block_type=null"):
        UNetConfig.from_hf({**SD, "mid_block_type": None})
    with pytest.raises(UserError, match="scaling_factor=null"):  # which every pipeline divides by
        VAEConfig.from_hf({**CODER, "scaling_factor": None})


TEXT = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("model", [CLIPTextModel, CLIPTextModelWithProjection])
def test_null_in_a_text_encoder(model, tmp_path):
    projects = model is CLIPTextModelWithProjection
    ids = torch.tensor([[5, 3, 9, 2, 11, 2]])
    for key in (*TEXT, "hidden_act", "layer_norm_eps", "max_position_embeddings", "pad_token_id"):
        changed = {**TEXT, key: None, "model_type": "clip_text_model"}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            torch.manual_seed(0)
            model(HFText.from_pretrained(tmp_path))(ids)
        except Exception:  # the config's check has errors of a class of its own
            with pytest.raises(UserError, match=key):
                CLIPTextConfig.from_hf(changed, projects)
        else:
            cfg = CLIPTextConfig.from_hf({**TEXT, **dict.fromkeys({key} - TEXT.keys(), 7)})
            assert key in ("projection_dim", "pad_token_id")
            assert CLIPTextConfig.from_hf(changed, projects) == cfg or projects


def test_null_in_a_janus_tokenizer_is_refused_as_its_class_refuses_it():
    for key, value in vq_config.JANUS_DEFAULTS.items():
        if key == vq_config.L2:
            continue
        with pytest.raises(Exception, match=key):
            JanusVQVAEConfig(**{key: None})
        assert value is not None
        with pytest.raises(UserError, match=f"{key}=null"):
            VQConfig.from_hf({"model_type": vq_config.JANUS, key: None})


def betas(config):
    made = DDIMScheduler.from_config(config)
    made.set_timesteps(10)
    made.step(normal(1, 4, 2, 2), 1, normal(1, 4, 2, 2))
    return made


def test_null_in_a_schedule_is_read_as_the_class_reads_none():
    base = {"beta_schedule": "scaled_linear", "steps_offset": 1}
    for key in inspect.signature(DDIMScheduler.__init__).parameters.keys() - {"self"}:
        for more in ({}, {"trained_betas": [0.1] * 20}, {"clip_sample": False}):
            config = {**base, **more, key: None}
            try:
                theirs = betas(config)
            except (TypeError, ValueError, NotImplementedError):
                with pytest.raises(UserError, match=key):
                    Schedule.from_hf(config)
                continue
            if key not in diffusion.DEFAULTS:
                continue  # sampling alone reads it
            ours = Schedule.from_hf(config)
            assert ours.alphas_bar == pytest.approx(theirs.alphas_cumprod.numpy(), rel=1e-5)
            assert ours.set_alpha_to_one == (theirs.final_alpha_cumprod == 1.0)
            assert (ours.clip < 9) == bool(theirs.config.clip_sample), key


def test_absent_betas_are_those_of_the_class_that_the_folder_names():
    for name in (
        *diffusion.CLASS_DEFAULTS,
        "DDIMScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ):
        theirs = getattr(diffusers, name)()
        ours = Schedule.from_hf({"_class_name": name})
        assert ours.alphas_bar == pytest.approx(theirs.alphas_cumprod.numpy(), rel=1e-5), name


def test_other_nulls_are_refused_with_the_file_and_an_example():
    with pytest.raises(UserError, match=r"a\.json: x=null is not supported; .* such as 3"):
        fields({"x": None}, {"x": 3, "y": None}, {}, "a.json")
    read = fields({"x": None, "y": None}, {"x": 3, "y": None, "z": 1}, {"x": 0}, "a.json")
    assert read == {"x": 0, "y": None, "z": 1}
