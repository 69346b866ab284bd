"""Names inside a folder: the one check of names that files state, and of links in folders."""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from jaxft.core.errors import UserError

NAME_BYTES = 255  # of a file on every common disk


def is_inside(folder: Path, name: str) -> bool:
    """Return True for the name of a file under the folder, whether it exists or not.

    A link has to lead into the folder too, or into the `blobs` of the hub cache that it is in.
    """
    path = PurePosixPath(name)
    try:
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    odd = path.is_absolute() or ".." in path.parts or re.search(r"[\\\0]", name)
    if odd or not 0 < longest <= NAME_BYTES:
        return False
    real = folder.resolve()
    roots = [real]
    for revision in (real, *real.parents):
        # The hub's cache: models--org--name/snapshots/REVISION/FILE -> ../../blobs/HASH.
        repo = revision.parent.parent
        if revision.parent.name == "snapshots" and re.match("(model|dataset|space)s--", repo.name):
            roots.append(repo / "blobs")
    target = (folder / name).resolve()
    return any(target.is_relative_to(root) for root in roots)


def refuse_outside(folder: Path, files: Iterable[Path]) -> None:
    """Raise UserError for a file below `folder` that is a link to a place outside of it.

    An export copies the files beside a model. A link in a foreign folder could publish any file of
    this machine.
    """
    for path in files:
        if not is_inside(folder, path.relative_to(folder).as_posix()):
            raise UserError(
                f"{path}: a link that leads out of {folder}, to {path.resolve()}; put the file"
                " itself in its place, if it is to be published with the model"
            )


def is_below(folder: Path, path: Path) -> bool:
    """Return True for a path that stays below the folder by its name. Links are not followed.

    Data sets may consist of links, because their files are read and not published.
    """
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
