"""A Janus folder opened, trained and given back: bytes, fixes, stock generate, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    AutoTokenizer,
    JanusForConditionalGeneration,
    JanusVQVAE,
    JanusVQVAEConfig,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from jaxft import export as exports
from jaxft import train
from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.tasks import Request
from jaxft.tasks.image_tokens.layout import encode_prompt, null_prompt
from jaxft.tasks.image_tokens.opened import open_model
from jaxft.tasks.image_tokens.options import ImageTokenOptions, TokenLoss, TokenSample
from jaxft.weights import transfer
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders.janus_original import transformers_keyed
from tests import whole as runs
from tests.tiny_image_tokens import arguments
from tests.tiny_janus import CODES, GRID, SIZE, make_janus_model, make_work

CODEBOOK = "model.vqmodel.quantize.embedding.weight"
CARRIED = ("model.vision_model.", "model.aligner.", "model.vqmodel.", "lm_head.")
CAPTIONS = ["a red cat 0", "water", "the blue house of a person 1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("janus"))


def options(**changes):
    keys = {"resolution": SIZE, "cache": "x", "caption_dropout": 0.1}
    return ImageTokenOptions(**{**keys, "sample": TokenSample((), 5.0), **changes})


def opened(folder, **changes):
    return open_model(str(folder), options(**changes), True, 0)


def written(model):
    """An export of what nobody trained, without a run."""
    leaves = describe(jax.eval_shape(model.build, jax.random.key(0)))
    return dict(transfer.export(model.part, leaves, {}, {}, None).tensors)


# ---- what a folder says -----------------------------------------------------------------------


def test_prompts_are_those_of_the_processor_and_of_janus_pro(work):
    """Trap 27 and 28: the template of the release, no space at its end, BOI never lost."""
    model = opened(work / "model")
    assert model.layout.prompt == "<|User|>: {caption}\n\n<|Assistant|>:"
    assert (model.layout.boi, model.layout.pad, model.layout.bos) == (5, 3, 0)
    made = encode_prompt(model.layout, model.tokenizer, "a red cat").ids
    text = "<|User|>: a red cat\n\n<|Assistant|>:<begin_of_image>"
    assert [*made, 5] == model.tokenizer(text)["input_ids"]
    short = opened(work / "model", max_caption_tokens=20).layout
    cut = encode_prompt(short, model.tokenizer, "the blue house of a person, " * 9)
    assert cut.cut and cut.ids[-2:] == made[-2:] and len(cut.ids) <= 20
    assert null_prompt(model.layout, made) == [0] + [3] * (len(made) - 1)


def test_case_llm_01_a_token_beyond_the_text_table(work, tmp_path):
    folder = Path(shutil.copytree(work / "model", tmp_path / "larger"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    model = opened(folder)
    number = tokenizer.convert_tokens_to_ids("<new>")
    model = model._replace(layout=replace(model.layout, text_vocab=number))
    encode_prompt(model.layout, model.tokenizer, "a red cat")
    with pytest.raises(UserError, match=rf"token '<new>' has the id {number}"):
        encode_prompt(model.layout, model.tokenizer, "a <new> cat")


def test_p5_an_untrained_export_is_bitwise_the_source_but_for_unit_rows(work):
    source, made = load_file(work / "model" / "model.safetensors"), written(opened(work / "model"))
    assert made.keys() == source.keys() and len(made) == 222
    differ = [key for key, tensor in source.items() if made[key].tobytes() != tensor.tobytes()]
    assert differ == [CODEBOOK]
    np.testing.assert_allclose(np.linalg.norm(made[CODEBOOK], axis=1), 1, atol=1e-6)


def test_trap19_a_tied_folder_gets_the_head_of_text_that_it_had(tmp_path):
    folder = make_janus_model(tmp_path / "tied", tie_word_embeddings=True)
    source, model = load_file(folder / "model.safetensors"), opened(folder)
    made = written(model)
    assert "lm_head.weight" not in source and len(made) == len(source) + 1
    table = source["model.language_model.embed_tokens.weight"]
    assert made["lm_head.weight"].tobytes() == table.tobytes()
    assert json.loads(model.side_files(None)["config.json"])["tie_word_embeddings"] is False


def test_trap5_colours_are_fixed_where_the_processor_lies_inside_too(work, tmp_path):
    folder = Path(shutil.copytree(work / "model", tmp_path / "model"))
    inner = {"image_mean": [0.48, 0.46, 0.41], "size": {"height": 12, "width": 12}}
    nested = {"processor_class": "JanusProcessor", "image_processor": inner}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    files = opened(folder).side_files(None)
    found = json.loads(files["processor_config.json"])
    assert found["image_processor"]["image_mean"] == found["image_processor"]["image_std"]
    assert found["image_processor"]["size"] == inner["size"]
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    found = json.loads(opened(folder).side_files(None)["preprocessor_config.json"])
    assert found["image_mean"] == [0.5] * 3
    assert found["image_processor_type"] == "JanusImageProcessor"


def test_a_tuned_decoder_replaces_the_folders_own_and_another_encoder_is_refused(work, tmp_path):
    whole = JanusForConditionalGeneration.from_pretrained(work / "model")
    for name, ok in (("decoder", True), ("encoder", False)):
        with torch.no_grad():
            getattr(whole.model.vqmodel, name).conv_in.weight.add_(0.1)
        whole.model.vqmodel.save_pretrained(tmp_path / name)
        if not ok:
            fails(["another encoder"], work / "model", tokenizer=str(tmp_path / name))
            continue
        source = load_file(work / "model" / "model.safetensors")
        made = written(opened(work / "model", tokenizer=str(tmp_path / name)))
        assert made.keys() == source.keys()
        differ = {key for key in made if made[key].tobytes() != source[key].tobytes()}
        assert differ == {CODEBOOK, "model.vqmodel.decoder.conv_in.weight"}


# ---- what a run leaves ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(work):
    changes = {"total": "3_steps", "optim.lr": 0.02, "resolution": SIZE, "eval_generated": 4}
    changes |= {"max_caption_tokens": 40}
    run = arguments(work / "model", work / "pictures", work / "cache", work / "run", changes)
    assert train.main(run) == 0
    return work / "run"


def test_p5_what_did_not_train_is_byte_for_byte_and_transformers_finds_what_it_needs(work, trained):
    export, model = trained / "export", work / "model"
    made, source = (load_file(folder / "model.safetensors") for folder in (export, model))
    same = {key for key in source if made[key].tobytes() == source[key].tobytes()}
    assert same == {key for key in source if key.startswith(CARRIED)} - {CODEBOOK}
    generation = json.loads((export / "generation_config.json").read_text())
    assert generation["generation_kwargs"] == {"boi_token_id": 5}
    assert (generation["pad_token_id"], generation["bos_token_id"]) == (3, 0)
    processor = JanusImageProcessorPil.from_pretrained(export)
    assert list(processor.image_mean) == list(processor.image_std) == [0.5] * 3
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (export / name).read_bytes() == (model / name).read_bytes()
    loaded, info = JanusForConditionalGeneration.from_pretrained(export, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    apart = loaded.lm_head.weight.data_ptr(), loaded.get_input_embeddings().weight.data_ptr()
    assert apart[0] != apart[1]


def test_p3_the_exported_folder_draws_the_same_without_jaxft(trained):
    """Greedy codes of unequal prompts, pixels, and codes of pixels by transformers alone."""
    export = trained / "export"
    tokenizer = AutoTokenizer.from_pretrained(export, padding_side="left")
    model = JanusForConditionalGeneration.from_pretrained(export)
    texts = [f"<|User|>: {c}\n\n<|Assistant|>:<begin_of_image>" for c in CAPTIONS]
    rows = tokenizer(texts, return_tensors="pt", padding=True)
    ids = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    expected = model.generate(**ids, generation_mode="image", do_sample=False)  # guidance: its own
    assert len({tuple(row) for row in expected.tolist()}) == 3, "rows are to differ"
    run, params, _ = runs.restore_run(trained, None)
    with jax.set_mesh(run.mesh):
        codes, _ = run.preview._sample(params, CAPTIONS, Request(temperature=0.0, guidance=5.0))
    np.testing.assert_array_equal(codes.reshape(3, -1), expected.numpy())
    pixels = run.opened.model.vq.decode(codes)
    with torch.no_grad():
        theirs = model.decode_image_tokens(expected)
    processor = JanusImageProcessorPil.from_pretrained(export)
    theirs = processor.postprocess(list(theirs.permute(0, 3, 1, 2).numpy()))
    shown = np.stack(theirs["pixel_values"]).transpose(0, 2, 3, 1)
    assert np.abs(shown.astype(int) - pixels).max() <= 1
    rows = run.train
    x = np.stack([rows.images[i].pixels for i in range(8)]).astype(np.float32) / 127.5 - 1
    with torch.no_grad():
        found = model.model.vqmodel.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).image_tokens
    run.encode({}, set())
    cached = np.stack([rows.stored(i)["codes"] for i in range(8)])
    np.testing.assert_array_equal(found.view(8, GRID, GRID).numpy(), cached)
    assert len(np.unique(cached)) > CODES // 3


def test_p8_a_run_exports_the_authors_layout_too(trained, tmp_path):
    """The same tensors under their names; its config draws one size of tokenizer only."""
    out = tmp_path / "original"
    assert exports.main(["--workdir", str(trained), "--kind", "original", "--out", str(out)]) == 0
    stock = load_file(trained / "export" / "model.safetensors")
    back = transformers_keyed(TensorFiles.open(out), "x")
    assert set(back.keys()) == stock.keys()
    assert all(back.read(key).tobytes() == tensor.tobytes() for key, tensor in stock.items())
    assert json.loads((out / "config.json").read_text())["model_type"] == "multi_modality"
    chat = json.loads((out / "processor_config.json").read_text())
    assert chat["sft_format"] == "deepseek" and not (out / "generation_config.json").exists()
    assert (out / "tokenizer.json").read_bytes() == (trained / "export/tokenizer.json").read_bytes()


def test_it_trains_on_from_its_own_export_with_the_same_cache(work, trained, capsys):
    changes = {"total": "1_steps", "resolution": SIZE, "data.eval": "", "max_caption_tokens": 40}
    where = work / "pictures", work / "cache", work / "again"
    assert train.main(arguments(trained / "export", *where, changes)) == 0
    assert "encoded" not in capsys.readouterr().out


# ---- refusals ---------------------------------------------------------------------------------


def fails(words, folder, **changes):
    with pytest.raises(UserError) as error:
        opened(folder, **changes)
    shown = str(error.value)
    assert "\n" not in shown
    for word in words:
        assert str(word) in shown, f"{word!r} is not in {shown!r}"


def test_another_resolution_says_which_family_can(work):
    fails(["resolution=32", "family J", f"only {SIZE} pixels", "family N", "graft"], work / "model",
          resolution=32)  # fmt: skip


def test_keys_that_a_janus_has_no_use_for(work):
    fails(["text_weight=0.1", "set it to 0"], work / "model", loss=TokenLoss(1.0, 0.1))
    fails(["graft='x'", "generates images already"], work / "model", graft="x")
    fails(["max_caption_tokens=250", "256"], work / "model", max_caption_tokens=250)
    model = open_model(str(work / "model"), options(), False, 0)  # enough for a plan
    with pytest.raises(UserError, match="init='random'"):
        model.vq.params  # noqa: B018


def test_a_decoder_for_another_codebook(work, tmp_path):
    config = opened(work / "model").vq.source.config
    JanusVQVAE(JanusVQVAEConfig(**{**config, "num_embeddings": 2 * CODES})).save_pretrained(
        tmp_path
    )
    fails([tmp_path, "codebook", "only the decoder"], work / "model", tokenizer=str(tmp_path))


def test_trap30_a_pickled_janus_is_refused_with_the_way_to_convert(work, tmp_path):
    """As deepseek-ai publishes Janus-Pro."""
    folder = Path(shutil.copytree(work / "model", tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(["pytorch_model.bin", "can run code"], folder)


def test_trap14_pad_is_the_tokenizers_own_whatever_configs_say(work, tmp_path):
    """It is another id in each release, and the null is made of it."""
    folder = Path(shutil.copytree(work / "model", tmp_path / "model"))
    for file, old, new in (
        ("tokenizer_config.json", '"pad_token": "<｜▁pad▁｜>"', '"pad_token": "<eos>"'),
        ("config.json", '"pad_token_id": 3', '"pad_token_id": 2'),
    ):
        text = (folder / file).read_text()
        content = text.replace(old, new) if old in text else text.replace(ascii(old)[1:-1], new)
        assert content != text, file
        (folder / file).write_text(content)
    model = opened(folder)
    assert model.layout.pad == 3
    assert json.loads(model.side_files(None)["generation_config.json"])["pad_token_id"] == 3


def test_tokenizers_that_lack_what_a_janus_needs(work, tmp_path):
    fails(["<|System|>", "no token"], work / "model", prompt="<|System|> {caption}")

    def broken(name, old, new, file):
        folder = Path(shutil.copytree(work / "model", tmp_path / name))
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
        return folder

    said = "tokenizer_config.json"
    fails(["bos_token is None"], broken("a", '"bos_token": "<bos>", ', "", said))
    pad = '"unk_token": "<unk>"', '"unk_token": "<｜▁pad▁｜>"'
    fails(["pad=3", "unknown tokens"], broken("b", *pad, said))
    folder = broken("c", "<begin_of_image>", "<begin_of_picture>", "tokenizer.json")
    (folder / said).write_text((folder / said).read_text().replace("<begin_of_image>", "<x>"))
    fails(["<begin_of_image> is None", "original Janus"], folder)


def test_the_1b_of_before_pro_has_other_roles(work, tmp_path):
    folder = Path(shutil.copytree(work / "model", tmp_path / "old"))
    text = (folder / "tokenizer.json").read_text().replace("<|User|>", "<|user|>")
    (folder / "tokenizer.json").write_text(text)
    assert opened(folder).layout.prompt == "User: {caption}\n\nAssistant:"
