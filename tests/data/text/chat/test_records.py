"""Conversations of records as people write them, and one line for each that is wrong."""

import json

import pytest

from jaxft.core.errors import UserError
from jaxft.data.text.chat.records import read_conversation

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S, T = {"role": "system", "content": "s"}, {"role": "tool", "content": "4"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}


def test_tools_and_options_may_be_json_strings():
    row = {"messages": [U, A], "tools": json.dumps([{"name": "add"}])}
    row["chat_template_kwargs"] = {"enable_thinking": False}
    talk = read_conversation(row, "row")
    assert talk.tools == [{"name": "add"}] and talk.options == {"enable_thinking": False}
    assert read_conversation({"messages": [U, A], "tools": ""}, "row").tools is None


def test_a_prompt_of_messages_holds_answers_that_are_not_trained():
    talk = read_conversation({"prompt": [U, A, U], "completion": [A]}, "row")
    assert talk.first == 3 and talk.messages == [U, A, U, A]
    mixed = read_conversation({"prompt": [S, U], "completion": "a"}, "row")
    assert mixed.messages == [S, U, A] and mixed.first == 2


def test_sharegpt_roles_and_text_parts_are_mapped():
    turns = [{"from": name, "value": name} for name in ("system", "human", "gpt")]
    talk = read_conversation({"conversations": turns}, "row")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    joined = read_conversation({"messages": [{**U, "content": parts}, A]}, "row")
    assert joined.messages[0]["content"] == "ab"


def test_tool_calls_need_no_content():
    messages = read_conversation({"messages": [U, CALL, T, A]}, "row").messages
    assert "content" not in messages[1] and messages[3] == A


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([U, {**A, "content": " "}], "turn 2: the assistant turn is empty"),
        ([U, {**A, "content": None}], "turn 2: the assistant turn has no content"),
        ([A, U, A], "turn 1 is assistant at the start"),
        ([U, A, A], "turn 3 is assistant after assistant"),
        ([U, U, A], "turn 2 is user after user"),
        ([U, A, S, U, A], "turn 3 is system after assistant"),
        ([U, {**A, "role": "bot"}], "turn 2: unknown role 'bot'; expected one of system"),
        ([U, {**A, "content": 4}], "turn 2: field 'content' must be a string, found int"),
        (
            [U, {**A, "content": [{"type": "image"}]}],
            "turn 2: field 'content' has a part of type 'image'; only text",
        ),
        ([U], "no assistant turn is left to train"),
        ([], "field 'messages' must be a list of turns .* found an empty list"),
        ("hi", "field 'messages' must be a list of turns .* found str 'hi'"),
        ([U, "hi"], "turn 2: expected .* found 'hi'"),
        ([U, {**A, "content": "\ud800"}], "turn 2: field 'content' has a lone surrogate"),
    ],
)
def test_bad_conversations_are_one_line(messages, message):
    with pytest.raises(UserError, match=f"^a.jsonl:7: {message}") as caught:
        read_conversation({"messages": messages}, "a.jsonl:7")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "bob", "value": "x"}]}, "turn 1: unknown speaker 'bob'"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 1: unknown speaker"),
        ({"messages": [U, A], "tools": "[" * 100_000}, "field 'tools' is invalid JSON"),
        ({"conversations": [{"value": "x"}]}, "turn 1: expected .*from.*human"),
        ({"conversations": [{"from": "human"}]}, "turn 1: the user turn has no content"),
        ({"prompt": [U]}, "field 'completion' is missing"),
        ({"prompt": [U, A], "completion": [U]}, "no assistant turn is left to train"),
        ({"messages": [U, A], "tools": "[nope"}, "field 'tools' is invalid JSON"),
        ({"messages": [U, A], "tools": {}}, "field 'tools' must be a list, found dict"),
        ({"instruction": "q", "output": 3}, "field 'output' must be a string, found int"),
    ],
)
def test_bad_records_are_one_line(record, message):
    with pytest.raises(UserError, match=f"^row: {message}") as caught:
        read_conversation(record, "row")
    assert "\n" not in str(caught.value)
