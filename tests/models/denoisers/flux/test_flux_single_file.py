"""Single files of FLUX.1, with diffusers' own converter as the oracle."""

import inspect

import jax
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

from jaxft.core.params import describe
from jaxft.models.denoisers.flux import flux
from jaxft.models.denoisers.flux.flux import FluxTransformer
from jaxft.models.denoisers.flux.flux_config import FluxConfig
from jaxft.models.denoisers.flux.flux_single_file import flux_layout
from jaxft.weights import rules
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders import single_file
from jaxft.weights.transfer import Export
from tests.models.denoisers.flux.test_flux import TINY
from tests.models.denoisers.mmdit.test_mmdit_single_file import whole

KINDS = {"dev": TINY, "schnell": {**TINY, "guidance_embeds": False}}
STEM = "model.diffusion_model."


def converter(width):
    """diffusers' converter for another width than the 3072 that is written into it."""
    own = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    source = inspect.getsource(own)
    assert source.count("3072") == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace("3072", str(width)), scope)
    return scope[own.__name__]


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """(config, diffusers' random model, our single file of it)."""
    torch.manual_seed(0)
    theirs, work = FluxTransformer2DModel(**KINDS[request.param]), tmp_path_factory.mktemp("flux")
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    theirs.save_pretrained(work)
    (work / "single").mkdir()
    cfg = FluxConfig.from_hf(KINDS[request.param])
    parts = {"transformer": (whole(TensorFiles.open(work)), flux_layout(cfg))}
    return cfg, theirs, single_file.write(work / "single" / "flux.safetensors", parts)


def test_t20_diffusers_converts_our_file_to_the_same_bytes_and_no_key_is_left(written):
    cfg, theirs, file = written
    state, ours = theirs.state_dict(), load_file(file)
    assert all(key.startswith(STEM) for key in ours)
    made = converter(cfg.dim)(ours)
    assert not ours and made.keys() == state.keys()
    assert all(torch.equal(made[key], state[key]) for key in state)


def test_t20_we_read_the_file_as_its_folder_bit_for_bit(written):
    cfg, theirs, file = written
    ours = single_file.as_diffusers(TensorFiles.open(file), flux_layout(cfg))
    state = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    assert set(ours.keys()) == state.keys()
    for key, wanted in state.items():
        array = ours.read(key)
        assert (array.shape, array.dtype) == ours.info(key) == (wanted.shape, wanted.dtype)
        assert array.tobytes() == wanted.tobytes() and array.flags.c_contiguous
    shapes = {key: ours.info(key)[0] for key in ours.keys()}  # noqa: SIM118
    leaves = describe(jax.eval_shape(lambda: FluxTransformer(cfg, key=jax.random.key(0))))
    assert rules.plan(flux.rules(cfg), leaves, shapes, {}) == rules.expected(
        flux.rules(cfg), leaves
    )


def test_t20_linear1_is_q_k_v_mlp_and_only_the_output_is_swapped(written):
    _, theirs, file = written
    ours, state = load_file(file), theirs.state_dict()
    block = "single_transformer_blocks.1."
    for leaf in ("weight", "bias"):
        parts = [state[f"{block}attn.to_{letter}.{leaf}"] for letter in "qkv"]
        whole_ = torch.cat([*parts, state[f"{block}proj_mlp.{leaf}"]])
        assert torch.equal(ours[f"{STEM}single_blocks.1.linear1.{leaf}"], whole_)
        shift, scale = ours[f"{STEM}final_layer.adaLN_modulation.1.{leaf}"].chunk(2)
        assert torch.equal(torch.cat([scale, shift]), state[f"norm_out.linear.{leaf}"])
        modulation = state[f"transformer_blocks.0.norm1_context.linear.{leaf}"]
        assert torch.equal(ours[f"{STEM}double_blocks.0.txt_mod.lin.{leaf}"], modulation)


def test_t20_published_shapes_convert_without_a_byte_allocated():
    config = {"guidance_embeds": True}
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**config)
    state = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    export = Export({key: (shape, np.dtype(np.float32)) for key, shape in state.items()}, iter(()))
    infos = single_file.to_ldm(export, flux_layout(FluxConfig.from_hf(config))).infos
    assert infos[f"{STEM}single_blocks.37.linear1.weight"][0] == (21504, 3072)
    file = {key: torch.empty(shape, device="meta") for key, (shape, _) in infos.items()}
    made = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(file)
    assert {key: tuple(tensor.shape) for key, tensor in made.items()} == state and not file
