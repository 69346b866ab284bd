"""The diffusion task: cached rows, buckets, evaluation and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxft import sample
from jaxft.core.errors import UserError
from jaxft.core.params import bind
from jaxft.core.step import sample_keys
from jaxft.runs.checkpoint import Checkpoints
from jaxft.tasks import Request
from jaxft.tasks.diffusion.rows import Encoders
from tests import whole as runs
from tests.interrupted import kill_after, timeless
from tests.tiny_diffusion import flags_of, make_pictures

ROOT = Path(__file__).resolve().parents[3]
SIZES = ((24, 20), (16, 32))
# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
RUN = {
    "total": "8_steps",
    "batch_size": 4,
    "every.save": "2_steps",
    "every.eval": "4_steps",
    "buckets": True,
    "flip": True,
    "optim.ema": 0.9,
    "optim.lr": 1e-2,
    "eval_examples": 4,
    "eval_generated": 2,
    "trainable": r"unet\.(up_blocks\.1|conv_out)\..*",
}
FLAGS = " ".join(f"--{key}={str(value).lower()}" for key, value in QUICK.items())


def loss_of(run, params, batch):
    keys = sample_keys(0, 0, batch["sample_ids"])

    def loss(params, batch):
        total, weight = run.objective.loss(bind(run.opened.template, params), batch, keys, 0)[0]
        return total / weight

    with jax.set_mesh(run.mesh):
        compiled = jax.jit(loss).lower(params, batch).compile(compiler_options=QUICK)
        return float(compiled(params, batch))


@pytest.fixture(scope="module")
def both(opened, tmp_path_factory):
    """(run without a cache, run with one, parameters, the cache's folder)."""
    cache = tmp_path_factory.mktemp("cache")
    changes = {"buckets": True, "flip": True, "batch_size": 4}
    (without, params), (within, _) = (opened({**changes, "cache": c}) for c in ("", cache))
    within.encode(params, within.chosen)
    return without, within, params, cache


def test_cached_rows_equal_uncached_rows(both):
    without, within, params, _ = both
    rows = slice(0, 4)
    pairs = list(zip(without.shapes(rows), within.shapes(rows), strict=True))
    assert len(pairs) == 2, "a bucket for each shape of picture"
    encoders = Encoders(within.opened.template, within.opened.dtype, params)
    for computed, stored in pairs:
        assert computed.keys() - stored.keys() == {"pixels", "ids"}
        assert stored.keys() - computed.keys() == {"mean", "logvar", "context", "pooled"}
        for name in computed.keys() & stored.keys():
            assert np.array_equal(computed[name], stored[name]), name
        sixteen = np.resize(computed["pixels"], (16, *computed["pixels"].shape[1:]))
        moments = encoders.moments(sixteen)
        for name in ("mean", "logvar"):
            assert np.array_equal(moments[name][:4], stored[name]), name
    losses = [loss_of(run, params, batch) for run, batch in zip(both, pairs[0], strict=False)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_time_ids_tell_original_crop_and_bucket(both):
    """A mirrored picture is mirrored before the crop, so its crop is as true."""
    seen = set()
    for step, batch in zip(range(8), both[0].train.batches(0, slice(0, 4)), strict=False):
        sizes = {SIZES[i % 12 % 2] for i in batch["sample_ids"]}
        assert len(sizes) == 1, f"batch {step} mixes buckets"
        original, target = np.array(sizes.pop()), np.array(batch["pixels"].shape[1:3])
        scaled = np.round(original * (target / original).max())
        wanted = [*original, *((scaled - target) // 2), *target]
        assert np.array_equal(batch["time_ids"], np.tile(wanted, (4, 1)))
        seen |= set(batch["sample_ids"].tolist())
    assert len(seen) == 24, "mirrored ones too"


def test_embeddings_are_not_stored_while_a_text_encoder_trains(opened, tmp_path):
    run, params = opened({"cache": tmp_path, "trainable": "unet.*|text_encoder.*"})
    run.encode(params, run.chosen)
    assert "ids" in run.train[0] and "mean" in run.train[0]


def test_only_what_makes_moments_names_their_cache(both, opened):
    _, _, params, cache = both

    def folders(changed):
        run, _ = opened({"buckets": True, "flip": True, "cache": cache})
        run.encode(changed, run.chosen)
        return set(os.listdir(cache))

    before = folders(params)
    decoder = next(path for path in params if path.startswith("vae.decoder."))
    assert folders({**params, decoder: params[decoder] + 1}) == before
    encoder = next(path for path in params if path.startswith("vae.encoder."))
    assert len(folders({**params, encoder: params[encoder] + 1}) - before) == 1


def test_the_vae_does_not_train(opened):
    run, params = opened({"trainable": ".*"})
    with pytest.raises(UserError, match="trains the VAE"):
        run.encode(params, run.chosen)


def test_prior_pictures_have_their_weight(opened, tmp_path):
    prior = make_pictures(tmp_path / "prior", 24, seed=1)
    run, params = opened({"prior.data": prior, "prior.weight": 0.25, "eval_examples": 1})
    task = run
    assert len(task.train) == 48, "own pictures twice, as often as the prior's"
    rows = [task.train[i] for i in (0, 1, 30, 31)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch["sample_ids"] = np.arange(4, dtype=np.int32)
    both = loss_of(run, params, batch)
    weights = np.array([1, 1, 0.25, 0.25], np.float32)
    assert np.array_equal(batch["weights"], weights)
    parts = [
        loss_of(run, params, {**batch, "weights": np.array(w, np.float32)})
        for w in ((1, 1, 0, 0), (0, 0, 1, 1))
    ]
    np.testing.assert_allclose(both, (2 * parts[0] + 0.5 * parts[1]) / 2.5, rtol=1e-5)


def test_evaluations_are_repeatable(opened):
    reports = []
    for size in (8, 8, 4):
        run, params = opened({"batch_size": size, "eval_examples": 10})
        with jax.set_mesh(run.mesh):
            reports.append(run.preview.evaluate(params, run.mesh).metrics)
    assert reports[0] == reports[1], "bitwise"
    times = [int(name.removeprefix("loss_t")) for name in reports[0] if "loss_t" in name]
    assert times == [62, 187, 312, 437, 562, 687, 812, 937]
    mean = np.mean([reports[0][f"loss_t{t}"] for t in times])
    np.testing.assert_allclose(reports[0]["loss"], mean, rtol=1e-6)
    for name, value in reports[0].items():
        np.testing.assert_allclose(reports[2][name], value, rtol=1e-5)


# ---- the command --------------------------------------------------------------------------


def environment(devices=1):
    count = f" --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": FLAGS + count}


def start(arguments, log, devices=1):
    command = [sys.executable, "-m", "jaxft.train", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment(devices))


@pytest.fixture(scope="module")
def finished(plain, pictures, tmp_path_factory):
    """(folder with a `whole` run and a `broken` one that was killed and resumed, output)."""
    work = tmp_path_factory.mktemp("runs")
    shown = {}
    for name in ("whole", "broken"):
        arguments = flags_of(plain, pictures, {**RUN, "cache": work / f"cache-{name}"})
        arguments += ["--workdir", str(work / name)]
        with (work / f"{name}.log").open("w") as log:
            if name == "broken":
                assert kill_after(start(arguments, log), work / name, 5), "it was over before"
            assert start(arguments, log).wait() == 0, (work / f"{name}.log").read_text()
        shown[name] = (work / f"{name}.log").read_text()
    return work, shown


def restored(workdir):
    run = runs.open_run(json.loads((workdir / "config.json").read_text()))
    with jax.set_mesh(run.mesh):
        state, _ = Checkpoints(workdir).restore(8, runs.abstract_state(run, runs.make_plan(run).tx))
        return run, jax.tree.map(np.asarray, state)


def test_a_killed_run_resumes_bitwise(finished):
    work, shown = finished
    assert "resumed from step 4" in shown["broken"] or "resumed from step 2" in shown["broken"]
    assert timeless(work / "whole") == timeless(work / "broken")
    (_, whole), (_, broken) = (restored(work / name) for name in ("whole", "broken"))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, broken))


def test_average_weights_and_start_all_differ(finished, opened):
    run, state = restored(finished[0] / "whole")
    with jax.set_mesh(run.mesh):
        start = runs.load_params(run, run.chosen)
    for path in run.chosen:
        weights, average = state.params[path], state.ema[path]
        assert not np.array_equal(weights, average), path
        assert not np.array_equal(average, start[path]), path


def test_every_bucket_is_compiled_before_step_0(finished):
    shown = finished[1]["whole"]
    assert shown.count("compiled the step for") == 1
    compiled = shown.index("compiled the step for 2 batch shapes in")
    assert compiled < shown.index("eval at step 0 ")
    assert "Involuntary full rematerialization" not in shown
    assert "cached moments of" in shown and "cached embeddings of" in shown


def test_evaluations_show_before_and_now(finished):
    work, _ = finished
    grids = sorted((work / "whole" / "samples").glob("held-out-*.png"))
    assert [grid.name for grid in grids] == [f"held-out-{s:06}.png" for s in (0, 4, 8)]
    lines = [json.loads(x) for x in (work / "whole" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval_loss" in line][-1]
    assert {"eval_loss_t62", "eval_loss_t937", "eval_kid-lite0"} <= last.keys()


def test_sample_draws_the_same_picture_beside_others(finished, tmp_path):
    work, _ = finished
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fish\ntwo birds\nthe moon\nbread\na house\n")
    for out, asked in (("one", "--prompt=a red fish"), ("many", f"--prompts={prompts}")):
        command = [sys.executable, "-m", "jaxft.sample", "--workdir", str(work / "whole"), asked]
        command += ["--seed=3", f"--out={tmp_path / out}"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, many = tmp_path / "one", tmp_path / "many"
    assert (one / "sample-000.png").read_bytes() == (many / "sample-000.png").read_bytes()
    assert len(list(many.glob("sample-*.png"))) == 5 and (many / "grid.png").exists()
    assert np.asarray(Image.open(one / "sample-000.png")).shape == (16, 16, 3)


def test_a_sweep_is_one_grid(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    work, out = finished[0] / "whole", tmp_path / "swept"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fish\nbread\n")
    arguments = ["--workdir", str(work), f"--prompts={prompts}", f"--out={out}"]
    assert sample.main([*arguments, "--guidance=1,3", "--steps=2,3"]) == 0
    assert "8 pictures and grid.png" in capsys.readouterr().out
    height, width, _ = np.asarray(Image.open(out / "grid.png")).shape
    assert height > 4 * sample.SWEEP_CELL and 2 * sample.SWEEP_CELL < width < 3 * sample.SWEEP_CELL
    assert sample.main([*arguments[:3], f"--out={tmp_path}", "--guidance=3", "--steps=2"]) == 0
    bread = (tmp_path / "sample-001.png", out / "sample-005.png")  # second row, first column
    assert bread[0].read_bytes() == bread[1].read_bytes()


def evaluations(workdir, step):
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["step"] == step and "eval_loss" in line]
    assert len(found) == 1
    return {name: value for name, value in found[0].items() if name.startswith("eval_")}


@pytest.mark.slow
def test_eight_devices_evaluate_and_draw_as_one(finished, plain, pictures, tmp_path):
    """Four steps on (data, fsdp, tensor) = (2, 2, 2); numbers and grids are those of `whole`."""
    changes = {**RUN, "total": "4_steps", "cache": finished[0] / "cache-whole"}
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "sample.prompts": "('bread',)"}
    arguments = flags_of(plain, pictures, {**changes, **mesh})
    with (tmp_path / "log").open("w") as log:
        done = start([*arguments, "--workdir", str(tmp_path / "run")], log, devices=8).wait()
    shown = (tmp_path / "log").read_text()
    assert done == 0 and "Involuntary full rematerialization" not in shown, shown
    for step in (0, 4):
        ours, alone = (evaluations(w, step) for w in (tmp_path / "run", finished[0] / "whole"))
        for name in alone.keys() - {"eval_kid-lite0"}:
            np.testing.assert_allclose(ours[name], alone[name], rtol=1e-4, err_msg=name)
        name = f"samples/held-out-{step:06}.png"
        ours, alone = (Image.open(w / name) for w in (tmp_path / "run", finished[0] / "whole"))
        differs = np.abs(np.asarray(ours, int) - np.asarray(alone, int)).max()
        assert differs <= 2, f"{name} differs by {differs}"
    assert (tmp_path / "run" / "samples" / "prompts-000004.png").exists()


def test_sampling_with_a_sampler_that_is_none(opened):
    run, params = opened({})
    with pytest.raises(UserError, match="--sampler='plms' is not one of ddim, euler, dpm"):
        run.preview.complete(params, ["a"], Request(sampler="plms"))
