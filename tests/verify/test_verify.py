"""The parity certificate: what it passes, and that it fails when one side is not the other."""

import json
import sys

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from jaxft import verify
from jaxft.export import export_folder
from jaxft.models.decoders import decoder
from jaxft.models.decoders.families import llama
from jaxft.nn import rope
from jaxft.verify import llm, report
from jaxft.weights import transfer
from jaxft.weights.rules import Rule
from tests import whole as runs


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder(tied=True, dtype="bfloat16")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "parity.json"


def certificate(spec, out):
    """(exit code, figures by name, the whole file)."""
    code = verify.main([str(spec), f"--out={out}"])
    content = json.loads(out.read_text())
    return code, {check["name"]: check for check in content["checks"]}, content


def failures(checks):
    return {name for name, check in checks.items() if not check["passed"]}


def test_t31_a_sound_folder_passes(folder, out, capsys):
    code, checks, content = certificate(folder, out)
    assert code == 0 and content["passed"] and not failures(checks)
    assert content["cases"]["near"] == {"shape": [1, 64], "positions": [0, 63]}
    assert content["cases"]["far"] == {"shape": [1, 64], "positions": [192, 255]}
    assert content["cases"]["long"] == {"shape": [1, 256], "positions": [0, 255]}
    assert checks["round trip, differing tensors"]["note"] == "of 20"
    assert checks["gradients, worst relative"]["figure"] > 0
    assert len(content["weights_sha256"]) == 64 and content["oracles"]["torch"]
    assert "PASSED" in capsys.readouterr().out


def test_t06_both_sides_multiply_at_the_highest_precision(folder, out, monkeypatch):
    seen, compare = [], llm._gradients

    def watched(*arguments):
        seen.append(jax.config.jax_default_matmul_precision)
        return compare(*arguments)

    monkeypatch.setattr(llm, "_gradients", watched)
    with jax.default_matmul_precision("bfloat16"):  # as TF32 would be on a GPU
        certificate(folder, out)
    assert seen == ["highest"]


def test_t31_an_export_passes_with_its_weights(folder, make_config, tmp_path, out):
    run = runs.open_run(make_config(folder, {"lora.rank": 0}))
    with jax.set_mesh(run.mesh):
        export_folder(run, runs.load_params(run), tmp_path / "export", "merged", "source")
    code, checks, content = certificate(tmp_path / "export", out)
    assert code == 0 and not failures(checks)
    _, digest = round_trip(*loaded(folder))
    assert content["weights_sha256"] == digest


def loaded(folder):
    subject = llm.open_subject(str(folder))
    return subject, llm.load_subject(subject)


def round_trip(subject, params):
    return report.round_trip(llm.TRIP, subject.part, subject.leaves, params)


@pytest.fixture(scope="module")
def adapter(make_folder, tmp_path_factory):
    folder = make_folder(max_position_embeddings=64)
    return save_adapter(folder, tmp_path_factory.mktemp("adapter"), {})


def save_adapter(base, folder, more):
    """A PEFT folder with B not zero, on some of the projections, as PEFT itself saves it."""
    torch.manual_seed(1)
    targets = ["q_proj", "o_proj", "down_proj"]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **more)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def test_t21_an_adapter_folder_passes_beside_peft(adapter, out):
    code, checks, content = certificate(adapter, out)
    assert code == 0 and not failures(checks)
    assert "lora_" in checks["gradients, worst relative"]["note"]
    assert content["oracles"].keys() == {"torch", "peft"}


def test_dora_ranks_layers_and_rows_pass_beside_peft(make_folder, tmp_path, out):
    """Every weight, logit and gradient of them is compared."""
    more = {"use_dora": True, "rank_pattern": {"o_proj": 2}, "layers_to_transform": [1]}
    base = make_folder(tied=True, max_position_embeddings=64)
    folder = save_adapter(base, tmp_path, {**more, "trainable_token_indices": [5, 70]})
    code, checks, _ = certificate(folder, out)
    assert code == 0 and not failures(checks)


def test_an_adapter_of_another_scale_fails(adapter, out, monkeypatch):
    monkeypatch.setattr(llm.lora.ranks, "scale", lambda cfg: cfg.alpha)  # not alpha / rank
    subject = llm.open_subject(str(adapter))
    assert subject.template.layers.self_attn.q_proj.adapter.scale == 8.0
    code, checks, _ = certificate(adapter, out)
    assert code == 1
    assert {"near logits, max abs", "loss, abs", "gradients, worst relative"} <= failures(checks)


def test_t03_another_rope_on_one_side_fails_far_out(folder, out, monkeypatch, capsys):
    """A wrong angle that only far positions show: what a check at position 0 would pass."""
    real = rope.cos_sin

    def drifting(positions, *args):
        return real(positions + (positions >= 128), *args)

    monkeypatch.setattr(decoder.rope, "cos_sin", drifting)
    code, checks, content = certificate(folder, out)
    assert code == 1 and not content["passed"]
    failed = failures(checks)
    assert {"long logits, max abs", "long KL, max over positions"} <= failed
    assert not any(name.startswith(("near", "gradients", "round")) for name in failed)
    assert "FAIL" in capsys.readouterr().out


def test_swapped_q_layout_fails_though_the_round_trip_is_exact(folder, out, monkeypatch):
    """Meta's head layout read as Hugging Face's: the table is consistent with itself, but wrong."""
    swapped = tuple(
        Rule(rule.key, rule.path, "(h n) d -> d n h") if "q_proj.weight" in rule.key else rule
        for rule in llama.RULES
    )
    monkeypatch.setattr(llama, "RULES", swapped)
    code, checks, _ = certificate(folder, out)
    assert code == 1
    assert checks["round trip, differing tensors"]["passed"]
    failed = failures(checks)
    assert {"near logits, max abs", "near KL, max over positions", "loss, abs"} <= failed
    assert "gradients, worst relative" in failed


def test_t31_a_round_trip_that_loses_one_bit_fails(folder, monkeypatch):
    subject, params = loaded(folder)
    real = transfer.to_host

    def flipped(array):
        host = real(array).copy()
        if host.shape == (32,):
            host.reshape(-1)[0] *= 1.01
        return host

    monkeypatch.setattr(transfer, "to_host", flipped)
    check, _ = round_trip(subject, params)
    assert not check.passed and check.figure == 5 and "norm.weight" in check.note


def test_missing_and_unexpected_keys_fail():
    found = {"missing_keys": {"a", "b"}, "unexpected_keys": set()}
    missing, unexpected = report.loading("transformers", found)
    assert not missing.passed and missing.note == "a, b" and unexpected.passed


def test_compare_logits_sums_kl_over_the_vocabulary_and_takes_the_worst_position():
    theirs = np.log(np.array([[[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]]))
    ours = np.log(np.array([[[0.5, 0.25, 0.25], [0.4, 0.3, 0.3]]]))
    found = report.compare_logits("x", ours + 3.0, theirs, [theirs])
    by_name = {check.name: check.figure for check in found}
    want = 0.2 * np.log(0.2 / 0.4) + 0.5 * np.log(0.5 / 0.3)
    assert by_name["x KL, max over positions"] == pytest.approx(want)
    assert by_name["x top-1 disagreements"] == 1
    assert by_name["x logits, max abs"] == pytest.approx(3 + np.log(2))


def test_a_tie_is_no_disagreement_and_nan_fails_everything():
    theirs = np.array([[[1.0, 1.0 + 1e-7, 0.0]]])
    tie = report.compare_logits("x", np.array([[[1.0 + 1e-7, 1.0, 0.0]]]), theirs, [theirs])
    assert all(check.passed for check in tie)
    nan = report.compare_logits("x", np.full((1, 1, 3), np.nan), theirs, [theirs])
    assert not any(check.passed for check in nan if check.bound is not None)
    assert nan[0].record()["figure"] is None


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "name a model folder"),
        (["--out=x"], "name a model folder"),
        (["nowhere/at-all/here"], "no such file or folder"),
        (["FOLDER", "--long=far"], "--long='far'"),
        (["FOLDER", "--ou=x"], "did you mean 'out'?"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(folder, argv, words, capsys):
    assert verify.main([str(folder) if word == "FOLDER" else word for word in argv]) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1


def test_without_torch_it_says_how_to_get_it(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert verify.main([str(folder)]) == 2
    assert "pip install 'jaxft[verify]'" in capsys.readouterr().err
