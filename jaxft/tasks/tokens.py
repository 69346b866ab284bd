"""Tokenizers of Hugging Face folders."""

from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer of a Hugging Face folder; never runs the folder's code."""
    from transformers import AutoTokenizer  # seconds to import: only once it is needed

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder} has no tokenizer that transformers can read ({reason}); copy tokenizer.json"
            " and tokenizer_config.json of the model into it"
        ) from None
