"""Preference losses, rewards and gradients of jaxft against a plain torch loop over the pairs."""

import json
import math

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from jaxft.core.params import bind
from jaxft.core.sharding import place_batch
from jaxft.core.step import sample_keys
from jaxft.weights import transfer
from tests import whole as runs
from tests.conftest import LINES

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
NUMBERS = {  # the keys of each objective, and its loss at step 0
    "dpo": ({"preference.smoothing": 0.1}, math.log(2)),
    "ipo": ({}, 25.0),
    "hinge": ({}, 1.0),
    "robust": ({"preference.smoothing": 0.1}, math.log(2)),
    "apo_zero": ({"preference.beta": 0.3}, 1.0),
    "sigmoid_norm": ({"preference.sft": 0.5}, None),
    "orpo": ({}, None),
    "simpo": ({"preference.margin": 0.3}, None),
    "kto": ({}, 0.5),
    "kto weighted": ({"preference.desirable": 0.5, "preference.undesirable": 1.5}, None),
}
ROWS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs and labelled answers of unequal lengths, by objective."""
    folder, found = tmp_path_factory.mktemp("preferences"), {}
    for name in NUMBERS:
        rows = []
        for i in range(24):
            prompt, good, bad = (
                f"{i}: {LINES[i % 5]}",
                LINES[(i + 1) % 5][: 4 + i],
                LINES[i % 5][:19],
            )
            row = {"prompt": prompt, "chosen": " " + good, "rejected": f" {i} {bad}"}
            if name.startswith("kto"):
                row = {"prompt": prompt, "completion": row["chosen"], "label": i % 3 > 0}
            rows.append(json.dumps(row) + "\n")
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(rows))
    return found


@pytest.fixture(scope="module")
def folders(make_folder):
    """The model of step 0, and one whose weights have moved."""
    first, moved = make_folder(tied=True), make_folder(tied=True)
    model = LlamaForCausalLM.from_pretrained(moved)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(moved)
    return first, moved


@pytest.fixture
def opened(make_config, files, folders, tmp_path):
    """`opened(name, …)`: a run on the first folder whose pairs have their reference."""

    def run(name, which=0, **changes):
        places = dict.fromkeys(("data.train", "data.eval"), f"jsonl:{files[name]}")
        config = make_config(
            folders[which],
            {
                **places,
                "lora.rank": 0,
                "batch_size": ROWS,
                "eval_examples": 0,
                "mesh.fsdp": 1,
                **changes,
            },
        )
        config["objective"], config["cache"] = name.split()[0], str(tmp_path / "cache")
        keys = NUMBERS[name][0]
        config["preference"] = {key.split(".")[1]: value for key, value in keys.items()}
        return runs.open_run(config)

    return run


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)


def batch_of(run, params):
    run.encode(params)
    return next(run.train.batches(0, slice(0, ROWS)))


def loss_and_gradients(run, batch, params):
    def loss(params, batch):
        keys = sample_keys(0, 0, batch["sample_ids"])
        model = bind(run.opened.template, params)
        (total, weight), metrics = run.objective.loss(model, batch, keys, 0)
        return total / weight, {name: x / weight for name, x in metrics.items()}

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (value, metrics), grads = step(params, place_batch(batch, run.mesh))
    part = run.opened.parts[0]
    named = {k: v.copy() for k, v in transfer.export(part, run.leaves, grads, {}, None).tensors}
    return float(value), {k: float(v) for k, v in metrics.items()}, named


def sides(model, pairs):
    """Summed log-probabilities and token counts [n, 2] by log_softmax, gather and sums."""
    sums, counts = [], []
    for pair in pairs:
        for tokens, weights in pair.sides:
            ids, kept = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(weights[1:])
            logps = F.log_softmax(model(ids[None, :-1]).logits[0], -1)
            sums.append((logps.gather(1, ids[1:, None])[:, 0] * kept).sum())
            counts.append(kept.sum())
    return torch.stack(sums).reshape(-1, 2), torch.stack(counts).reshape(-1, 2)


def torch_loss(name, policy, reference, counts, desirable, numbers):
    beta = numbers.get("preference.beta", 2.0 if name == "simpo" else 0.1)
    e = numbers.get("preference.smoothing", 0.0)
    s, mean = policy - reference, policy / counts
    d, mean_d = s[:, 0] - s[:, 1], (s / counts)[:, 0] - (s / counts)[:, 1]
    if name in ("dpo", "sigmoid_norm"):
        x = beta * (d if name == "dpo" else mean_d)
        loss = -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)
    if name == "robust":
        x = beta * d
        loss = (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)
    if name == "hinge":
        loss = torch.relu(1 - beta * d)
    if name == "ipo":
        loss = (mean_d - 1 / (2 * beta)) ** 2
    if name == "apo_zero":
        loss = 1 - torch.sigmoid(beta * s[:, 0]) + torch.sigmoid(beta * s[:, 1])
    if name == "orpo":  # TRL's odds term; the paper's first term

        def log1mexp(x):
            return torch.log1p(-x.exp())

        odds = mean[:, 0] - mean[:, 1] - (log1mexp(mean[:, 0]) - log1mexp(mean[:, 1]))
        loss = -mean[:, 0] - beta * F.logsigmoid(odds)
    if name == "simpo":
        loss = -F.logsigmoid(beta * (mean[:, 0] - mean[:, 1]) - 0.3 * beta)
    if name.startswith("kto"):
        z = s[:, 1].mean().clamp(min=0).detach()
        good = numbers.get("preference.desirable", 1.0) * (1 - torch.sigmoid(beta * (s[:, 0] - z)))
        bad = numbers.get("preference.undesirable", 1.0) * (1 - torch.sigmoid(beta * (z - s[:, 0])))
        loss = torch.where(desirable, good, bad)
    gains = beta * (mean if name in ("orpo", "simpo") else s).detach()
    return (loss - numbers.get("preference.sft", 0.0) * mean[:, 0]).mean(), gains


@pytest.mark.parametrize("name", [n for n, (_, value) in NUMBERS.items() if value])
def test_b3_the_values_at_step_0_come_first(opened, one_device, name):
    """They find a wrong reference, dropout, and adapters that are left on."""
    run = opened(name, **{"lora.rank": 4})
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        value, metrics, _ = loss_and_gradients(run, batch_of(run, params), params)
        report = run.preview.evaluate(params, run.mesh)
    assert value == pytest.approx(NUMBERS[name][1], rel=1e-5)
    assert report.metrics["loss"] == pytest.approx(NUMBERS[name][1], rel=1e-5)
    if name != "kto":
        assert metrics["rewards/accuracies"] == report.metrics["rewards/accuracies"] == 0, "no ties"


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", NUMBERS)
def test_b3_b8_b9_b10_loss_rewards_and_gradients_equal_torch(
    opened, one_device, one_thread, folders, name, pack
):
    run, moved = opened(name, pack=pack), opened(name, which=1, pack=pack)
    with jax.set_mesh(run.mesh):
        batch = batch_of(run, runs.load_params(run))
        params = runs.load_params(moved)
        value, metrics, grads = loss_and_gradients(run, batch, params)
    assert (len(batch["pairs"]) < ROWS) == pack
    policy, reference = map(LlamaForCausalLM.from_pretrained, reversed(folders))
    order = runs_order(run)
    pairs = [run.train.data[i] for i in order]
    with torch.no_grad():
        base, _ = sides(reference, pairs)
    sums, counts = sides(policy, pairs)
    desirable = torch.tensor([pair.desirable for pair in pairs])
    loss, gains = torch_loss(name, sums, base, counts, desirable, NUMBERS[name][0])
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    if name.startswith("kto"):
        gains = torch.stack([gains[desirable, 0].mean(), gains[~desirable, 0].mean()])
    else:
        right = (gains[:, 0] > gains[:, 1]).float().mean().item()
        assert metrics["rewards/accuracies"] == right and 0 < right < 1
        gains = gains.mean(0)
    expected = {"chosen": gains[0], "rejected": gains[1], "margins": gains[0] - gains[1]}
    near = 1e-5 * run.objective.rule.beta * sums.abs().mean().item()  # differences of these sums
    for kind, wanted in expected.items():
        assert metrics[f"rewards/{kind}"] == pytest.approx(wanted.item(), abs=near)
    for key, p in policy.named_parameters():
        error = np.linalg.norm(grads[key] - p.grad.numpy()) / np.linalg.norm(p.grad.numpy())
        assert error < 1e-5, f"{key}: gradient differs by {error:.1e}"


def runs_order(run):
    """The indices of the pairs of the first batch."""
    import grain

    count = len(run.train)
    order = grain.MapDataset.source(range(count)).seed(run.cfg.seed).shuffle().repeat()
    return [int(order[i]) for i in range(ROWS)]


MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo"])
def test_b7_b10_meshes_and_micro_batches_equal_one_device(opened, monkeypatch, name):
    """The mean is over the pairs of the global batch, and KTO's baseline too."""
    config = {"mesh.data": 1, "mesh.fsdp": 1, "pack": True, "optim.schedule": "constant"}
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda *_: 1)
        want = steps(opened(name, **config))
    cases = [((1, 1, 1), 2), ((1, 1, 1), 4), ((2, 2, 2), 2)]
    for shape, micro in [*((shape, 1) for shape in MESHES), *cases]:
        keys = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape, strict=True))
        with monkeypatch.context() as patch:
            if shape == (1, 1, 1):
                patch.setattr(jax, "device_count", lambda *_: 1)
            found = steps(opened(name, **{**config, **keys, "micro_batches": micro}))
        where = f"{shape} {micro}"
        np.testing.assert_allclose(found[0], want[0], rtol=2e-5, err_msg=where)
        np.testing.assert_allclose(found[1], want[1], rtol=1e-4, atol=1e-5, err_msg=where)


def steps(run, count=3):
    """The losses and gradient norms of the first steps, and their rewards."""
    plan = runs.make_plan(run)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        run.encode(params)
        state, frozen = runs.fresh_state(run, plan.tx, params), {}
        step, stream, found, rewards = runs.make_step(run, plan), run.batches(), [], []
        for _ in range(count):
            state, sums = step(state, frozen, place_batch(next(stream), run.mesh))
            found += [float(sums["loss"]), float(sums["grad_norm"])]
            rewards += [float(sums[f"rewards/{side}"]) for side in ("chosen", "rejected")]
    return found, rewards
