"""LoRA files of pipelines, written, with diffusers 0.42 + PEFT as the oracle of their strength."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from flax import nnx
from safetensors import safe_open

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import bind, describe
from jaxft.models.denoisers import unet
from jaxft.models.denoisers.unet import Added, UNet
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.text_encoders import clip
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.nn import lora
from jaxft.weights.adapters import pipeline as pipeline_lora
from jaxft.weights.adapters import ranks
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders import diffusers as pipelines
from jaxft.weights.folders.diffusers import open_pipeline
from jaxft.weights.rules import to_jax, to_torch
from tests.tiny_pipelines import make_pipeline

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
# Everything that readers of LoRA files find again, 3x3 and 1x1 convolutions too.
TARGETS = r"unet\.(?!add_embedding).*|text_encoder(_2)?\.layers\..*"
CFG = Lora(rank=4, alpha=6.0, targets=TARGETS)
FORMATS = ("peft", "kohya")


class Everything(nnx.Module):
    """A pipeline's trained components, without its VAE."""

    def __init__(self, cfgs, key):
        self.unet = UNet(cfgs["unet"], key=key)
        self.text_encoder = CLIPText(cfgs["text_encoder"], key=key)
        second = cfgs.get("text_encoder_2")
        self.text_encoder_2 = nnx.data(CLIPText(second, key=key) if second else None)


class Adapted:
    """A saved pipeline as jaxft sees it, with random adapters (B not zero)."""

    def __init__(self, folder, cfg=CFG):
        self.folder, self.cfg = folder, cfg
        self.pipe = open_pipeline(str(folder))
        configs = {name: source.config for name, source in self.pipe.components.items()}
        cfgs = {"unet": UNetConfig.from_hf(configs["unet"])}
        tables = {"unet": (unet.rules(cfgs["unet"]), {})}
        for name in pipelines.TEXT_ENCODERS:
            if name in configs:
                cfgs[name] = CLIPTextConfig.from_hf(configs[name], self.pipe.projects(name))
                tables[name] = (clip.RULES, clip.sizes(cfgs[name]))
        self.parts = [pipelines.part(self.pipe, *one) for one in tables.items()]

        def build():
            model = Everything(cfgs, jax.random.key(0))
            lora.add(model, cfg, jax.random.key(1))
            return model

        self.template = jax.eval_shape(build)
        self.leaves = describe(self.template)
        self.scale = ranks.scale(cfg)
        rng = np.random.default_rng(0)
        self.arrays = {
            path: rng.normal(0, 0.3, leaf.shape).astype(np.float32)
            for path, leaf in self.leaves.items()
            if ".lora_" in path
        }

    def write(self, kind, out):
        if kind == "peft":
            pipeline_lora.write_peft(out, self.parts, self.leaves, self.arrays, self.scale)
            return out / "pytorch_lora_weights.safetensors"
        spec = pipeline_lora.metadata("sd1", "mine", str(self.folder), 4, 6.0)
        return pipeline_lora.write_kohya(
            out, "mine", self.parts, self.leaves, self.arrays, self.scale, spec, {}
        )

    def updates(self):
        """{(component, torch key): what the adapter adds to it}."""
        made = {}
        for part in map(pipelines.legacy_part, self.parts):
            for entry in part.entries(self.leaves):
                stem = entry.path.removesuffix(".kernel")
                if f"{stem}.lora_a" not in self.leaves:
                    continue
                a, b = (self.arrays[f"{stem}.lora_{x}"] for x in "ab")
                for i, key in enumerate(entry.keys):
                    one = (a[i], b[i]) if entry.stacked else (a, b)
                    delta = lora.delta(*one, self.scale)
                    made[part.folder, key] = to_torch(delta, entry.layout, part.sizes)
        return made

    def params(self):
        params = dict(self.arrays)
        for part in self.parts:
            for entry in part.entries(self.leaves):
                read = [part.tensors.read(key) for key in entry.keys]
                made = [to_jax(tensor, entry.layout, part.sizes) for tensor in read]
                params[entry.path] = np.stack(made) if entry.stacked else made[0]
        return params


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for family in PIPELINES:
        work = tmp_path_factory.mktemp(family)
        make_pipeline(work, family).save_pretrained(work / "pipe")
        made[family] = Adapted(work / "pipe")
    return made


def text_of(pipe, name):
    """A component's tensors with the keys of transformers 4."""
    state = getattr(pipe, name).state_dict()
    plain = name.startswith("text") and not any(key.startswith("text_model.") for key in state)
    return {("text_model." if plain else "") + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("kind", FORMATS)
def test_diffusers_reads_ours_at_equal_strength_tensor_by_tensor(models, family, kind, tmp_path):
    """Fused, each weight moves by what our merge adds; the others do not move."""
    ours = models[family]
    before, after = (PIPELINES[family].from_pretrained(ours.folder) for _ in range(2))
    file = ours.write(kind, tmp_path)
    after.load_lora_weights(str(tmp_path), weight_name=file.name)
    after.fuse_lora()
    after.unload_lora_weights()
    updates = ours.updates()
    assert len(updates) > 30 and {a.ndim for a in updates.values()} == {2, 4}
    for name in (part.folder for part in ours.parts):
        old, new = text_of(before, name), text_of(after, name)
        assert old.keys() == new.keys()
        for key, tensor in old.items():
            moved = (new[key] - tensor).numpy()
            wanted = updates.pop((name, key), np.zeros_like(moved))
            assert np.abs(moved - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 1), key
    assert not updates


@pytest.mark.parametrize("family", PIPELINES)
def test_outputs_equal_those_of_diffusers(models, family, tmp_path):
    ours, rng = models[family], np.random.default_rng(1)
    ours.write("kohya", tmp_path)
    pipe = PIPELINES[family].from_pretrained(ours.folder)
    x = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)
    width = pipe.unet.config.cross_attention_dim
    context = rng.normal(size=(2, 5, width)).astype(np.float32)
    added, theirs = None, {}
    if family == "sdxl":
        added = Added(rng.normal(size=(2, 20)).astype(np.float32), np.ones((2, 6), np.float32))
        theirs = {"text_embeds": torch.tensor(added[0]), "time_ids": torch.tensor(added[1])}

    def call():
        args = (torch.tensor(x), torch.tensor([3, 900]), torch.tensor(context))
        with torch.no_grad():
            return pipe.unet(*args, added_cond_kwargs=theirs).sample.permute(0, 2, 3, 1).numpy()

    base = call()
    pipe.load_lora_weights(str(tmp_path), weight_name="mine.kohya.safetensors")
    wanted = call()

    def run(params):
        model = bind(ours.template, params).unet
        return model(x.transpose(0, 2, 3, 1), jnp.array([3.0, 900.0]), context, added)

    got = np.asarray(jax.jit(run, compiler_options=QUICK)(ours.params()))
    assert np.abs(wanted - base).max() > 0.1 * np.abs(wanted).max()
    assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_keys_and_metadata_of_both_formats(models, tmp_path):
    kohya = models["sdxl"].write("kohya", tmp_path)
    keys = set(TensorFiles.open(kohya).keys())
    attn = "lora_unet_mid_block_attentions_0_transformer_blocks_1_attn1_to_out_0"
    assert f"{attn}.lora_down.weight" in keys and f"{attn}.alpha" in keys
    text = "text_model_encoder_layers_1_mlp_fc1.lora_up.weight"
    assert {f"lora_te1_{text}", f"lora_te2_{text}"} <= keys
    assert any(
        k.startswith("lora_te_")
        for k in list(TensorFiles.open(models["sd"].write("kohya", tmp_path / "..")).keys())
    )
    with safe_open(kohya, "np") as file:
        stated = file.metadata()
        assert file.get_tensor(f"{attn}.alpha") == 6.0
    assert stated["ss_network_dim"] == "4" and stated["ss_network_alpha"] == "6.0"
    assert stated["ss_base_model_version"] == "sd_v1" and stated["format"] == "pt"
    peft = TensorFiles.open(models["sd"].write("peft", tmp_path))
    assert peft.info("text_encoder.text_model.encoder.layers.0.mlp.fc2.lora_A.weight")[0] == (4, 32)
    assert peft.info("unet.down_blocks.0.attentions.0.proj_in.lora_B.weight")[0] == (8, 4, 1, 1)
    assert peft.info("unet.up_blocks.0.resnets.0.conv1.lora_A.weight")[0][2:] == (3, 3)


def test_projections_that_no_reader_finds_are_refused_before_training(models):
    ours = models["sdxl"]
    wide = Adapted(ours.folder, Lora(4, 6.0, ".*"))
    wanted = r"text_encoder_2\.text_projection, unet\.add_embedding\.linear_1, .*linear_2"
    with pytest.raises(UserError, match=wanted):
        pipeline_lora.check(wide.parts, wide.leaves)
    without = {path: leaf for path, leaf in ours.leaves.items() if ".lora_" not in path}
    with pytest.raises(UserError, match=r"lora.* needs lora\.rank > 0"):
        pipeline_lora.check(ours.parts, without)
    pipeline_lora.check(ours.parts, ours.leaves)
