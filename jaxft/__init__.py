"""jaxft: fine-tune diffusion, LLaMA-family and image-token models in JAX, back to PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from jaxft.api.finetuning import Finetuned
    from jaxft.api.loading import Loaded

__version__ = "0.1.0"

NO_KEYS: Mapping[str, Any] = {}


def finetune(
    config: str | Path,
    workdir: str | Path = "",
    *,
    rows: Iterable[Mapping[str, Any]] | None = None,
    eval_rows: Iterable[Mapping[str, Any]] | None = None,
    loss: Callable[..., Any] | None = None,
    keys: Mapping[str, Any] = NO_KEYS,
) -> Finetuned:
    """Train a model as the command line does, and return the run.

    `config` is a file such as "configs/llm.py", and `keys` maps config keys to values, such as
    {"optim.lr": 1e-4}. The same call resumes a run of `workdir`, which Ctrl-C stops after a save.

    `rows` and `eval_rows` replace the data of the config. Each row is a dict with the fields that
    docs/data.md names for files. For pictures, "image" holds a PIL picture, a uint8 array
    [Y, X, 3] or a path, and "text" the caption. The rows are written to `workdir`/rows.

    `loss` replaces the loss of the task in training. `loss(objective, model, batch, keys, step)`
    returns ((sum, weight), metrics), as `objective.loss(model, batch, keys, step)` of the task's
    own objective does. `sum` and `weight` are scalars over the batch, which has no mean yet, and
    `metrics` holds further sums by name. `keys` holds one PRNG key a row. Evaluation stays that of
    the task.

    The result has `workdir`, `metrics`, `export` and `load()`. Raises
    `jaxft.core.errors.UserError` for a mistake in config, rows or loss, and
    `jaxft.core.guards.stopping.Stopped` after a stop.
    """
    from jaxft.api.finetuning import finetune as run

    return run(config, workdir, rows, eval_rows, loss, keys)


def load(path_or_id: str | Path, dtype: str = "float32") -> Loaded:
    """Return a pretrained model of any family for a notebook.

    `path_or_id` is a Hugging Face folder, a single file (.gguf, .safetensors), `pip:PACKAGE`,
    `demo:NAME` or a hub id. `dtype` is the dtype of the parameters.

    The result has `params`, `config`, `model`, and a `tokenizer` that may be None. For a language
    model, `loaded(tokens)` returns fp32 logits [B, T, V], and `loaded.generate(prompts)` returns
    texts. For Stable Diffusion and image-token models, `loaded.sample(prompts)` returns pictures,
    uint8 [N, Y, X, 3]. For an autoencoder, `loaded(images)` returns the images, encoded and
    decoded. Raises `jaxft.core.errors.UserError` for a model that is absent or not supported.
    """
    from jaxft.api.loading import load as load_any  # importing jaxft itself touches no device

    return load_any(path_or_id, dtype)
