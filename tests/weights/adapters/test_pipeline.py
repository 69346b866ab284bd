"""LoRA files of pipelines both ways, with diffusers 0.42 + PEFT as the oracle of their strength."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from flax import nnx
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open

from jaxft.core.config import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import bind, describe
from jaxft.models.denoisers import unet
from jaxft.models.denoisers.unet import Added, UNet
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.pipelines import ldm
from jaxft.models.text_encoders import clip
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.nn import lora
from jaxft.weights.adapters import pipeline as pipeline_lora
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
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
        self.scale = lora.scale(cfg)
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
            out, "mine", self.parts, self.leaves, self.arrays, self.scale, spec
        )

    def read(self, file, layouts=None):
        return pipeline_lora.read(str(file), self.parts, self.leaves, self.scale, layouts)

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


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_we_write_we_read(models, family, kind, tmp_path):
    ours = models[family]
    arrays = ours.read(ours.write(kind, tmp_path))
    assert arrays.keys() == ours.arrays.keys()
    for path, array in ours.arrays.items():
        np.testing.assert_allclose(arrays[path], array, rtol=1e-6)


def test_another_alpha_continues_at_the_same_strength(models, tmp_path):
    ours = models["sd"]
    file = ours.write("kohya", tmp_path)
    double = pipeline_lora.read(str(file), ours.parts, ours.leaves, 2 * ours.scale)
    path = next(path for path in double if path.endswith("lora_b"))
    np.testing.assert_allclose(2 * double[path], ours.arrays[path], rtol=1e-6)
    np.testing.assert_array_equal(double[path[:-1] + "a"], ours.arrays[path[:-1] + "a"])


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


@pytest.mark.parametrize("stated", [True, False])
def test_we_read_what_diffusers_saves(models, tmp_path, stated):
    """With its alpha in the header (0.34+), or with none: then alpha is the rank."""
    ours = models["sd"]
    pipe = StableDiffusionPipeline.from_pretrained(ours.folder)
    torch.manual_seed(0)
    names = {"unet": ["to_q", "to_v", "conv1"], "text_encoder": ["q_proj", "fc1"]}
    layers, metadata = {}, {}
    for name, modules in names.items():
        config = LoraConfig(r=4, lora_alpha=2, target_modules=modules, init_lora_weights=False)
        model = getattr(pipe, name)
        # PEFT's own call: transformers' asks for a newer PEFT than there is (5.24: 0.22).
        inject_adapter_in_model(config, model)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
        if stated:
            metadata[f"{name}_lora_adapter_metadata"] = config.to_dict()
    pipe.save_lora_weights(tmp_path, **layers, **metadata)
    arrays = ours.read(tmp_path)
    path = "unet.mid_block.attentions.0.transformer_blocks.attn1.to_q"
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    a, b = block.lora_A["default"].weight, block.lora_B["default"].weight
    wanted = (0.5 if stated else 1.0) * (b @ a).detach().numpy()
    got = lora.delta(arrays[f"{path}.lora_a"][0], arrays[f"{path}.lora_b"][0], ours.scale)
    np.testing.assert_allclose(got.T, wanted, rtol=1e-5, atol=1e-6)
    assert not any("to_k" in path for path in arrays)
    assert any("conv1" in path for path in arrays) and any("fc1" in path for path in arrays)


def rewritten(file, out, change, metadata=None):
    """The same file with its {key: array} changed."""
    tensors = TensorFiles.open(file)
    arrays = change({key: tensors.read(key) for key in list(tensors.keys())})
    infos = {key: (array.shape, array.dtype) for key, array in arrays.items()}
    out.mkdir(exist_ok=True)
    write_sharded(out, arrays.items(), infos, stem="pytorch_lora_weights", metadata=metadata)
    return out


def test_kohyas_files_of_sdxl_have_ldms_block_names(models, tmp_path):
    ours = models["sdxl"]
    layout = ldm.layouts(ours.pipe)["unet"]
    renames = {
        "lora_unet_" + site.slot.module.replace(".", "_"): "lora_unet_"
        + pipeline_lora.renamed(site.slot.module, layout.names).replace(".", "_")
        for site in pipeline_lora.sites(ours.parts, ours.leaves)
        if site.component == "unet"
    }

    def change(arrays):
        return {
            ".".join([renames.get(k.split(".")[0], k.split(".")[0]), *k.split(".")[1:]]): array
            for k, array in arrays.items()
        }

    folder = rewritten(ours.write("kohya", tmp_path), tmp_path / "sgm", change)
    keys = list(TensorFiles.open(folder / "pytorch_lora_weights.safetensors").keys())
    assert any("lora_unet_input_blocks_3_1_transformer_blocks_0" in key for key in keys)
    arrays = ours.read(folder, {"unet": layout})
    assert arrays.keys() == ours.arrays.keys()
    with pytest.raises(UserError, match="no place for lora_unet_input_blocks"):
        ours.read(folder)


def test_unknown_tensors_and_other_ranks_are_refused(models, tmp_path):
    ours = models["sd"]
    file = ours.write("peft", tmp_path)
    more = {"unet.x.lora_A.weight": np.ones((4, 4), np.float32)}
    with pytest.raises(UserError, match=r"no place for unet\.x\.lora_A\.weight; widen lora"):
        ours.read(rewritten(file, tmp_path / "more", lambda arrays: {**arrays, **more}))
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    with pytest.raises(UserError, match=r"attn1\.to_q.* lacks its lora_a factor"):
        ours.read(
            rewritten(file, tmp_path / "less", lambda a: {k: v for k, v in a.items() if k != key})
        )
    with pytest.raises(
        UserError, match=r"to_q\.lora_A\.weight \(2, 16\) does not fit lora\.rank=4"
    ):
        ours.read(rewritten(file, tmp_path / "rank", lambda a: {**a, key: a[key][:2]}))
    with pytest.raises(UserError, match="no such file"):
        ours.read(tmp_path / "nothing")


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


def test_a_stack_has_to_be_whole(models, tmp_path):
    ours = models["sdxl"]
    one = "text_encoder.text_model.encoder.layers.1.mlp.fc1"

    def change(arrays):
        return {key: array for key, array in arrays.items() if not key.startswith(one)}

    with pytest.raises(UserError, match=r"1 of the 2 layers of text_encoder\.layers\.mlp\.fc1"):
        ours.read(rewritten(ours.write("peft", tmp_path), tmp_path / "cut", change))


def test_patterns_of_ranks_are_refused(models, tmp_path):
    ours = models["sd"]
    file = ours.write("peft", tmp_path)
    stated = {"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 2}}
    more = {"lora_adapter_metadata": json.dumps(stated)}
    folder = rewritten(file, tmp_path / "stated", lambda arrays: arrays, more)
    with pytest.raises(UserError, match="unet has ranks or alphas of several sizes"):
        ours.read(folder)
