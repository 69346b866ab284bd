"""Sequence classifiers and reward models: a decoder whose head gives scores, not a vocabulary."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.weights.adapters.peft_folder import is_adapter
from jaxft.weights.folders.transformers import HEAD, TABLE, Source, open_source
from jaxft.weights.rules import Rule
from jaxft.weights.views import Drawn, Overlaid, Renamed

SCORE = "score.weight"
SCORE_RULE = Rule(SCORE, "score.kernel", "c d -> d c")
CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
ADAPTER_CONFIG = "classifier_config.json"  # config.json of a classifier, beside its adapter
INPUT_TABLES = ("embed_tokens.weight", TABLE)  # names of the input table in files


def open_classifier(
    spec: str,
    weights: bool = True,
    *,
    labels: tuple[str, ...] = (),
    seed: int = 0,
    known: Callable[[], list[str]] = list,
    nf4: bool = False,
) -> Source:
    """Open a sequence classifier, or a causal language model to which a new head is added.

    The config keeps the class name of the language model, and the new head is drawn from
    N(0, initializer_range) in fp32 by `seed`. `known()` returns label names for an error. `nf4` is
    that of `open_source`.
    Raises: UserError for a language model without `labels`, for labels that the classifier does not
    have, and as `files.as_decoder`. A single number may have any name.
    """
    source = open_source(spec, weights, nf4)
    own = is_classifier(source.config)
    class_name(source.config)  # refuses a family without a classifier
    if not own and not labels:
        names = known()
        raise UserError(
            f"{spec} is a language model, to which objective=classify adds a head: name its labels"
            f" in the order of their ids, with --config.labels={','.join(names) or 'NAME,NAME'}"
            f"{' (those of data.train)' if names else ''}"
        )
    stated = stated_labels(source.config) if own else labels
    if labels and labels != stated and not len(labels) == len(stated) == 1:
        raise UserError(
            f"{spec}: a head with the labels {','.join(labels)} is asked for, but config.json has"
            f" {','.join(stated)} in id2label; leave labels out, or give the language model that it"
            " was made from"
        )
    # A head of scores leaves that of the vocabulary out, as if the input table were tied to it.
    config = {**source.config, "tie_word_embeddings": True}
    if own:
        config["architectures"] = [registry.find(config, "decoder").class_name(config)]
    opened = registry.find(config, "decoder").opened
    made = opened(replace(source, config=config, tensors=_headless(source)))
    tied = source.config.get("tie_word_embeddings", False)
    source = replace(made, config={**made.config, "tie_word_embeddings": tied})
    if source.tensors is None or own:
        return source
    cfg = registry.read_decoder(source.config)
    head = Drawn(SCORE, (len(labels), cfg.hidden_size), cfg.initializer_range, seed)
    return replace(source, tensors=Overlaid(source.tensors, head))


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Return True if config.json is that of a sequence classifier."""
    stated = config.get("architectures")
    return isinstance(stated, list) and len(stated) == 1 and str(stated[0]).endswith(CLASSIFIER)


def stated_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the label names of config.json by id. Without them transformers has two."""
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def adapter_labels(folder: str) -> tuple[str, ...]:
    """Return the label names in ADAPTER_CONFIG beside an adapter, and () without this file.

    PEFT's own files have no place for them. With a config.json transformers would take the folder
    for a whole model.
    Raises: UserError for a file that cannot be read.
    """
    file = Path(folder).expanduser() / ADAPTER_CONFIG
    if not is_adapter(folder) or not file.is_file():
        return ()
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not readable JSON ({error}); write it again, or delete it"
        ) from None
    return stated_labels(config) if isinstance(config, dict) and is_classifier(config) else ()


def class_name(config: Mapping[str, Any]) -> str:
    """Return the class that transformers builds for a sequence classifier of this decoder.

    Raises: UserError for a family without such a class.
    """
    architecture = registry.find(config, "decoder")
    causal = architecture.class_name(config)
    if not architecture.classifier:
        raise UserError(
            f"config.json: there is no sequence classifier for {causal} here; use"
            " --config.objective=sft, or give a model of another family"
        )
    return causal.removesuffix(CAUSAL) + architecture.classifier


def _headless(source: Source) -> Any:
    """Return the tensors without the vocabulary's head, unless it is also the input table."""
    tensors, keys = source.tensors, set(source.tensors.keys() if source.tensors else ())
    if tensors is None or HEAD not in keys or keys.isdisjoint(INPUT_TABLES):
        return tensors
    return Renamed(tensors, {key: key for key in tensors.keys() if key != HEAD})  # noqa: SIM118
