"""Text in any script on a picture, wrapped and drawn with the fonts that ship."""

import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

LINE = 18  # pixels from line to line
_SIZE, _BASELINE = 12, 14
MOST_LINES = 16  # lines of one text
_MARGIN = 4  # pixels above and below a line that marks may reach into
_FINER = 4  # letters are drawn this much larger and reduced, for even spaces between them
_FOLDER = Path(__file__).parent / "fonts"
# Fonts in order of preference. The second has Chinese, Japanese and Korean.
_FILES = ("NotoScripts.ttf", "DroidSansFallback.ttf", "NotoEmoji.ttf")
_JOINER, _VIRAMA = "\u200d", 9  # the class of combining marks that join two consonants
_CLOSING = set("、。，．・：；？！）」』】〉》〕］｝ー…‥々ぁぃぅぇぉっゃゅょァィゥェォッャュョ")
_OPENING = set("（「『【〈《〔［｛")


class Lines(NamedTuple):
    """A wrapped text.

    leftward: the text is written from right to left, so its lines are aligned at the right.
    """

    texts: tuple[str, ...]
    leftward: bool = False


def wrap(text: str, width: int) -> Lines:
    """Break a text between words, and a word wider than `width` between its letters.

    Scripts without spaces break between letters. If a text has more than MOST_LINES lines, the last
    kept line ends in an ellipsis. A character that no font has is written as its code, such as
    [U+E000].
    """
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    lines = [""]
    for space, piece in (piece for word in text.split(" ") for piece in _pieces(word, width)):
        if len(lines) > MOST_LINES:
            break
        longer = lines[-1] + (" " if space and lines[-1] else "") + piece
        if lines[-1] and _width(longer) > width:
            lines.append(piece)
        else:
            lines[-1] = longer
    if len(lines) > MOST_LINES:
        rest = _clusters(lines[MOST_LINES - 1])
        while rest and _width("".join(rest) + "…") > width:
            rest.pop()
        lines = [*lines[: MOST_LINES - 1], "".join(rest).rstrip() + "…"]
    kinds = (unicodedata.bidirectional(letter) for letter in text)
    first = next((kind for kind in kinds if kind in ("L", "R", "AL")), "L")  # with a direction
    return Lines(tuple(lines), leftward=first != "L")


def draw_lines(sheet: Image.Image, lines: Lines, left: int, top: int, width: int) -> None:
    """Draw a wrapped text in black in a box `width` pixels wide with the corner (left, top)."""
    for row, line in enumerate(lines.texts):
        mask = Image.new("L", (width * _FINER, (LINE + 2 * _MARGIN) * _FINER))
        draw = ImageDraw.Draw(mask)
        x = (width - _width(line)) * _FINER if lines.leftward else 0
        runs = _runs(line)
        for file, text in reversed(runs) if lines.leftward else runs:
            direction = "rtl" if lines.leftward and _can_shape() else None
            font, text = _font(file), _visual(text)
            place = (x, (_BASELINE + _MARGIN) * _FINER)
            draw.text(place, text, 255, font, "ls", direction=direction)
            x += font.getlength(text, direction=direction)
        sheet.paste("black", (left, top + row * LINE - _MARGIN), mask.reduce(_FINER))


@lru_cache(maxsize=8)
def _font(file: str, shaped: bool = True) -> ImageFont.FreeTypeFont:
    engine = ImageFont.Layout.RAQM if shaped and _can_shape() else ImageFont.Layout.BASIC
    return ImageFont.truetype(_FOLDER / file, _SIZE * _FINER, layout_engine=engine)


@lru_cache(maxsize=1)
def _can_shape() -> bool:
    """Return whether Pillow finds FriBiDi. Without it, letters are drawn one by one."""
    return bool(features.check("raqm"))


@lru_cache(maxsize=4096)
def _has(file: str, letter: str) -> bool:
    """Return whether a font has a glyph for a letter, rather than the box of a missing one."""
    font = _font(file, shaped=False)
    found: Any = font.getmask(letter)
    missing: Any = font.getmask("\U0010ffff")
    return found.size != missing.size or bytes(found) != bytes(missing)


def _clusters(text: str) -> list[str]:
    """Return the letters of a text, each with the marks and signs that must stay with it."""
    found: list[str] = []
    for letter in text:
        last = found[-1][-1] if found else ""
        joins = unicodedata.category(letter)[0] == "M" or letter == _JOINER
        joins |= "\U0001f3fb" <= letter <= "\U0001f3ff"  # colours of skin
        joined = last == _JOINER or (last and unicodedata.combining(last) == _VIRAMA)
        if found and (joins or joined):
            found[-1] += letter
        else:
            found.append(letter)
    return found


def _file_of(cluster: str) -> str | None:
    """Return the first font that has the whole cluster, or else its first letter."""
    visible = [c for c in cluster if unicodedata.category(c) not in ("Cf", "Mn", "Zs")] or [" "]
    whole = (file for file in _FILES if all(_has(file, letter) for letter in visible))
    begun = (file for file in _FILES if _has(file, visible[0]))
    return next(whole, None) or next(begun, None)


def _drawable(cluster: str, width: int) -> list[str]:
    """Return the cluster, or the codes of its letters if no font has it."""
    if _file_of(cluster):
        return [cluster]
    codes = [f"[U+{ord(letter):04X}]" for letter in cluster]
    return codes if _width(codes[0]) <= width else list("".join(codes))


def _pieces(word: str, width: int) -> list[tuple[bool, str]]:
    """Return the unbreakable parts of a word, as (preceded by a space, part)."""
    parts: list[str] = []
    for cluster in (drawn for c in _clusters(word) for drawn in _drawable(c, width)):
        last = parts[-1] if parts else ""
        apart = _is_wide(cluster) or cluster.startswith("[U+") or (last and _is_wide(last[-1]))
        held = cluster in _CLOSING or (last and last[-1] in _OPENING)
        if last and (not apart or held) and _width(last + cluster) <= width:
            parts[-1] += cluster
        else:
            parts.append(cluster)
    return [(not i, part) for i, part in enumerate(parts)]


def _is_wide(text: str) -> bool:
    return unicodedata.east_asian_width(text[0]) in "WF" and _file_of(text[0]) == _FILES[1]


def _runs(text: str) -> list[tuple[str, str]]:
    """Return the text in parts of one font, as (file, part)."""
    runs: list[tuple[str, str]] = []
    for cluster in _clusters(text):
        file = _file_of(cluster) or _FILES[0]
        if runs and runs[-1][0] == file:
            runs[-1] = (file, runs[-1][1] + cluster)
        else:
            runs.append((file, cluster))
    return runs


def _width(text: str) -> float:
    return sum(_font(file).getlength(_visual(part)) for file, part in _runs(text)) / _FINER


def _visual(text: str) -> str:
    """Return the text as the font takes it. Without FriBiDi, right-to-left parts are reversed."""
    if _can_shape():
        return text
    part = r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]"
    return re.sub(rf"{part}(?:[{part[1:-1]}\s]*{part})?", lambda m: m[0][::-1], text)
