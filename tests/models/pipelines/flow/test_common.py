"""Parts and checks of the pipelines of flow matching."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.pipelines import families
from jaxft.models.pipelines.flow.common import check_latents, check_width
from jaxft.models.pipelines.ldm import open_model
from tests.tiny_zimage import make_zimage


def test_widths_and_latents_of_one_model_pass_and_others_are_named():
    check_width("z", "cap_feat_dim", 16, 16, "text_encoder gives")
    check_latents("z", 4, VAEConfig.from_hf({"latent_channels": 4}))
    with pytest.raises(UserError, match=r"^z: .*cap_feat_dim=16 but text_encoder gives 24;.*mixes"):
        check_width("z", "cap_feat_dim", 16, 24, "text_encoder gives")
    with pytest.raises(
        UserError, match=r"^z: .*latents of 16 channels, .*latent_channels=4; .*mix"
    ):
        check_latents("z", 16, VAEConfig.from_hf({"latent_channels": 4}))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_qwen_of_either_class_fills_the_text_encoder_and_the_rest_is_copied(tmp_path, prefix):
    """The file of a Qwen3ForCausalLM has a prefix and may have a head. The last layer is unread."""
    make_zimage().save_pretrained(tmp_path)
    (file,) = (tmp_path / "text_encoder").glob("*.safetensors")
    own = {prefix + key: x for key, x in load_file(file).items()}
    if prefix:
        own["lm_head.weight"] = np.ones((262, 16), np.float32)
        config = tmp_path / "text_encoder/config.json"
        stated = {**json.loads(config.read_text()), "architectures": ["Qwen3ForCausalLM"]}
        config.write_text(json.dumps(stated))
    save_file(own, file, {"format": "pt"})
    pipeline = open_model(str(tmp_path))
    cfg = families.read_config(pipeline)
    template = jax.eval_shape(lambda key: families.build(cfg, key), jax.random.key(0))
    parts = {part.folder: part for part in families.parts(pipeline, cfg)}
    assert parts.keys() == {"transformer", "vae", "text_encoder"}
    entries = parts["text_encoder"].entries(describe(template))
    used = {key for entry in entries for key in entry.keys}
    assert "model.layers.1.mlp.up_proj.weight" in used and "model.norm.weight" in used
    assert not any(".layers.2." in key for key in used)
