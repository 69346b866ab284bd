"""Runs of Z-Image: folders and LoRA that diffusers loads, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from diffusers.loaders.single_file_utils import (
    convert_z_image_transformer_checkpoint_to_diffusers as converted,
)
from safetensors.numpy import load_file, save_file

from jaxft.core.errors import UserError
from jaxft.models.pipelines import families
from jaxft.models.pipelines.ldm import open_model
from tests.tasks.diffusion.flow_runs import (
    CALL,
    LORA,
    PROMPT,
    assert_drawn_and_in_one_file,
    assert_goes_on,
    assert_transformer_alone_changed,
    assert_zero_steps_keep_a_distilled_source,
    cached_run,
    damaged,
    lora_run,
    refusal,
)
from tests.tiny_diffusion import make_pictures
from tests.tiny_zimage import make_zimage

pytestmark = pytest.mark.usefixtures("quick", "one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in ("base", "turbo"):
        made[kind] = tmp_path_factory.mktemp(kind) / "folder"
        make_zimage(kind).save_pretrained(made[kind])
    return made


def drawn(folder, lora=None):
    pipe = ZImagePipeline.from_pretrained(folder)
    if lora:
        pipe.load_lora_weights(lora)
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    return pipe(PROMPT, latents=noise, **CALL).images


def test_a_run_exports_a_folder_that_diffusers_draws_with(folders, tmp_path, capsys):
    """With buckets of several sizes, dropped captions, and each caption encoded once."""
    source, work = folders["base"], tmp_path / "run"
    data = make_pictures(tmp_path / "pictures", sizes=((24, 20), (16, 40)))
    told = cached_run(source, data, work, capsys)
    assert "Z-Image, flow matching" in told and "distilled" not in told
    assert_transformer_alone_changed(source, work / "export")
    assert np.abs(drawn(source) - drawn(work / "export")).max() > 1e-3
    file = assert_drawn_and_in_one_file(work, converted, "z-image")
    lacks = "copy text_encoder/ of the original folder there"
    assert lacks in refusal(file, data, tmp_path / "y", capsys)


def test_zero_steps_give_the_source_bitwise_and_turbo_is_called_distilled(
    folders, tmp_path, capsys
):
    data = make_pictures(tmp_path / "pictures", count=8)
    told = assert_zero_steps_keep_a_distilled_source(
        folders["turbo"], data, tmp_path / "run", capsys
    )
    assert "Z-Image-Turbo" in told


def test_t33_a_lora_has_the_same_effect_in_diffusers_and_goes_on(folders, tmp_path):
    """In diffusers' layout, and in kohya's with q, k and v in one module, as ComfyUI has them."""
    source, data = folders["base"], make_pictures(tmp_path / "pictures", count=8)
    peft, kohya, merged = lora_run(source, data, tmp_path / "run")
    keys, wanted = load_file(peft), drawn(merged)
    assert len(keys) == 2 * 4 * (2 + 1 + 1)
    assert np.abs(wanted - drawn(source)).max() > 1e-3
    trained = {key.removeprefix("transformer."): x for key, x in keys.items()}
    # The names of ai-toolkit, and those of the original code with q, k and v in one module.
    split, fused = tmp_path / "split.safetensors", tmp_path / "fused.safetensors"
    save_file({f"diffusion_model.{key}": x for key, x in trained.items()}, split)
    save_file(original(load_file(kohya)), fused)
    for file in (peft.parent, kohya, split):
        np.testing.assert_allclose(drawn(source, file), wanted, atol=1e-5)
    files = {"on": peft, "kohya": kohya, "split": split, "fused": fused}
    assert_goes_on(source, data, tmp_path / "run", files)


def original(tensors):
    """A kohya file under the names of Z-Image's own code, as ComfyUI's generic layout has them."""
    made = {}
    for key, x in tensors.items():
        stem, rest = key.split(".", 1)
        for joined, dotted in (
            ("lora_unet_", "diffusion_model."), ("_0_", ".0."), ("_1_", ".1."),
            ("attention_", "attention."),
        ):  # fmt: skip
            stem = stem.replace(joined, dotted)
        made[f"{stem}.{rest}"] = x
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction": "v_prediction"}, ["prediction='v_prediction' is for DDPM noise"]),
        ({"min_snr_gamma": 5.0}, ["min_snr_gamma=5.0", "set it to 0"]),
        ({"sample.sampler": "ddim"}, ["sample.sampler='ddim' is not one of euler, dpm++"]),
        ({"inversion.token": "<toy>", "inversion.init": "toy"}, ["inversion.token is not there"]),
        ({"resolution": 18}, ["resolution", "multiple"]),
        (
            {**LORA, "lora.targets": r"text_encoder\..*q_proj"},
            ["text_encoder.model.layers.0", "diffusers does not read from LoRA files"],
        ),
    ],
)
def test_what_zimage_has_not_is_told_in_one_line(folders, tmp_path, capsys, changes, words):
    data = make_pictures(tmp_path / "pictures", count=8)
    error = refusal(folders["base"], data, tmp_path / "run", capsys, changes)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("text_encoder/config.json", {"hidden_size": 24}, "cap_feat_dim=16 .* gives 24"),
        ("text_encoder/config.json", {"model_type": "qwen2"}, "model_type='qwen2'.* qwen3"),
        ("transformer/config.json", {"in_channels": 16}, "16 channels, the VAE has .*=4"),
        ("model_index.json", {"_class_name": "ZImageImg2ImgPipeline"}, "other inputs than a capti"),
        ("model_index.json", {"text_encoder": [None, None]}, "names no text_encoder"),
    ],
)
def test_components_of_two_models_and_of_other_pipelines(tmp_path, file, changes, words):
    make_zimage().save_pretrained(tmp_path / "folder")
    damaged(tmp_path / "folder" / file, **changes)
    with pytest.raises(UserError, match=words):
        families.read_config(open_model(str(tmp_path / "folder"), weights=False))


def test_a_tokenizer_without_a_chat_template_is_refused(folders, tmp_path, capsys):
    make_zimage().save_pretrained(tmp_path / "folder")
    (tmp_path / "folder/tokenizer/chat_template.jinja").unlink()
    data = make_pictures(tmp_path / "pictures", count=8)
    error = refusal(tmp_path / "folder", data, tmp_path / "r", capsys)
    assert "no chat template, by which this model reads captions" in error
