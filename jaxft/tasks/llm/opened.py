"""A causal language model's folder, or an adapter's with its base, opened for training."""

import dataclasses
import re
from collections.abc import Collection
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxft.core import runtime
from jaxft.core.config import Config
from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.data.text.chat.format import ChatFormat, open_chat
from jaxft.data.text.vocabulary import check_ids
from jaxft.models import registry
from jaxft.models.decoders.files import open_decoder
from jaxft.nn import lora
from jaxft.tasks.common.tokenizers import load_tokenizer, token_ids
from jaxft.tasks.llm.options import LLMOptions, check_preference
from jaxft.weights.adapters import peft
from jaxft.weights.adapters.peft_folder import GIVE_BASE, fit, open_adapted

WHOLE = ("embed_tokens", "lm_head", "norm", "layers")  # all that an adapter's file may hold whole


class OpenedDecoder:
    """A decoder with its tokenizer. Implements `jaxft.tasks.Opened`."""

    def __init__(self, cfg: Config):
        opened = open_adapted(
            cfg.model, cfg.lora.from_, cfg.init == "pretrained", open_decoder, whole=None
        )
        self.source, self.adapter, self.kept = opened
        self.options = LLMOptions(**cfg.own)
        check_preference(cfg, self.options)
        self.architecture = registry.find(self.source.config, "decoder")
        self.model_cfg = self.architecture.config(self.source.config, "config.json")
        part = self.architecture.part(self.source, self.model_cfg)
        part = part._replace(kept=self.kept, rows=self._rows(cfg), whole=WHOLE)
        if self.adapter:
            module = partial(self.architecture.module, self.model_cfg)
            plain = jax.eval_shape(lambda key: module(key=key), jax.random.key(0))
            self.adapter = fit(self.adapter, part.entries(describe(plain)))
            asked, own = cfg.lora, self.adapter.lora
            own = lora.continued(asked, own, lora.projections(plain)) if asked.from_ else own
            saved = peft.saved_paths(self.adapter, part, describe(plain))
            trainable = cfg.trainable
            if saved and not trainable:  # they train again, beside the adapter
                trainable = "|".join((lora.PATHS, *map(re.escape, saved)))
            cfg = dataclasses.replace(cfg, lora=own, trainable=trainable)
        elif not cfg.lora.targets:
            targets = dataclasses.replace(cfg.lora, targets=self.architecture.lora)
            cfg = dataclasses.replace(cfg, lora=targets)
        self.cfg = cfg
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self.parts = (part,)
        self.template = jax.eval_shape(self.build, jax.random.key(0))

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer. Raises UserError for a pad token that transformers refuses."""
        made = load_tokenizer(self.source.tokenizer_dir())
        self._check_pad(made)
        return made

    @cached_property
    def chat(self) -> ChatFormat | None:
        """The chat format of the config, else of the checkpoint. None if there is none."""
        return open_chat(self.tokenizer, self.options.chat, self.source.name)

    def build(self, key: jax.Array) -> nnx.Module:
        model = self.architecture.module(self.model_cfg, key=key)
        lora.add(model, self.cfg.lora, jax.random.fold_in(key, 1))
        lora.add_rows(model.embed_tokens, self.parts[0].rows)
        return model

    def initial(self, wanted: Collection[str]) -> dict[str, np.ndarray]:
        leaves, (part,) = describe(self.template), self.parts
        if not self.adapter:
            return peft.start(part, leaves, self.cfg.lora, wanted)
        return peft.load(self.adapter, part, leaves)

    def describe(self) -> str:
        kept = f" with the adapter's own {', '.join(self.kept)}" if self.kept else ""
        return f"{self.source.config.get('model_type')}{kept}"

    def stop_ids(self, chat: ChatFormat | None = None) -> tuple[int, ...]:
        """Return every end-of-text id of the generation config, the config and the tokenizer.

        chat: add the tokens that end an answer in this format.
        """
        ids = {self.tokenizer.eos_token_id, *(chat.style.stops if chat else ())}
        for config in (self.source.generation_config, self.source.config):
            ids |= set(eos_ids(config.get("eos_token_id")))
        return tuple(sorted(ids))

    def _rows(self, cfg: Config) -> tuple[int, ...]:
        """Return the ids whose rows of the embedding train, from the adapter or the config.

        Raises: UserError for a token without a row, and for tokens that contradict the adapter.
        """
        asked, rows = cfg.lora.tokens, self.model_cfg.vocab_size
        own = self.adapter.token_ids if self.adapter else ()
        if max(own, default=0) >= rows:
            raise UserError(
                f"{self.source.name} has {rows} rows, but its adapter trains the rows {list(own)};"
                f" {GIVE_BASE}"
            )
        if not asked or (self.adapter and not cfg.lora.from_):
            return own
        if not cfg.lora.rank and not self.adapter:
            raise UserError(f"lora.tokens={asked!r} needs lora.rank > 0; set it")
        ids = token_ids(self.tokenizer, asked, "lora.tokens")
        check_ids(ids, rows, self.tokenizer, "lora.tokens")
        if self.adapter and ids != own:
            raise UserError(
                f"lora.tokens={asked!r}, but {self.adapter.name} trains the rows {list(own)}; leave"
                " it out"
            )
        return ids

    def _check_pad(self, tokenizer: Any) -> None:
        """Raise UserError for a pad token without a row, which transformers would read."""
        rows = self.model_cfg.vocab_size
        if tokenizer.pad_token_id is not None:
            where = f"{self.source.name}: pad_token of tokenizer_config.json"
            check_ids([tokenizer.pad_token_id], rows, tokenizer, where)
        stated = self.source.config.get("pad_token_id")
        if isinstance(stated, int) and stated >= rows:
            raise UserError(
                f"{self.source.name}/config.json: pad_token_id={stated}, but vocab_size={rows};"
                " transformers does not open such a model; set pad_token_id to null"
            )


def eos_ids(value: int | list[int] | None) -> list[int]:
    """Return the ids of a config's eos_token_id: none, one or several."""
    return value if isinstance(value, list) else [] if value is None else [value]
