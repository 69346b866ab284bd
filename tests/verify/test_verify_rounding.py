"""The oracle's own rounding: a model in float32 beside itself in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from jaxft.verify import rounding


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))


def run(model, x):
    made = model(x.to(next(model.parameters()).dtype))
    made.sum().backward()
    return made.detach().numpy()


def test_variants_round_otherwise_and_measure_gradients_that_they_free(model):
    x = torch.randn(8, 64)
    first, gradients = run(model, x), rounding.gradients_of(model)
    weights = {key: one.detach().clone() for key, one in model.named_parameters()}
    outputs, each, found = [], [], {}
    for _ in rounding.variants(model, gradients, found):
        outputs.append(run(model, x))
        each.append(dict(found))
        assert all(one.grad is None for one in model.parameters())
    assert len(outputs) == rounding.DRAWS + 1
    assert [out.dtype for out in outputs] == [np.float32] * rounding.DRAWS + [np.float64]
    assert all(torch.equal(one.float(), weights[key]) for key, one in model.named_parameters())
    apart = [rounding.apart(out, first) for out in outputs]
    assert all(0 < one < 1e-5 for one in apart), "each rounds otherwise"
    assert rounding.farthest(first, outputs) == max(apart)
    assert len({out.tobytes() for out in outputs}) == len(outputs)
    assert found.keys() == gradients.keys() and max(found.values()) < 1e-4
    for before, after in pairwise(each):
        assert all(before[key] <= after[key] for key in before), "the largest of all turns"
    run(model, x)  # no hook is left behind
    assert all(one.grad is not None for one in model.parameters())


def test_a_large_model_stays_in_float32(model, monkeypatch):
    monkeypatch.setattr(rounding, "LARGE", 100)
    turns = [run(model, torch.randn(8, 64)) for _ in rounding.variants(model, {}, {})]
    assert len(turns) == rounding.DRAWS and turns[0].dtype == np.float32


def test_a_digest_shows_a_thousandth_of_one_value(model):
    before = rounding.digests(model)
    assert before.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    with torch.no_grad():
        model[0].weight[3, 5] *= 1.001
    after = rounding.digests(model)
    assert {key for key in before if before[key] != after[key]} == {"0.weight"}


def test_a_digest_is_of_values_not_of_their_type():
    values = np.array([[1.0, 0.5]], np.float16)
    assert rounding.digest(values) == rounding.digest(values.astype(np.float32))
    assert rounding.digest(values) != rounding.digest(values.T)


def test_an_adapted_model_has_the_names_of_its_files(make_folder):
    model = LlamaForCausalLM.from_pretrained(make_folder())
    plain = {key for key, _ in model.named_parameters()}
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    names = rounding.names_of(get_peft_model(model, settings)).keys()
    adapters = {key for key in names if ".lora_" in key}
    assert names - adapters == plain and len(adapters) == 4
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in adapters)
    assert all(key.startswith("base_model.model.") for key in adapters)


def test_divergence_sums_over_the_vocabulary():
    theirs, ours = np.log([[[0.5, 0.5]]]), np.log([[[0.25, 0.75]]])
    want = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert rounding.divergence(theirs, ours + 5) == pytest.approx(want)
    assert np.isnan(rounding.divergence(theirs, np.full((1, 1, 2), np.nan)))
