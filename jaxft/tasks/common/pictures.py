"""Sheets of pictures: rows of images, with a line of text over each."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxft.tasks.common.lettering import LINE, draw_lines, wrap

GAP = 4
CELL = 96  # least size of an image in a sheet, in pixels


def grid(
    rows: Sequence[Sequence[UInt8[np.ndarray, "Y X 3"]]],
    captions: Sequence[str] = (),
    headers: Sequence[str] = (),
    least: int = 0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Return a white sheet with the images row by row.

    Each caption stands over its whole row, each header over its column. Both may be in any script,
    and are wrapped to that width. Images smaller than `least` pixels are enlarged by whole factors,
    without smoothing. All cells are as large as the largest image.
    """
    rows = [[_enlarged(np.asarray(image), least) for image in row] for row in rows]
    height = max(image.shape[0] for row in rows for image in row) + GAP
    width = max(image.shape[1] for row in rows for image in row) + GAP
    across = width * max(map(len, rows)) + GAP
    tops = [wrap(header, width - GAP) for header in headers]
    texts = [wrap(caption, across - 2 * GAP) for caption in captions] or [None] * len(rows)
    top = LINE * max((len(lines.texts) for lines in tops), default=0)
    over = [LINE * len(lines.texts) if lines else 0 for lines in texts]
    sheet = Image.new("RGB", (across, top + sum(over) + height * len(rows) + GAP), "white")
    for column, lines in enumerate(tops):
        draw_lines(sheet, lines, GAP + column * width, 0, width - GAP)
    for row, lines, space in zip(rows, texts, over, strict=True):
        if lines:
            draw_lines(sheet, lines, GAP, top, across - 2 * GAP)
        for column, image in enumerate(row):
            place = (GAP + column * width, top + space + GAP // 2)
            sheet.paste(Image.fromarray(image), place)
        top += space + height
    return np.asarray(sheet)


def _enlarged(image: np.ndarray, least: int) -> np.ndarray:
    factor = max(1, -(-least // max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
