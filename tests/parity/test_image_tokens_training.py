"""Ten steps of the image-token task against a plain torch loop over LlamaForCausalLM."""

from itertools import starmap

import jax
import numpy as np
import plain_torch
import pytest
import torch
import torch.nn.functional as F
from test_training import DECAY, assert_same_updates, jax_steps
from tiny_autoencoders import make_vqmodel
from tiny_image_tokens import CODES, GRID, arguments, make_config, make_pictures
from transformers import LlamaForCausalLM

from jaxft import run as runs
from jaxft import train
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


def dropped_rows(step, batch):
    """Which rows of a step train without their caption."""
    keys = sample_keys(SEED, step, batch["sample_ids"])
    streams = jax.vmap(lambda key: jax.random.fold_in(key, DROP))(keys)
    return np.asarray(jax.vmap(jax.random.uniform)(streams) < COMMON["caption_dropout"])


def torch_steps(folder, batches, loss):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layout = read_layout((folder / "imagetoken.json").read_bytes(), "x")
    image_weight, text_weight, z = LOSSES[loss]

    def loss_of(step, batch):
        images, texts = row_losses(model, layout, batch, dropped_rows(step, batch), z)
        return (image_weight * images + text_weight * texts).mean()

    losses = starmap(loss_of, enumerate(batches))
    made = plain_torch.train(model.parameters(), losses, lr=LR, decay=DECAY, warmup=3)
    return made, plain_torch.weights(model)


@pytest.fixture(scope="module")
def oracles(folder, work):
    made = {}

    def oracle(loss):
        if loss not in made:
            task = runs.open_run(config_of(folder, work, loss)).task
            batches = plain_torch.first_batches(task, STEPS, 16)
            assert batches[0]["codes"].dtype == np.uint16
            assert batches[0]["codes"].shape == (16, GRID * GRID)
            made[loss] = torch_steps(folder, batches, loss)
        return made[loss]

    return oracle


CASES = [("image", "1", 1), ("dalle", "1", 1), ("dalle", "fsdp8", 2), ("dalle", "2x2x2", 4)]


@pytest.mark.parametrize(("loss", "mesh", "micro"), CASES)
def test_ten_steps_equal_torch(folder, work, oracles, tmp_path, monkeypatch, loss, mesh, micro):
    """Prompts of unequal lengths, captions dropped at random, micro-batches, meshes."""
    oracle = oracles(loss)
    if mesh == "1":
        monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    data, fsdp, tensor = MESHES[mesh]
    shape = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "micro_batches": micro}
    _, losses, before, after = jax_steps(config_of(folder, work, loss, shape), tmp_path)
    np.testing.assert_allclose(losses, oracle[0], rtol=1e-5)
    assert_same_updates(before, after, oracle[1])
