"""Runs of FLUX.1: folders and LoRA that diffusers loads, and what is refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as torch_file

from jaxft import export, sample, train
from jaxft.core.errors import UserError
from jaxft.models.pipelines import families
from jaxft.models.pipelines.ldm import open_model
from tests.models.denoisers.flux.test_flux_single_file import converter
from tests.tiny_diffusion import flags_of, make_pictures
from tests.tiny_flux import LENGTHS, make_flux

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
NAME = "diffusion_pytorch_model.safetensors"
LORA = {"lora.rank": 4, "lora.alpha": 6.0, "export.kind": "lora", "optim.lr": 0.05}
CALL = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
PROMPT = "a red fish"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in LENGTHS:
        made[kind] = tmp_path_factory.mktemp(kind) / "folder"
        make_flux(made[kind].parent, kind).save_pretrained(made[kind])
    return made


def drawn(folder, lora=None):
    pipe = FluxPipeline.from_pretrained(folder)
    if lora:
        pipe.load_lora_weights(lora)
    noise = torch.randn(1, 16, 16, generator=torch.manual_seed(0))  # 4 x 4 tokens
    return pipe(PROMPT, latents=noise, **CALL).images


def same(file, copy):
    """Equal bytes; transformers 4 needs a prefix in the keys of CLIP, whose tensors are equal."""
    if file.parent.name != "text_encoder" or file.suffix != ".safetensors":
        return file.read_bytes() == copy.read_bytes()
    own, other = load_file(file), load_file(copy)
    return {f"text_model.{key}": x.tobytes() for key, x in own.items()} == {
        key: x.tobytes() for key, x in other.items()
    }


def losses(work):
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_a_run_exports_a_folder_that_diffusers_draws_with(folders, tmp_path, capsys):
    source, data = folders["dev"], make_pictures(tmp_path / "pictures")
    work, cache = tmp_path / "run", {"cache": tmp_path / "cache", "export.kind": "folder"}
    flags = [*flags_of(source, data, cache), "--workdir", str(work)]
    assert train.main(flags) == 0
    told = capsys.readouterr().out
    assert "FLUX.1 with guidance as an input, flow matching" in told and "distilled" not in told
    assert "cached embeddings of 24" in told and "loss_t0.0625" in told
    assert train.main(flags) == 0 and "is finished" in capsys.readouterr().out
    exported, own = (load_file(x / "transformer" / NAME) for x in (work / "export", source))
    assert exported.keys() == own.keys()
    changed = [key for key, x in own.items() if not np.array_equal(x, exported[key])]
    assert len(changed) == len(own)
    for other in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        for file in (source / other).iterdir():
            assert same(file, work / "export" / other / file.name), file
    assert np.abs(drawn(source) - drawn(work / "export")).max() > 1e-3
    arguments = ["--workdir", str(work), "--prompt", "a fish", "--guidance", "3.5"]
    assert sample.main(arguments) == 0
    out = tmp_path / "single"
    arguments = ["--workdir", str(work), "--out", str(out), "--kind", "single_file"]
    assert export.main(arguments) == 0
    (file,) = out.glob("*.safetensors")
    made = converter(16)({k: x for k, x in torch_file(file).items() if not k.startswith("vae.")})
    assert made.keys() == exported.keys()
    assert all(made[key].numpy().tobytes() == x.tobytes() for key, x in exported.items())
    decoder = AutoencoderKL.from_single_file(
        str(file), config=str(source), subfolder="vae", local_files_only=True
    ).state_dict()
    vae = load_file(source / "vae" / NAME)
    assert all(decoder[key].numpy().tobytes() == x.tobytes() for key, x in vae.items())
    with safe_open(file, "np") as opened:
        assert opened.metadata()["modelspec.architecture"] == "flux-1"
    assert train.main([*flags_of(file, data), "--workdir", str(tmp_path / "y")]) == 2
    assert "copy text_encoder/ of the original folder there" in capsys.readouterr().err


def test_zero_steps_give_the_source_bitwise_and_schnell_is_called_distilled(
    folders, tmp_path, capsys
):
    source, data = folders["schnell"], make_pictures(tmp_path / "pictures", count=8)
    changes = {"total": "0_steps", "export.kind": "folder", "data.eval": ""}
    work = tmp_path / "run"
    assert train.main([*flags_of(source, data, changes), "--workdir", str(work)]) == 0
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "distilled" in one]
    assert "without guidance" in line and "training on pictures undoes a part of that" in line
    for file in source.rglob("*"):
        if file.is_file():
            copy = work / "export" / file.relative_to(source)
            if file.suffix == ".json":
                assert json.loads(copy.read_bytes()) == json.loads(file.read_bytes())
            else:
                assert same(file, copy), file


def test_t33_a_lora_has_the_same_effect_in_diffusers_and_goes_on(folders, tmp_path, capsys):
    source, data = folders["dev"], make_pictures(tmp_path / "pictures", count=8)
    work = tmp_path / "run"
    assert train.main([*flags_of(source, data, LORA), "--workdir", str(work)]) == 0
    keys = load_file(work / "export" / "pytorch_lora_weights.safetensors")
    blocks = {key.split(".")[1] for key in keys}
    assert blocks == {"transformer_blocks", "single_transformer_blocks"}
    assert len(keys) == 2 * (2 * 12 + 2 * 3)
    merged = tmp_path / "merged"
    arguments = ["--workdir", str(work), "--out", str(merged), "--kind", "folder"]
    assert export.main(arguments) == 0
    found = drawn(source, work / "export")
    np.testing.assert_allclose(found, drawn(merged), atol=1e-5)
    assert np.abs(found - drawn(source)).max() > 1e-3
    (kohya,) = (work / "export").glob("*.kohya.safetensors")
    with safe_open(kohya, "np") as opened:
        about = opened.metadata()
    assert about["ss_base_model_version"] == "flux1"
    assert about["modelspec.architecture"] == "flux-1/lora"
    peft = work / "export" / "pytorch_lora_weights.safetensors"
    for name, file in {"on": peft, "kohya": kohya}.items():
        again = {"lora.from": file, "total": "1_steps"}
        assert train.main([*flags_of(source, data, again), "--workdir", str(tmp_path / name)]) == 0
        np.testing.assert_allclose(losses(tmp_path / name)[0], losses(work)[-1], rtol=1e-5)


def test_a_lora_of_diffusers_own_script_keeps_its_strength(folders, tmp_path):
    """Its alpha stands in the header of the file, and is not its rank here."""
    source, data = folders["dev"], make_pictures(tmp_path / "pictures", count=8)
    pipe = FluxPipeline.from_pretrained(source)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=8, target_modules=["attn.to_q", "attn.to_v", "proj_mlp"])
    )
    with torch.no_grad():
        for name, tensor in pipe.transformer.named_parameters():
            if "lora_B" in name:
                tensor.normal_(generator=torch.manual_seed(0), std=0.3)
    FluxPipeline.save_lora_weights(
        tmp_path / "lora",
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        **_collate_lora_metadata({"transformer": pipe.transformer}),
    )
    changes = {"lora.from": tmp_path / "lora", "total": "0_steps", "export.kind": "folder"}
    work = tmp_path / "run"
    assert train.main([*flags_of(source, data, changes), "--workdir", str(work)]) == 0
    found = drawn(source, tmp_path / "lora")
    np.testing.assert_allclose(drawn(work / "export"), found, atol=1e-5)
    assert np.abs(found - drawn(source)).max() > 1e-3


def damaged(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction": "v_prediction"}, ["prediction='v_prediction' is for DDPM noise"]),
        ({"zero_snr": True}, ["zero_snr=True is for DDPM noise"]),
        ({"min_snr_gamma": 5.0}, ["min_snr_gamma=5.0", "set it to 0"]),
        ({"sample.sampler": "ddim"}, ["sample.sampler='ddim' is not one of euler, dpm++"]),
        ({"sample.rescale": 0.7}, ["sample.rescale=0.7", "classifier-free guidance", "to 0"]),
        ({"inversion.token": "<toy>", "inversion.init": "toy"}, ["inversion.token is not there"]),
        ({"resolution": 18}, ["resolution", "multiple"]),
        (
            {**LORA, "lora.targets": r"text_encoder_2\..*"},
            ["text_encoder_2.encoder.block.0", "diffusers does not read from LoRA files"],
        ),
    ],
)
def test_what_flux_has_not_is_told_in_one_line(folders, tmp_path, capsys, changes, words):
    data = make_pictures(tmp_path / "pictures", count=8)
    flags = flags_of(folders["dev"], data, changes)
    assert train.main([*flags, "--workdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and all(word in error[0] for word in words), error


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("text_encoder/config.json", {"hidden_size": 24}, "pooled_projection_dim=16 .* gives 24"),
        ("text_encoder_2/config.json", {"d_model": 56}, "joint_attention_dim=48 .* gives 56"),
        ("transformer/config.json", {"in_channels": 64}, "16 channels, the VAE has .*=4"),
        ("transformer/config.json", {"in_channels": 32, "out_channels": 16}, r"FLUX\.1 Fill"),
        ("model_index.json", {"_class_name": "FluxFillPipeline"}, "other inputs than a caption"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "names no text_encoder_2"),
    ],
)
def test_components_of_two_models_and_of_other_pipelines(tmp_path, file, changes, words):
    make_flux(tmp_path).save_pretrained(tmp_path / "folder")
    damaged(tmp_path / "folder" / file, **changes)
    with pytest.raises(UserError, match=words):
        families.read_config(open_model(str(tmp_path / "folder"), weights=False))


def test_a_dev_folder_without_guidance_is_taken_as_its_config_says(folders, tmp_path):
    """With a shift by tokens it is not FLUX.1-schnell, so it is not called distilled."""
    make_flux(tmp_path, "dev", guidance_embeds=False).save_pretrained(tmp_path / "folder")
    cfg = families.read_config(open_model(str(tmp_path / "folder"), weights=False))
    assert cfg.describe() == "FLUX.1 without guidance, flow matching"
