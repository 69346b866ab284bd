"""Runs of Stable Diffusion 3: folders and LoRA that diffusers loads, and what is refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxft import export, sample, train
from jaxft.core.errors import UserError
from jaxft.models.pipelines import families
from jaxft.models.pipelines.ldm import open_model
from tests.tiny_diffusion import flags_of, make_pictures
from tests.tiny_sd3 import NO_T5, make_sd3

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
NAME = "diffusion_pytorch_model.safetensors"
LORA = {"lora.rank": 4, "lora.alpha": 6.0, "export.kind": "lora", "optim.lr": 0.05}
CALL = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
PROMPT = "a red fish"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines with T5 and without."""
    made = {}
    for name in ("t5", "no-t5"):
        made[name] = tmp_path_factory.mktemp(name) / "folder"
        make_sd3(made[name].parent, name == "t5").save_pretrained(made[name])
    return made


def drawn(folder, lora=None, **parts):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    if lora:
        pipe.load_lora_weights(lora)
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    return pipe(PROMPT, latents=noise, **CALL).images


def losses(work):
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_a_run_exports_a_folder_that_diffusers_draws_with(folders, tmp_path, capsys):
    source, data = folders["t5"], make_pictures(tmp_path / "pictures")
    work, cache = tmp_path / "run", {"cache": tmp_path / "cache", "export.kind": "folder"}
    flags = [*flags_of(source, data, cache), "--workdir", str(work)]
    assert train.main(flags) == 0
    told = capsys.readouterr().out
    assert "Stable Diffusion 3, flow matching" in told and "cached embeddings of 24" in told
    assert "loss_t0.0625" in told
    assert train.main(flags) == 0 and "is finished" in capsys.readouterr().out
    exported, own = (load_file(x / "transformer" / NAME) for x in (work / "export", source))
    assert exported.keys() == own.keys()
    position = "pos_embed.pos_embed"
    assert exported[position].tobytes() == own[position].tobytes(), "t7: copied byte for byte"
    changed = [key for key, x in own.items() if not np.array_equal(x, exported[key])]
    assert len(changed) > 0.9 * len(own)
    for other in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        for file in (source / other).iterdir():
            assert (work / "export" / other / file.name).read_bytes() == file.read_bytes()
    assert np.abs(drawn(source) - drawn(work / "export")).max() > 1e-3
    assert sample.main(["--workdir", str(work), "--prompt", "a fish"]) == 0
    out = tmp_path / "single"
    arguments = ["--workdir", str(work), "--out", str(out), "--kind", "single_file"]
    assert export.main(arguments) == 0
    (file,) = out.glob("*.safetensors")
    denoiser, decoder = (
        cls.from_single_file(str(file), config=str(source), subfolder=name, local_files_only=True)
        for cls, name in ((SD3Transformer2DModel, "transformer"), (AutoencoderKL, "vae"))
    )
    made = {key: tensor.numpy() for key, tensor in denoiser.state_dict().items()}
    assert all(made[key].tobytes() == x.tobytes() for key, x in exported.items())
    vae = load_file(source / "vae" / NAME)
    made = {key: tensor.numpy() for key, tensor in decoder.state_dict().items()}
    assert all(made[key].tobytes() == x.tobytes() for key, x in vae.items())
    with safe_open(file, "np") as opened:
        about = opened.metadata()
    assert about["modelspec.architecture"] == "stable-diffusion-v3"
    assert train.main([*flags_of(file, data), "--workdir", str(tmp_path / "y")]) == 2
    assert "copy text_encoder/ of the original folder there" in capsys.readouterr().err


def test_zero_steps_give_the_source_bitwise(folders, tmp_path):
    source, data = folders["no-t5"], make_pictures(tmp_path / "pictures", count=8)
    changes = {"total": "0_steps", "export.kind": "folder", "data.eval": ""}
    work = tmp_path / "run"
    assert train.main([*flags_of(source, data, changes), "--workdir", str(work)]) == 0
    for file in source.rglob("*"):
        if file.is_file():
            copy = work / "export" / file.relative_to(source)
            if file.suffix == ".json":
                assert json.loads(copy.read_bytes()) == json.loads(file.read_bytes())
            else:
                assert copy.read_bytes() == file.read_bytes(), file


def test_t33_a_lora_has_the_same_effect_in_diffusers_and_goes_on(folders, tmp_path, capsys):
    source, data = folders["no-t5"], make_pictures(tmp_path / "pictures", count=8)
    work = tmp_path / "run"
    assert train.main([*flags_of(source, data, LORA), "--workdir", str(work)]) == 0
    files = sorted(file.name for file in (work / "export").glob("*.safetensors"))
    names = ("pytorch_lora_weights", "run.kohya", "run.original")
    assert files == [f"{name}.safetensors" for name in names]
    (told,) = [one for one in capsys.readouterr().out.splitlines() if "kohya's scripts" in one]
    assert files[1] in told and "diffusers does not read kohya's files" in told
    assert "give it pytorch_lora_weights.safetensors" in told
    keys = load_file(work / "export" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.transformer_blocks.") for key in keys)
    merged = tmp_path / "merged"
    arguments = ["--workdir", str(work), "--out", str(merged), "--kind", "folder"]
    assert export.main(arguments) == 0
    found = drawn(source, work / "export", **NO_T5)
    np.testing.assert_allclose(found, drawn(merged, **NO_T5), atol=1e-5)
    assert np.abs(found - drawn(source, **NO_T5)).max() > 1e-3
    again = {"lora.from": work / "export", "total": "1_steps"}
    assert train.main([*flags_of(source, data, again), "--workdir", str(tmp_path / "on")]) == 0
    np.testing.assert_allclose(losses(tmp_path / "on")[0], losses(work)[-1], rtol=1e-5)


def damaged(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction": "v_prediction"}, ["prediction='v_prediction' is for DDPM noise"]),
        ({"zero_snr": True}, ["zero_snr=True is for DDPM noise"]),
        ({"min_snr_gamma": 5.0}, ["min_snr_gamma=5.0", "set it to 0"]),
        ({"sample.sampler": "ddim"}, ["sample.sampler='ddim' is not one of euler, dpm++"]),
        ({"inversion.token": "<toy>", "inversion.init": "toy"}, ["inversion.token is not there"]),
        ({"resolution": 18}, ["resolution", "multiple"]),
        ({"resolution": 64}, ["larger than 16", "choose a smaller resolution"]),
    ],
)
def test_what_flow_matching_has_not_is_told_in_one_line(folders, tmp_path, capsys, changes, words):
    data = make_pictures(tmp_path / "pictures", count=8)
    flags = flags_of(folders["no-t5"], data, changes)
    assert train.main([*flags, "--workdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and all(word in error[0] for word in words), error


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("text_encoder_2", {"projection_dim": 32}, "pooled_projection_dim=40 but .* give 48"),
        ("text_encoder_3", {"d_model": 56}, "joint_attention_dim=48 but .* give 56"),
        (
            "transformer",
            {"in_channels": 16},
            "latents of 16 channels, the VAE has latent_channels=4",
        ),
        ("transformer", {"out_channels": 16}, "in_channels=4 and out_channels=16; a velocity"),
    ],
)
def test_components_of_two_models(tmp_path, file, changes, words):
    make_sd3(tmp_path).save_pretrained(tmp_path / "folder")
    damaged(tmp_path / "folder" / file / "config.json", **changes)
    with pytest.raises(UserError, match=words):
        families.read_config(open_model(str(tmp_path / "folder"), weights=False))
