"""Heads of scores against transformers' sequence classifiers: loss, gradients, scores, files."""

import json

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    pipeline,
)

from jaxft.core.errors import UserError
from jaxft.data.loader import sample_order
from jaxft.export import export_folder
from jaxft.models.decoders.classifier import ADAPTER_CONFIG
from jaxft.tasks.llm.options import PROBLEMS, SINGLE_LABEL
from tests import whole as runs
from tests.conftest import LINES
from tests.parity.test_preference import loss_and_gradients

ROWS = 8
NAMES = ("calm", "loud", "wet")
LABELS = ",".join(NAMES)
TEXTS = [f"{i}: {LINES[i % 5][: 3 + 2 * i]}" for i in range(20)] + [
    "ends with padding<pad>",
    "ends with more<pad><pad>",
    "</s>",
    "one</s>",
]


def record(problem, i):
    text = TEXTS[i % len(TEXTS)]
    if problem == "reward":
        return {"prompt": f"{i}: ", "chosen": text, "rejected": f"{LINES[i % 5][:9]}{i}"}
    label = {
        "single_label_classification": NAMES[i % 3],
        "multi_label_classification": [NAMES[k] for k in range(3) if (i >> k) & 1],
        "regression": [i / 7, -i / 5, 0.5],
    }[problem]
    return {"text": text, ("label" if problem == SINGLE_LABEL else "labels"): label}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("labelled"), {}
    for problem in (*PROBLEMS, "reward"):
        found[problem] = folder / f"{problem}.jsonl"
        rows = [json.dumps(record(problem, i)) + "\n" for i in range(24)]
        found[problem].write_text("".join(rows))
    return found


@pytest.fixture(scope="module")
def folders(make_folder, tokenizer_folder, tmp_path_factory):
    """Models with a tied and an untied table, and one of another family."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return {"tied": make_folder(tied=True), "untied": make_folder(), "qwen3": folder}


@pytest.fixture
def opened(make_config, files, folders):
    """`opened(problem, …)`: a run on a labelled set, or on pairs for a reward model."""

    def run(problem, model="untied", labels=LABELS, adapter="", **changes):
        places = dict.fromkeys(("data.train", "data.eval"), f"jsonl:{files[problem]}")
        own = {"lora.rank": 0, "batch_size": ROWS, "eval_examples": 0, "mesh.fsdp": 1}
        config = make_config(folders.get(model, model), {**places, **own, **changes})
        config["objective"] = "reward" if problem == "reward" else "classify"
        if adapter:
            config["lora"] = {"from": str(adapter), "alpha": 0.0}
        if problem == "reward":
            config["preference"] = {"center": 0.1}
        else:
            config |= {"labels": labels, "problem_type": problem}
        return runs.open_run(config)

    return run


def exported(run, params, folder, kind="merged"):
    with jax.set_mesh(run.mesh):
        export_folder(run, params, folder, kind, "source")
    return folder


def padded(model, rows, side="right"):
    """transformers' scores of token ids, padded to one length."""
    pad, longest = model.config.pad_token_id, max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, place], mask[i, place] = torch.from_numpy(row.astype(np.int64)), 1
    return ids, mask


def order_of(run):
    """The indices of the examples of the first batch."""
    order = sample_order(len(run.train), run.cfg.seed)
    return [order[i] for i in range(ROWS)]


def same_gradients(model, grads):
    """Compare all but the row of padding, for which torch's embedding gives no gradient."""
    rows = grads["model.embed_tokens.weight"]
    rows[model.config.pad_token_id] = 0
    for key, p in model.named_parameters():
        error = np.linalg.norm(grads[key] - p.grad.numpy()) / np.linalg.norm(p.grad.numpy())
        assert error < 1e-5, f"{key}: gradient differs by {error:.1e}"


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_c1_c4_c6_loss_and_gradients_equal_transformers(
    opened,
    one_thread,
    tmp_path,
    problem,
    pack,
):
    run = opened(problem, pack=pack)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        batch, order = next(run.train.batches(0, slice(0, ROWS))), order_of(run)
        value, metrics, grads = loss_and_gradients(run, batch, params)
    assert (len(batch["tokens"]) < ROWS) == pack
    model = AutoModelForSequenceClassification.from_pretrained(
        exported(run, params, tmp_path / "e")
    )
    assert model.config.problem_type == problem and model.config.num_labels == 3
    some = [run.train.data[i] for i in order]
    ids, mask = padded(model, [one.example.tokens[:-1] for one in some])
    labels = torch.from_numpy(np.stack([one.label for one in some]))
    made = model(
        ids, attention_mask=mask, labels=labels.long() if problem == SINGLE_LABEL else labels
    )
    made.loss.backward()
    assert value == pytest.approx(made.loss.item(), rel=1e-5)
    same_gradients(model, grads)
    if problem == SINGLE_LABEL:
        right = (made.logits.argmax(-1) == labels).float().mean().item()
        assert metrics["accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("pack", [True, False])
def test_b12_rewards_and_gradients_equal_torch(
    opened,
    one_thread,
    tmp_path,
    pack,
):
    run = opened("reward", pack=pack)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        batch, order = next(run.train.batches(0, slice(0, ROWS))), order_of(run)
        value, metrics, grads = loss_and_gradients(run, batch, params)
        report = run.preview.evaluate(params, run.mesh)
    assert (len(batch["pairs"]) < ROWS) == pack
    model = AutoModelForSequenceClassification.from_pretrained(
        exported(run, params, tmp_path / "e")
    )
    assert model.config.num_labels == 1
    sides = [side.tokens[:-1] for i in order for side in run.train.data[i].sides]
    ids, mask = padded(model, sides)
    rewards = model(ids, attention_mask=mask).logits[:, 0].reshape(-1, 2)
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    loss = (-F.logsigmoid(chosen - rejected) + 0.1 * (chosen + rejected) ** 2).mean()
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    same_gradients(model, grads)
    margin = (chosen - rejected).mean().item()
    near = 1e-5 * rewards.abs().mean().item()
    assert metrics["rewards/margins"] == pytest.approx(margin, abs=near)
    assert metrics["rewards/accuracies"] == (chosen > rejected).float().mean().item()
    assert "logps/chosen" not in metrics and report.metrics["pairs"] == 24


@pytest.mark.parametrize("model", ["tied", "untied", "qwen3"])
def test_c2_c3_the_exports_pipeline_gives_the_same_labels_and_scores(
    opened, one_thread, tmp_path, model
):
    run = opened(SINGLE_LABEL, model)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        report = run.preview.evaluate(params, run.mesh)
    folder = exported(run, params, tmp_path / "export")
    found = [(one["predicted"], np.asarray(one["scores"])) for one in report.predictions]
    for side in ("right", "left"):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
        classify = pipeline("text-classification", str(folder), tokenizer=tokenizer, top_k=None)
        made = classify(TEXTS[:24], batch_size=8)
        for (name, scores), ranked in zip(found, made, strict=True):
            shares = np.exp(scores - scores.max())
            wanted = dict(zip(NAMES, shares / shares.sum(), strict=True))
            assert ranked[0]["label"] == name
            for one in ranked:
                assert one["score"] == pytest.approx(wanted[one["label"]], abs=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "calm", "1": "loud", "2": "wet"}
    with open(folder / "model.safetensors", "rb") as file:
        assert b"lm_head" not in file.read(20_000)


def test_a_tokenizer_without_padding_gets_its_end_of_text(opened, folders, tmp_path, one_thread):
    import shutil

    own = tmp_path / "model"
    shutil.copytree(folders["tied"], own)
    stated = json.loads((own / "tokenizer_config.json").read_text())
    stated.pop("pad_token")
    (own / "tokenizer_config.json").write_text(json.dumps(stated))
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    run = opened(SINGLE_LABEL, own)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        report = run.preview.evaluate(params, run.mesh)
    folder = exported(run, params, tmp_path / "export")
    classify = pipeline("text-classification", str(folder))
    made = classify(TEXTS[:24], batch_size=8)
    assert [one["label"] for one in made] == [one["predicted"] for one in report.predictions]
    assert classify.tokenizer.pad_token == "</s>" and classify.model.config.pad_token_id == 1


def test_a_classifier_that_transformers_saved_continues_with_its_own_head(
    opened, folders, tmp_path, one_thread
):
    torch.manual_seed(5)
    names = dict(enumerate(NAMES))
    model = AutoModelForSequenceClassification.from_pretrained(
        folders["untied"], id2label=names, label2id={v: k for k, v in names.items()}
    )
    own = tmp_path / "classifier"
    model.save_pretrained(own)
    AutoTokenizer.from_pretrained(folders["untied"]).save_pretrained(own)
    run = opened(SINGLE_LABEL, own, labels="")
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        report = run.preview.evaluate(params, run.mesh)
    assert run.opened.labels == NAMES
    np.testing.assert_array_equal(params["score.kernel"], model.score.weight.detach().numpy().T)
    ids, mask = padded(model, [run.held_out.data[i].example.tokens[:-1] for i in range(24)])
    scores = model(ids, attention_mask=mask).logits.detach().numpy()
    ours = np.asarray([one["scores"] for one in report.predictions])
    np.testing.assert_allclose(ours, scores, atol=1e-5 * np.abs(scores).max())
    folder = exported(run, params, tmp_path / "export")
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_c4_an_adapter_holds_its_head_and_goes_on(opened, folders, tmp_path, one_thread):
    from peft import PeftModel

    run = opened(SINGLE_LABEL, **{"lora.rank": 2, "lora.alpha": 4.0})
    assert {path.split(".")[0] for path in run.chosen} == {"layers", "score"}
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        for path in run.chosen:
            key = jax.random.fold_in(jax.random.key(3), len(path))
            params[path] = 0.1 * jax.random.normal(key, params[path].shape)
        report = run.preview.evaluate(params, run.mesh)
    folder = exported(run, params, tmp_path / "adapter", "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    base = AutoModelForSequenceClassification.from_pretrained(folders["untied"], num_labels=3)
    model = PeftModel.from_pretrained(base, folder).eval()
    ids, mask = padded(base, [run.held_out.data[i].example.tokens[:-1] for i in range(24)])
    scores = model(ids, attention_mask=mask).logits.detach().numpy()
    ours = np.asarray([one["scores"] for one in report.predictions])
    np.testing.assert_allclose(ours, scores, atol=1e-5 * np.abs(scores).max())
    own = AutoConfig.from_pretrained(folder / ADAPTER_CONFIG)
    assert tuple(own.id2label.values()) == NAMES and own.pad_token_id == model.config.pad_token_id
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, config=own).eval()
    assert torch.equal(theirs(ids, attention_mask=mask).logits.detach(), torch.tensor(scores))
    again = opened(SINGLE_LABEL, labels="", adapter=folder)
    assert again.opened.labels == NAMES
    with pytest.raises(UserError, match=r"labels='a,b,c', but .*calm,loud,wet.* leave labels out"):
        opened(SINGLE_LABEL, labels="a,b,c", adapter=folder)
    with jax.set_mesh(again.mesh):
        params_again = runs.load_params(again)
    assert again.chosen == run.chosen
    for path in run.chosen:
        np.testing.assert_array_equal(params_again[path], params[path], path)
    second = exported(again, params_again, tmp_path / "second", "adapter")
    files = [one / "adapter_model.safetensors" for one in (folder, second)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_that_peft_made_for_a_classifier_opens(opened, folders, tmp_path, one_thread):
    """PEFT says that it saves "classifier" and "score", and a Llama has only one of them."""
    from peft import LoraConfig, TaskType, get_peft_model

    base = AutoModelForSequenceClassification.from_pretrained(folders["untied"], num_labels=3)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    run = opened(SINGLE_LABEL, adapter=tmp_path / "adapter")
    with jax.set_mesh(run.mesh):
        report = run.preview.evaluate(runs.load_params(run), run.mesh)
    assert "score.kernel" in run.chosen
    ids, mask = padded(base, [run.held_out.data[i].example.tokens[:-1] for i in range(24)])
    scores = model(ids, attention_mask=mask).logits.detach().numpy()
    ours = np.asarray([one["scores"] for one in report.predictions])
    np.testing.assert_allclose(ours, scores, atol=1e-5 * np.abs(scores).max())
