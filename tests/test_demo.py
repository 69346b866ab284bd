"""The demo that ships: its size, its licences, its images and captions, its tokenizer."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "jaxft/demo"
TOKENIZER = DEMO / "tokenizer-clip-4k"
COUNTS = {"train": 192, "valid": 64}
SETS = {"emoji": "{}", "stickers": "sticker of {}"}  # folder: how it names a drawing
each_split = pytest.mark.parametrize(("name", "split"), [(n, s) for n in SETS for s in COUNTS])


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rows(split: str, name: str = "emoji") -> list[dict[str, str]]:
    lines = (DEMO / name / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def captions(name: str = "emoji") -> list[str]:
    return [row["text"] for split in COUNTS for row in rows(split, name)]


@pytest.fixture(scope="module")
def demo_data():
    """tools/demo_data.py: a script's neighbour, so not importable by name."""
    spec = importlib.util.spec_from_file_location("demo_data", ROOT / "tools/demo_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    yield spec.loader.exec_module(module) or module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def test_sizes():
    assert bytes_in(DEMO) < 40e6
    assert bytes_in(DEMO / "emoji") < 0.8e6
    assert bytes_in(DEMO / "stickers") < 1e6
    assert bytes_in(TOKENIZER) < 120e3


def test_every_folder_has_its_licence():
    notice = (DEMO / "NOTICE.md").read_text(encoding="utf-8")
    for folder in (path for path in DEMO.iterdir() if path.is_dir()):
        own = [*folder.glob("LICENSE*"), *folder.glob("NOTICE*")]
        assert own or f"## {folder.name}/" in notice, f"no licence for {folder}"


@pytest.mark.parametrize(
    "words",
    [
        "WordNet 3.0 Copyright 2006 by Princeton University",
        "creativecommons.org/licenses/by/4.0/",
        "Twitter, Inc and other contributors",
        "Jason Sofonia and Justine De Caires",
        "copyright Google",
        "transparent background was replaced by white",
        "(c) 2014 Mu-An Chiou",
        "(c) 2013 Cal Henderson",
        "(c) 2021 OpenAI",
        "Permission is hereby granted, free of charge",
    ],
)
def test_the_notice_names_author_licence_and_changes(words):
    notice = " ".join((DEMO / "NOTICE.md").read_text(encoding="utf-8").split())
    assert words in notice


@each_split
def test_every_row_has_its_image_and_every_image_its_row(name, split):
    listed = [row["file_name"] for row in rows(split, name)]
    assert len(listed) == len(set(listed)) == COUNTS[split]
    assert set(listed) == {path.name for path in (DEMO / name / split).glob("*.png")}


@each_split
def test_images_are_rgb_drawings_on_white(name, split):
    with_white_corners = 0
    for row in rows(split, name):
        with Image.open(DEMO / name / split / row["file_name"]) as image:
            assert image.size == (64, 64) and image.mode in ("P", "RGB")
            assert "transparency" not in image.info
            pixels = np.asarray(image.convert("RGB"))
        assert (pixels.reshape(-1, 3) != 255).any(1).mean() > 0.02, f"{row} is empty"
        corners = pixels[::63, ::63].reshape(4, 3)
        assert (corners.max(1) > 60).all(), f"{row} lies on black"
        with_white_corners += (corners == 255).all(1).sum() >= 2
    assert with_white_corners >= 0.99 * COUNTS[split]  # a window and two heads fill the square


def test_validation_shows_other_emoji():
    names = {split: {row["file_name"] for row in rows(split)} for split in COUNTS}
    texts = {split: {row["text"] for row in rows(split)} for split in COUNTS}
    assert not names["train"] & names["valid"]
    assert not texts["train"] & texts["valid"]


def test_both_sets_show_the_same_emoji_in_the_same_splits():
    for split in COUNTS:
        named = [SETS["stickers"].format(row["text"]) for row in rows(split)]
        assert [row["text"] for row in rows(split, "stickers")] == named


def test_captions_are_plain_words():
    assert len(set(captions())) == sum(COUNTS.values())
    for text in captions():
        assert text == " ".join(text.lower().split()) and text.isascii()
        assert not set(text) & set("_:") and len(text) > 2, text
    assert not any(text.startswith(("flag ", "keycap")) for text in captions())


def test_tokenizer_layout(tokenizer):
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
    merges = (TOKENIZER / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert sorted(vocabulary.values()) == list(range(4096))
    assert len(merges) == 4096 - 2 * 256 - 2
    assert all(vocabulary[m.replace(" ", "")] == 512 + i for i, m in enumerate(merges))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (4094, 4095)
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 4095
    assert tokenizer.model_max_length == 24
    assert json.loads((TOKENIZER / "special_tokens_map.json").read_text()) == {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }


def test_tokenizer_keeps_the_ids_of_clip(tokenizer):
    """The ids of SD 1.x for words whose merges are among the first; only start and end move."""
    assert tokenizer("a photo of a cat")["input_ids"] == [4094, 320, 1125, 539, 320, 2368, 4095]
    assert tokenizer("red heart")["input_ids"] == [4094, 736, 1936, 4095]


def test_tokenizer_pads_and_cuts_with_the_end_token(tokenizer):
    batch = tokenizer(["red heart", "dog " * 60], padding="max_length", truncation=True)
    short, long = batch["input_ids"]
    assert short == [4094, 736, 1936] + [4095] * 21
    assert len(long) == 24 and long[-1] == 4095 and 4095 not in long[:-1]


def test_tokenizer_fits_every_caption_and_gives_it_back(tokenizer):
    auto = AutoTokenizer.from_pretrained(TOKENIZER)
    for text in captions():
        ids = tokenizer(text)["input_ids"]
        assert auto(text)["input_ids"] == ids
        assert len(ids) <= tokenizer.model_max_length and 4095 not in ids[:-1]
        back = tokenizer.decode(ids, skip_special_tokens=True).strip()
        # As in CLIP, digits are words of their own: "1st" comes back as "1 st".
        assert back == text or back == text.replace("1st", "1 st")


def test_tokenizer_knows_every_byte(tokenizer):
    text = "über 東京 🍎 ¡ñ!"
    ids = tokenizer(text)["input_ids"]
    assert 4095 not in ids[:-1]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_transparency_is_laid_on_white(demo_data):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[1] = 200, 100, 0, 255
    pixels[2] = 200, 100, 0, 51  # a fifth: 255 + (200 - 255) / 5 = 244, and so on
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    seen = np.asarray(demo_data.on_white(png.getvalue()))
    assert seen[:3, 5].tolist() == [[255, 255, 255], [200, 100, 0], [244, 224, 204]]


def test_an_image_of_another_size_is_refused(demo_data):
    png = io.BytesIO()
    Image.new("RGBA", (64, 32)).save(png, "PNG")
    with pytest.raises(ValueError, match=r"\(64, 32\) pixels, expected \(64, 64\)"):
        demo_data.on_white(png.getvalue())


@pytest.mark.parametrize(("colours", "mode"), [(3, "P"), (256, "P"), (257, "RGB")])
def test_small_files_lose_nothing(demo_data, tmp_path, colours, mode):
    rng = np.random.default_rng(0)
    palette = np.stack(
        [np.arange(colours) % 256, np.arange(colours) // 256 * 9, 7 * np.ones(colours)]
    )
    pixels = palette.T.astype(np.uint8)[np.arange(64 * 64) % colours]
    pixels = rng.permutation(pixels).reshape(64, 64, 3)
    demo_data.save_small(Image.fromarray(pixels), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            {"😅": ["grinning_face_with_sweat", "hot_day"]},
            ("grinning face with sweat", ["hot day"]),
        ),
        ({"😅": ["keycap:_*", "star"]}, ("smiling", ["star"])),
        ({"😅": [""]}, ("smiling", [])),
        ({}, ("smiling", [])),
    ],
)
def test_caption(demo_data, words, expected):
    entry = {"unified": "1F605", "non_qualified": None, "name": "SMILING", "short_name": "smile"}
    assert demo_data.caption(entry, words) == expected


def test_a_changed_package_is_refused(demo_data, tmp_path):
    (tmp_path / "emojilib-4.0.3.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"emojilib-4\.0\.3\.tgz has sha256 .* delete it"):
        demo_data.fetch("emojilib-4.0.3.tgz", tmp_path)
