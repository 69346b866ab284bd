"""Single files: which family, which configs, which schedule, and what is written around them."""

import json
import shutil

import diffusers
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from jaxft.core.errors import UserError
from jaxft.models.pipelines import ldm
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.folders import known_configs as known
from jaxft.weights.folders import single_file
from jaxft.weights.folders.diffusers import open_pipeline
from jaxft.weights.folders.single_file import (
    TEXT_PREFIXES,
    UNET_PREFIX,
    VAE_PREFIX,
    markers,
    modelspec,
    open_single_file,
)
from tests.models.pipelines.test_ldm import untrained
from tests.tiny_pipelines import make_pipeline, make_tokenizer

V_ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def fake(path, kind, width=320, channels=4, extra=()):
    """A file with the few tensors that tell a family."""
    arrays = {
        f"{UNET_PREFIX}input_blocks.0.0.weight": np.zeros((width, channels, 3, 3), np.float16),
        f"{VAE_PREFIX}quant_conv.bias": np.zeros(8, np.float16),
        **{
            f"{prefix}ln_final.bias": np.zeros(4, np.float16)
            for prefix in TEXT_PREFIXES[kind].values()
        },
        **{name: np.zeros(0, np.float32) for name in extra},
    }
    end = (
        "token_embedding.weight"
        if kind == "sd2"
        else "text_model.embeddings.token_embedding.weight"
    )
    arrays[TEXT_PREFIXES[kind]["text_encoder"] + end] = np.zeros((49410, 1), np.float16)
    infos = {key: (array.shape, array.dtype) for key, array in arrays.items()}
    write_sharded(path.parent, arrays.items(), infos, stem=path.stem)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("sd")
    make_pipeline(work).save_pretrained(work / "pipe")
    return work / "pipe"


@pytest.mark.parametrize("kind", TEXT_PREFIXES)
def test_the_published_configs_serve_where_none_lie_beside(tmp_path, kind):
    file = fake(tmp_path / "m.safetensors", kind, channels=9)
    pipe = open_single_file(file, prediction="epsilon")
    assert pipe.layout == kind and pipe.components.keys() == known.KNOWN_COMPONENTS[kind].keys()
    unet = pipe.components["unet"].config
    assert unet == {**known.KNOWN_COMPONENTS[kind]["unet"], "in_channels": 9}
    assert pipe.components["text_encoder"].config["vocab_size"] == 49410
    assert known.KNOWN_COMPONENTS[kind]["text_encoder"]["vocab_size"] == 49408
    xl = "XL" * (kind == "sdxl")
    assert pipe.index["_class_name"] == f"StableDiffusion{xl}InpaintPipeline"
    for channels, sees in ((4, ""), (8, "InstructPix2Pix"), (9, "Inpaint")):
        name = single_file.published_index(kind, channels)["_class_name"]
        assert name == f"StableDiffusion{xl}{sees}Pipeline" and hasattr(diffusers, name)
    with pytest.raises(UserError, match=r"tokenizer: no vocab\.json or tokenizer\.json"):
        pipe.tokenizer_dir()


def test_tokenizers_and_a_schedule_may_lie_beside(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "scheduler").mkdir()
    mine = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(mine))
    pipe = open_single_file(fake(tmp_path / "m.safetensors", "sd2"))
    assert pipe.tokenizer_dir() == tmp_path / "tokenizer"
    assert pipe.scheduler == mine


@pytest.mark.parametrize("kind", TEXT_PREFIXES)
def test_markers_say_the_prediction(tmp_path, kind):
    marked = fake(tmp_path / "v.safetensors", kind, extra=("v_pred", "ztsnr"))
    scheduler = open_single_file(marked).scheduler
    assert V_ZERO.items() <= scheduler.items() and scheduler["timestep_spacing"] == "trailing"
    assert set(markers(scheduler)) == {"v_pred", "ztsnr"}
    with pytest.raises(UserError, match=r"='epsilon', but .*v\.safetensors has v_prediction"):
        open_single_file(marked, prediction="epsilon")
    plain = fake(tmp_path / "e.safetensors", kind)
    if kind == "sd2":
        with pytest.raises(UserError, match=r"e\.safetensors: this SD 2 file has no key .* or v"):
            open_single_file(plain)
    else:
        assert open_single_file(plain).scheduler["prediction_type"] == "epsilon"
        assert not markers(open_single_file(plain).scheduler)
    assert open_single_file(plain, prediction="v_prediction").scheduler["prediction_type"][0] == "v"


def test_modelspec_says_it_too(folder, tmp_path):
    pipe, file = open_pipeline(str(folder)), tmp_path / "m.safetensors"
    (tmp_path / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(folder / name, tmp_path / name)
    for scheduler, word in (({}, "epsilon"), (V_ZERO, "v_prediction")):
        single_file.write(file, untrained(pipe), (), modelspec("sd2", "mine", 768, scheduler))
        assert open_single_file(str(file)).scheduler["prediction_type"] == word
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt" and metadata["modelspec.title"] == "mine"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert metadata["modelspec.resolution"] == "768x768"


def test_architectures_of_models_and_adapters():
    assert modelspec("sd1", "x", 512, {})["modelspec.architecture"] == "stable-diffusion-v1"
    lora = modelspec("sdxl", "x", 1024, {}, "lora")["modelspec.architecture"]
    assert lora == "stable-diffusion-xl-v1-base/lora"
    assert modelspec("sd2", "x", 512, {})["modelspec.architecture"] == "stable-diffusion-v2-512"


def test_a_written_file_with_markers_loads_in_diffusers(folder, tmp_path):
    pipe = open_pipeline(str(folder))
    file = tmp_path / "v.safetensors"
    spec = modelspec("sd1", "v", 512, V_ZERO)
    single_file.write(file, untrained(pipe), markers(V_ZERO), spec)
    tensors = TensorFiles.open(file)
    assert tensors.info("v_pred") == tensors.info("ztsnr") == ((0,), np.dtype(np.float32))
    StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.safetensors"]


def test_the_index_beside_has_to_be_of_the_same_family(folder):
    file = fake(folder / "xl.safetensors", "sdxl")
    with pytest.raises(UserError, match=r"holds sdxl, but .*model_index\.json is of another"):
        ldm.open_model(file)


@pytest.mark.parametrize("width", [192, 8])
def test_a_unet_of_another_width_needs_its_configs(tmp_path, width):
    file = fake(tmp_path / "m.safetensors", "sd1", width)
    with pytest.raises(UserError, match=rf"a UNet of width {width} is none of the published"):
        open_single_file(file)


def test_a_file_that_is_no_whole_checkpoint_is_named(tmp_path):
    for key, words in (("x", "no whole SD 1, SD 2 or SDXL"), ("lora_unet_x.alpha", "a LoRA; give")):
        arrays = {key: np.zeros((1, 1), np.float32)}
        infos = {key: (array.shape, array.dtype) for key, array in arrays.items()}
        write_sharded(tmp_path, arrays.items(), infos)
        with pytest.raises(UserError, match=rf"model\.safetensors: .*{words}"):
            open_single_file(str(tmp_path / "model.safetensors"))
