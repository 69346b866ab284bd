"""PEFT folders both ways, with PEFT 0.21 on transformers' Llama as the oracle."""

import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from jaxft.core import sharding
from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import Leaf, bind, describe
from jaxft.models import registry
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.families import llama
from jaxft.nn import lora
from jaxft.weights import transfer
from jaxft.weights.adapters import peft as adapters
from jaxft.weights.adapters import peft_folder, ranks
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.folders.transformers import open_source
from jaxft.weights.rules import Entry
from jaxft.weights.transfer import Part

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 12), np.int32)
ATTENTION = r".*self_attn\.[qkvo]_proj"


class Adapted:
    """A folder's model with the adapters of `cfg`, their B not zero."""

    def __init__(self, folder, cfg):
        source = open_source(str(folder))
        self.cfg, model_cfg = cfg, registry.read_decoder(source.config)

        def build():
            model = Decoder(model_cfg, key=jax.random.key(0))
            lora.add(model, cfg, jax.random.key(1))
            return model

        self.template = jax.eval_shape(build)
        self.leaves = describe(self.template)
        names = llama.RULES, llama.sizes(model_cfg), llama.ignore(model_cfg)
        self.part = Part("", source.name, source.tensors, *names)
        where = sharding.shardings(self.leaves, sharding.make_mesh(1, -1, 1))
        wanted = set(self.leaves)
        self.base = transfer.load(self.part, self.leaves, where, jnp.float32, wanted)
        rng = np.random.default_rng(0)
        self.arrays = {
            path: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
            for path, leaf in self.leaves.items()
            if ".lora_" in path
        }

    def logits(self, arrays=None):
        def call(params):
            return bind(self.template, params)(TOKENS)

        params = {**self.base, **(arrays or self.arrays)}
        return np.asarray(jax.jit(call, compiler_options=QUICK)(params))

    def write(self, out, base="base"):
        out.mkdir(exist_ok=True)
        adapters.write(out, self.part, self.leaves, self.arrays, self.cfg, base)
        return out


def read(adapter, folder):
    """A PEFT folder, its tensors named by the modules of its base."""
    plain = Adapted(folder, Lora())
    return peft_folder.fit(peft_folder.read(adapter), plain.part.entries(plain.leaves))


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()


def hf(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same_logits(ours, theirs, base):
    assert np.abs(theirs - base).max() > 0.1 * np.abs(theirs).max(), "the adapter does nothing"
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder()


@pytest.fixture(scope="module")
def base_logits(folder):
    return torch_logits(hf(folder))


@pytest.fixture(scope="module")
def attention(folder):
    return Adapted(folder, Lora(rank=4, alpha=8.0, targets=ATTENTION, dropout=0.1))


@pytest.fixture(scope="module")
def written(attention, tmp_path_factory, folder):
    return attention.write(tmp_path_factory.mktemp("adapter"), str(folder))


def test_t21_peft_reads_ours(folder, attention, written, base_logits):
    theirs = torch_logits(PeftModel.from_pretrained(hf(folder), str(written)))
    assert_same_logits(attention.logits(), theirs, base_logits)


def test_t21_peft_reads_ours_with_rslora_on_every_projection(folder, tmp_path, base_logits):
    ours = Adapted(folder, Lora(rank=4, alpha=2.0, targets=".*", rslora=True))
    model = PeftModel.from_pretrained(hf(folder), str(ours.write(tmp_path)))
    assert_same_logits(ours.logits(), torch_logits(model), base_logits)
    assert len(ours.arrays) == 2 * 8


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_is_what_it_is_in_peft(make_folder, tied):
    folder = make_folder(tied=tied)
    ours = Adapted(folder, Lora(rank=2, alpha=2.0, targets="all-linear"))
    theirs = get_peft_model(hf(folder), LoraConfig(r=2, target_modules="all-linear"))
    modules = {
        name for name, one in theirs.base_model.model.named_modules() if hasattr(one, "lora_A")
    }
    assert {slot.module for slot in adapters.slots(ours.part, ours.leaves)} == modules


def test_our_config_is_what_peft_writes(written, attention, folder, tmp_path):
    ours = json.loads((written / "adapter_config.json").read_text())
    assert ours["base_model_name_or_path"] == str(folder)
    assert (ours["r"], ours["lora_alpha"], ours["lora_dropout"]) == (4, 8.0, 0.1)
    assert ours["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    PeftModel.from_pretrained(hf(folder), str(written)).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {k: sorted(v) if isinstance(v, list) else v for k, v in ours.items()} == {
        k: sorted(theirs[k]) if isinstance(theirs[k], list) else theirs[k] for k in ours
    }
    tensors, saved = (
        TensorFiles.open(where / "adapter_model.safetensors") for where in (written, tmp_path)
    )
    assert sorted(tensors.keys()) == sorted(saved.keys())
    for key in list(saved.keys()):
        np.testing.assert_array_equal(tensors.read(key), saved.read(key))


@pytest.mark.parametrize(
    ("modules", "targets", "rslora"),
    [
        (["q_proj", "v_proj"], r".*self_attn\.[qv]_proj", False),
        (["o_proj", "gate_proj", "up_proj", "down_proj"], r".*(o_proj|mlp\..*)", True),
    ],
)
def test_t21_we_read_pefts(folder, tmp_path, base_logits, modules, targets, rslora):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=modules, use_rslora=rslora, init_lora_weights=False
    )
    theirs = get_peft_model(hf(folder), config)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_" in name:
                tensor.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path)
    adapter = read(tmp_path, folder)
    assert adapter.base == str(folder)
    ours = Adapted(folder, adapter.lora)
    assert lora.adapted(ours.leaves) == lora.adapted(Adapted(folder, Lora(4, 1.0, targets)).leaves)
    assert adapter.lora == Lora(4, 12.0, adapter.lora.targets, rslora, 0.0)
    arrays = adapters.load(adapter, ours.part, ours.leaves)
    assert arrays.keys() == ours.arrays.keys()
    assert_same_logits(ours.logits(arrays), torch_logits(theirs), base_logits)


def test_what_we_write_we_read_bit_for_bit(attention, written, folder):
    adapter = read(written, folder)
    assert replace(adapter.lora, targets=ATTENTION) == attention.cfg
    arrays = adapters.load(adapter, attention.part, attention.leaves)
    assert arrays.keys() == attention.arrays.keys()
    for path, array in attention.arrays.items():
        assert arrays[path].tobytes() == array.tobytes()


def test_a_merged_export_acts_as_the_adapter(folder, attention, base_logits):
    factor = ranks.scale(attention.cfg)

    def merged(path, i, kernel):
        a, b = (attention.arrays[f"{path}.lora_{side}"][i] for side in "ab")
        return lora.merged(kernel, a, b, None, factor)

    changes = {f"{path}.kernel": partial(merged, path) for path in lora.adapted(attention.leaves)}
    made = transfer.export(attention.part, attention.leaves, {}, changes, None)
    model = hf(folder)
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in made.tensors})
    assert_same_logits(attention.logits(), torch_logits(model), base_logits)


@pytest.mark.parametrize("shape", [(1, 32), (4, 1), (4, 30)])
def test_a_factor_of_another_shape_is_named_not_broadcast(
    written, tmp_path, attention, folder, shape
):
    shutil.copy(written / "adapter_config.json", tmp_path)
    old = TensorFiles.open(written / "adapter_model.safetensors")
    tensors = {key: old.read(key) for key in list(old.keys())}
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[key] = np.ones(shape, np.float32)
    infos = {k: (array.shape, array.dtype) for k, array in tensors.items()}
    write_sharded(tmp_path, tensors.items(), infos, stem="adapter_model")
    adapter = read(tmp_path, folder)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.lora_A.*rank 4"):
        adapters.load(adapter, attention.part, attention.leaves)


def test_names_are_full_where_a_short_one_would_hit_others(folder):
    """PEFT matches suffixes: a module without an adapter must not end as an adapted one does."""
    down = Adapted(folder, Lora(rank=2, alpha=2.0, targets=r".*down_proj"))
    modules = {slot.module for slot in adapters.slots(down.part, down.leaves)}
    assert adapters._targets(down.part, down.leaves, modules) == ["down_proj"]
    rules = tuple(r._replace(key=r.key.replace("q_proj", "down_proj")) for r in llama.RULES)
    names = [entry.replace("q_proj", "down_proj") for entry in list(down.part.tensors.keys())]
    old = down.part.tensors

    class Renamed:
        def keys(self):
            return names

        def info(self, key):
            return old.info(key.replace("self_attn.down_proj", "self_attn.q_proj"))

    part = down.part._replace(rules=rules, tensors=Renamed())
    modules = {slot.module for slot in adapters.slots(part, down.leaves)}
    assert adapters._targets(part, down.leaves, modules) == [
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    ]


@pytest.mark.parametrize(
    ("layout", "inputs", "layouts"),
    [
        ("(n h) d -> d n h", 1, ("r d -> d r", "(n h) r -> r n h", "(n h) -> n h")),
        ("d (n h) -> n h d", 2, ("r (n h) -> n h r", "d r -> r d", "d -> d")),
        ("o i y x -> y x i o", 3, ("r i y x -> y x i r", "o r 1 1 -> r o", "o -> o")),
        ("o i 1 1 -> i o", 1, ("r i 1 1 -> i r", "o r 1 1 -> r o", "o -> o")),
    ],
)
def test_a_kernels_layout_gives_those_of_both_factors(layout, inputs, layouts):
    """Of torch's convolutions, 1x1 ones too, B is a 1x1 convolution."""
    entry = Entry("p.kernel", ("p.weight",), layout, False)
    assert adapters._layouts(entry, Leaf((), np.float32, (), inputs)) == layouts
