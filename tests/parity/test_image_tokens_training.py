"""Ten steps of the image-token task against a plain torch loop over LlamaForCausalLM."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import DECAY, assert_same_updates, exported
from tiny_autoencoders import make_vqmodel
from tiny_image_tokens import CODES, GRID, arguments, make_config, make_pictures
from transformers import LlamaForCausalLM

from jaxft import run as runs
from jaxft import train
from jaxft.core.checkpoint import Checkpoints
from jaxft.core.sharding import local_rows, place_batch
from jaxft.core.step import sample_keys
from jaxft.tasks.image_layout import read_layout
from jaxft.tasks.image_tokens import DROP

STEPS, LR, SEED = 10, 1e-3, 3
COMMON = {
    "total": f"{STEPS}_steps",
    "seed": SEED,
    "batch_size": 16,
    "flip": True,
    "caption_dropout": 0.3,
    "optim.lr": LR,
    "optim.weight_decay": DECAY,
    "optim.warmup": "3_steps",
    "optim.schedule": "constant",
    "optim.b2": 0.999,
    "data.eval": "",
}
LOSSES = {"image": (1.0, 0.0, 0.0), "dalle": (0.875, 0.125, 0.01)}
MESHES = {"1": (1, 1, 1), "fsdp8": (1, 8, 1), "2x2x2": (2, 2, 2)}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def folder(work, make_folder):
    """A text model with the codes of a VQ tokenizer grafted on, as jaxft exports it."""
    text, vq = make_folder(initializer_range=0.1), make_vqmodel(work / "vq", CODES)
    pictures = make_pictures(work / "pictures")
    changes = {"graft": str(vq), "total": "0_steps", "mesh.fsdp": 8, "data.eval": ""}
    run = arguments(text, pictures, work / "cache", work / "graft", changes)
    assert train.main(run) == 0
    return work / "graft" / "export"


def config_of(folder, work, loss, changes=()):
    image, text, z = LOSSES[loss]
    weights = {"loss.image_weight": image, "loss.text_weight": text, "loss.z": z}
    return make_config(
        folder, work / "pictures", work / "cache", {**COMMON, **weights, **dict(changes)}
    )


def written_out(layout, batch, dropped):
    """Each row's ids, as one would write them by hand."""
    for prompt, length, codes, drop in zip(
        batch["prompt"], batch["length"], batch["codes"], dropped, strict=True
    ):
        ids = [layout.null] if drop else prompt[:length].tolist()
        yield [*ids, layout.boi, *(layout.image_offset + int(code) for code in codes)], len(ids)


def row_losses(model, layout, batch, dropped, z):
    """Means over a row's codes and over its prompt, rows padded on the left."""
    rows = list(written_out(layout, batch, dropped))
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([[layout.pad] * (width - len(ids)) + ids for ids, _ in rows])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask, position_ids=places).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    losses = losses + z * torch.logsumexp(logits, -1).square()
    images = losses[:, -layout.count :].mean(1)
    texts = [
        torch.zeros(()) if drop else row[-layout.count - start : -layout.count].mean()
        for row, (_, start), drop in zip(losses, rows, dropped, strict=True)
    ]
    return images, torch.stack(texts)


def torch_steps(folder, batches, loss, dropout):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layout = read_layout((folder / "imagetoken.json").read_bytes(), "x")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    image_weight, text_weight, z = LOSSES[loss]
    losses = []
    for k, batch in enumerate(batches):
        keys = sample_keys(SEED, k, batch["sample_ids"])
        streams = jax.vmap(lambda key: jax.random.fold_in(key, DROP))(keys)
        dropped = np.asarray(jax.vmap(jax.random.uniform)(streams) < dropout)
        images, texts = row_losses(model, layout, batch, dropped, z)
        total = (image_weight * images + text_weight * texts).mean()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (k + 1) / 3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses, {k: v.detach().numpy() for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def oracles(folder, work):
    made = {}

    def oracle(loss):
        if loss not in made:
            task = runs.open_run(config_of(folder, work, loss)).task
            task.prepare({}, set())
            stream = task.train_batches(0, slice(0, 16))
            batches = [next(stream) for _ in range(STEPS)]
            assert batches[0]["codes"].dtype == np.uint16
            assert batches[0]["codes"].shape == (16, GRID * GRID)
            made[loss] = torch_steps(folder, batches, loss, COMMON["caption_dropout"])
        return made[loss]

    return oracle


def jax_steps(config, tmp_path):
    """(losses, torch-keyed parameters before, after)."""
    run = runs.open_run(config)
    plan = runs.make_plan(run)
    with jax.set_mesh(run.mesh):
        state, frozen = runs.start_state(run, plan, Checkpoints(tmp_path / "run"), 0)
        run.task.prepare(state.params, run.chosen)
        before = exported(run, {**frozen, **state.params})
        step_fn = runs.make_step(run, plan)
        stream = run.task.train_batches(0, local_rows(run.mesh, run.cfg.batch_size))
        losses = []
        for _ in range(STEPS):
            state, sums = step_fn(state, frozen, place_batch(next(stream), run.mesh))
            losses.append(float(sums["loss"]))
        after = exported(run, {**frozen, **state.params})
    assert step_fn._cache_size() == 1
    return losses, before, after


CASES = [("image", "1", 1), ("dalle", "1", 1), ("dalle", "fsdp8", 2), ("dalle", "2x2x2", 4)]


@pytest.mark.parametrize(("loss", "mesh", "micro"), CASES)
def test_ten_steps_equal_torch(folder, work, oracles, tmp_path, monkeypatch, loss, mesh, micro):
    """Prompts of unequal lengths, captions dropped at random, micro-batches, meshes."""
    oracle = oracles(loss)
    if mesh == "1":
        monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    data, fsdp, tensor = MESHES[mesh]
    shape = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "micro_batches": micro}
    made = jax_steps(config_of(folder, work, loss, shape), tmp_path)
    np.testing.assert_allclose(made[0], oracle[0], rtol=1e-5)
    assert_same_updates(made[1], made[2], oracle[1])
