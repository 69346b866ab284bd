"""Config keys of the language-model task alone; light, so that a mistyped key fails at once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LLMOptions:
    """seq_len in tokens; `pack` lets short examples of a batch share rows (the sums stay the same);
    `template` turns {"text", "label"} records into prompt and completion; `cache` is a folder for
    the token ids of large sets ("" keeps all in memory)."""

    seq_len: int
    pack: bool
    template: str
    eval_examples: int
    cache: str = "runs/cache"
