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
    """Raise UserError if `columns` renames no field in any of the sets, and they need it.

    A set that has all of the new names already does not.
    """
    names = read_columns(columns)
    if not names or any(isinstance(records, RenamedRecords) for records in sets):
        return
    for records in sets:
        if not names.keys() <= records[0].keys():
            raise UserError(
                f"{records.where(0)}: columns={columns!r} renames no field; found"
                f" {', '.join(map(repr, records[0]))}; correct the names after the equals signs"
            )


def read_columns(columns: str) -> dict[str, str]:
    """Return new names and those in the file. Raises UserError for a list in another form."""
    names: dict[str, str] = {}
    for pair in filter(None, columns.split(",")):
        new, _, old = (part.strip() for part in pair.partition("="))
        if not new or not old or new in names:
            raise UserError(
                f"columns={columns!r}: cannot read {pair!r}; expected pairs of a new name and the"
                " name in the file, such as prompt=question,completion=answer"
            )
        names[new] = old
    return names


def rename(records: TextRecords, columns: str) -> TextRecords:
    """Rename the fields of records by a list such as "prompt=question,completion=answer".

    A set whose first record has none of them stays as it is: it may be the other part of a mixture.
    Raises UserError for a list in another form, and if only some of the fields are there.
    """
    names = read_columns(columns)
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
