"""Tokenizers of Hugging Face folders."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers

from jaxft.core.errors import UserError, near
from jaxft.tasks.common.probing import try_tokenizer

TOKENIZER_JSON = "tokenizer.json"
JSON_FILES = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "config.json",
)
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def load_tokenizer(folder: Path | str, kind: str | None = None) -> Any:
    """Return the tokenizer of a Hugging Face folder. The folder's own code never runs.

    `kind` is the model type whose tokenizer class reads the folder, such as "clip" for a pipeline
    of diffusers. Without it the folder's own files name the class. Raises UserError, which names
    the file, if transformers cannot read the folder, or `try_tokenizer` refuses it.
    """
    from transformers import AutoTokenizer  # takes seconds to import, so only when needed

    try_tokenizer(Path(folder) / TOKENIZER_JSON)
    given = {} if kind is None else {"tokenizer_type": kind}
    try:
        made: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **given
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # so are the panics of the tokenizers library
        raise _unreadable(Path(folder), error) from None
    if not hasattr(made, "get_vocab"):
        raise UserError(
            f"{folder}/tokenizer_config.json: tokenizer_class names {type(made).__name__}, which is"
            " no tokenizer; set it to PreTrainedTokenizerFast"
        )
    return made


def token_ids(tokenizer: Any, names: str, key: str) -> tuple[int, ...]:
    """Return the ids of tokens that a config key lists, divided by commas.

    Raises: UserError for a text that is not one token.
    """
    vocabulary, listed = tokenizer.get_vocab(), dict.fromkeys(map(str.strip, names.split(",")))
    for name in listed:
        if name not in vocabulary:
            hint = near(name, tokenizer.get_added_vocab(), "added tokens are")
            raise UserError(f"{key}: {name!r} is no token of the tokenizer; {hint}")
    return tuple(vocabulary[name] for name in listed)


def _unreadable(folder: Path, error: BaseException) -> UserError:
    """Return an error that names the faulty file, found by reading each file alone."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    present = [folder / name for name in JSON_FILES if (folder / name).is_file()]
    configs = {file.name: _json(file) for file in present}
    if "auto_map" in configs.get("tokenizer_config.json", {}):
        return UserError(
            f"{folder}/tokenizer_config.json: auto_map names code of the folder's own, which is"
            " never run; convert the tokenizer to tokenizer.json once, where you trust that code,"
            " and delete auto_map"
        )
    if TOKENIZER_JSON in configs:
        try:
            tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        except BaseException as inner:
            return UserError(
                f"{folder / TOKENIZER_JSON}: tokenizers {version('tokenizers')} cannot read it"
                f" ({inner}); a newer one may have written it: pip install -U tokenizers"
                " transformers"
            )
    elif pieces := [name for name in SENTENCEPIECE if (folder / name).is_file()]:
        return UserError(
            f"{folder / pieces[0]}: a SentencePiece model without tokenizer.json needs"
            " `pip install sentencepiece protobuf` to be converted; or copy tokenizer.json there"
            f" ({reason})"
        )
    return UserError(
        f"{folder} has no tokenizer that transformers can read ({reason}); copy tokenizer.json"
        " and tokenizer_config.json of the model into it"
    )


def _json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError if there is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found a {type(content).__name__}")
    return content
