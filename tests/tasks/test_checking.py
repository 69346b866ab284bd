"""Checks of a config before jax starts: what has to be refused, and what has to be left alone."""

import json
from pathlib import Path

import pytest

from jaxft.core.config import load_config
from jaxft.core.errors import UserError
from jaxft.tasks import OPTIONS, get_task
from jaxft.tasks.checking import EXPORT_KINDS, check_early, check_length
from tests.weights.files.test_gguf_header import write

ROOT = Path(__file__).resolve().parents[2]


def config(name, **changes):
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return load_config(str(ROOT / "configs" / f"{name}.py"), pairs, OPTIONS)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
    return str(tmp_path / "model")


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "good"}\n')
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("seq_len", [128, 129])
@pytest.mark.parametrize(
    ("stated", "scaled"),
    [
        ({}, False),
        ({"rope_scaling": None}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, False),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, True),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, True),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, True),
    ],
)
def test_rows_longer_than_the_positions_are_refused_but_with_scaled_rope(stated, scaled, seq_len):
    plain = {"max_position_embeddings": 128, **stated}
    for content in (plain, {"text_config": plain}):
        if seq_len == 128 or scaled:
            check_length(content, seq_len, "x/config.json")
            continue
        with pytest.raises(UserError, match=r"seq_len=129 is more than .*=128 of x/config\.json"):
            check_length(content, seq_len, "x/config.json")
    check_length(stated, seq_len, "a config without the number")


def test_the_positions_of_files_and_packages_are_checked_too(tmp_path, model, monkeypatch):
    package = tmp_path / "made_up_gguf"
    package.mkdir()
    (package / "__init__.py").write_text("")
    write(package / "m.gguf")  # 96 positions
    monkeypatch.syspath_prepend(tmp_path)
    weights = Path(model) / "model.safetensors"
    weights.write_bytes(b"")
    found = {"pip:made-up-gguf": 96, str(package / "m.gguf"): 96, str(weights): 128, model: 128}
    for spec, longest in found.items():
        check_early(config("llm", model=spec, seq_len=longest))
        with pytest.raises(UserError, match=rf"seq_len={longest + 1} is more .*={longest} of .*/m"):
            check_early(config("llm", model=spec, seq_len=longest + 1))
    with pytest.raises(UserError, match="pip:numpy: expected one model inside, found none"):
        check_early(config("llm", model="pip:numpy"))
    check_early(config("diffusion", model="pip:numpy", data__train="demo:emoji/train"))


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("model", "org/name"),
        ("model", "org/name/subfolder"),
        ("data__train", "hf:org/name"),
        ("data__train", "tfds:glue/sst2"),
        ("data__train", "demo:novel/train + demo:supersense/train"),
        ("data__train", "0.7*demo:novel/train + 0.3*hf:org/name:train"),
        ("data__eval", ""),
    ],
)
def test_what_may_be_elsewhere_is_left_alone(key, spec, model):
    check_early(config("llm", **{"model": model, key: spec}))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "llm",
            {"data__train": "0.7*demo:novel/train + 0.3*none.jsonl"},
            "data.train: .*none.jsonl",
        ),
        ("llm", {"data__eval": "demo:novel/test"}, "data.eval: .*demo:novel/valid"),
        ("llm", {"data__eval": "folder:/"}, "data.eval: unknown data source"),
        ("diffusion", {"prior__data": "folder:none"}, "prior.data: .*none"),
        ("autoencoder", {"data__train": "wds:none-*.tar"}, r"data.train: .*none-\*.tar"),
        ("image_tokens", {"model": "demo:emoji"}, "demo:emoji-tokens"),
        ("janus", {}, "model is empty"),
    ],
)
def test_places_that_are_not_there_are_named_with_their_key(name, changes, words, model):
    changes = {"model": model, **changes} if name == "llm" else changes
    with pytest.raises(UserError, match=words):
        check_early(config(name, **changes))


@pytest.mark.parametrize("task", OPTIONS)
def test_the_kinds_of_exports_are_those_of_the_writers(task, model):
    assert set(EXPORT_KINDS[task]) == {*get_task(task).writers, "none"}
    with pytest.raises(UserError, match=r"export\.kind='ggml' is not one of"):
        check_early(config(task, model=model, export__kind="ggml"))


def test_labels_of_a_small_file_are_compared(model, rows):
    keys = {"model": model, "data__train": rows, "data__eval": ""}
    check_early(config("classify", **keys, labels="bad,good"))
    with pytest.raises(UserError, match=r"rows.jsonl:1: label 'good' is not one of labels=a,b"):
        check_early(config("classify", **keys, labels="a,b"))


def test_a_broken_config_json_is_left_to_the_model(tmp_path, rows):
    (tmp_path / "config.json").write_text("{")
    check_early(config("llm", model=str(tmp_path), data__train=rows, data__eval=""))
