"""Gradients to updates: schedules, optimisers on optax, the shardings of their state, the EMA."""

import re
from collections.abc import Callable, Hashable, Mapping
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from jaxft.core.configs.schema import Optim
from jaxft.core.errors import UserError
from jaxft.core.optimizers.adam import ADAM_EPS, adam, adam_8bit
from jaxft.core.optimizers.prodigy import prodigy
from jaxft.core.optimizers.schedule_free import schedule_free
from jaxft.core.params import ADAPTER_ROLE, ADVERSARY_ROLE, Leaf, Params, select
from jaxft.core.sharding import fitted

SCHEDULES = ("constant", "cosine", "linear", "wsd")
NO_FACTORS: Mapping[str, float] = {}
LR_BY = re.compile(r"\s*(.+?)=(\d+\.?\d*(?:e-?\d+)?)\s*(?:,|$)")  # one REGEX=FACTOR
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "lion", "muon", "prodigy", "schedule_free")


def schedule(name: str, lr: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the optimiser step k = 0, 1, ...

    Warm-up is lr * (k + 1) / warmup_steps, so that step 0 already moves. Then `constant` stays at
    lr. `cosine` falls to lr / 10, and `linear` to 0, at k = total_steps. `wsd` (warm-up, stable,
    decay) stays at lr until the last fifth of all steps, and then falls linearly to 0.

    Raises: UserError for an unknown name or a warm-up that leaves no step.
    Source of `wsd`: MiniCPM, arXiv 2404.06395.
    """
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"warmup_steps={warmup_steps} must be at least 0 and less than"
            f" total_steps={total_steps}; lower the warm-up or train longer"
        )
    after = _after_warmup(name, lr, warmup_steps, total_steps)
    if not warmup_steps:
        return after
    return optax.join_schedules([lambda k: lr * (k + 1) / warmup_steps, after], [warmup_steps])


def _after_warmup(name: str, lr: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    rest = total_steps - warmup_steps
    match name:
        case "constant":
            return optax.constant_schedule(lr)
        case "cosine":
            return optax.cosine_decay_schedule(lr, rest, alpha=0.1)
        case "linear":
            return optax.linear_schedule(lr, 0.0, rest)
        case "wsd":
            decay = min(rest, max(1, total_steps // 5))
            return optax.linear_schedule(lr, 0.0, decay, transition_begin=rest - decay)
    raise UserError(f"schedule={name!r} is not known; choose one of {', '.join(SCHEDULES)}")


def check_optimizer(o: Optim, param_dtype: str) -> None:
    """Raise UserError for keys that contradict the optimiser."""
    if o.name == "prodigy" and o.lr_by:
        raise UserError(
            f"optim.lr_by={o.lr_by!r}: prodigy finds one step size for all parameters; set"
            ' optim.lr_by="" or take another optim.name'
        )
    if o.name != "schedule_free":
        return
    wanted = {"optim.schedule": (o.schedule, "constant"), "optim.ema": (o.ema, 0.0)}
    for key, (found, needed) in {**wanted, "param_dtype": (param_dtype, "float32")}.items():
        if found != needed:
            raise UserError(
                f"optim.name=schedule_free averages its own steps, in fp32, and needs"
                f" {key}={needed}, not {found}"
            )
    if not o.b1:
        raise UserError("optim.name=schedule_free needs optim.b1 above 0; 0.9 is usual")


def lr_factors(text: str, leaves: Mapping[str, Leaf]) -> dict[str, float]:
    """Return the factor of each parameter's learning rate, by `optim.lr_by`, or {} if it is empty.

    text: "REGEX=0.1, REGEX=2". The first regex that matches a path as a whole gives its factor,
    which is 1 without one. Raises: UserError for another form, and for a regex without a parameter.
    """
    factors: dict[str, float] = {}
    place = 0
    while place < len(text):
        entry = LR_BY.match(text, place)
        if entry is None:
            raise UserError(f"optim.lr_by={text!r} is not of the form REGEX=0.1, REGEX=2")
        for path in select(entry[1], leaves, "optim.lr_by"):
            factors.setdefault(path, float(entry[2]))
        place = entry.end()
    return {path: factors.get(path, 1.0) for path in leaves} if factors else {}


def make_optimizer(
    name: str,
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip: float,
    leaves: Mapping[str, Leaf],
    factors: Mapping[str, float] = NO_FACTORS,
) -> optax.GradientTransformation:
    """Return the optimiser: clipping, the named direction, decoupled weight decay, times -lr.

    `clip` bounds the global norm (0: no clipping). An adversary's gradients are clipped by their
    own norm. Weight decay applies to matrices only. `leaves` describes at least the parameters
    that are optimised. `factors` multiply the learning rate of each parameter, see `lr_factors`.

    `adamw` (arXiv 1711.05101) computes what torch.optim.AdamW does. `adamw_8bit` stores
    its moments in 8 bits (`adam_8bit`). `lion` is arXiv 2302.06675.
    `adafactor` (arXiv 1804.04235) takes steps of size `lr`, without momentum and without the scale
    of the parameter, so b1 and b2 are not used. `muon` (Keller Jordan) orthogonalises the updates
    of hidden matrices and LoRA factors. It scales them to AdamW's step size (arXiv 2502.16982), so
    that one `lr` fits both. Embeddings, output heads, norms and biases get AdamW, and b1 and b2
    concern only these. Adafactor and Muon treat a stacked kernel as one (in, out) matrix a layer.
    `prodigy` (arXiv 2306.06101) is AdamW that estimates its step size, which `lr` multiplies: take
    1. It keeps the initial parameters too, and a fourth array of sums. `schedule_free` (arXiv
    2405.15682) is AdamW at a constant rate after the warm-up. What it evaluates and exports is an
    average of its steps (`schedule_free.average`).

    State and updates are fp32, whatever the dtype of the parameters is.

    Raises: UserError for an unknown name.
    """

    def decays(params: Params) -> dict[str, bool]:
        return {path: _is_matrix(path, leaves[path]) for path in params}

    first = [_clipped(clip, leaves)] if clip else []
    if name == "prodigy":
        sized = prodigy(learning_rate, b1, b2, weight_decay, decays)
        return _in_float32(optax.chain(*first, sized) if first else sized)
    steps = [
        _direction(name, b1, b2, leaves),
        optax.add_decayed_weights(weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if factors:  # a step without state, which runs of former versions do not have
        steps.append(optax.stateless(lambda made, _: _by_path(lambda k, x: factors[k] * x, made)))
    if name == "schedule_free":
        steps = [schedule_free(optax.chain(*steps), learning_rate, b1)]
    return _in_float32(optax.chain(*first, *steps))


def _clipped(clip: float, leaves: Mapping[str, Leaf]) -> optax.GradientTransformation:
    """Clip by global norm, once for the model and once for an adversary.

    optax.partition would wrap the state. Clipping has no state, so a split of the dict is enough.
    """
    one = optax.clip_by_global_norm(clip)

    def update(grads: Any, params: Any = None) -> Any:
        del params
        adversary = {path: g for path, g in grads.items() if leaves[path].role == ADVERSARY_ROLE}
        model = {path: grad for path, grad in grads.items() if path not in adversary}
        players = filter(None, (model, adversary))
        shares: list[Any] = [one.update(p, optax.EmptyState())[0] for p in players]
        return {path: grad for share in shares for path, grad in share.items()}

    return optax.stateless(update)


def _direction(
    name: str, b1: float, b2: float, leaves: Mapping[str, Leaf]
) -> optax.GradientTransformation:
    match name:
        case "adamw":
            return adam(b1, b2)
        case "adamw_8bit":
            return adam_8bit(b1, b2)
        case "schedule_free":  # momentum comes from its two sequences
            return optax.scale_by_rms(b2, ADAM_EPS, eps_in_sqrt=False, bias_correction=True)
        case "lion":
            return optax.scale_by_lion(b1, b2)
        case "adafactor":
            return _adafactor(leaves)
        case "muon":
            return _muon(b1, b2, leaves)
    raise UserError(f"optimizer={name!r} is not known; choose one of {', '.join(OPTIMIZERS)}")


def state_shardings(
    tx: optax.GradientTransformation,
    leaves: Mapping[str, Leaf],
    param_shardings: Mapping[str, NamedSharding],
    replicated: NamedSharding,
) -> Any:
    """Return shardings in the form of `tx.init(params)`, for `out_shardings` of init and step.

    `leaves` are the optimised parameters only. A state array whose key path names a parameter, and
    which has that parameter's shape, gets its sharding. One of its rank, such as the scales of
    moments in 8 bits, does where the mesh divides a dim. An array in Adafactor's (layers, in, out)
    shape is sharded by the first dim of each group. Every other array is replicated.

    jit alone would replicate an optimiser state, and optax.tree_map_params cannot read Muon's.
    """

    def place(key_path: tuple, state: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [key.key for key in key_path if isinstance(key, jax.tree_util.DictKey)]
        path = next((name for name in names if name in leaves), None)
        if path is None:
            return replicated
        leaf, sharding = leaves[path], param_shardings[path]
        if state.shape == leaf.shape:
            return sharding
        if state.shape == _grouped_shape(path, leaf):
            # A merged dim is sharded in contiguous blocks, which only its outermost dim's axis has.
            axes = dict(enumerate(sharding.spec))
            merged = [axes.get(group[0]) if group else None for group in _groups(path, leaf)]
            return NamedSharding(sharding.mesh, PartitionSpec(*merged))
        if len(state.shape) == len(leaf.shape):  # a scale for each block of moments in 8 bits
            return fitted(sharding, state.shape)
        return replicated

    params = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def ema_update(ema: Params, params: Params, step: jax.Array | int, decay: float) -> Params:
    """Return the moving average after step = 0, 1, ... in fp32. `params` are those after the step.

    The rate of step n > 0 is min(decay, (1 + n) / (10 + n)), and that of step 0 is 0.
    Source: diffusers' EMAModel.
    """
    n = jnp.asarray(step, jnp.float32)
    # `taken` is 1 - rate, computed directly: in fp32, 1 - 0.9999 has only four correct digits.
    taken = jnp.where(n > 0, jnp.maximum(1 - decay, 9 / (10 + n)), 1.0)
    return jax.tree.map(lambda e, p: e - taken * (e - p.astype(jnp.float32)), ema, params)


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Run `tx` in fp32.

    optax gives moments the dtype of the parameters, and bf16 moments lose small gradients.
    """

    def init(params: Any) -> Any:
        return tx.init(optax.tree.cast(params, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, params = (optax.tree.cast(tree, jnp.float32) for tree in (updates, params))
        return tx.update(updates, state, params)

    return optax.GradientTransformation(init, update)


def _muon(b1: float, b2: float, leaves: Mapping[str, Leaf]) -> optax.GradientTransformation:
    def hidden(path: str) -> bool:
        matrix = _is_matrix(path, leaves[path]) and _name(path) != "embedding"
        return matrix and "vocab" not in leaves[path].axes

    def dims(path: str) -> contrib.MuonDimensionNumbers:
        reduction, output = _groups(path, leaves[path])[-2:]
        return contrib.MuonDimensionNumbers(reduction, output)

    def like_adam(path: str, update: jax.Array) -> jax.Array:
        fan_in, fan_out = _grouped_shape(path, leaves[path])[-2:]
        return update * (0.2 * sqrt(max(fan_in, fan_out)))

    # `_by_path` rather than a plain tree.map: optax.partition leaves masked entries in the dict.
    muon = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=lambda u: _by_path(lambda p, _: dims(p), u)),
        optax.stateless(lambda updates, _: _by_path(like_adam, updates)),
    )
    return optax.partition(
        {"muon": muon, "adam": adam(b1, b2)},
        lambda params: {path: "muon" if hidden(path) else "adam" for path in params},
    )


def _adafactor(leaves: Mapping[str, Leaf]) -> optax.GradientTransformation:
    """Second moments factored by matrix, and each matrix's update clipped to a mean square of 1."""
    matrix = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    # vmap needs arrays of one length, and the stacks of a UNet differ in theirs.
    stacks = {
        path: f"stack_{_grouped_shape(path, leaf)[0]}" if leaf.stacked else "single"
        for path, leaf in leaves.items()
    }
    layers = optax.GradientTransformation(jax.vmap(matrix.init), jax.vmap(matrix.update))
    transforms: dict[Hashable, optax.GradientTransformation] = {
        stack: _on_groups(matrix if stack == "single" else layers, leaves)
        for stack in set(stacks.values())
    }
    return optax.partition(transforms, lambda params: {path: stacks[path] for path in params})


def _on_groups(
    tx: optax.GradientTransformation, leaves: Mapping[str, Leaf]
) -> optax.GradientTransformation:
    """`tx` on (layers?, in, out) matrices and (layers?, size) vectors instead of the arrays."""

    def group(tree: Any) -> Any:
        return _by_path(lambda path, x: x.reshape(_grouped_shape(path, leaves[path])), tree)

    def init(params: Any) -> Any:
        return tx.init(group(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(group(updates), state, group(params))
        return _by_path(lambda path, x: x.reshape(leaves[path].shape), updates), state

    return optax.GradientTransformation(init, update)


def _by_path(function: Callable[[str, jax.Array], Any], tree: Any) -> Any:
    """Map over a flat dict. Entries that optax.partition masked hold no array and stay."""
    return jax.tree_util.tree_map_with_path(lambda keys, x: function(keys[0].key, x), tree)


def _is_matrix(path: str, leaf: Leaf) -> bool:
    factor = leaf.role == ADAPTER_ROLE and leaf.inputs > 0  # a vector of magnitudes has no inputs
    return _name(path) in ("kernel", "embedding") or factor


def _groups(path: str, leaf: Leaf) -> list[tuple[int, ...]]:
    """Return groups of dims, each of which is one dim in PyTorch.

    The groups are layers and experts (if stacked), then inputs and outputs of a kernel, or all dims
    of a vector. Raises: ValueError for a kernel or embedding that has no input dim.
    """
    dims = tuple(range(len(leaf.shape)))
    stack = sum(axis in ("layers", "expert") for axis in leaf.axes)
    name = _name(path)
    inputs = 1 if name == "embedding" else leaf.inputs
    if _is_matrix(path, leaf) and not inputs:
        raise ValueError(f"{path}: inputs=0, but a {name} has at least 1 input dim; set `inputs`")
    split = stack + inputs
    groups = [dims[stack:split], dims[split:]] if inputs else [dims[stack:]]
    return [dims[:stack], *groups] if stack else groups


def _grouped_shape(path: str, leaf: Leaf) -> tuple[int, ...]:
    return tuple(prod(leaf.shape[dim] for dim in group) for group in _groups(path, leaf))
