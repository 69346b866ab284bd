"""An image-token model's folder with its VQ tokenizer, opened for training."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxft.core import runtime
from jaxft.core.config import Config
from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.data.images.dataset import CORNERS
from jaxft.nn import lora
from jaxft.tasks.image_tokens.image_layout import encode_prompt
from jaxft.tasks.image_tokens.image_model import open_model
from jaxft.tasks.image_tokens.options import ImageTokenOptions
from jaxft.weights.adapters import peft, peft_folder
from jaxft.weights.adapters.peft_folder import PeftAdapter


class OpenedImageModel:
    """An image-token model of either family; `jaxft.tasks.Opened`."""

    def __init__(self, cfg: Config):
        self.options = ImageTokenOptions(**cfg.own)
        _check(self.options)
        pretrained = cfg.init == "pretrained"
        self.model = open_model(cfg.model, self.options, pretrained, cfg.seed)
        self.layout = self.model.layout
        if cfg.export.kind == "original":
            self.model.original_files(None)  # an error is better now than after training
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self.remat = runtime.resolve_remat(cfg.remat)
        self.parts = (self.model.part,)
        self.adapter: PeftAdapter | None = None
        self.saved: dict[str, np.ndarray] = {}
        self.cfg = self._with_adapter(cfg) if cfg.lora.from_ else cfg
        self.template = jax.eval_shape(self.build, jax.random.key(0))
        for prompt in self.options.sample.prompts:  # likewise
            encode_prompt(self.layout, self.model.tokenizer, prompt)

    def build(self, key: jax.Array) -> nnx.Module:
        model = self.model.build(key)
        lora.add(model, self.cfg.lora, jax.random.fold_in(key, 1))
        return model

    def initial(self) -> dict[str, np.ndarray]:
        if self.adapter is None:
            return {}
        return self.saved | peft.load(self.adapter, self.parts[0], describe(self.template))

    def _with_adapter(self, cfg: Config) -> Config:
        """Read the PEFT folder of `lora.from`, and return the config with what it decides.

        The modules that it holds whole train again, unless `trainable` says otherwise.
        """
        part, plain = self.parts[0], jax.eval_shape(self.model.build, jax.random.key(0))
        found = peft_folder.read(Path(cfg.lora.from_).expanduser(), cfg.model, part.whole)
        self.saved = peft.load_whole(found, part, describe(plain))
        self.adapter = peft_folder.fit(found, part.entries(describe(plain)))
        own = lora.continued(cfg.lora, self.adapter.lora, lora.projections(plain))
        trainable = cfg.trainable or "|".join((lora.PATHS, *map(re.escape, self.saved)))
        return dataclasses.replace(cfg, lora=own, trainable=trainable)

    def describe(self) -> str:
        layout, loss = self.layout, self.options.loss
        rows, columns = layout.grid
        text = f" + {loss.text_weight:g} text" if loss.text_weight else ""
        return (
            f"{rows}x{columns} of {layout.codes} codes {self.model.about};"
            f" loss {loss.image_weight:g} image{text}; a caption is {layout.prompt!r}"
        )


def _check(options: ImageTokenOptions) -> None:
    if not 0 <= options.caption_dropout < 1:
        raise UserError(f"caption_dropout={options.caption_dropout} must be at least 0 and below 1")
    if not 1 <= options.crops <= 1 + len(CORNERS):
        raise UserError(f"crops={options.crops} must be 1 to {1 + len(CORNERS)}")
    if not options.cache:
        raise UserError("cache='' has no place for the pictures' codes; name a folder")
    for name in ("image_weight", "text_weight", "z"):
        if getattr(options.loss, name) < 0:
            raise UserError(f"loss.{name}={getattr(options.loss, name)} must be at least 0")
    if not options.loss.image_weight:
        raise UserError("loss.image_weight=0.0 trains no image; use task=llm for text alone")
