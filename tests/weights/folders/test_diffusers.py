"""diffusers folders both ways: opening, refusing, and what an export writes beside the weights."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.numpy import save_file
from transformers import CLIPTextModel

from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.models.text_encoders import clip
from jaxft.weights import transfer
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.folders import diffusers as pipelines
from jaxft.weights.folders.diffusers import UNCHANGED, Changes, open_component, open_pipeline
from tests.tiny_pipelines import make_pipeline

PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{family: folder}, as diffusers and transformers 5 save them."""
    folders = {}
    for family in PIPELINES:
        work = tmp_path_factory.mktemp(family)
        make_pipeline(work, family).save_pretrained(work / "pipe")
        folders[family] = work / "pipe"
    return folders


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved["sd"], tmp_path / "pipe")


def write(files, out):
    for name, content in files.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)


def exported(pipe, out, changes=UNCHANGED):
    """The folder that an export without training writes."""
    write(pipelines.pipeline_files(pipe, changes), out)
    for name in pipelines.must_rewrite(pipe) | changes.rewritten:
        part = pipelines.legacy_part(pipelines.part(pipe, name, ((), {})))
        tensors = part.tensors
        infos = {key: tensors.info(key) for key in list(tensors.keys())}
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        write_sharded(out / name, ((k, tensors.read(k)) for k in infos), infos, stem=stem)
    return out


@pytest.mark.parametrize("family", PIPELINES)
def test_a_folder_opens_whole(saved, family):
    pipe = open_pipeline(str(saved[family]))
    names = {"unet", "vae", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert set(pipe.components) == names and pipe.family == family
    assert pipe.scheduler["beta_schedule"] == "scaled_linear"
    assert pipe.components["unet"].config["block_out_channels"] == [8, 16]
    assert pipe.components["vae"].tensors.info("quant_conv.weight")[0] == (8, 8, 1, 1)
    assert pipe.tokenizer_dir().name == "tokenizer"
    assert pipe.projects("text_encoder") is False
    if family == "sdxl":
        assert pipe.projects("text_encoder_2") is True and pipe.tokenizer_dir("tokenizer_2")
    assert not any(name.split("/")[0] in names for name in pipe.files)


def test_configs_alone_need_no_weights(folder):
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    pipe = open_pipeline(str(folder), weights=False)
    assert all(source.tensors is None for source in pipe.components.values())
    assert set(pipe.components["vae"].side_files) == {"config.json"}


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("model_index.json", r"model_index\.json: missing"),
        ("unet/config.json", r"unet/config\.json: missing"),
        ("vae", r"vae/config\.json: missing"),
        ("tokenizer", "tokenizer: missing, but model_index.json names it"),
        ("scheduler", r"scheduler/scheduler_config\.json: missing|scheduler: missing"),
        ("vae/diffusion_pytorch_model.safetensors", r"vae: found no model\.safetensors or diff"),
    ],
)
def test_what_is_missing_is_named(folder, gone, named):
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=named):
        open_pipeline(str(folder))


def test_other_pipelines_are_refused_by_name(folder):
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "Flux"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"this is Flux \(FluxPipeline with a Flux\)"):
        open_pipeline(str(folder))
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found a list"):
        open_pipeline(str(folder))


def test_a_pickle_tells_how_to_convert_it(folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin: pickle"):
        open_pipeline(str(folder))


def test_variants_are_taken_where_they_are_alone(folder, tmp_path):
    plain = folder / "unet/diffusion_pytorch_model.safetensors"
    half = plain.with_name("diffusion_pytorch_model.fp16.safetensors")
    tensors = TensorFiles.open(plain)
    infos = {k: (tensors.info(k)[0], np.dtype(np.float16)) for k in list(tensors.keys())}
    arrays = ((k, tensors.read(k).astype(np.float16)) for k in infos)
    write_sharded(folder / "unet", arrays, infos, stem="diffusion_pytorch_model.fp16")

    def dtype():
        source = open_component(str(folder), "unet")
        return source.tensors.info("conv_in.weight")[1], source.side_files

    assert dtype()[0] == np.float32
    plain.unlink()
    found, files = dtype()
    assert found == np.float16 and files["diffusion_pytorch_model.safetensors"] == half


def test_a_sharded_variant_is_copied_under_plain_names(folder, tmp_path):
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / "vae", max_shard_size="20KB", variant="fp16")
    source = open_component(str(folder), "vae")
    assert len(source.side_files) > 3
    write(source.side_files, tmp_path / "copy")
    copy = TensorFiles.open(tmp_path / "copy")  # which compares the index with the shards
    state = vae.state_dict()
    assert set(copy.keys()) == set(state)
    np.testing.assert_array_equal(copy.read("quant_conv.weight"), state["quant_conv.weight"])
    AutoencoderKL.from_pretrained(tmp_path / "copy")


def test_a_plain_sharded_component_opens_and_its_gaps_are_named(folder):
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    vae.save_pretrained(folder / "vae", max_shard_size="20KB")
    source = open_component(str(folder), "vae")
    assert set(source.tensors.keys()) == set(vae.state_dict())
    next((folder / "vae").glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match="missing shards diffusion_pytorch_model-00002-of"):
        open_component(str(folder), "vae")


def test_a_component_opens_alone_or_inside_its_pipeline(folder):
    inside, alone = open_component(str(folder), "vae"), open_component(str(folder / "vae"), "vae")
    assert inside.config == alone.config and inside.folder == alone.folder
    assert alone.config["_class_name"] == "AutoencoderKL"


@pytest.mark.parametrize("family", PIPELINES)
def test_an_untrained_export_loads_with_every_tensor_equal(saved, family, tmp_path):
    pipe = open_pipeline(str(saved[family]))
    out = exported(pipe, tmp_path / "out")
    first, second = (PIPELINES[family].from_pretrained(x) for x in (saved[family], out))
    for name in pipe.components:
        state, again = (getattr(one, name).state_dict() for one in (first, second))
        assert state.keys() == again.keys()
        assert all(torch.equal(state[key], again[key]) for key in state)
    ids = [p.tokenizer("a red cat", padding="max_length").input_ids for p in (first, second)]
    assert ids[0] == ids[1] and second.tokenizer.model_max_length == 77
    assert first.scheduler.config == second.scheduler.config


def test_untouched_files_are_copied_byte_for_byte(saved, tmp_path):
    pipe = open_pipeline(str(saved["sd"]))
    out = exported(pipe, tmp_path / "out")
    assert pipelines.must_rewrite(pipe) == {"text_encoder"}  # transformers 5 wrote it
    for path in saved["sd"].rglob("*"):
        if path.is_file() and path.parent.name != "text_encoder":
            assert (out / path.relative_to(saved["sd"])).read_bytes() == path.read_bytes()


def test_text_encoders_get_the_keys_that_transformers_4_reads(saved, tmp_path):
    pipe = open_pipeline(str(saved["sdxl"]))
    out = exported(pipe, tmp_path / "out", Changes(rewritten=frozenset({"text_encoder_2"})))
    for name in ("text_encoder", "text_encoder_2"):
        keys = set(TensorFiles.open(out / name).keys())
        keys.discard("text_projection.weight")
        assert keys and all(key.startswith("text_model.") for key in keys)
    again = open_pipeline(str(out))
    assert pipelines.must_rewrite(again) == frozenset()
    assert exported(again, tmp_path / "twice") and all(
        (tmp_path / "twice" / path.relative_to(out)).read_bytes() == path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    )


def test_both_spellings_of_text_keys_make_the_same_plan(saved):
    pipe = open_pipeline(str(saved["sd"]))
    cfg = clip.CLIPTextConfig.from_hf(pipe.components["text_encoder"].config, False)
    part = pipelines.part(pipe, "text_encoder", (clip.RULES, clip.sizes(cfg)))
    template = jax.eval_shape(lambda: clip.CLIPText(cfg, key=jax.random.key(0)))
    leaves = {f"text_encoder.{k}": v for k, v in describe(template).items()}
    made = transfer.export(pipelines.legacy_part(part), leaves, {}, {}, None)
    state = CLIPTextModel.from_pretrained(saved["sd"] / "text_encoder").state_dict()
    for key, tensor in made.tensors:
        np.testing.assert_array_equal(tensor, state[key.removeprefix("text_model.")])
    paths = [[e.path for e in p.entries(leaves)] for p in (part, pipelines.legacy_part(part))]
    assert paths[0] == paths[1]


def test_vocab_and_merges_come_out_of_tokenizer_json(folder, tmp_path):
    whole = folder / "tokenizer/tokenizer.json"
    content = json.loads(whole.read_text())
    content["model"]["merges"] = [["a", "b</w>"], "c d</w>"]
    whole.write_text(json.dumps(content))
    (folder / "tokenizer/tokenizer_config.json").unlink()
    out = exported(open_pipeline(str(folder)), tmp_path / "out") / "tokenizer"
    assert (out / "merges.txt").read_text() == "#version: 0.2\na b</w>\nc d</w>\n"
    assert json.loads((out / "vocab.json").read_text()) == content["model"]["vocab"]
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 77


def test_an_absent_safety_checker_is_null_in_the_index(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    made = json.loads(pipelines.pipeline_files(open_pipeline(str(folder)))["model_index.json"])
    assert made["safety_checker"] == [None, None] and not made["requires_safety_checker"]
    (folder / "safety_checker").mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (folder / "safety_checker" / name).write_text("{}")
    files = pipelines.pipeline_files(open_pipeline(str(folder)))
    assert files["model_index.json"] == folder / "model_index.json"
    assert {k for k in files if k.startswith("safety")} == {
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
    }


def test_only_what_training_changed_is_edited(folder):
    pipe = open_pipeline(str(folder))
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    changes = Changes(scheduler=zero, configs={"unet": {"in_channels": 9}}, files={"x/y": b"z"})
    files = pipelines.pipeline_files(pipe, changes)
    made = json.loads(files["scheduler/scheduler_config.json"])
    assert made == {**pipe.scheduler, **zero}
    assert json.loads(files["unet/config.json"])["in_channels"] == 9
    assert isinstance(files["vae/config.json"], Path) and files["x/y"] == b"z"
    same = pipelines.pipeline_files(pipe, Changes(scheduler={"prediction_type": "epsilon"}))
    assert isinstance(same["scheduler/scheduler_config.json"], Path)


def test_the_card_of_the_base_is_among_the_files(folder):
    assert "README.md" not in pipelines.pipeline_files(open_pipeline(str(folder)))
    (folder / "README.md").write_text("mine")
    files = pipelines.pipeline_files(open_pipeline(str(folder)))
    assert files["README.md"] == folder / "README.md"


def test_weights_without_the_pt_mark_are_rewritten(folder):
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = TensorFiles.open(file)
    save_file({key: tensors.read(key) for key in list(tensors.keys())}, file)
    assert pipelines.must_rewrite(open_pipeline(str(folder))) == {"text_encoder", "vae"}
