"""A Janus in training: ten steps against a plain torch loop, adapters against PEFT."""

import json
from itertools import starmap

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import JanusForConditionalGeneration

from jaxft import train
from tests import plain_torch
from tests import whole as runs
from tests.parity.test_image_tokens_training import COMMON as SHARED
from tests.parity.test_image_tokens_training import LR, MESHES, STEPS, dropped_rows
from tests.parity.test_training import DECAY, assert_same_updates, jax_steps
from tests.tiny_image_tokens import arguments, make_config
from tests.tiny_janus import CODES, GRID, SIZE, make_work

COMMON = {**SHARED, "resolution": SIZE, "max_caption_tokens": 40, "loss.z": 0.01}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("janus"))


def config_of(work, changes=()):
    changes = {**COMMON, **dict(changes)}
    return make_config(work / "model", work / "pictures", work / "cache", changes)


def row_loss(model, prompt, codes):
    """One row's mean over codes of cross-entropy and z-loss, from transformers' modules."""
    inner, codes = model.model, torch.tensor(codes.astype(np.int64))[None]
    text = inner.language_model.embed_tokens(torch.tensor([prompt]))
    images = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    hidden = inner.language_model(inputs_embeds=torch.cat([text, images], 1)).last_hidden_state
    logits = inner.generation_head(hidden[:, len(prompt) - 1 :])[0]
    return F.cross_entropy(logits, codes[0]) + 0.01 * torch.logsumexp(logits, -1).square().mean()


def written_out(batch, dropped, boi=5, pad=3):
    """Prompts as one would write them by hand; without a caption all but BOS and BOI is pad."""
    for prompt, length, drop in zip(batch["prompt"], batch["length"], dropped, strict=True):
        ids = prompt[:length].tolist()
        assert ids[0] == 0, "BOS comes first"
        yield [0, *([pad] * (length - 1) if drop else ids[1:]), boi]


def torch_steps(folder, batches):
    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    # Pad is what the null is made of; torch would give its row no gradient all the same.
    model.model.language_model.embed_tokens.padding_idx = None
    frozen = ("model.vision_model", "model.aligner", "model.vqmodel", "lm_head")
    own = [p for name, p in model.named_parameters() if not name.startswith(frozen)]

    def loss_of(step, batch):
        prompts = written_out(batch, dropped_rows(step, batch))
        rows = [row_loss(model, *row) for row in zip(prompts, batch["codes"], strict=True)]
        return torch.stack(rows).mean()

    losses = starmap(loss_of, enumerate(batches))
    made = plain_torch.train(own, losses, lr=LR, decay=DECAY, warmup=3)
    return made, plain_torch.weights(model)


@pytest.fixture(scope="module")
def oracle(work):
    batches = plain_torch.first_batches(runs.open_run(config_of(work)), STEPS, 16)
    assert batches[0]["codes"].shape == (16, GRID * GRID)
    return torch_steps(work / "model", batches)


@pytest.mark.parametrize(("mesh", "micro"), [("1", 1), ("2x2x2", 2)])
def test_ten_steps_equal_torch(work, oracle, tmp_path, monkeypatch, mesh, micro):
    """P3 in training: unequal prompts, dropped captions, z-loss, micro-batches, a mesh of 8."""
    if mesh == "1":
        monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    data, fsdp, tensor = MESHES[mesh]
    shape = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "micro_batches": micro}
    _, losses, before, after = jax_steps(config_of(work, shape), tmp_path)
    np.testing.assert_allclose(losses, oracle[0], rtol=1e-5)
    carried = [key for key, array in before.items() if after[key].tobytes() == array.tobytes()]
    blind = ("model.vision_model", "model.aligner", "model.vqmodel", "lm_head")
    assert all(key.startswith(blind) for key in carried)
    moved = {key: array for key, array in before.items() if key not in carried}
    assert len(moved) == 2 * 9 + 11
    assert_same_updates(moved, after, oracle[1])


def drawn(model, work, captions):
    """Codes by transformers' own generate, from the prompts as its processor would make them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "model", padding_side="left")
    texts = [f"<|User|>: {c}\n\n<|Assistant|>:<begin_of_image>" for c in captions]
    rows = tokenizer(texts, return_tensors="pt", padding=True)
    model.generation_config.generation_kwargs = {"boi_token_id": 5}
    ids = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    how = {"generation_mode": "image", "guidance_scale": 5, "do_sample": False}
    return model.generate(**ids, **how).numpy()


def test_p6_the_adapter_of_a_run_loads_in_peft_and_is_the_merged_model(work, tmp_path):
    """LoRA on the language model alone, the heads whole: logits and greedy codes agree."""
    changes = {
        **COMMON,
        "total": "3_steps",
        "optim.lr": 0.02,
        "batch_size": 8,
        "lora.rank": 4,
        "lora.alpha": 8.0,
        "lora.targets": r"language_model\..*_proj",
        "trainable": r".*\.lora_[ab]|generation_.*",
        "export.kind": "adapter",
    }
    args = arguments(work / "model", work / "pictures", work / "cache", tmp_path / "run", changes)
    assert train.main(args) == 0
    folder = tmp_path / "run" / "export"
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(work / "model")
    assert said["modules_to_save"] == [
        "generation_embeddings",
        "generation_aligner",
        "generation_head",
    ]
    assert not (folder / "config.json").exists()
    run, params, _ = runs.restore_run(tmp_path / "run", None)
    from jaxft.export import export_folder

    with jax.set_mesh(run.mesh):
        export_folder(run, params, tmp_path / "merged", "folder", "source")
    merged = JanusForConditionalGeneration.from_pretrained(tmp_path / "merged")
    base = JanusForConditionalGeneration.from_pretrained(work / "model")
    prompt, codes = [0, 7, 20, 21, 8, 34, 5], np.arange(GRID**2) % CODES
    with torch.no_grad():
        start = row_loss(base, prompt, codes).item()
        adapted = PeftModel.from_pretrained(base, folder)
        wrapped = [name for name, _ in adapted.named_parameters() if ".lora_A." in name]
        assert len(wrapped) == 2 * 7 and all("language_model" in name for name in wrapped)
        one = row_loss(adapted.base_model.model, prompt, codes).item()
        other = row_loss(merged, prompt, codes).item()
    assert abs(one - other) < 1e-5 * other and abs(start - other) > 1e-2
    captions = ["a red cat 0", "water"]
    expected = drawn(merged, work, captions)
    np.testing.assert_array_equal(drawn(adapted, work, captions), expected)
