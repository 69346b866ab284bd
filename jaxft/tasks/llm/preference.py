"""Preference objectives of a decoder: stored reference log-probabilities, and evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxft.core.params import Leaf, Params, bind, describe
from jaxft.core.sharding import constrain, local_rows, place_batch
from jaxft.core.step import Batch
from jaxft.data.cache import ArrayCache
from jaxft.data.loader import subset
from jaxft.data.text.packing import Groups, first_fit
from jaxft.objectives.next_token import NextToken
from jaxft.objectives.preference import PairScores, Preference, PreferenceRule, preference_loss
from jaxft.tasks import Data, Look, Report, Request, Unread
from jaxft.tasks.common.encoded import fingerprint
from jaxft.tasks.llm.heads.preview import ScorePreview
from jaxft.tasks.llm.opened import OpenedDecoder
from jaxft.tasks.llm.options import BETA, SIMPO_BETA, SIMPO_MARGIN
from jaxft.tasks.llm.pairs import PairRows, collate_pairs
from jaxft.tasks.llm.preview import SHOWN_PREDICTIONS, DecoderPreview

PACKED_TOGETHER = 1024  # pairs that share rows in an inference pass
FALL = 0.1  # relative fall of logps/chosen, above which the user is warned


def make_preference(opened: OpenedDecoder, width: int, per_row: int) -> Preference:
    """Return the objective over rows of up to `per_row` pairs and `width` trained positions."""
    options, flops = opened.options, opened.architecture.flops
    assert flops is not None  # every decoder has it
    keys = options.preference
    beta = keys.beta or {"simpo": SIMPO_BETA, "reward": 1.0}.get(options.objective, BETA)
    margin = keys.margin or SIMPO_MARGIN
    room, cost = 2 * options.seq_len, flops(opened.model_cfg, options.seq_len)
    tokens = NextToken(opened.dtype, room, width, per_row=2 * per_row, token_flops=cost)
    numbers = beta, margin, keys.smoothing, keys.sft, keys.center
    numbers = *numbers, keys.desirable or 1.0, keys.undesirable or 1.0
    return Preference(tokens, PreferenceRule(options.objective, *numbers))


@partial(jax.jit, static_argnums=(0, 1))
def _score(opened: OpenedDecoder, objective: Preference, params: Params, batch: Batch) -> jax.Array:
    """Return the log-probabilities of both sides of the pairs of a batch, [B, K, 2]."""
    sums, _ = objective.score(bind(opened.template, params, opened.dtype), batch)
    return constrain(sums, None, None, None)


def score_pairs(
    opened: OpenedDecoder, rows: PairRows, params: Params, ids: Sequence[int], mesh: Mesh
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield pairs (by index) and the log-probabilities of their sides [n, 2], in packed rows."""
    lengths = [rows.data.inputs(i) for i in ids]
    per_row = max(1, round(2 * rows.room / np.mean(lengths)))
    groups: Groups = []
    for start in range(0, len(ids), PACKED_TOGETHER):
        block = lengths[start : start + PACKED_TOGETHER]
        groups += [[ids[start + i] for i in g] for g in first_fit(block, rows.room, per_row)]
    width = min(per_row * rows.data.report["longest_trained"], rows.room)
    objective = make_preference(opened, width, per_row)
    size = 2 * opened.cfg.batch_size // opened.cfg.micro_batches
    own = local_rows(mesh, size)
    for start in range(0, len(groups), size):
        some = groups[start : start + size]
        items = [[rows[i] for i in group] for group in some[own]]
        batch = collate_pairs(items, opened.options, per_row, own.stop - own.start)
        sums = np.asarray(_score(opened, objective, params, place_batch(batch, mesh)))
        found = [(i, sums[r, k]) for r, group in enumerate(some) for k, i in enumerate(group)]
        yield [i for i, _ in found], np.stack([values for _, values in found])


def encode(
    opened: OpenedDecoder, sets: Sequence[Any], load: Callable[[set[str]], Params]
) -> Params:
    """Give every pair the log-probabilities that the model had before step 0.

    They are computed once, and kept in the folder `cache` by the content of pairs and weights. A
    resumed run reads them, so that neither its start nor its training holds a second copy of the
    weights. Returns the parameters, for a run that starts.
    """
    if not opened.options.stores_reference or not sets:
        return {}
    leaves = describe(opened.template)
    first = load(set(leaves))
    store = _open_store(opened, leaves, first) if opened.options.cache else None
    mesh = jax.sharding.get_mesh()
    for rows in sets:
        keys = [rows.data.key(i) for i in range(len(rows))]
        lacking = np.array([store is None or key not in store for key in keys])
        if jax.process_count() > 1:  # all processes compute together what one of them lacks
            lacking = np.any(multihost_utils.process_allgather(lacking), axis=0)
        todo = np.flatnonzero(lacking).tolist()
        for ids, values in score_pairs(opened, rows, first, todo, mesh) if todo else ():
            rows.reference[ids] = values
            if store is not None:
                for i, one in zip(ids, values, strict=True):
                    store.put(keys[i], {"logps": one})
                store.flush()
        if store is not None:
            for i in np.flatnonzero(~lacking):
                rows.reference[i] = store.get(keys[i])["logps"]
        if jax.process_index() == 0:
            print(
                f"reference log-probabilities of {rows.name}: {len(todo)} pairs computed,"
                f" {len(rows) - len(todo)} read",
                flush=True,
            )
    if store is not None:
        store.close()
    return first


def _open_store(opened: OpenedDecoder, leaves: Mapping[str, Leaf], first: Params) -> ArrayCache:
    """Return the cache of the weights of step 0.

    New adapters do not count, because their update is zero.
    """
    continued = opened.adapter is not None
    counted = {path: x for path, x in first.items() if continued or not leaves[path].added}
    names = {path: fingerprint({path: x}, ("",)) for path, x in counted.items()}
    scale = opened.cfg.lora if continued else None
    more = sorted(names.items()), opened.model_cfg, str(opened.dtype), scale
    name = fingerprint({}, ("",), *more)
    return ArrayCache(opened.options.cache, f"reference {name}", jax.process_index())


class PairPreview:
    """Evaluation of a decoder on pairs, and its samples. Implements `jaxft.tasks.Preview`."""

    unread = Unread()

    def __init__(self, opened: OpenedDecoder, data: Data):
        self.opened, self.data = opened, data
        facts = Data(facts=data.facts)
        self.decoder = None if opened.options.scored else DecoderPreview(opened, facts)
        self.scorer = ScorePreview(opened, facts) if opened.options.scored else None
        self._first: dict[str, float] = {}  # metrics of the first evaluation

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        """Return loss and metrics over all pairs of the set as one batch."""
        rows, options = self.data.held_out, self.opened.options
        if rows is None:
            return Report({})
        ids = subset(rows.data, options.eval_examples, self.opened.cfg.seed).ids
        policy = np.zeros((len(rows), 2), np.float32)
        for some, values in score_pairs(self.opened, rows, params, ids.tolist(), mesh):
            policy[some] = values
        pairs = [rows.data[int(i)] for i in ids]
        counts = np.array([[side.weights.sum() for side in pair.sides] for pair in pairs])
        desirable = np.array([pair.desirable for pair in pairs])
        arrays = (policy[ids], rows.reference[ids], counts)
        scores = PairScores(*(jnp.asarray(x)[:, None] for x in arrays))  # [n, 1, 2]
        rule, ones = make_preference(self.opened, 1, 1).rule, jnp.ones((len(ids), 1))
        total, sums = preference_loss(rule, scores, ones, jnp.asarray(desirable)[:, None])
        metrics = {name: float(value) / len(ids) for name, value in sums.items()}
        if not self.scorer:
            self._warn(metrics)
        return Report({"loss": float(total) / len(ids), **metrics, "pairs": len(ids)})

    def _warn(self, metrics: dict[str, float]) -> None:
        """Print a line if the chosen answers become unlikely while the margins grow."""
        first = self._first = self._first or metrics
        before, now = first["logps/chosen"], metrics["logps/chosen"]
        grown = metrics["rewards/margins"] > first["rewards/margins"]
        if grown and now < before - FALL * abs(before) and jax.process_index() == 0:
            print(
                f"warning: logps/chosen fell from {before:.4g} to {now:.4g} while the margins grew;"
                " the model unlearns both answers: lower optim.lr, or raise preference.beta or"
                " preference.sft",
                flush=True,
            )

    def sample(self, params: Params) -> Look:
        rows = (self.data.held_out or self.data.train).data
        if self.scorer:
            pairs = [rows[i].sides for i in range(min(SHOWN_PREDICTIONS, len(rows)))]
            both = [side for sides in pairs for side in sides]
            return Look("\n".join(self.scorer.describe_examples(params, both)))
        assert self.decoder is not None
        chosen = (rows[i].sides[0] for i in range(len(rows)))
        return self.decoder.continue_examples(params, chosen, rows.chat)

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        own = self.scorer or self.decoder
        assert own is not None
        return own.complete(params, prompts, request)
