"""Evaluation and predictions of a head of scores."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxft.core.cli.live import count_done
from jaxft.core.params import Params, bind
from jaxft.core.sharding import batch_ways, constrain, local_rows, place_batch
from jaxft.core.step import Batch
from jaxft.data.loader import Subset, eval_batches, subset
from jaxft.data.text.dataset import Example, make_encoder
from jaxft.data.text.labelled import LabelRule, read_at_end
from jaxft.data.text.packing import collate
from jaxft.data.text.vocabulary import check_ids
from jaxft.objectives.classification import head_scores, label_losses
from jaxft.objectives.next_token import NextToken
from jaxft.tasks import Data, Look, Report, Request, Unread
from jaxft.tasks.llm.heads.measures import class_f1, confusion, confusion_picture, macro_f1
from jaxft.tasks.llm.opened import OpenedDecoder
from jaxft.tasks.llm.options import MULTI_LABEL, SINGLE_LABEL
from jaxft.tasks.llm.rows import CHAT_FACT

SHOWN_TEXTS = 5  # texts of a report or a sample
NAMED = 3  # likeliest labels of a sample
NAMED_F1 = 20  # classes whose F1 are measures of their own, at most
TEXT_END = 80  # of a text in a sample


class ScorePreview:
    """Evaluation of a head of scores, one text a row. Implements `jaxft.tasks.Preview`."""

    unread = Unread()

    def __init__(self, opened: OpenedDecoder, data: Data):
        self.opened, self.data, self.options = opened, data, opened.options
        self.tokens = NextToken(opened.dtype, opened.options.seq_len, width=1)

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        rows = self.data.held_out
        if rows is None:
            return Report({})
        view = subset(rows.data, self.options.eval_examples, self.opened.cfg.seed)
        scores = self._score_all(params, mesh, view)
        labels = rows.data.labels[view.ids]
        problem = self.options.problem_type
        losses = label_losses(problem, jnp.asarray(scores)[:, None], jnp.asarray(labels)[:, None])
        metrics = {
            "loss": float(jnp.mean(losses)),
            **_measures(problem, scores, labels, self.opened.labels),
        }
        records = [rows.data.records[int(rows.data.record_ids[i])] for i in view.ids]
        truths = [rows.rule.name(label) for label in labels]
        named = [rows.rule.name(self._label(row)) for row in scores]
        shown = list(zip((r["text"] for r in records), truths, named, strict=True))[:SHOWN_TEXTS]
        found = [
            {"text": record["text"], "label": truth, "predicted": name, "scores": row.tolist()}
            for record, truth, name, row in zip(records, truths, named, scores, strict=True)
        ]
        pictures = {}
        if problem == SINGLE_LABEL:
            table = confusion(labels, scores.argmax(axis=-1), len(self.opened.labels))
            pictures["confusion"] = confusion_picture(table, self.opened.labels)
        headers = ("text", "label", "predicted")
        return Report(metrics, headers, tuple(shown), pictures, tuple(found))

    def sample(self, params: Params) -> Look:
        rows = (self.data.held_out or self.data.train).data
        examples = [rows[i].example for i in range(min(SHOWN_TEXTS, len(rows)))]
        return Look("\n".join(self.describe_examples(params, examples)))

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        """Return the labels of each prompt, or its reward. A prompt is read as it is."""
        examples = [self._example(prompt, repr(prompt)) for prompt in prompts]
        return [Look(line) for line in self.describe_examples(params, examples)]

    def predict(
        self, params: Params, texts: Sequence[str], places: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the predicted label of each text, and the score of every label by name.

        Scores are probabilities, or numbers of a regression or a reward. `places` name the texts in
        errors.
        """
        examples = [self._example(one, where) for one, where in zip(texts, places, strict=True)]
        size = 4 * self.opened.cfg.batch_size // self.opened.cfg.micro_batches
        names = ("reward",) if self.options.pairs else self.opened.labels
        found: list[dict[str, Any]] = []
        for first in range(0, len(examples), size):
            count_done(first, len(examples))
            some = examples[first : first + size]
            filled = [*some, *[some[0]] * (size - len(some))]  # one shape for all batches
            for row in self.score(params, filled)[: len(some)]:
                scores = dict(zip(names, map(float, self._shares(row)), strict=True))
                label = {} if self.options.pairs else {"label": self._label_name(row)}
                found.append({**label, "scores": scores})
        return found

    def _example(self, prompt: str, where: str) -> Example:
        """Return a text with the special tokens that texts of the training set got."""
        ids = self._ids(prompt)
        check_ids(ids, self.opened.model_cfg.vocab_size, self.opened.tokenizer, where)
        return read_at_end(np.asarray(ids, np.int32), self.opened.pad_id)

    def _label_name(self, row: Float[np.ndarray, " C"]) -> str:
        return LabelRule(self.opened.labels, self.options.problem_type).name(self._label(row))

    def describe_examples(self, params: Params, examples: Sequence[Example]) -> list[str]:
        """Return a line for each example: its text, and its likeliest labels or its numbers."""
        scores = self.score(params, examples)
        decode = self.opened.tokenizer.decode
        texts = [decode(one.tokens[:-1], skip_special_tokens=True) for one in examples]
        ends = [t if len(t) <= TEXT_END else f"…{t[-TEXT_END:]}" for t in texts]
        return [f"{end!r} -> {self._named(row)}" for end, row in zip(ends, scores, strict=True)]

    def score(self, params: Params, examples: Sequence[Example]) -> Float[np.ndarray, "n C"]:
        """Return the scores of a few examples, which are weighted where the head is read."""
        mesh = jax.sharding.get_mesh()
        ways = batch_ways(mesh)
        batch = collate(examples, self.options.seq_len, -(-len(examples) // ways) * ways)
        return np.asarray(self._score(params, place_batch(batch, mesh)))[: len(examples)]

    def _score_all(self, params: Params, mesh: Mesh, view: Subset) -> Float[np.ndarray, "n C"]:
        cfg, collate_fn = self.opened.cfg, self.data.held_out.collate
        size = 4 * cfg.batch_size // cfg.micro_batches
        batches = eval_batches(view, size, collate_fn, local_rows(mesh, size))
        found = [np.asarray(self._score(params, place_batch(one, mesh))) for one in batches]
        return np.concatenate(found)[: len(view)]

    @partial(jax.jit, static_argnums=0)
    def _score(self, params: Params, batch: Batch) -> jax.Array:
        """Return the scores of each row [B, C]."""
        model = bind(self.opened.template, params, self.opened.dtype)
        scores, weights, _ = head_scores(self.tokens, model, batch)
        return constrain(jnp.sum(scores * weights[..., None], axis=1), None, None)  # [B, C]

    def _ids(self, prompt: str) -> Any:
        """Return token ids of a text: those of `tokenizer(text)`, or of a side of a pair."""
        seq_len, tokenizer = self.options.seq_len, self.opened.tokenizer
        if not self.options.pairs:
            return tokenizer(prompt, truncation=True, max_length=seq_len)["input_ids"]
        if CHAT_FACT in self.data.facts:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        else:
            ids = make_encoder(tokenizer).encode([("", prompt)])[0].tokens
        return ids[:seq_len]

    def _label(self, row: Float[np.ndarray, " C"]) -> np.ndarray:
        """Return the predicted label of a text in the form of `Labelled.label`."""
        if self.options.problem_type == SINGLE_LABEL:
            return np.asarray(row.argmax())
        return row > 0 if self.options.problem_type == MULTI_LABEL else row

    def _shares(self, row: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
        """Return the probability of each label, or the numbers as they are."""
        if self.options.pairs or self.options.problem_type == "regression":
            return row
        if self.options.problem_type == MULTI_LABEL:
            return 1 / (1 + np.exp(-row))
        shares = np.exp(row - row.max())
        return shares / shares.sum()

    def _named(self, row: Float[np.ndarray, " C"]) -> str:
        names, problem, shares = self.opened.labels, self.options.problem_type, self._shares(row)
        if self.options.pairs:
            return f"reward {row[0]:.4f}"
        if problem == "regression":
            return ", ".join(f"{name} {one:.4f}" for name, one in zip(names, row, strict=True))
        best = np.argsort(-shares, kind="stable")[:NAMED]
        return ", ".join(f"{names[i]} {shares[i]:.4f}" for i in best)


def _measures(
    problem: str, scores: Float[np.ndarray, "n C"], labels: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    """Return accuracy, macro F1 and the F1 of each of a few classes.

    For a regression, return the mean absolute error and R^2.
    """
    if problem == "regression":
        spread = np.square(labels - labels.mean(axis=0)).sum()
        missed = np.square(scores - labels).sum()
        r2 = 1 - missed / spread if spread else 0.0
        return {"mae": float(np.abs(scores - labels).mean()), "r2": float(r2)}
    if problem == MULTI_LABEL:
        truth, guessed = labels > 0.5, scores > 0
        exact = float((truth == guessed).all(axis=-1).mean())
        found = {"accuracy": float((truth == guessed).mean()), "exact_match": exact}
    else:
        each, best = np.eye(scores.shape[-1], dtype=bool), scores.argmax(axis=-1)
        truth, guessed = each[labels], each[best]
        found = {"accuracy": float((best == labels).mean())}
    found["macro_f1"] = macro_f1(truth, guessed)
    by_class = zip(names, class_f1(truth, guessed), strict=True) if len(names) <= NAMED_F1 else ()
    return found | {f"f1/{name}": float(f1) for name, f1 in by_class if not np.isnan(f1)}
