"""Comparison of one network with its stock class: outputs, gradients and bytes."""

import importlib
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxft.core.params import Leaf, Params, bind, describe
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.verify import rounding
from jaxft.verify.report import (
    PLAIN_DOTS,
    Check,
    loading,
    round_trip,
    same_weights,
    worst_gradient,
)
from jaxft.weights import transfer
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.folders.transformers import Source
from jaxft.weights.rules import plan, to_torch
from jaxft.weights.transfer import Part

# A function that is called once takes longer to compile than to run.
ONCE = {
    **PLAIN_DOTS,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


class ComponentSubject(NamedTuple):
    """A network under test, opened but not loaded.

    stock: the library and class to compare with. theirs(stock model), ours(module): functions that
    return the same outputs by name, pictures with channels last. Integer outputs must be equal.
    template: the abstract module, without the prefix of the part. stock_prefix: the beginning of
    the files' keys that the stock model's own lack.
    """

    name: str
    source: Source
    part: Part
    template: Any
    stock: tuple[str, str]
    theirs: Callable[[Any], dict[str, Any]]
    ours: Callable[[Any], dict[str, jax.Array]]
    stock_prefix: str = ""

    @property
    def leaves(self) -> dict[str, Leaf]:
        own = describe(self.template)
        return {self.part.prefix + path: leaf for path, leaf in own.items()}

    @property
    def size(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in describe(self.template).values())


class ComponentOracle(NamedTuple):
    """Results of the stock model in fp32.

    others: the same outputs under other roundings (in float64, and in fp32 again). ways: a
    direction for each output. gradients: those of the outputs' sum along `ways`, by torch key.
    distances: differences of the gradients under other roundings. weights: digests by torch key.
    fixed: keys of tensors without a gradient, whose values are in their places in `gradients`.
    """

    outputs: dict[str, np.ndarray]
    others: dict[str, list[np.ndarray]]
    ways: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    distances: dict[str, float]
    weights: dict[str, str]
    report: Mapping[str, Any]
    fixed: frozenset[str] = frozenset()


class Result(NamedTuple):
    """A component's figures, with its size and the digest of its weights."""

    checks: list[Check]
    about: dict[str, Any]


def check(subject: ComponentSubject) -> Result:
    """Return every figure of one network. One of the two models is in memory at a time."""
    oracle = ask(subject)
    params = load(subject.part, subject.leaves)
    checks = [*loading(f"stock {subject.name}", oracle.report)]
    checks += compare(subject, params, oracle)
    name = f"{subject.name} round trip, differing tensors"
    trip, digest = round_trip(name, subject.part, subject.leaves, params)
    about = {"parameters": subject.size, "weights_sha256": digest}
    return Result([*checks, trip], about)


def ask(subject: ComponentSubject) -> ComponentOracle:
    """Return outputs and gradients of the stock model on the CPU in fp32, and their rounding."""
    model, report = open_stock(subject)
    weights = rounding.digests(model)
    outputs, ways = _run(subject, model, {})
    gradients = {
        key: np.zeros(tuple(one.shape), np.float32) if one.grad is None else one.grad.numpy()
        for key, one in model.named_parameters()
    }
    # Buffers of the file, which the stock model does not train.
    saved = model.state_dict()
    fixed = {key: one.numpy() for key, one in model.named_buffers() if key in saved}
    weights |= {key: rounding.digest(one) for key, one in fixed.items()}
    gradients |= fixed  # their shapes
    distances: dict[str, float] = {}
    others: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
    for _ in rounding.variants(model, gradients, distances):
        for name, out in _run(subject, model, ways)[0].items():
            others[name].append(out)
    grads, apart, digests = (_in_part(subject, one) for one in (gradients, distances, weights))
    expected = _in_part(subject, dict.fromkeys(report["unexpected_keys"]))
    report = {**report, "unexpected_keys": set(expected)}
    still = frozenset(_in_part(subject, fixed))
    return ComponentOracle(outputs, others, ways, grads, apart, digests, report, still)


def _in_part(subject: ComponentSubject, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what belongs to the tensors of a part, by its keys, of all by the stock model's."""
    ignore = "|".join(subject.part.ignore) or r"(?!)"
    keyed = {subject.stock_prefix + key: one for key, one in found.items()}
    return {key: one for key, one in keyed.items() if not re.fullmatch(ignore, key)}


def _run(
    subject: ComponentSubject, model: Any, ways: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return (outputs, ways) of a stock model, and leave the gradients in its parameters.

    An empty `ways` is replaced by new ones.
    """
    import torch

    # transformers' swish overwrites tensors that autograd saved.
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        made = subject.theirs(model)
        outputs = {name: out.detach().numpy() for name, out in made.items()}
        ways = ways or _ways(outputs)
        total = sum((made[name] * torch.from_numpy(way)).sum() for name, way in ways.items())
        assert isinstance(total, torch.Tensor)
        total.backward()
    return outputs, ways


def _ways(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a random direction for each output, so that each has a like share of the gradient."""
    rng, ways = np.random.default_rng(9), {}
    for name, out in outputs.items():
        if np.issubdtype(out.dtype, np.floating):
            scale = math.sqrt(out.size) * max(float(np.abs(out).max()), 1e-6)
            ways[name] = rng.standard_normal(out.shape, np.float32) / np.float32(scale)
    return ways


def open_stock(subject: ComponentSubject) -> tuple[Any, Mapping[str, Any]]:
    """Return the stock model and its report on loading."""
    import torch

    library, name = subject.stock
    # Model classes of diffusers run no code of a folder, and take the other key for a config's.
    own: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    options = {"torch_dtype": torch.float32} if library == "diffusers" else own
    with _stock_folder(subject.source, subject.part.stem) as folder:
        model, report = stock_class(library, name).from_pretrained(
            folder, output_loading_info=True, local_files_only=True, **options
        )
    return model.eval(), report


def stock_class(library: str, name: str) -> Any:
    """Return a class of an optional package."""
    return getattr(importlib.import_module(library), name)


@contextmanager
def _stock_folder(source: Source, stem: str) -> Iterator[Path]:
    """Yield a folder with the component's files under their plain names.

    Tensors that lie inside a single file are copied.
    """
    with tempfile.TemporaryDirectory(prefix="jaxft-verify-") as name:
        folder = Path(name)
        for file, content in source.side_files.items():
            if isinstance(content, bytes):
                (folder / file).write_bytes(content)
            else:
                (folder / file).symlink_to(content.resolve())
        if not any(file.endswith(".safetensors") for file in source.side_files):
            tensors = source.tensors
            assert tensors is not None
            infos = {key: tensors.info(key) for key in tensors.keys()}  # noqa: SIM118
            write_sharded(folder, ((k, tensors.read(k)) for k in infos), infos, stem=stem)
        yield folder


def load(part: Part, leaves: Mapping[str, Leaf]) -> Params:
    """Return a part's parameters in fp32 on the first device."""
    own = {path: leaf for path, leaf in leaves.items() if path.startswith(part.prefix)}
    places = shardings(own, one_device_mesh())
    return transfer.load(part, own, places, jnp.float32, set(own))


def compare(subject: ComponentSubject, params: Params, oracle: ComponentOracle) -> list[Check]:
    """Compare weights, outputs and gradients with the oracle's."""
    prefix = subject.part.prefix

    @partial(jax.jit, compiler_options=ONCE)
    def call(params: Params, ways: dict[str, Any]) -> tuple[Params, dict[str, jax.Array]]:
        def objective(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            own = {path.removeprefix(prefix): x for path, x in params.items()}
            made = subject.ours(bind(subject.template, own))
            return sum((jnp.vdot(way, made[k]) for k, way in ways.items()), jnp.zeros(())), made

        return jax.grad(objective, has_aux=True)(params)

    grads, made = call(params, oracle.ways)
    name = f"{subject.name} weights, differing tensors"
    same = same_weights(name, _torch_keyed(subject, params, oracle), oracle.weights)
    checks = [
        compare_output(
            f"{subject.name} {name}", np.asarray(made[name]), wanted, oracle.others[name]
        )
        for name, wanted in oracle.outputs.items()
    ]
    name = f"{subject.name} gradients, worst relative"
    theirs = {key: one for key, one in oracle.gradients.items() if key not in oracle.fixed}
    keyed = (one for one in _torch_keyed(subject, grads, oracle) if one[0] not in oracle.fixed)
    worst = worst_gradient(name, keyed, theirs, oracle.distances)
    return [same, *checks, worst]


def compare_output(
    name: str, ours: np.ndarray, theirs: np.ndarray, others: Sequence[np.ndarray], note: str = ""
) -> Check:
    """Compare one output: the largest difference relative to the largest value.

    For integers, the figure is the number of those that differ. `others` are the outputs of the
    oracle under other roundings.
    """
    if not np.issubdtype(theirs.dtype, np.floating):
        count = int((ours != theirs).sum()) if ours.shape == theirs.shape else theirs.size
        return Check(f"{name}, differing", count, 0, f"of {theirs.size}")
    largest = max(float(np.abs(theirs).max()), 1e-30)
    own = rounding.farthest(theirs, others) / largest
    if ours.shape != theirs.shape:
        note = f"shape {ours.shape}, not {theirs.shape}"
        return Check(f"{name}, max relative", math.inf, rounding.bound(own), note, own)
    apart = rounding.apart(ours, theirs) / largest
    return Check(f"{name}, max relative", apart, rounding.bound(own), note, own)


def _torch_keyed(
    subject: ComponentSubject, arrays: Params, oracle: ComponentOracle
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield our weights or gradients by the stock model's keys. A file may have older keys."""
    part, own = subject.part, describe(subject.template)
    shapes = {key: tuple(one.shape) for key, one in oracle.gradients.items()}
    for entry in plan(part.rules, own, shapes, part.sizes, (), f"stock {subject.name}"):
        for i, key in enumerate(entry.keys):
            array = np.asarray(arrays[part.prefix + entry.path])
            yield key, to_torch(array[entry.place(i)], entry.layout, part.sizes)


def channels_first(x: Float[np.ndarray, "B Y X C"], model: Any) -> Any:
    """Return a torch tensor [B, C, Y, X] with the dtype of a stock model."""
    return as_input(x.transpose(0, 3, 1, 2), model)


def as_input(x: Float[np.ndarray, "..."], model: Any) -> Any:
    """Return a torch tensor with the dtype of a stock model."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).to(model.dtype)


def channels_last(x: Any) -> Any:
    """Return a torch tensor [B, Y, X, C]."""
    return x.permute(0, 2, 3, 1)


def normal(seed: int, *shape: int) -> Float[np.ndarray, "..."]:
    """Return unit normal numbers in fp32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
