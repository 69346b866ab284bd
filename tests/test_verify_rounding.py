"""The oracle's own rounding: a model in float32 beside itself in float64."""

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


def test_gradients_of_a_widened_model_are_measured_and_freed(model):
    x = torch.randn(8, 64)
    model(x).sum().backward()
    narrow = rounding.gradients_of(model)
    weights = {key: one.detach().clone() for key, one in model.named_parameters()}
    wide = rounding.widened(model)
    with rounding.distances(wide, narrow) as found:
        wide(x.double()).sum().backward()
    assert all(one.grad is None for one in wide.parameters())
    assert all(torch.equal(one.float(), weights[key]) for key, one in wide.named_parameters())
    again = model(x.double()).sum()
    again.backward()  # no hook is left behind
    for key, one in wide.named_parameters():
        apart = np.linalg.norm(one.grad.numpy() - narrow[key])
        assert found[key] == pytest.approx(apart) and found[key] < 1e-4
    assert max(found.values()) > 0


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
