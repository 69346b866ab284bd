"""Every kind of adapter that PEFT saves: read, trained, merged and written again, against PEFT."""

import copy
import json

import jax
import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jaxft.core.params import bind
from jaxft.core.sharding import place_batch
from jaxft.core.step import sample_keys
from jaxft.runs.checkpoint import Checkpoints
from jaxft.tasks import Job
from jaxft.tasks.llm.exports import WRITERS
from tests import plain_torch
from tests import whole as runs

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TOKENS = np.random.default_rng(0).integers(3, 320, (2, 12), np.int32)
STEPS, ROWS, LR = 3, 8, 1e-3
LAYER = "model.layers.1.self_attn.q_proj"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "ranks of projections": {
        "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"],
        "rank_pattern": {"q_proj": 2, "lm_head": 3},
        "alpha_pattern": {"v_proj": 3, r"mlp\.down_proj": 16},
    },
    "ranks of layers": {
        "target_modules": ALL,
        "rank_pattern": {LAYER: 2, "up_proj": 8},
        "alpha_pattern": {LAYER: 4},
        "use_rslora": False,
    },
    "rsLoRA with ranks": {
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"o_proj": 9},
        "use_rslora": True,
    },
    "layers": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    "layers with ranks": {
        "target_modules": ALL,
        "layers_to_transform": [0],
        "rank_pattern": {"down_proj": 2},
    },
    "DoRA": {"target_modules": ALL, "use_dora": True},
    "DoRA with all others": {
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "use_dora": True,
        "use_rslora": True,
        "layers_to_transform": [1],
        "rank_pattern": {"o_proj": 2},
    },
    "scales of layers": {
        "target_modules": ALL,
        "rank_pattern": {LAYER: 2},
        "alpha_pattern": {r"layers\.0\.mlp\.up_proj": 3},
        "use_rslora": True,
    },
    "DoRA with scales of layers": {
        "target_modules": ALL,
        "use_dora": True,
        "rank_pattern": {LAYER: 2},
        "alpha_pattern": {r"layers\.0\.mlp\.up_proj": 3, "layers.0.self_attn.o_proj": 1},
    },
    "saved modules": {
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm", "model.norm"],
    },
    "saved modules of a tied table": {
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": [271, 261, 28]},
    "tokens of a tied table": {
        "target_modules": "all-linear",
        "trainable_token_indices": {"embed_tokens": [45, 70]},
        "use_dora": True,
    },
    "tokens of both tied names": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [45], "lm_head": [45]},
    },
}


class Case:
    """PEFT's adapter of some options on a small model, saved, and the run that continues it."""

    def __init__(self, base, options, work, make_config):
        self.base, self.work = base, work
        torch.manual_seed(0)
        made = get_peft_model(self.stock(), LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
        with torch.no_grad():
            for _, tensor in made.named_parameters():
                if tensor.requires_grad:
                    tensor.add_(0.1 * torch.randn(tensor.shape))
        made.save_pretrained(work / "in")
        keys = {
            "lora.rank": 8,
            "batch_size": ROWS,
            "pack": False,
            "mesh.fsdp": 1,
            "optim.lr": LR,
            "optim.schedule": "constant",
            "optim.warmup": "0_steps",
        }
        self.run = runs.open_run(make_config(work / "in", keys))
        self.batches = plain_torch.first_batches(self.run, STEPS, ROWS)

    def stock(self):
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def theirs(self, name="in"):
        return PeftModel.from_pretrained(
            self.stock(), self.work / name, is_trainable=True, low_cpu_mem_usage=False
        ).eval()

    def loss_of(self, model, batch):
        tokens, targets, weights, segments = (
            torch.from_numpy(batch[name]).long()
            for name in ("tokens", "targets", "weights", "segment_ids")
        )
        logits = model(tokens, attention_mask=segments).logits
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        return (nll * weights.flatten()).sum() / weights.sum()

    def write(self, kind, params, name):
        """The export of parameters: its tensors as a dict."""
        run, place = self.run, self.work / name
        place.mkdir(exist_ok=True)
        job = Job(run.opened, run.leaves, run.chosen, params, name, "source", place)
        WRITERS[kind].write(job)
        (file,) = place.glob("*.safetensors")
        return without_copies(load_file(file))


@pytest.fixture(scope="module")
def case(request, make_folder, make_config, tmp_path_factory):
    work = tmp_path_factory.mktemp("case")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda *_: 1)
        yield Case(
            make_folder(tied="tied" in request.param), OPTIONS[request.param], work, make_config
        )


def logits(run, params):
    call = jax.jit(lambda p: bind(run.opened.template, p)(TOKENS), compiler_options=QUICK)
    return np.asarray(call(params))


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()


def assert_near(ours, theirs, share=1e-5):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= share * np.abs(theirs).max()


HEAD, TABLE = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"


def without_copies(saved):
    """PEFT's tensors without base layers, which did not train, and the copy of a tied table."""
    found = {key: x for key, x in saved.items() if ".base_layer." not in key}
    if HEAD in found and np.array_equal(found[HEAD], found[TABLE]):
        del found[HEAD]
    return found


def assert_all_near(ours, theirs, share=1e-5):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert_near(ours[key], tensor, share)


def trained_tensors(model, of):
    """What PEFT would save of its trained parameters, or of their gradients."""
    named = model.named_parameters(remove_duplicate=False)
    state = {name: of(p).detach() for name, p in named if p.requires_grad}
    saved = get_peft_model_state_dict(model, state)
    return without_copies({key: tensor.numpy() for key, tensor in saved.items()})


@pytest.mark.parametrize("case", OPTIONS, indirect=True)
def test_an_adapter_of_peft_is_read_trained_merged_and_written(case):
    run, model = case.run, case.theirs()
    plan = runs.make_plan(run)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        base, wanted = torch_logits(case.stock()), torch_logits(model)
        assert np.abs(base - wanted).max() > 0.05 * np.abs(wanted).max(), "it does nothing"
        assert_near(logits(run, params), wanted)
        # Written at once it is bit for bit the file that was read.
        ours, saved = case.write("adapter", params, "out"), load_file(case.work / "in" / SAVED)
        saved = without_copies(saved)
        assert ours.keys() == saved.keys()
        assert all(np.array_equal(ours[key], x) for key, x in saved.items())
        assert_near(torch_logits(case.theirs("out")), wanted)
        # Merged it is what PEFT merges.
        merged = copy.deepcopy(model).merge_and_unload().state_dict()
        for key, tensor in case.write("merged", params, "merged").items():
            assert_near(tensor, merged[key].numpy())
        # The gradients of the first step.
        case.loss_of(model, case.batches[0]).backward()
        theirs = trained_tensors(model, lambda p: p.grad)
        assert all(np.abs(x).any() for x in theirs.values()), "each of them trains"
        grads = gradients(run, params, case.batches[0])
        assert_all_near(case.write("adapter", {**params, **grads}, "gradients"), theirs)
        model.zero_grad()
        # Three steps of AdamW.
        saver = Checkpoints(case.work / "run")
        state, frozen, _ = runs.start_state(run, plan, saver, 0)
        step = runs.make_step(run, plan)
        losses = []
        for batch in case.batches:
            state, sums = step(state, frozen, place_batch(batch, run.mesh))
            losses.append(float(sums["loss"]))
        after = {**frozen, **state.params}
        trained = [p for p in model.parameters() if p.requires_grad]
        expected = plain_torch.train(
            trained, (case.loss_of(model, b) for b in case.batches), lr=LR, decay=0.0
        )
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert_all_near(case.write("adapter", after, "after"), trained_tensors(model, lambda p: p))
        assert_near(torch_logits(case.theirs("after")), logits(run, after))


SAVED = "adapter_model.safetensors"


def gradients(run, params, batch):
    trained = {path: params[path] for path in run.chosen}

    def loss(trained, frozen, batch):
        keys = sample_keys(0, 0, batch["sample_ids"])
        model = bind(run.opened.template, {**frozen, **trained})
        (total, weight), _ = run.objective.loss(model, batch, keys, 0)
        return total / weight

    grads = jax.jit(jax.grad(loss), compiler_options=QUICK)
    return grads(trained, params, place_batch(batch, run.mesh))


@pytest.mark.parametrize("case", OPTIONS, indirect=True)
def test_its_settings_are_those_that_peft_saves(case):
    """Ranks, alphas and layers come back, whatever their spelling."""
    case.write("adapter", runs.load_params(case.run), "out")
    ours, theirs = (
        json.loads((case.work / name / "adapter_config.json").read_text()) for name in ("out", "in")
    )
    ours_saved, theirs_saved = (
        {name.rsplit(".", 1)[-1] for name in one["modules_to_save"] or ()} for one in (ours, theirs)
    )
    assert ours_saved == theirs_saved
    assert ours["ensure_weight_tying"] == theirs["ensure_weight_tying"]
    assert ours["layers_to_transform"] == theirs["layers_to_transform"]
    rows = theirs["trainable_token_indices"]
    theirs["trainable_token_indices"] = rows["embed_tokens"] if isinstance(rows, dict) else rows
    for key in ("r", "lora_alpha", "use_rslora", "use_dora", "trainable_token_indices"):
        assert ours[key] == theirs[key], key
