"""The best step of a run by one measure, and the end of a run that no longer improves."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.core.errors import UserError, near

BEST_FILE = "best.json"  # of a run folder: the best step so far, for the commands on it
# Words in the names of measures. A name with none of them is neither better nor worse.
_LARGER_IS_BETTER = ("accurac", "f1", "exact_match", "r2", "psnr", "ssim", "margins", "caption_use")
_SMALLER_IS_BETTER = (
    *("loss", "perplexity", "bits_per_byte", "kid", "mae", "lpips", "lite0", "dead_codes"),
    *("l1", "ce", "text_ce"),
)
_FACTS = ("tokenizer_", "codebook_", "train_distance")  # of the data, or with no best value


@dataclasses.dataclass(frozen=True)
class Keep:
    """The checkpoint that stays beside the newest ones.

    best: measure of data.eval, such as "loss", whose best step is kept and exported. Empty is off.
    """

    best: str = ""


@dataclasses.dataclass(frozen=True)
class Stop:
    """An end before `total`.

    patience: evaluations in a row without a better keep.best that end a run. 0 is never.
    """

    patience: int = 0


def check_best(keep: Keep, stop: Stop, held_out: str, period: str) -> None:
    """Raise UserError for keys that need others. `period` is every.eval."""
    if stop.patience and not keep.best:
        raise UserError(
            f"stop.patience={stop.patience} needs a measure to watch: add keep.best=loss"
        )
    if keep.best and not held_out:
        raise UserError(
            f"keep.best={keep.best!r} is measured on data.eval, which is empty: give it"
        )
    if keep.best and period.startswith("0_"):
        raise UserError(
            f"keep.best={keep.best!r} compares the evaluations of a run, but every.eval={period!r}"
            " is never: set every.eval=50_steps"
        )


def direction(name: str) -> int:
    """Return 1 if a larger value of a measure is better, -1 if a smaller one is, else 0."""
    if name.startswith(_FACTS):
        return 0
    if any(word in name for word in _LARGER_IS_BETTER):
        return 1
    words = (
        word for word in _SMALLER_IS_BETTER if name == word or (len(word) > 2 and word in name)
    )
    return -1 if any(words) else 0


class Best(NamedTuple):
    """The best evaluation so far.

    measure: its name without `eval_`, "" if the run keeps none. waited: the evaluations after it.
    """

    measure: str
    patience: int = 0
    step: int | None = None
    value: float = math.nan
    waited: int = 0

    @property
    def over(self) -> bool:
        """True if the run has to end."""
        return 0 < self.patience <= self.waited

    def after(self, step: int, metrics: Mapping[str, float]) -> "Best":
        """Return the best once the model of `step` has been measured.

        Raises: UserError for a measure that is unknown, or that has no better direction.
        """
        if not self.measure:
            return self
        if self.measure not in metrics:
            hint = near(self.measure, metrics, "measures are")
            raise UserError(f"keep.best={self.measure!r} is not measured in this run; {hint}")
        if not (way := direction(self.measure)):
            raise UserError(
                f"keep.best={self.measure!r} has no value that is better than another; use"
                " keep.best=loss"
            )
        value = metrics[self.measure]
        if step == 0:  # the model before training is nothing to keep
            return self
        if self.step is None or (value - self.value) * way > 0:
            return self._replace(step=step, value=value, waited=0)
        return self._replace(waited=self.waited + 1)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, {} if the run keeps no best step."""
        kept = {"step": self.step, "value": self.value, "waited": self.waited}
        return {"best": kept} if self.measure and self.step is not None else {}

    def resumed(self, position: Mapping[str, Any]) -> "Best":
        """Return the best that a checkpoint stored at this data position."""
        found = position.get("best", {})
        return self._replace(**found) if self.measure else self


def make_best(keep: Keep, stop: Stop) -> Best:
    """Return the best of a run that has not been evaluated yet."""
    return Best(keep.best.removeprefix("eval_"), stop.patience)


def read_best(workdir: Path) -> dict[str, Any]:
    """Return the best step of a run folder, {} if it keeps none."""
    try:
        found = json.loads((workdir / BEST_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else {}
