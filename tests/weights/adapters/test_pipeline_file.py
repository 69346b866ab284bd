"""LoRA files of pipelines, read: ours, those of diffusers 0.42 with PEFT, and kohya's."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.models.pipelines import ldm
from jaxft.nn import lora
from jaxft.weights.adapters import pipeline as pipeline_lora
from jaxft.weights.adapters import ranks
from jaxft.weights.adapters.pipeline_file import load, open_lora
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.folders.single_file import renamed
from tests.tiny_pipelines import make_pipeline
from tests.weights.adapters.test_pipeline import CFG, FORMATS, PIPELINES, Adapted


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: (a pipeline with adapters, the leaves of one with adapters everywhere)}."""
    made = {}
    for family in PIPELINES:
        work = tmp_path_factory.mktemp(family)
        make_pipeline(work, family).save_pretrained(work / "pipe")
        everywhere = Adapted(work / "pipe", Lora(rank=1, targets=".*"))
        made[family] = Adapted(work / "pipe"), everywhere.leaves
    return made


def opened(model, file, layouts=None):
    ours, everywhere = model
    return open_lora(str(file), ours.parts, everywhere, layouts or {})


def deltas(model, found):
    """{path: what a file adds to the kernel of a projection, layer by layer}."""
    ours, _ = model
    leaves = Adapted(ours.folder, found.lora).leaves
    arrays, scale = load(found, leaves), ranks.scale(found.lora)
    return {
        path: _delta(arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"], scale, leaf.stacked)
        for path, leaf in ((path, leaves[f"{path}.lora_a"]) for path in lora.adapted(leaves))
    }


def _delta(a, b, scale, stacked):
    pairs = zip(a, b, strict=True) if stacked else [(a, b)]
    return np.stack([lora.delta(*pair, scale) for pair in pairs])


def wanted(ours):
    arrays = ours.arrays
    return {
        path: _delta(
            *(arrays[f"{path}.lora_{x}"] for x in "ab"),
            ours.scale,
            ours.leaves[f"{path}.lora_a"].stacked,
        )
        for path in lora.adapted(ours.leaves)
    }


def rewritten(file, out, change, metadata=None):
    """The same file with its {key: array} changed."""
    tensors = TensorFiles.open(file)
    arrays = change({key: tensors.read(key) for key in list(tensors.keys())})
    infos = {key: (array.shape, array.dtype) for key, array in arrays.items()}
    out.mkdir(exist_ok=True)
    write_sharded(out, arrays.items(), infos, stem="pytorch_lora_weights", metadata=metadata)
    return out


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_we_write_we_read(models, family, kind, tmp_path):
    """Rank, alpha and targets are the file's; diffusers' states no alpha, so B has the scale."""
    ours, _ = models[family]
    found = opened(models[family], ours.write(kind, tmp_path))
    assert found.lora.rank == 4 and found.lora.alpha == {"kohya": 6.0, "peft": 4.0}[kind]
    got, want = deltas(models[family], found), wanted(ours)
    assert got.keys() == want.keys()
    for path, delta in want.items():
        np.testing.assert_allclose(got[path], delta, rtol=1e-5, atol=1e-6)
    if kind == "kohya":
        leaves = Adapted(ours.folder, found.lora).leaves
        for path, array in load(found, leaves).items():
            np.testing.assert_array_equal(array, ours.arrays[path])


@pytest.mark.parametrize("stated", [True, False])
def test_we_read_what_diffusers_saves(models, tmp_path, stated):
    """With its alpha in the header (0.34+), or with none: then alpha is the rank."""
    ours, _ = models["sd"]
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
    found = opened(models["sd"], tmp_path)
    assert (found.lora.rank, found.lora.alpha) == (4, 2.0 if stated else 4.0)
    got = deltas(models["sd"], found)
    path = "unet.mid_block.attentions.0.transformer_blocks.attn1.to_q"
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    a, b = block.lora_A["default"].weight, block.lora_B["default"].weight
    want = (0.5 if stated else 1.0) * (b @ a).detach().numpy()
    np.testing.assert_allclose(got[path][0].T, want, rtol=1e-5, atol=1e-6)
    assert not any("to_k" in path for path in got)
    assert any("conv1" in path for path in got) and any("fc1" in path for path in got)


def test_kohyas_files_of_sdxl_have_ldms_block_names(models, tmp_path):
    ours, _ = models["sdxl"]
    layout = ldm.layouts(ours.pipe)["unet"]
    renames = {
        "lora_unet_" + site.slot.module.replace(".", "_"): "lora_unet_"
        + renamed(site.slot.module, layout.names).replace(".", "_")
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
    got = deltas(models["sdxl"], opened(models["sdxl"], folder, {"unet": layout}))
    assert got.keys() == wanted(ours).keys()
    with pytest.raises(UserError, match="no place for lora_unet_input_blocks"):
        opened(models["sdxl"], folder)


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_tensors_that_do_not_fit_are_refused(models, tmp_path):
    ours, _ = models["sd"]
    file = ours.write("peft", tmp_path)
    key, other = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"

    def fails(words, change):
        with pytest.raises(UserError, match=words) as caught:
            opened(models["sd"], rewritten(file, tmp_path / "changed", change))
        assert str(tmp_path / "changed") in str(caught.value) and "\n" not in str(caught.value)

    more = {f"unet.{x}.lora_A.weight": np.ones((4, 4), np.float32) for x in "xy"}
    words = (
        r"no place for unet\.x\.lora_A\.weight and 1 more in this model; give the model .*model="
    )
    fails(words, lambda a: a | more)
    fails(r"attn1\.to_q lacks its lora_a", lambda a: {k: v for k, v in a.items() if k != key})
    fails(r"factors of .*attn1\.to_q have ranks 2 and 4", lambda a: {**a, key: a[key][:2]})
    words = r"to_q\.lora_A\.weight \[4, 15\] does not fit unet\..*, which takes \[rank, 16\]; give"
    fails(words, lambda a: {**a, key: a[key][:, :15]})
    words = r"to_q\.lora_B\.weight \[15, 4\] does not fit unet\..*, which takes \[16, rank\]"
    fails(words, lambda a: {**a, other: a[other][:15]})
    fails("holds no tensors", lambda a: {})
    with pytest.raises(UserError, match=r"lora\.from='.*nothing': no such file"):
        opened(models["sd"], tmp_path / "nothing")


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.diff_b", "full differences"),
        (f"{Q}.lora_B.bias", "biases"),
    ],
)
def test_other_methods_are_refused_by_name(models, tmp_path, key, method):
    file = models["sd"][0].write("peft", tmp_path)
    folder = rewritten(file, tmp_path / "other", lambda a: {**a, key: np.ones(4, np.float32)})
    with pytest.raises(UserError, match=rf"safetensors: {key} is of .*{method}.*; merge"):
        opened(models["sd"], folder)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_file_of_another_model_does_not_fit(models, tmp_path, kind):
    """Names that both have are found first, and tell by their sizes which model it is."""
    ours, _ = models["sdxl"]
    file = ours.write(kind, tmp_path)
    with pytest.raises(
        UserError, match=r"\[4, 16\] does not fit unet\..*proj_in .*\[rank, 16, 1, 1\].*model="
    ):
        opened(models["sd"], file)


def test_ranks_and_alphas_of_several_sizes_keep_their_strength(models, tmp_path):
    """kohya's networks with conv_dim: each module's alpha / rank goes into its B."""
    ours, _ = models["sd"]
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"

    def change(arrays):
        down, up = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
        less = {down: arrays[down][:3], up: arrays[up][:, :3]}
        return {**arrays, **less, f"{stem}.alpha": np.array(9.0, np.float32)}

    folder = rewritten(ours.write("kohya", tmp_path), tmp_path / "mixed", change)
    found = opened(models["sd"], folder)
    assert (found.lora.rank, found.lora.alpha) == (4, 6.0)
    got, want = deltas(models["sd"], found), wanted(ours)
    path = "unet.mid_block.attentions.0.transformer_blocks.attn1.to_q"
    a, b = (ours.arrays[f"{path}.lora_{x}"][0] for x in "ab")
    want[path] = np.stack([lora.delta(a[:, :3], b[:3], 9.0 / 3)])
    for path, delta in want.items():
        np.testing.assert_allclose(got[path], delta, rtol=1e-5, atol=1e-6)


def test_a_missing_layer_of_a_stack_stays_without(models, tmp_path):
    """It is zeros, and the next export leaves it out again."""
    ours, _ = models["sdxl"]
    one = "text_encoder.text_model.encoder.layers.1.mlp.fc1"

    def change(arrays):
        return {key: array for key, array in arrays.items() if not key.startswith(one)}

    folder = rewritten(ours.write("peft", tmp_path), tmp_path / "cut", change)
    found = opened(models["sdxl"], folder)
    got = deltas(models["sdxl"], found)["text_encoder.layers.mlp.fc1"]
    assert got[0].any() and not got[1].any()
    leaves = Adapted(ours.folder, found.lora).leaves
    arrays, scale = load(found, leaves), ranks.scale(found.lora)
    again = pipeline_lora.write_peft(tmp_path, ours.parts, leaves, arrays, scale)
    assert set(TensorFiles.open(again).keys()) == set(
        TensorFiles.open(folder / "pytorch_lora_weights.safetensors").keys()
    )


def test_patterns_of_ranks_are_refused(models, tmp_path):
    ours, _ = models["sd"]
    file = ours.write("peft", tmp_path)
    stated = {"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 2}}
    more = {"lora_adapter_metadata": json.dumps(stated)}
    folder = rewritten(file, tmp_path / "stated", lambda arrays: arrays, more)
    with pytest.raises(UserError, match="unet has ranks or alphas of several sizes"):
        opened(models["sd"], folder)


def test_an_alpha_of_zero_is_refused(models, tmp_path):
    file = models["sd"][0].write("kohya", tmp_path)
    off = np.array(0.0, np.float32)
    folder = rewritten(
        file, tmp_path / "off", lambda a: {k: off if "alpha" in k else v for k, v in a.items()}
    )
    with pytest.raises(UserError, match=r"alpha of .* is 0"):
        opened(models["sd"], folder)


def test_the_runs_own_settings_may_not_contradict_the_files(models, tmp_path):
    ours, _ = models["sd"]
    found = opened(models["sd"], ours.write("kohya", tmp_path))
    paths = [*lora.adapted(models["sd"][1]), "vae.encoder.conv_in"]
    asked = Lora(alpha=0.0, dropout=0.1, from_="file")
    made = lora.continued(asked, found.lora, paths)
    assert made == replace(found.lora, dropout=0.1, from_="file")
    same = replace(asked, rank=4, alpha=6.0, targets=CFG.targets)
    assert lora.continued(same, found.lora, paths) == made
    for change, words in (
        ({"rank": 8}, r"lora\.rank=8, but file has rank 4"),
        ({"alpha": 4.0}, r"lora\.alpha=4\.0, but file has alpha 6"),
        ({"rslora": True}, r"lora\.rslora=True, but file has rslora 0"),
        ({"targets": ".*to_q"}, r"lora\.targets='\.\*to_q', but file adapts .*; leave it out"),
        ({"targets": ".*"}, r"lora\.targets='\.\*', but file does not adapt "),
    ):
        with pytest.raises(UserError, match=words):
            lora.continued(replace(asked, **change), found.lora, paths)
