"""LDM's layouts, with diffusers' own reader of single files as the oracle."""

import re

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.models.autoencoders import vae
from jaxft.models.autoencoders.vae import VAE
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.denoisers import unet
from jaxft.models.denoisers.unet import UNet
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.pipelines import ldm
from jaxft.models.text_encoders import clip
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.weights import transfer
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders import diffusers as pipelines
from jaxft.weights.folders import single_file
from jaxft.weights.folders.diffusers import open_pipeline
from jaxft.weights.folders.known_configs import KNOWN_COMPONENTS
from jaxft.weights.transfer import Export
from tests.tiny_pipelines import make_pipeline

OPEN_CLIP = {"hidden_act": "gelu"}
FAMILIES = {
    "sd1": ("sd", {}),
    "sd2": ("sd", {"text": OPEN_CLIP, "use_linear_projection": True, "layers_per_block": 2}),
    "sdxl": ("sdxl", {}),
}
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def untrained(pipe):
    """{component: (Export, Layout)} with every tensor as it is."""
    made = {}
    for name, layout in ldm.layouts(pipe).items():
        tensors = pipelines.legacy_part(pipelines.part(pipe, name, ((), {}))).tensors
        made[name] = whole(tensors), layout
    return made


def whole(tensors):
    names = list(tensors.keys())
    arrays = ((key, tensors.read(key)) for key in names)
    return Export({key: tensors.info(key) for key in names}, arrays)


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory):
    """(family, the folder, a single file in it)."""
    family, changes = FAMILIES[request.param]
    work = tmp_path_factory.mktemp(request.param)
    make_pipeline(work, family, **changes).save_pretrained(work / "pipe")
    pipe = open_pipeline(str(work / "pipe"))
    assert ldm.kind(pipe) == request.param
    file = single_file.write(work / "pipe" / "whole.safetensors", untrained(pipe))
    return request.param, work / "pipe", file


def test_diffusers_reads_what_we_write(written):
    kind, folder, file = written
    cls = PIPELINES[FAMILIES[kind][0]]
    whole = cls.from_pretrained(folder)
    read = cls.from_single_file(str(file), config=str(folder), local_files_only=True)
    for name in ("unet", "vae", *(x for x in whole.components if x.startswith("text"))):
        states = [getattr(one, name).state_dict() for one in (whole, read)]
        assert states[0].keys() == states[1].keys(), name
        for key, tensor in states[0].items():
            assert torch.equal(tensor, states[1][key]), f"{name} {key}"


def test_the_keys_are_ldms(written):
    kind, _, file = written
    tensors = TensorFiles.open(file)
    unet, vae = "model.diffusion_model.", "first_stage_model."
    wanted = [
        f"{unet}input_blocks.0.0.weight",
        f"{unet}middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        f"{unet}out.2.bias",
        f"{vae}decoder.up.1.block.0.norm1.weight",
        f"{vae}encoder.mid.attn_1.q.weight",
        {
            "sd1": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
            "sd2": "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
            "sdxl": "conditioner.embedders.1.model.text_projection",
        }[kind],
    ]
    assert set(wanted) <= set(tensors.keys())
    assert tensors.info(f"{vae}encoder.mid.attn_1.q.weight")[0] == (16, 16, 1, 1)
    if kind == "sdxl":
        assert f"{unet}label_emb.0.2.weight" in tensors.keys()  # noqa: SIM118


def test_a_single_file_reads_as_its_folder_bit_for_bit(written):
    kind, folder, file = written
    pipe, single = open_pipeline(str(folder)), ldm.open_model(str(file))
    assert single.layout == kind and single.components.keys() == pipe.components.keys()
    for name, source in pipe.components.items():
        theirs = pipelines.legacy_part(pipelines.part(pipe, name, ((), {}))).tensors
        ours = single.components[name].tensors
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for key in list(ours.keys()):
            assert ours.info(key) == theirs.info(key)
            array = ours.read(key)
            assert array.tobytes() == theirs.read(key).tobytes() and array.flags.c_contiguous
        assert single.components[name].config == source.config


def test_a_round_trip_writes_the_same_file(written, tmp_path):
    file = written[2]
    again = single_file.write(tmp_path / "a.safetensors", untrained(ldm.open_model(str(file))))
    assert again.read_bytes() == file.read_bytes()


def test_folders_open_through_the_same_door(written):
    folder = written[1]
    assert ldm.open_model(str(folder)).layout == "diffusers"
    bare = ldm.open_model(str(written[2]), weights=False)
    assert all(source.tensors is None for source in bare.components.values())


def test_an_export_to_a_folder_brings_configs_and_tokenizers(written):
    """Every component of a single file is rewritten; configs and tokenizers come along."""
    pipe = ldm.open_model(str(written[2]))
    assert pipelines.must_rewrite(pipe) == pipe.components.keys()
    files = pipelines.pipeline_files(pipe)
    assert "unet/config.json" in files and "tokenizer/vocab.json" in files
    assert not any(name.endswith(".safetensors") for name in files)


@pytest.mark.parametrize("kind", KNOWN_COMPONENTS)
def test_the_published_sizes_round_trip_and_fill_the_models(kind):
    """Names alone, at full size: every parameter has its LDM tensor, and none is left over."""
    configs = KNOWN_COMPONENTS[kind]
    models = {
        "unet": (UNet, UNetConfig.from_hf(configs["unet"]), unet.rules, lambda _: {}),
        "vae": (VAE, VAEConfig.from_hf(configs["vae"]), lambda _: vae.RULES, vae.sizes),
    }
    for name in single_file.TEXT_PREFIXES[kind]:
        cfg = CLIPTextConfig.from_hf(configs[name])
        models[name] = (CLIPText, cfg, lambda _: clip.RULES, clip.sizes)
    pipe = pipelines.Pipeline(
        "x", {}, {n: single_file.Source("x", c, None, {}) for n, c in configs.items()}, {}, {}, None
    )
    assert ldm.kind(pipe) == kind
    for name, layout in ldm.layouts(pipe).items():
        model, cfg, rules, sizes = models[name]
        leaves = describe(jax.eval_shape(lambda m=model, c=cfg: m(c, key=jax.random.key(0))))
        part = transfer.Part("", name, None, rules(cfg), sizes(cfg))
        infos = transfer.export(part, leaves, {}, {}, None).infos
        file = Shapes(single_file.to_ldm(Export(infos, iter(())), layout).infos)
        if kind == "sd1" and name == "unet":
            assert len(file.infos) == 686
            assert file.infos["model.diffusion_model.output_blocks.5.2.conv.weight"]
        back = single_file.as_diffusers(file, layout)
        assert {key: back.info(key) for key in back.keys()} == infos  # noqa: SIM118
        part._replace(tensors=back).entries(leaves)


class Shapes:
    """Tensors without data."""

    def __init__(self, infos):
        self.infos = infos

    def keys(self):
        return list(self.infos)

    def info(self, key):
        return self.infos[key]


def test_sd2_files_hold_a_layer_and_a_projection_that_nothing_reads():
    prefix = single_file.TEXT_PREFIXES["sd2"]["text_encoder"]
    cfg = CLIPTextConfig.from_hf(KNOWN_COMPONENTS["sd2"]["text_encoder"], False)
    keys = ["ln_final.bias", "logit_scale", "text_projection", "attn_mask"]
    keys += [f"transformer.resblocks.{i}.attn.in_proj_bias" for i in (22, 23)]
    file = Shapes({prefix + key: ((3,), np.dtype(np.float32)) for key in keys})
    assert single_file.as_diffusers(file, ldm.clip_layout(cfg, prefix)).keys() == [
        "text_model.final_layer_norm.bias",
        *(f"text_model.encoder.layers.22.self_attn.{x}_proj.bias" for x in "qkv"),
    ]


def test_old_attention_names_become_the_same_tensors():
    cfg = VAEConfig.from_hf(KNOWN_COMPONENTS["sd1"]["vae"])
    layout, attn = ldm.vae_layout(cfg), "encoder.mid_block.attentions.0."
    info = ((512, 512), np.dtype(np.float32))
    for names in (("query", "proj_attn"), ("to_q", "to_out.0")):
        export = Export({f"{attn}{name}.weight": info for name in names}, iter(()))
        assert single_file.to_ldm(export, layout).infos == {
            f"first_stage_model.encoder.mid.attn_1.{name}.weight": ((512, 512, 1, 1), info[1])
            for name in ("q", "proj_out")
        }


def test_pickles_and_absent_files_are_refused(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match=re.escape("model.ckpt: pickle")):
        ldm.open_model(str(file))
    with pytest.raises(UserError, match="no such file"):
        ldm.open_model(str(tmp_path / "no.safetensors"))
