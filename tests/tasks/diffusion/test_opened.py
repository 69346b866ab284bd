"""Runs that go on from a LoRA: of jaxft, of diffusers and of kohya, and what is refused."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxft import train
from jaxft.core.params import bind
from jaxft.nn import lora
from jaxft.runs.opening import load_params, open_run
from tests.tiny_diffusion import flags_of, make_config, make_pictures
from tests.tiny_pipelines import make_pipeline

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
KEYS = {"batch_size": 4, "compute_dtype": "float32", "every.log": "1_steps"}
LORA = {
    "lora.rank": 4,
    "lora.alpha": 6.0,
    "lora.targets": r"(unet|text_encoder)\..*(to_q|to_v|conv1|q_proj|fc1)",
    "trainable": "",
    "optim.lr": 0.05,
    "total": "3_steps",
    "export.kind": "lora",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline, pictures, and a finished LoRA run in `first`."""
    work = tmp_path_factory.mktemp("from")
    make_pipeline(work).save_pretrained(work / "pipe")
    pictures = make_pictures(work / "pictures", 8)
    flags = flags_of(work / "pipe", pictures, {**KEYS, **LORA})
    assert train.main([*flags, "--workdir", str(work / "first")]) == 0
    return work


def records(work):
    lines = (work / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def evaluations(work):
    return [one["eval_loss"] for one in records(work) if "eval_loss" in one]


def go_on(place, work, file, changes=None):
    """The command of a run that says no more than where it starts."""
    keys = {**KEYS, "total": "1_steps", "lora.from": file, **(changes or {})}
    flags = flags_of(place / "pipe", f"folder:{place / 'pictures'}", keys)
    return [*flags, "--workdir", str(work)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("first.kohya.safetensors", marks=pytest.mark.slow),
        "pytorch_lora_weights.safetensors",
    ],
)
def test_a_run_goes_on_where_the_run_of_its_file_ended(place, tmp_path, name):
    """Its first evaluation equals the last one there, and the adapters alone train."""
    before, after = evaluations(place / "first")
    assert abs(before - after) > 1e-3 * after
    changes = {"export.kind": "lora"}
    assert (
        train.main(go_on(place, tmp_path / "run", place / "first" / "export" / name, changes)) == 0
    )
    start, end = evaluations(tmp_path / "run")
    assert abs(start - after) <= 1e-6 * after and end != start
    old = load_file(place / "first" / "export" / name)
    new = load_file(tmp_path / "run" / "export" / name.replace("first.", "run."))
    assert old.keys() == new.keys()
    assert all(old[key] == new[key] for key in old if key.endswith("alpha"))


def diffusers_file(place, out):
    """A LoRA as save_lora_weights writes it, with its alpha in the header, and its pipeline."""
    pipe = StableDiffusionPipeline.from_pretrained(place / "pipe")
    torch.manual_seed(0)
    layers, metadata = {}, {}
    for name, modules in {"unet": ["to_q", "to_v", "conv1"], "text_encoder": ["fc1"]}.items():
        config = LoraConfig(r=4, lora_alpha=7, target_modules=modules, init_lora_weights=False)
        # PEFT's own call: transformers' asks for a newer PEFT than there is (5.24: 0.22).
        inject_adapter_in_model(config, getattr(pipe, name))
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(getattr(pipe, name))
        metadata[f"{name}_lora_adapter_metadata"] = config.to_dict()
    pipe.save_lora_weights(out, **layers, **metadata)
    return out / "pytorch_lora_weights.safetensors", pipe


def kohya_file(out):
    """A file of sd-scripts: UNet and text encoder, two alphas, two ranks.

    diffusers 0.42 applies another alpha to a convolution, but not to an attention's projection.
    """
    rng, tensors = np.random.default_rng(0), {}
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    shapes = {
        f"{block}_attn1_to_q": (4, 3.0, (16,), (16,)),
        f"{block}_attn2_to_k": (4, 3.0, (16,), (16,)),
        f"{block}_attn2_to_out_0": (4, 3.0, (16,), (16,)),
        "lora_unet_mid_block_resnets_0_conv1": (2, 1.0, (16, 3, 3), (16, 1, 1)),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (4, 3.0, (16,), (32,)),
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj": (4, 3.0, (16,), (16,)),
        "lora_te_text_model_encoder_layers_1_self_attn_out_proj": (4, 3.0, (16,), (16,)),
    }
    for stem, (rank, alpha, inputs, (width, *ones)) in shapes.items():
        down, up = rng.normal(0, 0.5, (rank, *inputs)), rng.normal(0, 0.5, (width, rank, *ones))
        tensors[f"{stem}.lora_down.weight"] = down.astype(np.float32)
        tensors[f"{stem}.lora_up.weight"] = up.astype(np.float32)
        tensors[f"{stem}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, out / "kohya.safetensors")
    return out / "kohya.safetensors"


IDS = np.arange(77, dtype=np.int32)[None] % 50


def ours(place, keys):
    """(run, the text encoder's states and the UNet's output as the run starts)."""
    pictures = f"folder:{place / 'pictures'}"
    config = make_config(place / "pipe", pictures, {**KEYS, "export.kind": "folder", **keys})
    run = open_run(config)
    with jax.set_mesh(run.mesh):
        params = load_params(run)
    x, context, times = drawn()

    def call(params):
        model = bind(run.opened.template, params)
        text = model.encode_text(IDS[:, None], dtype=np.float32).context
        return text, model.unet(x.transpose(0, 2, 3, 1), times.astype(np.float32), context, None)

    text, out = jax.jit(call)(params)
    return run, np.asarray(text), np.asarray(out).transpose(0, 3, 1, 2)


def theirs(place, file=None):
    """The same, of diffusers with a LoRA that it loads."""
    pipe = StableDiffusionPipeline.from_pretrained(place / "pipe")
    if file:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return outputs(pipe)


def outputs(pipe):
    x, context, times = map(torch.tensor, drawn())
    with torch.no_grad():
        text = pipe.text_encoder(torch.tensor(IDS).long()).last_hidden_state.numpy()
        return text, pipe.unet(x, times, context).sample.numpy()


def drawn():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)
    return x, rng.normal(size=(2, 5, 16)).astype(np.float32), np.array([3, 900], np.int32)


@pytest.mark.parametrize("writer", ["diffusers", "diffusers, UNet alone", "kohya"])
def test_the_files_of_others_have_the_strength_that_diffusers_gives_them(place, tmp_path, writer):
    """diffusers 0.42 writes a text encoder's LoRA under keys that it cannot load on transformers 5.

    The pipeline that wrote the file is the reference there.
    """
    if writer == "kohya":
        file, alpha = kohya_file(tmp_path), 3.0
        wanted = theirs(place, file)
    else:
        (file, pipe), alpha = diffusers_file(place, tmp_path), 7.0
        wanted = outputs(pipe)
    if writer == "diffusers, UNet alone":
        with safe_open(file, "np") as opened:
            about = opened.metadata()
        tensors = {k: x for k, x in load_file(file).items() if k.startswith("unet.")}
        save_file(tensors, file, about)
        wanted = theirs(place, file)
    run, *got = ours(place, {"lora.from": file})
    assert (run.cfg.lora.rank, run.cfg.lora.alpha) == (4, alpha)
    assert run.chosen == {path for path in run.leaves if ".lora_" in path}
    whole = writer != "diffusers, UNet alone"
    assert any(path.startswith("text_encoder.") for path in run.chosen) == whole
    for mine, want, plain in zip(got, wanted, theirs(place), strict=True):
        size, moved = np.abs(want).max(), np.abs(want - plain).max()
        assert moved > 0.05 * size or not (whole or moved), "the LoRA does nothing"
        assert np.abs(mine - want).max() < 2e-5 * size


def test_a_step_on_the_file_of_others_moves_its_adapters_and_is_exported(place, tmp_path):
    """Ranks and alphas of several sizes too: diffusers gives the export the run's own output."""
    file = kohya_file(tmp_path)
    changes = {"export.kind": "all", "optim.lr": 0.01, "total": "2_steps"}
    assert train.main(go_on(place, tmp_path / "run", file, changes)) == 0
    folder = tmp_path / "run" / "export"
    whole = StableDiffusionPipeline.from_pretrained(folder)
    x, context, times = map(torch.tensor, drawn())
    with torch.no_grad():
        merged = whole.unet(x, times, context).sample.numpy()
    again = theirs(place, folder / "lora" / "pytorch_lora_weights.safetensors")[1]
    assert np.abs(merged - again).max() < 2e-5 * np.abs(merged).max()
    assert np.abs(merged - theirs(place, file)[1]).max() > 1e-3 * np.abs(merged).max()
    old, new = load_file(file), load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert len(new) == 2 * len([key for key in old if key.endswith("alpha")])


def test_a_run_with_dropout_and_its_file_resumes_and_is_opened_again(place, tmp_path):
    """The run folder's own config opens it again, with the settings that its command gave."""
    file = place / "first" / "export" / "first.kohya.safetensors"
    flags = go_on(place, tmp_path / "run", file, {"lora.dropout": 0.1, "lora.rank": 4})
    assert train.main(flags) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["trainable"] == "" and config["lora"]["from"] == str(file)
    assert open_run(config).cfg.lora.dropout == 0.1
    assert train.main(flags) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.rank": 8}, ["lora.rank=8", "first.kohya.safetensors has rank 4"]),
        ({"lora.alpha": 8.0}, ["lora.alpha=8.0", "has alpha 6"]),
        ({"lora.targets": r"unet\..*to_q"}, ["lora.targets", "adapts", "leave it out"]),
        ({"lora.from": "nothing.safetensors"}, ["lora.from='nothing.safetensors'", "no such file"]),
        ({"lora.base": "x"}, ["lora.base is gone", "model=MODEL", "lora.from"]),
    ],
)
def test_what_contradicts_the_file_is_refused_by_name(place, tmp_path, capsys, changes, words):
    file = place / "first" / "export" / "first.kohya.safetensors"
    assert train.main(go_on(place, tmp_path / "run", file, changes)) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("\n") == 1


def test_the_file_of_an_sdxl_is_refused_by_its_shapes(place, tmp_path, capsys):
    down = np.ones((4, 2048), np.float32)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    far = stem.replace("blocks_0_attn2", "blocks_9_attn2")
    tensors = {f"{one}.lora_down.weight": down for one in (stem, far)}
    tensors |= {f"{one}.lora_up.weight": np.ones((1280, 4), np.float32) for one in (stem, far)}
    save_file(tensors, tmp_path / "sdxl.safetensors")
    assert train.main(go_on(place, tmp_path / "run", tmp_path / "sdxl.safetensors")) == 2
    said = capsys.readouterr().err
    assert "sdxl.safetensors: " in said and "[4, 2048] does not fit" in said
    assert "[rank, 16]" in said and "model=MODEL" in said


def test_without_a_key_nothing_is_read(place):
    """`lora.from` empty is a new LoRA as ever: B is zero."""
    pictures = f"folder:{place / 'pictures'}"
    run = open_run(make_config(place / "pipe", pictures, {**KEYS, **LORA, "lora.from": ""}))
    assert run.opened.adapter is None and run.opened.initial(run.chosen) == {}
    assert lora.adapted(run.leaves)
