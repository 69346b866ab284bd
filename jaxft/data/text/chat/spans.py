"""Trained characters of a rendered conversation: each answer and the first stop token after it.

The conversation is rendered once as it is (A1). Its answers are found in that text by rendering it
again with a sentinel in the place of each answer, then by the generation prompt, else the template
is refused. `{% generation %}` blocks of a template are used and checked against this.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxft.core.errors import UserError
from jaxft.data.text.chat.format import SENTINEL, ChatFormat
from jaxft.data.text.chat.records import WITHOUT_CONTENT, Conversation, Message

THOUGHT_END = "</think>"


class Answer(NamedTuple):
    """The span [start, stop) of an answer in a text, and whether `stop` is behind its stop token.

    prompted: the span starts where the generation prompt ends, with a thought or a tool call.
    """

    start: int
    stop: int
    closed: bool = False
    prompted: bool = False


class Rendered(NamedTuple):
    """A conversation as text with its trained answers.

    add_eos: the template ends the last answer without a stop token, so EOS follows the text.
    lost_thoughts: number of answers whose thought is not in the text.
    """

    text: str
    answers: list[Answer]
    add_eos: bool
    lost_thoughts: int


def find_answers(chat: ChatFormat, talk: Conversation, where: str) -> Rendered:
    """Render a conversation and find its trained answers.

    Raises UserError, which names `where` and the template, where they cannot be found.
    """
    text = chat.render(talk, talk.messages, where)
    indices = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
    at_once = _by_sentinels(chat, talk, text, indices, where)
    trained = [i for i in indices if i >= talk.first]
    if at_once is not None:
        found: list[Answer | None] = list(at_once[len(indices) - len(trained) :])
    else:
        found = [_alone(chat, talk, text, i, where) for i in trained]
    if chat.marks_answers:
        found = _by_blocks(chat, talk, text, trained, found, where)
    for index, answer in zip(trained, found, strict=True):
        if answer is None:
            raise UserError(
                f"{where}: {chat.name} changes the answer of turn {index + 1} so that it is not"
                " found in the text; give a template with {% generation %} around the answers"
                " (chat=FILE.jinja)"
            )
    answers = [_closed(chat, text, answer) for answer in found if answer is not None]
    pairs = zip(trained, answers, strict=True)
    lost = sum(_loses_thought(talk.messages[i], text[one.start : one.stop]) for i, one in pairs)
    add_eos = not answers[-1].closed and trained[-1] == len(talk.messages) - 1
    if add_eos:
        answers[-1] = answers[-1]._replace(stop=len(text))
    return Rendered(text, answers, add_eos, lost)


def _by_sentinels(
    chat: ChatFormat, talk: Conversation, text: str, indices: Sequence[int], where: str
) -> list[Answer] | None:
    """Return the answers by one more rendering, with all of them replaced by sentinels.

    Returns None if the text between the sentinels does not fit around the contents.
    """
    if not all(_is_plain(talk.messages[i]) for i in indices):
        return None
    marks = [SENTINEL.format(n) for n in range(len(indices))]
    masked = list(talk.messages)
    for index, mark in zip(indices, marks, strict=True):
        masked[index] = {**masked[index], "content": mark}
    rest, fixed = chat.render(talk, masked, where), []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            return None
        fixed.append(before)
    answers, at = [], 0
    if not text.startswith(fixed[0]):
        return None
    for number, index in enumerate(indices):
        start = at + len(fixed[number])
        after = fixed[number + 1] if number + 1 < len(fixed) else rest
        content = talk.messages[index]["content"]
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        kept = [form for form in forms if text.startswith(form + after, start)]
        if not kept:
            return None
        at = start + len(kept[0])
        answers.append(Answer(start, at))
    return [_with_lead(chat, text, one) for one in answers] if at + len(rest) == len(text) else None


def _alone(
    chat: ChatFormat, talk: Conversation, text: str, index: int, where: str
) -> Answer | None:
    """Return one answer by renderings in which the other turns are as they are.

    It is the part of the content that the template keeps, or all that follows the generation
    prompt: a thought, tool calls. Returns None if neither is found.
    """
    message, mark = talk.messages[index], SENTINEL.format(index)
    masked = {"role": "assistant", "content": mark}
    try:
        turns = [*talk.messages[:index], masked, *talk.messages[index + 1 :]]
        before, found, after = chat.render(talk, turns, where).partition(mark)
        if not found:
            return None  # as in templates that only write contents of several parts
    except UserError:  # such as a tool's result without the call, which the mask has replaced
        before, found, after = "", "", ""
    end = len(text) - len(after)
    if found and _is_plain(message) and text.startswith(before) and text.endswith(after):
        kept = text[len(before) : end]
        if kept.strip() and kept in message["content"]:
            return _with_lead(chat, text, Answer(len(before), end))
    prompt = chat.render(talk, talk.messages[:index], where, prompt=True)
    if not text.startswith(prompt) or _spoken(message) not in text[len(prompt) :]:
        return None
    stop = chat.stop_pattern.match(after)
    tail = after[stop.end() :] if stop else after
    if found and text.endswith(tail) and len(prompt) + len(tail) < len(text):
        return Answer(len(prompt), len(text) - len(tail), bool(stop), prompted=True)
    whole = chat.render(talk, talk.messages[: index + 1], where)
    if text.startswith(whole) and len(whole.rstrip()) > len(prompt):
        return Answer(len(prompt), len(whole.rstrip()), closed=True, prompted=True)
    return None


def _by_blocks(
    chat: ChatFormat,
    talk: Conversation,
    text: str,
    trained: Sequence[int],
    found: Sequence[Answer | None],
    where: str,
) -> list[Answer | None]:
    """Return the answers by the template's own `{% generation %}` blocks.

    A block may begin with a part of the generation prompt and end with blanks, which are not
    trained. Raises UserError for a block that leaves out a part of an answer.
    """
    blocks = _blocks(chat, talk, text, where)
    n_answers = sum(message["role"] == "assistant" for message in talk.messages)
    answers: list[Answer | None] = []
    for index, answer, block in zip(trained, found, blocks[-len(trained) :], strict=False):
        begin, stop = block
        prompt = chat.render(talk, talk.messages[:index], where, prompt=True)
        start = max(begin, len(prompt)) if text.startswith(prompt) else begin
        if answer is None:
            own = text[start:stop].rstrip()
            whole = Answer(start, start + len(own), own.endswith(chat.stop_tokens), prompted=True)
            answers.append(whole if _spoken(talk.messages[index]) in own else None)
        elif begin <= answer.start and (answer.closed or answer.stop <= stop):
            # The block may train a thought that the template writes before the content, and the
            # generation prompt may supply the first tag of one in the content.
            own = text.startswith(prompt) and bool(text[start : answer.start].strip())
            own = own or start > answer.start
            start = start if own else answer.start
            answers.append(answer._replace(start=start, prompted=answer.prompted or own))
    if len(blocks) != n_answers or len(answers) != len(trained):
        raise UserError(
            f"{where}: {chat.name} has {{% generation %}} blocks that leave out a part of the"
            " answers; put one around each whole answer and its stop token"
        )
    return answers


def _blocks(chat: ChatFormat, talk: Conversation, text: str, where: str) -> list[tuple[int, int]]:
    """Return the characters of each `{% generation %}` block, widened to whole tokens."""
    ids, mask = chat.marked(talk, where)
    made = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if made["input_ids"] != ids:
        raise UserError(f"{where}: {chat.name} renders one conversation in two ways")
    starts, ends = token_spans(made["offset_mapping"])
    edges = np.flatnonzero(np.diff(np.pad(np.asarray(mask, np.int8), 1))).reshape(-1, 2)
    return [(int(starts[first]), int(ends[after - 1])) for first, after in edges.tolist()]


def token_spans(
    offsets: Sequence[tuple[int, int]],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return first character and end of each token.

    Byte-level tokenizers trim the blanks at the start of a token from its offsets. They are added
    again: a token begins where the one before ends.
    """
    places = np.asarray(offsets, np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(places[:, 1])
    return np.minimum(places[:, 0], np.append(0, ends)[: len(ends)]), ends


def _is_plain(message: Message) -> bool:
    """Return True for an answer that is its content alone."""
    return not any(message.get(name) for name in WITHOUT_CONTENT)


def _spoken(message: Message) -> str:
    """Return the content after its thought, which a template has to write for training."""
    return message.get("content", "").rpartition(THOUGHT_END)[2].strip()


def _with_lead(chat: ChatFormat, text: str, answer: Answer) -> Answer:
    """Add the blanks before an answer that the model writes itself."""
    lead = chat.style.lead
    start = answer.start - len(lead)
    return answer._replace(start=start) if text[start : answer.start] == lead else answer


def _closed(chat: ChatFormat, text: str, answer: Answer) -> Answer:
    """Add the first stop token after an answer, with the blanks before it."""
    end = None if answer.closed else chat.stop_pattern.match(text, answer.stop)
    return answer._replace(stop=end.end(), closed=True) if end else answer


def _loses_thought(message: Message, kept: str) -> bool:
    thought = message.get("reasoning_content") or THOUGHT_END in message.get("content", "")
    return bool(thought) and THOUGHT_END not in kept
