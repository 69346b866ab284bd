"""Stable Diffusion folders and files as other tools save them, against the plain folder.

Each test changes how the same weights are stored, and asks that jaxft reads the same parameters.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.models.pipelines import stable_diffusion
from jaxft.models.pipelines.ldm import open_model
from jaxft.models.pipelines.stable_diffusion import PipelineConfig, StableDiffusion
from jaxft.weights.folders import single_file
from jaxft.weights.folders.diffusers import must_rewrite, open_component
from jaxft.weights.rules import to_jax
from tests.models.pipelines.test_ldm import untrained
from tests.tiny_pipelines import make_pipeline
from tests.weights.folders.test_diffusers import exported

PT = {"format": "pt"}
STEM = "diffusion_pytorch_model"


def params(model):
    """Every parameter as jaxft reads it, fp32."""
    pipe = open_model(str(model))
    cfg = PipelineConfig.of(pipe)
    leaves = describe(jax.eval_shape(lambda: StableDiffusion(cfg, key=jax.random.key(0))))
    return {
        entry.path: np.stack(
            [to_jax(part.tensors.read(key), entry.layout, part.sizes) for key in entry.keys]
        ).astype(np.float32)
        for part in stable_diffusion.parts(pipe, cfg)
        for entry in part.entries(leaves)
    }


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(got[path], array, err_msg=path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    work = tmp_path_factory.mktemp("sd")
    make_pipeline(work).save_pretrained(work / "pipe")
    return work / "pipe"


@pytest.fixture(scope="module")
def wanted(saved):
    return params(saved)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipe")


def rewrite(file, change):
    """Replace a file's tensors by what `change` makes of them."""
    save_file(change(load_file(file)), file, metadata=PT)


# ---- text encoders ----------------------------------------------------------------------------

MORE = {
    "text_projection.weight": torch.eye(16),
    "logit_scale": torch.ones(()),
    "text_model.embeddings.position_ids": torch.arange(77)[None],
    "text_model.encoder.layers.2.mlp.fc1.bias": torch.ones(32),  # beyond num_hidden_layers
    "text_model.encoder.layers.12.mlp.fc1.bias": torch.ones(32),
    "vision_model.post_layernorm.weight": torch.ones(8),
    "visual_projection.weight": torch.ones(8, 8),
}


def test_case_img_08_tensors_that_transformers_does_not_read_from_a_text_encoder(
    folder, wanted, tmp_path
):
    file = folder / "text_encoder/model.safetensors"
    rewrite(file, lambda old: {**old, **MORE})
    CLIPTextModel.from_pretrained(folder / "text_encoder")
    assert_same(params(folder), wanted)
    made = exported(open_model(str(folder)), tmp_path / "out")
    held = load_file(made / "text_encoder/model.safetensors")
    assert all(torch.equal(held[key], tensor) for key, tensor in MORE.items())
    assert_same(params(made), wanted)


def test_a_tensor_that_no_class_has_is_still_refused(folder):
    rewrite(folder / "text_encoder/model.safetensors", lambda old: {**old, "x": torch.ones(1)})
    with pytest.raises(UserError, match="unexpected tensor x"):
        params(folder)


def test_case_img_08_a_whole_clip_model_serves_as_the_text_encoder(folder, wanted, tmp_path):
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 8}
    config = CLIPConfig(
        text_config=text.config.to_dict(),
        vision_config={**vision, "num_attention_heads": 2, "patch_size": 8},
        projection_dim=16,
    )
    whole = CLIPModel(config)
    theirs = {f"text_model.{key}": tensor for key, tensor in text.state_dict().items()}
    missing = whole.load_state_dict(theirs, strict=False)
    assert not missing.unexpected_keys
    shutil.rmtree(folder / "text_encoder")
    whole.save_pretrained(folder / "text_encoder")
    CLIPTextModel.from_pretrained(folder / "text_encoder")
    assert_same(params(folder), wanted)


# ---- VAEs -------------------------------------------------------------------------------------

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
DIMS = {"matrices": (), "conv2d": (1, 1), "conv1d": (1,)}


def respelled(old, names, dims):
    """A VAE's tensors with attention under the names and dims of another version."""
    made = {}
    for key, tensor in old.items():
        found = next((new for new in OLD if f"attentions.0.{new}." in key), None)
        if found and key.endswith("weight"):
            tensor = tensor.reshape(*tensor.shape, *DIMS[dims])
        if found and names == "old":
            key = key.replace(found, OLD[found])
        made[key] = tensor.contiguous()
    return made


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("names", ["old", "new"])
def test_attention_of_a_vae_in_every_spelling(folder, wanted, names, dims, tmp_path):
    rewrite(folder / f"vae/{STEM}.safetensors", lambda old: respelled(old, names, dims))
    assert_same(params(folder), wanted)
    pipe = open_model(str(folder))
    assert ("vae" in must_rewrite(pipe)) == (dims != "matrices")  # which diffusers cannot read
    made = exported(pipe, tmp_path / "out")
    assert_same(params(made), wanted)
    theirs = AutoencoderKL.from_pretrained(made / "vae").state_dict()
    kernel = wanted["vae.decoder.mid_block.attentions.0.to_q.kernel"][0]
    np.testing.assert_array_equal(theirs["decoder.mid_block.attentions.0.to_q.weight"], kernel.T)


@pytest.mark.parametrize("name", ["AsymmetricAutoencoderKL", "AutoencoderTiny"])
def test_a_vae_of_another_kind_is_one_line(folder, name):
    file = folder / "vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": name}))
    with pytest.raises(UserError, match=rf"vae/config\.json: _class_name='{name}'.*AutoencoderKL"):
        PipelineConfig.of(open_model(str(folder)))


# ---- shards and variants ----------------------------------------------------------------------


@pytest.fixture
def sharded(folder):
    """The folder with a UNet of several shards."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / f"unet/{STEM}.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="40KB")
    return folder


def edit_index(folder, change):
    index = folder / f"unet/{STEM}.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(change(content)))


def swapped(content):
    """An index that names the wrong shard of each tensor, and one tensor that is nowhere."""
    places = content["weight_map"]
    names = list(places.values())
    moved = dict(zip(places, [*names[1:], names[0]], strict=True))
    return {"metadata": {"total_size": 1}, "weight_map": {**moved, "gone.weight": names[0]}}


@pytest.mark.parametrize("change", [swapped, lambda content: {**content, "metadata": None}])
def test_an_odd_index_names_shards_and_no_more(sharded, wanted, change, tmp_path):
    edit_index(sharded, change)
    save_file({"x": torch.ones(1)}, sharded / f"unet/{STEM}-00009-of-00009.safetensors")
    assert_same(params(sharded), wanted)
    made = exported(open_model(str(sharded)), tmp_path / "out")
    theirs = UNet2DConditionModel.from_pretrained(made / "unet").state_dict()
    np.testing.assert_array_equal(theirs["conv_in.bias"], wanted["unet.conv_in.bias"][0])


@pytest.mark.parametrize("places", [None, [], {}, {"x": None}, {"x": "../y.safetensors"}])
def test_an_index_without_shards_is_named(sharded, places):
    edit_index(sharded, lambda content: {"weight_map": places})
    with pytest.raises(UserError, match=r"index\.json: expected an object 'weight_map'"):
        params(sharded)


def test_of_shards_and_a_single_file_the_shards_count_as_in_diffusers(sharded, wanted):
    stale = load_file(next(sharded.glob("unet/*-00001-of-*")))
    save_file({key: 0 * one for key, one in stale.items()}, sharded / f"unet/{STEM}.safetensors")
    theirs = UNet2DConditionModel.from_pretrained(sharded / "unet").state_dict()
    assert_same(params(sharded), wanted)
    bias = wanted["unet.conv_in.bias"][0]
    np.testing.assert_array_equal(theirs["conv_in.bias"], bias)
    next(sharded.glob("unet/*-00002-of-*")).unlink()
    with pytest.raises(UserError, match=rf"missing shards .*delete the index if {STEM}\.saf"):
        params(sharded)


def test_a_stray_file_of_the_other_library_is_not_read(folder, wanted):
    save_file({"x": torch.ones(1)}, folder / "unet/model.safetensors", metadata=PT)
    save_file({"x": torch.ones(1)}, folder / f"text_encoder/{STEM}.safetensors", metadata=PT)
    assert_same(params(folder), wanted)


def test_components_may_come_in_different_variants(folder, wanted):
    unet, text = folder / f"unet/{STEM}.safetensors", folder / "text_encoder/model.safetensors"
    half = {key: tensor.half() for key, tensor in load_file(unet).items()}
    save_file(half, unet.with_name(f"{STEM}.fp16.safetensors"), metadata=PT)
    unet.unlink()
    text.rename(text.with_name("model.fp16.safetensors"))
    got = params(folder)
    for path, array in wanted.items():
        narrow = array.astype(np.float16) if path.startswith("unet.") else array
        np.testing.assert_array_equal(got[path], narrow.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_exactly_and_kept_where_untouched(folder, wanted, dtype, tmp_path):
    file = folder / f"unet/{STEM}.safetensors"
    rewrite(file, lambda old: {key: tensor.to(dtype) for key, tensor in old.items()})
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet").float().state_dict()
    source = open_component(str(folder), "unet")
    assert source.tensors.info("conv_in.bias")[1] == np.float16  # which a trained weight fits in
    np.testing.assert_array_equal(source.tensors.read("conv_in.bias"), theirs["conv_in.bias"])
    made = exported(open_model(str(folder)), tmp_path / "out")
    assert (made / f"unet/{STEM}.safetensors").read_bytes() == file.read_bytes()


def test_a_quantised_component_is_named(folder):
    file = folder / "unet/config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **quantised}))
    with pytest.raises(
        UserError, match=r"unet/config\.json: the weights are quantised .*'bitsandbytes'"
    ):
        open_model(str(folder))


def test_a_component_alone_is_no_pipeline(folder):
    with pytest.raises(UserError, match=r"unet: no model_index\.json, .* UNet2DConditionModel"):
        open_model(str(folder / "unet"))


# ---- single files -----------------------------------------------------------------------------

EXTRA = {
    "model_ema.decay": torch.ones(()),
    "model_ema.diffusion_modelinput_blocks00weight": torch.ones(4),
    "first_stage_model.loss.logvar": torch.ones(()),
    "first_stage_model.loss.perceptual_loss.net.slice1.0.weight": torch.ones(4),
    "first_stage_model.model_ema.decay": torch.ones(()),
    "cond_stage_model.logit_scale": torch.ones(()),
    "cond_stage_model.transformer.text_projection.weight": torch.eye(16),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "alphas_cumprod": torch.ones(1000),
    "denoiser.sigmas": torch.ones(1000),
}


@pytest.fixture
def single(folder):
    return single_file.write(folder / "whole.safetensors", untrained(open_model(str(folder))))


def test_keys_of_training_and_of_other_tools_in_a_single_file(single, wanted):
    rewrite(single, lambda old: {**old, **EXTRA})
    config = {"config": str(single.parent), "local_files_only": True}
    StableDiffusionPipeline.from_single_file(str(single), **config)
    assert_same(params(single), wanted)


def test_attention_of_a_single_file_stored_as_matrices(single, wanted):
    def squeezed(old):
        attn = ".mid.attn_1."
        return {k: (t[:, :, 0, 0] if attn in k and t.ndim == 4 else t) for k, t in old.items()}

    rewrite(single, lambda old: {k: t.contiguous() for k, t in squeezed(old).items()})
    assert_same(params(single), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_narrow_single_files(single, wanted, dtype):
    rewrite(
        single, lambda old: {k: (t if k.endswith("_ids") else t.to(dtype)) for k, t in old.items()}
    )
    got = params(single)
    for path, array in wanted.items():
        narrow = torch.tensor(array).to(dtype).float().numpy()
        np.testing.assert_array_equal(got[path], narrow, err_msg=path)
