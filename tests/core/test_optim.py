"""Schedules, optimisers against torch and the papers, their shardings, the average."""

from functools import partial

import diffusers.training_utils
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import PartitionSpec
from transformers.optimization import Adafactor

from jaxft.core import optim, sharding
from jaxft.core.errors import UserError
from jaxft.core.params import ADAPTER_ROLE, Leaf

L, D, N, H, V = 2, 128, 4, 64, 16
LEAVES = {
    path: Leaf(shape, jnp.float32, axes, inputs, ADAPTER_ROLE if "lora" in axes else "")
    for path, shape, axes, inputs in (
        ("layers.q_proj.kernel", (L, D, N, H), ("layers", "embed", "heads", "head_dim"), 1),
        ("layers.o_proj.kernel", (L, N, H, D), ("layers", "heads", "head_dim", "embed"), 2),
        ("layers.q_proj.bias", (L, N, H), ("layers", "heads", "head_dim"), 0),
        ("layers.q_proj.lora_a", (L, D, 8), ("layers", "embed", "lora"), 1),
        ("layers.q_proj.lora_b", (L, 8, N, H), ("layers", "lora", "heads", "head_dim"), 1),
        ("layers.norm.scale", (L, D), ("layers", "norm"), 0),
        ("embed_tokens.embedding", (V, D), ("vocab", "embed"), 0),
        ("lm_head.kernel", (D, V), ("embed", "vocab"), 1),
        ("norm.scale", (D,), ("norm",), 0),
    )
}
DECAYED = {path for path in LEAVES if path.split(".")[-1] not in ("bias", "scale")}
LR = 1e-2
# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def arrays(seed: int, leaves: dict[str, Leaf] = LEAVES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(leaf.shape).astype("f4") for path, leaf in leaves.items()}


def start() -> dict[str, np.ndarray]:
    return {path: np.zeros_like(x) if "_b" in path else x for path, x in arrays(0).items()}


def run(tx, params, grads) -> dict[str, np.ndarray]:
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)

    @partial(jax.jit, compiler_options=QUICK)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for one in grads:
        params, state = step(params, state, one)
    return {path: np.asarray(x) for path, x in params.items()}


def make(name, leaves=LEAVES, b1=0.9, b2=0.999, weight_decay=0.1, clip=0.0):
    lr = optim.schedule("linear", LR, 2, 20)
    return optim.make_optimizer(
        name, lr, b1=b1, b2=b2, weight_decay=weight_decay, clip=clip, leaves=leaves
    )


def torch_layout(path: str, x: np.ndarray) -> list[np.ndarray]:
    """One (out, in) matrix or vector per layer, as a torch checkpoint has them."""
    layers = list(x) if path.startswith("layers.") else [x]
    if path.endswith("embedding") or LEAVES[path].inputs == 0:
        return [x if path.endswith("embedding") else x.reshape(-1) for x in layers]
    fan_in = int(np.prod(layers[0].shape[: LEAVES[path].inputs]))
    return [layer.reshape(fan_in, -1).T for layer in layers]


def run_torch(params, grads, optimizer, clip=0.0) -> dict[str, list[np.ndarray]]:
    """The same run in torch, with decay groups; `optimizer` takes groups and sets decay and lr."""
    lr = optim.schedule("linear", LR, 2, 20)
    weights = {
        path: [torch.nn.Parameter(torch.tensor(m.copy())) for m in torch_layout(path, x)]
        for path, x in params.items()
    }
    groups = [
        {"params": [w for path in weights if (path in DECAYED) == on for w in weights[path]]}
        | {"weight_decay": 0.1 * on}
        for on in (True, False)
    ]
    opt = optimizer(groups)
    for k, one in enumerate(grads):
        for group in opt.param_groups:
            group["lr"] = float(lr(k))
        for path, matrices in weights.items():
            for weight, grad in zip(matrices, torch_layout(path, one[path]), strict=True):
                weight.grad = torch.tensor(grad.copy())
        if clip:
            torch.nn.utils.clip_grad_norm_([w for group in groups for w in group["params"]], clip)
        opt.step()
    return {path: [w.detach().numpy() for w in matrices] for path, matrices in weights.items()}


def assert_same_run(ours, theirs, params, tolerance):
    """Weights agree relative to themselves; weights that began at 0, to what the run added."""
    for path, matrices in theirs.items():
        trio = zip(
            torch_layout(path, ours[path]), matrices, torch_layout(path, params[path]), strict=True
        )
        for mine, want, first in trio:
            atol = tolerance * np.abs(want - first).max()
            np.testing.assert_allclose(mine, want, rtol=tolerance, atol=atol, err_msg=path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", {4: 1.0, 50: 1.0, 103: 1.0, 104: 1.0}),
        ("cosine", {4: 1.0, 54: 0.55, 104: 0.1, 200: 0.1}),
        ("linear", {4: 1.0, 54: 0.5, 103: 0.01, 104: 0.0, 200: 0.0}),
        ("wsd", {4: 1.0, 84: 1.0, 94: 0.5, 104: 0.0}),
    ],
)
def test_t18_schedule_values(name, values):
    lr = optim.schedule(name, 3e-4, 4, 104)
    warmup = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0}
    for step, want in (warmup | values).items():
        np.testing.assert_allclose(lr(step), 3e-4 * want, rtol=2e-6, atol=1e-12)


def test_t18_schedule_without_warmup_and_short():
    assert optim.schedule("cosine", 1.0, 0, 10)(0) == 1.0
    assert optim.schedule("linear", 1.0, 1, 2)(0) == 1.0
    late = optim.schedule("wsd", 1.0, 9, 10)
    np.testing.assert_allclose([late(k) for k in (8, 9, 10)], [1.0, 1.0, 0.0], rtol=1e-6)


def test_wsd_keeps_the_last_fifth_of_all_steps_for_the_decay():
    lr = optim.schedule("wsd", 1.0, 10, 100)
    np.testing.assert_allclose([lr(80), lr(81), lr(90)], [1.0, 0.95, 0.5], rtol=1e-6)


@pytest.mark.parametrize("warmup", [10, 11, -1])
def test_schedule_rejects_warmup(warmup):
    with pytest.raises(UserError, match=f"warmup_steps={warmup} .*total_steps=10"):
        optim.schedule("cosine", 1.0, warmup, 10)


def test_unknown_names_list_the_known():
    with pytest.raises(UserError, match=r"'cosin'.*constant, cosine, linear, wsd"):
        optim.schedule("cosin", 1.0, 0, 10)
    with pytest.raises(UserError, match=r"'adam'.*adamw, adamw_8bit, adafactor, lion, muon"):
        make("adam")


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
def test_t15_t16_adamw_is_torch_adamw(clip):
    params, grads = start(), [arrays(k) for k in range(1, 11)]
    ours = run(make("adamw", clip=clip), params, grads)
    theirs = run_torch(params, grads, lambda g: torch.optim.AdamW(g, eps=1e-8), clip)
    assert_same_run(ours, theirs, params, 1e-6)


def test_adamw_without_momentum():
    params, grads = start(), [arrays(k) for k in range(1, 4)]
    ours = run(make("adamw", b1=0.0), params, grads)
    theirs = run_torch(params, grads, lambda g: torch.optim.AdamW(g, betas=(0.0, 0.999)))
    assert_same_run(ours, theirs, params, 1e-6)


@pytest.mark.parametrize("name", [name for name in optim.OPTIMIZERS if name != "prodigy"])
def test_t15_only_matrices_decay(name):
    """Without gradients all that moves is what decays, by lr * weight_decay of itself."""
    params = arrays(0)
    after = run(make(name), params, [{path: np.zeros_like(x) for path, x in params.items()}])
    for path, x in params.items():
        want = x * (1 - LR / 2 * 0.1) if path in DECAYED else x
        np.testing.assert_allclose(after[path], want, rtol=1e-6, err_msg=path)


def test_lion_is_the_paper():
    params, grads = arrays(0), [arrays(k) for k in range(1, 6)]
    ours = run(make("lion", b2=0.99), params, grads)
    lr = optim.schedule("linear", LR, 2, 20)
    for path, weight in params.items():
        moment, decay = np.zeros_like(weight), 0.1 if path in DECAYED else 0.0
        for k, one in enumerate(grads):
            sign = np.sign(0.9 * moment + 0.1 * one[path])
            weight = weight - float(lr(k)) * (sign + decay * weight)
            moment = 0.99 * moment + 0.01 * one[path]
        np.testing.assert_allclose(ours[path], weight, rtol=1e-6, atol=1e-6, err_msg=path)


def test_t17_adafactor_is_transformers_adafactor():
    """LoRA is left out: theirs factors it, ours keeps what has a side below 128 whole."""
    leaves = {path: leaf for path, leaf in LEAVES.items() if 8 not in leaf.shape}
    leaves = {path: leaf for path, leaf in leaves.items() if V not in leaf.shape}
    params, grads = arrays(0, leaves), [arrays(k, leaves) for k in range(1, 6)]
    for one in grads:  # a layer and a row of other size show what was factored together
        one["layers.q_proj.kernel"][0] *= 100.0
        one["layers.o_proj.kernel"][1, 2] *= 0.01
    ours = run(make("adafactor", leaves), params, grads)

    def optimizer(groups):
        return Adafactor(groups, lr=LR, scale_parameter=False, relative_step=False)

    assert_same_run(ours, run_torch(params, grads, optimizer), params, 1e-5)


def test_t17_muon_is_close_to_torch_muon():
    """torch orthogonalises in bf16 and weights the first momenta differently: directions agree."""
    leaves = {path: LEAVES[path] for path in ("layers.q_proj.kernel", "layers.o_proj.kernel")}
    params, grads = arrays(0, leaves), [arrays(1, leaves)]
    ours = run(make("muon", leaves), params, grads)

    def optimizer(groups):
        filled = [group for group in groups if group["params"]]
        return torch.optim.Muon(filled, lr=LR, adjust_lr_fn="match_rms_adamw")

    for path, matrices in run_torch(params, grads, optimizer).items():
        first = torch_layout(path, params[path])
        for mine, want, was in zip(torch_layout(path, ours[path]), matrices, first, strict=True):
            error = np.linalg.norm(mine - want) / np.linalg.norm(want - was)
            assert error < 0.02, (path, error)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_t17_stacked_layers_train_as_separate_ones(name):
    """(L, D, N, H) moves exactly as L matrices (N * H, D) that the same optimiser holds apart."""
    params, grads = start(), [arrays(k) for k in range(1, 4)]
    for one in grads:
        one["layers.q_proj.kernel"][0] *= 1000.0
        one["layers.norm.scale"][0] *= 1000.0
    apart_leaves = {}

    def apart(tree):
        out = {}
        for path, x in tree.items():
            for i, m in enumerate(torch_layout(path, x)):
                inputs = min(LEAVES[path].inputs, 1)
                axes = ("embed", "vocab" if "vocab" in LEAVES[path].axes else "mlp")[: m.ndim]
                apart_leaves[f"{i}.{path}"] = Leaf(
                    m.shape, jnp.float32, axes, inputs, LEAVES[path].role
                )
                out[f"{i}.{path}"] = m
        return out

    params_apart, grads_apart = apart(params), [apart(one) for one in grads]
    ours = run(make(name), params, grads)
    separate = run(make(name, apart_leaves), params_apart, grads_apart)
    for path in LEAVES:
        for i, mine in enumerate(torch_layout(path, ours[path])):
            want, first = separate[f"{i}.{path}"], params_apart[f"{i}.{path}"]
            assert np.abs(want - first).max() > 1e-3
            np.testing.assert_allclose(mine, want, rtol=1e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_each_expert_is_a_matrix_of_its_own(name):
    """(L, E, in, out) moves as (L E, in, out) of so many layers does."""
    many = Leaf((2, 3, 4, 6), jnp.float32, ("layers", "expert", None, "mlp"), 1)
    path, leaves = "experts.gate_proj.kernel", {}
    rng = np.random.default_rng(0)
    value, *steps = (rng.normal(size=many.shape).astype(np.float32) for _ in range(4))
    steps[0][1, 2] *= 1000.0
    made = []
    for leaf in (many, Leaf((6, 4, 6), jnp.float32, ("layers", "embed", "mlp"), 1)):
        leaves = {path: leaf}
        start, *grads = ({path: x.reshape(leaf.shape)} for x in (value, *steps))
        made.append(run(make(name, leaves), start, grads)[path].reshape(many.shape))
    assert np.abs(made[0] - value).max() > 1e-3
    np.testing.assert_allclose(*made, rtol=1e-5, atol=1e-6)


def test_t17_muon_leaves_embeddings_heads_and_vectors_to_adamw():
    params, grads = start(), [arrays(k) for k in range(1, 4)]
    muon, adamw = (run(make(name), params, grads) for name in ("muon", "adamw"))
    hidden = {path for path in LEAVES if path.startswith("layers.") and path in DECAYED}
    for path in LEAVES:
        assert np.array_equal(muon[path], adamw[path]) == (path not in hidden), path


def test_muon_says_when_a_kernel_has_no_inputs():
    leaves = {"fc.kernel": Leaf((4, 4), jnp.float32, ("embed", "mlp"), 0)}
    with pytest.raises(ValueError, match=r"fc\.kernel: inputs=0"):
        run(make("muon", leaves), arrays(0, leaves), [arrays(1, leaves)])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_t1_moments_are_fp32_for_bf16_parameters(name):
    tx = make(name, clip=1.0)
    params = {p: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for p, x in LEAVES.items()}
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    dtypes = {x.dtype for x in jax.tree.leaves((state, after, updates))}
    codes = {jnp.dtype("int8"), jnp.dtype("uint8")} if name == "adamw_8bit" else set()
    assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32")} | codes
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, after)


def sharded(name, leaves=LEAVES):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    tx, specs = make(name, leaves, clip=1.0), sharding.shardings(leaves, mesh)
    out = optim.state_shardings(tx, leaves, specs, sharding.replicated(mesh))
    params = jax.device_put(jax.tree.map(jnp.asarray, arrays(0, leaves)), specs)
    return tx, specs, out, params, jax.jit(tx.init, out_shardings=out)(params)


def is_spec(x, *axes):
    return x.sharding.spec == PartitionSpec(*axes)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_state_is_sharded_as_the_parameters(name):
    _, specs, _, _, state = sharded(name)
    inner = state[1]
    for moments in [inner.mu, *([inner.nu] if name == "adamw" else [])]:
        for path, moment in moments.items():
            assert moment.sharding == specs[path], path
    assert is_spec(inner.count)
    q = inner.mu["layers.q_proj.kernel"]
    assert q.addressable_shards[0].data.shape == (L, D // 4, N // 2, H)


def test_muon_state_is_sharded_as_the_parameters():
    _, specs, _, _, state = sharded("muon")
    inner = state[1].inner_states
    momentum, adam = inner["muon"].inner_state[0].mu, inner["adam"].inner_state
    arrays = {path: x for path, x in momentum.items() if isinstance(x, jax.Array)}
    assert set(arrays) == {p for p in LEAVES if p.startswith("layers.") and p in DECAYED}
    for path, moment in arrays.items():
        assert moment.sharding == specs[path], path
    assert is_spec(adam.mu["lm_head.kernel"], "fsdp", "tensor")
    assert is_spec(adam.nu["embed_tokens.embedding"], "tensor", "fsdp")


def test_adafactor_state_is_sharded_by_groups():
    *_, state = sharded("adafactor")
    inner = state[1].inner_states[f"stack_{L}"].inner_state[0]
    assert inner.v_row["layers.q_proj.kernel"].shape == (L, D)
    assert inner.v["layers.q_proj.lora_b"].shape == (L, 8, N * H)
    assert is_spec(inner.v["layers.q_proj.lora_b"], None, None, "tensor")
    assert is_spec(inner.v["layers.q_proj.lora_a"], None, "fsdp", None)
    assert is_spec(inner.v["layers.q_proj.bias"], None, "tensor")
    assert is_spec(inner.v_row["layers.q_proj.kernel"])


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "muon", "schedule_free"])
def test_t16_a_sharded_step_is_the_unsharded_step(name):
    """The norm that clips goes over all shards, and the state keeps its shardings."""
    some = ("layers.q_proj.kernel", "layers.q_proj.lora_b", "embed_tokens.embedding", "norm.scale")
    leaves = {path: LEAVES[path] for path in some}
    tx, specs, out, params, state = sharded(name, leaves)
    alone = run(tx, arrays(0, leaves), [arrays(1, leaves)])

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = jax.device_put(jax.tree.map(jnp.asarray, arrays(1, leaves)), specs)
    after, state = jax.jit(step, out_shardings=(specs, out), compiler_options=QUICK)(
        grads, state, params
    )
    assert jax.tree.map(lambda x: x.sharding, state) == out
    for path, want in alone.items():
        np.testing.assert_allclose(after[path], want, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("decay", [0.9999, 0.3])
def test_ema_is_diffusers(decay):
    runs = [arrays(k) for k in range(6)]
    weights = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in arrays(9).items()}
    theirs = diffusers.training_utils.EMAModel(list(weights.values()), decay=decay)
    ema = jax.tree.map(jnp.asarray, arrays(9))
    update = jax.jit(optim.ema_update, static_argnums=3)
    for step, params in enumerate(runs):
        for path, weight in weights.items():
            weight.data = torch.tensor(params[path])
        theirs.step(list(weights.values()))
        ema = update(ema, jax.tree.map(jnp.asarray, params), step, decay)
        for path, want in zip(weights, theirs.shadow_params, strict=True):
            np.testing.assert_allclose(ema[path], want.numpy(), rtol=1e-6, atol=1e-6)


def test_t1_ema_stays_fp32_and_sees_small_steps_of_bf16():
    ema, params = {"w": jnp.ones(3)}, {"w": jnp.full(3, 1.0078125, jnp.bfloat16)}
    after = optim.ema_update(ema, params, 10**6, 0.9999)["w"]
    assert after.dtype == jnp.float32
    np.testing.assert_array_equal(after, np.float32(1 + 0.0078125e-4))
