"""Sources of texts: random-access sequences of dicts."""

from typing import Any, Protocol


class TextRecords(Protocol):
    """A random-access set of records. Its `repr` is the same in every process and run."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def where(self, index: int) -> str:
        """Return the place of record `index` for messages, such as "rows.jsonl:12"."""
        ...
