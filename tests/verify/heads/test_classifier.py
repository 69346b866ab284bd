"""The certificate of sequence classifiers: what it passes, and that planted faults fail it."""

import json

import jax
import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from jaxft import verify
from jaxft.export import export_folder
from jaxft.verify import llm
from jaxft.verify.heads import classifier
from tests import whole as runs


@pytest.fixture(scope="module")
def folders(make_folder, tokenizer_folder, tmp_path_factory):
    """A Llama with three labels, and a Qwen 3 with one number, as a reward model has."""
    llama, qwen = (tmp_path_factory.mktemp(name) for name in ("llama", "qwen"))
    torch.manual_seed(2)
    base = make_folder(tied=True)
    LlamaForSequenceClassification.from_pretrained(
        base, num_labels=3, pad_token_id=0
    ).save_pretrained(llama)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    config = Qwen3Config(
        **sizes, **heads, num_labels=1, pad_token_id=0, max_position_embeddings=256
    )
    Qwen3ForSequenceClassification(config).save_pretrained(qwen)
    for folder in (llama, qwen):
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return {"llama": llama, "qwen": qwen}


def certificate(spec, out):
    code = verify.main([str(spec), f"--out={out}"])
    content = json.loads(out.read_text())
    return code, {check["name"]: check for check in content["checks"]}, content


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_sound_classifier_passes(folders, family, tmp_path, capsys):
    code, checks, content = certificate(folders[family], tmp_path / "parity.json")
    shown = capsys.readouterr().out
    assert code == 0 and content["passed"] and "PASSED" in shown, shown
    assert {"near logits, max abs", "far logits, max abs", "long logits, max abs"} <= checks.keys()
    count = {"llama": 21, "qwen": 25}[family]
    assert checks["round trip, differing tensors"]["note"] == f"of {count}"
    assert checks["gradients, worst relative"]["figure"] > 0 and checks["loss, abs"]["rounding"] > 0


def test_an_export_passes(folders, make_folder, make_config, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"{i} a", "label": "calm"}) + "\n" for i in range(8))
    )
    config = make_config(make_folder(), {"lora.rank": 0, "data.train": str(file), "data.eval": ""})
    config |= {"objective": "classify", "labels": "calm,loud"}
    run = runs.open_run(config)
    with jax.set_mesh(run.mesh):
        export_folder(run, runs.load_params(run), tmp_path / "export", "merged", "source")
    code, checks, _ = certificate(tmp_path / "export", tmp_path / "parity.json")
    assert code == 0, {name for name, check in checks.items() if not check["passed"]}


@pytest.mark.parametrize("path", ["score.kernel", "norm.scale", "layers.mlp.down_proj.kernel"])
def test_a_planted_fault_fails(folders, monkeypatch, path):
    load = llm.load_subject

    def spoilt(subject):
        params = load(subject)
        return {**params, path: params[path] * (1 + 1e-4)}

    monkeypatch.setattr(llm, "load_subject", spoilt)
    _, checks = classifier.certify(str(folders["llama"]))
    failed = {check.name for check in checks if not check.passed}
    assert {"near logits, max abs", "weights, differing tensors"} <= failed, failed
