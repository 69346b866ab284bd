"""Lettering: any script has letters of its own, and breaks between them; nothing is cut."""

import unicodedata

import numpy as np
import pytest
from PIL import Image, features

from jaxft.tasks.common import lettering
from jaxft.tasks.common.lettering import LINE, draw_lines, wrap

SCRIPTS = {
    "Latin": ("a red fox in the snow", "a blue fox in the rain"),
    "Vietnamese": ("cáo đỏ ngồi trong tuyết", "cáo đỏ ngồi trong tuyệt"),
    "Japanese": ("猫と家", "犬と木"),
    "Korean": ("빨간 여우", "파란 여우"),
    "Chinese": ("红色的狐狸", "紅色的狐狸"),
    "Arabic": ("ثعلب أحمر", "ثعلب أزرق"),
    "Hebrew": ("שועל אדום", "שועל כחול"),
    "Hindi": ("लाल लोमड़ी", "नीली लोमड़ी"),
    "Bengali": ("লাল শিয়াল", "নীল শিয়াল"),
    "Tamil": ("சிவப்பு நரி", "நீல நரி"),
    "Thai": ("สุนัขจิ้งจอก", "สุนัขสีแดง"),
    "Khmer": ("កញ្ជ្រោង", "ក្រហម"),
    "Amharic": ("ቀይ ቀበሮ", "ሰማያዊ ቀበሮ"),
    "Cyrillic": ("Рыжая лиса", "Синяя лиса"),
    "Greek": ("κόκκινη αλεπού", "μπλε αλεπού"),
    "Georgian": ("წითელი მელა", "ლურჯი მელა"),
    "emoji": ("🦊❄️", "🐱🔥"),
    "flags": ("🇯🇵", "🇩🇪"),
    "symbols": ("★ → ∑ €", "☆ ← ∏ £"),
    "no font": ("\U00013080", "\U00013081"),
}


def drawn(text, width=200, lines=None):
    lines = lines or wrap(text, width)
    sheet = Image.new("RGB", (width + 20, LINE * len(lines.texts) + 20), "white")
    draw_lines(sheet, lines, 10, 10, width)
    return np.asarray(sheet.convert("L"))


@pytest.mark.parametrize("one, other", SCRIPTS.values(), ids=SCRIPTS)
def test_texts_of_any_script_are_told_apart(one, other):
    first, second = drawn(one), drawn(other)
    assert (first < 128).any() and (second < 128).any()
    assert first.shape != second.shape or (first != second).any()
    shown = wrap(one, 1000).texts
    assert shown == (
        ("[U+13080]",) if one == "\U00013080" else (unicodedata.normalize("NFC", one),)
    )


@pytest.mark.parametrize("text", [one for one, _ in SCRIPTS.values()], ids=SCRIPTS)
@pytest.mark.parametrize("width", [64, 96, 400])
def test_no_letter_is_cut_at_an_edge(text, width):
    ink = drawn(" ".join([text] * 6), width) < 200
    assert ink.any() and not ink[:, :8].any() and not ink[:, width + 12 :].any()
    assert not ink[:6].any() and not ink[-6:].any()


def test_a_caption_keeps_every_letter_of_a_word_wider_than_its_line():
    word = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamter"
    lines = wrap(word, 96).texts
    assert len(lines) > 3 and "".join(lines) == word
    sentence = "a photo of a red fox, oil on canvas"
    assert " ".join(wrap(sentence, 96).texts) == sentence


def test_lines_break_between_letters_and_not_before_closing_marks():
    lines = wrap("「猫」と家、雪の中で座っている赤い狐。油絵、とても詳細な風景。", 60).texts
    assert "".join(lines).startswith("「猫」") and len(lines) > 4
    assert not any(line[0] in "、。」っ" or line[-1] in "「" for line in lines)
    marked = wrap("क्षत्रिय" * 6 + " e\u0301" * 9 + "👨‍👩‍👧" * 9, 40).texts
    assert not any(
        unicodedata.category(line[0])[0] == "M" or line[0] == "\u200d" for line in marked
    )


def test_what_does_not_fit_ends_in_an_ellipsis():
    lines = wrap("word " * 500, 96).texts
    assert len(lines) == 16 and lines[-1].endswith("…")
    assert wrap("", 96).texts == ("",) and wrap("a\nb\tc", 96).texts == ("a b c",)


def test_a_character_without_a_letter_is_written_as_its_code():
    assert wrap("x \ue000", 200).texts == ("x [U+E000]",)
    assert wrap("\U00013080\U00013081", 200).texts == ("[U+13080][U+13081]",)
    assert "".join(wrap("\U00013080", 30).texts) == "[U+13080]"


def test_right_to_left_texts_stand_at_the_right():
    assert wrap("שועל fox", 200).leftward and not wrap("fox שועל", 200).leftward
    columns = np.flatnonzero((drawn("שועל") < 128).any(axis=0))
    assert columns.min() > 110 and columns.max() <= 210


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow finds no FriBiDi")
def test_letters_are_joined_as_their_script_has_it():
    def length(text):
        return lettering._font("NotoScripts.ttf").getlength(text)

    assert length("لا") < length("ل") + length("ا")  # lam and alef make one letter
    emoji = lettering._font("NotoEmoji.ttf")
    assert emoji.getlength("👨‍👩‍👧") < 1.5 * emoji.getlength("👨")


def test_without_fribidi_right_to_left_words_are_turned(monkeypatch):
    monkeypatch.setattr(lettering, "_can_shape", lambda: False)
    lettering._font.cache_clear()
    try:
        assert lettering._visual("ab שלום עולם 12") == "ab םלוע םולש 12"
        assert (drawn("שלום") < 128).any() and (drawn("हिन्दी") < 128).any()
    finally:
        monkeypatch.undo()
        lettering._font.cache_clear()
