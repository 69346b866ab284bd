"""Ids against tables: refused where PyTorch would raise, let through where it would not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxft import train
from jaxft.core.errors import UserError
from jaxft.data.text.vocabulary import check_ids
from jaxft.tasks import Request
from jaxft.verify import main as verify
from tests.whole import open_run

ROOT = Path(__file__).resolve().parents[3]
NEW = "<|new|>"  # id 320, of a model with 320 rows
FITS = {"prompt": "a cat", "completion": " is a dog"}
ODD = {"prompt": "a cat", "completion": f" is {NEW}"}


@pytest.fixture(scope="module")
def larger(make_folder):
    """A model whose tokenizer has a token more than the table has rows, never resized."""
    folder = make_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([NEW], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def opened(make_config, tmp_path):
    """`opened(folder, train records, eval records)`: the task, without a run."""

    def task(folder, rows, held_out=None, **changes):
        places = {}
        for name, records in {"train": rows, "eval": held_out or rows}.items():
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in records))
            places[f"data.{name}"] = f"jsonl:{file}"
        return open_run(make_config(folder, {**places, **changes}))

    return task


def edited(folder, tmp_path, file, **keys):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    found = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**found, **keys}))
    return copy


def test_only_ids_in_use_are_checked(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    check_ids([], 10, tokenizer, "x")
    check_ids(np.array([[3, 9]]), 10, tokenizer, "x")
    with pytest.raises(
        UserError, match=r"x: token .+ has the id 10, .*vocabulary.* 10 rows.*tokenizer has 320"
    ):
        check_ids(np.array([[3], [10]]), 10, tokenizer, "x")


@pytest.mark.parametrize("name", ["train", "eval"])
def test_case_llm_01_a_row_with_a_token_beyond_the_table(larger, opened, name):
    """Transformers raises an IndexError; a record is named by its line."""
    sets = {"train": [FITS] * 3, "eval": [FITS] * 3}
    sets[name] = [FITS, ODD, FITS]
    words = rf"{name}\.jsonl:2: token '<\|new\|>' has the id 320.* 320 rows .*321 tokens"
    with pytest.raises(UserError, match=words):
        opened(larger, sets["train"], sets["eval"])


def test_case_llm_01_a_label_and_a_prompt_beyond_the_table(larger, opened):
    labelled = [{"text": "a", "label": "cat"}, {"text": "b", "label": NEW}]
    with pytest.raises(UserError, match="id 320"):
        opened(larger, labelled)
    task = opened(larger, [FITS])
    with pytest.raises(UserError, match=r"prompt 'say <\|new\|>': token .* id 320"):
        task.preview.complete({}, ["say " + NEW], Request())


def test_a_tokenizer_with_more_tokens_than_rows_serves_where_none_of_them_is_used(larger, opened):
    assert len(opened(larger, [FITS]).train) == 1


def test_a_table_with_more_rows_than_the_tokenizer_has_tokens(make_folder, opened):
    """Phi's and Qwen's tables are padded to round sizes."""
    assert len(opened(make_folder(vocab_size=384), [FITS]).train) == 1


@pytest.mark.parametrize("key", ["eos_token", "pad_token", "bos_token"])
def test_special_tokens_beyond_the_table(larger, opened, tmp_path, key):
    """A BOS that the tokenizer does not add is in no row, so it is let through."""
    folder = edited(larger, tmp_path, "tokenizer_config.json", **{key: NEW})
    if key == "bos_token":
        assert opened(folder, [FITS]).train is not None
        return
    with pytest.raises(UserError, match=r"token '<\|new\|>' has the id 320"):
        opened(folder, [FITS])


def test_a_pad_id_of_config_json_beyond_the_table(larger, opened, tmp_path):
    folder = edited(larger, tmp_path, "config.json", pad_token_id=320)
    with pytest.raises(UserError, match=r"pad_token_id=320, but vocab_size=320"):
        opened(folder, [FITS])


def test_case_llm_01_the_run_stops_before_training(larger, make_flags, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": f"a cat {NEW}"}) + "\n")
    flags = make_flags(larger, {"data.train": f"jsonl:{file}", "data.eval": ""})
    config = ["--config", str(ROOT / "configs" / "llm.py")]
    assert train.main([*config, "--workdir", str(tmp_path / "run"), *flags]) == 2
    assert "vocab" in capsys.readouterr().err


def test_case_llm_01_verify_counts_tokens_beyond_the_table(larger, tmp_path, capsys):
    folder = Path(shutil.copytree(larger, tmp_path / "copy"))
    assert verify([str(folder)]) == 0
    assert "1 tokens of the tokenizer have no row in the model, first '<|new|>'" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("key", ["eos_token", "pad_token"])
def test_case_llm_01_verify_refuses_special_tokens_beyond_the_table(larger, tmp_path, key, capsys):
    folder = edited(larger, tmp_path, "tokenizer_config.json", **{key: NEW})
    assert verify([str(folder)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{key}: token '<|new|>' has the id 320" in error
    assert not (folder / "parity.json").exists()


def test_w3_an_id_of_a_picture_is_refused_by_the_name_of_its_token(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    check_ids([5, 6], 320, tokenizer, "x", (7,))
    with pytest.raises(UserError, match=r"x: it holds .*, which stands for a picture"):
        check_ids([5, 7], 320, tokenizer, "x", (7,))
