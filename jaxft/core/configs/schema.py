"""Keys that all tasks share, with their defaults, and the values that each may have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.core.guards.best import Keep, Stop


@dataclass(frozen=True)
class DataKeys:
    """Training and evaluation records.

    train: records to train on: a path, SCHEME:PLACE, or a mixture of them.
    eval: held-out records. Empty skips the evaluation.
    """

    train: str
    eval: str


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters. Names with an underscore, `from_`, are the keys without it.

    rank: rank of the adapters. 0 is off.
    alpha: scale of the adapters, which is divided by the rank.
    targets: regex over projections, or all-linear. Empty is the attention.
    rslora: divide alpha by the square root of the rank.
    dropout: dropout of the inputs of the adapters.
    from: a LoRA file or PEFT folder to continue from, with its ranks and targets.
    ranks: ranks of some projections, "REGEX=RANK, REGEX=RANK/ALPHA".
    layers: layers that get adapters, such as "0-3,7". Empty is all.
    dora: also train the norm of each row of the weights (DoRA).
    lokr: factor of LoKr, whose updates are products of Kronecker. -1 is the most even. 0 is LoRA.
    tokens: tokens whose rows of the embedding train too, divided by commas.
    """

    rank: int = 0
    alpha: float = 1.0
    targets: str = ""
    rslora: bool = False
    dropout: float = 0.0
    from_: str = ""
    ranks: str = ""
    layers: str = ""
    dora: bool = False
    lokr: int = 0
    tokens: str = ""


@dataclass(frozen=True)
class Optim:
    """Optimiser and learning rate.

    name: the optimiser.
    lr: peak of the learning rate.
    schedule: course of the learning rate after the warm-up.
    warmup: linear rise of the learning rate at the start.
    weight_decay: decoupled weight decay, for matrices only.
    clip: largest global norm of the gradient. 0 is off.
    ema: decay of the moving average that is evaluated and exported. 0 is off.
    b1: decay of the first moment.
    b2: decay of the second moment.
    lr_by: factors of lr for some parameters, "REGEX=0.1, REGEX=2".
    """

    name: str
    lr: float
    schedule: str
    warmup: str
    weight_decay: float
    clip: float
    ema: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    lr_by: str = ""


@dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis. -1 takes the devices that remain.

    data: devices that each hold all parameters.
    fsdp: devices that share the parameters.
    tensor: devices that share each matrix product.
    """

    data: int
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class Every:
    """Periods. "0_steps" is never.

    log: between two printed lines. metrics.jsonl has every step.
    eval: between two evaluations. The first and the last are always made.
    save: between two checkpoints. The last is always written.
    sample: between two samples. The last is always made.
    """

    log: str
    eval: str
    save: str
    sample: str


@dataclass(frozen=True)
class ExportKeys:
    """The export at the end of a run.

    kind: what is written, by task. none is nothing.
    dtype: dtype of the files. source keeps that of each tensor.
    push: hub repository, such as me/model, that gets the export too.
    """

    kind: str
    dtype: str
    push: str = ""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys that all tasks share. `own` holds the keys of the task alone.

    task: llm, diffusion, autoencoder or image_tokens.
    model: a Hugging Face or diffusers folder, a hub id, pip:PACKAGE or demo:NAME.
    init: pretrained weights, or random ones for the configs of the folder.
    seed: seed of data order, random weights, dropout and noise.
    total: length of the run. 0_steps imports, evaluates and exports.
    batch_size: examples per step over all devices, the same on every mesh.
    micro_batches: number of parts in which a batch is processed. The loss stays the same.
    trainable: regex over parameter paths. Empty is the adapters, or everything without them.
    compute_dtype: dtype of the computation. auto is bfloat16, on a CPU float32.
    param_dtype: dtype of the imported parameters. Adapters and moments are float32.
    remat: recomputation in the backward pass, which saves memory.
    track: service that gets the metrics too, as NAME or NAME:PROJECT.
    own_loss: name of the loss that `jaxft.finetune` was given. Empty is the loss of the task.
    """

    task: str
    model: str
    init: str
    seed: int
    total: str
    batch_size: int
    micro_batches: int
    trainable: str
    compute_dtype: str
    param_dtype: str
    remat: str
    track: str = "none"
    own_loss: str = ""
    data: DataKeys
    lora: Lora = Lora()
    optim: Optim
    mesh: MeshShape
    every: Every
    keep: Keep = Keep()
    stop: Stop = Stop()
    export: ExportKeys
    own: Mapping[str, Any]


CHOICES = {
    "init": ("pretrained", "random"),
    "optim.name": ("adamw", "adamw_8bit", "adafactor", "lion", "muon", "prodigy", "schedule_free"),
    "optim.schedule": ("constant", "cosine", "linear", "wsd"),
    "compute_dtype": ("auto", "float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": ("auto", "none", "dots", "full", "offload"),
    "export.dtype": ("source", "float32", "bfloat16", "float16"),
}
AT_LEAST = {
    "seed": 0,
    "batch_size": 1,
    "micro_batches": 1,
    "lora.rank": 0,
    "stop.patience": 0,
    "optim.lr": 0,
    "optim.clip": 0,
    "optim.weight_decay": 0,
}
BASES = ("none", "nf4", "int8")  # layouts of a frozen base below a LoRA, of bitsandbytes
AT_MOST = {"seed": 2**32 - 1}
RENAMED = {  # keys of former versions, and their replacements
    "lora.base": "give the base by model=MODEL and the adapter by lora.from=FOLDER",
}
BELOW_ONE = ("lora.dropout", "optim.b1", "optim.b2", "optim.ema")
DURATIONS = ("total", "optim.warmup", "every.log", "every.eval", "every.save", "every.sample")
