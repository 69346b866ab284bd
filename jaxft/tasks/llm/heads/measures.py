"""Measures of a classification: F1, and a picture of the confusion of classes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

from jaxft.tasks.common.lettering import LINE, draw_lines, wrap

CELL_SIDE, NAME_WIDTH = 40, 120  # pixels of a cell, and of the names beside and above the cells
MOST_CLASSES = 30  # in a picture
EDGE = 4
DARK = np.array([8, 64, 129])  # colour of a cell that holds all texts of its class


def class_f1(
    truth: Bool[np.ndarray, "n C"], guessed: Bool[np.ndarray, "n C"]
) -> Float[np.ndarray, " C"]:
    """Return 2 TP / (2 TP + FP + FN) of each class.

    It is NaN for a class that is neither true nor guessed for any text.
    """
    right = (truth & guessed).sum(axis=0)
    both = truth.sum(axis=0) + guessed.sum(axis=0)  # 2 TP + FP + FN
    return np.where(both > 0, 2 * right / np.maximum(both, 1), np.nan)


def macro_f1(truth: Bool[np.ndarray, "n C"], guessed: Bool[np.ndarray, "n C"]) -> float:
    """Return the mean of `class_f1` over the classes that occur."""
    each = class_f1(truth, guessed)
    occurs = ~np.isnan(each)
    return float(np.mean(each[occurs])) if occurs.any() else 0.0


def confusion(
    truth: Int[np.ndarray, " n"], guessed: Int[np.ndarray, " n"], size: int
) -> Int[np.ndarray, "C C"]:
    """Return the number of texts by true class (rows) and guessed class (columns)."""
    return np.bincount(truth * size + guessed, minlength=size * size).reshape(size, size)


def confusion_picture(
    counts: Int[np.ndarray, "C C"], names: Sequence[str]
) -> UInt8[np.ndarray, "H W 3"]:
    """Return a table of counts: true classes as rows, guessed ones as columns.

    The colour of a cell is its share of its row. Of more than MOST_CLASSES classes, those with the
    most texts are shown.
    """
    often = np.argsort(-counts.sum(axis=1), kind="stable")[:MOST_CLASSES]
    kept = np.sort(often)
    counts, shown = counts[np.ix_(kept, kept)], [str(names[i]) for i in kept]
    left = NAME_WIDTH + LINE  # a title and the names of columns, and in the other direction of rows
    side = left + CELL_SIDE * len(shown) + EDGE
    sheet = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(sheet)
    draw_lines(sheet, wrap("predicted →", NAME_WIDTH), left, 0, NAME_WIDTH)
    draw_lines(sheet, wrap("true ↓", NAME_WIDTH), EDGE, left - LINE, NAME_WIDTH)
    for i, name in enumerate(shown):
        begin = left + CELL_SIDE * i
        lines = wrap(name, NAME_WIDTH)
        lines = lines._replace(texts=lines.texts[:2])
        top = begin + (CELL_SIDE - LINE * len(lines.texts)) // 2
        draw_lines(sheet, lines, EDGE, top, NAME_WIDTH)
        _draw_upward(sheet, name, begin + (CELL_SIDE - LINE) // 2, LINE, NAME_WIDTH)
        for k, count in enumerate(counts[i]):
            share = count / max(counts[i].sum(), 1)
            colour = (255 + share * (DARK - 255)).astype(int)
            corner = (left + CELL_SIDE * k, begin)
            box = (*corner, corner[0] + CELL_SIDE - 1, corner[1] + CELL_SIDE - 1)
            draw.rectangle(box, tuple(int(one) for one in colour), "#d8d8d8")
            ink = "white" if share > 0.5 else "black"
            middle = (corner[0] + CELL_SIDE // 2, corner[1] + CELL_SIDE // 2)
            draw.text(middle, str(count) if count else "", ink, anchor="mm")
    return np.asarray(sheet)


def _draw_upward(sheet: Image.Image, text: str, left: int, top: int, length: int) -> None:
    """Draw the first line of a text that reads from bottom to top and ends at `top`."""
    strip = Image.new("RGB", (length, LINE), "white")
    lines = wrap(text, length)
    draw_lines(strip, lines._replace(texts=lines.texts[:1]), 0, 0, length)
    sheet.paste(strip.rotate(90, expand=True), (left, top))
