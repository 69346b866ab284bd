"""Config keys of the language-model task. Light to import, so that a mistyped key fails at once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LLMOptions:
    """Options of the language-model task.

    seq_len: in tokens. pack: short examples of a batch share rows, and the sums stay the same.
    template: turns {"text", "label"} records into prompt and completion. cache: folder for the
    token ids of large sets ("" keeps all in memory). columns: fields of the records to rename, such
    as "prompt=question,completion=answer".
    """

    seq_len: int
    pack: bool
    template: str
    eval_examples: int
    cache: str = "runs/cache"
    columns: str = ""
