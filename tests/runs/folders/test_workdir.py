"""The folder of a run: its config, resolved as the command resolves it, and who may write in it."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.core.config import flatten_config, load_config, read_config, resolve_config
from jaxft.core.errors import UserError
from jaxft.runs.folders.workdir import claim_workdir, differing_keys, read_config_file
from jaxft.tasks import OPTIONS

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "configs").glob("*.py"))
RESOLVED = {file.stem: load_config(str(file), (), OPTIONS) for file in SHIPPED}


@pytest.fixture
def config():
    return load_config(str(ROOT / "configs" / "llm.py"))


def changed(config, overrides):
    return resolve_config(config, overrides, OPTIONS)


# ---- a resolved config and its own config.json ------------------------------------------------


def same(made, again):
    """Equal, in the types of every leaf too."""
    return made == again and repr(made) == repr(again)


@pytest.mark.parametrize("name", RESOLVED)
def test_case_img_15_a_resolved_config_equals_its_config_json_read_back(name, tmp_path):
    """sample.prompts=() against [] kept picture runs from starting on two hosts."""
    made = RESOLVED[name]
    claim_workdir(tmp_path, made, OPTIONS)
    again = read_config_file(tmp_path, OPTIONS)
    assert same(made, again) and differing_keys(made, again) == []
    own = OPTIONS[made["task"]]
    assert read_config(made, own) == read_config(again, own)
    (tmp_path / "metrics.jsonl").touch()
    claim_workdir(tmp_path, made, OPTIONS)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = {
    str: TEXTS,
    bool: st.sampled_from(["True", "false"]),
    int: st.integers().map(str),
    float: st.one_of(
        st.integers(-(10**6), 10**6).map(str),
        st.floats(allow_nan=False, allow_infinity=False).map(repr),
    ),
    list: st.lists(TEXTS, max_size=3).flatmap(
        lambda texts: st.sampled_from([repr(texts), repr(tuple(texts))])
    ),
}


@st.composite
def overridden(draw):
    """A shipped config's name, and a few of its keys with values of their types."""
    name = draw(st.sampled_from(sorted(RESOLVED)))
    leaves = flatten_config(RESOLVED[name])
    keys = draw(st.lists(st.sampled_from(sorted(leaves)), unique=True, max_size=6))
    kept = [key for key in keys if key != "task"]
    return name, [(key, draw(VALUES[type(leaves[key])])) for key in kept]


@given(overridden())
@settings(max_examples=200, deadline=None)
def test_any_overrides_resolve_to_what_json_gives_back(case):
    name, overrides = case
    made = resolve_config(RESOLVED[name], overrides, OPTIONS)
    again = resolve_config(json.loads(json.dumps(made)), (), OPTIONS)
    assert same(made, again) and same(made, json.loads(json.dumps(made)))
    assert made.keys() == RESOLVED[name].keys()


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), TEXTS, st.floats(allow_nan=False, allow_infinity=False)
)
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(TEXTS, inner, max_size=3),
    ),
    max_leaves=8,
)


@given(st.dictionaries(TEXTS.filter(lambda key: key != "task"), NESTED, max_size=4))
@settings(max_examples=100, deadline=None)
def test_values_of_any_kind_and_depth_resolve_to_what_json_gives_back(values):
    made = resolve_config({**RESOLVED["llm"], "mine": values})
    assert same(made, json.loads(json.dumps(made)))


def test_an_int_of_the_file_is_the_float_that_its_key_wants(config):
    made = changed({**config, "optim": {**config["optim"], "clip": 1}}, [("optim.clip", "0.5")])
    assert made["optim"]["clip"] == 0.5
    made = changed({**config, "optim": {**config["optim"], "clip": 1}}, [])
    assert repr(made["optim"]["clip"]) == "1.0"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("x"), {1}])
def test_a_value_that_json_cannot_hold_is_refused_by_its_key(config, value):
    with pytest.raises(UserError, match=r"config key lora\.alpha=.*(finite|a (Pos|set)|Path)"):
        changed({**config, "lora": {**config["lora"], "alpha": value}}, [])


def test_a_run_folder_of_before_a_key_was_there_still_resumes(tmp_path, config):
    old = json.loads(json.dumps(config))
    del old["optim"]["ema"], old["lora"]["dropout"]
    old["optim"]["clip"] = 1
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "metrics.jsonl").touch()
    claim_workdir(tmp_path, config)


# ---- claiming -----------------------------------------------------------------------------------


def test_a_claimed_folder_keeps_its_config(tmp_path, config):
    claim_workdir(tmp_path / "a" / "b", config)
    assert read_config_file(tmp_path / "a" / "b") == config
    (tmp_path / "a" / "b" / "metrics.jsonl").touch()
    claim_workdir(tmp_path / "a" / "b", config)


def test_a_folder_of_another_config_lists_what_differs(tmp_path, config):
    config = changed(config, [])  # every key, as a command resolves it
    claim_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").touch()
    other = changed(config, [("optim.lr", "0.5"), ("seed", "3")])
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 0\.5; seed: 0 -> 3") as caught:
        claim_workdir(tmp_path, other)
    assert str(tmp_path) in str(caught.value)
    assert read_config_file(tmp_path) == config


def test_a_first_try_that_never_trained_does_not_hold_the_folder(tmp_path, config):
    """A wrong model path is mended with another config and the same command otherwise."""
    claim_workdir(tmp_path, changed(config, [("model", "no/such/folder")]))
    claim_workdir(tmp_path, config)
    assert read_config_file(tmp_path) == config


def test_a_folder_for_checkpoints_without_one_does_not_hold_it(tmp_path, config):
    """The data were smaller than a batch: the folder was made, and nothing saved."""
    claim_workdir(tmp_path, config, OPTIONS)
    (tmp_path / "checkpoints").mkdir()
    claim_workdir(tmp_path, changed(config, [("batch_size", "4")]), OPTIONS)
    (tmp_path / "checkpoints" / "2").mkdir()
    with pytest.raises(UserError, match="batch_size: 4 -> 8"):
        claim_workdir(tmp_path, config, OPTIONS)


def test_differing_keys_see_types_and_absent_leaves():
    old, new = {"a": 1, "b": {"c": True}}, {"a": 1.0, "b": {"d": 2}}
    assert differing_keys(old, new) == [
        "a: 1 -> 1.0",
        "b.c: True -> 'absent'",
        "b.d: 'absent' -> 2",
    ]
    assert differing_keys(old, old) == []


def test_a_folder_that_cannot_be_written(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be written .*; choose another"):
        claim_workdir(tmp_path / "file" / "run", config)


def test_a_corrupt_config_file(tmp_path, config):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        claim_workdir(tmp_path, config)


def test_a_folder_without_config_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        read_config_file(tmp_path)


def test_what_claim_wrote_is_plain_json(tmp_path, config):
    claim_workdir(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize("others", [(), ("model.safetensors",)], ids=["alone", "with weights"])
def test_fault_1_the_config_of_a_model_is_not_replaced(config, tmp_path, others):
    text = '{"model_type": "llama"}'
    (tmp_path / "config.json").write_text(text)
    for name in others:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"config.json is not the config of a run"):
        claim_workdir(tmp_path, config)
    assert (tmp_path / "config.json").read_text() == text


# ---- a longer total ---------------------------------------------------------------------------


def claimed(tmp_path, config, total):
    claim_workdir(tmp_path, changed(config, [("total", total)]), OPTIONS)
    (tmp_path / "metrics.jsonl").touch()
    return read_config_file(tmp_path, OPTIONS)


def test_a_longer_total_continues_the_run_of_a_folder(tmp_path, config):
    claimed(tmp_path, config, "10_steps")
    assert claimed(tmp_path, config, "25_steps")["total"] == "25_steps"
    assert [entry.name for entry in tmp_path.iterdir() if ".tmp" in entry.name] == []


@pytest.mark.parametrize("total", ["9_steps", "3_epochs", "900_examples"])
def test_a_total_that_is_not_longer_is_refused(tmp_path, config, total):
    claimed(tmp_path, config, "10_steps")
    with pytest.raises(UserError, match=r"--config.total=N_steps with N above 10"):
        claimed(tmp_path, config, total)
    assert read_config_file(tmp_path, OPTIONS)["total"] == "10_steps"


def test_a_longer_total_changes_no_other_key(tmp_path, config):
    claimed(tmp_path, config, "10_steps")
    with pytest.raises(UserError, match="seed: 0 -> 1; total: '10_steps' -> '20_steps'"):
        claimed(tmp_path, changed(config, [("seed", "1")]), "20_steps")
