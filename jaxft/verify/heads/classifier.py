"""Sequence classifiers and reward models against transformers: scores, and their gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxft.core import runtime
from jaxft.core.params import Params, bind, describe
from jaxft.models import registry
from jaxft.models.decoders.classifier import SCORE_RULE, open_classifier, stated_labels
from jaxft.verify import rounding
from jaxft.verify.llm import (
    ROW,
    WEIGHT_DIGESTS,
    Case,
    Oracle,
    Subject,
    certify_subject,
    stock_model,
    torch_keyed,
)
from jaxft.verify.report import (
    PLAIN_DOTS,
    Check,
    compare_logits,
    same_weights,
    worst_gradient,
)


def certify(spec: str, far: int = 4096) -> tuple[dict[str, Any], list[Check]]:
    """Return (certificate, checks) of a sequence classifier, as `llm.certify` of a language model.

    The scores at the last ROW positions of each row are compared. The head of transformers computes
    them at every position, and reads one. The loss is the mean of their squares, which every number
    of labels has.
    """
    return certify_subject(spec, open_scored(spec), far, _ask_transformers, _compare)


def open_scored(spec: str) -> Subject:
    """Open a classifier. Every tensor is accounted for before one is read."""
    source = open_classifier(spec)
    architecture = registry.find(source.config, "decoder")
    cfg = architecture.config(source.config, "config.json")
    cfg = replace(cfg, num_labels=len(stated_labels(source.config)), tied=True)
    part = architecture.part(source, cfg)
    part = part._replace(rules=(*part.rules, SCORE_RULE))
    template = jax.eval_shape(lambda key: architecture.module(cfg, key=key), jax.random.key(0))
    return Subject(source, part, None, template, describe(template))


def _ask_transformers(subject: Subject, cases: Mapping[str, Case]) -> Oracle:
    """Return the results of stock transformers on the CPU, in fp32 and under other roundings."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model, report = stock_model(subject, AutoModelForSequenceClassification)
    model.eval()
    with _every_score(model) as every:

        def scores(case: Case) -> Any:
            ids, places = (
                torch.from_numpy(np.array(x, np.int64)) for x in (case[0], case.positions)
            )
            model(ids, position_ids=places, use_cache=False)
            return every.pop()[:, -ROW:]

        def squares() -> Any:
            return scores(cases["near"]).double().square().mean()

        def plain() -> dict[str, Float[np.ndarray, "B T V"]]:
            with torch.no_grad():
                return {name: scores(case).numpy() for name, case in cases.items()}

        logits, weights, value = plain(), rounding.digests(model), squares()
        value.backward()
        gradients, distances = rounding.gradients_of(model), dict[str, float]()
        others: dict[str, list[np.ndarray]] = {name: [] for name in cases}
        for _ in rounding.variants(model, gradients, distances):
            squares().backward()
            for name, again in plain().items():
                others[name].append(again)
    return Oracle(logits, others, value.item(), gradients, distances, weights, report)


@contextmanager
def _every_score(model: Any) -> Iterator[list[Any]]:
    """Yield a list that receives the scores at all positions, whenever the model runs."""
    found: list[Any] = []
    hook = model.score.register_forward_hook(lambda _, __, output: found.append(output))
    yield found
    hook.remove()


def _compare(
    subject: Subject, params: Params, cases: Mapping[str, Case], oracle: Oracle
) -> list[Check]:
    """Compare weights, scores, the loss and its gradients with the oracle's."""

    @partial(jax.jit, compiler_options=PLAIN_DOTS)
    def call(params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        model = bind(subject.template, params)
        return model.scores(model.hidden(tokens, positions)[0][:, -ROW:])

    checks = [same_weights(WEIGHT_DIGESTS, torch_keyed(subject, params), oracle.weights)]
    for name, case in cases.items():
        ours = np.asarray(call(params, case.tokens, case.positions))
        checks += compare_logits(name, ours, oracle.logits[name], oracle.others[name])
    return [*checks, *_gradients(subject, params, cases["near"].tokens, oracle)]


def _gradients(
    subject: Subject, params: Params, tokens: Int[np.ndarray, "B T"], oracle: Oracle
) -> list[Check]:
    def squares(params: Params) -> jax.Array:
        model = bind(subject.template, params)
        return jnp.square(model.scores(model.hidden(jnp.asarray(tokens))[0][:, -ROW:])).mean()

    step = jax.jit(jax.value_and_grad(squares), compiler_options=runtime.compiler_options())
    loss, grads = step(params)
    worst = worst_gradient(
        "gradients, worst relative", torch_keyed(subject, grads), oracle.gradients, oracle.distances
    )
    near, *others = (np.square(x) for x in (oracle.logits["near"], *oracle.others["near"]))
    own = max(float(np.abs(near - one).mean()) for one in others)
    bound = rounding.bound(own, oracle.loss)
    check = Check("loss, abs", abs(float(loss) - oracle.loss), bound, f"{oracle.loss:.6f}", own)
    return [check, worst]
