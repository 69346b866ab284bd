"""Classifiers and reward models as a user runs them: files, resume, samples, mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxft import evaluate, inspect_data, plan, predict, sample, train
from tests.conftest import LINES

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.usefixtures("quick")
NAMES = ("calm", "loud", "wet")


def write(file, records):
    file.write_text("".join(json.dumps(row) + "\n" for row in records))
    return str(file)


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder(tied=True)


@pytest.fixture
def flags(folder, tmp_path):
    """`flags(workdir, "classify", …)`: a command line for a small labelled set, or for pairs."""
    rows = [{"text": f"{LINES[i % 3]} {i}", "label": NAMES[i % 3]} for i in range(24)]
    pairs = [{"prompt": f"{i}:", "chosen": LINES[1], "rejected": LINES[3]} for i in range(24)]

    def made(workdir, config, **changes):
        file = write(tmp_path / "rows.jsonl", rows if config == "classify" else pairs)
        keys = {
            "model": folder,
            "data.train": file,
            "data.eval": file,
            "seq_len": 48,
            "batch_size": 8,
            "total": "6_steps",
            "optim.lr": 1e-2,
            "optim.warmup": "0_steps",
            "every.save": "3_steps",
            "export.kind": "merged",
            **({"labels": ",".join(NAMES)} if config == "classify" else {"objective": "reward"}),
            **changes,
        }
        file = str(ROOT / "configs" / f"{config}.py")
        return ["--config", file, "--workdir", str(workdir), *_words(keys)]

    return made


def _words(keys):
    return [f"--config.{key}={value}" for key, value in keys.items()]


@pytest.mark.parametrize("config", ["classify", "preference"])
def test_a_resumed_run_exports_the_same_bytes(flags, tmp_path, config):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train.main(flags(whole, config)) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    shutil.rmtree(resumed / "export")
    assert train.main(flags(resumed, config)) == 0
    files = [one / "export" / "model.safetensors" for one in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_classifier_learns_and_its_evaluation_writes_predictions_and_a_picture(
    flags, tmp_path, capsys
):
    words = flags(tmp_path / "run", "classify", total="30_steps", **{"every.save": "0_steps"})
    assert train.main(words) == 0
    assert evaluate.main(["--workdir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation-30.json").read_text())
    assert metrics["accuracy"] == metrics["macro_f1"] == 1.0 and metrics["loss"] < 0.1
    assert [metrics[f"f1/{name}"] for name in NAMES] == [1.0] * 3
    lines = (tmp_path / "run" / "predictions-30.jsonl").read_text().splitlines()
    assert len(lines) == 24
    first = json.loads(lines[0])
    assert first["predicted"] == first["label"] == NAMES[int(np.argmax(first["scores"]))]
    picture = Image.open(tmp_path / "run" / "evaluation-30-confusion.png")
    assert picture.size[0] == picture.size[1] > 200
    shutil.move(tmp_path / "rows.jsonl", tmp_path / "moved.jsonl")
    capsys.readouterr()
    words = ["--workdir", str(tmp_path / "run"), "--prompt", f"{LINES[1]} 4"]
    assert sample.main(words) == 0, "needs no data"
    assert f"{LINES[1]} 4' -> loud 0.9" in capsys.readouterr().out


def test_predictions_of_texts_without_labels(flags, tmp_path, capsys):
    words = flags(tmp_path / "run", "classify", total="30_steps", **{"every.save": "0_steps"})
    assert train.main(words) == 0
    rows = [{"text": f"{LINES[i % 3]} {i}", "id": f"n{i}"} for i in range(37)]
    rows[0]["label"] = "calm"
    del rows[5]["id"]
    data, run = write(tmp_path / "new.jsonl", rows), ["--workdir", str(tmp_path / "run")]
    capsys.readouterr()
    assert predict.main([*run, "--data", data]) == 0
    assert "37 texts by step 30: calm 13, loud 12, wet 12" in capsys.readouterr().out
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["id"] for one in found] == [row.get("id", 5) for row in rows]
    assert [one["label"] for one in found] == [NAMES[i % 3] for i in range(37)]
    assert found[0]["true_label"] == "calm" and "true_label" not in found[1]
    for one in found:
        assert sum(one["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert max(one["scores"], key=one["scores"].get) == one["label"]
    assert evaluate.main(run) == 0  # the same scores, there before the softmax
    logits = json.loads((tmp_path / "run" / "predictions-30.jsonl").read_text().splitlines()[1])
    shares = np.exp(logits["scores"]) / np.exp(logits["scores"]).sum()
    assert [*found[1]["scores"].values()] == pytest.approx(shares.tolist(), rel=1e-5)
    bad = write(tmp_path / "bad.jsonl", [*rows, {"text": " "}])
    capsys.readouterr()
    assert predict.main([*run, "--data", bad]) == 2 and predict.main(run) == 2
    error = capsys.readouterr().err
    assert "bad.jsonl:38 has an empty text" in error and "--data is missing" in error


def test_a_reward_model_learns_and_scores_a_prompt(flags, tmp_path, capsys):
    words = flags(tmp_path / "run", "preference", total="20_steps", **{"every.save": "0_steps"})
    assert train.main(words) == 0
    made = capsys.readouterr().out
    assert "-> reward " in made
    assert evaluate.main(["--workdir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation-20.json").read_text())
    assert metrics["rewards/accuracies"] == 1.0 and metrics["rewards/margins"] > 1
    assert not list((tmp_path / "run").glob("predictions*"))
    capsys.readouterr()
    assert sample.main(["--workdir", str(tmp_path / "run"), "--prompt", f"1:{LINES[1]}"]) == 0
    assert f"'1:{LINES[1]}' -> reward " in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes", [{}, {"labels": "stars", "problem_type": "regression"}, {"objective": "reward"}]
)
def test_a_plan_needs_no_data(flags, tmp_path, capsys, changes):
    words = flags(tmp_path, "classify", **{"data.train": "gone.jsonl", "data.eval": "", **changes})
    if "objective" in changes:
        words.append("--config.labels=")
    words.remove("--workdir")
    words.remove(str(tmp_path))
    assert plan.main(words) == 0
    assert "score" in (out := capsys.readouterr().out) or "memory" in out.lower()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": ""},
            "name its labels in the order of their ids, with --config.labels=calm,loud,wet (those"
            " of data.train)",
        ),
        ({"trainable": ".*lora_.*"}, "leaves the new head as it was drawn; leave it empty"),
        (
            {"data.eval": "0.5*demo:novel/train + 0.5*demo:novel/valid"},
            "so weights have no effect: write demo:novel/train + demo:novel/valid",
        ),
        ({"columns": "text=txet,name=leabl"}, "renames no field; found 'text', 'label'"),
        ({"labels": "calm,loud"}, "label 'wet' is not one of labels=calm,loud; correct it"),
        ({"labels": "calm,calm"}, "labels='calm,calm' must be different names"),
        ({"labels": "calm"}, "labels='calm' is one class; give at least two"),
        ({"problem_type": "multi"}, "problem_type='multi' is not known"),
        ({"problem_type": "multi_label_classification"}, "field 'labels' must be a list"),
        ({"chat": "on"}, "chat=on does not go with objective=classify"),
        ({"objective": "sft"}, "config key labels='calm,loud,wet' belongs to objective=classify"),
        ({"preference.center": 0.1}, "preference.center=0.1 is not used by objective=classify"),
        ({"data.train": "demo:novel/train"}, 'objective=classify needs "text" and "label"'),
        ({"lora.targets": ".*nothing"}, "matches no projection"),
    ],
)
def test_mistakes_are_one_line(flags, tmp_path, capsys, changes, message):
    assert train.main(flags(tmp_path / "run", "classify", **changes)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_parts_of_a_mixture_are_drawn_by_their_shares(flags, tmp_path, capsys):
    few = [{"text": f"{LINES[i]} few", "label": NAMES[i]} for i in range(3)]
    rows = flags(tmp_path / "run", "classify")
    mixed = f"0.25*{write(tmp_path / 'few.jsonl', [*few, {'text': ' ', 'label': 'wet'}])}"
    mixed += f" + 0.75*{tmp_path / 'rows.jsonl'}"
    assert train.main([*rows, f"--config.data.train={mixed}", "--config.total=1_steps"]) == 0
    assert "27 texts (25.0% from 3, 75.0% from 24) of at most 48" in capsys.readouterr().out
    wrong = write(tmp_path / "few.jsonl", [{**few[0], "label": "dry"}])
    words = flags(tmp_path / "other", "classify")
    assert train.main([*words, f"--config.data.train={tmp_path / 'rows.jsonl'} + {wrong}"]) == 2
    assert f"{wrong}:1: label 'dry' is not one of" in capsys.readouterr().err


def test_labels_of_a_classifier_are_not_renamed(flags, tmp_path, capsys):
    assert train.main(flags(tmp_path / "first", "classify", total="1_steps")) == 0
    export = tmp_path / "first" / "export"
    words = flags(tmp_path / "run", "classify", model=export, labels="calm,wet,loud")
    assert train.main(words) == 2
    assert "config.json has calm,loud,wet in id2label; leave labels out" in capsys.readouterr().err
    words = flags(tmp_path / "run", "classify", model=export, labels="", total="1_steps")
    assert inspect_data.main([*words[:2], *words[4:]]) == 0, "which reads no weights"
    assert train.main(words) == 0


def test_a_reward_model_keeps_the_template_of_its_conversations(flags, tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    words = flags(tmp_path / "run", "preference", chat=file, total="1_steps")
    assert train.main(words) == 0
    export = tmp_path / "run" / "export"
    assert (export / "chat_template.jinja").read_text() == template
    words = flags(tmp_path / "again", "preference", chat=file, model=export, total="1_steps")
    assert train.main(words) == 0, "goes on from its own head"
