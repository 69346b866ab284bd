"""Table of schemes: openers of a spec such as `hf:folder` for texts and for pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxft.core.errors import UserError
from jaxft.data.sources.files import find_files
from jaxft.data.sources.images.folders import ImageFiles, open_edited, open_folder, open_masks
from jaxft.data.sources.images.records import Bad, ImageSource, Records, count_unreadable
from jaxft.data.sources.images.rows import open_table_images, open_tfds_images
from jaxft.data.sources.images.tars import open_tars
from jaxft.data.sources.mixtures import read_mixture
from jaxft.data.sources.texts import TextRecords
from jaxft.data.sources.texts.columns import check_renamed, rename
from jaxft.data.sources.texts.documents import TextFiles, open_text_files
from jaxft.data.sources.texts.joined import JoinedRecords
from jaxft.data.sources.texts.json_files import JsonRecords
from jaxft.data.sources.texts.paths import PATH_FORM, open_json_files, open_path
from jaxft.data.sources.texts.tables import open_table_rows
from jaxft.data.sources.texts.tfds import open_tfds_texts
from jaxft.demo import demo_path

Images = tuple[ImageSource, list[Bad]]  # a source, and the pictures in unsupported formats


class Scheme(NamedTuple):
    """A scheme's form in messages, and its openers of texts and of pictures, or None.

    `texts(spec, rest)` and `images(spec, rest, captions)` take the whole spec and the part after
    the colon.
    """

    form: str
    texts: Callable[[str, str], TextRecords] | None = None
    images: Callable[[str, str, bool], Images] | None = None


def _demo_texts(spec: str, rest: str) -> TextRecords:
    path = demo_path(spec, "texts")
    assert path is not None, rest
    return TextFiles(spec, [path]) if path.suffix == ".txt" else JsonRecords(spec, path)


def _demo_images(spec: str, rest: str, captions: bool) -> Images:
    path = demo_path(spec, "images")
    assert path is not None, rest
    return open_folder(spec, path, captions)


SCHEMES = {
    "jsonl": Scheme("jsonl:PATH", texts=open_json_files),
    "text": Scheme("text:PATH", texts=open_text_files),
    "folder": Scheme(
        "folder:PATH",
        images=lambda spec, rest, captions: open_folder(spec, Path(rest).expanduser(), captions),
    ),
    "wds": Scheme("wds:TARS", images=open_tars),
    "hf": Scheme(
        "hf:PATH",
        texts=open_table_rows,
        images=lambda spec, rest, captions: (open_table_images(spec, rest, captions), []),
    ),
    "tfds": Scheme(
        "tfds:NAME[:SPLIT][@DATA_DIR]",
        texts=open_tfds_texts,
        images=lambda spec, rest, captions: (open_tfds_images(spec, rest, captions), []),
    ),
    "demo": Scheme("demo:NAME", texts=_demo_texts, images=_demo_images),
}


MASK_FILE, ALPHA = "file", "alpha"  # places of a loss mask
LOCAL = ("jsonl", "text", "folder", "wds")  # schemes of files of this machine


def open_records(spec: str, columns: str = "") -> TextRecords:
    """Open the texts that `spec` names: a path, or a scheme of SCHEMES and a place.

    columns: fields to rename, such as "prompt=question,completion=answer". Contents are read when
    indexed. Only the offsets of records are computed at once. Raises UserError for an unknown spec,
    a missing file, an empty set or an unknown column.
    """
    name, colon, rest = spec.partition(":")
    scheme = SCHEMES.get(name) if colon else None
    if scheme is not None and scheme.texts is not None and rest:
        return rename(scheme.texts(spec, rest), columns)
    if scheme is None and spec and _is_there(spec):
        return rename(open_path(spec, spec), columns)
    raise _unknown_texts(spec)


def open_mixture(spec: str, columns: str = "") -> JoinedRecords:
    """Open the parts of a mixture, or the only set that `spec` names, as one set.

    Raises UserError as `open_records`, and for `columns` that rename nothing.
    """
    parts = [open_records(part, columns) for part in read_mixture(spec).specs]
    check_renamed(parts, columns)
    return JoinedRecords(spec, parts)


def _unknown_texts(spec: str) -> UserError:
    """Return the error for a spec that names no texts."""
    name, colon, rest = spec.partition(":")
    forms = _forms([PATH_FORM, *(one.form for one in SCHEMES.values() if one.texts)])
    if not colon and spec:
        return UserError(f"no file, folder or glob {spec!r}: expected {forms}")
    there = name not in SCHEMES and rest and _is_there(rest)
    hint = f"; did you mean {rest}?" if there else ""
    if rest.startswith("//"):
        hint = "; an address is not read: download the file, or give hf:OWNER/NAME of a hub's set"
    return UserError(f"unknown data source {spec!r}: expected {forms}{hint}")


def check_place(spec: str, images: bool) -> None:
    """Raise UserError for a spec of no known scheme, or of files that are not there.

    It opens no file, so that it can come before the start of jax. images: a set of pictures.
    """
    name, colon, rest = spec.partition(":")
    scheme = SCHEMES.get(name) if colon else None
    opener = scheme and (scheme.images if images else scheme.texts)
    if opener is None or not rest:
        if images:
            raise _unknown_images(spec)
        if scheme is not None or not _is_there(spec):
            raise _unknown_texts(spec)
        return
    if name == "demo":
        demo_path(spec, "images" if images else "texts")
    elif name in LOCAL and not _is_there(rest):
        raise UserError(f"no file, folder or glob {rest} ({spec}): give one that is there")


def _is_there(pattern: str) -> bool:
    return Path(pattern).expanduser().is_dir() or bool(find_files(pattern, ())[1])


def open_images(spec: str, captions: bool = True, edited: bool = False, mask: str = "") -> Records:
    """Open the pictures that `spec` names, by SCHEMES. Only names and captions are read at once.

    captions: require a caption of every picture. Without it a picture that has none gets "".
    edited: require the name of the picture that each was edited from.
    mask: MASK_FILE requires a mask of every picture, ALPHA takes its transparency, "" is none.
    Pictures in unsupported formats are left out, counted in a printed line and listed in
    `left_out` of the result. Raises UserError for an unknown spec, a missing file, caption or
    optional package, several splits at once, and an empty set.
    """
    name, _, rest = spec.partition(":")
    scheme = SCHEMES.get(name)
    if scheme is None or scheme.images is None or not rest:
        raise _unknown_images(spec)
    source, left_out = scheme.images(spec, rest, captions)
    if not len(source):
        found = f", but {count_unreadable(left_out)}" if left_out else ""
        raise UserError(f"{spec!r} holds no image: expected files such as *.png or *.jpg{found}")
    if left_out:
        print(f"left out images of {spec}: {count_unreadable(left_out)}", flush=True)
    before = open_edited(spec, Path(rest).expanduser()) if edited else None
    masks = source if mask == ALPHA else None
    if mask == MASK_FILE:
        if name != "folder" or not isinstance(source, ImageFiles):
            raise UserError(
                f"{spec!r} has no mask pictures, which mask={mask!r} reads: expected folder:PATH"
                " with NAME.mask.png beside each picture, or mask='alpha'"
            )
        masks = open_masks(spec, Path(rest).expanduser(), source)
    return Records(spec, source, before, tuple(left_out), masks=masks, alpha=mask == ALPHA)


def _unknown_images(spec: str) -> UserError:
    """Return the error for a spec that names no pictures."""
    forms = _forms([one.form for one in SCHEMES.values() if one.images])
    hint = f"; did you mean folder:{spec}?" if Path(spec).expanduser().is_dir() else ""
    return UserError(f"unknown image source {spec!r}: expected {forms}{hint}")


def _forms(forms: list[str]) -> str:
    return f"{', '.join(forms[:-1])} or {forms[-1]}"
