"""DoRA of pipelines: layers as in PEFT, files as diffusers and LyCORIS read and write them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from flax import nnx
from lycoris.modules.locon import LoConModule
from peft import LoraConfig, inject_adapter_in_model
from safetensors.numpy import load_file, save_file

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import bind, flatten
from jaxft.nn import lora
from jaxft.nn.conv import Conv, dense
from jaxft.weights.adapters.peft import start
from jaxft.weights.adapters.pipeline import sites
from jaxft.weights.adapters.pipeline_file import load, open_lora
from jaxft.weights.rules import to_torch
from tests.tiny_pipelines import make_pipeline
from tests.weights.adapters.test_lycoris import CONV, MODULES, STEM, made, random
from tests.weights.adapters.test_pipeline import CFG, FORMATS, Adapted, text_of

DORA = replace(CFG, dora=True)
PEFT_NAMES = ("lora_A", "lora_B", "lora_magnitude_vector")


class Layer(nnx.Module):
    def __init__(self, kind, key):
        conv = kind != "linear"
        self.layer = Conv(6, 8, 3, key=key, padding=1, stride=2) if conv else dense(6, 8, key=key)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_and_its_gradients_are_pefts(kind):
    """The norm has no gradient, the kernel neither."""
    model, rng = Layer(kind, jax.random.key(0)), np.random.default_rng(1)
    lora.add(model, Lora(4, 6.0, ".*", dora=True), jax.random.key(1))
    layer, conv = model.layer, kind == "conv"
    x = rng.normal(size=(2, 5, 7, 6) if conv else (2, 6)).astype(np.float32)
    layer.lora_b[...] = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    layer.lora_m[...] = layer.lora_m[...] * rng.uniform(0.5, 2, 8).astype(np.float32)
    layer.bias[...] = jnp.asarray(rng.normal(size=8), jnp.float32)
    base = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1) if conv else torch.nn.Linear(6, 8)
    theirs = torch.nn.Sequential(base)
    split = lambda tensor: np.asarray(tensor).transpose((3, 2, 0, 1) if conv else (1, 0))  # noqa: E731
    with torch.no_grad():
        base.weight.copy_(torch.tensor(split(layer.kernel[...])))
        base.bias.copy_(torch.tensor(np.array(layer.bias[...])))
    config = LoraConfig(r=4, lora_alpha=6.0, target_modules=["0"], use_dora=True)
    inject_adapter_in_model(config, theirs)
    a, b, m = (getattr(theirs[0], name)["default"].weight for name in PEFT_NAMES)
    np.testing.assert_allclose(
        m.detach().numpy().ravel(), np.linalg.norm(split(layer.kernel[...]).reshape(8, -1), axis=1),
        rtol=1e-6,
    )  # fmt: skip
    with torch.no_grad():
        a.copy_(torch.tensor(split(layer.lora_a[...])))
        b.copy_(torch.tensor(np.array(layer.lora_b[...]).T.reshape(b.shape)))
        m.copy_(torch.tensor(np.array(layer.lora_m[...]).reshape(m.shape)))
    moved = (0, 3, 1, 2) if conv else (0, 1)
    wanted = theirs(torch.tensor(x.transpose(moved)))
    (wanted**3).sum().backward()

    def loss(adapter):
        y = bind(model, {**params, **adapter}).layer(jnp.asarray(x))
        return (y**3).sum(), y

    params = flatten(model)
    adapter = {path: x for path, x in params.items() if ".lora_" in path}
    grads, y = jax.grad(loss, has_aux=True)(adapter)
    grads = [grads[f"layer.lora_{letter}"] for letter in "abm"]
    got = np.asarray(y).transpose(moved)
    np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-5, atol=1e-5)
    ours = split(grads[0]), np.asarray(grads[1]).T, np.asarray(grads[2])
    for mine, one in zip(ours, (a, b, m), strict=True):
        their = one.grad.numpy().reshape(mine.shape)
        assert np.abs(mine - their).max() < 1e-5 * np.abs(their).max()


class Trained(Adapted):
    """Random adapters whose norms are other than those of the weights."""

    def __init__(self, folder, cfg=DORA):
        super().__init__(folder, cfg)
        rng = np.random.default_rng(2)
        self.first = {}
        for part in self.parts:
            self.first |= start(part, self.leaves, cfg, set(self.leaves))
        self.arrays |= {
            path: norm * rng.uniform(0.5, 1.5, norm.shape).astype(np.float32)
            for path, norm in self.first.items()
        }

    def merged(self):
        """{(component, torch key): the weight with its adapter}."""
        params, found = self.params(), {}
        for site in sites(self.parts, self.leaves):
            slot, names = site.slot, [f"{site.slot.path}.lora_{x}" for x in "abm"]
            arrays = [params[f"{slot.path}.kernel"], *(self.arrays[name] for name in names)]
            one = arrays if slot.layer is None else [x[slot.layer] for x in arrays]
            (entry,) = (
                entry
                for part in self.parts
                for entry in part.entries(self.leaves)
                if entry.path == f"{slot.path}.kernel"
            )
            whole = lora.merged(*one, self.scale)
            found[site.component, slot.module] = to_torch(whole, entry.layout, site.sizes)
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(a pipeline with DoRA, the leaves of one with it everywhere)."""
    work = tmp_path_factory.mktemp("dora")
    make_pipeline(work, "sd").save_pretrained(work / "pipe")
    return Trained(work / "pipe"), Adapted(work / "pipe", Lora(1, targets=".*", dora=True)).leaves


def opened(model, file):
    ours, everywhere = model
    return open_lora(str(file), ours.parts, everywhere, {})


def test_norms_start_as_those_of_the_weights(model):
    ours, params = model[0], model[0].params()
    assert len(ours.first) == len(lora.adapted(ours.leaves)) > 20
    for path, norm in ours.first.items():
        kernel, leaf = params[path.replace("lora_m", "kernel")], ours.leaves[path]
        over = tuple(range(leaf.stacked, kernel.ndim - (norm.ndim - leaf.stacked)))
        np.testing.assert_allclose(norm, np.sqrt((kernel**2).sum(over)), rtol=1e-5)


def test_diffusers_merges_our_file_into_our_weights(model, tmp_path):
    ours, _ = model
    file = ours.write("peft", tmp_path)
    shapes = {key: x.shape for key, x in load_file(file).items() if "magnitude" in key}
    assert {len(shape) for shape in shapes.values()} == {1, 4}
    pipe = StableDiffusionPipeline.from_pretrained(ours.folder)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found = ours.merged()
    assert len(found) == len(shapes)
    for (component, module), wanted in found.items():
        got = text_of(pipe, component)[f"{module}.weight"].numpy()
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max(), module


def test_lycoris_merges_our_file_into_our_weights(model, tmp_path):
    ours, _ = model
    tensors = {key: torch.tensor(x) for key, x in load_file(ours.write("kohya", tmp_path)).items()}
    pipe, found = StableDiffusionPipeline.from_pretrained(ours.folder), ours.merged()
    for (component, module), wanted in found.items():
        if component != "unet":
            continue
        stem = f"lora_unet_{module.replace('.', '_')}"
        names = ("lora_up.weight", "lora_down.weight", "", "alpha", "dora_scale")
        given = [tensors.get(f"{stem}.{name}") for name in names]
        layer = pipe.unet.get_submodule(module)
        with torch.no_grad():
            made = LoConModule.make_module_from_state_dict(stem, layer, *given)
            got = made.get_merged_weight()[0].numpy()
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max(), module


@pytest.mark.parametrize("kind", FORMATS)
def test_files_come_back_bit_for_bit(model, kind, tmp_path):
    ours, _ = model
    found = opened(model, ours.write(kind, tmp_path))
    assert found.lora.dora and found.lora.rank == 4
    leaves = Adapted(ours.folder, found.lora).leaves
    arrays, factor = load(found, leaves), 1 if kind == "kohya" else ours.scale
    for path, wanted in ours.arrays.items():
        wanted = factor * wanted if path.endswith("lora_b") else wanted
        assert np.array_equal(arrays[path], wanted.astype(np.float32)), path


@pytest.mark.parametrize("name", ["locon", "loha", "lokr-low"])
def test_a_lycoris_update_keeps_its_norms(model, name, tmp_path):
    """W + update first, then the norms of its rows: lycoris.functional.general."""
    ours, _ = model
    stem = CONV if name == "locon" else STEM
    weight = make_pipeline(tmp_path, "sd").unet.get_submodule(MODULES[stem]).weight.detach()
    out, inner = weight.shape[:2]
    (pieces, whole, rank), _ = made(name, out, inner)
    norms = np.abs(random(out, *[1] * (weight.ndim - 1))) + 0.5
    save(tmp_path, stem, {**pieces, "dora_scale": norms})
    found = opened(model, tmp_path / "x.safetensors")
    arrays = load(found, Adapted(ours.folder, found.lora).leaves)
    (one,) = found.adapted
    slot = one.site.slot
    factors = [arrays[f"{slot.path}.lora_{x}"] for x in "abm"]
    kernel = ours.params()[f"{slot.path}.kernel"]
    scale = found.lora.alpha / found.lora.rank
    if slot.layer is not None:
        kernel, *factors = (x[slot.layer] for x in (kernel, *factors))
    got = lora.merged(kernel, *factors, scale).reshape(-1, out).T
    wanted = weight.numpy() + 1.5 / rank * whole.reshape(weight.shape)
    wanted = (wanted / np.linalg.norm(wanted.reshape(out, -1), axis=1).reshape(norms.shape)) * norms
    theirs = wanted.transpose(0, 2, 3, 1) if weight.ndim == 4 else wanted
    assert np.abs(got - theirs.reshape(out, -1)).max() <= 1e-5 * np.abs(theirs).max()


def save(folder, stem, pieces):
    tensors = {f"{stem}.{name}": np.ascontiguousarray(x) for name, x in pieces.items()}
    save_file({**tensors, f"{stem}.alpha": np.array(1.5, np.float32)}, folder / "x.safetensors")


def test_norms_of_inputs_or_another_width_and_mixed_files_are_refused(model, tmp_path):
    ours, _ = model
    weight = make_pipeline(tmp_path, "sd").unet.get_submodule(MODULES[CONV]).weight
    out, inner = weight.shape[:2]
    (conv, _, _), _ = made("locon", out, inner)
    for given, stem, words in (
        (random(1, inner, 1, 1), CONV, r"dora_scale .* norms of the inputs \(LyCORIS' wd_on_out"),
        (random(3, 1, 1, 1), CONV, "dora_scale .* does not fit unet.mid_block"),
    ):
        save(tmp_path, stem, {**conv, "dora_scale": given})
        with pytest.raises(UserError, match=words):
            opened(model, tmp_path / "x.safetensors")
    tensors = load_file(ours.write("kohya", tmp_path))
    del tensors[next(key for key in tensors if key.endswith(".dora_scale"))]
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(UserError, match="is of plain LoRA, and others are of DoRA"):
        opened(model, tmp_path / "mixed.safetensors")
