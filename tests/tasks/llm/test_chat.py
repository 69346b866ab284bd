"""A run on conversations: its lines, its samples in the same format, its export."""

import contextlib
import io
import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from jaxft import evaluate, sample, train
from jaxft.tasks.llm.preview import DecoderPreview
from tests.conftest import CHATML

CONFIG = ["--config", "configs/llm.py"]


@pytest.fixture(scope="module")
def flags(chat_folder, make_flags, tmp_path_factory):
    """Flags of a run on one conversation, which the model learns by heart."""
    file = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "it is"}]
    file.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns}) + "\n")
    keys = {
        "data.train": f"jsonl:{file}", "data.eval": f"jsonl:{file}", "batch_size": 2,
        "total": "60_steps", "optim.lr": 1e-2, "lora.rank": 0, "every.save": "0_steps",
        "every.sample": "60_steps", "cache": "", "optim.schedule": "constant",
    }  # fmt: skip
    return make_flags(chat_folder, keys)


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory, quick):
    work, out = tmp_path_factory.mktemp("chat") / "run", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert train.main([*CONFIG, "--workdir", str(work), *flags]) == 0
    return work, out.getvalue()


def test_the_first_lines_and_the_manifest_name_the_template(finished, chat_folder):
    work, printed = finished
    assert f"trained tokens; the chat template of {chat_folder}\n" in printed
    facts = json.loads((work / "manifest.json").read_text())["data"]
    assert len(facts["chat_template_sha256"]) == 64 and facts["trained_tokens"] > 0


def test_a5_samples_answer_in_the_format_of_training(finished, capsys):
    work, printed = finished
    arguments = ["--workdir", str(work), "--prompt=hi", "--max_new=12"]
    assert sample.main(arguments) == 0
    assert capsys.readouterr().out == "hi\n-> it is\n"
    assert sample.main([*arguments, "--raw"]) == 0
    assert "->" not in capsys.readouterr().out
    turn = "'<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n'"
    shown = f"{turn} -> 'it is' (reference 'it is')"
    assert printed.count(shown) == 1, "two records have this prompt"
    first, last = (json.loads(x.read_text()) for x in sorted((work / "samples").glob("texts-*")))
    assert (first["step"], last["step"]) == (0, 60) and len(first["rows"]) == 1
    assert last["rows"][0][1:] == ["it is", "it is"] != first["rows"][0][1:]


def test_an_answer_without_text_has_a_reason(chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    why = partial(DecoderPreview._why_empty, SimpleNamespace(tokenizer=tokenizer))
    assert why("", [end], []) == "(empty: it ended at once, as '<|im_end|>' followed the prompt)"
    assert why("", [end, end], [end]) == "(empty: only special tokens: <|im_end|> <|im_end|>)"
    assert why("a", [end], []) == ""


def test_evaluation_uses_the_format(finished, capsys):
    assert evaluate.main(["--workdir", str(finished[0])]) == 0
    report = json.loads(next(finished[0].glob("evaluation-*.json")).read_text())
    assert report["loss"] < 0.1


def test_a5_the_export_ends_turns(finished, chat_folder):
    made = json.loads((finished[0] / "export" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "export")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in made["eos_token_id"]
    assert tokenizer.chat_template == CHATML


def test_a_file_replaces_the_template_and_is_exported(flags, tmp_path, quick, capsys):
    file, work = tmp_path / "own.jinja", tmp_path / "run"
    file.write_text(CHATML.replace("<|im_start|>{{", "<|im_start|>the {{"))
    more = [f"--config.chat={file}", "--config.total=0_steps"]
    assert train.main([*CONFIG, "--workdir", str(work), *flags, *more]) == 0
    assert f"; {file}" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(work / "export")
    assert tokenizer.chat_template == file.read_text()


def test_chat_off_refuses_messages_in_one_line(flags, tmp_path, capsys):
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "run"), *flags, "--config.chat=off"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "chat.jsonl:1: 'messages' hold turns of a chat" in lines[0]


@pytest.mark.parametrize("trainable", ["", r".*lora_.*|embed_tokens\.embedding|lm_head\..*"])
def test_a11_markers_that_were_added_to_a_base_model_are_named(
    chat_folder, make_folder, flags, tmp_path, quick, capsys, trainable
):
    """transformers fills their rows with the mean. Rows that train are not named."""
    base = tmp_path / "base"
    shutil.copytree(chat_folder, base)
    model = LlamaForCausalLM.from_pretrained(make_folder(vocab_size=320))
    model.resize_token_embeddings(330)
    model.save_pretrained(base)
    more = ["--config.lora.rank=4", "--config.total=1_steps", "--config.export.kind=none"]
    more.append(f"--config.trainable={trainable}")
    for folder in (base, chat_folder):
        arguments = [*CONFIG, "--workdir", str(tmp_path / folder.parent.name), *flags, *more]
        assert train.main([*arguments, f"--config.model={folder}"]) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warned) == (not trainable)
    for line in warned:
        assert f"the chat template of {base} uses <|im_start|>,<|im_end|>, whose rows" in line
        assert "train them with lora.tokens='<|im_start|>,<|im_end|>'" in line
