"""Every command line that README.md, docs/ and the docstrings of configs/ print, run as printed.

The commands of a page run in its order in one folder, where the names that they use exist: see
PLACES. Keys that make a run short are appended; nothing else of a line changes but the WORDS of
tests/printed.py. The small run of a recipe is in test_recipes.py.
"""

import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image

from jaxft import train
from jaxft.core import runtime
from jaxft.core.config import load_config, read_config
from jaxft.demo import demo_path
from jaxft.tasks import OPTIONS
from tests.printed import COMMAND, PAGES, ROOT, Line, printed, text_of
from tests.tiny_autoencoders import make_vae, make_vqmodel
from tests.tiny_diffusion import flags_of, make_pictures
from tests.tiny_flux import make_flux
from tests.tiny_janus import make_janus_model
from tests.tiny_klein import make_klein
from tests.tiny_pipelines import make_pipeline
from tests.tiny_sd3 import make_sd3
from tests.tiny_zimage import make_zimage

COUNT = 117  # of all pages; a new line is run without being listed here, but counted
TINY = {"every.save": "1_steps", "total": "2_steps", "batch_size": 8, "eval_examples": 8}
DRAWN = {**TINY, "eval_generated": 0}
SHORT = {
    "llm": {**TINY, "seq_len": 48, "every.save": "2_steps"},
    "preference": {**TINY, "seq_len": 48},
    "classify": {**TINY, "seq_len": 48},
    "autoencoder": TINY,
    "diffusion": {**DRAWN, "sample.steps": 2},
    "image_tokens": {**DRAWN, "sample.prompts": "['a red apple']"},
    "janus": {**DRAWN, "resolution": 12, "sample.prompts": "['a red apple']"},
}
# Where a line asks for pixels of real pictures, the tiny models have fewer.
PIXELS = {"autoencoder": 32, "diffusion": 16, "image_tokens": 16}
LINES = [line for page in PAGES for line in printed(text_of(page), page.name)]
TRAINED = [one for one in LINES if one.module == "jaxft.train" and "--help" not in one.words]


def option(line: Line, name: str) -> str:
    return runtime.parse_arguments(line.arguments, ("config", "workdir")).options.get(name, "")


def test_the_count_of_printed_commands():
    assert len(LINES) == COUNT, "say here how many there are: each runs below"
    mentions = sum(len(re.findall(COMMAND, text_of(page))) for page in PAGES)
    assert mentions == COUNT, "a command outside of code blocks and backticks is not found"


def test_every_shipped_config_is_among_them():
    shipped = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert shipped == {option(line, "config") for line in TRAINED if option(line, "config")}


@pytest.mark.parametrize(
    "line",
    [one for one in TRAINED if option(one, "config")],
    ids=lambda line: f"{line.page}-{line.arguments[-1]}",
)
def test_a_printed_config_is_read_as_it_stands(line):
    overrides = runtime.parse_arguments(line.arguments, ("config", "workdir")).overrides
    config = load_config(str(ROOT / option(line, "config")), overrides, OPTIONS)
    read_config(config, OPTIONS[config["task"]])


# ---- the folder of a page -------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Run folders by the keys that they were trained with."""
    return {}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, make_folder):
    """Tiny models and data under the names that pages give them."""
    place = tmp_path_factory.mktemp("shelf")
    pipe = make_pipeline(place / "tokens")
    pipe.save_pretrained(place / "pipeline")
    save_lora(pipe, place / "lora")
    for name, channels in (("inpaint", 9), ("edit", 8)):
        pipe = make_pipeline(place / "tokens", in_channels=channels)
        pipe.save_pretrained(place / name)
    make_sd3(place / "tokens", t5=False).save_pretrained(place / "sd3")
    make_flux(place / "tokens").save_pretrained(place / "flux")
    make_zimage().save_pretrained(place / "z-image")
    make_klein().save_pretrained(place / "klein")
    make_vae(place / "vae")
    make_vqmodel(place / "vq")
    make_janus_model(place / "janus")
    (place / "pickles").mkdir()
    torch.save({"weight": torch.ones(2)}, place / "pickles" / "pytorch_model.bin")
    (place / "text").symlink_to(make_folder(tied=True, hidden_size=64, intermediate_size=128))
    make_pictures(place / "images", sizes=((32, 32),))
    add_sources(place / "images")
    texts = [{"prompt": f"{i}: a bird", "completion": " that sings"} for i in range(16)]
    (place / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    rows = "".join(f"{i}: a bird, that sings\n" for i in range(16))
    (place / "rows.csv").write_text(f"question,answer\n{rows}")
    sides = [{**row, "chosen": " that sings", "rejected": " that barks"} for row in texts]
    (place / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sides))
    labelled = [{**row, "label": i % 2 == 0} for i, row in enumerate(texts)]
    (place / "labelled.jsonl").write_text("".join(json.dumps(one) + "\n" for one in labelled))
    stars = [{"text": row["prompt"], "label": i / 4} for i, row in enumerate(texts)]
    (place / "stars.jsonl").write_text("".join(json.dumps(one) + "\n" for one in stars))
    rows = "".join(f"{i}: a bird,{('negative', 'positive')[i % 2]}\n" for i in range(16))
    (place / "reviews.csv").write_text(f"text,label\n{rows}")
    for name, pixels in (("wood", 90), ("white", 255)):
        Image.fromarray(np.full((16, 16, 3), pixels, np.uint8)).save(place / f"{name}.png")
    return place


def save_lora(pipe, folder):
    """A LoRA file as diffusers' scripts write it."""
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"])
    inject_adapter_in_model(lora, pipe.unet, "default")
    layers = get_peft_model_state_dict(pipe.unet, adapter_name="default")
    pipe.save_lora_weights(folder, unet_lora_layers=layers)


def add_sources(folder):
    """A picture before the edit for each row: for InstructPix2Pix."""
    file = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [json.dumps({**row, "source": row["file_name"]}) + "\n" for row in rows]
    file.write_text("".join(lines))


# What a name of a page is on the shelf; PATH is what the config of the line trains.
PLACES = {
    "path/to/folder": "text",
    "path/to/stable-diffusion": "pipeline",
    "path/to/stable-diffusion-3": "sd3",
    "tiny-sd3": "sd3",
    "path/to/flux": "flux",
    "path/to/z-image": "z-image",
    "path/to/klein": "klein",
    "path/to/pickles": "pickles",
    "VQ_FOLDER": "vq",
    "FOLDER": "janus",
    "JANUS_FOLDER": "janus",
    "train.jsonl": "texts.jsonl",
    "valid.jsonl": "texts.jsonl",
    "test.jsonl": "texts.jsonl",
    "rows.csv": "rows.csv",
    "rows.jsonl": "texts.jsonl",
    "pairs.jsonl": "pairs.jsonl",
    "held.jsonl": "pairs.jsonl",
    "labelled.jsonl": "labelled.jsonl",
    "stars.jsonl": "stars.jsonl",
    "new.jsonl": "stars.jsonl",
    "reviews.csv": "reviews.csv",
    "images": "images",
    "held": "images",
    "class": "images",
    "held-out": "images",
    "lora.safetensors": "lora/pytorch_lora_weights.safetensors",
    "wood.png": "wood.png",
    "white.png": "white.png",
}
PATHS = {"llm": "text", "diffusion": "pipeline", "autoencoder": "vae", "image_tokens": "text"}


def lay_out(place: Path, shelf: Path, page: str) -> None:
    """Put the names of PLACES into a page's folder."""
    names = {**PLACES, "PATH": PATHS.get(page.removesuffix(".py"), "text")}
    for name, there in names.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to((shelf / there).resolve())
    (place / "MODEL").symlink_to(demo_path("demo:emoji-tokens", "model"))
    (place / "configs").symlink_to(ROOT / "configs")
    if page == "diffusion.md":  # it samples runs that it does not train
        for name in ("inpaint", "edit"):
            flags = flags_of(shelf / name, f"folder:{shelf / 'images'}", SHORT["diffusion"])
            assert train.main([*flags, "--workdir", str(place / "runs" / name)]) == 0


# ---- running --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted({line.page for line in LINES}))
@pytest.mark.usefixtures("quick", "one_thread")
def test_every_printed_command_runs(page, shelf, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path, shelf, page)
    for line in (one for one in LINES if one.page == page):
        if line.module.startswith("tools/"):
            assert "def main(" in (ROOT / line.module).read_text(), line
        elif not line.arguments:
            assert importlib.import_module(line.module).main, line
        else:
            capsys.readouterr()
            code = run(line, tmp_path, trained)
            shown = capsys.readouterr()
            assert code == 0, (line, shown.err, shown.out)
            check(line, shown.out)


def run(line: Line, place: Path, trained: dict[str, Path]) -> int:
    """Run a line; what another page has trained with the same keys is copied, not trained again."""
    shorter = [] if "--help" in line.words else shortened(line)
    words, main = [*line.arguments, *shorter], importlib.import_module(line.module).main
    if line.module != "jaxft.train" or "--help" in words:
        return main(words)
    work = place / (option(line, "workdir") or f"runs/{Path(option(line, 'config')).stem}")
    keys = " ".join(sorted(word for word in words if "config" in word))
    if not option(line, "config"):  # the run folder has its own
        return main(words)
    if keys in trained:
        shutil.copytree(trained[keys], work)
    trained[keys] = work
    return main(words)


def shortened(line: Line) -> list[str]:
    """Options that end a line in a moment."""
    if line.module == "jaxft.sample" and "runs/diffusion" in line.arguments:
        return ["--steps=2"]
    if line.module in ("jaxft.plan", "jaxft.inspect_data"):
        return ["--config.model=path/to/folder", "--config.seq_len=48"]
    if line.module != "jaxft.train" or not option(line, "config"):
        return []
    name = Path(option(line, "config")).stem
    keys = dict(SHORT[name])
    given = dict(runtime.parse_arguments(line.arguments, ("config", "workdir")).overrides)
    if name in ("llm", "preference", "classify") and "model" not in given:
        # The 135 M-parameter default takes minutes: `pytest -m slow` trains it.
        keys |= {"model": "path/to/folder"}
    if "resolution" in given:
        keys |= {"resolution": PIXELS[name]}
    if name == "image_tokens" and "graft" in given:
        keys |= {"max_caption_tokens": 24}
    return [f"--config.{key}={value}" for key, value in keys.items()]


def check(line: Line, shown: str) -> None:
    """What a command promises is there."""
    flags = dict(zip(line.arguments, line.arguments[1:], strict=False))
    default = f"runs/{Path(flags.get('--config', '')).stem}"
    work = Path(flags.get("--workdir", default))
    match line.module:
        case _ if "--help" in line.arguments:
            assert "keys, with their values" in shown
        case "jaxft.train":
            assert (work / "export").is_dir() and re.search("done in|is finished", shown)
            steps = [json.loads(one) for one in (work / "metrics.jsonl").read_text().splitlines()]
            assert [one["step"] for one in steps if "loss" in one] == [1, 2]
        case "jaxft.plan":
            assert "memory of a device" in shown
        case "jaxft.inspect_data":
            assert "trained tokens" in shown
            assert "<mark>" in Path(flags["--html"]).read_text()
        case "jaxft.evaluate":
            found = json.loads((work / "evaluation-2.json").read_text())
            assert found["ce" if "ce" in found else "loss"] > 0
        case "jaxft.sample":
            drawn = sorted((work / "samples").glob("sample-*.png"))
            assert drawn or flags["--prompt"] in shown
            shutil.rmtree(work / "samples", ignore_errors=True)
        case "jaxft.predict":
            lines = Path(flags["--out"]).read_text().splitlines()
            assert len(lines) == 16 and json.loads(lines[0])["scores"]
        case "jaxft.report":
            assert "Before and after" in (work / "report.html").read_text()
        case "jaxft.export":
            made = Path(flags.get("--out", work / "export"))
            assert [*made.rglob("*.safetensors"), *made.glob("*.gguf")]
        case "jaxft.verify":
            assert "PASSED" in shown
            assert json.loads((Path(line.arguments[0]) / "parity.json").read_text())["passed"]
        case "jaxft.verify.convert":
            assert (Path(line.arguments[0]) / "model.safetensors").is_file()
        case other:
            raise AssertionError(f"say what {other} leaves")
