"""Pictures to look at: rows of images on one sheet, with a line of text over each."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

GAP = 4
LINE = 12  # pixels of a caption


def grid(
    rows: Sequence[Sequence[UInt8[np.ndarray, "Y X 3"]]],
    captions: Sequence[str] = (),
    headers: Sequence[str] = (),
    least: int = 0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Images row by row on white, each centred in its cell; a caption stands over its whole row.

    `headers` stand over the columns. Images smaller than `least` pixels are enlarged by whole
    factors, without smoothing. All cells are as large as the largest image.
    """
    rows = [[_enlarged(np.asarray(image), least) for image in row] for row in rows]
    height = max(image.shape[0] for row in rows for image in row) + GAP
    width = max(image.shape[1] for row in rows for image in row) + GAP
    top, line = (LINE if headers else 0), (LINE if captions else 0)
    size = (width * max(map(len, rows)) + GAP, top + (height + line) * len(rows) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, header in enumerate(headers):
        draw.text((GAP + column * width, 0), _cut(header, width), fill="black")
    for i, row in enumerate(rows):
        y = top + i * (height + line)
        if captions:
            draw.text((GAP, y), _cut(captions[i], size[0] - GAP), fill="black")
        for column, image in enumerate(row):
            place = (GAP + column * width, y + line + GAP // 2)
            sheet.paste(Image.fromarray(image), place)
    return np.asarray(sheet)


def to_pixels(images: np.ndarray) -> UInt8[np.ndarray, "*b Y X 3"]:
    """Floats in [-1, 1] as uint8; what lies outside is cut."""
    images = np.nan_to_num(np.asarray(images, np.float32), nan=-1.0)
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _enlarged(image: np.ndarray, least: int) -> np.ndarray:
    factor = max(1, -(-least // max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _cut(text: str, width: int) -> str:
    """As much of a text as fits; a letter of Pillow's own font takes 6 pixels."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    room = max(1, width // 6)
    return text if len(text) <= room else text[: room - 1] + "."
