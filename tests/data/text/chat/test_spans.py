"""Trained spans of conversations, in vendors' templates and in templates with blocks."""

import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.data.text.chat.records import Conversation
from jaxft.data.text.chat.rows import encode_rendered
from jaxft.data.text.chat.spans import find_answers
from tests.data.text.chat.vendors import GOLDEN, make_chat

CASES = [(name, talk) for name in GOLDEN["templates"] for talk in GOLDEN["conversations"]]


@pytest.mark.parametrize(("name", "talk"), CASES)
def test_a1_a3_a6_golden_ids_and_spans(name, talk):
    chat, facts = make_chat(name), GOLDEN["templates"][name]
    conversation, golden = Conversation(GOLDEN["conversations"][talk]), facts["rendered"][talk]
    if not isinstance(golden, str):
        with pytest.raises(UserError, match=f"row: the template {name}.*{golden['raises']}"):
            find_answers(chat, conversation, "row")
        return
    made = find_answers(chat, conversation, "row")
    assert made.text == golden
    assert [list(answer[:2]) for answer in made.answers] == facts["spans"][talk]
    ((row, merged),) = encode_rendered(chat, [made])
    assert row.tokens.tolist() == chat.tokenizer(golden, add_special_tokens=False)["input_ids"]
    assert not merged and not made.add_eos
    parts = [golden[start:stop] for start, stop in facts["spans"][talk]]
    edges = np.flatnonzero(np.diff(np.pad(row.trained.astype(int), 1))).reshape(-1, 2)
    assert [chat.tokenizer.decode(row.tokens[a:b]) for a, b in edges] == parts
    bos = chat.tokenizer.bos_token_id
    assert bos is None or row.tokens.tolist().count(bos) <= 1
