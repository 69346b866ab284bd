"""A tokenizer comes from its folder as transformers reads it, or its absence is one line."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from jaxft.core.errors import UserError
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.verify import component
from jaxft.weights.folders.transformers import Source
from jaxft.weights.transfer import Part
from tests.tiny_pipelines import make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
MARK = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
OLD = {  # as the published pipelines have it
    "add_prefix_space": False,
    "bos_token": {"__type": "AddedToken", "content": "<|startoftext|>", **MARK},
    "do_lower_case": True,
    "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", **MARK},
    "errors": "replace",
    "model_max_length": 77,
    "pad_token": "!",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": {"__type": "AddedToken", "content": "<|endoftext|>", **MARK},
}
TABLES = ("vocab.json", "merges.txt")


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    """A language model's tokenizer, to break."""
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "broken"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """All the files that any release of a CLIP tokenizer has, and its size."""
    work = tmp_path_factory.mktemp("clip")
    made, vocab = make_tokenizer(work / "files")
    made.save_pretrained(work / "files")
    return work / "files", vocab


def edited(folder, file, **keys):
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**found, **keys}))


def refused(folder, *words):
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_clip_ids_begin_and_end_and_are_padded(tmp_path):
    made, vocab = make_tokenizer(tmp_path / "made")
    made.save_pretrained(tmp_path / "folder")
    tokenizer = load_tokenizer(tmp_path / "folder")
    ids = tokenizer("ab", padding="max_length", truncation=True, max_length=6).input_ids
    assert len(ids) == 6 and ids[0] == vocab - 2 and ids[3] == vocab - 1


def test_a_folder_without_one_is_named(tmp_path):
    refused(tmp_path, str(tmp_path), "copy tokenizer.json")


def test_case_llm_11_a_tokenizer_json_of_a_newer_library(folder):
    found = json.loads((folder / "tokenizer.json").read_text())
    found["model"]["type"] = "FutureBPE"
    (folder / "tokenizer.json").write_text(json.dumps(found))
    refused(folder, "tokenizer.json: tokenizers ", "pip install -U tokenizers")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", b""])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_files_that_are_no_json_object_are_named(folder, file, content):
    (folder / file).write_bytes(content)
    refused(folder, str(folder / file))


def test_a_sentencepiece_model_alone_names_the_package(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    for name in ("PreTrainedTokenizerFast", "LlamaTokenizer"):
        edited(folder, "tokenizer_config.json", tokenizer_class=name)
        refused(folder, "tokenizer.model", "pip install sentencepiece")


def test_a_class_that_is_not_there_falls_back_as_in_transformers(folder):
    wanted = load_tokenizer(folder)("a cat")["input_ids"]
    edited(folder, "tokenizer_config.json", tokenizer_class="NobodysTokenizer")
    assert load_tokenizer(folder)("a cat")["input_ids"] == wanted


def test_a_class_that_is_no_tokenizer(folder):
    edited(folder, "tokenizer_config.json", tokenizer_class="GPT2Config")
    with pytest.raises(UserError):
        load_tokenizer(folder)


def test_case_llm_04_a_folders_code_neither_runs_nor_asks(folder, tmp_path, monkeypatch):
    """Transformers would ask on a terminal, and run it at a "y"."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').write('x')\nclass Own:\n    pass\n")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    )
    load_tokenizer(folder)  # the code of config.json is not needed
    edited(
        folder,
        "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.Own", "own.Own"]},
    )
    refused(folder, "tokenizer_config.json: auto_map", "never run")
    assert not ran.exists()


# Classes that run no code of a folder and have no such key: (file, caller).
RUNS_NO_CODE = {
    ("verify/llm.py", "PeftModel"),  # on a model that is loaded already
    ("tools/trl_chat_peer.py", "PeftModel"),
    ("tools/bench_diffusion.py", "UNet2DConditionModel"),  # diffusers' models
    ("verify/component.py", "stock_class(library, name)"),  # the key is given to transformers' own
}


def test_case_llm_04_fault_7_w7_every_loader_is_told_to_trust_no_code():
    checked, exempt = 0, set()
    for path in [*(ROOT / "jaxft").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        text = path.read_text()
        assert not re.search(r"trust_remote_code\W+True", text), path
        for node in ast.walk(ast.parse(text)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if not called.endswith(".from_pretrained"):
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if "trust_remote_code" not in given:
                name = path.relative_to(ROOT).as_posix().removeprefix("jaxft/")
                exempt.add((name, called.removesuffix(".from_pretrained")))
                continue
            assert given["trust_remote_code"] == "False", f"{path}:{node.lineno}"
            checked += 1
    assert exempt == RUNS_NO_CODE and checked >= 8


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_case_llm_04_fault_7_components_are_told_too(library, tmp_path, monkeypatch):
    given = {}

    class Stock:
        @staticmethod
        def from_pretrained(folder, **options):
            given.update(options)
            return torch.nn.Identity(), {}

    monkeypatch.setattr(component, "stock_class", lambda *_: Stock)
    files = {"config.json": b"{}", "model.safetensors": b""}
    source = Source("model", {}, None, files, tmp_path)
    part = Part("", "model", None, (), {})
    subject = component.ComponentSubject("text", source, part, None, (library, "X"), None, None)
    component.open_stock(subject)
    assert given.get("trust_remote_code") is (False if library == "transformers" else None)


@pytest.mark.parametrize(
    "files",
    [
        ("tokenizer.json",),
        ("vocab.json", "merges.txt"),
        ("vocab.json", "merges.txt", "tokenizer.json"),
        ("vocab.json", "merges.txt", "tokenizer_config.json"),
        ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"),
        ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
    ],
    ids=" ".join,
)
def test_clip_folders_of_every_age_read_as_diffusers_reads_them(clip, tmp_path, files):
    """A pipeline's index names the class; the folder's own files may not."""
    source, vocab = clip
    for file in files:
        if (source / file).is_file():
            shutil.copy(source / file, tmp_path)
    if "added_tokens.json" in files:
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<old>": vocab}))
    if "tokenizer_config.json" in files:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(OLD))
    ours, theirs = load_tokenizer(tmp_path, "clip"), CLIPTokenizer.from_pretrained(tmp_path)
    how = {"padding": "max_length", "max_length": 9, "truncation": True}
    for text in ("ab C", "a <old> b", "x" * 20, ""):
        assert ours(text, **how).input_ids == theirs(text, **how).input_ids
    assert len(ours) == len(theirs)
