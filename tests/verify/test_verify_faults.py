"""Planted faults: each is one detail of a model that is wrong, and each fails its certificate.

The oracle is asked once. A weight that is off by a thousandth may hide below the rounding of all
outputs: the comparison of weights finds it, whatever it does to them.
"""

import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jaxft.models.decoders import decoder
from jaxft.models.decoders.families import llama
from jaxft.models.denoisers import unet as unets
from jaxft.verify import component, diffusion, llm
from jaxft.weights.rules import Rule
from tests.tiny_pipelines import make_pipeline

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
NEAR = {"near logits, max abs", "near KL, max over positions", "gradients, worst relative"}


class Asked:
    """A model under test with its oracle's answers."""

    def __init__(self, folder):
        self.folder = folder
        self.subject = llm.open_subject(str(folder))
        self.cases = llm.make_cases(self.subject, 4096)
        self.oracle = llm._ask_transformers(self.subject, self.cases)
        self.params = llm.load_subject(self.subject)

    def figures(self, subject=None, params=None, cases=("near",)):
        """Figure / bound of every judged check; infinite where a bound of 0 is not met."""
        chosen = {name: self.cases[name] for name in cases}
        subject, params = subject or self.subject, params or self.params
        return ratios(llm.compare(subject, params, chosen, self.oracle))


def ratios(checks):
    found = {one.name: one for one in checks if one.bound is not None}
    made = {
        name: one.figure / one.bound if one.bound else (np.inf if one.figure else 0.0)
        for name, one in found.items()
    }
    assert {name for name in made if made[name] <= 1} == {n for n in found if found[n].passed}
    return made


def failed(figures):
    print({name: f"{ratio:.3g}" for name, ratio in figures.items() if ratio > 1})
    return {name for name, ratio in figures.items() if ratio > 1}


@pytest.fixture(scope="module")
def asked(make_folder):
    """A model with biases and norms that matter, in bfloat16, so that its export would round."""
    folder = make_folder(attention_bias=True)
    model = LlamaForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, float("norm" in name), 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return Asked(folder)


def test_without_a_fault_all_passes(asked):
    assert not failed(asked.figures(cases=asked.cases))


@pytest.mark.parametrize(
    "path",
    [
        "embed_tokens.embedding",
        "layers.self_attn.q_proj.kernel",
        "layers.input_layernorm.scale",
        "layers.mlp.down_proj.kernel",
        "norm.scale",
        "lm_head.kernel",
    ],
)
def test_a_weight_that_is_a_thousandth_off_fails(asked, path):
    """All values of a tensor, and then one alone, which no output shows."""
    whole = asked.params[path] * 1.001
    figures = asked.figures(params={**asked.params, path: whole})
    assert {llm.WEIGHT_DIGESTS} | NEAR <= failed(figures)
    one = asked.params[path].at[(0,) * whole.ndim].multiply(1.001)
    keyed = llm.torch_keyed(asked.subject, {**asked.params, path: one})
    found = llm.same_weights(llm.WEIGHT_DIGESTS, keyed, asked.oracle.weights)
    assert found.figure == 1 and not found.passed


def changed(asked, tmp_path, key, value):
    """The same model, opened by a config.json with another value."""
    folder = shutil.copytree(asked.folder, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    assert config.get(key, config["rope_parameters"].get(key)) != value
    config |= {key: value}
    if key == "rope_theta":
        config["rope_parameters"] |= {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    return llm.open_subject(str(folder))


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 1e-5), ("rope_theta", 10100.0)])
def test_another_number_of_the_config_fails(asked, tmp_path, key, value):
    found = failed(asked.figures(changed(asked, tmp_path, key, value)))
    assert found >= NEAR and llm.WEIGHT_DIGESTS not in found


def test_rotated_pairs_of_the_other_layout_fail(asked, monkeypatch):
    def rotate(x, cos, sin):
        first, second = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[..., None, :], sin[..., None, :]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.reshape(x.shape)

    monkeypatch.setattr(decoder.rope, "rotate", rotate)
    assert failed(asked.figures()) >= NEAR


def test_one_swapped_pair_of_rotary_frequencies_fails(asked, monkeypatch):
    real = decoder.rope.cos_sin

    def swapped(*arguments):
        return tuple(part[..., jnp.array([1, 0, 2, 3])] for part in real(*arguments))

    monkeypatch.setattr(decoder.rope, "cos_sin", swapped)
    assert failed(asked.figures()) >= NEAR


def test_a_missing_bias_fails(asked):
    path = "layers.self_attn.v_proj.bias"
    without = {**asked.params, path: jnp.zeros_like(asked.params[path])}
    assert {llm.WEIGHT_DIGESTS} | NEAR <= failed(asked.figures(params=without))


def test_gate_and_up_the_other_way_round_fail(asked, monkeypatch):
    other = {"gate": "up", "up": "gate"}
    mlp = "model.layers.{i}.mlp.%s_proj.weight"
    rules = [rule for rule in llama.RULES if rule.key != mlp % "{p}"]
    for name in ("gate", "up", "down"):
        path = f"layers.mlp.{other.get(name, name)}_proj.kernel"
        rules.append(Rule(mlp % name, path, "f d -> d f"))
    monkeypatch.setattr(llama, "RULES", tuple(rules))
    subject = llm.open_subject(str(asked.folder))
    found = failed(asked.figures(subject, llm.load_subject(subject)))
    assert found >= NEAR
    assert llm.WEIGHT_DIGESTS not in found, "the table is consistent with itself, and wrong"


# ---- Stable Diffusion's networks ------------------------------------------------------------


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    work = tmp_path_factory.mktemp("faults")
    make_pipeline(work).save_pretrained(work / "pipeline")
    opened = diffusion.open_pipeline(str(work / "pipeline"))
    subject = next(one for one in opened.subjects if one.name == "unet")
    return subject, component.ask(subject), component.load(subject.part, subject.leaves)


def test_a_convolution_that_is_a_thousandth_off_fails(unet):
    subject, oracle, params = unet
    assert not failed(ratios(component.compare(subject, params, oracle)))
    path = next(p for p in params if re.search(r"down_blocks\.0.*conv1\.kernel", p))
    found = ratios(component.compare(subject, {**params, path: params[path] * 1.001}, oracle))
    assert {"unet weights, differing tensors", "unet output, max relative"} <= failed(found)


@pytest.mark.parametrize("fault", ["eps", "cos_first", "scale"])
def test_another_number_of_the_unet_fails(unet, monkeypatch, fault):
    """The eps of its norms, sine and cosine of the timestep, the scale of its attention."""
    subject, oracle, params = unet
    if fault == "scale":
        real = unets.attention

        def attention(q, k, v, causal):
            return real(q, k, v, causal=causal, scale=1.0 / q.shape[-1])

        monkeypatch.setattr(unets, "attention", attention)
    else:
        cfg = subject.template.cfg
        other = replace(cfg, **{fault: 1e-6 if fault == "eps" else not cfg.cos_first})
        template = jax.eval_shape(lambda: unets.UNet(other, key=jax.random.key(0)))
        subject = subject._replace(template=template)
    found = failed(ratios(component.compare(subject, params, oracle)))
    assert {"unet output, max relative", "unet gradients, worst relative"} <= found
