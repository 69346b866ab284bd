"""evaluate, sample, export: of a finished run, of its steps, of an untrained model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

import jaxft
from jaxft import evaluate, export, sample, train

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]


@pytest.fixture(scope="module")
def finished(make_folder, make_flags, tmp_path_factory):
    """(workdir, its flags) of a LoRA run of 4 steps with a checkpoint every 2."""
    work = tmp_path_factory.mktemp("runs") / "run"
    changes = {"total": "4_steps", "every.save": "2_steps", "optim.lr": 0.01}
    flags = make_flags(make_folder(tied=True), changes)
    assert train.main([*CONFIG, "--workdir", str(work), *flags]) == 0
    return work, flags


def test_evaluate_repeats_the_figures_of_the_run(finished, capsys):
    work, flags = finished
    assert evaluate.main(["--workdir", str(work)]) == 0
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    again = json.loads((work / "evaluation-4.json").read_text())
    assert again["loss"] == lines[-1]["eval_loss"]
    assert evaluate.main([*CONFIG, *flags]) == 0
    assert f"{lines[0]['eval_loss']:.6g}" in capsys.readouterr().out


def test_evaluate_names_the_steps_there_are(finished, capsys):
    work, _ = finished
    assert evaluate.main(["--workdir", str(work), "--step=3"]) == 2
    assert "2, 4" in capsys.readouterr().err


def test_export_of_an_earlier_step_in_another_dtype(finished, tmp_path):
    work, _ = finished
    for step, out in ((2, "two"), (4, "four")):
        arguments = ["--workdir", str(work), "--step", str(step), "--out", str(tmp_path / out)]
        assert export.main([*arguments, "--dtype=bfloat16"]) == 0
    two, four = (load_file(tmp_path / out / "model.safetensors") for out in ("two", "four"))
    key = "model.layers.0.self_attn.q_proj.weight"
    assert two[key].dtype.name == "bfloat16" and not np.array_equal(two[key], four[key])
    assert json.loads((tmp_path / "two" / "config.json").read_text())["dtype"] == "bfloat16"


def test_t21_adapter_and_merged_exports_agree_in_torch(finished, tmp_path):
    from peft import PeftModel

    work, flags = finished
    out = tmp_path / "adapter"
    arguments = ["--workdir", str(work), "--out", str(out), "--kind=adapter"]
    assert export.main(arguments) == 0
    base = flags[0].partition("=")[2]
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        untouched = plain(tokens).logits
        adapted = PeftModel.from_pretrained(plain, out)(tokens).logits
        merged = LlamaForCausalLM.from_pretrained(work / "export", dtype=torch.float32)
        torch.testing.assert_close(merged(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - untouched).abs().max() > 1e-2
    ours = jaxft.load(str(work / "export"))(tokens.numpy())
    np.testing.assert_allclose(ours, adapted.numpy(), atol=1e-4)


def test_t27_sample_equals_generate_for_a_batch_of_unequal_prompts(finished, tmp_path, capsys):
    from transformers import AutoTokenizer

    work, _ = finished
    prompts = ["a small", "water", "the act of giving something away to"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n")
    assert sample.main(["--workdir", str(work), f"--prompts={file}", "--raw", "--max_new=12"]) == 0
    shown = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(work / "export", padding_side="left")
    model = LlamaForCausalLM.from_pretrained(work / "export", dtype=torch.float32)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    made = model.generate(**batch, max_new_tokens=12, do_sample=False)
    for prompt, ids in zip(prompts, made[:, batch["input_ids"].shape[1] :], strict=True):
        assert prompt + tokenizer.decode(ids, skip_special_tokens=True) in shown


def test_a_prompt_gets_the_form_of_the_records(finished, capsys):
    """The manifest of a run names the fields of its records."""
    work, _ = finished
    manifest = work / "manifest.json"
    kept = manifest.read_text()
    facts = json.loads(kept)
    assert facts["data"]["record_fields"] == ["prompt", "completion"]

    def printed(fields, *more):
        facts["data"]["record_fields"] = fields
        manifest.write_text(json.dumps(facts))
        words = ["--workdir", str(work), "--max_new=6", *more]
        assert sample.main(words) == 0
        manifest.write_text(kept)
        return capsys.readouterr().out

    labelled = ["text", "label"]
    shown = printed(labelled, "--prompt=a small bird")
    assert shown.startswith("Definition: a small bird\nCategory:")
    whole = "--prompt=Definition: a small bird\nCategory:"
    assert printed(labelled, whole, "--raw") == shown, "the same tokens"
    alpaca = printed(["instruction", "output"], "--prompt=Name a bird.")
    assert "### Instruction:\nName a bird.\n\n### Response:" in alpaca
    for fields in (["text"], ["prompt", "completion"], []):
        assert printed(fields, "--prompt=a small bird").startswith("a small bird")


def test_sampling_is_repeatable_by_its_seed(finished, capsys):
    work, _ = finished
    texts = []
    for seed in (0, 0, 1):
        arguments = ["--workdir", str(work), "--prompt=a", "--temperature=2", f"--seed={seed}"]
        assert sample.main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_several_values_are_each_tried_under_a_label(finished, capsys):
    work, _ = finished
    arguments = ["--workdir", str(work), "--prompt=a", "--max_new=4"]
    assert sample.main([*arguments, "--temperature=0,2", "--seed=1,2,3"]) == 0
    shown = capsys.readouterr().out
    assert sample.main([*arguments, "--temperature=2", "--seed=3"]) == 0
    alone = capsys.readouterr().out
    labels = [f"temperature {t}, seed {s}\n" for t in (0, 2) for s in (1, 2, 3)]
    assert [shown.count(label) for label in labels] == [1] * 6
    assert shown.endswith(labels[-1] + alone)


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (sample, ["--workdir=x", "--prompt=a", "--seed=1,2", "--top_k=1,2", "--steps=1,2"], "two"),
        (sample, ["--workdir=x", "--prompt=a", "--copies=1,2"], "--copies='1,2' must be int"),
        (sample, ["--prompt=a"], "--workdir"),
        (sample, ["--workdir=x"], "--prompt"),
        (sample, ["--workdir=x", "--prompt=a", "--max_new=many"], "max_new"),
        (sample, ["--workdir=x", "--prompts=/dev/null"], "/dev/null is empty"),
        (sample, ["--workdir=/no/such", "--prompt=a"], "/no/such"),
        (export, [], "--workdir"),
        (export, ["--workdir=/no/such", "--kind=whole"], "not a run folder"),
        (export, ["--workdir=/no/such"], "/no/such"),
        (evaluate, ["--workdr=/no/such"], "workdir"),
    ],
)
def test_mistakes_are_one_line(command, arguments, words, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0]
