"""Single files of flow matching models in the folder of their model, by diffusers' converters.

A file of the tests is the inverse of diffusers' converter on a folder of diffusers' random weights:
every element gets a number, the converter moves the numbers, and the weights go back by them.
"""

import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as stock
from safetensors.numpy import load_file, save_file

from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.models.pipelines import families, flow_files, ldm
from jaxft.models.pipelines.ldm import open_model
from jaxft.weights.folders import single_file
from jaxft.weights.transfer import Export
from tests.models.denoisers.flux.test_flux_single_file import converter
from tests.tiny_flux import make_flux
from tests.tiny_klein import make_klein
from tests.tiny_sd3 import make_sd3
from tests.tiny_zimage import make_zimage

MAKERS = {
    "sd3": make_sd3,
    "flux": make_flux,
    "flux2": lambda _: make_klein(),
    "zimage": lambda _: make_zimage(),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
# with the VAE's prefix
FAMILIES = {"sd3": "first_stage_model.", "flux": "vae.", "flux2": "vae.", "zimage": "vae."}


def to_diffusers(kind, file):
    """diffusers' conversion of a transformer's tensors, of which it takes those that it knows."""
    file = {key: torch.from_numpy(x) for key, x in file.items()}
    if kind == "sd3":
        made = stock.convert_sd3_transformer_checkpoint_to_diffusers(file)
    elif kind == "flux":
        made = converter(16)(file)
    elif kind == "flux2":
        bare = {key.removeprefix("model.diffusion_model."): x for key, x in file.items()}
        made = stock.convert_flux2_transformer_checkpoint_to_diffusers(bare)
    else:
        made = stock.convert_z_image_transformer_checkpoint_to_diffusers(file)
    return {key: x.numpy() for key, x in made.items()}


def inverse(kind, state, shapes):
    """The file whose conversion is `state`. shapes: of the file's tensors."""
    numbers, total = {}, 0
    for key, shape in shapes.items():
        size = int(np.prod(shape))
        numbers[key] = np.arange(total, total + size, dtype=np.float64).reshape(shape)
        total += size
    flat = np.full(total, np.nan, np.float32)
    moved = to_diffusers(kind, {key: x.copy() for key, x in numbers.items()})
    assert moved.keys() == state.keys()
    for key, places in moved.items():
        flat[places.astype(np.int64)] = state[key]
    assert not np.isnan(flat).any()
    return {key: flat[places.astype(np.int64)] for key, places in numbers.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{family: (folder, tensors of the transformer under the file's names)}."""
    found = {}
    for kind in FAMILIES:
        work = tmp_path_factory.mktemp(kind)
        pipe = MAKERS[kind](work)
        pipe.save_pretrained(work / "folder")
        state = load_file(work / "folder" / "transformer" / WEIGHTS)
        pipeline = open_model(str(work / "folder"), weights=False)
        infos = {key: (x.shape, x.dtype) for key, x in state.items()}
        layout = ldm.layouts(pipeline)["transformer"]
        shapes = single_file.to_ldm(Export(infos, iter(())), layout).infos
        file = inverse(kind, state, {key: shape for key, (shape, _) in shapes.items()})
        found[kind] = work / "folder", file
    return found


def placed(made, kind, tmp_path, tensors, drop=()):
    """A single file in a copy of the folder, without the weights of `drop`."""
    folder = tmp_path / "model"
    shutil.copytree(made[kind][0], folder)
    for name in ("transformer", *drop):
        for file in (folder / name).glob("*.safetensors"):
            file.unlink()
    save_file(tensors, folder / "mine.safetensors")
    return folder / "mine.safetensors"


def same(one, other):
    names = set(one.keys())
    assert names == set(other.keys())
    return all(one.read(key).tobytes() == other.read(key).tobytes() for key in names)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_file_with_the_transformer_alone_is_its_folder_bit_for_bit(made, kind, prefix, tmp_path):
    folder, file = made[kind]
    bare = {key.removeprefix("model.diffusion_model."): x for key, x in file.items()}
    spec = placed(made, kind, tmp_path, {prefix + key: x for key, x in bare.items()})
    opened, wanted = open_model(str(spec)), open_model(str(folder))
    assert opened.layout == kind and opened.components.keys() == wanted.components.keys()
    for name, source in opened.components.items():
        assert same(source.tensors, wanted.components[name].tensors), name
    cfg = families.read_config(opened)
    assert cfg == families.read_config(wanted)
    assert len(families.parts(opened, cfg)) == len(opened.components)
    assert all(one.tensors is None for one in open_model(str(spec), False).components.values())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_whole_file_needs_no_other_weights(made, kind, tmp_path):
    """As ComfyUI writes them: transformer, VAE and text encoders, with buffers beside these."""
    folder, file = made[kind]
    pipeline, tensors = open_model(str(folder)), dict(file)
    decoder = ldm.layouts(pipeline)["vae"]
    state = load_file(folder / "vae" / WEIGHTS)
    infos = {key: (x.shape, x.dtype) for key, x in state.items()}
    assert decoder.prefix == FAMILIES[kind]
    tensors |= dict(single_file.to_ldm(Export(infos, iter(state.items())), decoder).tensors)
    texts = flow_files.FLOW_TEXTS[kind]
    for name, start in texts.items():
        own = load_file(folder / name / "model.safetensors")
        tensors |= {start + key: x + 1 for key, x in own.items()}
        clip = "clip" in start
        tensors |= {f"{start}text_model.embeddings.position_ids": np.arange(77)} if clip else {}
    spec = placed(made, kind, tmp_path, tensors, drop=("vae", *texts))
    opened = open_model(str(spec))
    assert same(opened.components["vae"].tensors, pipeline.components["vae"].tensors)
    for name in texts:
        found, wanted = opened.components[name].tensors, pipeline.components[name].tensors
        assert set(found.keys()) == set(wanted.keys())
        assert all(np.array_equal(found.read(k), wanted.read(k) + 1) for k in wanted.keys())  # noqa: SIM118
    families.parts(opened, families.read_config(opened))


def test_text_encoders_of_a_file_replace_those_of_the_folder(made, tmp_path):
    """CLIP-L of SD 3's files has transformers 4's names, and no projection."""
    folder, file = made["sd3"]
    own = load_file(folder / "text_encoder" / "model.safetensors")
    start, head = flow_files.FLOW_TEXTS["sd3"]["text_encoder"], flow_files.PROJECTION
    texts = {start + key: x + 1 for key, x in own.items() if key != head}
    (tmp_path / "beside").mkdir()
    beside = placed(made, "sd3", tmp_path / "beside", {**file, **texts})
    found = open_model(str(beside)).components["text_encoder"].tensors
    assert all(np.array_equal(found.read(k), x + (k != head)) for k, x in own.items())
    (tmp_path / "alone").mkdir()
    alone = placed(made, "sd3", tmp_path / "alone", {**file, **texts}, drop=("text_encoder",))
    found = open_model(str(alone)).components["text_encoder"].tensors
    np.testing.assert_array_equal(found.read(head), np.eye(16))
    assert set(found.keys()) == own.keys()


def refused(spec):
    with pytest.raises(UserError) as caught:
        opened = open_model(str(spec))
        cfg = families.read_config(opened)
        for part in families.parts(opened, cfg):
            part.entries(families_leaves(cfg))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def families_leaves(cfg):
    return describe(jax.eval_shape(lambda: families.build(cfg, jax.random.key(0))))


def test_a_text_encoder_in_a_file_of_klein_is_refused(made, tmp_path):
    key = "text_encoders.qwen3_4b.transformer.model.norm.weight"
    spec = placed(made, "flux2", tmp_path, {**made["flux2"][1], key: np.zeros(2, np.float32)})
    assert "which is read from text_encoder/ of the folder for FLUX.2 klein" in refused(spec)


def test_other_files_and_other_folders_are_refused_in_one_line(made, tmp_path):
    _, file = made["flux"]
    lonely = tmp_path / "lonely.safetensors"
    save_file(file, lonely)
    assert "FLUX.1 has no tokenizers; put it into the model's diffusers folder" in refused(lonely)
    shutil.copytree(made["sd3"][0], tmp_path / "other")
    shutil.copy(lonely, tmp_path / "other")
    assert "holds FLUX.1, but" in refused(tmp_path / "other" / "lonely.safetensors")
    plain = {key: x for key, x in file.items() if "guidance_in" not in key}
    assert "guidance_embedder" in refused(placed(made, "flux", tmp_path, plain))
    shutil.rmtree(tmp_path / "model")
    text = refused(placed(made, "flux", tmp_path, file, drop=("text_encoder_2",)))
    assert "copy text_encoder_2/ of the original folder there" in text
    kinds = {
        "distilled_guidance_layer.norms.0.scale": "Chroma",
        "control_layers.0.attention.qkv.weight": "ControlNet of Z-Image",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": "a LoRA",
        "double_blocks.0.img_attn.qkv.weight_scale": "quantised weights",
    }
    for key, words in kinds.items():
        save_file({**file, key: np.zeros(2, np.float32)}, lonely)
        assert words in refused(lonely), key
