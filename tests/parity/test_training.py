"""Ten AdamW steps of jaxft against a plain torch loop over transformers' model."""

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jaxft.core.sharding import local_rows, place_batch
from jaxft.runs.checkpoint import Checkpoints
from jaxft.weights import transfer
from tests import plain_torch
from tests import whole as runs

STEPS, LR, DECAY = 10, 1e-3, 0.1
COMMON = {
    "lora.rank": 0,
    "batch_size": 16,
    "optim.lr": LR,
    "optim.weight_decay": DECAY,
    "optim.warmup": "3_steps",
    "optim.schedule": "constant",
}
MESHES = {
    "1": (1, 1, 1),
    "data8": (8, 1, 1),
    "fsdp8": (1, 8, 1),
    "2x2x2": (2, 2, 2),
}


def jax_steps(config, tmp_path, steps=STEPS):
    """(rows of each batch, losses, torch-keyed parameters before, after)."""
    run = runs.open_run(config)
    plan = runs.make_plan(run)
    saved = Checkpoints(tmp_path / "run")
    with jax.set_mesh(run.mesh):
        state, frozen, _ = runs.start_state(run, plan, saved, 0)
        run.encode(state.params, run.chosen)
        before = exported(run, {**frozen, **state.params})
        step_fn = runs.make_step(run, plan)
        stream = run.train.batches(0, local_rows(run.mesh, run.cfg.batch_size))
        rows, losses = [], []
        for _ in range(steps):
            batch = next(stream)
            rows.append(len(batch["weights"]))
            placed = place_batch(batch, run.mesh)
            state, sums = step_fn(state, frozen, placed)
            losses.append(float(sums["loss"]))
        after = exported(run, {**frozen, **state.params})
    assert step_fn._cache_size() == len(set(rows)), "the step compiled more than once a shape"
    return rows, losses, before, after


def exported(run, params):
    part = run.opened.parts[0]
    return {k: v.copy() for k, v in transfer.export(part, run.leaves, params, {}, None).tensors}


def torch_steps(folder, batches, lr=LR, warmup=3):
    """The same in plain torch: loss on weighted targets, AdamW with the usual decay groups."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def loss_of(batch):
        tokens, targets, weights = (
            torch.from_numpy(batch[name]) for name in ("tokens", "targets", "weights")
        )
        logits = model(tokens, attention_mask=torch.from_numpy(batch["segment_ids"])).logits
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten().long(), reduction="none"
        )
        return (nll * weights.flatten()).sum() / weights.sum()

    losses = map(loss_of, batches)
    made = plain_torch.train(model.parameters(), losses, lr=lr, decay=DECAY, warmup=warmup)
    return made, plain_torch.weights(model)


def assert_same_updates(before, after, oracle, tolerance=1e-3):
    """Every tensor's update equals the oracle's within `tolerance` of that update's norm."""
    for key, start in before.items():
        ours, theirs = after[key] - start, oracle[key] - start
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < tolerance, f"{key}: update differs by {error:.1e}"


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder(tied=True)


@pytest.fixture(scope="module")
def oracle(make_config, folder):
    """Losses and weights of the torch loop over the batches that every case draws."""
    task = runs.open_run(make_config(folder, {**COMMON, "pack": False}))
    batches = plain_torch.first_batches(task, STEPS, 16)
    lengths = [batch["weights"].sum(1) for batch in batches]
    assert max(map(np.max, lengths)) > 3 * min(map(np.min, lengths)), "rows are to be unequal"
    return torch_steps(folder, batches)


CASES = [(mesh, 1, False) for mesh in MESHES]
CASES += [("1", 2, False), ("1", 4, False), ("2x2x2", 2, False), ("2x2x2", 4, False)]
CASES += [("1", 1, True)]


@pytest.mark.parametrize(("mesh", "micro", "pack"), CASES)
def test_t09_ten_steps_equal_torch(
    make_config, folder, oracle, tmp_path, monkeypatch, mesh, micro, pack
):
    """Also with micro-batches of unequal lengths, and with rows packed (T10: nothing leaks)."""
    if mesh == "1":
        monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    data, fsdp, tensor = MESHES[mesh]
    changes = {
        **COMMON,
        "pack": pack,
        "micro_batches": micro,
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "mesh.tensor": tensor,
    }
    rows, losses, before, after = jax_steps(make_config(folder, changes), tmp_path)
    assert (min(rows) < 16) == pack, "packed rows are fewer than examples"
    np.testing.assert_allclose(losses, oracle[0], rtol=1e-5)
    assert_same_updates(before, after, oracle[1])


def test_t10_packed_rows_on_a_mesh_train_what_single_rows_train(make_config, folder, tmp_path):
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "seq_len": 96}
    results = []
    for pack in (False, True):
        config = make_config(folder, {**COMMON, **mesh, "pack": pack})
        results.append(jax_steps(config, tmp_path / str(pack), steps=4))
    (single, losses, before, after), (packed, packed_losses, _, packed_after) = results
    assert max(packed) < min(single)
    np.testing.assert_allclose(packed_losses, losses, rtol=1e-5)
    assert_same_updates(before, packed_after, after)
