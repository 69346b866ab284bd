"""Trained spans of conversations, in vendors' templates and in templates with blocks."""

import numpy as np
import pytest
from tokenizers import AddedToken

from jaxft.core.errors import UserError
from jaxft.data.text.chat.format import ChatFormat
from jaxft.data.text.chat.records import Conversation
from jaxft.data.text.chat.rows import encode_rendered
from jaxft.data.text.chat.spans import find_answers
from tests.data.text.chat.vendors import GOLDEN, make_chat, template_text
from tests.data.text.test_dataset import make_tokenizer

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


def spans(chat, messages, **fields):
    made = find_answers(chat, Conversation(messages, **fields), "row")
    return [made.text[answer.start : answer.stop] for answer in made.answers], made


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "gemma", "phi3", "gptoss", "qwen3"])
def test_a2_blocks_of_generation_give_the_same_answers(name):
    """trl's training variants begin a block with a part of the header, and end it with blanks."""
    for talk in ("two_turns", "spaces"):
        messages = GOLDEN["conversations"][talk]
        plain, _ = spans(make_chat(name), messages)
        blocks, _ = spans(make_chat(name, "_training"), messages)
        # These begin with what the generation prompt does not supply, and the block trains it.
        for more in ("<think>\n\n</think>\n\n", "<|channel|>final<|message|>"):
            blocks = [text.removeprefix(more) for text in blocks]
        assert blocks == plain


def test_a2_a_block_that_leaves_out_an_answer_is_refused():
    source = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content[:2] }}{% endgeneration %}{{ m.content[2:] }}<eot>{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = custom(source)
    with pytest.raises(UserError, match=r"row: custom has .* leave out a part of the answers"):
        find_answers(chat, Conversation([user("q"), answer("long answer")]), "row")


def custom(source):
    tokenizer = make_tokenizer.__wrapped__()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<eot>", "<user>", "<a>")])
    return ChatFormat(tokenizer, source, "custom")


def test_a2_a_template_that_rewrites_answers_is_refused_by_name():
    chat = custom(
        "{{ messages | length }}{% for m in messages %}<user>{{ m.content | upper }}<eot>"
        "{% endfor %}"
    )
    with pytest.raises(UserError, match="row: custom changes the answer of turn 2") as caught:
        find_answers(chat, Conversation([user("q"), answer("words")]), "row")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["smolvlm", "smolvlm_training"])
def test_a2_a_template_without_the_contents_is_refused(name):
    """It iterates over parts of a content, and writes nothing of a string."""
    with pytest.raises(UserError, match=f"the template {name} changes the answer of turn 2"):
        find_answers(custom_vendor(name), Conversation([user("q"), answer("words")]), "row")


def test_a3_a_tag_that_the_generation_prompt_supplies_is_not_trained():
    chat = custom_vendor("deepseek_r1_distill_training")
    found, made = spans(chat, GOLDEN["conversations"]["think"])
    assert found[0].startswith("add\n</think>\n\n4") and made.answers[0].prompted


def custom_vendor(name):
    return ChatFormat(
        make_chat("deepseek_r1_distill").tokenizer, template_text(name), f"the template {name}"
    )


def test_a3_blanks_that_the_prompt_does_not_supply_are_trained():
    """As in templates of Llama 2 and Mistral, which write a space before each answer."""
    chat = custom(
        "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}<a>"
        "{% else %} {{ m.content }} <eot>{% endif %}{% endfor %}"
    )
    found, _ = spans(chat, [user("q"), answer("a"), user("r"), answer("b")])
    assert found == [" a <eot>", " b <eot>"]
    assert chat.opening("q", thinks=False) == "<user>q<a>"


def test_a4_without_a_stop_token_the_next_role_or_eos_is_trained():
    chat = custom(
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<a>' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    found, made = spans(chat, [user("q"), answer("a"), user("r"), answer("b")])
    assert found == ["a<user>", "b"] and made.add_eos
    ((row, _),) = encode_rendered(chat, [made])
    assert row.tokens[-1] == chat.tokenizer.eos_token_id and row.trained[-1]


def test_a3_answers_of_a_prompt_are_not_trained():
    found, _ = spans(make_chat("llama3"), GOLDEN["conversations"]["two_turns"], first=3)
    assert found == ["4<|eot_id|>"]


def test_a2_tool_calls_and_thoughts_are_trained_from_the_generation_prompt_on():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [user("2+2?"), answer("", tool_calls=[call]), {"role": "tool", "content": "4"}]
    (first, last), made = spans(make_chat("qwen3"), [*messages, answer("It is 4")])
    assert first.startswith("<tool_call>\n") and first.endswith("</tool_call><|im_end|>")
    assert last == "It is 4<|im_end|>" and made.answers[0].prompted
    (thought,), _ = spans(make_chat("qwen3"), [user("q"), answer("4", reasoning_content="add")])
    assert thought == "<think>\nadd\n</think>\n\n4<|im_end|>"


def test_a3_thoughts_that_the_template_drops_are_counted():
    for name, lost in (("deepseek_r1_distill", 2), ("qwen3", 1), ("llama3", 0)):
        assert spans(make_chat(name), GOLDEN["conversations"]["think"])[1].lost_thoughts == lost
