"""Renamed fields of records, as `columns="prompt=question,completion=answer"` gives them."""

from collections.abc import Sequence
from typing import Any

from jaxft.core.errors import UserError
from jaxft.data.sources.texts import TextRecords


class RenamedRecords:
    """Records with fields under new names. `names` maps a new name to the one in the file."""

    def __init__(self, records: TextRecords, names: dict[str, str]):
        self._records, self._names = records, names

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        found = {new: record[old] for new, old in self._names.items() if old in record}
        replaced = {*found, *self._names.values()}
        return {name: value for name, value in record.items() if name not in replaced} | found

    def __repr__(self) -> str:
        return repr(self._records)

    def where(self, index: int) -> str:
        return self._records.where(index)


def check_renamed(sets: Sequence[TextRecords], columns: str) -> None:
    """Raise UserError if `columns` renames no field in any of the sets."""
    if columns and not any(isinstance(records, RenamedRecords) for records in sets):
        found = ", ".join(map(repr, sets[0][0]))
        raise UserError(
            f"{sets[0].where(0)}: columns={columns!r} renames no field; found {found}; correct the"
            " names after the equals signs"
        )


def rename(records: TextRecords, columns: str) -> TextRecords:
    """Rename the fields of records by a list such as "prompt=question,completion=answer".

    A set whose first record has none of them stays as it is: it may be the other part of a mixture.
    Raises UserError for a list in another form, and if only some of the fields are there.
    """
    names: dict[str, str] = {}
    for pair in filter(None, columns.split(",")):
        new, _, old = (part.strip() for part in pair.partition("="))
        if not new or not old or new in names:
            raise UserError(
                f"columns={columns!r}: cannot read {pair!r}; expected pairs of a new name and the"
                " name in the file, such as prompt=question,completion=answer"
            )
        names[new] = old
    first = records[0] if names else {}
    missing = [old for old in names.values() if old not in first]
    if len(missing) == len(names):
        return records
    if missing:
        raise UserError(
            f"{records.where(0)}: columns={columns!r} asks for the field {missing[0]!r}; found"
            f" {', '.join(map(repr, first))}"
        )
    return RenamedRecords(records, names)
