"""Config keys of the language-model task. Light to import, so that a mistyped key fails at once."""

import dataclasses

from jaxft.core.configs.schema import BASES, Config
from jaxft.core.configs.sweep import read_sweep
from jaxft.core.errors import UserError, check_choice

DPO_FAMILY = ("dpo", "ipo", "hinge", "robust", "apo_zero", "sigmoid_norm")
PREFERENCES = (*DPO_FAMILY, "orpo", "simpo", "kto")
SCORED = ("reward", "classify")  # a head of scores replaces the one of the vocabulary
ONE_TEXT = ("sft", "distill")  # objectives over the trained tokens of one text
OBJECTIVES = (*ONE_TEXT, *PREFERENCES, *SCORED)
WITHOUT_REFERENCE = (*ONE_TEXT, "orpo", "simpo", *SCORED)
SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"
PROBLEMS = (SINGLE_LABEL, MULTI_LABEL, "regression")  # transformers' names
SMOOTHED = ("dpo", "robust", "sigmoid_norm")
BETA, SIMPO_BETA, SIMPO_MARGIN = 0.1, 2.0, 0.5  # the values of 0


@dataclasses.dataclass(frozen=True)
class PreferenceKeys:
    """Numbers of a preference objective. 0 is the default of the objective.

    beta: scale of the rewards (0.1, SimPO 2.0), or the weight of ORPO's odds term (0.1).
    margin: gamma / beta of SimPO (0.5).
    smoothing: share of swapped labels, of dpo, robust and sigmoid_norm.
    sft: weight of the mean loss of the chosen answer, in the DPO family.
    center: weight of the squared sum of both rewards, of a reward model.
    desirable: weight of the good answers of KTO (1.0).
    undesirable: weight of the bad answers of KTO (1.0).
    """

    beta: float = 0.0
    margin: float = 0.0
    smoothing: float = 0.0
    sft: float = 0.0
    center: float = 0.0
    desirable: float = 0.0
    undesirable: float = 0.0


@dataclasses.dataclass(frozen=True)
class DistillKeys:
    """Distillation from a teacher, for objective=distill.

    teacher: a larger model with the same tokenizer.
    weight: share of the divergence from the teacher in the loss.
    temperature: temperature of the distributions of both models.
    """

    teacher: str = ""
    weight: float = 1.0
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class LLMOptions:
    """Options of the language-model task.

    seq_len: tokens of a row, or of one side of a pair.
    pack: short examples of a batch share rows. The loss stays the same.
    template: turns {"text", "label"} into prompt and completion.
    eval_examples: number of random rows of data.eval. 0 is all.
    chat: chat template of conversations: auto, on, off or a file FILE.jinja.
    cache: folder for the token ids of large data sets. Empty keeps them in memory.
    columns: fields to rename, such as prompt=question,completion=answer.
    objective: sft, classify, reward, distill, dpo or another preference objective.
    labels: names of the classes in the order of their ids, divided by commas.
    problem_type: single_label_classification, multi_label_classification or regression.
    base: layout of the frozen projections below a LoRA: none, nf4 or int8.
    router_loss: weight of the loss that balances experts. -1 is the checkpoint's, or 0 for frozen
        routers.
    sweep: adapters to train at once, such as optim.lr=1e-4,2e-4 seed=0,1. Empty is one.
    """

    seq_len: int
    pack: bool
    template: str
    eval_examples: int
    chat: str = "auto"
    cache: str = "runs/cache"
    columns: str = ""
    objective: str = "sft"
    preference: PreferenceKeys = PreferenceKeys()
    labels: str = ""
    problem_type: str = SINGLE_LABEL
    distill: DistillKeys = DistillKeys()
    base: str = "none"
    router_loss: float = -1.0
    sweep: str = ""

    def __post_init__(self) -> None:
        """Raise UserError for an unknown objective, or a key that it does not use."""
        name, keys = self.objective, self.preference
        check_choice("objective", name, OBJECTIVES)
        used = {
            "beta": PREFERENCES,
            "margin": ("simpo",),
            "smoothing": SMOOTHED,
            "sft": DPO_FAMILY,
            "center": ("reward",),
            "desirable": ("kto",),
            "undesirable": ("kto",),
        }
        for key, value in dataclasses.asdict(keys).items():
            if value and name not in used[key]:
                raise UserError(
                    f"config key preference.{key}={value} is not used by objective={name}; it"
                    f" belongs to {', '.join(used[key])}"
                )
            if value < 0 or (key == "smoothing" and value >= 0.5):
                limit = "at least 0 and below 0.5" if key == "smoothing" else "at least 0"
                raise UserError(f"config key preference.{key}={value} must be {limit}")
        if name == "robust" and not keys.smoothing:
            raise UserError("objective=robust needs preference.smoothing, such as 0.1")
        check_choice("base", self.base, BASES)
        if self.router_loss < 0 and self.router_loss != -1.0:
            raise UserError(f"config key router_loss={self.router_loss} must be at least 0, or -1")
        if self.router_loss > 0 and name != "sft":
            raise UserError(
                f"config key router_loss={self.router_loss} belongs to objective=sft, not to {name}"
            )
        if read_sweep(self.sweep) and name != "sft":  # raises for another form
            raise UserError(f"sweep={self.sweep!r} is for objective=sft, not for {name}")
        self._check_labels()
        self._check_distill()

    def _check_labels(self) -> None:
        """Raise UserError for keys of a classification that do not fit it."""
        if self.objective != "classify":
            for key, value in (("labels", self.labels), ("problem_type", self.problem_type)):
                if value not in ("", SINGLE_LABEL):
                    raise UserError(f"config key {key}={value!r} belongs to objective=classify")
            return
        check_choice("problem_type", self.problem_type, PROBLEMS)
        names = self.label_names
        if len(set(names)) < len(names) or (names and not all(names)):
            raise UserError(f"config key labels={self.labels!r} must be different names")
        if len(names) == 1 and self.problem_type == SINGLE_LABEL:
            raise UserError(f"config key labels={self.labels!r} is one class; give at least two")
        if self.chat not in ("auto", "off"):
            raise UserError(
                f"chat={self.chat} does not go with objective=classify, which reads texts as they"
                " are; set chat=off, and apply the template to the texts beforehand"
            )

    def _check_distill(self) -> None:
        """Raise UserError for keys of a distillation that do not fit it."""
        keys = self.distill
        if self.objective != "distill" and keys != DistillKeys():
            raise UserError(
                f"config keys distill.* belong to objective=distill, not to {self.objective}"
            )
        if self.objective == "distill" and not keys.teacher:
            raise UserError("objective=distill needs distill.teacher=MODEL, a larger model")
        if not 0 < keys.weight <= 1:
            raise UserError(f"config key distill.weight={keys.weight} must be in (0, 1]")
        if keys.temperature <= 0:
            raise UserError(f"config key distill.temperature={keys.temperature} must be above 0")

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names in `labels`. A reward has one number."""
        if self.objective == "reward":
            return ("LABEL_0",)  # transformers' name for a number without one
        return tuple(name.strip() for name in self.labels.split(",")) if self.labels else ()

    @property
    def scored(self) -> bool:
        """True if the model ends in a head of scores, and not in that of the vocabulary."""
        return self.objective in SCORED

    @property
    def pairs(self) -> bool:
        """True if an example is a pair of answers."""
        return self.objective not in (*ONE_TEXT, "classify")

    @property
    def stores_reference(self) -> bool:
        """True if the objective compares the model with itself at step 0."""
        return self.objective not in WITHOUT_REFERENCE


def check_preference(cfg: Config, options: LLMOptions) -> None:
    """Raise UserError for keys of all tasks that a preference objective cannot use."""
    name = options.objective
    if options.pairs and cfg.lora.dropout:
        raise UserError(
            f"lora.dropout={cfg.lora.dropout} does not go with objective={name}, which compares"
            " both sides without noise; set lora.dropout=0.0"
        )
    if name == "kto" and cfg.batch_size < 2:
        raise UserError(
            f"batch_size={cfg.batch_size} is too small for objective=kto, whose baseline is a mean"
            " over the batch; give at least 2"
        )
