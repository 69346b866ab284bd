"""Exports in float16: the numbers of torch, and folders that diffusers and transformers load."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jaxft import export, train
from jaxft.weights.files.gguf import GgufFile
from tests.tiny_diffusion import flags_of, make_pictures
from tests.tiny_pipelines import make_pipeline

pytestmark = pytest.mark.usefixtures("quick")
ROOT = Path(__file__).resolve().parents[1]
AFTER_ONE_STEP = {"total": "1_steps", "data.eval": "", "export.kind": "none"}


def exported(work, kind, dtype):
    """The tensors of an export by file and key. Its folder is `work`-KIND-DTYPE."""
    out = work.parent / f"{work.name}-{kind}-{dtype}"
    words = ["--workdir", str(work), "--out", str(out), "--kind", kind, "--dtype", dtype]
    assert export.main(words) == 0
    files = sorted(out.rglob("*.safetensors"))
    named = {str(file.relative_to(out)).replace(out.name, "NAME"): file for file in files}
    return out, {f"{n}:{key}": x for n, file in named.items() for key, x in load_file(file).items()}


def assert_halves(made, whole):
    assert made.keys() == whole.keys() and len(made) > 5
    for key, tensor in made.items():
        assert tensor.dtype == torch.float16, key
        assert torch.equal(tensor.view(torch.int16), whole[key].half().view(torch.int16)), key


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    work = tmp_path_factory.mktemp("diffusion")
    make_pipeline(work, "sd").save_pretrained(work / "folder")
    pictures = make_pictures(work / "pictures")
    changes = {**AFTER_ONE_STEP, "trainable": r"unet\.conv_out\..*"}
    flags = flags_of(work / "folder", pictures, changes)
    assert train.main([*flags, "--workdir", str(work / "run")]) == 0
    return work / "run"


@pytest.mark.parametrize("kind", ["folder", "single_file"])
def test_a_pipeline(diffusion, kind, capsys):
    _, whole = exported(diffusion, kind, "float32")
    capsys.readouterr()
    out, made = exported(diffusion, kind, "float16")
    assert_halves(made, whole)
    if kind == "folder":
        told = capsys.readouterr().out
        tiny = sum(
            int(((x.half().abs() < 2.0**-14) & (x.half() != 0)).sum())
            for key, x in whole.items()
            if key.startswith("unet")
        )
        assert f" numbers 0, and {tiny} subnormal" in told
        pipe = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float16)
    else:
        (file,) = out.glob("*.safetensors")
        pipe = StableDiffusionPipeline.from_single_file(
            str(file), config=str(out), local_files_only=True, torch_dtype=torch.float16
        )
    last = {"folder": "unet/diffusion_pytorch_model.safetensors:conv_out.weight"}
    key = last.get(kind, "NAME.safetensors:model.diffusion_model.out.2.weight")
    assert torch.equal(pipe.unet.state_dict()["conv_out.weight"], whole[key].half())
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.float16


def test_a_language_model(make_folder, make_flags, tmp_path):
    flags = ["--config", str(ROOT / "configs" / "llm.py")]
    flags += make_flags(make_folder(dtype="bfloat16"), {"lora.rank": 2, **AFTER_ONE_STEP})
    work = tmp_path / "run"
    assert train.main([*flags, "--workdir", str(work)]) == 0
    _, whole = exported(work, "merged", "float32")
    out, made = exported(work, "merged", "float16")
    assert_halves(made, whole)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.float16, "as config.json has it"
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, made[f"model.safetensors:{key}"]), key
    out, _ = exported(work, "gguf", "float16")
    (file,) = out.glob("*.gguf")
    assert GgufFile(file).config()["dtype"] == "float16"
