"""Conversations of chat records: messages, ShareGPT, and prompt and completion as turns."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.core.errors import UserError
from jaxft.data.text.alpaca import alpaca_request
from jaxft.data.text.templates import check_text

ROLES = ("system", "developer", "user", "assistant", "tool")
FIRST_ROLES = ("system", "developer")  # only before the first turn
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
WITHOUT_CONTENT = ("tool_calls", "reasoning_content", "thinking")  # fields of an answer

Message = dict[str, Any]


class Conversation(NamedTuple):
    """A conversation for a chat template.

    first: index of the first message that may be trained. Earlier answers belong to the prompt.
    options: variables of the template, from the field `chat_template_kwargs`.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    options: Mapping[str, Any] = {}
    first: int = 0


def is_chat(record: Mapping[str, Any], kind: Sequence[str]) -> bool:
    """Return True for a record that only a chat template can turn into text."""
    named = kind[0] in ("messages", "conversations")
    return named or (kind[0] == "prompt" and any(_is_list(record.get(field)) for field in kind))


def read_conversation(record: Mapping[str, Any], where: str) -> Conversation:
    """Return the conversation of a record. Raises UserError, which names `where`, for a bad one."""
    first = 0
    if "messages" in record:
        messages = _messages(record["messages"], "messages", where)
    elif "conversations" in record:
        turns = _items(record["conversations"], "conversations", where)
        messages = [_sharegpt(turn, f"{where}: turn {i + 1}") for i, turn in enumerate(turns)]
        messages = _messages(messages, "conversations", where)
    elif "completion" not in record and "instruction" in record:
        values = [record["instruction"], record.get("input") or "", record.get("output")]
        pairs = zip(values, ("instruction", "input", "output"), strict=True)
        request, context, output = (check_text(value, name, where) for value, name in pairs)
        request = alpaca_request(request, context)
        messages = [{"role": "user", "content": request}, {"role": "assistant", "content": output}]
    else:
        prompt = _turns(record, "prompt", "user", where)
        messages = [*prompt, *_turns(record, "completion", "assistant", where)]
        first = len(prompt)
    _check_order(messages, where)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] < first:
        raise UserError(f"{where}: no assistant turn is left to train; add one, or delete the row")
    tools = _parsed(record.get("tools"), "tools", list, where)
    options = _parsed(record.get("chat_template_kwargs"), "chat_template_kwargs", dict, where)
    return Conversation(messages, tools or None, options or {}, first)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _items(value: Any, field: str, where: str) -> list[Any]:
    if not _is_list(value) or not len(value):
        found = (
            "an empty list" if _is_list(value) else f"{type(value).__name__} {str(value)[:40]!r}"
        )
        raise UserError(
            f"{where}: field {field!r} must be a list of turns such as"
            f' [{{"role": "user", "content": "Hi"}}], found {found}'
        )
    return list(value)


def _turns(record: Mapping[str, Any], field: str, role: str, where: str) -> list[Message]:
    """Return the turns of a prompt or completion: a list of messages, or one string."""
    if field not in record:
        raise UserError(f"{where}: field {field!r} is missing; the records before it have it")
    value = record[field]
    if _is_list(value):
        return _messages(value, field, where)
    return [{"role": role, "content": check_text(value, field, where)}]


def _sharegpt(turn: Any, where: str) -> Message:
    """Return a turn {"from", "value"} of ShareGPT as a message."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        if isinstance(turn, Mapping) and "role" in turn:
            return dict(turn)  # messages under ShareGPT's field name
        raise UserError(
            f'{where}: expected {{"from": "human", "value": "..."}}, found {turn!r:.60}'
        )
    if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
        raise UserError(
            f"{where}: unknown speaker {turn['from']!r}; expected one of"
            f" {', '.join(SHAREGPT_ROLES)}"
        )
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}


def _messages(value: Any, field: str, where: str) -> list[Message]:
    """Return messages with plain contents, without fields that are null."""
    turns = _items(value, field, where)
    return [_message(turn, f"{where}: turn {i + 1}") for i, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise UserError(f'{where}: expected {{"role": ..., "content": ...}}, found {turn!r:.60}')
    role = turn["role"]
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
    made = {name: item for name, item in turn.items() if item is not None}
    extra = any(made.get(name) for name in WITHOUT_CONTENT)
    if "content" in made:
        made["content"] = _content(made["content"], where)
    elif not (role == "assistant" and extra):
        raise UserError(f"{where}: the {role} turn has no content; give a string")
    if role == "assistant" and not extra and not made["content"].strip():
        raise UserError(f"{where}: the assistant turn is empty; write an answer, or delete the row")
    return made


def _content(value: Any, where: str) -> str:
    """Return a content as one string. Text parts are joined."""
    if not _is_list(value):
        return check_text(value, "content", where)
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in value]
    if other := [kind for kind in kinds if kind != "text"]:
        raise UserError(
            f"{where}: field 'content' has a part of type {other[0]!r}; only text is trained, so"
            " every part must be of type 'text'"
        )
    return "".join(check_text(part.get("text"), "text", where) for part in value)


def _check_order(messages: Sequence[Message], where: str) -> None:
    """Raise UserError for a turn that cannot follow the one before."""
    before = "start"
    allowed = {
        "system": ("start",),
        "developer": ("start", "system"),
        "user": ("start", *FIRST_ROLES, "assistant", "tool"),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if before not in allowed[role]:
            place = "at the start" if before == "start" else f"after {before}"
            raise UserError(
                f"{where}: turn {number} is {role} {place}; expected system first, then user and"
                " assistant in turn; join turns of one role, or delete the row"
            )
        before = role


def _parsed(value: Any, field: str, kind: type, where: str) -> Any:
    """Return a list or object, which some sets write as a JSON string. None stays None."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: field {field!r} is invalid JSON ({error})") from None
    if value is not None and not isinstance(value, kind):
        raise UserError(
            f"{where}: field {field!r} must be a {kind.__name__}, found {type(value).__name__}"
        )
    return value
