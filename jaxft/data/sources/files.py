"""Files that belong to a data set: visible ones, of one split, in a format that can be read."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath

from jaxft.core.errors import UserError

# Folders and files of macOS, Windows, Python and network storage. Names with a dot are hidden too.
_FOREIGN_NAMES = {
    "__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "#snapshot",
    "@recently-snapshot", "lost+found", "$recycle.bin", "system volume information",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip
# From Hugging Face datasets 5.2, `data_files.SPLIT_KEYWORDS`.
SPLIT_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Endings of compressed texts, in front of which stands the ending of the format.
_COMPRESSED = (".gz", ".zst")
# Files that describe a data set and hold none of its records.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT_OF = {word: split for split, words in SPLIT_KEYWORDS.items() for word in words}
_REPEATS = re.compile(r"\d+_.+")  # kohya: 10_name repeats the pictures of a concept ten times


def is_hidden(path: PurePath) -> bool:
    """Return True for a path, relative to its data set, that is hidden or a system's own."""
    return any(
        (part.startswith(".") and part != "..") or part.lower() in _FOREIGN_NAMES
        for part in path.parts
    )


def visible_files(folder: Path) -> list[Path]:
    """Return every file below a folder that is not hidden, sorted. Follows links to folders."""
    return sorted(_walk(folder))


def _walk(root: Path) -> Iterator[Path]:
    visited: set[str] = set()  # a link may lead back to a folder that holds it
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(PurePath(name)))
        for name in names:
            if not is_hidden(PurePath(name)) and os.path.isfile(os.path.join(folder, name)):
                yield Path(folder, name)


def find_files(pattern: str, suffixes: Sequence[str]) -> tuple[Path, list[Path]]:
    """Return (base folder, files) of a file, a folder or a glob.

    A folder stands for the visible files below it with one of `suffixes`. A glob stands for the
    visible files that match. A single file may be hidden.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        return path, [p for p in visible_files(path) if p.suffix.lower() in suffixes]
    fixed = next((i for i, part in enumerate(path.parts) if glob.has_magic(part)), -1)
    base = Path(*path.parts[:fixed])
    found = map(Path, glob.glob(str(path), recursive=True))
    visible = (p for p in found if p.is_file() and not is_hidden(p.relative_to(base)))
    return base, sorted(visible)


def ending(path: PurePath) -> str:
    """Return the extension of a file in lower case, without that of a compression."""
    inner = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return inner.suffix.lower()


def find_texts(pattern: str, endings: Sequence[str]) -> list[Path]:
    """Return the files of `find_files`, compressed ones too, without descriptions of data sets."""
    files = find_files(pattern, (*endings, *_COMPRESSED))[1]
    if not Path(pattern).expanduser().is_dir():
        return files
    return [p for p in files if ending(p) in endings and p.name not in _DESCRIPTIONS]


def split_of(name: str) -> str | None:
    """Return the split of the last word in a name that stands for one, or None without any."""
    words = re.findall(r"[^\W\d_]+", name.lower())
    return next((_SPLIT_OF[word] for word in reversed(words) if word in _SPLIT_OF), None)


def refuse_mixed_files(spec: str, base: Path, files: Sequence[Path]) -> None:
    """Raise UserError for table or tar files of several splits, by their names and folders.

    A held-out split beside files of no split is refused too.
    """
    found: dict[str | None, Path] = {}
    for file in files:
        places = [file, *(base / parent for parent in file.relative_to(base).parents[:-1])]
        place = next((place for place in places if split_of(place.name)), file)
        found.setdefault(split_of(place.name), place)
    if len(found) > 1 and set(found) != {None, "train"}:
        _refuse(spec, found)


def refuse_mixed_folders(spec: str, base: Path, files: Iterable[Path]) -> None:
    """Raise UserError if folders below `base` divide its pictures or texts into splits.

    Two folders side by side with names of different splits do so. A folder of a held-out split
    beside files or other folders does so too. A folder "test" or "dev" among several others counts
    as a class, and a line is printed. Names of files count only if all of them stand for splits.
    """
    inside: dict[PurePath, set[str]] = defaultdict(set)
    direct: dict[PurePath, Path] = {}
    named: dict[str | None, Path] = {}
    for file in files:
        relative = file.relative_to(base)
        for parent, child in zip(relative.parents[1:], relative.parents, strict=False):
            inside[parent].add(child.name)
        direct.setdefault(relative.parent, file)
        named.setdefault(split_of(file.stem), file)
    if len(named) > 1 and None not in named:
        _refuse(spec, named)
    for parent, names in inside.items():
        _check_folders(spec, base / parent, sorted(names), direct.get(parent))


def _check_folders(spec: str, parent: Path, names: Sequence[str], beside: Path | None) -> None:
    splits = {name: None if _REPEATS.fullmatch(name) else split_of(name) for name in names}
    found: dict[str | None, Path] = {
        split: parent / name for name, split in splits.items() if split
    }
    if len(found) > 1:
        _refuse(spec, found)
    others = len(names) - sum(map(bool, splits.values()))
    if not found or "train" in found or not (beside or others):
        return
    place = next(iter(found.values()))
    if beside or others < 2 or place.name.lower() not in ("test", "dev"):
        rest = next((name for name, split in splits.items() if not split), "")
        _refuse(spec, found | {None: beside or parent / rest})
    print(f"{spec}: {place} is read as a class of the set, not as a split", flush=True)


def _refuse(spec: str, found: dict[str | None, Path]) -> None:
    named = {split or "none": place for split, place in found.items()}
    names, places = ", ".join(sorted(named)), ", ".join(str(named[n]) for n in sorted(named))
    example = named.get("train") or next(place for split, place in found.items() if split)
    if not example.is_dir():
        word = next(w for w in re.split(r"[\W\d_]+", example.name) if split_of(w))
        example = example.with_name(example.name.partition(word)[0] + word + "*")
    scheme, colon, _ = spec.rpartition(":")
    prefix = f"{scheme.partition(':')[0]}:" if colon else ""
    raise UserError(
        f"{spec!r} mixes the splits {names}: name one, such as {prefix}{example}"
        f"{' (or rename what stands for no split)' if None in found else ''}; found {places}"
    )


def repeat_folders(base: Path, files: Iterable[Path]) -> list[str]:
    """Return the names of kohya's folders NUMBER_NAME that hold some of the files."""
    parts = {part for file in files for part in file.relative_to(base).parent.parts}
    return sorted(part for part in parts if _REPEATS.fullmatch(part))


def visible_member(name: str) -> bool:
    """Return True for a member of a tar that is neither hidden nor a system's own."""
    return not is_hidden(PurePosixPath(name))
