"""Hostile tokenizers end in a process of their own, and known ones start none."""

import json
import shutil
import time

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from jaxft.core.errors import UserError
from jaxft.tasks.common import probing
from jaxft.tasks.common.probing import try_tokenizer
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.weights.files.gguf_tokenizer import CUTS


def grown(times):
    return normalizers.Sequence([normalizers.Replace("a", "a" * 10)] * times)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


HOSTILE = {
    "backtracking": ("pre_tokenizer", split(r"(a+)+$|(a|aa)+b"), "retry-limit"),
    "its own letters": ("pre_tokenizer", split(r"(ŧ+)+$|(ŧ|ŧŧ)+b"), "retry-limit"),
    "growth": ("normalizer", grown(9), "needed more than|took longer"),
}


def write(tmp_path, name, part):
    tokenizer = Tokenizer(models.BPE({"a": 0, "!": 1}, []))
    setattr(tokenizer, name, part)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("case", HOSTILE)
def test_item_10_hostile_tokenizers_are_refused_in_time(tmp_path, case, monkeypatch):
    monkeypatch.setattr(probing, "TRIAL_SECONDS", 5)
    name, part, reason = HOSTILE[case]
    file = write(tmp_path, name, part)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"tokenizer.json: encoding .* \(.*({reason})"):
        try_tokenizer(file)
    with pytest.raises(UserError, match="encoding a short text failed in a trial"):
        load_tokenizer(tmp_path)
    assert time.monotonic() - began < 20


def test_an_unknown_but_sound_tokenizer_is_tried_and_read(tokenizer_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "odd")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "x+y"}, "content": "z"}
    file.write_text(json.dumps(content))
    tried, run = [], probing.subprocess.run
    spied = lambda *words, **named: tried.append(1) or run(*words, **named)  # noqa: E731
    monkeypatch.setattr(probing.subprocess, "run", spied)
    began = time.monotonic()
    try_tokenizer(file)
    assert time.monotonic() - began < 2  # 0.1 s on an idle machine
    assert load_tokenizer(folder)("xxy")["input_ids"] and len(tried) == 2


@pytest.mark.parametrize("cut", [*CUTS, "clip", "metaspace"])
def test_known_tokenizers_start_no_process(tmp_path, cut, monkeypatch):
    monkeypatch.setattr(probing.subprocess, "run", None)
    if cut == "metaspace":
        part = pre_tokenizers.Metaspace()
    elif cut == "clip":
        part = pre_tokenizers.Sequence([split(probing.CLIP_WORDS), pre_tokenizers.ByteLevel()])
    else:
        part = pre_tokenizers.Sequence([split(pattern) for pattern in CUTS[cut]])
    try_tokenizer(write(tmp_path, "pre_tokenizer", part))


def test_demos_and_folders_without_tokenizer_json_start_no_process(tokenizer_folder, monkeypatch):
    monkeypatch.setattr(probing.subprocess, "run", None)
    try_tokenizer(tokenizer_folder / "tokenizer.json")
    try_tokenizer(tokenizer_folder / "absent.json")
