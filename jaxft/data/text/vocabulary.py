"""Token ids of texts, checked against the rows of an embedding table."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxft.core.errors import UserError


def check_ids(
    ids: Int[np.ndarray, "..."] | Iterable[int],
    rows: int,
    tokenizer: Any,
    where: str,
    image_ids: tuple[int, ...] = (),
) -> None:
    """Raise UserError for the first id that has no row in an embedding table of `rows` rows.

    PyTorch raises an IndexError there. JAX reads the last row instead and trains on it.
    A tokenizer may have more tokens than the table has rows: only the ids in use are checked.
    image_ids: ids that stand for pictures, which are refused too.
    """
    used = np.asarray(ids)
    if image_ids and np.isin(used, image_ids).any():
        names = [tokenizer.convert_ids_to_tokens(one) for one in image_ids]
        raise UserError(
            f"{where}: it holds {' or '.join(map(repr, names))}, which stands for a picture, but"
            " only the text model is trained; remove it from the text"
        )
    if not used.size or used.max() < rows:
        return
    first = int(used[used >= rows][0])
    raise UserError(
        f"{where}: token {tokenizer.convert_ids_to_tokens(first)!r} has the id {first}, but the"
        f" model's vocabulary has {rows} rows (the tokenizer has {len(tokenizer)} tokens); take the"
        " model's own tokenizer, or resize the model (resize_token_embeddings) and save it again"
    )


def check_specials(tokenizer: Any, rows: int, where: str) -> list[str]:
    """Return the tokens without a row in an embedding table of `rows` rows, by their ids.

    A text that spells one is refused. Raises UserError if one of them ends or pads texts.
    """
    special = {
        "eos_token": tokenizer.eos_token_id,
        "pad_token": tokenizer.pad_token_id,
    }
    for name, number in special.items():
        check_ids([] if number is None else [number], rows, tokenizer, f"{where}: {name}")
    without = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    return [token for _, token in without]


def tokenize(
    tokenizer: Any, texts: Sequence[str]
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Return the ids of whole texts without special tokens, and the characters of each token."""
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    return batch["input_ids"], batch["offset_mapping"]
