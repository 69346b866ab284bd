"""The chat template of a checkpoint: renders conversations, and ends answers with stop tokens."""

import ctypes
import hashlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.core.errors import UserError
from jaxft.data.text.chat.records import Conversation, Message

TIME_LIMIT = 10.0  # seconds in which a template renders a conversation
# A content that stands for an answer. Templates do not trim characters of private use.
SENTINEL = "\ue000answer-{}\ue001"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


class Style(NamedTuple):
    """The text around an answer.

    lead: blanks between the generation prompt and the answer, which the model writes itself.
    stops: ids of the tokens that end an answer.
    """

    lead: str
    stops: tuple[int, ...]


@dataclass(frozen=True)
class ChatFormat:
    """A chat template with its tokenizer.

    template: Jinja source, or several by name as old checkpoints have them. name: the place of the
    template, for messages.
    """

    tokenizer: Any
    template: str | Mapping[str, str]
    name: str

    @property
    def sha256(self) -> str:
        """Return the hash of the template's source."""
        source = self.template
        text = source if isinstance(source, str) else json.dumps(dict(source), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def marks_answers(self) -> bool:
        """Return True for a template with `{% generation %}` blocks."""
        return _GENERATION.search(str(self.template)) is not None

    @cached_property
    def stop_tokens(self) -> tuple[str, ...]:
        """Return all special tokens, the longest first. A stop token is one of them."""
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special} | {self.tokenizer.eos_token}
        return tuple(sorted(texts, key=lambda text: (-len(text), text)))

    @cached_property
    def stop_pattern(self) -> re.Pattern[str]:
        """Return a pattern of blanks and the special token after them."""
        return re.compile(rf"\s*({'|'.join(map(re.escape, self.stop_tokens))})")

    @cached_property
    def style(self) -> Style:
        """Return the text around the answers of a conversation of two rounds."""
        marks = [SENTINEL.format(i) for i in range(2)]
        messages = [m for mark in marks for m in (_turn("user", "Hi"), _turn("assistant", mark))]
        where = self.name
        text = self.render(Conversation(messages), messages, where)
        prompt = self.render(Conversation(messages), messages[:1], where, prompt=True)
        begin = text.find(marks[0])
        lead = text[len(prompt) : begin] if text.startswith(prompt) else ""
        ends = [self.stop_pattern.match(text, text.find(mark) + len(mark)) for mark in marks]
        names = dict.fromkeys(end[1] for end in ends if end)
        ids = self.tokenizer.convert_tokens_to_ids(list(names))
        return Style("" if lead.strip() else lead, tuple(ids))

    @cached_property
    def markers(self) -> tuple[int, ...]:
        """Return the ids of the special tokens in a conversation of one round."""
        messages = [_turn("user", "Hi"), _turn("assistant", "Hi")]
        text = self.render(Conversation(messages), messages, self.name)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return tuple(sorted(special & {*ids}))

    def render(
        self,
        talk: Conversation,
        messages: Sequence[Message],
        where: str,
        *,
        prompt: bool = False,
    ) -> str:
        """Return messages as text, with the tools and options of `talk`.

        prompt: add the generation prompt. Raises UserError, which names `where`, if the template
        fails or takes longer than TIME_LIMIT.
        """
        with self._failing(where):
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=talk.tools,
                chat_template=self._source(talk),
                add_generation_prompt=prompt,
                tokenize=False,
                **talk.options,
            )

    def marked(self, talk: Conversation, where: str) -> tuple[list[int], list[int]]:
        """Return the ids of a conversation, and the mask of its `{% generation %}` blocks."""
        with self._failing(where):
            made = self.tokenizer.apply_chat_template(
                list(talk.messages),
                tools=talk.tools,
                chat_template=self._source(talk),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **talk.options,
            )
        return made["input_ids"], made["assistant_masks"]

    def opening(self, prompt: str, thinks: bool) -> str:
        """Return the text before the answer to a prompt.

        It is the text before such an answer in training: the generation prompt if answers begin
        with a thought (`thinks`), else the text before a plain answer, which may hold an empty
        thought.
        """
        where, user = f"prompt {prompt[:60]!r}", _turn("user", prompt)
        talk = Conversation([user])
        if thinks:
            return self.render(talk, [user], where, prompt=True)
        mark = SENTINEL.format(0)
        text = self.render(talk, [user, _turn("assistant", mark)], where)
        return text[: text.rindex(mark)].removesuffix(self.style.lead)

    def _source(self, talk: Conversation) -> str:
        if isinstance(self.template, str):
            return self.template
        return self.tokenizer.get_chat_template(None, talk.tools)

    @contextmanager
    def _failing(self, where: str) -> Iterator[None]:
        """Turn every error of the template into one line that names it."""
        try:
            with _time_limit(TIME_LIMIT):
                yield
        except TimeoutError:
            raise UserError(
                f"{where}: {self.name} does not end within {TIME_LIMIT:g} s; give another template"
                " with chat=FILE.jinja"
            ) from None
        except Exception as error:  # a template may raise any error
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{where}: {self.name} cannot render this conversation: {reason}; change the row,"
                " or give another template with chat=FILE.jinja"
            ) from None


def open_chat(tokenizer: Any, chat: str, name: str) -> ChatFormat | None:
    """Return the chat format of the config key `chat`, or None.

    chat: "auto" and "on" are the template of the checkpoint `name`, "off" is none, and everything
    else a file. Raises UserError for "on" without a template and for an unreadable file.
    """
    own = tokenizer.chat_template
    if chat == "off" or (chat == "auto" and not own):
        return None
    if chat in ("auto", "on"):
        if not own:
            raise UserError(f"chat=on, but {name} has no chat template; give chat=FILE.jinja")
        return ChatFormat(tokenizer, own, f"the chat template of {name}")
    if not chat.endswith(".jinja"):
        raise UserError(f"chat={chat!r} must be auto, on, off or a file FILE.jinja")
    try:
        return ChatFormat(tokenizer, Path(chat).expanduser().read_text(encoding="utf-8"), chat)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"chat={chat}: cannot read the template: {reason}") from None


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the calling thread after `seconds`.

    A signal interrupts the main thread alone. Other threads need a timer, which costs a thread.
    """
    if threading.current_thread() is not threading.main_thread():
        with _timer(seconds):
            yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _timer(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this thread, between two of its bytecodes, after `seconds`."""
    thread = ctypes.c_ulong(threading.get_ident())
    interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
    lock, over = threading.Lock(), False

    def stop() -> None:
        with lock:
            if not over:
                interrupt(thread, ctypes.py_object(TimeoutError))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            over = True
        interrupt(thread, None)  # an exception that was set too late to be raised in the block
