"""Published Stable Diffusion folders with narrow widths: open, train, export, load in diffusers.

The JSON files are the published ones but for their widths, and the keys and file names are those
of the hub: fp16 variants alone, old names of the VAE's attention, position ids in text encoders.
"""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from jaxft import train
from jaxft.core.params import bind, describe
from jaxft.models.pipelines import stable_diffusion
from jaxft.models.pipelines.ldm import open_model
from jaxft.models.pipelines.stable_diffusion import (
    Conditions,
    PipelineConfig,
    StableDiffusion,
    Text,
)
from jaxft.weights.rules import to_jax
from tests.published_pipelines import PUBLISHED, RUN
from tests.test_others_files import respelled
from tests.tiny_pipelines import make_tokenizer, shaken

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.usefixtures("one_thread")]
CONFIG = str(PUBLISHED.parents[1] / "configs" / "diffusion.py")
SIDE = 64
FLAGS = {
    "data.train": "demo:emoji/valid",
    "data.eval": "",
    "resolution": SIDE,
    "batch_size": 2,
    "cache": "",
    "eval_generated": 0,
    "total": "2_steps",
    "sample.steps": 1,
    "trainable": r"unet\.(conv_out|up_blocks)\..*",
    "optim.lr": 1e-3,
    "optim.warmup": "0_steps",
    "optim.schedule": "constant",
    "compute_dtype": "float32",
    "remat": "none",
}
NARROW = {
    "sd1": {"unet": [16] * 4, "text_encoder": 24},  # widths that 8 heads and 12 heads divide
    "sd2": {"unet": [40] * 4, "text_encoder": 32},
    "sdxl": {"unet": [40] * 3, "text_encoder": 24, "text_encoder_2": 40},
}
PER_LEVEL = (
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "attention_head_dim",
    "transformer_layers_per_block",
)


def configs(name, vocab, whole):
    """The published config of each component, with narrow widths.

    Unless `whole`, the UNet has its first and last levels only, and each level one resnet.
    """
    widths, made = NARROW[RUN[name]], {}
    texts = [key for key in widths if key.startswith("text")]
    for key in ("unet", "vae", *texts):
        made[key] = json.loads((PUBLISHED / name / key / "config.json").read_text())
    for key in texts:
        sizes = {"hidden_size": widths[key], "intermediate_size": 48, "vocab_size": vocab}
        made[key] |= {**sizes, "projection_dim": widths[key]}
    made["vae"] |= {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 8}
    context = sum(widths[key] for key in texts)
    unet = {"block_out_channels": widths["unet"], "cross_attention_dim": context}
    made["unet"] |= {**unet, "norm_num_groups": 8}
    if len(texts) > 1:
        added = {"addition_time_embed_dim": 8, "transformer_layers_per_block": [1, 2, 2]}
        made["unet"] |= {**added, "projection_class_embeddings_input_dim": 40 + 6 * 8}
    if not whole:
        made["vae"]["layers_per_block"] = made["unet"]["layers_per_block"] = 1
        for key in PER_LEVEL:
            if isinstance(value := made["unet"].get(key), list):
                made["unet"][key] = [value[0], value[-1]]
    return made


def publish(name, folder, whole):
    """Write a folder as the hub has it, of random weights."""
    torch.manual_seed(0)
    vocab = make_tokenizer(folder.parent / "tokens")[1]
    made = configs(name, vocab, whole)
    for key, config in made.items():
        if key.startswith("text"):
            cls = CLIPTextModelWithProjection if key.endswith("2") else CLIPTextModel
            state = shaken(cls(CLIPTextConfig.from_dict(config))).state_dict()
            if not key.endswith("2"):  # transformers 5 saves that class without the prefix
                state = {f"text_model.{k}": tensor for k, tensor in state.items()}
            state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        else:
            cls = AutoencoderKL if key == "vae" else UNet2DConditionModel
            state = shaken(cls.from_config(config)).state_dict()
            state = respelled(state, "old", "matrices") if key == "vae" else state
        halves = {k: (v.half() if v.is_floating_point() else v) for k, v in state.items()}
        stem = "model" if key.startswith("text") else "diffusion_pytorch_model"
        (folder / key).mkdir(parents=True)
        save_file(halves, folder / key / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
        (folder / key / "config.json").write_text(json.dumps(config))
        if key.startswith("text"):
            place = folder / key.replace("text_encoder", "tokenizer")
            make_tokenizer(place)[0].save_pretrained(place)
    (folder / "scheduler").mkdir()
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        (folder / file).write_bytes((PUBLISHED / name / file).read_bytes())


def opened(folder):
    """The model that a folder holds, with parameters in fp32, and its configs."""
    pipe = open_model(str(folder))
    cfg = PipelineConfig.of(pipe)
    template = jax.eval_shape(lambda: StableDiffusion(cfg, key=jax.random.key(0)))
    leaves, params = describe(template), {}
    for part in stable_diffusion.parts(pipe, cfg):
        for entry in part.entries(leaves):
            layers = [
                to_jax(part.tensors.read(key), entry.layout, part.sizes) for key in entry.keys
            ]
            array = np.stack(layers) if entry.stacked else layers[0]
            params[entry.path] = array.astype(np.float32)
    return bind(template, params), cfg, params


SLOW = "stable-diffusion-v1-4"  # its configs are nearly those of 1.5
NARROWED = [
    pytest.param(name, False, marks=[pytest.mark.slow] if name == SLOW else []) for name in RUN
]
WHOLE = [pytest.param(name, True, marks=pytest.mark.slow) for name in RUN]


@pytest.mark.parametrize(("name", "whole"), [*NARROWED, *WHOLE])
def test_a_published_layout_opens_trains_exports_and_loads_in_diffusers(name, whole, tmp_path):
    folder, work = tmp_path / name, tmp_path / "run"
    publish(name, folder, whole)
    flags = [f"--config.{key}={value}" for key, value in {**FLAGS, "model": folder}.items()]
    assert train.main(["--config", CONFIG, "--workdir", str(work), *flags]) == 0
    model, cfg, params = opened(work / "export")
    before = opened(folder)[2]
    moved = {key for key in params if not np.array_equal(params[key], before[key])}
    assert moved and all(key.startswith("unet.") for key in moved)
    index = json.loads((PUBLISHED / name / "model_index.json").read_text())
    cls = getattr(diffusers, index["_class_name"])
    theirs = cls.from_pretrained(work / "export", torch_dtype=torch.float32)
    scheduler = json.loads((PUBLISHED / name / "scheduler/scheduler_config.json").read_text())
    assert theirs.scheduler.config.get("prediction_type") == scheduler.get(
        "prediction_type", "epsilon"
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 8, 8, cfg.unet.in_channels)).astype(np.float32)
    ids = np.array([[0, 5, 9, 7] + [1] * 73]) + 300
    text = text_of(theirs, ids)
    ours = model.encode_text(np.stack([ids] * len(cfg.texts), axis=1), dtype=np.float32)
    np.testing.assert_allclose(ours.context, text.context, atol=2e-4)
    times, sizes = np.array([500]), np.array([[64.0, 64, 0, 0, 64, 64]], np.float32)
    got = model.predict(x, times, Conditions(ours, sizes), dtype=np.float32)
    added = None
    if cfg.sdxl:
        np.testing.assert_allclose(ours.pooled, text.pooled, atol=2e-4)
        added = {"text_embeds": torch.tensor(text.pooled), "time_ids": torch.tensor(sizes)}
    with torch.no_grad():
        want = theirs.unet(
            torch.tensor(x).movedim(-1, 1),
            500,
            torch.tensor(text.context),
            added_cond_kwargs=added,
        ).sample.movedim(1, -1)
    scale = float(want.abs().max())
    np.testing.assert_allclose(got, want, atol=2e-4 * scale)


def text_of(pipe, ids):
    """What diffusers' pipelines give the UNet of token ids."""
    ids = torch.tensor(ids)
    with torch.no_grad():
        first = pipe.text_encoder(ids, output_hidden_states=True)
        if getattr(pipe, "text_encoder_2", None) is None:
            return Text(first.last_hidden_state.numpy(), None)
        second = pipe.text_encoder_2(ids, output_hidden_states=True)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return Text(context.numpy(), second.text_embeds.numpy())
