"""A tokenizer comes from its folder, or its absence is one line."""

import pytest
from tiny_pipelines import make_tokenizer

from jaxft.core.errors import UserError
from jaxft.tasks.tokens import load_tokenizer


def test_clip_ids_begin_and_end_and_are_padded(tmp_path):
    made, vocab = make_tokenizer(tmp_path / "made")
    made.save_pretrained(tmp_path / "folder")
    tokenizer = load_tokenizer(tmp_path / "folder")
    ids = tokenizer("ab", padding="max_length", truncation=True, max_length=6).input_ids
    assert len(ids) == 6 and ids[0] == vocab - 2 and ids[3] == vocab - 1


def test_a_folder_without_one_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
