"""Five AdamW steps of a new word's rows against plain torch over diffusers and transformers."""

import jax
import numpy as np
import pytest
import torch

from tests.parity.test_diffusion_training import (
    COMMON,
    DECAY,
    LR,
    MESHES,
    Oracle,
    assert_same_updates,
    jax_steps,
    loaded,
)
from tests.tiny_diffusion import make_config, make_pictures
from tests.tiny_pipelines import make_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
WORD = {"trainable": "", "inversion.token": "<cat-toy>", "inversion.init": "a"}
CASES = {
    # family, prediction, vectors, changes
    "one": ("sd", "epsilon", 1, {"min_snr_gamma": 5.0}),
    "three": ("sd", "v_prediction", 3, {"min_snr_gamma": 0.0, "micro_batches": 2}),
    "xl": ("sdxl", "epsilon", 2, {"min_snr_gamma": 0.0}),
}


class Inversion(Oracle):
    """diffusers' textual_inversion.py: whole tables train, and old rows are put back each step.

    Their gradients are zeroed too, so that clipping sees the new ones alone.
    """

    def __init__(self, pipe, run, before, vectors):
        new = ["<cat-toy>", *(f"<cat-toy>_{i}" for i in range(1, vectors))]
        self.tables = {}
        for end in ("", "_2") if hasattr(pipe, "text_encoder_2") else ("",):
            tokenizer, encoder = (getattr(pipe, n + end) for n in ("tokenizer", "text_encoder"))
            assert tokenizer.add_tokens(new) == vectors
            encoder.resize_token_embeddings(len(tokenizer))
            table = encoder.get_input_embeddings().weight
            ids = tokenizer.convert_tokens_to_ids(new)
            (start,) = tokenizer.encode("a", add_special_tokens=False)
            table.data[ids] = table.data[start].clone()
            self.tables[f"text_encoder{end}.inversion.embedding"] = (table, ids)
        super().__init__(pipe, run, before)
        for tensor in self.tensors.values():
            tensor.requires_grad_(False)
        for table, _ in self.tables.values():
            table.requires_grad_(True)

    def text(self, batch, dropped):
        captions = [self.run.train.caption(int(i)) for i in batch["sample_ids"]]
        rows = []
        for end in ("", "_2") if self.xl else ("",):
            tokenizer = getattr(self.pipe, "tokenizer" + end)
            whole = self.pipe.maybe_convert_prompt(captions, tokenizer)
            rows.append(tokenizer(whole, padding="max_length", truncation=True).input_ids)
        return super().text({**batch, "ids": np.array(rows).swapaxes(0, 1)}, dropped)

    def train(self, batches):
        tables = [table for table, _ in self.tables.values()]
        old = [table.detach().clone() for table in tables]
        kept = [~torch.isin(torch.arange(len(t)), torch.tensor(i)) for t, i in self.tables.values()]
        optimizer = torch.optim.AdamW(tables, lr=LR, betas=(0.9, 0.999), weight_decay=DECAY)
        losses = []
        for step, batch in enumerate(batches):
            loss = self.loss(step, batch)
            loss.backward()
            for table, mask in zip(tables, kept, strict=True):
                table.grad[mask] = 0
            torch.nn.utils.clip_grad_norm_(tables, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for table, mask, before in zip(tables, kept, old, strict=True):
                table.data[mask] = before[mask]
            losses.append(loss.item())
        return losses, {p: t.detach().numpy()[i] for p, (t, i) in self.tables.items()}


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("three", "2x2x2"),
        pytest.param("xl", "one", marks=pytest.mark.slow),
        pytest.param("one", "one", marks=pytest.mark.slow),
        pytest.param("xl", "2x2x2", marks=pytest.mark.slow),
    ],
)
def test_five_steps_of_new_rows_equal_torch(case, mesh, tmp_path, monkeypatch, capfd):
    family, prediction, vectors, changes = CASES[case]
    make_pipeline(tmp_path, family, prediction).save_pretrained(tmp_path / "folder")
    pictures = make_pictures(tmp_path / "pictures", word="<cat-toy>")
    sizes = zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), MESHES[mesh] or (), strict=False)
    changes = {**COMMON, **WORD, "inversion.vectors": vectors, **changes, **dict(sizes)}
    if mesh == "one":
        monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    ours = jax_steps(make_config(tmp_path / "folder", pictures, changes), tmp_path / "run")
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    oracle = Inversion(loaded(tmp_path / "folder", family), ours.run, ours.before, vectors)
    losses, theirs = oracle.train(ours.batches)
    assert theirs.keys() == ours.run.chosen
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    assert_same_updates(ours.before, ours.after, theirs)
    still = ours.before.keys() - theirs.keys()
    assert still and all(np.array_equal(ours.before[key], ours.after[key]) for key in still)
