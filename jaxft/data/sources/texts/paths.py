"""Paths without a scheme: the extension of a file tells its format."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxft.core.errors import UserError
from jaxft.data.sources.files import ending, find_files, find_texts, refuse_mixed_files
from jaxft.data.sources.texts import TextRecords
from jaxft.data.sources.texts.csv_files import CsvRecords
from jaxft.data.sources.texts.documents import open_text_files
from jaxft.data.sources.texts.joined import JoinedRecords
from jaxft.data.sources.texts.json_files import JsonRecords
from jaxft.data.sources.texts.tables import open_table_rows

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
CSV_ENDINGS = (".csv", ".tsv")
TABLE_ENDINGS = (".parquet", ".arrow")
PATH_FORM = "a path that ends in .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt"


def open_json_files(spec: str, pattern: str) -> TextRecords:
    """Open JSON lines or arrays: a file of any name, the files of a folder, or those of a glob."""
    return _open_files(spec, pattern, JSON_ENDINGS, JsonRecords)


def open_path(spec: str, pattern: str) -> TextRecords:
    """Open a file, folder or glob by the extensions of its files, which are all of one format."""
    every = (*JSON_ENDINGS, *CSV_ENDINGS, *TABLE_ENDINGS, ".txt")
    files = find_texts(pattern, every)
    kinds = sorted({ending(file) for file in files})
    if any(kind in TABLE_ENDINGS for kind in kinds):
        kinds = [kind for kind in kinds if kind in TABLE_ENDINGS]
    if not kinds or kinds[0] not in every:
        found = f"a file {kinds[0] or 'without an extension'}" if kinds else "no such file"
        raise UserError(
            f"cannot tell the format of {pattern}, {found}: expected {PATH_FORM} (also with .gz or"
            f" .zst), a folder or a glob of those, jsonl:{pattern} or text:{pattern}"
        )
    if kinds[0] in TABLE_ENDINGS:
        return open_table_rows(spec, pattern)
    for endings, opener in ((JSON_ENDINGS, JsonRecords), (CSV_ENDINGS, CsvRecords)):
        if set(kinds) <= set(endings):
            return _open_files(spec, pattern, endings, opener)
    if kinds == [".txt"]:
        return open_text_files(spec, pattern)
    raise UserError(
        f"{spec!r} mixes {' and '.join(kinds)} files, which may hold the same records: name one"
        f" kind, such as {files[0].parent / ('*' + kinds[0])}"
    )


def _open_files(
    spec: str, pattern: str, endings: Sequence[str], opener: Callable[[str, Path], TextRecords]
) -> TextRecords:
    path = Path(pattern).expanduser()
    files = find_texts(pattern, endings)
    if not files:
        place = f"no {', '.join(endings)} file in" if path.is_dir() else "no file matches"
        raise UserError(f"{place} {path} ({spec}): expected a file, folder or glob")
    refuse_mixed_files(spec, find_files(pattern, ())[0], files)
    parts = [opener(spec, file) for file in files]
    return parts[0] if len(parts) == 1 else JoinedRecords(spec, parts)
