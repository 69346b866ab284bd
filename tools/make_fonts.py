"""Rebuild jaxft/tasks/common/fonts from Noto and Droid fonts, for captions in any script.

    pip install fonttools && pip download --no-deps manimgx-fonts==2026.9.26.post1
    apt-get download fonts-noto-core fonts-droid-fallback
    python tools/make_fonts.py NOTO_WHEEL_FOLDER NOTO_DEBIAN_FOLDER DROID_DEBIAN_FOLDER

The folders are those packages, unpacked. Noto's fonts are cut to one weight and to the letters that
none before them has, and merged into one font, so that a line of several scripts is shaped whole.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from fontTools import merge, subset
from fontTools.ttLib import TTFont
from fontTools.ttLib.scaleUpem import scale_upem
from fontTools.varLib import instancer

TARGET = Path(__file__).resolve().parent.parent / "jaxft" / "core" / "fonts"
VARIABLE = (
    "", "Hebrew", "Arabic", "Armenian", "Georgian", "Ethiopic", "Devanagari", "Bengali", "Gurmukhi",
    "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao",
    "Khmer", "Myanmar",
)  # fmt: skip
SYMBOLS = range(0x2000, 0x2C00)  # arrows, mathematics, technical signs, boxes, shapes, dingbats
FEATURES = (
    "abvf", "abvm", "abvs", "akhn", "blwf", "blwm", "blws", "calt", "ccmp", "cfar", "cjct", "clig",
    "curs", "dist", "fina", "haln", "half", "init", "isol", "kern", "liga", "locl", "mark", "medi",
    "mkmk", "nukt", "pref", "pres", "psts", "pstf", "rclt", "rkrf", "rlig", "rphf", "vatu",
)  # fmt: skip


def cut(path: Path, letters: set[int]) -> TTFont:
    """The font at weight 400 with some of its letters, 1000 units an em and without hints."""
    font = TTFont(path)
    if "fvar" in font:
        at = {axis.axisTag: 100 if axis.axisTag == "wdth" else 400 for axis in font["fvar"].axes}
        font = instancer.instantiateVariableFont(font, at)
    options = subset.Options(
        hinting=False, glyph_names=False, notdef_outline=True, layout_features=FEATURES
    )
    options.layout_scripts = ["*"]
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=letters)
    subsetter.subset(font)
    if font["head"].unitsPerEm != 1000:
        scale_upem(font, 1000)
    return font


def main(wheel: Path, debian: Path, droid: Path) -> None:
    noto = debian / "usr/share/fonts/truetype/noto"
    emoji = wheel / "manimgx_fonts/NotoEmoji[wght].ttf"
    sources = [wheel / f"manimgx_fonts/NotoSans{name}[wght].ttf" for name in VARIABLE]
    sources += [noto / f"NotoSans{n}-Regular.ttf" for n in ("Symbols", "Symbols2", "Math")]
    TARGET.mkdir(exist_ok=True)
    pictured = set(TTFont(emoji).getBestCmap())
    have = {letter for letter in pictured if letter > 0xFF}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for source in sources:
            letters = set(TTFont(source).getBestCmap()) - have
            if "Symbols" in source.name or "Math" in source.name:
                letters &= set(SYMBOLS)
            have |= letters
            files.append(f"{folder}/{source.name}")
            cut(source, letters).save(files[-1])
        options = merge.Options(drop_tables=["vhea", "vmtx", "STAT", "MATH", "meta", "DSIG"])
        merge.Merger(options=options).merge(files).save(TARGET / "NotoScripts.ttf")
    cut(emoji, pictured).save(TARGET / "NotoEmoji.ttf")
    fallback = "usr/share/fonts-droid-fallback/truetype/DroidSansFallback.ttf"
    shutil.copy(droid / fallback, TARGET)
    for file in sorted(TARGET.glob("*.ttf")):
        print(file.name, file.stat().st_size, len(TTFont(file).getBestCmap()))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
