"""The chat template: stop tokens, the prompt of a sample, templates that fail or never end."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxft.core.errors import UserError
from jaxft.data.text.chat import format as chat_format
from jaxft.data.text.chat.format import ChatFormat, open_chat
from jaxft.data.text.chat.records import Conversation
from tests.data.text.chat.vendors import GOLDEN, make_chat
from tests.data.text.test_dataset import load_rows, make_tokenizer

USER = {"role": "user", "content": "Hi"}
ENDS = {"gptoss": ["<|end|>", "<|return|>"]}
# A generation prompt asks for a thought or a channel, which plain answers do not have.
OTHER_OPENINGS = {
    "qwen3": "<think>\n\n</think>\n\n",
    "gptoss": "<|channel|>final<|message|>",
}


def in_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_a5_stop_ids_are_the_ends_of_turns_and_openings_are_those_of_training(name):
    chat, facts = make_chat(name), GOLDEN["templates"][name]
    ends = ENDS.get(name, [facts["end_of_turn"]])
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.style.stops)) == ends
    prompt = facts["rendered"]["generation_prompt"]
    assert chat.opening("Hi", thinks=True) == prompt
    own = prompt.removesuffix("<think>\n") + OTHER_OPENINGS.get(name, "")
    assert chat.opening("Hi", thinks=False) == own


def test_a9_the_hash_is_that_of_the_source():
    one, other = make_chat("llama3"), make_chat("qwen2_5")
    assert len(one.sha256) == 64 and one.sha256 != other.sha256
    assert ChatFormat(one.tokenizer, {"default": "x"}, "named").sha256 != one.sha256


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[0].name.first }}", "has no attribute 'name'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 // 0 }}", "division"),
    ],
)
def test_templates_that_fail_are_named_with_the_row(source, reason):
    chat = ChatFormat(make_tokenizer(), source, "the template")
    with pytest.raises(UserError, match=f"^a.jsonl:3: the template cannot .*{reason}") as caught:
        chat.render(Conversation([USER]), [USER], "a.jsonl:3")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("run", [lambda work: work(), in_thread])
def test_a_template_that_never_ends_is_stopped(monkeypatch, run):
    monkeypatch.setattr(chat_format, "TIME_LIMIT", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    chat = ChatFormat(make_tokenizer(), loop, "the template")
    row = {"messages": [USER, {"role": "assistant", "content": "a"}]}

    def load():
        text = r"rows\.jsonl:1: the template does not end within 0\.2 s"
        with pytest.raises(UserError, match=text):
            load_rows([row], chat.tokenizer, seq_len=8, chat=chat)
        return True

    assert run(load)


def test_other_threads_render_and_are_not_interrupted_later():
    """The time limit ends with the block, even if it runs out at that moment."""
    talk, text = Conversation([USER]), "<bos><start_of_turn>user\nHi<end_of_turn>\n"
    gemma = make_chat("gemma")

    def render():
        assert gemma.render(talk, [USER], "row") == text
        for _ in range(200):
            with contextlib.suppress(TimeoutError), chat_format._time_limit(1e-4):
                time.sleep(1e-4)
            sum(range(1000))  # an exception that arrives here would end the thread
        return "not interrupted"

    assert in_thread(render) == "not interrupted"
    assert threading.active_count() < 50, "timers end"


def test_the_config_key_names_the_format(tmp_path):
    bare, file = make_tokenizer(), tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}")
    assert open_chat(bare, "auto", "m") is None and open_chat(bare, "off", "m") is None
    made = open_chat(bare, str(file), "m")
    assert made is not None and made.render(Conversation([USER]), [USER], "row") == "Hi"
    with pytest.raises(UserError, match="chat=on, but m has no chat template"):
        open_chat(bare, "on", "m")
    with pytest.raises(UserError, match="chat='yes' must be auto, on, off or a file"):
        open_chat(bare, "yes", "m")
    with pytest.raises(UserError, match=r"chat=.*none\.jinja: cannot read the template"):
        open_chat(bare, str(tmp_path / "none.jinja"), "m")


def test_messages_without_a_template_are_refused_with_the_fix():
    row = {"messages": [USER, {"role": "assistant", "content": "a"}]}
    for form in (row, {"prompt": [USER], "completion": row["messages"][1:]}):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: .* set chat=FILE\.jinja"):
            load_rows([form], make_tokenizer(), seq_len=8)
