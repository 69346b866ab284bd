"""LoRA of FLUX.1 under the names of single files, with diffusers' converter as the oracle."""

import inspect

import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils

from jaxft.models.denoisers.flux.flux_config import FluxConfig
from jaxft.models.denoisers.flux.flux_single_file import flux_layout
from jaxft.weights.adapters.original_names import (
    Factors,
    fused,
    unadapted,
    under_diffusers_names,
)
from jaxft.weights.views import InMemory
from tests.models.denoisers.flux.test_flux import TINY

WIDTH, RANK = 32, 4
LAYOUT = flux_layout(FluxConfig.from_hf(TINY))
DOUBLE, SINGLE = "transformer_blocks.1.", "single_transformer_blocks.2."
SHAPES = {  # diffusers' modules: outputs and inputs
    **{f"{DOUBLE}attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    f"{DOUBLE}attn.add_k_proj": (WIDTH, WIDTH),  # q and v of the text have no adapter
    f"{DOUBLE}ff.net.0.proj": (4 * WIDTH, WIDTH),
    **{f"{SINGLE}attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")},
    f"{SINGLE}proj_mlp": (4 * WIDTH, WIDTH),
    f"{SINGLE}proj_out": (WIDTH, 5 * WIDTH),
    "single_transformer_blocks.0.proj_mlp": (4 * WIDTH, WIDTH),
    "norm_out.linear": (2 * WIDTH, WIDTH),
}


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def factors():
    return {
        name: Factors(normal(RANK, inputs) + i, normal(outputs, RANK) + i)
        for i, (name, (outputs, inputs)) in enumerate(SHAPES.items())
    }


def deltas(tensors):
    """{module: B A times alpha / rank} of a file under diffusers' names."""
    made = {}
    for key in tensors.keys():  # noqa: SIM118
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            a, b = tensors.read(key), tensors.read(f"{stem}.lora_B.weight")
            there = f"{stem}.alpha" in set(tensors.keys())
            alpha = tensors.read(f"{stem}.alpha") if there else len(a)
            made[stem.removeprefix("transformer.")] = b @ a * (alpha / len(a))
    return made


def kohya(made, scale=1.0):
    """A file of kohya's with another alpha than its rank."""
    tensors = {}
    for module, (a, b, m) in made.items():
        stem = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = a, b
        tensors[f"{stem}.alpha"] = np.float32(scale * len(a))
        if m is not None:
            tensors[f"{stem}.dora_scale"] = m[:, None]
    return tensors


def converter():
    """diffusers' converter for another width than the 3072 that is written into it."""
    own = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers
    source = inspect.getsource(own)
    assert "dims=[3072, 3072, 3072, 12288]" in source
    source = source.replace("12288", str(4 * WIDTH)).replace("3072", str(WIDTH))
    scope = dict(vars(lora_conversion_utils))
    exec(source, scope)
    return scope[own.__name__]


def test_t34_fused_modules_have_the_effect_of_their_parts_in_diffusers():
    """Rank and alpha of q, k and v add up, so the strength stays."""
    made = fused(LAYOUT, factors())
    assert len(made["double_blocks.1.img_attn.qkv"][0]) == 3 * RANK
    assert made["single_blocks.2.linear1"][1].shape == (7 * WIDTH, 4 * RANK)
    assert made["double_blocks.1.txt_attn.qkv"][1].shape == (3 * WIDTH, RANK)
    torches = {key: torch.tensor(x) for key, x in kohya(made).items()}
    theirs = {key: x.numpy() for key, x in converter()(torches).items()}
    found = deltas(InMemory(theirs))
    for name, (a, b, _) in factors().items():
        np.testing.assert_allclose(found.pop(name), b @ a, rtol=1e-4, atol=1e-3, err_msg=name)
    assert not any(x.any() for x in found.values())  # zeros for what has no adapter


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_t34_a_kohya_file_is_read_with_its_strength(scale):
    """Blocks along a diagonal come back with the rank of each part."""
    tensors = InMemory({**kohya(fused(LAYOUT, factors()), scale), "lora_te1_x.alpha": normal(1)})
    ours = under_diffusers_names(tensors, LAYOUT, "transformer")
    found = deltas(ours)
    assert found.keys() == SHAPES.keys() and "lora_te1_x.alpha" in ours.keys()  # noqa: SIM118
    for name, (a, b, _) in factors().items():
        np.testing.assert_allclose(found[name], scale * (b @ a), rtol=1e-4, atol=1e-3)
        assert ours.info(f"transformer.{name}.lora_A.weight")[0][0] == RANK


def test_t34_one_a_of_q_k_and_v_is_shared():
    """As kohya trains them: a fused module has one adapter."""
    a, b = normal(RANK, WIDTH), normal(7 * WIDTH, RANK)
    stem = "diffusion_model.single_blocks.0.linear1"
    file = InMemory({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b})
    found = deltas(under_diffusers_names(file, LAYOUT, "transformer"))
    names = [*(f"attn.to_{letter}" for letter in "qkv"), "proj_mlp"]
    pieces = [found[f"single_transformer_blocks.0.{name}"] for name in names]
    np.testing.assert_allclose(np.concatenate(pieces), b @ a, rtol=1e-4, atol=1e-4)


def test_diffusers_names_after_the_prefix_are_read_and_nothing_is_exchanged():
    """As ai-toolkit writes them."""
    file = {}
    for name, (a, b, _) in factors().items():
        file[f"diffusion_model.{name}.lora_A.weight"] = a
        file[f"diffusion_model.{name}.lora_B.weight"] = b
    found = deltas(under_diffusers_names(InMemory(file), LAYOUT, "transformer"))
    assert found.keys() == SHAPES.keys()
    for name, (a, b, _) in factors().items():
        np.testing.assert_allclose(found[name], b @ a, rtol=1e-5, atol=1e-5)


def test_what_is_not_whole_or_not_there_keeps_its_name():
    alone = {"lora_unet_single_blocks_0_linear1.lora_down.weight": normal(RANK, WIDTH)}
    other = {"lora_unet_double_blocks_9_img_mlp_0.lora_up.weight": normal(WIDTH, RANK)}
    file = under_diffusers_names(InMemory({**alone, **other}), LAYOUT, "transformer")
    assert set(file.keys()) == {*alone, *other}


def test_a_new_adapter_whose_b_is_zero_keeps_its_rank():
    own = Factors(normal(6, WIDTH), np.zeros((3 * WIDTH, 6), "f4"))
    made = {"double_blocks.0.img_attn.qkv": own}
    file = under_diffusers_names(InMemory(kohya(made)), LAYOUT, "transformer")
    assert file.info("transformer.transformer_blocks.0.attn.to_v.lora_A.weight")[0] == (6, WIDTH)


def test_norms_of_dora_are_divided_as_the_rows_of_their_modules():
    """A module without an adapter has the norms of its weights, with which it does not change."""
    norms = {
        name: np.abs(normal(outputs)) + 1 + i
        for i, (name, (outputs, _)) in enumerate(SHAPES.items())
    }
    dora = {name: one._replace(m=norms[name]) for name, one in factors().items()}
    beside = unadapted(LAYOUT, dora)
    texts = {f"{DOUBLE}attn.add_{x}_proj" for x in "qv"}
    assert texts < beside and {x.rpartition(".")[2] for x in beside - texts} == {
        "to_q",
        "to_k",
        "to_v",
    }
    plain = {name: np.full(WIDTH, 7.0, np.float32) for name in beside}
    made = fused(LAYOUT, dora, plain)
    assert (
        made["double_blocks.1.txt_attn.qkv"].m.reshape(3, -1)[[0, 2]].tolist()
        == [[7.0] * WIDTH] * 2
    )
    file = under_diffusers_names(InMemory(kohya(made)), LAYOUT, "transformer")
    keys = [key for key in file.keys() if key.endswith(".dora_scale")]  # noqa: SIM118
    assert len(keys) == len(SHAPES) + len(beside)
    for key in keys:
        name = key.removeprefix("transformer.").removesuffix(".dora_scale")
        wanted = {**plain, **norms}[name]
        assert np.array_equal(file.read(key)[:, 0], wanted), name
        update = deltas(file)[name]
        assert bool(update.any()) == (name in norms), name
