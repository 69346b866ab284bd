"""Language models against transformers and PEFT: logits near and far, the loss, gradients."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxft.core import runtime
from jaxft.core.errors import UserError
from jaxft.core.params import Leaf, Params, bind, describe
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.data.text.vocabulary import check_ids, check_specials
from jaxft.kernels.cross_entropy import linear_cross_entropy
from jaxft.models import registry
from jaxft.models.decoders.config import DecoderConfig
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.files import open_decoder
from jaxft.nn import lora
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.verify import rounding
from jaxft.verify.report import (
    PLAIN_DOTS,
    Check,
    certificate,
    compare_logits,
    hf_folder,
    loading,
    round_trip,
    same_weights,
    start,
    worst_gradient,
)
from jaxft.weights import transfer
from jaxft.weights.adapters import peft as adapters
from jaxft.weights.adapters.peft_folder import (
    PEFT_PREFIX,
    TOKEN_DELTA,
    PeftAdapter,
    fit,
    open_adapted,
)
from jaxft.weights.folders.transformers import TOKENIZER_FILES, Source
from jaxft.weights.rules import to_torch
from jaxft.weights.transfer import Part

TRIP, WEIGHT_DIGESTS = "round trip, differing tensors", "weights, differing tensors"
ROW = 64  # positions compared in each case
FULL_LENGTH_SIZE = 200_000_000  # most parameters of a model with a row of full length
SAMPLE_TEXT = (
    "The committee met on a Tuesday in 1987, above the harbour, and heard 3 reports: on the tides,"
    " on the price of rope (it had doubled), and one, written by hand, on what the town would do if"
    " the ferry stopped. Nobody asked who had written it; everybody knew. "
)


class Case(NamedTuple):
    """Rows of tokens at positions start, start + 1, …

    The last ROW positions are compared.
    """

    tokens: Int[np.ndarray, "B T"]
    start: int

    @property
    def positions(self) -> Int[np.ndarray, "B T"]:
        count = np.arange(self.start, self.start + self.tokens.shape[1], dtype=np.int32)
        return np.broadcast_to(count, self.tokens.shape)


class Subject(NamedTuple):
    """The model under test, opened but not loaded."""

    source: Source
    part: Part
    adapter: PeftAdapter | None
    template: Decoder
    leaves: dict[str, Leaf]

    @property
    def size(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in self.leaves.values())

    @property
    def trained(self) -> set[str]:
        """Paths of the adapters, or of all parameters without adapters: those with a gradient."""
        return {path for path, leaf in self.leaves.items() if leaf.added} or set(self.leaves)


class Oracle(NamedTuple):
    """Results of stock transformers (and PEFT) on the same folder, in float32.

    others: the same logits under other roundings (in float64, and in fp32 again). distances:
    differences of the gradients under these roundings. weights: digests. Logits are by case, and
    all other mappings by torch key.
    """

    logits: dict[str, Float[np.ndarray, "B T V"]]
    others: dict[str, list[Float[np.ndarray, "B T V"]]]
    loss: float
    gradients: dict[str, np.ndarray]
    distances: dict[str, float]
    weights: dict[str, str]
    report: Mapping[str, Any]


def certify(spec: str, far: int = 4096) -> tuple[dict[str, Any], list[Check]]:
    """Return (certificate, checks) of the model that `spec` names.

    `spec` is a Hugging Face or PEFT folder, or any other name of a model. `far` is the first far
    position. Raises UserError for a model that cannot be compared. Both sides compute in fp32. The
    oracle also computes in fp64, which measures the rounding of fp32. One of the models is in
    memory at a time.
    """
    return certify_subject(spec, open_subject(spec), far, _ask_transformers, compare)


def certify_subject(
    spec: str,
    subject: Subject,
    far: int,
    ask: Callable[[Subject, Mapping[str, Case]], Oracle],
    check: Callable[[Subject, Params, Mapping[str, Case], Oracle], list[Check]],
) -> tuple[dict[str, Any], list[Check]]:
    """Return (certificate, checks) of an opened model by its oracle, and the checks beside it."""
    oracles = ("torch", "peft") if subject.adapter else ("torch",)
    start(oracles)
    cases = make_cases(subject, far)
    oracle = ask(subject, cases)
    # "highest" keeps a GPU from multiplying fp32 in TF32.
    with jax.default_matmul_precision("highest"):
        params = load_subject(subject)
        checks = [*loading("transformers", oracle.report)]
        checks += check(subject, params, cases, oracle)
        trip, digest = round_trip(TRIP, subject.part, subject.leaves, params)
    checks.append(trip)
    about = {
        "model_type": subject.source.config.get("model_type"),
        "parameters": subject.size,
        "cases": {
            name: {"shape": case.tokens.shape, "positions": [case.start, int(case.positions.max())]}
            for name, case in cases.items()
        },
        "weights_sha256": digest,
    }
    return certificate(spec, checks, oracles, about), checks


def open_subject(spec: str) -> Subject:
    """Open a model, or a PEFT folder on its base.

    Every tensor is accounted for before one is read. The adapted projections are those that the
    adapter has tensors for.
    """
    opened = open_adapted(spec, opener=open_decoder)
    source, adapter = opened.source, opened.adapter
    architecture = registry.find(source.config, "decoder")
    cfg = architecture.config(source.config, "config.json")
    part = architecture.part(source, cfg)
    part = part._replace(rows=adapter.token_ids if adapter else ())
    template = jax.eval_shape(lambda key: architecture.module(cfg, key=key), jax.random.key(0))
    if adapter:
        adapter = fit(adapter, part.class_entries(describe(template)))

        def build(key: jax.Array) -> Decoder:
            model = architecture.module(cfg, key=key)
            lora.add(model, adapter.lora, key)
            lora.add_rows(model.embed_tokens, adapter.token_ids)
            return model

        template = jax.eval_shape(build, jax.random.key(0))
    return Subject(source, part, adapter, template, describe(template))


def make_cases(subject: Subject, far: int) -> dict[str, Case]:
    """Return fixed rows near (from position 0 on) and far.

    For a small model there is also one long row up to the far positions.
    """
    cfg, rng = subject.template.cfg, np.random.default_rng(0)
    # On random ids, transformers' own fp32 of a trained model is 4e-4 from its fp64.
    spells = TOKENIZER_FILES & subject.source.side_files.keys()
    tokens = _text_row(subject.source, cfg) if spells else _random_row(rng, cfg, ROW)
    cases = {"near": Case(tokens, 0)}
    start = min(far, cfg.max_positions - ROW)
    if start > 0:
        cases["far"] = Case(tokens, start)
        if subject.size <= FULL_LENGTH_SIZE:
            cases["long"] = Case(_random_row(rng, cfg, start + ROW), 0)
    return cases


def _random_row(
    rng: np.random.Generator, cfg: DecoderConfig, length: int
) -> Int[np.ndarray, "B T"]:
    """Return random ids other than that of the pad token.

    Transformers gives the embedding of the pad token no gradient, even if it is a token of the
    text. jaxft masks by spans alone.
    """
    after = rng.integers(1, cfg.vocab_size, (1, length), np.int32)
    return (after + (cfg.pad_id or 0)) % cfg.vocab_size


def _text_row(source: Source, cfg: DecoderConfig) -> Int[np.ndarray, "B T"]:
    tokenizer = load_tokenizer(source.tokenizer_dir())
    if without := check_specials(tokenizer, cfg.vocab_size, source.name):
        print(
            f"{len(without)} tokens of the tokenizer have no row in the model, first"
            f" {without[0]!r}: texts that hold one are refused"
        )
    ids = tokenizer(SAMPLE_TEXT * 2, add_special_tokens=False)["input_ids"]
    check_ids(ids, cfg.vocab_size, tokenizer, source.name)
    if not ids:
        raise UserError(f"{source.name}: the tokenizer gives no ids; put the model's own there")
    return np.resize(np.array([ids], np.int32), (1, ROW))


# ---- the oracle ---------------------------------------------------------------------------


def stock_model(subject: Subject, kind: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model that a class of transformers loads, in fp32, and its report of the keys."""
    import torch

    # transformers' default attention ignores soft-caps of scores.
    capped = any(layer.soft_cap for layer in subject.template.cfg.layers)
    with hf_folder(subject.source) as folder:
        return kind.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="eager" if capped else None,
            experts_implementation="eager",  # the others have no float64
        )


def _ask_transformers(subject: Subject, cases: Mapping[str, Case]) -> Oracle:
    """Return the results of stock transformers on the CPU, in fp32 and under other roundings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wrapped = bool(subject.source.class_names)
    kind: Any = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    model, report = stock_model(subject, kind)
    if subject.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, subject.adapter.name, is_trainable=True)
    model.eval()
    tokens = torch.from_numpy(cases["near"].tokens.astype(np.int64))

    def loss() -> Any:
        # In float64: torch's float32 cross-entropy over 49152 tokens was off by 2e-5 of 4.1, more
        # than the whole model, and transformers' own loss casts even a float64 model's logits.
        logits = model(tokens, use_cache=False).logits[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, tokens[0, 1:])

    logits, weights, value = _their_logits(model, cases), rounding.digests(model), loss()
    value.backward()
    gradients = rounding.gradients_of(model)
    distances: dict[str, float] = {}
    others: dict[str, list[np.ndarray]] = {name: [] for name in cases}
    for _ in rounding.variants(model, gradients, distances):
        loss().backward()
        for name, again in _their_logits(model, cases).items():
            others[name].append(again)
    return Oracle(logits, others, value.item(), gradients, distances, weights, report)


def _their_logits(model: Any, cases: Mapping[str, Case]) -> dict[str, Float[np.ndarray, "B T V"]]:
    import torch

    logits = {}
    for name, case in cases.items():
        tokens, positions = (
            torch.from_numpy(x.astype(np.int64)) for x in (case.tokens, case.positions)
        )
        with torch.no_grad():
            made = model(tokens, position_ids=positions, use_cache=False, logits_to_keep=ROW)
        logits[name] = made.logits.numpy()
    return logits


# ---- the checks ---------------------------------------------------------------------------


def load_subject(subject: Subject) -> Params:
    """Return jaxft's parameters in fp32 on the first device."""
    leaves, part, adapter = subject.leaves, subject.part, subject.adapter
    places = shardings(leaves, one_device_mesh())
    params = transfer.load(part, leaves, places, jnp.float32, set(leaves))
    if adapter:
        arrays = adapters.load(adapter, part, leaves)
        params |= {path: jax.device_put(array, places[path]) for path, array in arrays.items()}
    return params


def compare(
    subject: Subject, params: Params, cases: Mapping[str, Case], oracle: Oracle
) -> list[Check]:
    """Compare weights, logits, loss and gradients with the oracle's."""
    same = same_weights(WEIGHT_DIGESTS, torch_keyed(subject, params), oracle.weights)
    logits = _logits(subject, params, cases, oracle)
    return [same, *logits, *_gradients(subject, params, cases["near"].tokens, oracle)]


def _logits(
    subject: Subject, params: Params, cases: Mapping[str, Case], oracle: Oracle
) -> list[Check]:
    @partial(jax.jit, compiler_options=PLAIN_DOTS)
    def call(params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        model = bind(subject.template, params)
        hidden, _ = model.hidden(tokens, positions)
        return model.logits(hidden[:, -ROW:])

    checks = []
    for name, case in cases.items():
        ours = np.asarray(call(params, case.tokens, case.positions))
        checks += compare_logits(name, ours, oracle.logits[name], oracle.others[name])
    return checks


def _gradients(
    subject: Subject, params: Params, tokens: Int[np.ndarray, "B T"], oracle: Oracle
) -> list[Check]:
    """Compare the training loss, and its gradient tensor by tensor."""
    frozen = {path: x for path, x in params.items() if path not in subject.trained}
    weights = jnp.ones(tokens.shape).at[:, -1].set(0)  # nothing follows the last token

    def objective(trained: Params, frozen: Params) -> jax.Array:
        model = bind(subject.template, {**frozen, **trained})
        hidden, _ = model.hidden(jnp.asarray(tokens))
        head, vocab_first, soft_cap = model.head()
        targets = jnp.roll(tokens, -1, axis=1)
        features = model.features(hidden)
        total, sums = linear_cross_entropy(
            features, head, targets, weights, vocab_first=vocab_first, soft_cap=soft_cap
        )
        return total / sums["weight"]

    trained = {path: params[path] for path in subject.trained}
    step = jax.jit(jax.value_and_grad(objective), compiler_options=runtime.compiler_options())
    loss, grads = step(trained, frozen)
    worst = worst_gradient(
        "gradients, worst relative",
        torch_keyed(subject, grads),
        oracle.gradients,
        oracle.distances,
    )
    apart, own = abs(float(loss) - oracle.loss), _loss_rounding(tokens, oracle)
    bound = rounding.bound(own, abs(oracle.loss))
    return [Check("loss, abs", apart, bound, f"{oracle.loss:.6f}", own), worst]


def _loss_rounding(tokens: Int[np.ndarray, "B T"], oracle: Oracle) -> float:
    """Return the rounding of the oracle's loss.

    It is the mean over tokens of the rounding of the terms. The difference of two means alone could
    be zero by luck.
    """
    targets = tokens[:, 1:, None]
    near, *others = (
        np.take_along_axis(rounding.log_softmax(logits[:, :-1]), targets, -1)
        for logits in (oracle.logits["near"], *oracle.others["near"])
    )
    return max(float(np.abs(near - one).mean()) for one in others)


def torch_keyed(
    subject: Subject, arrays: Mapping[str, jax.Array]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield arrays by jaxft path as tensors by torch key, one at a time."""
    part, leaves = subject.part, subject.leaves
    for entry in part.entries(leaves):
        for i, key in enumerate(entry.keys if entry.path in arrays else ()):
            array = arrays[entry.path]
            array = np.asarray(array[entry.place(i)] if entry.stacked else array)
            yield part.named(key), to_torch(array, entry.layout, part.sizes)
    if subject.adapter:
        for name, tensor in adapters.factors(part, leaves, arrays, subject.adapter.lora):
            yield PEFT_PREFIX + name, tensor
    for entry, path in adapters.token_rows(part, leaves):
        module = part.named(entry.keys[0]).removesuffix(".weight")
        yield f"{PEFT_PREFIX}{module}{TOKEN_DELTA}", np.asarray(arrays[path])
