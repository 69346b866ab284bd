"""The plan of a run: figures of its compiled step, without data, weights or the devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxft import plan
from jaxft.core import runtime
from jaxft.core.errors import UserError
from jaxft.core.runtime import Chip
from jaxft.runs import opening
from jaxft.runs.planning import estimate
from jaxft.runs.planning.estimate import DeviceMemory, Estimate, bound, counted, work_kind
from jaxft.runs.planning.hlo import Cost, Op

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PUBLISHED = ROOT / "tests" / "published"
SMOLLM2_PROJECTIONS = (576 * 576,) * 2 + (192 * 576,) * 2 + (1536 * 576,) * 3  # q, o, k, v, MLP
CHIP = Chip(flops=100e12, bandwidth=1e12, memory=2**30, link=1e11)


def planned(tmp_path, config, *words, topology="cpu:8"):
    file = tmp_path / "plan.json"
    arguments = ["--config", str(CONFIGS / f"{config}.py"), "--topology", topology]
    assert plan.main([*arguments, "--json", str(file), *words]) == 0
    return json.loads(file.read_text())


def test_a_config_json_is_enough_for_a_language_model(tmp_path, capsys):
    """SmolLM2's published config.json alone: no weights, no tokenizer, no data."""
    words = {"model": PUBLISHED / "SmolLM2-135M", "data.train": "jsonl:absent", "data.eval": ""}
    words |= {"seq_len": 64, "batch_size": 8, "lora.rank": 0, "trainable": "", "lora.targets": ""}
    found = planned(tmp_path, "llm", *(f"--config.{k}={v}" for k, v in words.items()))
    parameters = 134_515_008  # tied
    assert found["memory"]["parameters"] == pytest.approx(4 * parameters / 8, rel=0.01)
    assert found["memory"]["optimizer"] == pytest.approx(8 * parameters / 8, rel=0.01)
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    gathered = found["collectives"]["all-gather"][1]
    assert gathered >= 2 * 4 * parameters * 0.9, "each layer is gathered forward and backward"
    said = capsys.readouterr().out
    assert "134.5 M parameters, 134.5 M train" in said and "memory of a device" in said


def test_a_quantised_base_counts_its_bits(tmp_path, capsys):
    words = {"model": PUBLISHED / "SmolLM2-135M", "data.train": "jsonl:absent", "data.eval": ""}
    words |= {"seq_len": 64, "base": "nf4", "mesh.data": 8, "lora.targets": r".*q_proj"}
    found = planned(tmp_path, "llm", *(f"--config.{k}={v}" for k, v in words.items()))
    table, norms, packed, lora = 49152 * 576, 61 * 576, 30 * 3538944, 30 * 8 * 2 * 576
    nested = 30 * 4 * sum(-(-size // 64 // 256) + 1 for size in SMOLLM2_PROJECTIONS)
    size = 4 * (table + norms + lora) + packed // 2 + packed // 64 + nested
    assert found["memory"]["parameters"] == size
    assert "134.8 M parameters" in capsys.readouterr().out


def test_a_pipelines_configs_are_enough_for_diffusion(tmp_path):
    words = {"model": PUBLISHED / "stable-diffusion-v1-5", "data.train": "folder:absent"}
    words |= {"data.eval": "", "resolution": 64, "batch_size": 8, "trainable": r"unet\.mid.*"}
    found = planned(tmp_path, "diffusion", *(f"--config.{k}={v}" for k, v in words.items()))
    # Without text encoders and VAE, which no step reads.
    assert found["memory"]["parameters"] > 4 * found["memory"]["optimizer"], "few train"


@pytest.mark.parametrize("config", ["image_tokens", "autoencoder"])
def test_shipped_configs_are_planned_as_they_are(config, tmp_path):
    found = planned(tmp_path, config)
    assert found["memory"]["total"] > found["memory"]["parameters"] > 0


STEP = """
import re, sys
import jax
from jaxft.core import config as configs
from jaxft.runs import opening, state
from jaxft.runs.planning import estimate
from jaxft.runs.compiling import Compiled, make_steps
from jaxft.tasks import OPTIONS

def field(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

words = [word.split("=", 1) for word in sys.argv[1:]]
config = configs.load_config("configs/llm.py", words, OPTIONS) | {"init": "random"}
run = opening.open_run(config, jax.devices())
rows = run.task.plan(run.opened)
plan = state.make_plan(run, len(rows))
estimated = estimate.estimate(run).memory
with jax.set_mesh(run.mesh):
    step = Compiled(make_steps(run, plan, run.task.objective(run.opened, rows)))
    batch = {k: jax.numpy.ones(x.shape, x.dtype) for k, x in rows.shapes.items()}
    step.prepare(state.abstract_state(run, plan.tx), {}, batch)
    before = field("VmRSS")
    one = state.fresh_state(run, plan.tx, opening.load_params(run))
    jax.block_until_ready(one)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
    for _ in range(2):
        one, sums = step(one, {}, batch)
    jax.block_until_ready(one)
print("FOUND", estimated.total, field("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_memory_is_what_a_run_on_a_cpu_needs(tmp_path):
    config = json.loads((PUBLISHED / "SmolLM2-135M" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    words = {"model": tmp_path, "data.train": "", "data.eval": "", "total": "10_steps"}
    words |= {"seq_len": 512, "batch_size": 4, "lora.rank": 0, "trainable": "", "pack": False}
    ran = subprocess.run(
        [sys.executable, "-c", STEP, *(f"{k}={v}" for k, v in words.items())],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    estimated, measured = map(int, ran.stdout.rpartition("FOUND")[2].split())
    print(f"estimated {estimated / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert estimated == pytest.approx(measured, rel=0.15)


def cost(opcode="fusion", times=1.0, flops=0.0, traffic=0.0, moved=0.0, scope=""):
    op = Op("x", "f32[]", opcode, (), f'metadata={{op_name="{scope}"}}')
    return Cost(op, times, flops, traffic, moved)


def test_an_instruction_is_bound_by_its_flops_or_by_its_bytes():
    assert bound(cost(flops=75e12), CHIP) == pytest.approx(1.0)
    assert bound(cost(flops=1.0, traffic=0.85e12), CHIP) == pytest.approx(1.0)


def test_work_is_named_by_scope_then_by_products():
    assert work_kind(cost(scope="jit(step)/jvp(attention)/dot", flops=1.0)) == "attention"
    assert work_kind(cost(scope="jit(step)/mul", flops=1.0)) == "products"
    assert work_kind(cost(scope="jit(step)/mul")) == "elementwise"


def test_a_step_is_as_long_as_work_or_communication():
    every = [cost(flops=75e12, times=2), cost("all-gather-start", times=3, moved=1e11)]
    seconds, traffic, collectives, kernels = counted(every, CHIP)
    assert seconds == {"products": pytest.approx(2.0)} and traffic == {"products": 0}
    assert collectives == {"all-gather": (3.0, 3e11)} and kernels == {}
    memory = DeviceMemory(1, 2, 3, 4, 9)
    found = Estimate(memory, "none", CHIP, 100e12, seconds, traffic, collectives, kernels)
    assert (found.compute, found.communication, found.step) == pytest.approx((2, 3, 3))
    assert found.mfu == pytest.approx(1 / 3) and not memory.fits
    assert memory._replace(limit=10).fits and memory._replace(limit=0).fits


def test_a_search_skips_replicas_of_what_does_not_fit(monkeypatch, capsys):
    """On 4 devices remat=dots never fits, and 2 replicas fit with remat=full."""
    compiled = []

    def opened(config, devices):
        return SimpleNamespace(mesh=config["mesh"], remat=config["remat"], cfg=config)

    def estimated(run):
        compiled.append((run.mesh["data"], run.cfg["micro_batches"], run.remat))
        if run.remat == "dots" and run.cfg["micro_batches"] > 1:
            raise UserError("the step does not fit on a device")
        size = 3 if run.remat == "dots" else run.mesh["data"]
        memory = DeviceMemory(size, 0, 0, 0, 2)
        return SimpleNamespace(memory=memory, step=1 / run.mesh["data"])

    monkeypatch.setattr(opening, "open_run", opened)
    monkeypatch.setattr(estimate, "estimate", estimated)
    monkeypatch.setattr(estimate, "held", lambda run: 0)
    monkeypatch.setattr(runtime, "memory_limit", lambda mesh: 2)
    plans = plan.search({"batch_size": 8}, range(4), 4)
    assert compiled == [(1, 1, "dots"), (1, 2, "dots"), (1, 1, "full"), (2, 1, "full")]
    assert [run.mesh["data"] for run, _ in plans] == [2, 1], "the fastest first"
    assert "micro_batches=2, remat=dots: the step does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ([], ["--config is missing", "jaxft.plan"]),
        (["--config", "configs/llm.py", "--topology=h300:8"], ["h300:8", "v5e:4x4"]),
        (["--config", "configs/llm.py", "--topology=cpu:8", "--config.mesh.data=3"], ["data=3"]),
        (
            ["--config", "configs/llm.py", "--topologie=cpu:8"],
            ["--topologie", "did you mean 'topology'"],
        ),
    ],
)
def test_a_mistake_is_one_line(words, texts, capsys):
    assert plan.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(text in said for text in texts)
