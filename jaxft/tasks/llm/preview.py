"""Evaluation and samples of a language model: loss, label accuracy, continuations."""

import math
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.core.cli.live import count_done
from jaxft.core.params import Params, bind
from jaxft.core.sharding import batch_ways, constrain, local_rows, place_batch
from jaxft.core.step import Batch, Metrics
from jaxft.data.loader import Subset, eval_batches, subset
from jaxft.data.text import dataset as text
from jaxft.data.text.alpaca import alpaca_prompt
from jaxft.data.text.chat.format import ChatFormat
from jaxft.data.text.templates import ALPACA, split_template
from jaxft.data.text.vocabulary import check_ids
from jaxft.models.decoders.generation.generate import generate
from jaxft.models.decoders.generation.sampling import Sampling
from jaxft.objectives.next_token import NextToken
from jaxft.tasks import Data, Look, Report, Request, Unread
from jaxft.tasks.llm.opened import OpenedDecoder
from jaxft.tasks.llm.rows import CHAT_FACT, KIND_FACT

SHOWN_PREDICTIONS = 5  # rows of predictions in a report
SEARCHED = 200  # rows among which different prompts are looked for
SAMPLE_TOKENS = 48  # new tokens of a sample during training


class DecoderPreview:
    """Evaluation and samples of a decoder. Implements `jaxft.tasks.Preview`.

    Evaluation rows hold one example each, so that a command and the run compute the same numbers.
    """

    unread = Unread()

    def __init__(self, opened: OpenedDecoder, data: Data):
        self.opened, self.data = opened, data
        self.options, self.tokenizer, self.dtype = opened.options, opened.tokenizer, opened.dtype
        held_out, seq_len = data.held_out, opened.options.seq_len
        width = held_out.width if held_out else seq_len
        self.objective = NextToken(self.dtype, seq_len, width)
        labels = held_out.data.labels if held_out else ()
        known = data.facts.get("labels", ()) if labels else ()  # a mixture may train labels too
        self.labels = tuple(sorted({*known, *labels}))

    # ---- evaluation -----------------------------------------------------------------------

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        if self.data.held_out is None:
            return Report({})
        rows, labels = self.data.held_out.data, self.labels
        view = subset(rows, self.options.eval_examples, self.opened.cfg.seed)
        sums, guesses = self._run(params, mesh, view)
        metrics = _language_metrics(sums, int(rows.n_bytes[view.ids].sum()))
        if not labels:
            return Report(metrics)
        records = [rows.records[int(rows.record_ids[i])] for i in view.ids]
        named = [labels[guess] for guess in guesses]
        right = [name == record["label"] for name, record in zip(named, records, strict=True)]
        metrics["accuracy"] = float(np.mean(right))
        shown = [
            (record["text"], record["label"], name)
            for record, name in zip(records[:SHOWN_PREDICTIONS], named, strict=False)
        ]
        return Report(metrics, ("text", "label", "predicted"), tuple(shown))

    def _run(self, params: Params, mesh: Mesh, view: Subset) -> tuple[dict[str, float], list[int]]:
        """Return sums over the set and, for classification, the best label of every row."""
        cfg, labels, collate = self.opened.cfg, self.labels, self.data.held_out.collate
        size = 4 * cfg.batch_size // cfg.micro_batches
        firsts = text.first_tokens(self._label_rows(view, 0)) if labels else None
        label_ids = np.zeros(1, np.int32) if firsts is None else firsts
        sums: dict[str, float] = {}
        guesses: list[int] = []
        for batch in eval_batches(view, size, collate, local_rows(mesh, size)):
            part, best = self._score(params, place_batch(batch, mesh), label_ids)
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            guesses += np.asarray(best).tolist()
        if labels and firsts is None:
            guesses = []
            for i in range(len(view)):
                count_done(i, len(view))
                guesses.append(self._best_label(params, mesh, self._label_rows(view, i)))
        return sums, guesses[: len(view)]

    @partial(jax.jit, static_argnums=0)
    def _score(self, params: Params, batch: Batch, label_ids: jax.Array) -> tuple[Metrics, Any]:
        """Return sums of a batch, and the likeliest of `label_ids` for each row [B], as an index.

        A label is scored at the row's first trained target.
        """
        model = bind(self.opened.template, params, self.dtype)
        hidden = self.objective.hidden(model, batch, None)
        total, sums = self.objective.cross_entropy(model, hidden, batch, None)
        first = jnp.argmax(batch["weights"] > 0, axis=1)
        at_label = jnp.take_along_axis(hidden, first[:, None, None], axis=1)  # [B, 1, D]
        best = jnp.argmax(model.logits(at_label)[:, 0, label_ids], axis=-1)
        sums = {"nll": total, "weight": sums["weight"], "correct": sums["correct"]}
        return sums, constrain(best, None)

    def _label_rows(self, view: Subset, index: int) -> list[text.Example]:
        """Return the rows of one record, one for each label."""
        rows = self.data.held_out.data
        record = rows.records[int(rows.record_ids[view.ids[index]])]
        template, seq_len = self.options.template, self.options.seq_len
        return text.label_rows(self.tokenizer, record["text"], self.labels, template, seq_len)

    def _best_label(self, params: Params, mesh: Mesh, rows: list[text.Example]) -> int:
        """Return the index of the row with the lowest total loss.

        The loss of a row is that of its label, the text after it, and EOS.
        """
        ways = batch_ways(mesh)
        batch = self.data.held_out.collate(rows, batch_rows=-(-len(rows) // ways) * ways)
        most = int(batch["weights"].sum(axis=1).max())
        width = min(-(-most // 8) * 8, self.options.seq_len)  # few widths need few compilations
        losses = self._row_loss(params, place_batch(batch, mesh), width)
        return int(np.argmin(np.asarray(losses)[: len(rows)]))

    @partial(jax.jit, static_argnums=(0, 3))
    def _row_loss(self, params: Params, batch: Batch, width: int) -> jax.Array:
        """Return the summed loss of each row [B]. At most `width` positions of a row train."""
        model = bind(self.opened.template, params, self.dtype)
        hidden = self.objective.hidden(model, batch, None)
        hidden, targets, weights = self.objective.trained_only(hidden, batch, width)
        nll = -jax.nn.log_softmax(model.logits(hidden))
        picked = jnp.take_along_axis(nll, targets[..., None], axis=-1)[..., 0]
        return constrain(jnp.sum(picked * weights, axis=1), None)

    # ---- sampling -------------------------------------------------------------------------

    def sample(self, params: Params) -> Look:
        rows = (self.data.held_out or self.data.train).data
        if rows.labels:
            return Look()
        return self.continue_examples(params, (rows[i] for i in range(len(rows))), rows.chat)

    def continue_examples(
        self, params: Params, examples: Iterable[text.Example], chat: ChatFormat | None
    ) -> Look:
        """Return the likeliest continuations of the first few different prompts of the examples.

        chat: the format of the examples, None for plain texts.
        """
        found: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        for example in islice(examples, SEARCHED):
            prompt, reference = _split(example)
            found.setdefault(prompt.tobytes(), (prompt, reference))
            if len(found) == SHOWN_PREDICTIONS:
                break
        prompts = [prompt for prompt, _ in found.values()]
        stops = self.opened.stop_ids(chat)
        texts = self._continue(params, prompts, SAMPLE_TOKENS, Sampling(), 0, stops)
        shown = [self.tokenizer.decode(ids) for ids in prompts]
        pairs = found.values()
        wanted = [self.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in pairs]
        rows = zip(shown, wanted, (text for text, _ in texts), strict=True)
        return Look(headers=("prompt", "reference", "answer"), rows=tuple(rows))

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        """Continue all prompts in one batch, each to an end-of-sequence id or `max_new` tokens.

        A prompt is what a record of the run was: a user turn of a conversation, an instruction, or
        the text of the template. With `request.raw` it is continued as it is.
        """
        chat = None if request.raw or CHAT_FACT not in self.data.facts else self.opened.chat
        if chat is None and not request.raw:
            prompts = [self._as_trained(prompt) for prompt in prompts]
        ids = [self._prompt_ids(prompt, chat) for prompt in prompts]
        size, images = self.opened.model_cfg.vocab_size, self.opened.model_cfg.image_ids
        for prompt, row in zip(prompts, ids, strict=True):
            check_ids(row, size, self.tokenizer, f"prompt {prompt[:60]!r}", images)
        top_p = 1.0 if request.top_p is None else request.top_p
        how = Sampling(request.temperature or 0.0, request.top_k or 0, top_p)
        stops = self.opened.stop_ids(chat)
        made = self._continue(params, ids, request.max_new, how, request.seed, stops)
        made = [text or end for text, end in made]
        between = "" if chat is None else "\n-> "
        return [Look(prompt + between + text) for prompt, text in zip(prompts, made, strict=True)]

    def _as_trained(self, prompt: str) -> str:
        """Return the prompt of a record with this text, in the form that the run trained."""
        kind = tuple(self.data.facts.get(KIND_FACT, ()))
        if kind == ALPACA:
            return alpaca_prompt(prompt, "")
        if kind == ("text", "label"):
            return split_template(self.options.template)[0].replace("{text}", prompt)
        return prompt

    def _prompt_ids(self, prompt: str, chat: ChatFormat | None) -> np.ndarray:
        if chat is None:
            return text.prompt_tokens(self.tokenizer, prompt)
        facts = self.data.facts
        opening = chat.opening(prompt, thinks=2 * facts["prompted"] > facts["examples"])
        return np.asarray(self.tokenizer(opening, add_special_tokens=False)["input_ids"], np.int32)

    def _continue(
        self,
        params: Params,
        prompts: list[np.ndarray],
        max_new: int,
        how: Sampling,
        seed: int,
        stop_ids: tuple[int, ...],
    ) -> list[tuple[str, str]]:
        """Return the continuation of each prompt, and the reason for one without text."""
        width = max(len(ids) for ids in prompts)
        tokens = np.zeros((len(prompts), width), np.int32)
        segments = np.zeros_like(tokens)
        for row, ids in enumerate(prompts):
            tokens[row, width - len(ids) :], segments[row, width - len(ids) :] = ids, 1
        keys = jax.random.split(jax.random.key(seed), len(prompts))
        made, lengths = self._generate(params, tokens, segments, keys, max_new, how, stop_ids)
        pairs = zip(np.asarray(made), np.asarray(lengths), strict=True)
        rows = [row[:n].tolist() for row, n in pairs]
        kept = [ids[:-1] if ids and ids[-1] in stop_ids else ids for ids in rows]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]
        whys = map(self._why_empty, texts, rows, kept)
        return list(zip(texts, whys, strict=True))

    def _why_empty(self, made: str, ids: list[int], kept: list[int]) -> str:
        """Return the reason of an answer without text, "" for one with text."""
        if made:
            return ""
        names = [str(name) for name in self.tokenizer.convert_ids_to_tokens(ids)]
        if not kept and names:
            return f"(empty: it ended at once, as {names[0]!r} followed the prompt)"
        return f"(empty: only special tokens: {' '.join(names[:5])})"

    @partial(jax.jit, static_argnums=(0, 5, 6, 7))
    def _generate(
        self,
        params: Params,
        tokens: Any,
        segments: Any,
        keys: Any,
        max_new: int,
        how: Sampling,
        stop_ids: tuple[int, ...],
    ) -> tuple[jax.Array, jax.Array]:
        model = bind(self.opened.template, params, self.dtype)
        made, lengths = generate(
            model, tokens, segments, keys,
            max_new=max_new, stop_ids=stop_ids, how=how, dtype=self.dtype,
        )  # fmt: skip
        return constrain(made, None, None), constrain(lengths, None)


def _split(example: text.Example) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens before a row's first trained one, and the trained ones from there on.

    If the row trains all its tokens, its first 32 are the prompt.
    """
    tokens, weights = example.tokens, example.weights
    first = int(np.argmax(weights > 0))
    first = first if first > 1 else min(32, len(tokens) - 1)
    untrained = np.flatnonzero(weights[first:] == 0)
    end = first + int(untrained[0]) if len(untrained) else len(tokens)
    return tokens[:first], tokens[first : min(end, first + SAMPLE_TOKENS)]


def _language_metrics(sums: dict[str, float], n_bytes: int) -> dict[str, float]:
    """Return the mean loss over all trained tokens of the set, and metrics derived from it."""
    weight = max(sums["weight"], 1.0)
    loss = sums["nll"] / weight
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": sums["nll"] / math.log(2) / max(n_bytes, 1),
        "token_accuracy": sums["correct"] / weight,
        "tokens": sums["weight"],
    }
