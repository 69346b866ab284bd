"""Config keys of the language-model task. Light to import, so that a mistyped key fails at once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LLMOptions:
    """Options of the language-model task.

    seq_len: in tokens. pack: short examples of a batch share rows, and the sums stay the same.
    template: turns {"text", "label"} records into prompt and completion. chat: "auto" renders
    conversations and prompt + completion rows by the chat template of the checkpoint, if it has
    one. "on" requires one, "off" uses none, and a file FILE.jinja replaces it. cache: folder for
    the token ids of large sets ("" keeps all in memory). columns: fields of the records to rename,
    such as "prompt=question,completion=answer".
    """

    seq_len: int
    pack: bool
    template: str
    eval_examples: int
    chat: str = "auto"
    cache: str = "runs/cache"
    columns: str = ""
