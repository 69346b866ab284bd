"""Runs of Z-Image: folders and LoRA that diffusers loads, and what is refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from diffusers.loaders.single_file_utils import (
    convert_z_image_transformer_checkpoint_to_diffusers as converted,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_file

from jaxft import export, sample, train
from jaxft.core.errors import UserError
from jaxft.models.pipelines import families
from jaxft.models.pipelines.ldm import open_model
from tests.tiny_diffusion import flags_of, make_pictures
from tests.tiny_zimage import make_zimage

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
NAME = "diffusion_pytorch_model.safetensors"
LORA = {"lora.rank": 4, "lora.alpha": 6.0, "export.kind": "lora", "optim.lr": 0.05}
CALL = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
PROMPT = "a red fish"


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


def losses(work):
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_a_run_exports_a_folder_that_diffusers_draws_with(folders, tmp_path, capsys):
    """With buckets of several sizes, dropped captions, and each caption encoded once."""
    source = folders["base"]
    data = make_pictures(tmp_path / "pictures", sizes=((24, 20), (16, 40)))
    work = tmp_path / "run"
    changes = {"cache": tmp_path / "cache", "export.kind": "folder", "buckets": True}
    flags = [*flags_of(source, data, {**changes, "caption_dropout": 0.3}), "--workdir", str(work)]
    assert train.main(flags) == 0
    told = capsys.readouterr().out
    assert "Z-Image, flow matching" in told and "distilled" not in told
    assert "cached embeddings of 24" in told and "loss_t0.0625" in told
    assert train.main(flags) == 0 and "is finished" in capsys.readouterr().out
    exported, own = (load_file(x / "transformer" / NAME) for x in (work / "export", source))
    assert exported.keys() == own.keys()
    assert all(not np.array_equal(x, exported[key]) for key, x in own.items())
    for other in ("vae", "text_encoder", "tokenizer"):
        for file in (source / other).iterdir():
            assert file.read_bytes() == (work / "export" / other / file.name).read_bytes(), file
    assert np.abs(drawn(source) - drawn(work / "export")).max() > 1e-3
    arguments = ["--workdir", str(work), "--prompt", "a fish", "--guidance", "5"]
    assert sample.main(arguments) == 0
    out = tmp_path / "single"
    arguments = ["--workdir", str(work), "--out", str(out), "--kind", "single_file"]
    assert export.main(arguments) == 0
    (file,) = out.glob("*.safetensors")
    made = converted({k: x for k, x in torch_file(file).items() if not k.startswith("vae.")})
    assert made.keys() == exported.keys()
    assert all(made[key].numpy().tobytes() == x.tobytes() for key, x in exported.items())
    with safe_open(file, "np") as opened:
        assert opened.metadata()["modelspec.architecture"] == "z-image"
    assert train.main([*flags_of(file, data), "--workdir", str(tmp_path / "y")]) == 2
    assert "copy text_encoder/ of the original folder there" in capsys.readouterr().err


def test_zero_steps_give_the_source_bitwise_and_turbo_is_called_distilled(
    folders, tmp_path, capsys
):
    source, data = folders["turbo"], make_pictures(tmp_path / "pictures", count=8)
    changes = {"total": "0_steps", "export.kind": "folder", "data.eval": ""}
    work = tmp_path / "run"
    assert train.main([*flags_of(source, data, changes), "--workdir", str(work)]) == 0
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "distilled" in one]
    assert "Z-Image-Turbo" in line and "training on pictures undoes a part of that" in line
    for file in (file for file in source.rglob("*") if file.is_file()):
        copy = work / "export" / file.relative_to(source)
        if file.suffix == ".json":
            assert json.loads(copy.read_bytes()) == json.loads(file.read_bytes())
        else:
            assert file.read_bytes() == copy.read_bytes(), file


def test_t33_a_lora_has_the_same_effect_in_diffusers_and_goes_on(folders, tmp_path):
    """In diffusers' layout, and in kohya's with q, k and v in one module, as ComfyUI has them."""
    source, data = folders["base"], make_pictures(tmp_path / "pictures", count=8)
    work = tmp_path / "run"
    assert train.main([*flags_of(source, data, LORA), "--workdir", str(work)]) == 0
    peft = work / "export" / "pytorch_lora_weights.safetensors"
    keys = load_file(peft)
    assert len(keys) == 2 * 4 * (2 + 1 + 1)
    merged = tmp_path / "merged"
    arguments = ["--workdir", str(work), "--out", str(merged), "--kind", "folder"]
    assert export.main(arguments) == 0
    (kohya,) = (work / "export").glob("*.kohya.safetensors")
    wanted = drawn(merged)
    assert np.abs(wanted - drawn(source)).max() > 1e-3
    trained = {key.removeprefix("transformer."): x for key, x in keys.items()}
    # The names of ai-toolkit, and those of the original code with q, k and v in one module.
    split, fused = tmp_path / "split.safetensors", tmp_path / "fused.safetensors"
    save_file({f"diffusion_model.{key}": x for key, x in trained.items()}, split)
    save_file(original(load_file(kohya)), fused)
    for file in (work / "export", kohya, split):
        np.testing.assert_allclose(drawn(source, file), wanted, atol=1e-5)
    for name, file in {"on": peft, "kohya": kohya, "split": split, "fused": fused}.items():
        again = {"lora.from": file, "total": "1_steps"}
        assert train.main([*flags_of(source, data, again), "--workdir", str(tmp_path / name)]) == 0
        np.testing.assert_allclose(losses(tmp_path / name)[0], losses(work)[-1], rtol=1e-5)


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


def damaged(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


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
    flags = flags_of(folders["base"], data, changes)
    assert train.main([*flags, "--workdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and all(word in error[0] for word in words), error


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
    assert train.main([*flags_of(tmp_path / "folder", data), "--workdir", str(tmp_path / "r")]) == 2
    assert "no chat template, by which this model reads captions" in capsys.readouterr().err
