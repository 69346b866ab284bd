"""The exception for every error that a user can cause. Its text is one line."""

import difflib
from collections.abc import Iterable

DISK_FULL = 74  # exit statuses: a run that cannot write, and one whose steps are not finite
DIVERGED = 77


class UserError(ValueError):
    """A mistake in a file, key or value. Commands print it as one line and exit with `status`."""

    def __init__(self, text: str, status: int = 2):
        super().__init__(text)
        self.status = status


class Printed(ValueError):
    """A text that a command prints in place of its work, such as its help."""


def near(name: str, known: Iterable[str], intro: str) -> str:
    """Return a "did you mean" for an unknown name, or `intro` and all known names if none is near.

    The last part of a dotted name is compared too: `lr` is near to `optim.lr`.
    """
    known = list(known)
    leaf = {k.rsplit(".", 1)[-1]: k for k in known}
    close = difflib.get_close_matches(name, known, 1, 0.6) or [
        leaf[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaf, 1, 0.6)
    ]
    return f"did you mean {close[0]!r}?" if close else f"{intro} {', '.join(sorted(known))}"
