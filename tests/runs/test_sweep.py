"""A sweep: each member is what a run of its own would have made, and a resume changes nothing."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file

from jaxft import evaluate, sample, train
from jaxft.core.config import load_config
from jaxft.core.errors import UserError
from jaxft.runs.opening import open_run
from jaxft.runs.sweep import BY_MATRIX
from jaxft.tasks import OPTIONS
from jaxft.weights.folders.transformers import open_source
from tests.interrupted import timeless
from tests.runs.test_train import CONFIG
from tests.weights.adapters.peft_adapters import hf, logits, near, opened, torch_logits

SWEEP = "optim.lr=5e-3,2e-2 lora.rank=2,4 seed=0,3"
NAMES = [
    f"lr{lr}-rank{rank}-seed{seed}" for lr in ("5e-3", "2e-2") for rank in (2, 4) for seed in (0, 3)
]
SHORT = "optim.lr=5e-3,2e-2 lora.rank=2,4 seed=3"
# All rows are in every batch, so that runs with other seeds train on the same ones.
KEYS = {
    "sweep": SWEEP, "batch_size": 40, "pack": False, "total": "4_steps", "every.save": "2_steps",
    "lora.alpha": 8.0, "export.kind": "adapter",
    "optim.weight_decay": 0.1, "optim.warmup": "2_steps",
}  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder()


@pytest.fixture(scope="module")
def swept(folder, make_flags, tmp_path_factory, quick):
    work = tmp_path_factory.mktemp("runs") / "sweep"
    assert train.main([*CONFIG, "--workdir", str(work), *make_flags(folder, KEYS)]) == 0
    return work


def compare(swept, work, name, atol=1e-5):
    """A member of a sweep beside its own run: losses of steps and evaluations, and the factors."""
    for key in ("loss", "eval_loss"):
        ours, own = (
            [one[k] for one in timeless(place) if k in one]
            for place, k in ((swept, f"{key}/{name}"), (work, key))
        )
        assert len(own) == {"loss": 4, "eval_loss": 2}[key]
        np.testing.assert_allclose(ours, own, rtol=1e-5)
    ours, own = (load_file(place / WEIGHTS) for place in (swept / "export" / name, work / "export"))
    assert ours.keys() == own.keys()
    for key, wanted in own.items():
        assert ours[key].shape == wanted.shape
        np.testing.assert_allclose(ours[key], wanted, rtol=1e-5, atol=atol, err_msg=key)


def own_run(folder, make_flags, work, name, **changes):
    lr, rank, seed = re.fullmatch("lr(.*)-rank(.*)-seed(.*)", name).groups()
    values = {"optim.lr": lr, "lora.rank": rank, "seed": seed}
    flags = make_flags(folder, {**KEYS, "sweep": "", **values, **changes})
    assert train.main([*CONFIG, "--workdir", str(work), *flags]) == 0


def test_a_member_equals_its_own_run(swept, folder, make_flags, tmp_path):
    """One whose rate, rank and seed are none of the sweep's own."""
    own_run(folder, make_flags, tmp_path, "lr5e-3-rank2-seed3")
    compare(swept, tmp_path, "lr5e-3-rank2-seed3")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_member_equals_its_own_run(swept, folder, make_flags, tmp_path, name):
    own_run(folder, make_flags, tmp_path, name)
    compare(swept, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optim.name": "schedule_free", "optim.schedule": "constant"},
        {"optim.name": "lion"},
        {"optim.name": "prodigy"},
        {"optim.ema": 0.5, "micro_batches": 5},
        {"lora.dropout": 0.2, "seed": 3},  # of the sweep too: the masks are by its seed
        {"base": "int8"},
        {"lora.dora": True, "lora.targets": "all-linear"},
        {"lora.targets": ".*q_proj|lm_head", "lora.rslora": True},
        {"lora.ranks": r".*q_proj=3/6, layers\.1\..*=1", "lora.layers": "0-1"},
    ],
    ids=str,
)
def test_other_settings_of_a_member(folder, make_flags, tmp_path, quick, changes):
    name = "lr2e-2-rank2-seed3"
    flags = make_flags(folder, {**KEYS, "sweep": SHORT, **changes})
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "a"), *flags]) == 0
    own_run(folder, make_flags, tmp_path / "b", name, **changes)
    compare(tmp_path / "a", tmp_path / "b", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_MATRIX)
def test_optimisers_of_whole_matrices(folder, make_flags, tmp_path, quick, name):
    """They sweep other keys than ranks. The rank is one whose moments adamw_8bit quantises.

    A moment at the edge between two of its codes may be rounded to the other one. The number then
    moves a part of a step farther, in any two runs that do not compute bit for bit the same.
    """
    keys = {**KEYS, "sweep": "optim.lr=5e-3,2e-2 seed=0,3", "optim.name": name, "lora.rank": 64}
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "a"), *make_flags(folder, keys)]) == 0
    own_run(folder, make_flags, tmp_path / "b", "lr2e-2-rank64-seed3", **{"optim.name": name})
    atol = 0.05 * 2e-2 if name == "adamw_8bit" else 1e-5
    compare(tmp_path / "a", tmp_path / "b", "lr2e-2-seed3", atol)


def test_a_resumed_sweep_equals_an_uninterrupted_one(swept, folder, make_flags, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(swept, work)
    shutil.rmtree(work / "checkpoints" / "4")
    shutil.rmtree(work / "export")
    assert train.main([*CONFIG, "--workdir", str(work), *make_flags(folder, KEYS)]) == 0
    assert timeless(work) == timeless(swept)
    for name in NAMES:
        a, b = (load_file(place / "export" / name / WEIGHTS) for place in (work, swept))
        assert all(a[key].tobytes() == b[key].tobytes() for key in a)


def test_a_member_is_a_folder_of_peft(swept, folder):
    """With its own rank, alpha and measures. The table has the best one first."""
    assert sorted(x.name for x in (swept / "export").iterdir() if x.is_dir()) == sorted(NAMES)
    records = [one for one in timeless(swept) if "eval_loss" in one]
    for name in NAMES:
        place = swept / "export" / name
        config = json.loads((place / "adapter_config.json").read_text())
        assert config["r"] == int(name[name.index("rank") + 4]) and config["lora_alpha"] == 8
        card = (place / "README.md").read_text()
        before, after = records[0]["eval_loss"], records[-1][f"eval_loss/{name}"]
        assert f"| loss | {before:.4g} | {after:.4g} |" in card
        assert "loss/" not in card and f"# sweep-{name}" in card
    theirs = PeftModel.from_pretrained(hf(folder), place)
    assert near(logits(*opened(place)), torch_logits(theirs))
    assert not near(torch_logits(theirs), torch_logits(hf(folder)))


def test_records_name_the_best_and_the_worst(swept):
    for record in timeless(swept):
        prefix = "eval_" if "eval_loss" in record else ""
        losses = [record[f"{prefix}loss/{name}"] for name in NAMES]
        assert record[f"{prefix}loss"] == min(losses) and record[f"{prefix}worst"] == max(losses)
    assert len(set(losses)) == len(NAMES), "each has a loss of its own"


def test_commands_on_a_sweep_answer_for_every_member(swept, capsys):
    best = min(NAMES, key=lambda name: timeless(swept)[-1][f"eval_loss/{name}"])
    assert evaluate.main(["--workdir", str(swept)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = lines[next(i for i, line in enumerate(lines) if line.startswith("member")) + 2 :]
    assert rows[0].startswith(best) and {row.split()[0] for row in rows[:8]} == set(NAMES)
    assert sample.main(["--workdir", str(swept), "--prompt=water", "--max_new=2"]) == 0
    shown = capsys.readouterr().out
    assert all(f"[{name}] water" in shown for name in NAMES)


@pytest.mark.usefixtures("quick")
def test_a_member_that_diverges_leaves_the_others_alone(folder, make_flags, tmp_path, capsys):
    keys = {**KEYS, "sweep": "optim.lr=1e-2,1e30", "optim.warmup": "0_steps"}
    assert train.main([*CONFIG, "--workdir", str(tmp_path), *make_flags(folder, keys)]) == 0
    steps = [one for one in timeless(tmp_path) if "loss" in one]
    assert [one["loss/lr1e30"] is None for one in steps] == [False, True, True, True]
    losses = [one["loss/lr1e-2"] for one in steps]
    assert [one["loss"] for one in steps] == losses and losses[-1] < losses[0]
    out = capsys.readouterr().out
    assert all(map(math.isfinite, losses)) and "worst not finite" in out
    assert "at 0.01 to 1e+30 (" in out and ", of the largest member\n" in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.rank": 0, "sweep": "seed=0,1"}, "needs lora.rank > 0"),
        ({"objective": "orpo"}, "is for objective=sft, not for orpo"),
        ({"export.kind": "merged"}, "would write the whole model 8 times; use export.kind=adapter"),
        ({"trainable": ".*lora_[ab]|norm.*"}, "alone, and not norm.scale; leave"),
        ({"optim.name": "muon"}, "sweep other keys, or take optim.name=adamw"),
        ({"lora.tokens": "<s>"}, "leave trainable and lora.tokens empty"),
        ({"sweep": "optim.lr=1"}, "is one adapter"),
        ({"sweep": "seed=0,4294967296"}, "seed=4294967296 must be at most"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("quick")
def test_what_no_sweep_can_have(folder, make_flags, tmp_path, capsys, changes, words):
    flags = make_flags(folder, {**KEYS, **changes})
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_an_adapter_that_goes_on_is_swept_by_its_rate(swept, folder, small_run, quick):
    """Its rank and alpha are those of the folder."""
    start = str(swept / "export" / "lr2e-2-rank4-seed3")

    def opened_with(sweep, model=folder, **start):
        keys = small_run(model, {**KEYS, **start, "sweep": sweep, "lora.alpha": 0.0})
        flags = [(key, str(value)) for key, value in keys.items()]
        return open_run(load_config(CONFIG[1], flags, OPTIONS))

    for place in ({"lora.from": start}, {"model": start}):
        rates = opened_with("optim.lr=1e-3,1e-2", **place).sweep.rates
        assert rates.tolist() == pytest.approx([0.1, 1])
    with pytest.raises(UserError, match=r"adapter_config\.json there; it holds lr\S+, .* such as"):
        opened_with("optim.lr=1e-3,1e-2", **{"lora.from": str(swept / "export")})
    with pytest.raises(UserError, match=r"config\.json: missing; it holds lr\S+, .* such as"):
        open_source(str(swept / "export"))
        with pytest.raises(ValueError, match="training continues an adapter, which has its own"):
            opened_with("seed=0,3", **place)
    with pytest.raises(ValueError, match=r"lora\.rank=2, but .* has rank 4"):
        opened_with("lora.rank=2,4", **{"lora.from": start})
    with pytest.raises(ValueError, match="training continues an adapter, which has its own"):
        opened_with("lora.rank=2,4", model=start)
