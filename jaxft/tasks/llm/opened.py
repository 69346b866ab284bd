"""A causal language model's folder, or an adapter's with its base, opened for training."""

import contextlib
import dataclasses
import re
from collections.abc import Collection
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxft.core import runtime
from jaxft.core.configs.schema import Config
from jaxft.core.errors import UserError
from jaxft.core.params import TEACHER_ROLE, describe, mark, unpacked
from jaxft.data.text.chat.format import ChatFormat, open_chat
from jaxft.data.text.labelled import labels_in
from jaxft.data.text.vocabulary import check_ids
from jaxft.models import registry
from jaxft.models.decoders.classifier import (
    ADAPTER_CONFIG,
    SCORE_RULE,
    adapter_labels,
    open_classifier,
    stated_labels,
)
from jaxft.models.decoders.config import DecoderConfig
from jaxft.models.decoders.files import open_decoder
from jaxft.models.decoders.gguf import gguf_architecture
from jaxft.models.registry import Architecture
from jaxft.nn import lora
from jaxft.nn.quantised import NF4_BASE, NF4_TABLES, check_base, quantise
from jaxft.tasks.common.tokenizers import load_tokenizer, token_ids
from jaxft.tasks.llm.options import LLMOptions, check_preference
from jaxft.weights.adapters import peft
from jaxft.weights.adapters.peft_folder import GIVE_BASE, fit, open_adapted
from jaxft.weights.files.gguf_vocabulary import vocabulary
from jaxft.weights.folders.quantised.methods import nf4_scales
from jaxft.weights.folders.quantised.nf4 import PackedTensors
from jaxft.weights.transfer import Part
from jaxft.weights.views import Drawn, Overlaid

ROUTER = "layers.mlp.router"
EXPERTS = ("gate", "up", "gate_up", "down")
MIXTURE = (ROUTER, *(f"layers.mlp.experts.{name}_proj" for name in EXPERTS))
WHOLE = ("embed_tokens", "lm_head", "score", "norm", "layers")  # modules that an adapter may hold


class Teacher(NamedTuple):
    """The larger decoder of a distillation, which stays as it is."""

    architecture: Architecture
    cfg: DecoderConfig
    part: Part

    def build(self, key: jax.Array) -> nnx.Module:
        model = self.architecture.module(self.cfg, key=key)
        mark(model, TEACHER_ROLE)
        return model


class OpenedDecoder:
    """A decoder with its tokenizer. Implements `jaxft.tasks.Opened`."""

    def __init__(self, cfg: Config):
        self.options = LLMOptions(**cfg.own)
        check_preference(cfg, self.options)
        nf4 = self.options.base == NF4_BASE
        opener: Any = partial(open_decoder, nf4=nf4)
        names: tuple[str, ...] = ()
        if self.options.scored:
            known = partial(labels_in, cfg.data.train, self.options.columns)
            names = self._label_names(cfg)
            opener = partial(open_classifier, labels=names, seed=cfg.seed, known=known, nf4=nf4)
        opened = open_adapted(
            cfg.model,
            cfg.lora.from_,
            weights=cfg.init == "pretrained",
            opener=opener,
            whole=None,
        )
        self.source, self.adapter, self.kept = opened
        where = f"{self.source.name}/config.json"
        self.architecture = registry.find(self.source.config, "decoder", where)
        self.model_cfg = self.architecture.config(self.source.config, where)
        self.labels: tuple[str, ...] = ()
        if self.options.scored:
            self.labels = names or stated_labels(self.source.config)
            size = len(self.labels)
            self.model_cfg = dataclasses.replace(self.model_cfg, num_labels=size, tied=True)
        part = self.architecture.part(self.source, self.model_cfg)
        part = part._replace(kept=self.kept, rows=self._rows(cfg), whole=WHOLE)
        self.scales = nf4_scales(self.source.config)
        if self.scales and part.tensors is not None:
            packed = PackedTensors(part.tensors, self.source.name, NF4_TABLES)
            part = part._replace(tensors=packed)
        if self.labels:
            part = part._replace(rules=(*part.rules, SCORE_RULE))
        if self.adapter:
            module = partial(self.architecture.module, self.model_cfg)
            plain = jax.eval_shape(lambda key: module(key=key), jax.random.key(0))
            self.adapter = fit(self.adapter, part.class_entries(describe(plain)))
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
        if self.labels and cfg.lora.rank and not cfg.trainable:
            cfg = dataclasses.replace(cfg, trainable=rf"{lora.PATHS}|score\..*")
        self._check_trained(cfg)
        check_base(self.options.base, cfg.lora)
        self._check_experts(cfg)
        self._check_gguf(cfg)
        self.cfg = cfg
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self.teacher, self.lost_teacher = self._open_teacher()
        self.parts = (part, self.teacher.part) if self.teacher else (part,)
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

    @cached_property
    def pad_id(self) -> int:
        """The padding token of a classifier. transformers reads the score at the last other token.

        It is the tokenizer's, or its end of text.
        """
        own = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if own is None else own

    def _check_trained(self, cfg: Config) -> None:
        """Raise UserError for LoKr, or if `trainable` leaves a new head as it was drawn."""
        if cfg.lora.lokr:
            raise UserError(f"lora.lokr={cfg.lora.lokr} is for task=diffusion alone; leave it out")
        there = isinstance(self.source.tensors, Overlaid) and isinstance(
            self.source.tensors.over, Drawn
        )
        if there and cfg.trainable and not re.fullmatch(cfg.trainable, "score.kernel"):
            raise UserError(
                f"trainable={cfg.trainable!r} leaves the new head as it was drawn; leave it empty,"
                r" or add |score\..* to it"
            )

    def _label_names(self, cfg: Config) -> tuple[str, ...]:
        """Return the names of the scores by the config, or by an adapter that training continues.

        Raises: UserError if both name them, and differ.
        """
        asked, folder = self.options.label_names, cfg.lora.from_ or cfg.model
        own = adapter_labels(folder)
        if self.options.pairs or not own or not asked or asked == own:
            return asked or own
        raise UserError(
            f"config key labels={self.options.labels!r}, but {folder}/{ADAPTER_CONFIG} has"
            f" {','.join(own)} in id2label; leave labels out"
        )

    @property
    def router_loss(self) -> float | None:
        """The weight of the loss that balances experts, None for a model without experts."""
        if self.model_cfg.layers[0].experts is None:
            return None
        asked, cfg = self.options.router_loss, self.cfg
        trains = not cfg.lora.rank and re.fullmatch(cfg.trainable or ".*", f"{ROUTER}.kernel")
        return asked if asked >= 0 else self.model_cfg.router_loss if trains else 0.0

    def _check_experts(self, cfg: Config) -> None:
        """Raise UserError for settings that a model with experts does not have, or only it has."""
        if self.model_cfg.layers[0].experts is None:
            if self.options.router_loss > 0:
                raise UserError(
                    f"router_loss={self.options.router_loss}: {self.source.name} has no experts;"
                    " leave it out"
                )
            return
        if not cfg.lora.rank:
            return
        for key, regex in (("lora.targets", cfg.lora.targets), ("trainable", cfg.trainable)):
            end = ".kernel" if key == "trainable" else ""
            with contextlib.suppress(re.error):  # `lora.add` and `select` name a bad one
                found = (one for one in MIXTURE if re.fullmatch(regex, one + end))
                if place := next(found, ""):
                    raise UserError(
                        f"{key}={regex!r} matches {place}, and an adapter of PEFT has no place for"
                        f" experts and routers; name others, such as {self.architecture.lora}"
                    )

    def _check_gguf(self, cfg: Config) -> None:
        """Raise UserError, before training, for a model that a GGUF file could not hold."""
        if not cfg.export.kind.startswith("gguf"):
            return
        gguf_architecture(self.source.config, self.model_cfg)
        vocabulary(self.tokenizer, self.model_cfg.vocab_size, (), self.source.name)
        wider = {"lora.dora": cfg.lora.dora, "trainable": cfg.trainable not in ("", lora.PATHS)}
        if cfg.export.kind == "gguf-adapter" and any(wider.values()):
            key = next(key for key, given in wider.items() if given)
            raise UserError(f"export.kind='gguf-adapter' cannot hold {key}; use export.kind='gguf'")

    def build(self, key: jax.Array) -> nnx.Module:
        model = self.architecture.module(self.model_cfg, key=key)
        lora.add(model, self.cfg.lora, jax.random.fold_in(key, 1))
        if self.options.sweep:
            lora.add_scales(model)
        lora.add_rows(model.embed_tokens, self.parts[0].rows)
        quantise(model, self.options.base, double=self.scales != "single")
        if self.teacher:
            model.teacher = self.teacher.build(key)  # after the adapters, which it does not get
        return model

    def _open_teacher(self) -> tuple[Teacher | None, UserError | None]:
        """Return the teacher, or the error if it is gone. A finished run does without it.

        Raises UserError for a teacher with other tokens.
        """
        if not self.options.distill.teacher:
            return None, None
        try:
            source = open_decoder(self.options.distill.teacher)
        except UserError as error:
            return None, error
        architecture = registry.find(source.config, "decoder")
        cfg = architecture.config(source.config, f"{source.name}/config.json")
        if load_tokenizer(source.tokenizer_dir()).get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"distill.teacher={source.name!r} has other tokens than {self.source.name}; give a"
                " teacher with the same tokenizer"
            )
        part = architecture.part(source, cfg)._replace(prefix="teacher.", aid=True)
        return Teacher(architecture, cfg, part), None

    def initial(self, wanted: Collection[str]) -> dict[str, np.ndarray]:
        leaves, part = unpacked(describe(self.template)), self.parts[0]
        if not self.adapter:
            return peft.start(part, leaves, self.cfg.lora, wanted)
        return peft.load(self.adapter, part, leaves)

    def describe(self) -> str:
        kept = f" with the adapter's own {', '.join(self.kept)}" if self.kept else ""
        method = self.source.decoded_from
        whole = method and not self.cfg.lora.rank and "gguf" not in self.cfg.export.kind
        read = f" read from {method}" + (", exports are in 16 bits" if whole else "")
        return f"{self.source.config.get('model_type')}{kept}{read if method else ''}"

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
