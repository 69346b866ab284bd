"""Ten steps of the image-token task against a plain torch loop over LlamaForCausalLM."""

import json
import shutil
from itertools import starmap
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from jaxft import train
from jaxft.core.step import sample_keys
from jaxft.data.loader import subset
from jaxft.export import export_folder
from jaxft.objectives.codes import CAPTION_STREAM
from jaxft.tasks.common.encoded import collate
from jaxft.tasks.image_tokens.layout import read_layout
from tests import plain_torch
from tests import whole as runs
from tests.parity.test_training import DECAY, assert_same_updates, jax_steps
from tests.tiny_autoencoders import make_vqmodel
from tests.tiny_image_tokens import CODES, GRID, arguments, make_config, make_pictures

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
    streams = jax.vmap(lambda key: jax.random.fold_in(key, CAPTION_STREAM))(keys)
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
            task = runs.open_run(config_of(folder, work, loss))
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


def test_evaluation_is_what_torch_measures(folder, work, tmp_path):
    """Held-out rows that leave a batch unfilled: with their captions, without, and how many hit."""
    folder = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:324] = 0  # so that some likeliest ids are codes
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    changes = {"data.eval": f"folder:{work / 'pictures'}", "eval_examples": 11, "batch_size": 8}
    run = runs.open_run(config_of(folder, work, "image", changes))
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        run.encode(params)
        found = run.preview.evaluate(params, run.mesh).metrics
    data = subset(run.held_out, 11, SEED)
    batch = collate([data[i] for i in range(11)], batch_rows=11)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layout, wanted = run.opened.layout, {}
    for name, drop in (("ce", False), ("ce_null", True)):
        losses, right = [], []
        for ids, _ in written_out(layout, batch, [drop] * 11):
            targets = torch.tensor(ids[-layout.count :])
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -layout.count - 1 : -1]
            losses.append(F.cross_entropy(logits, targets).item())
            right.append((logits.argmax(-1) == targets).float().mean().item())
        wanted[name] = np.mean(losses)
        wanted.setdefault("accuracy", np.mean(right))
    wanted["caption_use"] = wanted["ce_null"] - wanted["ce"]
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert abs(found["caption_use"]) > 1e-4 and 0 < found["accuracy"] < 1
    counts = np.bincount(np.concatenate(list(run.train.blocks())).ravel())
    shares = counts[counts > 0] / counts.sum()
    assert found["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_p6_the_adapter_of_a_run_loads_in_peft_and_is_the_merged_model(folder, work, tmp_path):
    adapters = {"lora.rank": 4, "lora.alpha": 8.0, "lora.targets": r"layers\..*_proj"}
    changes = {**COMMON, **adapters, "total": "3_steps", "optim.lr": 0.02, "batch_size": 8}
    changes |= {"export.kind": "adapter"}
    args = arguments(folder, work / "pictures", work / "cache", tmp_path / "run", changes)
    assert train.main(args) == 0
    said = json.loads((tmp_path / "run" / "export" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(folder)
    run, params, _ = runs.restore_run(tmp_path / "run", None)
    with jax.set_mesh(run.mesh):
        export_folder(run, params, tmp_path / "merged", "folder", "source")
    merged, base = (LlamaForCausalLM.from_pretrained(f) for f in (tmp_path / "merged", folder))
    ids = torch.tensor([[5, 6, run.opened.layout.boi, *range(324, 334)]])
    with torch.no_grad():
        start = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "export")
        one, other = adapted(ids).logits, merged(ids).logits
    assert (one - other).abs().max() < 1e-4 * other.abs().max()
    assert (start - other).abs().max() > 1e-2 * other.abs().max()
