"""LoRA on a quantised denoiser: its step beside one on decoded weights, exports, and its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from jaxft import export, train
from jaxft.core.errors import UserError
from jaxft.core.params import bind_some, describe
from jaxft.kernels.quantised import int8, nf4
from jaxft.kernels.quantised.int8 import Int8
from jaxft.kernels.quantised.nf4 import NF4
from jaxft.runs import opening
from jaxft.runs.compiling import Compiled
from jaxft.runs.planning import estimate
from tests.tasks.diffusion.flow_runs import losses
from tests.tiny_diffusion import flags_of, make_config, make_pictures
from tests.tiny_flux import make_flux
from tests.tiny_klein import make_klein
from tests.tiny_pipelines import make_pipeline
from tests.tiny_sd3 import make_sd3
from tests.tiny_zimage import make_zimage

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
WIDE = {"attention_head_dim": 32, "axes_dims_rope": (16, 8, 8)}  # 2 heads make a block of NF4
UNET = {"block_out_channels": (64, 64), "cross_attention_dim": 64}
MAKERS = {
    "sd": lambda work: make_pipeline(work, "sd", text={"hidden_size": 64}, **UNET),
    "sdxl": lambda work: make_pipeline(work, "sdxl"),
    "sd3": lambda work: make_sd3(
        work, t5=False, attention_head_dim=32, caption_projection_dim=64
    ),
    "flux": lambda work: make_flux(work, **WIDE),
    "klein": lambda _: make_klein(attention_head_dim=32, axes_dims_rope=(8, 8, 8, 8)),
    "zimage": lambda _: make_zimage(dim=192, axes_dims=[32, 32, 32]),
}  # fmt: skip
LORA = {"lora.rank": 4, "lora.alpha": 6.0, "export.kind": "lora", "optim.lr": 0.05}
DENOISERS = {"sd": "unet", "sdxl": "unet"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a family, which is made once."""
    made = {}

    def folder(name):
        if name not in made:
            work = tmp_path_factory.mktemp(name)
            MAKERS[name](work).save_pretrained(work / "folder")
            made[name] = work / "folder"
        return made[name]

    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=8)


def make_batch(run):
    """Random rows with encoded pictures and captions, as a cache gives them."""
    rng, made = np.random.default_rng(0), {}
    for name, x in run.task.plan(run.opened).shapes.items():
        drawn = rng.standard_normal(x.shape).astype(np.float32)
        made[name] = drawn if x.dtype != np.int32 else np.full(x.shape, 7, np.int32)
    return {**made, "weights": np.ones(2, np.float32)}


def loss_and_gradients(run, params, batch):
    """Of the adapters, in one step. B is not zero, so that A has a gradient."""
    key, tuned = jax.random.key(1), {}
    for path in sorted(run.chosen):
        key, own = jax.random.split(key)
        tuned[path] = 0.1 * jax.random.normal(own, run.leaves[path].shape)
    keys = jax.random.split(jax.random.key(7), len(batch["weights"]))
    planned = run.task.plan(run.opened)
    objective = run.task.objective(run.opened, planned)

    def loss(tuned):
        model = bind_some(run.opened.template, {**params, **tuned}, jnp.float32)
        return objective.loss(model, batch, keys, 0)[0][0]

    return jax.jit(jax.value_and_grad(loss))(tuned)


def load(run):
    """The frozen parameters that a step on encoded rows reads."""
    unread = run.task.plan(run.opened).unread
    paths = {path for path in run.leaves if not path.startswith(unread)}
    return opening.load_params(run, paths - run.chosen)


def decoded(run, params):
    """The parameters of the model before quantisation, with the numbers that its arrays hold."""
    found, layout = dict(params), {"nf4": (NF4, nf4), "int8": (Int8, int8)}
    for path in [one.removesuffix(".codes") for one in params if one.endswith(".codes")]:
        form, module = layout[run.opened.options.base]
        held = form(**{x: found.pop(f"{path}.{x}") for x in form._fields})
        whole = run.leaves[f"{path}.codes"].packed.whole
        ins = whole.shape[1 : 1 + whole.inputs]
        made = jax.vmap(lambda one, ins=ins, f=module.decode: f(one, ins, jnp.float32))(held)
        count = len(ins)
        found[path] = jnp.moveaxis(made, range(-count, 0), range(1, 1 + count))
    return found


OTHERS = (("sd3", "nf4"), ("klein", "nf4"), ("zimage", "nf4"), ("flux", "int8"))


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("sd", "nf4"),
        ("flux", "nf4"),
        ("sdxl", "int8"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS),
    ],
)
def test_loss_and_gradients_are_those_on_decoded_weights(name, base, folders, data):
    changes = {**LORA, "batch_size": 2, "base": base, "cache": "cache"}
    packed = opening.open_run(make_config(folders(name), data, changes))
    plain = opening.open_run(make_config(folders(name), data, {**changes, "base": "none"}))
    params, batch = load(packed), make_batch(packed)
    value, grads = loss_and_gradients(packed, params, batch)
    whole, before = decoded(packed, params), load(plain)
    assert whole.keys() == before.keys()
    assert any(jnp.abs(x - before[path]).max() > 1e-3 for path, x in whole.items())
    theirs, wanted = loss_and_gradients(plain, whole, batch)
    np.testing.assert_allclose(value, theirs, rtol=1e-5)
    assert grads.keys() == wanted.keys()
    norms = {path: np.linalg.norm(grad) for path, grad in wanted.items()}
    errors = {path: np.linalg.norm(grads[path] - grad) for path, grad in wanted.items()}
    assert sum(x**2 for x in errors.values()) < 1e-10 * sum(x**2 for x in norms.values())
    assert all(x < 1e-4 * norms[path] + 1e-9 for path, x in errors.items()), errors


@pytest.mark.parametrize("name", MAKERS)
def test_the_blocks_of_the_denoiser_are_quantised_and_nothing_else(name, folders, data):
    run = opening.open_run(make_config(folders(name), data, {**LORA, "base": "int8"}))
    kernels = {path.removesuffix(".codes") for path in run.leaves if path.endswith(".codes")}
    prefix = DENOISERS.get(name, "transformer") + "."
    assert kernels and all(path.startswith(prefix) for path in kernels)
    assert not any("embed" in path or "norm_out" in path for path in kernels)
    plain = opening.open_run(make_config(folders(name), data, LORA))
    left = [x for path, x in run.leaves.items() if path.startswith(prefix) and not x.packed]
    left = sum(np.prod(leaf.shape) for leaf in left if leaf.inputs and leaf.stacked)
    adapters = sum(np.prod(run.leaves[path].shape) for path in run.chosen)
    assert left == adapters  # no other kernel of a block is left
    assert {path for path in plain.leaves if path not in run.leaves} == kernels
    assert describe(plain.opened.template) == plain.leaves


def test_a_run_trains_and_its_exports_lie_on_the_weights_before_quantisation(
    data, tmp_path, capsys
):
    """In 16 bits, bit for bit: alpha / rank is a power of two."""
    source, work, out = tmp_path / "folder", tmp_path / "run", tmp_path / "lora"
    make_flux(tmp_path, **WIDE).to(torch.bfloat16).save_pretrained(source)
    changes = {**LORA, "lora.alpha": 8.0, "base": "nf4", "export.kind": "folder"}
    flags = [*flags_of(source, data, {**changes, "total": "2_steps"}), "--workdir", str(work)]
    assert train.main(flags) == 0
    first, last = losses(work)
    assert last != first
    arguments = ["--workdir", str(work), "--out", str(out), "--kind", "lora"]
    assert export.main(arguments) == 0
    lora = load_file(out / "pytorch_lora_weights.safetensors")
    name = "transformer/diffusion_pytorch_model.safetensors"
    made, own = load_file(work / "export" / name), load_file(source / name)
    assert made.keys() == own.keys()
    adapted = 0
    for key, before in own.items():
        module = f"transformer.{key.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in lora:
            a, b = (lora[f"{module}.lora_{x}.weight"].astype(np.float32).T for x in "AB")
            before = (before.T.astype(np.float32) + a @ b).T.astype(before.dtype)
            adapted += 1
        assert made[key].tobytes() == before.tobytes(), key
    assert adapted == len(lora) // 2
    again = {"lora.from": out, "base": "nf4", "total": "1_steps"}
    run = opening.open_run(make_config(source, data, again))
    held = opening.load_params(run, run.chosen)
    key = "transformer.single_transformer_blocks.1.attn.to_v.lora_B.weight"
    np.testing.assert_array_equal(held["transformer.singles.attn.to_v.lora_b"][1].T, lora[key])


BITS = {"nf4": lambda ins: 4 + 8 / 64 + 32 / (64 * 256), "int8": lambda ins: 8 + 32 / ins}


@pytest.mark.parametrize("base", BITS)
def test_a_step_holds_the_bits_of_its_codes(base, data, tmp_path, monkeypatch):
    """By the arguments of the compiled step, for a FLUX.1 whose blocks are nearly all of it."""
    shape = {"attention_head_dim": 64, "num_attention_heads": 4, "axes_dims_rope": (16, 24, 24)}
    make_flux(tmp_path, **shape, num_single_layers=4).save_pretrained(tmp_path / "folder")
    changes = {**LORA, "cache": "cache", "param_dtype": "bfloat16", "caption_dropout": 0.0}
    found, compiled, prepare = {}, [], Compiled.prepare
    monkeypatch.setattr(
        Compiled, "prepare", lambda *x: compiled.append(prepare(*x)) or compiled[-1]
    )
    for name in ("none", base):
        changes |= {"base": name}
        run = opening.open_run(make_config(tmp_path / "folder", data, changes))
        planned = estimate.estimate(run).memory
        ((one,), found[name]) = compiled.pop(), planned.parameters
        given = planned.parameters + planned.optimizer + planned.batch
        assert 0.99 * given < one.memory_analysis().argument_size_in_bytes <= given
    kernels = [
        leaf.packed.whole for path, leaf in run.leaves.items() if path.endswith(".codes")
    ]  # fmt: skip
    saved = sum(np.prod(x.shape) * (16 - BITS[base](x.shape[1])) / 8 for x in kernels)
    assert abs(found["none"] - found[base] - saved) < 1e-3 * saved
    assert saved > 0.3 * found["none"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "nf5"}, "base='nf5' is not known; did you mean 'nf4'"),
        ({"lora.rank": 0}, "base=nf4 is frozen, so it needs adapters; set lora.rank"),
        ({"trainable": "unet.*"}, r"trainable='unet\.\*' matches unet\.\S+kernel, which is quant"),
    ],
)
def test_a_base_that_would_have_to_train_is_refused(changes, words, folders, data):
    config = make_config(folders("sd"), data, {**LORA, "base": "nf4", **changes})
    with pytest.raises(UserError, match=words):
        opening.open_run(config)


def test_narrow_projections_of_a_block_are_named(folders, data):
    config = make_config(folders("sdxl"), data, {**LORA, "base": "nf4"})
    with pytest.raises(UserError, match=r"unet\.\S+ has \d+ inputs.* 64; set base=int8"):
        opening.open_run(config)
