"""Preference runs as a user starts them: reference, resume, adapters, memory, mistakes."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxft import evaluate, inspect_data, sample, train
from jaxft.core.sharding import abstract_batch
from jaxft.runs import compiling, opening, state
from jaxft.runs.checkpoint import Checkpoints
from tests import interrupted
from tests.conftest import LINES

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("quick")


def test_tools_and_template_options_belong_to_pairs_too(flags, tmp_path, make_folder, capsys):
    """Both are rendered, and thoughts that a template leaves out are counted."""
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% if tools %}TOOLS{{ tools | length }}{% endif %}{{ note }}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [
        {**row, "tools": [{"name": "f"}], "chat_template_kwargs": {"note": "NOTE"}}
        for row in records()
    ]
    words = flags(tmp_path / "run", chat=file, **{"data.train": write(tmp_path / "t.jsonl", rows)})
    words = [word for word in words if word not in ("--workdir", str(tmp_path / "run"))]
    assert inspect_data.main([*words, "--config.data.eval=", "--rows=1"]) == 0
    assert "TOOLS1NOTE" in capsys.readouterr().out


def write(file, records):
    file.write_text("".join(json.dumps(row) + "\n" for row in records))
    return f"jsonl:{file}"


def records(count=24):
    return [
        {"prompt": f"{i}: {LINES[i % 5]}", "chosen": " " + LINES[i % 5 - 1], "rejected": f" no {i}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder(tied=True)


@pytest.fixture
def flags(folder, tmp_path):
    """`flags(objective=…)`: a command line for these pairs, whose cache is of this test."""

    def made(workdir, **changes):
        file = write(tmp_path / "rows.jsonl", records())
        keys = {
            "model": folder,
            "data.train": file,
            "data.eval": file,
            "seq_len": 48,
            "batch_size": 8,
            "total": "6_steps",
            "optim.lr": 1e-2,
            "every.save": "3_steps",
            "cache": tmp_path / "cache",
            **changes,
        }
        config = str(ROOT / "configs" / "preference.py")
        words = [f"--config.{key}={value}" for key, value in keys.items()]
        return ["--config", config, "--workdir", str(workdir), *words]

    return made


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 0, "export.kind": "merged"}])
def test_b5_a_resumed_run_reads_the_reference_of_step_0(flags, tmp_path, capsys, changes):
    """Also without its cache: the weights of step 0 are loaded again, never those of step 3."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train.main(flags(whole, **changes)) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    shutil.rmtree(resumed / "export")
    capsys.readouterr()
    assert train.main(flags(resumed, **changes)) == 0
    said = capsys.readouterr().out
    assert "resumed from step 3" in said and "0 pairs computed, 24 read" in said
    assert interrupted.timeless(resumed) == interrupted.timeless(whole)
    shutil.rmtree(resumed / "checkpoints" / "6")
    shutil.rmtree(resumed / "export")
    shutil.rmtree(tmp_path / "cache")
    assert train.main(flags(resumed, **changes)) == 0
    assert "24 pairs computed" in capsys.readouterr().out
    assert interrupted.timeless(resumed) == interrupted.timeless(whole)


def test_b5_a_resumed_run_holds_no_second_copy_of_its_weights(flags, tmp_path, monkeypatch):
    """Those of step 0 name the cache of the reference, and are gone when the others are read."""
    place, changes = tmp_path / "run", {"lora.rank": 0, "export.kind": "none"}
    assert train.main(flags(place, **changes)) == 0
    shutil.rmtree(place / "checkpoints" / "6")
    kept, loads, lives = jax.live_arrays(), [], []
    before, load, restore = {id(x) for x in kept}, opening.load_params, Checkpoints.restore

    def counted(run, wanted=None):
        loads.append(set(wanted))
        return load(run, wanted)

    def watched(self, *given):
        lives.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))
        return restore(self, *given)

    for module in (opening, state):
        monkeypatch.setattr(module, "load_params", counted)
    monkeypatch.setattr(Checkpoints, "restore", watched)
    assert train.main(flags(place, **changes)) == 0
    assert len(loads[0]) > 8 and not set.union(*loads[1:]), "once, all of them"
    (live,) = lives
    assert live < 1000, live
    del kept


def test_a_resumed_run_draws_the_parts_of_a_mixture_by_their_shares(flags, tmp_path, capsys):
    other = write(tmp_path / "other.jsonl", records(8)[2:])
    mixed = {"data.train": f"0.75*{tmp_path / 'rows.jsonl'} + 0.25*{other}", "total": "4_steps"}
    mixed |= {"every.save": "2_steps"}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train.main(flags(whole, **mixed)) == 0
    assert "30 pairs (75.0% from 24, 25.0% from 6) of at most 48" in capsys.readouterr().out
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    assert train.main(flags(resumed, **mixed)) == 0
    assert "resumed from step 2" in capsys.readouterr().out
    assert interrupted.timeless(whole) == interrupted.timeless(resumed)


def test_b4_the_reference_of_a_continued_adapter_is_that_adapter(flags, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main(flags(first)) == 0
    trained = interrupted.timeless(first)[-1]
    assert trained["eval_rewards/margins"] > 0.01
    arguments = flags(second, **{"lora.from": first / "export", "optim.lr": 1e-3})
    assert train.main(arguments) == 0
    start = interrupted.timeless(second)[0]
    assert start["eval_loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert start["eval_rewards/accuracies"] == 0
    assert start["eval_logps/chosen"] == pytest.approx(trained["eval_logps/chosen"], rel=1e-4)


def test_evaluate_and_sample_work_on_a_run(flags, tmp_path, capsys):
    """Also on other pairs, whose reference is computed from the weights of step 0."""
    place = tmp_path / "run"
    assert train.main(flags(place)) == 0
    want = interrupted.timeless(place)[-1]
    shown = {}
    for file in ("", write(tmp_path / "other.jsonl", records()[::-1])):
        words = [f"--config.data.eval={file}"] if file else []
        assert evaluate.main(["--workdir", str(place), *words]) == 0
        shown[file] = json.loads((place / "evaluation-6.json").read_text())
        for key in ("loss", "rewards/margins", "logps/chosen"):
            assert shown[file][key] == pytest.approx(want[f"eval_{key}"], rel=1e-4), key
    capsys.readouterr()
    assert sample.main(["--workdir", str(place), "--prompt", "a tree", "--max_new", "4"]) == 0
    assert capsys.readouterr().out.startswith("a tree")


@pytest.mark.parametrize("name", ["orpo", "simpo", "kto"])
def test_other_objectives_train_through_the_command(flags, tmp_path, name):
    changes = {"objective": name}
    if name == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
            for i, row in enumerate(records())
        ]
        file = write(tmp_path / "labelled.jsonl", rows)
        changes |= {"data.train": file, "data.eval": file}
    assert train.main(flags(tmp_path / "run", **changes)) == 0
    lines = interrupted.timeless(tmp_path / "run")
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert lines[-1]["eval_rewards/margins"] > lines[0]["eval_rewards/margins"]


def test_b11_a_fall_of_the_chosen_answers_is_said(flags, tmp_path, capsys):
    assert train.main(flags(tmp_path / "run", **{"optim.lr": 0.1, "objective": "ipo"})) == 0
    last = interrupted.timeless(tmp_path / "run")
    fell = last[-1]["eval_logps/chosen"] < 1.1 * last[0]["eval_logps/chosen"]
    assert fell == ("warning: logps/chosen fell" in capsys.readouterr().out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "dop"}, "objective='dop' is not known; did you mean 'dpo'?"),
        ({"preference.margin": 0.5}, "preference.margin=0.5 is not used by objective=dpo"),
        ({"preference.smoothing": 0.5}, "preference.smoothing=0.5 must be at least 0 and below"),
        ({"objective": "robust"}, "objective=robust needs preference.smoothing"),
        ({"objective": "sft", "preference.beta": 0.2}, "preference.beta=0.2 is not used"),
        ({"lora.dropout": 0.1}, "lora.dropout=0.1 does not go with objective=dpo"),
        ({"objective": "kto", "batch_size": 1}, "batch_size=1 is too small for objective=kto"),
        (
            {"preference.undesirable": 2.0},
            "preference.undesirable=2.0 is not used by objective=dpo",
        ),
        ({"objective": "kto"}, "rows.jsonl:1: found the fields"),
        ({"objective": "sft"}, "set objective=dpo"),
    ],
)
def test_mistakes_are_one_line(flags, tmp_path, capsys, changes, words):
    assert train.main(flags(tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0], error


def step_memory(config):
    run = opening.open_run(config)
    plan = state.make_plan(run, 64)
    frozen = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=run.shardings[path])
        for path, leaf in run.leaves.items()
        if path not in run.chosen
    }
    with jax.set_mesh(run.mesh):
        planned = run.task.plan(run.opened)
        step = compiling.make_step(run, plan, run.task.objective(run.opened, planned))
        batch = abstract_batch(planned.shapes, run.mesh)
        compiled = step.lower(state.abstract_state(run, plan.tx), frozen, batch).compile()
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def test_b5_lora_dpo_needs_the_memory_of_lora_sft_at_the_same_tokens(make_folder, make_config):
    folder, sizes = make_folder(hidden_size=128, intermediate_size=256), {}
    for name, seq_len in (("sft", 256), ("dpo", 128)):
        config = make_config(folder, {"seq_len": seq_len, "batch_size": 8, "pack": True})
        sizes[name] = step_memory(config | {"objective": name})
    assert 0.9 < sizes["dpo"] / sizes["sft"] < 1.1, sizes
