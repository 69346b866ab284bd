"""Pipelines whose networks bitsandbytes holds in NF4: read as they are, tuned by an adapter.

diffusers quantises on a GPU alone. The modules here are those that it would put into a transformer,
quantised on the CPU.
"""

import json

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import BitsAndBytesConfig
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig as TextConfig
from transformers import T5EncoderModel

from jaxft import train
from jaxft.core.errors import UserError
from jaxft.core.params import bind_some
from jaxft.models.pipelines.ldm import open_model
from jaxft.runs import opening
from tests.tasks.diffusion.flow_runs import NAME, damaged
from tests.tiny_diffusion import flags_of, make_config, make_pictures
from tests.tiny_flux import make_flux

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
WIDE = {"attention_head_dim": 32, "axes_dims_rope": (16, 8, 8)}
NF4_LORA = {"base": "nf4", "lora.rank": 4, "export.kind": "lora", "optim.lr": 0.05}
KEY = "single_transformer_blocks.1.attn.to_v.weight"
SMALL = 0.01  # sigma and guidance: sinusoids of 1000 times as much magnify the rounding of both
PATH = "transformer.singles.attn.to_v.kernel"


def in_nf4(linear, double):
    made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
        compress_statistics=double,
    )
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def decoded(model):
    """The model on weights that bitsandbytes decodes, block after block.

    On CPUs with AVX512-BF16 its own products are bf16, and its decoder misreads a row that does
    not end with a block.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            codes, state = module.weight.data, module.weight.quant_state
            shape, state.shape = state.shape, torch.Size((state.shape.numel() // 64, 64))
            weight = bnb.functional.dequantize_4bit(codes, state).reshape(shape)
            made = torch.nn.Linear(*reversed(shape), bias=module.bias is not None)
            made.load_state_dict(dict(module.named_parameters()) | {"weight": weight})
            model.set_submodule(name, made)
    return model


def quantised(work, double):
    """(folder, the transformer) of a FLUX.1 whose transformer and T5 are in NF4."""
    pipe = make_flux(work, **WIDE)
    pipe.save_pretrained(work / "folder")
    stated = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    stated["bnb_4bit_use_double_quant"] = double
    model, place = pipe.transformer, work / "folder" / "transformer"
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, in_nf4(module, double))
    save_file(model.state_dict(), place / NAME, metadata={"format": "pt"})
    damaged(place / "config.json", quantization_config=BitsAndBytesConfig(**stated).to_dict())
    place = work / "folder" / "text_encoder_2"
    text = T5EncoderModel.from_pretrained(
        place, quantization_config=TextConfig(**stated), device_map="cpu", dtype=torch.float32
    )
    text.save_pretrained(place)
    return work / "folder", model, text


@pytest.fixture(scope="module", params=["double", "single"])
def model(request, tmp_path_factory):
    return quantised(tmp_path_factory.mktemp(request.param), request.param == "double")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=8)


def test_codes_are_the_files_and_outputs_are_bitsandbytes(model, data):
    """Blocks keep their codes. The projections around them and T5 are decoded."""
    folder, theirs, text = model[0], *map(decoded, model[1:])
    run = opening.open_run(make_config(folder, data, NF4_LORA))
    unread = ("vae.",)
    params = opening.load_params(run, {x for x in run.leaves if not x.startswith(unread)})
    held = load_file(folder / "transformer" / NAME)
    np.testing.assert_array_equal(
        np.asarray(params[f"{PATH}.codes"][1]).reshape(-1, 1), held[KEY]
    )  # fmt: skip
    assert (f"{PATH}.nested" in params) == (f"{KEY}.nested_absmax" in held)
    assert params["transformer.x_embedder.kernel"].dtype == np.float32
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    context = rng.standard_normal((2, 5, 48)).astype(np.float32)
    pooled = rng.standard_normal((2, 16)).astype(np.float32)
    ids = rng.integers(4, 90, (1, 12))

    def outputs(params):
        bound = bind_some(run.opened.template, params, jnp.float32)
        made = bound.transformer(latents, jnp.full(2, SMALL), context, pooled, jnp.full(2, SMALL))
        return made, bound.text_encoder_2(ids, dtype=jnp.float32)

    ours, states = jax.jit(outputs)(params)
    cells = torch.tensor(latents).permute(0, 3, 1, 2).reshape(2, 4, 4, 2, 4, 2)
    tokens = cells.permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)
    places = torch.tensor(np.indices((1, 4, 4)).reshape(3, -1).T, dtype=torch.float32)
    with torch.no_grad():
        made = theirs(
            hidden_states=tokens,
            encoder_hidden_states=torch.tensor(context),
            pooled_projections=torch.tensor(pooled),
            timestep=torch.full((2,), SMALL),
            img_ids=places,
            txt_ids=torch.zeros(5, 3),
            guidance=torch.full((2,), SMALL),
        ).sample
        wanted = text(torch.tensor(ids)).last_hidden_state.numpy()
    made = made.reshape(2, 4, 4, 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(2, 8, 8, 4).numpy()
    np.testing.assert_allclose(ours, made, atol=1e-5 * np.abs(made).max())
    np.testing.assert_allclose(states, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_run_on_it_gives_an_adapter_and_no_whole_model(model, data, tmp_path, capsys):
    folder, *_ = model
    flags = flags_of(folder, data, {**NF4_LORA, "total": "1_steps", "data.eval": ""})
    assert train.main([*flags, "--workdir", str(tmp_path / "run")]) == 0
    made = load_file(tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors")
    assert f"transformer.{KEY.removesuffix('.weight')}.lora_B.weight" in made
    flags = flags_of(folder, data, {**NF4_LORA, "export.kind": "folder"})
    assert train.main([*flags, "--workdir", str(tmp_path / "whole")]) == 2
    error = capsys.readouterr().err
    assert "needs the weights before quantisation" in error and "use export.kind='lora'" in error


def test_what_is_not_read_is_named(model, data, tmp_path):
    folder, *_ = model
    with pytest.raises(UserError, match=r"transformer/config\.json.*bitsandbytes.*base=nf4"):
        open_model(str(folder))
    for own in (path for path in folder.rglob("*") if path.is_file()):
        copy = tmp_path / own.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(own.read_bytes())
    config = json.loads((folder / "transformer" / "config.json").read_text())
    stated = {**config["quantization_config"], "bnb_4bit_quant_type": "fp4"}
    damaged(tmp_path / "transformer" / "config.json", quantization_config=stated)
    with pytest.raises(UserError, match="quant_method='bitsandbytes'"):
        opening.open_run(make_config(tmp_path, data, NF4_LORA))
