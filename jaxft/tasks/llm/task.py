"""Causal language models of the LLaMA family: text, prompt and completion, classification."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxft.core import runtime
from jaxft.core.config import Config
from jaxft.core.errors import UserError
from jaxft.core.params import Params, bind, describe
from jaxft.core.sharding import (
    batch_ways,
    constrain,
    local_rows,
    place_batch,
)
from jaxft.core.step import Batch, Metrics, cast
from jaxft.data.loader import Subset, eval_batches, subset, train_loader
from jaxft.data.text import dataset as text
from jaxft.data.text.packing import Packing, make_packing
from jaxft.data.text.vocabulary import check_ids
from jaxft.kernels.cross_entropy import linear_cross_entropy
from jaxft.models import registry
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.files import open_decoder
from jaxft.models.decoders.generate import generate
from jaxft.models.decoders.sampling import Sampling
from jaxft.nn import lora
from jaxft.tasks import Look, Report, Request
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.tasks.options import LLMOptions
from jaxft.weights.adapters import peft as adapters
from jaxft.weights.adapters.peft_folder import fit, open_adapted
from jaxft.weights.folders.transformers import export_config

SHOWN = 5  # rows of predictions in a report


class LLM:
    """Fine-tuning a causal language model; see `jaxft.tasks.Task`."""

    Options = LLMOptions
    EXPORT_KINDS = ("merged", "adapter", "none")
    unit = "tokens"

    def __init__(self, cfg: Config):
        opened = open_adapted(
            cfg.model, cfg.lora.base, weights=cfg.init == "pretrained", opener=open_decoder
        )
        self.source, self.adapter, self.kept = opened
        self.options = LLMOptions(**cfg.own)
        self.architecture = registry.find(self.source.config, "decoder")
        self.model_cfg = self.architecture.config(self.source.config, "config.json")
        part = self.architecture.part(self.source, self.model_cfg)._replace(kept=self.kept)
        if self.adapter:
            module = partial(self.architecture.module, self.model_cfg)
            plain = jax.eval_shape(lambda key: module(key=key), jax.random.key(0))
            self.adapter = fit(self.adapter, part.entries(describe(plain)))
            cfg = dataclasses.replace(cfg, lora=self.adapter.lora)
        elif not cfg.lora.targets:
            lora_cfg = dataclasses.replace(cfg.lora, targets=self.architecture.lora)
            cfg = dataclasses.replace(cfg, lora=lora_cfg)
        self.cfg = cfg
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self.remat = runtime.resolve_remat(cfg.remat)
        self.template = jax.eval_shape(self.build, jax.random.key(0))
        self.parts = (part,)
        self.tokenizer = load_tokenizer(self.source.tokenizer_dir())
        self._check_pad()
        self.train_set = self._read(cfg.data.train)
        self.eval_set = self._read(cfg.data.eval) if cfg.data.eval else None
        sets = [data for data in (self.train_set, self.eval_set) if data]
        longest = max(data.report["longest_trained"] for data in sets)
        self.packing = self._pack() if self.options.pack else None
        if self.packing:
            longest *= self.packing.per_row
        self._trained_width = min(longest, self.options.seq_len)

    def build(self, key: jax.Array) -> nnx.Module:
        model = self.architecture.module(self.model_cfg, key=key)
        lora.add(model, self.cfg.lora, jax.random.fold_in(key, 1))
        return model

    def initial(self) -> dict[str, np.ndarray]:
        if not self.adapter:
            return {}
        return adapters.load(self.adapter, self.parts[0], describe(self.template))

    def describe(self) -> str:
        report = self.train_set.report
        cut = f", {report['truncated']} truncated to seq_len" if report["truncated"] else ""
        dropped = report["empty"] + report["untrained"]
        lost = f", {dropped} dropped (nothing to train in them)" if dropped else ""
        kept = f" with the adapter's own {', '.join(self.kept)}" if self.kept else ""
        rows = f", {self.cfg.batch_size} packed in {self.packing.rows} rows" if self.packing else ""
        return (
            f"{self.source.config.get('model_type')}{kept}; {self.cfg.data.train}:"
            f" {len(self.train_set)} sequences of at most {self.options.seq_len} tokens{rows},"
            f" {report['trained_tokens']} trained tokens{cut}{lost}"
        )

    def data_report(self) -> dict[str, int]:
        return self.train_set.report

    def bad_samples(self) -> tuple[()]:
        return ()  # a bad record stops the run

    def n_examples(self) -> int:
        return len(self.train_set)

    def prepare(self, params: Params, trained: set[str]) -> None:
        pass

    def train_batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return train_loader(
            self.train_set,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            start_step=start_step,
            collate_fn=self._collate_rows if self.packing else self._collate,
            rows=rows,
            layout=self._layout if self.packing else None,
        )

    def loss(
        self, model: Decoder, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        dropout = keys if self.cfg.lora.dropout else None
        hidden = self._hidden(model, batch, dropout)
        total, sums = self._cross_entropy(model, hidden, batch, dropout)
        return (total, sums["weight"]), {"token_accuracy": sums["correct"]}

    def shapes(self, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return itertools.islice(self.train_batches(0, rows), 1)

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return int(np.count_nonzero(batch["segment_ids"]))  # they count up where rows are shared

    def flops_per_unit(self, chosen: set[str]) -> float:
        """Forward and both halves of the backward pass; a frozen base has only one of them."""
        passes = 2 if all(".lora_" in path for path in chosen) else 3
        return passes * self.architecture.flops(self.model_cfg, self.options.seq_len)

    def exported(self, params: Params) -> Params:
        return params

    def side_files(self, dtype: str | None, rewritten: set[str]) -> dict[str, Path | bytes]:
        files = dict(self.source.side_files)
        config = export_config(self.source.config, dtype)
        if config != self.source.config or self.kept:
            files["config.json"] = _dump(config)
        ends, own = self.source.generation_config, self.tokenizer.eos_token_id
        known = _ids(ends.get("eos_token_id") or config.get("eos_token_id"))
        if self.source.tokenizer and own not in known:  # else generate passes the adapter's EOS by
            files["generation_config.json"] = _dump({**ends, "eos_token_id": [own, *known]})
        return files

    # ---- evaluation -----------------------------------------------------------------------

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        if self.eval_set is None:
            return Report({})
        view = subset(self.eval_set, self.options.eval_examples, self.cfg.seed)
        chosen = view.ids
        labels = tuple(sorted({*self.train_set.labels, *self.eval_set.labels}))
        sums, guesses = self._run_evaluation(params, mesh, view, labels)
        metrics = _language_metrics(sums, int(self.eval_set.n_bytes[chosen].sum()))
        if not labels:
            return Report(metrics)
        records = [self.eval_set.records[int(self.eval_set.record_ids[i])] for i in chosen]
        named = [labels[guess] for guess in guesses]
        right = [name == record["label"] for name, record in zip(named, records, strict=True)]
        metrics["accuracy"] = float(np.mean(right))
        rows = [
            (record["text"], record["label"], name)
            for record, name in zip(records[:SHOWN], named, strict=False)
        ]
        return Report(metrics, ("text", "label", "predicted"), tuple(rows))

    def _run_evaluation(
        self, params: Params, mesh: Mesh, view: Subset, labels: tuple[str, ...]
    ) -> tuple[dict[str, float], list[int]]:
        """Sums over the set and, for classification, the best label of every row."""
        size = 4 * self.cfg.batch_size // self.cfg.micro_batches
        firsts = text.first_tokens(self._label_rows(view, 0, labels)) if labels else None
        label_ids = np.zeros(1, np.int32) if firsts is None else firsts
        sums: dict[str, float] = {}
        guesses: list[int] = []
        for batch in eval_batches(view, size, self._collate, local_rows(mesh, size)):
            part, best = self._score(params, place_batch(batch, mesh), label_ids)
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            guesses += np.asarray(best).tolist()
        if labels and firsts is None:
            candidates = (self._label_rows(view, i, labels) for i in range(len(view)))
            guesses = [self._best_label(params, mesh, rows) for rows in candidates]
        return sums, guesses[: len(view)]

    @partial(jax.jit, static_argnums=0)
    def _score(self, params: Params, batch: Batch, label_ids: jax.Array) -> tuple[Metrics, Any]:
        """Sums of a batch, and the likeliest of `label_ids` at each row's first trained target."""
        model = bind(self.template, cast(params, self.dtype))
        hidden = self._hidden(model, batch, None)
        total, sums = self._cross_entropy(model, hidden, batch, None)
        first = jnp.argmax(batch["weights"] > 0, axis=1)
        at_label = jnp.take_along_axis(hidden, first[:, None, None], axis=1)
        best = jnp.argmax(model.logits(at_label)[:, 0, label_ids], axis=-1)
        sums = {"nll": total, "weight": sums["weight"], "correct": sums["correct"]}
        return sums, constrain(best, None)

    def _label_rows(self, view: Subset, index: int, labels: tuple[str, ...]) -> list[text.Example]:
        """A record's row with each of the labels."""
        assert self.eval_set is not None
        record = self.eval_set.records[int(self.eval_set.record_ids[view.ids[index]])]
        template, seq_len = self.options.template, self.options.seq_len
        return text.label_rows(self.tokenizer, record["text"], labels, template, seq_len)

    def _best_label(self, params: Params, mesh: Mesh, rows: list[text.Example]) -> int:
        """The row of the lowest total loss: that of its label, the text behind it and EOS."""
        ways = batch_ways(mesh)
        batch = self._collate(rows, batch_rows=-(-len(rows) // ways) * ways)
        most = int(batch["weights"].sum(axis=1).max())
        width = min(-(-most // 8) * 8, self.options.seq_len)  # few widths are few compilations
        losses = self._row_loss(params, place_batch(batch, mesh), width)
        return int(np.argmin(np.asarray(losses)[: len(rows)]))

    @partial(jax.jit, static_argnums=(0, 3))
    def _row_loss(self, params: Params, batch: Batch, width: int) -> jax.Array:
        """Summed loss of each row [B], of which at most `width` positions are trained."""
        model = bind(self.template, cast(params, self.dtype))
        hidden = self._hidden(model, batch, None)
        hidden, targets, weights = self._trained_only(hidden, batch, width)
        nll = -jax.nn.log_softmax(model.logits(hidden))
        picked = jnp.take_along_axis(nll, targets[..., None], axis=-1)[..., 0]
        return constrain(jnp.sum(picked * weights, axis=1), None)

    # ---- sampling -------------------------------------------------------------------------

    def sample(self, params: Params) -> Look:
        data = self.eval_set or self.train_set
        if data.labels:
            return Look()
        prompts = [_prompt(data[i]) for i in range(min(SHOWN, len(data)))]
        texts = self._continue(params, prompts, 48, Sampling(), 0)
        pairs = zip(prompts, texts, strict=True)
        return Look("\n".join(f"{self.tokenizer.decode(ids)!r} -> {made!r}" for ids, made in pairs))

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        """Continuations in one batch, each up to an end-of-sequence id or `max_new` tokens."""
        ids = [text.prompt_tokens(self.tokenizer, prompt) for prompt in prompts]
        for prompt, row in zip(prompts, ids, strict=True):
            check_ids(row, self.model_cfg.vocab_size, self.tokenizer, f"prompt {prompt[:60]!r}")
        top_p = 1.0 if request.top_p is None else request.top_p
        how = Sampling(request.temperature or 0.0, request.top_k or 0, top_p)
        made = self._continue(params, ids, request.max_new, how, request.seed)
        return [Look(prompt + text) for prompt, text in zip(prompts, made, strict=True)]

    def _continue(
        self, params: Params, prompts: list[np.ndarray], max_new: int, how: Sampling, seed: int
    ) -> list[str]:
        width = max(len(ids) for ids in prompts)
        tokens = np.zeros((len(prompts), width), np.int32)
        segments = np.zeros_like(tokens)
        for row, ids in enumerate(prompts):
            tokens[row, width - len(ids) :], segments[row, width - len(ids) :] = ids, 1
        keys = jax.random.split(jax.random.key(seed), len(prompts))
        made, lengths = self._generate(params, tokens, segments, keys, max_new, how)
        stops = set(self.stop_ids())
        pairs = zip(np.asarray(made), np.asarray(lengths), strict=True)
        rows = [row[:n].tolist() for row, n in pairs]
        kept = [ids[:-1] if ids and ids[-1] in stops else ids for ids in rows]
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]

    @partial(jax.jit, static_argnums=(0, 5, 6))
    def _generate(
        self, params: Params, tokens: Any, segments: Any, keys: Any, max_new: int, how: Sampling
    ) -> tuple[jax.Array, jax.Array]:
        model = bind(self.template, cast(params, self.dtype))
        stop_ids = self.stop_ids()
        made, lengths = generate(
            model, tokens, segments, keys,
            max_new=max_new, stop_ids=stop_ids, how=how, dtype=self.dtype,
        )  # fmt: skip
        return constrain(made, None, None), constrain(lengths, None)

    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: the generation config's, the config's, the tokenizer's."""
        ids = {self.tokenizer.eos_token_id}
        for config in (self.source.generation_config, self.source.config):
            ids |= set(_ids(config.get("eos_token_id")))
        return tuple(sorted(ids))

    # ---- shared pieces --------------------------------------------------------------------

    def _read(self, spec: str) -> text.TextDataset:
        return text.load_text(
            spec,
            self.tokenizer,
            seq_len=self.options.seq_len,
            template=self.options.template,
            vocab_size=self.model_cfg.vocab_size,
        )

    def _check_pad(self) -> None:
        """UserError for a pad token without a row: nothing here uses it, transformers would."""
        rows, tokenizer = self.model_cfg.vocab_size, self.tokenizer
        if tokenizer.pad_token_id is not None:
            where = f"{self.source.name}: pad_token of tokenizer_config.json"
            check_ids([tokenizer.pad_token_id], rows, tokenizer, where)
        stated = self.source.config.get("pad_token_id")
        if isinstance(stated, int) and stated >= rows:
            raise UserError(
                f"{self.source.name}/config.json: pad_token_id={stated}, but vocab_size={rows};"
                " transformers does not open such a model; set pad_token_id to null"
            )

    def _collate(self, examples: Any, *, batch_rows: int) -> dict[str, np.ndarray]:
        return text.collate(examples, self.options.seq_len, batch_rows)

    def _collate_rows(self, examples: Any, *, batch_rows: int) -> dict[str, np.ndarray]:
        return text.collate_rows(examples, self.options.seq_len, batch_rows)

    def _pack(self) -> Packing | None:
        """How examples share rows; None where sharing saves nothing."""
        mesh = self.cfg.mesh
        ways = jax.device_count() // max(mesh.tensor, 1)
        packing = make_packing(
            self.train_set.inputs,
            len(self.train_set),
            self.cfg.batch_size,
            self.cfg.micro_batches * ways,
            self.options.seq_len,
        )
        return packing if packing.per_row > 1 else None

    def _layout(self, sample_ids: Any) -> list[list[int]]:
        assert self.packing is not None
        return self.packing.groups([self.train_set.inputs(i) for i in sample_ids])

    def _hidden(self, model: Decoder, batch: Batch, keys: jax.Array | None) -> jax.Array:
        """The model's last hidden states.

        A row of one example is padded on the right: under a causal mask no real token sees the
        padding, so it needs no segments, and the fastest causal kernel serves.
        """
        places = (batch["positions"], batch["segment_ids"]) if self.packing else (None, None)
        return model.hidden(
            batch["tokens"], *places, keys=keys, remat=self.remat, dtype=self.dtype
        )[0]

    def _cross_entropy(
        self, model: Decoder, hidden: jax.Array, batch: Batch, keys: jax.Array | None
    ) -> tuple:
        hidden, targets, weights = self._trained_only(hidden, batch, self._trained_width)
        head, vocab_first = model.head()
        features = model.features(hidden, keys)
        return linear_cross_entropy(features, head, targets, weights, vocab_first=vocab_first)

    def _trained_only(self, hidden: jax.Array, batch: Batch, width: int) -> tuple:
        """(hidden, targets, weights) of the `width` positions that rows may train.

        Where only a completion is trained, this spares the head most of its work.
        """
        if 2 * width > self.options.seq_len:
            return hidden, batch["targets"], batch["weights"]
        places = jax.lax.top_k(batch["weights"], width)[1]
        kept = [jnp.take_along_axis(batch[name], places, axis=1) for name in ("targets", "weights")]
        return jnp.take_along_axis(hidden, places[..., None], axis=1), *kept


def _dump(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _ids(value: Any) -> list[int]:
    """The ids of a config's eos_token_id: one, several or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _prompt(example: text.Example) -> np.ndarray:
    """What a row's first trained token is predicted from, or its first 32 tokens if that is all."""
    first = int(np.argmax(example.weights > 0))
    return example.tokens[: first if first > 1 else min(32, len(example.tokens) - 1)]


def _language_metrics(sums: dict[str, float], n_bytes: int) -> dict[str, float]:
    """Mean loss and what follows from it, over all trained tokens of the set."""
    weight = max(sums["weight"], 1.0)
    loss = sums["nll"] / weight
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": sums["nll"] / math.log(2) / max(n_bytes, 1),
        "token_accuracy": sums["correct"] / weight,
        "tokens": sums["weight"],
    }
