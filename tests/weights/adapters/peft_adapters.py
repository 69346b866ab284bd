"""Adapters that PEFT makes and saves, and the logits of both sides."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from jaxft.core.params import bind
from jaxft.verify import llm

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 12), np.int32)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def hf(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(model, targets, **settings):
    """PEFT's model with factors that are not zero."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, **settings}
    made = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **settings}))
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if "lora_" in name:
                tensor.normal_(0, 0.2)
    return made.eval()


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS).long()).logits.float().numpy()


def opened(place):
    subject = llm.open_subject(str(place))
    return subject, llm.load_subject(subject)


def logits(subject, params):
    call = jax.jit(lambda p: bind(subject.template, p)(jnp.asarray(TOKENS)), compiler_options=QUICK)
    return np.asarray(call(params))


def near(ours, theirs):
    return np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def rewritten(source, place, settings=(), tensors=None):
    """A copy of an adapter with other settings ("gone" removes one) and tensors."""
    place.mkdir(exist_ok=True)
    config = json.loads((source / SETTINGS).read_text()) | dict(settings)
    config = {key: value for key, value in config.items() if value != "gone"}
    (place / SETTINGS).write_text(json.dumps(config))
    save_file(load_file(source / WEIGHTS) if tensors is None else tensors, place / WEIGHTS)
    return place
