"""A new decoder in this file alone: it trains, samples, is exported and read back by the commands.

Post-norm blocks, exact GELU, three layers of a window to one of full attention, each kind with a
rope of its own. Its entry point stands in for that of an installed package.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import jaxft
from jaxft import export, sample, train
from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.models.decoders.config import DecoderConfig, LayerSpec, layer_scans
from jaxft.models.decoders.decoder import Decoder, flops_per_token
from jaxft.models.decoders.families import llama
from jaxft.nn import rope

ROOT = Path(__file__).resolve().parents[2]
NEAR, FAR = 1e4, 1e6  # bases of the two ropes
CONFIG = {
    "model_type": "toy",
    "architectures": ["ToyForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}


def read(config, where):
    """The configuration of a config.json with model_type toy."""
    heads, kv_heads, head_dim = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    near = LayerSpec(config["sliding_window"], rope=0, norms="post", activation="gelu")
    kinds = (near, near, near, replace(near, window=None, rope=1))
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        initializer_range=0.02,
        tied=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        ropes=tuple(rope.from_hf({"rope_theta": theta}, head_dim) for theta in (NEAR, FAR)),
        layers=tuple(kinds[i % 4] for i in range(config["num_hidden_layers"])),
        eos_ids=(config["eos_token_id"],),
    )


ARCHITECTURE = registry.Architecture(
    family="decoder",
    class_name=lambda config: "ToyForCausalLM",
    config=read,
    module=Decoder,
    rules=lambda cfg: llama.RULES,
    sizes=llama.sizes,
    flops=flops_per_token,
    lora=r".*self_attn\.[qkvo]_proj",
)


# ---- the same model in plain torch --------------------------------------------------------------


def rms(x, scale):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * scale


def rotate(x, theta):
    angles = torch.arange(len(x))[:, None] / theta ** (torch.arange(0, 8, 2) / 8)  # [T, 4]
    cos, sin = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
    a, b = x[..., :4], x[..., 4:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def reference(tensors, ids):
    """Logits [T, V] of one row, in float64."""
    w = {key.removeprefix("model."): tensor.double() for key, tensor in tensors.items()}
    x, t = w["embed_tokens.weight"][torch.tensor(ids).long()], torch.arange(len(ids))
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in w.items() if f"layers.{i}." in k}
        full = i % 4 == 3
        q, k, v = (
            (x @ layer[f"self_attn.{name}_proj.weight"].T).view(len(ids), -1, 8) for name in "qkv"
        )
        q, k = rotate(q, FAR if full else NEAR), rotate(k, FAR if full else NEAR)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        behind = t[:, None] - t
        allowed = (behind >= 0) & (full | (behind < CONFIG["sliding_window"]))
        scores = torch.einsum("tnh,snh->nts", q, k) / 8**0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        out = torch.einsum("nts,snh->tnh", weights, v).reshape(len(ids), -1)
        out = out @ layer["self_attn.o_proj.weight"].T
        x = x + rms(out, layer["post_attention_layernorm.weight"])
        gate, up, down = (layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        made = (torch.nn.functional.gelu(x @ gate.T) * (x @ up.T)) @ down.T
        x = x + rms(made, layer["post_feedforward_layernorm.weight"])
    return rms(x, w["norm.weight"]) @ w["lm_head.weight"].T


# ---- the package and the folder -----------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The entry point of this file, as an installed package states it."""
    site = tmp_path_factory.mktemp("site")
    about = site / "toy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    entry = f"[{registry.GROUP}]\ntoy = {__name__}:ARCHITECTURE\n"
    (about / "entry_points.txt").write_text(entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory):
    """Random weights under transformers' names."""
    made = shutil.copytree(tokenizer_folder, tmp_path_factory.mktemp("models") / "toy")
    (made / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    shapes = {"model.embed_tokens": (320, 32), "model.norm": (32,), "lm_head": (320, 32)}
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{name}_proj": (32, 32) for name in "qo"}
        shapes |= {f"{at}self_attn.{name}_proj": (16, 32) for name in "kv"}
        shapes |= {f"{at}mlp.{name}_proj": (48, 32) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj"] = (32, 48)
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        shapes |= {f"{at}{name}": (32,) for name in norms}
    tensors = {
        f"{name}.weight": 0.3 * torch.randn(shape) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    return made


def test_without_its_package_the_type_is_unknown(folder):  # before `installed`
    with pytest.raises(
        UserError, match=r"model_type='toy' is not supported; .*olmo2.*give a model"
    ):
        jaxft.load(str(folder))


@pytest.fixture(scope="module")
def run(installed, folder, make_flags, tmp_path_factory, quick):
    """The run folder of 4 steps of LoRA on the architecture's own targets."""
    work = tmp_path_factory.mktemp("runs") / "toy"
    changes = {"total": "4_steps", "batch_size": 8, "every.save": "0_steps", "optim.lr": 0.02}
    flags = make_flags(folder, {**changes, "lora.rank": 2, "lora.targets": ""})
    config = str(ROOT / "configs" / "llm.py")
    assert train.main(["--config", config, "--workdir", str(work), *flags]) == 0
    return work


def test_logits_are_those_of_the_plain_model(installed, folder):
    ids = np.random.default_rng(0).integers(3, 320, 24)
    model = jaxft.load(str(folder))
    assert [len(one.period) for one in layer_scans(model.config.layers)] == [4, 1]
    want = reference(load_file(folder / "model.safetensors"), ids)
    np.testing.assert_allclose(model(ids[None].astype(np.int32))[0], want, atol=2e-4)


def test_it_trains_and_what_is_exported_is_what_is_sampled(run, folder, capsys):
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["eval_loss"] < losses[0]["eval_loss"]
    before, after = (load_file(f / "model.safetensors") for f in (folder, run / "export"))
    assert before.keys() == after.keys()
    changed = {key.split(".")[-2] for key in after if not torch.equal(before[key], after[key])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model = jaxft.load(str(run / "export"))
    prompt = model.tokenizer("water", add_special_tokens=False)["input_ids"]
    ids = list(prompt)
    while len(ids) < len(prompt) + 12 and ids[-1] != 1:
        ids.append(int(reference(after, ids)[-1].argmax()))
    made = [one for one in ids[len(prompt) :] if one != 1]
    want = model.tokenizer.decode(made, skip_special_tokens=True)
    assert len(made) > 4 and model.generate("water", max_new=12) == [want]
    assert sample.main(["--workdir", str(run), "--prompt=water", "--max_new=12"]) == 0
    assert f"water{want}" in capsys.readouterr().out


def test_it_is_exported_as_an_adapter_and_bit_for_bit_where_nothing_trained(
    run, folder, make_flags, tmp_path, quick
):
    arguments = ["--workdir", str(run), "--out", str(tmp_path / "adapter"), "--kind=adapter"]
    assert export.main(arguments) == 0
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(names) == 2 * 4 * CONFIG["num_hidden_layers"]
    flags = make_flags(folder, {"total": "0_steps", "lora.rank": 0, "data.eval": ""})
    work = ["--config", str(ROOT / "configs" / "llm.py"), "--workdir", str(tmp_path / "run")]
    assert train.main([*work, *flags]) == 0
    made = tmp_path / "run" / "export"
    for name in ("model.safetensors", "tokenizer.json"):
        assert (made / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((made / "config.json").read_text()).items() >= CONFIG.items()
