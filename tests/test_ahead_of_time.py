"""Steps compiled for an H200 and a TPU v5e without either: kernels, traffic, collectives, memory.

Bytes and structure of a compiled program are exact, so they are tests. `pytest -m "aot and not
slow"` is in the gate. It runs where `pip install '.[cuda-aot,tpu]'` brought the compilers.
"""

import json
import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "tests" / "published"
pytestmark = pytest.mark.aot
H200, V5E = "h200:1", "v5e:2x4"
ROW, HEADS = 1536, 8  # no other dim of the models below is 1536

# Not the environment of the tests, where products have another precision.
ALONE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "JAX_DEFAULT_MATMUL_PRECISION": "default",
    "TF_CPP_MIN_LOG_LEVEL": "1",
}

COMPILE = """
import json, sys
from jaxft.core import config as configs
from jaxft.runs.planning import estimate, hlo, topology
from jaxft.runs.opening import open_run
from jaxft.tasks import OPTIONS

name, file, *words = sys.argv[1:]
texts, costs = [], estimate.costs
estimate.costs = lambda text: texts.append(text) or costs(text)
config = configs.load_config(file, [word.split("=", 1) for word in words], OPTIONS)
run = open_run({**config, "init": "random"}, topology.open_topology(name))
with topology.traced_for(name):
    found = estimate.estimate(run)
print("FOUND", json.dumps({
    "kernels": found.kernels,
    "traffic": sum(found.traffic.values()),
    "attention": found.traffic.get("attention", 0),
    "collectives": found.collectives,
    "parameters": found.memory.parameters,
    "total": found.memory.total,
    "remat": found.remat,
    "shapes": sorted({(kind, dims) for kind, dims, _ in hlo.SHAPE.findall(texts[0])}),
}))
"""


@cache
def compiled(topology: str, config: str, words: tuple[str, ...]) -> dict:
    """Figures of the step of a config, compiled in another process."""
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE, topology, f"configs/{config}.py", *words],
        cwd=ROOT,
        env={**os.environ, **ALONE},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Involuntary full rematerialization" not in ran.stderr
    return json.loads(ran.stdout.rpartition("FOUND")[2])


def llm(tmp_path_factory, topology, **more):
    """A Llama 3.2 1B of two layers."""
    folder = tmp_path_factory.getbasetemp() / "llama"
    folder.mkdir(exist_ok=True)
    config = json.loads((PUBLISHED / "Llama-3.2-1B-Instruct" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    keys = {"model": folder, "data.train": "", "data.eval": "", "total": "10_steps"}
    keys |= {"seq_len": ROW, "batch_size": 8, "lora.rank": 0, "lora.targets": "", "trainable": ""}
    return compiled(topology, "llm", tuple(f"{k}={v}" for k, v in (keys | more).items()))


def square(found: dict, side: int, dtypes=("f32", "bf16")) -> list:
    """Arrays with the scores of all `side` keys for many queries: [.., side, side]."""
    sizes = [(kind, [int(n) for n in re.findall(r"\d+", dims)]) for kind, dims in found["shapes"]]
    return [(kind, dims) for kind, dims in sizes if kind in dtypes and dims.count(side) >= 2]


def test_packed_rows_of_a_language_model_meet_cudnn_on_an_h200(tmp_path_factory):
    plain, packed = (llm(tmp_path_factory, H200, pack=value) for value in (False, True))
    for found in (plain, packed):
        assert found["kernels"]["__cudnn$fmhaSoftmax"] == 2, "each layer once, not again backward"
        assert found["kernels"]["__cudnn$fmhaSoftmaxBackward"] == 2
        assert not square(found, ROW)
    print(f"traffic packed / unpacked {packed['traffic'] / plain['traffic']:.3f}")
    assert packed["traffic"] < 1.1 * plain["traffic"]


def test_packed_rows_of_a_language_model_meet_splash_on_a_v5e(tmp_path_factory):
    found = llm(tmp_path_factory, V5E, pack=True)
    assert found["kernels"]["tpu_custom_call"] >= 2 * 3, "forward, and two kernels backward"
    assert not square(found, ROW)


def test_collectives_of_fsdp_are_three_times_the_parameters(tmp_path_factory):
    """Two gathers of bf16 weights and one reduction of their gradients, and nothing more."""
    found = llm(tmp_path_factory, V5E, pack=True)
    bf16 = found["parameters"] * 8 / 2  # fp32 on one of eight devices
    moved = sum(size for _, size in found["collectives"].values())
    print({name: size / bf16 for name, (_, size) in found["collectives"].items()})
    assert moved < 1.1 * 3 * bf16


def test_a_lora_on_llama_8b_in_nf4_fits_into_12_gb():
    """A step decodes one layer at a time: no array of floats holds the weights of several."""
    keys = {"model": PUBLISHED / "Llama-3.1-8B-Instruct", "data.train": "", "data.eval": ""}
    keys |= {"base": "nf4", "param_dtype": "bfloat16", "lora.targets": "all-linear"}
    keys |= {"lora.rank": 16, "seq_len": 2048, "batch_size": 1, "remat": "full"}
    found = compiled(H200, "llm", tuple(f"{k}={v}" for k, v in keys.items()))
    print(f"parameters {found['parameters'] / 1e9:.2f} GB, in all {found['total'] / 1e9:.2f} GB")
    assert found["total"] < 12e9
    table = 128256 * 4096  # the embedding and the head, which stay in 16 bits
    sizes = [(x, math.prod(map(int, re.findall(r"\d+", dims)))) for x, dims in found["shapes"]]
    assert max(size for kind, size in sizes if kind in ("f32", "bf16")) <= table


def pipeline(tmp_path_factory) -> Path:
    """Stable Diffusion 1.5 with a UNet of two levels: its head dims, 40 and 80, at 512 pixels."""
    folder = tmp_path_factory.getbasetemp() / "pipeline"
    source = PUBLISHED / "stable-diffusion-v1-5"
    for file in source.rglob("*.json"):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = json.loads(file.read_text())
        if file.parent.name == "unet":
            content |= {
                "block_out_channels": [320, 640],
                "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
                "layers_per_block": 1,
            }
        target.write_text(json.dumps(content))
    return folder


def test_every_self_attention_of_a_unet_meets_cudnn_on_an_h200(tmp_path_factory):
    keys = {"model": pipeline(tmp_path_factory), "data.train": "", "data.eval": ""}
    keys |= {"resolution": 512, "batch_size": 4, "total": "10_steps"}
    found = compiled(H200, "diffusion", tuple(f"{k}={v}" for k, v in keys.items()))
    blocks = 1 + 1 + 1 + 2 + 2  # down, middle, up
    assert found["kernels"]["__cudnn$fmhaSoftmaxBackward"] == 2 * blocks, "self and cross"
    assert not square(found, 64 * 64)


def test_image_tokens_meet_cudnn_on_an_h200(tmp_path_factory):
    found = compiled(H200, "image_tokens", ())
    assert found["kernels"]["__cudnn$fmhaSoftmaxBackward"] > 0


# A TPU's compiler takes over ten minutes for these convolutions.
@pytest.mark.parametrize("topology", [H200, pytest.param(V5E, marks=pytest.mark.slow)])
def test_an_autoencoder_meets_no_scores_of_all_its_latents(tmp_path_factory, topology):
    """Two levels of the VAE of Stable Diffusion: its one attention is that of the middle."""
    folder = tmp_path_factory.getbasetemp() / "vae"
    folder.mkdir(exist_ok=True)
    config = json.loads((PUBLISHED / "sd-vae-ft-mse" / "config.json").read_text())
    config |= {"block_out_channels": [128, 256], "layers_per_block": 1}
    config |= {"down_block_types": config["down_block_types"][:2]}
    config |= {"up_block_types": config["up_block_types"][:2]}
    (folder / "config.json").write_text(json.dumps(config))
    keys = {"model": folder, "data.train": "", "data.eval": "", "loss.perceptual": 0.0}
    keys |= {"resolution": 96, "total": "10_steps"}
    found = compiled(topology, "autoencoder", tuple(f"{k}={v}" for k, v in keys.items()))
    assert found["total"] > found["parameters"] > 0
    assert not square(found, 48 * 48)
