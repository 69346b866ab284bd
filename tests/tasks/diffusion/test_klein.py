"""Runs of FLUX.2 klein: folders and LoRA that diffusers loads, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers as convert,
)
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_file

from jaxft.core.errors import UserError
from jaxft.models.pipelines import families
from jaxft.models.pipelines.ldm import layouts, open_model
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders import single_file
from tests.tasks.diffusion.flow_runs import (
    CALL,
    LORA,
    NAME,
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
from tests.tiny_klein import make_klein

FEW_LAYERS = {"num_hidden_layers": 20, "layer_types": ["full_attention"] * 20}
pytestmark = pytest.mark.usefixtures("quick", "one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in ("base", "distilled"):
        made[kind] = tmp_path_factory.mktemp(kind) / "folder"
        make_klein(kind).save_pretrained(made[kind])
    return made


def drawn(folder, lora=None):
    pipe = Flux2KleinPipeline.from_pretrained(folder)
    if lora:
        pipe.load_lora_weights(lora)
    noise = torch.randn(1, 16, 4, 4, generator=torch.manual_seed(0))
    return pipe(prompt=PROMPT, latents=noise, **CALL).images


def converted(tensors):
    """Diffusers' own, which fails on the prefix that ComfyUI expects in a file with a VAE."""
    return convert({key.removeprefix("model.diffusion_model."): x for key, x in tensors.items()})


def test_a_run_exports_a_folder_that_diffusers_draws_with(folders, tmp_path, capsys):
    """With buckets of several sizes, dropped captions, and each caption encoded once."""
    source, work = folders["base"], tmp_path / "run"
    data = make_pictures(tmp_path / "pictures", sizes=((24, 20), (16, 40)))
    told = cached_run(source, data, work, capsys)
    assert "FLUX.2 klein, flow matching" in told and "distilled" not in told
    assert_transformer_alone_changed(source, work / "export")
    assert np.abs(drawn(source) - drawn(work / "export")).max() > 1e-3
    file = assert_drawn_and_in_one_file(work, converted, "Flux.2-klein")
    told = refusal(file, data, tmp_path / "y", capsys)
    assert "copy text_encoder/ of the original folder there" in told
    # The VAE has the names of Black Forest Labs, and comes back as it was.
    keys = {key.removeprefix("vae.") for key in torch_file(file) if key.startswith("vae.")}
    assert {
        "bn.running_mean",
        "encoder.quant_conv.weight",
        "decoder.up.1.block.0.norm1.bias",
    } < keys
    back = single_file.as_diffusers(TensorFiles.open(file), layouts(open_model(str(source)))["vae"])
    own = load_file(source / "vae" / NAME)
    assert set(back.keys()) == own.keys()
    assert all(back.read(key).tobytes() == x.tobytes() for key, x in own.items())


def test_zero_steps_give_the_source_bitwise_and_the_distilled_is_called_so(
    folders, tmp_path, capsys
):
    data, source = make_pictures(tmp_path / "pictures", count=8), folders["distilled"]
    told = assert_zero_steps_keep_a_distilled_source(source, data, tmp_path / "run", capsys)
    assert "FLUX.2 klein" in told and "FLUX.2-klein-base" in told
    # A caption of its own for each half of the steps, and guidance is nothing that it has.
    changes = {"sample.rescale": 0.5}
    error = refusal(source, data, tmp_path / "other", capsys, changes)
    assert "sample.rescale=0.5 corrects classifier-free guidance" in error


def test_t33_a_lora_has_the_same_effect_in_diffusers_and_goes_on(folders, tmp_path):
    """In diffusers' layout, in kohya's, and under the names of Black Forest Labs."""
    source, data = folders["base"], make_pictures(tmp_path / "pictures", count=8)
    peft, kohya, merged = lora_run(source, data, tmp_path / "run")
    keys, wanted = load_file(peft), drawn(merged)
    modules = {key.split(".lora_")[0].split(".", 3)[3] for key in keys}
    assert modules == {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"} | {
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    }
    assert len(keys) == 2 * (2 * 4 + 2 * 2)
    assert np.abs(wanted - drawn(source)).max() > 1e-3
    fused = tmp_path / "fused.safetensors"
    save_file(original(load_file(kohya)), fused)
    for file in (peft.parent, kohya, fused):
        np.testing.assert_allclose(drawn(source, file), wanted, atol=1e-5)
    assert_goes_on(source, data, tmp_path / "run", {"on": peft, "kohya": kohya, "fused": fused})


def original(tensors):
    """A kohya file under the names of Black Forest Labs, as ai-toolkit writes them. alpha = r."""
    made = {}
    for key, x in tensors.items():
        stem, rest = key.split(".", 1)
        if rest == "alpha":
            continue
        for joined, dotted in (
            ("lora_unet_", "diffusion_model."), ("_0_", ".0."), ("_1_", ".1."),
            ("_attn_", "_attn."),
        ):  # fmt: skip
            stem = stem.replace(joined, dotted)
        side = rest.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        made[f"{stem}.{side}"] = x
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction": "v_prediction"}, ["prediction='v_prediction' is for DDPM noise"]),
        ({"resolution": 18}, ["resolution", "multiple"]),
        (
            {**LORA, "lora.targets": r"text_encoder\..*q_proj"},
            ["text_encoder.model.layers.0", "diffusers does not read from LoRA files"],
        ),
    ],
)
def test_what_klein_has_not_is_told_in_one_line(folders, tmp_path, capsys, changes, words):
    data = make_pictures(tmp_path / "pictures", count=8)
    error = refusal(folders["base"], data, tmp_path / "run", capsys, changes)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("text_encoder/config.json", {"hidden_size": 24}, "joint_attention_dim=24 .* gives 72"),
        ("text_encoder/config.json", FEW_LAYERS, "the state after layer 27"),
        ("transformer/config.json", {"in_channels": 64}, "16 channels, the VAE has .*=4"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds=True.*FLUX.2-dev"),
        ("model_index.json", {"_class_name": "Flux2Pipeline"}, "another text encoder.*KleinPipel"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "vae is a AutoencoderKL; "),
    ],
)
def test_components_of_two_models_and_of_other_pipelines(tmp_path, file, changes, words):
    make_klein().save_pretrained(tmp_path / "folder")
    damaged(tmp_path / "folder" / file, **changes)
    with pytest.raises(UserError, match=words):
        families.read_config(open_model(str(tmp_path / "folder"), weights=False))
