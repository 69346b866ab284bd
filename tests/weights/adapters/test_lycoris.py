"""LyCORIS files, read: every method gives the weights of its published formula, and of the package
lycoris-lora. Plain LoRA trains on from there."""

import re

import numpy as np
import pytest
import torch
from lycoris import functional as lycoris
from safetensors.numpy import save_file

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.weights.adapters.lycoris import as_lora
from jaxft.weights.adapters.pipeline_file import open_lora
from jaxft.weights.files.tensor_files import TensorFiles
from tests.tiny_pipelines import make_pipeline
from tests.weights.adapters.test_pipeline import Adapted
from tests.weights.adapters.test_pipeline_file import deltas

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
OUT, IN, KERNEL = 12, 8, (3, 3)
MODULES = {
    STEM: "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    CONV: "mid_block.resnets.0.conv1",
}


def random(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape).astype(np.float32)


def tucker(core, high, low):
    """W [out, in, …] of a core [r, r, …], [out, r] and [r, in]."""
    return np.einsum("ij...,oi,jc->oc...", core, high, low)


def locon(out, inner, kernel, r=3):
    core, up, down = random(r, r, *kernel), random(out, r), random(r, inner)
    ones = (1,) * len(kernel)
    pieces = {
        "lora_mid.weight": core,
        "lora_up.weight": up.reshape(out, r, *ones),
        "lora_down.weight": down.reshape(r, inner, *ones),
    }
    return pieces, tucker(core, up, down), r


def loha(out, inner, kernel, r=2, core=False):
    halves, pieces = [], {}
    for i in (1, 2):
        if core:
            t, b, a = (
                random(r, r, *kernel, seed=i),
                random(r, out, seed=i),
                random(r, inner, seed=i),
            )
            pieces[f"hada_t{i}"] = t
            halves.append(tucker(t, b.T, a))
        else:
            b, a = random(out, r, seed=i), random(r, inner * int(np.prod(kernel)), seed=i)
            halves.append((b @ a).reshape(out, inner, *kernel))
        pieces |= {f"hada_w{i}_a": b, f"hada_w{i}_b": a}
    return pieces, halves[0] * halves[1], r


def lokr(out, inner, kernel, w1="full", w2="full", r=2):
    p, q = 2, 4
    o, n = out // p, inner // q
    if w1 == "full":
        first = random(p, q)
        pieces = {"lokr_w1": first}
    else:
        pieces = {"lokr_w1_a": random(p, r), "lokr_w1_b": random(r, q)}
        first = pieces["lokr_w1_a"] @ pieces["lokr_w1_b"]
    if w2 == "full":
        second = random(o, n, *kernel)
        pieces["lokr_w2"] = second
    elif w2 == "low":
        a, b = random(o, r), random(r, n * int(np.prod(kernel)))
        second = (a @ b).reshape(o, n, *kernel)
        pieces |= {"lokr_w2_a": a, "lokr_w2_b": b}
    else:
        t, a, b = random(r, r, *kernel), random(r, o), random(r, n)
        second = tucker(t, a.T, b)
        pieces |= {"lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}
    whole = np.kron(first.reshape(p, q, *(1,) * len(kernel)), second)
    return pieces, whole, None if w1 == w2 == "full" else r


CASES = {
    "locon": (locon, {}, True),
    "loha": (loha, {}, False),
    "loha-conv": (loha, {}, True),
    "loha-core": (loha, {"core": True}, True),
    "loha-of-a-large-rank": (loha, {"r": 5}, False),
    "lokr": (lokr, {}, False),
    "lokr-conv": (lokr, {}, True),
    "lokr-low": (lokr, {"w2": "low", "r": 1}, False),
    "lokr-low-both": (lokr, {"w1": "low", "w2": "low", "r": 1}, False),
    "lokr-low-conv": (lokr, {"w2": "low"}, True),
    "lokr-core": (lokr, {"w2": "core"}, True),
}


def made(name, out=OUT, inner=IN):
    """(tensors of a module, its update of the weights without alpha, its rank)."""
    make, settings, conv = CASES[name]
    return make(out, inner, KERNEL if conv else (), **settings), conv


def written(folder, stem, pieces, alpha=1.5):
    file = folder / "lycoris.safetensors"
    own = {f"{stem}.{name}": np.ascontiguousarray(x) for name, x in pieces.items()}
    save_file({**own, f"{stem}.alpha": np.array(alpha, np.float32)}, file)
    return file


@pytest.mark.parametrize("name", CASES)
def test_a_module_becomes_lora_with_the_weights_of_its_formula(name, tmp_path):
    (pieces, whole, rank), conv = made(name)
    file = written(tmp_path, "x", pieces)
    inputs = (IN, *KERNEL) if conv else (IN,)
    found = as_lora(str(file), TensorFiles.open(file), {"x": inputs})
    assert sorted(found.keys()) == ["x.alpha", "x.lora_down.weight", "x.lora_up.weight"]
    a, b, alpha = (found.read(f"x.{x}") for x in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert a.shape[1:] == inputs and b.shape[2:] == (1,) * (len(inputs) - 1)
    assert len(a) <= min(OUT, IN * int(np.prod(inputs[1:])))
    got = float(alpha) / len(a) * np.einsum("or,r...->o...", b.reshape(OUT, -1), a)
    scale = 1.5 / rank if rank else 1.0
    np.testing.assert_allclose(got, scale * whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_formulas_are_those_of_the_package(name):
    (pieces, whole, _), _ = made(name)
    given = {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in pieces.items()}
    if name == "locon":
        order, module = ("lora_down.weight", "lora_up.weight", "lora_mid.weight"), lycoris.locon
    elif name.startswith("loha"):
        order, module = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2"), lycoris.loha
        order = tuple(f"hada_{x}" for x in order)
    else:
        order, module = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"), lycoris.lokr
        order = tuple(f"lokr_{x}" for x in order)
    weights = [given.get(key) for key in order]
    if module is lycoris.lokr:
        theirs = module._kron_weight(*weights, 1.0)
    else:
        theirs = module.diff_weight(*weights, gamma=1.0)
    np.testing.assert_allclose(theirs.reshape(whole.shape).numpy(), whole, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    work = tmp_path_factory.mktemp("sd")
    make_pipeline(work, "sd").save_pretrained(work / "pipe")
    return Adapted(work / "pipe"), Adapted(work / "pipe", Lora(rank=1, targets=".*")).leaves


@pytest.mark.parametrize("name", ["locon", "loha", "loha-conv", "lokr-low", "lokr-core"])
def test_a_file_of_a_unet_opens_as_a_lora(name, model, tmp_path):
    ours, everywhere = model
    stem, conv = (CONV, True) if CASES[name][2] else (STEM, False)
    weight = make_pipeline(tmp_path, "sd").unet.get_submodule(MODULES[stem]).weight
    out, inner = weight.shape[:2]
    (pieces, whole, rank), _ = made(name, out, inner)
    file = written(tmp_path, stem, pieces)
    (update,) = (
        x
        for x in deltas(model, open_lora(str(file), ours.parts, everywhere, {})).values()
        if x.any()
    )
    (got,) = (x for x in update if x.any())
    theirs = whole.transpose(2, 3, 1, 0) if conv else whole.T
    np.testing.assert_allclose(got, 1.5 / rank * theirs.reshape(got.shape), rtol=1e-4, atol=1e-4)


def test_files_that_are_not_whole_or_of_another_model_are_refused_in_one_line(model, tmp_path):
    ours, everywhere = model

    def refused(words, stem, pieces):
        file = written(tmp_path, stem, pieces)
        with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: {words}"):
            open_lora(str(file), ours.parts, everywhere, {})

    (pieces, _, _), _ = made("loha", 16, 16)
    refused("no place for lora_unet_x.alpha and 4 more", "lora_unet_x", pieces)
    some = {key: x for key, x in pieces.items() if key != "hada_w2_b"}
    refused(f"{STEM} lacks 'hada_w2_b'", STEM, some)
    refused(f"the factors of {STEM} do not fit", STEM, {**pieces, "hada_w2_b": random(2, 5)})
