"""`jaxft.finetune`: rows and a loss of Python train as files and the task's loss do."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft import train
from jaxft.core.errors import UserError
from jaxft.core.guards.stopping import Stopped
from jaxft.runs.checkpoint import Checkpoints
from tests.tiny_diffusion import CONFIG, SMALL
from tests.tiny_pipelines import make_pipeline

KEYS = {"total": "4_steps", "batch_size": 8, "every.sample": "0_steps", "lora.rank": 0}


@pytest.fixture(scope="module")
def keys(make_folder, small_run):
    return small_run(make_folder(tied=True), KEYS)


@pytest.fixture
def rows(records_file):
    return [json.loads(line) for line in records_file.open()]


def losses(run):
    return [record["loss"] for record in run.metrics if "loss" in record]


def test_rows_of_python_train_as_those_of_a_file(keys, rows, tmp_path):
    filed = jaxft.finetune("configs/llm.py", str(tmp_path / "file"), keys=keys)
    given = jaxft.finetune(
        "configs/llm.py", str(tmp_path / "rows"), rows=iter(rows), eval_rows=rows, keys=keys
    )
    assert losses(given) == losses(filed) and len(losses(given)) == 4
    assert given.metrics[-1]["eval_loss"] == filed.metrics[-1]["eval_loss"]
    assert given.load()(jnp.zeros((1, 3), jnp.int32)).shape[:2] == (1, 3)
    assert "<iframe srcdoc=" in given._repr_html_()


def test_the_call_and_the_command_resume_a_run_with_its_rows(keys, rows, tmp_path, capsys):
    work = tmp_path / "run"
    jaxft.finetune("configs/llm.py", str(work), rows=rows, keys=keys)
    assert train.main(["--workdir", str(work)]) == 0
    longer = {**keys, "total": "5_steps"}
    run = jaxft.finetune("configs/llm.py", str(work), rows=rows, keys=longer)
    assert len(losses(run)) == 5
    with pytest.raises(UserError, match=r"rows for train differ.*give the same rows"):
        jaxft.finetune("configs/llm.py", str(work), rows=rows[1:], keys=keys)
    assert len((work / "rows" / "train.jsonl").read_text().splitlines()) == len(rows)


def half(objective, model, batch, keys, step):
    (total, weight), metrics = objective.loss(model, batch, keys, step)
    return (total / 2, weight), {**metrics, "whole": total}


def test_a_loss_of_python_is_the_one_that_trains(keys, tmp_path, capsys):
    own = jaxft.finetune("configs/llm.py", str(tmp_path / "own"), loss=half, keys=keys)
    plain = jaxft.finetune("configs/llm.py", str(tmp_path / "plain"), keys=keys)
    first, wanted = (next(r for r in run.metrics if "loss" in r) for run in (own, plain))
    assert first["loss"] == pytest.approx(wanted["loss"] / 2, rel=1e-6)
    assert first["whole"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert first["grad_norm"] == pytest.approx(wanted["grad_norm"] / 2, rel=1e-5)
    assert train.main(["--workdir", str(tmp_path / "own")]) == 2
    line = capsys.readouterr().err
    assert "half' is a function that jaxft.finetune was given" in line and line.count("\n") == 1
    with pytest.raises(UserError, match=r"belongs to another config \(own_loss: '.*half' -> ''"):
        jaxft.finetune("configs/llm.py", str(tmp_path / "own"), keys=keys)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_loss_of_python_may_use_the_parts_of_the_objective(keys, tmp_path, remat):
    def flat(objective, model, batch, keys, step):
        hidden = objective.hidden(model, batch, None)
        total, sums = objective.cross_entropy(model, hidden, batch, None)
        return (total, sums["weight"]), {"token_accuracy": sums["correct"]}

    changes = {**keys, "remat": remat}
    own = jaxft.finetune("configs/llm.py", str(tmp_path / "own"), loss=flat, keys=changes)
    plain = jaxft.finetune("configs/llm.py", str(tmp_path / "plain"), keys=changes)
    np.testing.assert_allclose(losses(own), losses(plain), rtol=1e-6)


def test_pictures_of_python(tmp_path):
    make_pipeline(tmp_path).save_pretrained(tmp_path / "pipeline")
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(8)]
    Image.fromarray(arrays[0]).save(tmp_path / "given.png")
    pictures = [str(tmp_path / "given.png"), Image.fromarray(arrays[1]), *arrays[2:]]
    rows = [{"image": one, "text": f"picture {i}"} for i, one in enumerate(pictures)]
    keys = {**SMALL, "model": str(tmp_path / "pipeline"), "data.eval": "", "total": "2_steps"}
    run = jaxft.finetune(CONFIG, str(tmp_path / "run"), rows=rows, keys=keys)
    assert len(losses(run)) == 2
    again = jaxft.finetune(CONFIG, str(tmp_path / "run"), rows=rows, keys=keys)
    assert again == run, "the same pictures give the same files"


def test_ctrl_c_saves_and_the_same_call_goes_on(keys, rows, tmp_path, monkeypatch):
    """A notebook outlives it: KeyboardInterrupt before the first step, Stopped after one."""
    ask = lambda *_: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    arguments = ("configs/llm.py", str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "check_room", ask)
        with pytest.raises(KeyboardInterrupt):
            jaxft.finetune(*arguments, rows=rows, keys=keys)
    seen = []

    def slow(objective, model, batch, keys, step):
        jax.debug.callback(lambda now: (seen.append(int(now)), int(now) == 1 and ask()), step)
        return objective.loss(model, batch, keys, step)

    with pytest.raises(Stopped, match="of 4; the same command resumes"):
        jaxft.finetune("configs/llm.py", str(tmp_path / "two"), rows=rows, loss=slow, keys=keys)
    monkeypatch.setattr(os, "kill", lambda *_: None)
    run = jaxft.finetune("configs/llm.py", str(tmp_path / "two"), rows=rows, loss=slow, keys=keys)
    plain = jaxft.finetune(*arguments, rows=rows, keys=keys)
    assert losses(run) == losses(plain) and len(losses(run)) == 4


def bare(objective, model, batch, keys, step):
    return objective.loss(model, batch, keys, step)[0][0]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"rows": []}, "the rows for train are empty"),
        ({"rows": [{"text": b"bytes"}]}, r"train row 0 is no dict of texts.*convert it first"),
        ({"keys": {"optim.rate": 1}}, r"unknown config key 'optim.rate'"),
        ({"loss": "mse"}, "loss is a str; give a function"),
        ({"rows": "train.jsonl"}, r'a str; give a list of dicts.*keys=\{"data.train": PATH\}'),
        ({"rows": {"text": ["a"]}}, "a dict; give a list of dicts"),
        ({"keys": {"optim": {"lr": 1}}}, r'keys\["optim"\] is a dict.*"optim.lr"'),
        ({"loss": bare}, r"the loss .*bare must return \(\(sum, weight\), metrics\)"),
    ],
    ids=["empty", "bytes", "key", "name", "file", "columns", "nested", "form"],
)
def test_mistakes(keys, tmp_path, given, error):
    changes = {**keys, **given.pop("keys", {})}
    with pytest.raises(UserError, match=error):
        jaxft.finetune("configs/llm.py", str(tmp_path / "run"), keys=changes, **given)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"config": {"model": "x"}}, "config is a dict; give a path"),
        ({"config": "configs/llm.py", "keys": "optim.lr=1"}, "keys is a str; give a dict"),
    ],
    ids=["config", "keys"],
)
def test_arguments_of_another_type(given, error):
    with pytest.raises(UserError, match=error):
        jaxft.finetune(**given)
