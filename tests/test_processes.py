"""One run in several processes, as on several hosts: the numbers and the folder of one process.

The gate runs one config on two devices; `pytest -m slow` runs every file of configs/ on more.

A sum over two devices has one order. With more, gloo (between CPU processes) adds in another order
than XLA does inside one process: see `test_only_the_order_of_sums_differs`. A single process that
joins a run of one has its sums made by gloo too, and then all results are equal bit for bit.
"""

import json
import os

import numpy as np
import pytest

from tests.conftest import LINES
from tests.several import (
    GLOO,
    ROOT,
    apart,
    assert_same,
    ends,
    free_port,
    losses,
    records,
    start,
    together,
    told,
)
from tests.tiny_autoencoders import make_vae
from tests.tiny_diffusion import make_pictures
from tests.tiny_janus import make_work
from tests.tiny_pipelines import make_pipeline

CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]


@pytest.fixture(scope="module")
def flags(make_folder, make_flags):
    folder = make_folder(tied=True)
    keys = {"batch_size": 4, "lora.rank": 0, "eval_examples": 8}

    def make(**changes):
        more = {"total": "3_steps", "every.log": "1_steps", "every.save": "2_steps", **changes}
        return [*CONFIG, *make_flags(folder, {**keys, **more})]

    return make


def test_two_processes_make_what_one_makes(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # it compiles faster
    one, two = tmp_path / "one", tmp_path / "two"
    together(1, *flags(), "--workdir", one, devices=2, joined=False)
    shown = together(2, *flags(), "--workdir", two, devices=2)
    assert shown[0].count("step 3/3") == 1 and "export (merged)" in shown[0]
    assert GLOO.sub("", shown[1]) == "", "the second process is silent"
    assert [r["step"] for r in records(two)] == [0, 1, 2, 3, 3], "each record once"
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert json.loads((two / "manifest.json").read_text())["processes"] == 2
    assert len(losses(one)) == 3
    assert_same(one, two)


def test_hosts_with_different_configs_all_stop_and_list_the_keys(flags, tmp_path):
    port, seeds = free_port(), ("1", "7")
    processes = [
        start(
            ["-m", "jaxft.train", *flags(seed=seed), "--workdir", str(tmp_path)],
            2, place, port, devices=2,
        )
        for place, seed in enumerate(seeds)
    ]  # fmt: skip
    for code, _, err in ends(processes):
        (line,) = told(err)
        assert code == 2 and "Traceback" not in err
        assert "process 1: another config than in workdir" in line and "(seed: 1 -> 7)" in line
    assert not (tmp_path / "metrics.jsonl").exists()


# ---- every shipped config -------------------------------------------------------------------

TINY = {
    "export.dtype": "float32",
    "total": "2_steps",
    "batch_size": 8,
    "eval_examples": 8,
    "every.log": "1_steps",
    "every.save": "2_steps",
}
DRAWN = {**TINY, "eval_generated": 8}
SHORT = {
    "llm": TINY,
    "classify": {**TINY, "labels": "a,b"},
    "preference": TINY,
    "autoencoder": {**TINY, "resolution": 32},
    "diffusion": {**DRAWN, "sample.steps": 2, "resolution": 16},
    "image_tokens": {**DRAWN, "sample.prompts": "['red heart']"},
    "janus": {**DRAWN, "resolution": 12, "sample.prompts": "['water']"},
}
# Records of language models that do not train on {prompt, completion}.
LABELLED = [{"text": line, "label": "ab"[i % 2]} for i, line in enumerate(LINES * 4)]
PAIRS = [{"prompt": line, "chosen": " yes", "rejected": f" no {line}"} for line in LINES * 4]
# Widths of models are seldom multiples of three.
THREE = {"batch_size": 6, "mesh.data": -1, "mesh.fsdp": 1}


@pytest.fixture(scope="module")
def shipped(make_folder, make_flags, tmp_path_factory):
    """`shipped(name, changes, cache)`: flags of that config, short, on tiny folders or its demo."""
    work = tmp_path_factory.mktemp("shipped")
    make_work(work / "janus")
    make_pipeline(work / "tokens").save_pretrained(work / "diffusion" / "model")
    make_vae(work / "autoencoder" / "model")
    for name in ("diffusion", "autoencoder"):
        make_pictures(work / name / "pictures", sizes=((32, 32),))
    folder = make_folder(tied=True)
    texts = {"llm": {}}
    for name, rows in (("classify", LABELLED), ("preference", PAIRS)):
        file = work / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts[name] = dict.fromkeys(("data.train", "data.eval"), f"jsonl:{file}")

    def flags(name, changes, cache):
        keys = {**SHORT[name], **changes}
        if (work / name).exists():
            pictures = f"folder:{work / name / 'pictures'}"
            keys |= {"model": work / name / "model", "data.train": pictures, "data.eval": pictures}
        if name not in ("llm", "autoencoder"):
            keys |= {"cache": cache}
        words = [f"--config.{key}={value}" for key, value in keys.items()]
        if name in texts:
            words = make_flags(folder, {**keys, **texts[name]})
        return ["--config", str(ROOT / "configs" / f"{name}.py"), *words]

    return flags


@pytest.fixture(scope="module")
def alone(shipped, tmp_path_factory):
    """`alone(name, devices)`: the run of one process that has joined, made once."""
    made = {}

    def run(name, devices):
        if (name, devices) not in made:
            work = made[name, devices] = tmp_path_factory.mktemp("alone") / name
            words = shipped(name, THREE if devices == 3 else {}, work.parent / "cache")
            together(1, *words, "--workdir", work, devices=devices)
        return made[name, devices]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 4), (4, 4), (3, 3)])
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_case_img_15_a_shipped_config_makes_in_several_processes_what_it_makes_in_one(
    shipped, alone, name, count, devices, tmp_path
):
    """Each fills its own cache: the processes wait for the shares of each other."""
    changes, several = THREE if devices == 3 else {}, tmp_path / "several"
    words = shipped(name, changes, tmp_path / "cache")
    together(count, *words, "--workdir", several, devices=devices)
    assert json.loads((several / "manifest.json").read_text())["processes"] == count
    one = alone(name, devices)
    assert len(losses(one)) == 2
    assert_same(one, several)
    pictures = [sorted(p.name for p in (work / "samples").glob("*")) for work in (one, several)]
    assert pictures[0] == pictures[1]


# ---- the order of sums ----------------------------------------------------------------------

SUMS = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

address, count, place = sys.argv[1:]
if address:
    jax.distributed.initialize(address, num_processes=int(count), process_id=int(place))
mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))
rows = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32)
spread = NamedSharding(mesh, P("x"))
placed = jax.make_array_from_callback(rows.shape, spread, lambda i: rows[i])
add = lambda row: jax.lax.psum(row[0], "x")
added = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=P("x"), out_specs=P()))(placed)
made = np.asarray(added)
in_order = ((rows[0] + rows[1]) + rows[2]) + rows[3]
print("sums", made.tobytes().hex(), bool((made == in_order).all()))
"""


def sums(count, address):
    places = range(count)
    command = ["-c", SUMS, address, str(count)]
    found = ends([start([*command, str(place)], count, place) for place in places])
    assert [code for code, _, _ in found] == [0] * count, found
    (line,) = {out[out.index("sums") :].split("\n")[0] for _, out, _ in found}
    _, bits, in_order = line.split()
    return np.frombuffer(bytes.fromhex(bits), np.float32), in_order == "True"


@pytest.mark.slow
def test_only_the_order_of_sums_differs():
    """An fp32 all-reduce over four devices, without jaxft: XLA's own adds in order, gloo's not."""
    inside, in_order = sums(1, "")
    assert in_order
    gloo = [sums(count, f"localhost:{free_port()}") for count in (1, 2, 4)]
    for made, in_order in gloo:
        assert not in_order and np.array_equal(made, gloo[0][0])
    assert 0 < np.abs(inside - gloo[0][0]).max() < 1e-6


@pytest.mark.slow
def test_a_process_that_has_not_joined_differs_by_that_order_alone(flags, tmp_path):
    """Its losses agree to 1e-6, and weights by as much of the learning rate (Adam's) in 3 steps."""
    for name, count, joined in (("plain", 1, False), ("two", 2, True)):
        together(count, *flags(), "--workdir", tmp_path / name, joined=joined)
    loss, weights = apart(tmp_path / "plain", tmp_path / "two")
    assert loss < 1e-6 and 0 < weights < 1e-6


# ---- hosts that come and go -----------------------------------------------------------------

# Ends the process as soon as the checkpoint of a step is on disk.
STOP = """
import os, sys
from jaxft import train
from jaxft.runs.checkpoint import Checkpoints
save, last = Checkpoints.save, int(sys.argv[1])
def stop(self, step, *rest):
    save(self, step, *rest)
    if step == last:
        self.wait()
        os._exit(9)
Checkpoints.save = stop
sys.exit(train.main(sys.argv[2:]))
"""
# Trains parameters that are one ulp larger.
LARGER = """
import sys, jax, jax.numpy as jnp
from jaxft import train
from jaxft.runs import state
load = state.load_params
state.load_params = lambda *run: jax.tree.map(lambda x: jnp.nextafter(x, jnp.inf), load(*run))
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_r5_the_number_of_hosts_may_change_at_every_restart(flags, tmp_path):
    words = [*flags(total="8_steps"), "--workdir"]
    whole, work = tmp_path / "whole", tmp_path / "work"
    together(1, *words, whole)
    for last, count in ((2, 2), (4, 1), (6, 4)):
        command, port = ["-c", STOP, str(last), *words, str(work)], free_port()
        codes = [code for code, *_ in ends([start(command, count, i, port) for i in range(count)])]
        assert 9 in codes and 0 not in codes
        steps = [int(path.name) for path in (work / "checkpoints").iterdir() if path.name.isdigit()]
        assert max(steps) == last
    shown = together(2, *words, work)
    assert "resumed from step 6" in shown[0]
    assert len(losses(work)) == 8
    assert_same(whole, work)


@pytest.mark.slow
def test_r6_another_mesh_changes_a_loss_no_more_than_one_ulp_of_the_parameters(flags, tmp_path):
    """Rounding differs between meshes. It grows over 300 steps as any other difference does."""
    words = flags(total="300_steps", **{"every.save": "10_steps", "every.log": "50_steps"})
    work = {name: tmp_path / name for name in ("four", "two", "larger")}
    command = ["-c", STOP, "10", *words, "--workdir", str(work["two"])]
    assert ends([start(command, devices=4)])[0][0] == 9
    for name, devices in (("four", 4), ("two", 2)):
        together(1, *words, "--workdir", work[name], devices=devices, joined=False)
    command = ["-c", LARGER, *words, "--workdir", str(work["larger"])]
    assert ends([start(command, devices=4)])[0][0] == 0
    four, two, larger = (np.array(losses(work[name])) for name in work)
    mesh, ulp = np.abs(two - four) / four, np.abs(larger - four) / four
    assert len(four) == 300 and not mesh[:10].any() and mesh[10:].any()
    print(f"50 steps: mesh {mesh[:50].max():.1e}, ulp {ulp[:50].max():.1e};", end=" ")
    print(f"300 steps: mesh {mesh.max():.1e}, ulp {ulp.max():.1e}")
    assert mesh[:50].max() < 1e-6 and mesh.max() < 3 * ulp.max()


# ---- launchers ------------------------------------------------------------------------------

WHO = """
import sys, jax
from jaxft.core import processes
processes.join()
print("I am", jax.process_index(), "of", jax.process_count(), file=sys.stderr)
"""


@pytest.mark.slow
def test_the_variables_of_slurm_are_enough():
    job = {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    places = [{"SLURM_PROCID": place, "SLURM_LOCALID": place} for place in "01"]
    found = ends([start(["-c", WHO], 2, **job, **place) for place in places])
    for place, (code, _, err) in enumerate(found):
        assert code == 0 and f"I am {place} of 2" in err, found
