"""The exception for every error that a user can cause. Its text is one line."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

# Exit statuses besides 2, as of sysexits.h where it has one.
DAMAGED = 65  # no checkpoint is as it was saved
NO_PROGRESS = 70  # starts come to no new checkpoint
UNWRITABLE = 73  # the run folder cannot be written
DISK_FULL = 74
STALLED = 76  # a step takes too long, or another process of the run ended: start all of them again
DIVERGED = 77  # too many steps are not finite
BAD_SAMPLES = "bad_samples.jsonl"  # of a run folder: samples left out, one a line with its error
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(ValueError):
    """A mistake in a file, key or value. Commands print it as one line and exit with `status`.

    Control characters are escaped: names of foreign files may hold them. bad: a record of each
    sample that the text is about, which a run keeps in its folder.
    """

    def __init__(self, text: str, status: int = 2, bad: Sequence[Mapping[str, str]] = ()):
        super().__init__(_CONTROL.sub(lambda found: repr(found[0])[1:-1], text))
        self.status, self.bad = status, bad


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


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise UserError for a value of a config key that is not one of its choices."""
    if value not in choices:
        hint = near(value, choices, "it is one of")
        raise UserError(f"config key {key}={value!r} is not known; {hint}")
