"""The image-token task as people run it: from a text model and a VQ folder to a drawn picture."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import VQModel
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from jaxft import train
from jaxft.core.errors import UserError
from jaxft.data.cache import ArrayCache
from jaxft.data.loader import subset
from jaxft.models.decoders.generation.sampling import Sampling
from jaxft.tasks import NOW, Request
from jaxft.tasks.image_tokens.rows import open_store
from tests import whole as runs
from tests.interrupted import kill_after, start, timeless
from tests.tiny_autoencoders import make_vqmodel
from tests.tiny_image_tokens import CODES, GRID, SIZE, arguments, make_config, make_pictures

ROOT = Path(__file__).resolve().parents[3]
TEXT = 320


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def pictures(work):
    return make_pictures(work / "pictures")


@pytest.fixture(scope="module")
def text_model(make_folder):
    return make_folder(initializer_range=0.1)


@pytest.fixture(scope="module")
def vq(work):
    folder = make_vqmodel(work / "vq", CODES)
    (folder / "LICENSE").write_text("free\n")
    return folder


@pytest.fixture(scope="module")
def trained(work, pictures, text_model, vq):
    """The run folder of a graft that was trained for four steps."""
    changes = {
        "graft": str(vq),
        "total": "4_steps",
        "every.save": "2_steps",
        "eval_generated": 4,
        "flip": True,
        "optim.lr": 0.01,
    }
    assert train.main(arguments(text_model, pictures, work / "cache", work / "run", changes)) == 0
    return work / "run"


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_reports(trained):
    first, last = (record for record in records(trained) if "eval_ce" in record)
    assert (first["step"], last["step"]) == (0, 4), "a baseline before any update"
    for record in (first, last):
        use = record["eval_ce_null"] - record["eval_ce"]
        assert record["eval_caption_use"] == pytest.approx(use)
        assert record["eval_ln_k"] == pytest.approx(math.log(CODES))
        assert 0 < record["eval_unigram_entropy"] < record["eval_ln_k"]
        assert 0 < record["eval_train_distance_least"] <= record["eval_train_distance_mean"] <= 1
        assert 0 < record["eval_codebook_used"] <= 1
        assert {"eval_kid-lite0", "eval_accuracy", "eval_codebook_perplexity"} <= record.keys()
        assert {"eval_tokenizer_psnr", "eval_tokenizer_ssim"} <= record.keys()
        assert record["eval_sampled_images_per_s"] > 0
    assert last["eval_ce"] < first["eval_ce"]
    made = {path.name for path in (trained / "samples").iterdir()}
    assert {"tokenizer-000000.png", "held-out-000000.png", "held-out-000004.png"} <= made
    assert "tokenizer-000004.png" not in made, "once is enough"


def test_the_folder_holds_all_that_transformers_needs(trained, vq, text_model):
    """The VQ byte for byte, the tokenizer, the larger vocabulary, the side-car."""
    export = trained / "export"
    for file in ("config.json", "diffusion_pytorch_model.safetensors", "LICENSE"):
        assert (export / "vq" / file).read_bytes() == (vq / file).read_bytes()
    side = json.loads((export / "imagetoken.json").read_text())
    assert side["text_vocab"] == TEXT and side["grid"] == [GRID, GRID]
    config = json.loads((export / "config.json").read_text())
    assert config["vocab_size"] == side["image_offset"] + side["codes"] == TEXT + 4 + CODES
    tensors = load_file(export / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (TEXT + 4 + CODES, 32)
    _, info = LlamaForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def draw_with_transformers(folder, captions, guidance):
    """Codes and pictures of an exported folder, by nothing but transformers and diffusers."""
    side = json.loads((folder / "imagetoken.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [
        [*tokenizer(side["prompt"].replace("{caption}", caption))["input_ids"], side["boi"]]
        for caption in captions
    ]
    width, count = max(map(len, rows)), side["grid"][0] * side["grid"][1]
    made = model.generate(
        torch.tensor([[side["pad"]] * (width - len(ids)) + ids for ids in rows]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]),
        max_new_tokens=count,
        do_sample=False,
        guidance_scale=guidance,
        negative_prompt_ids=torch.tensor([[side["null"], side["boi"]]] * len(rows)),
        suppress_tokens=list(range(side["image_offset"])),
        pad_token_id=side["pad"],
    )
    codes = (made[:, width:] - side["image_offset"]).reshape(-1, *side["grid"])
    vq = VQModel.from_pretrained(folder / "vq").eval()
    with torch.no_grad():
        rows = vq.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, 4))
        pixels = vq.decode(rows, force_not_quantize=True).sample
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    return codes.numpy(), pixels.numpy()


def test_the_exported_folder_draws_the_same_without_jaxft(trained):
    """P4 on what a run leaves: captions of unequal lengths, temperature 0, down to the pixels."""
    captions = ["a red cat 0", "water", "the blue house of a person 1"]
    expected, pixels = draw_with_transformers(trained / "export", captions, 3.0)
    run, params, _ = runs.restore_run(trained, None)
    how = Request(temperature=0.0, guidance=3.0)
    with jax.set_mesh(run.mesh):
        codes, _ = run.preview._sample(params, captions, how)
        compiled = run.preview._generate._cache_size()
        looks = run.preview.complete(params, captions, how)
        run.preview._sample(params, captions, how._replace(guidance=1.5, seed=2))
    assert run.preview._generate._cache_size() == compiled, "one program for every guidance"
    np.testing.assert_array_equal(codes, expected)
    for look, wanted in zip(looks, pixels, strict=True):
        made = look.pictures["made"]
        assert made.shape == (SIZE, SIZE, 3) and made.dtype == np.uint8
        assert np.abs(made.astype(int) - wanted).max() <= 1


def test_it_trains_on_from_its_own_export(trained, work, pictures, capsys):
    """No graft any more, and the cached codes serve: they are of the same tokenizer."""
    changes = {"total": "1_steps", "max_caption_tokens": 0, "data.eval": ""}
    run = arguments(trained / "export", pictures, work / "cache", work / "again", changes)
    assert train.main(run) == 0
    shown = capsys.readouterr().out
    assert "encoded" not in shown and "tokenizer ceiling: 24 pictures" in shown
    side = [(w / "export" / "imagetoken.json").read_text() for w in (trained, work / "again")]
    assert side[0] == side[1]


def test_a_head_of_zeros_foretells_nothing(trained, work, pictures):
    """The cross-entropy before training is then exactly that of all ids alike."""
    config = make_config(trained / "export", pictures, work / "cache")
    run = runs.open_run(config)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        run.encode(params)
        params["lm_head.kernel"] = params["lm_head.kernel"] * 0
        found = run.preview.evaluate(params, run.mesh).metrics
    assert found["ce"] == pytest.approx(math.log(TEXT + 4 + CODES), rel=1e-6)
    assert found["caption_use"] == pytest.approx(0, abs=1e-6)


def test_from_nothing_but_a_config(work, pictures, text_model, vq):
    changes = {"graft": str(vq), "init": "random", "total": "1_steps", "data.eval": ""}
    changes |= {"loss.text_weight": 0.125, "loss.image_weight": 0.875}
    changes |= {"sample.prompts": "('a cat',)", "mesh.fsdp": 8}
    run = arguments(text_model, pictures, work / "cache", work / "fresh", changes)
    assert train.main(run) == 0
    LlamaForCausalLM.from_pretrained(work / "fresh" / "export")
    assert {"image_ce", "text_ce"} <= records(work / "fresh")[0].keys()
    assert (work / "fresh" / "samples" / "prompts-000001.png").exists()


def test_a_grid_shows_target_tokenizer_and_generated(trained, work, pictures, monkeypatch):
    """And what is a copy of a training picture, code for code, has distance 0 to it."""
    run = runs.open_run(
        make_config(trained / "export", pictures, work / "cache", {"eval_generated": 4})
    )
    task = run
    task.encode({}, set())
    chosen = [int(i) for i in subset(task.held_out, 4, 0).ids]
    copies = np.stack([task.held_out.stored(i)["codes"] for i in chosen])
    monkeypatch.setattr(task.preview, "_sample", lambda *_: (copies, 1.0))
    monkeypatch.setattr(task.preview, "kid", lambda *_: 0.0)
    metrics, sheet = task.preview._generated({})
    assert tuple(sheet.columns) == ("target", "tokenizer", NOW)
    assert list(sheet.captions) == [task.held_out.caption(i) for i in chosen]
    for target, back, made, i in zip(*sheet.columns.values(), chosen, strict=True):
        np.testing.assert_array_equal(target, task.held_out.images[i].pixels)
        np.testing.assert_array_equal(back, made)
        assert (back != target).any()
    assert metrics["train_distance_least"] == metrics["train_distance_mean"] == 0
    used = len(np.unique(copies)) / CODES
    assert metrics["codebook_used"] == pytest.approx(used) and used < 1


def test_what_the_config_says_of_sampling_is_how_it_draws(trained, work, pictures, monkeypatch):
    """A request goes before it, number by number."""
    keys = {
        "sample.guidance": 2.5,
        "sample.temperature": 0.5,
        "sample.top_k": 5,
        "sample.top_p": 0.9,
    }
    task = runs.open_run(make_config(trained / "export", pictures, work / "cache", keys))
    seen = []

    def draw(params, tokens, mask, keys, guidance, how):
        seen.append((guidance, how))
        return np.zeros((len(tokens) // 2, GRID * GRID), int)

    monkeypatch.setattr(task.preview, "_generate", draw)
    task.preview._sample({}, ["a"], Request())
    task.preview._sample({}, ["a"], Request(guidance=0.0, temperature=0.0, top_k=0))
    assert seen == [(2.5, Sampling(0.5, 5, 0.9)), (0.0, Sampling(0.0, 0, 0.9))]


def test_a_cache_of_others_is_said_and_codes_that_cannot_be_are_refused(
    trained, work, pictures, capsys
):
    """Also where they are held-out pictures' alone."""
    config = make_config(trained / "export", pictures, work / "stale")
    task = runs.open_run(config)
    vq, store = task.opened.model.vq, ArrayCache(work / "stale", "codes of another")
    good = {
        "codes": np.zeros((GRID, GRID), np.uint16),
        "psnr": np.float32(9),
        "ssim": np.float32(1),
    }
    good = {name: np.asarray(one) for name, one in good.items()}
    store.put("x", good)
    store.close()
    own = open_store(task.opened)
    said = capsys.readouterr().out
    assert "codes of 1 other tokenizers" in said and "encoded anew" in said and not len(own)
    for i in range(24):
        bad = {**good, "codes": good["codes"] + np.uint16(CODES)}
        own.put(task.held_out.images.key(i), bad if i == 5 else good)
    own.close()
    task.train.images.records = task.train.images.records.keep([0, 1])
    with pytest.raises(
        UserError, match=f"code {CODES}, but the codebook has {vq.cfg.codes}"
    ) as error:
        task.encode({}, set())
    assert "\n" not in str(error.value) and "pictures" in str(error.value)


def test_crops_and_mirrors_are_rows_of_their_own(trained, work, pictures):
    keys = {"crops": 3, "flip": True}
    task = runs.open_run(make_config(trained / "export", pictures, work / "crops", keys))
    assert len(task.train) == 24 * 6 and len(task.held_out) == 24
    assert "24 images, mirrored too, 3 crops each" in task.describe()
    assert "loss 1 image;" in task.describe(), "which loss it was"
    task.encode({}, set())
    rows = np.stack([task.train[i]["codes"] for i in range(0, 24 * 6, 24)])
    assert rows.dtype == np.uint16 and len(np.unique(rows, axis=0)) > 3


BAD = [
    ({"crops": 6}, "crops=6 must be 1 to 5"),
    ({"caption_dropout": 1.0}, "caption_dropout=1.0 must be"),
    ({"cache": ""}, "name a folder"),
    ({"loss.text_weight": -1.0}, "loss.text_weight=-1.0 must be at least 0"),
    ({"loss.image_weight": 0.0}, "use task=llm"),
    ({"resolution": 32}, "set resolution=16"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=str)
def test_a_mistake_is_one_line_of_the_command(trained, work, pictures, capsys, change, words):
    run = arguments(trained / "export", pictures, work / "cache", work / "bad", change)
    assert train.main(run) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("jaxft: ") and words in line, line


def test_long_captions_and_oblong_pictures_are_counted(trained, work, pictures):
    config = make_config(trained / "export", pictures, work / "cache", {"max_caption_tokens": 6})
    task = runs.open_run(config)
    report = task.train.report()
    assert report["cropped"] == 5 and 0 < report["truncated_captions"] < 24
    assert f"5 cropped, {report['truncated_captions']} truncated captions" in task.describe()
    task.encode({}, set())
    batch = next(task.train.batches(0, slice(0, 8)))
    assert batch["prompt"].shape == (8, 6) and batch["length"].max() <= 6


def test_sigkill_and_the_same_command_again_is_bitwise(trained, work, pictures):
    changes = {"max_caption_tokens": 0, "total": "8_steps", "every.save": "2_steps"}
    changes |= {"data.eval": "", "flip": True, "caption_dropout": 0.5}
    model, cache = trained / "export", work / "cache"
    whole, broken = work / "whole", work / "broken"
    assert train.main(arguments(model, pictures, cache, whole, changes)) == 0
    again = arguments(model, pictures, cache, broken, changes)
    assert kill_after(start(again), broken, 5)
    assert train.main(again) == 0
    assert timeless(whole) == timeless(broken)
    a, b = (runs.restore_run(folder, None)[1] for folder in (whole, broken))
    for path in a:
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path
