"""Sheets of pictures: places, enlargement, captions."""

import numpy as np

from jaxft.tasks.common.lettering import LINE, wrap
from jaxft.tasks.common.pictures import GAP, grid

RED, BLUE = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))


def test_images_lie_in_rows_with_white_between_them():
    sheet = grid([[RED, BLUE], [BLUE]])
    assert sheet.shape == (2 * (8 + GAP) + GAP, 2 * (8 + GAP) + GAP, 3)
    half = GAP // 2
    assert (sheet[half : half + 8, GAP : GAP + 8] == RED).all()
    assert (sheet[half : half + 8, 2 * GAP + 8 : 2 * GAP + 16] == BLUE).all()
    assert (sheet[half + 8 + GAP :, 2 * GAP + 8 :] == 255).all()


def test_small_images_grow_by_whole_factors_without_smoothing():
    checkered = np.array([[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]], np.uint8)
    sheet = grid([[checkered]], least=5)
    assert sheet.shape == (6 + 2 * GAP, 6 + 2 * GAP, 3)
    inside = sheet[GAP // 2 : GAP // 2 + 6, GAP : GAP + 6]
    assert (inside == checkered.repeat(3, 0).repeat(3, 1)).all()


def test_captions_and_headers_take_lines_of_their_own():
    plain = grid([[RED]], least=64)
    captioned = grid([[RED]], ["a red"], ["made"], 64)
    assert captioned.shape[0] == plain.shape[0] + 2 * LINE and captioned.shape[1] == plain.shape[1]
    assert (captioned[:LINE] < 255).any() and (captioned[LINE : 2 * LINE] < 255).any()
    assert (captioned[2 * LINE :] == plain).all()


def test_long_captions_are_wrapped_to_their_row_and_headers_to_their_column():
    text = "a red square, and much more text than fits"
    plain, captioned = grid([[RED], [BLUE]], least=64), grid([[RED], [BLUE]], [text, "b"], (), 64)
    lines = len(wrap(text, 64).texts)
    assert lines > 3 and captioned.shape[0] == plain.shape[0] + (lines + 1) * LINE
    at = lines * LINE + GAP // 2
    assert (captioned[at : at + 64, GAP : GAP + 64] == (255, 0, 0)).all()
    at += 64 + GAP + LINE
    assert (captioned[at : at + 64, GAP : GAP + 64] == (0, 0, 255)).all()
    headed = grid([[RED, BLUE]], (), ["the first of two columns", "b"], 64)
    above = headed[:-72]
    assert above.shape[0] > 2 * LINE and (above[LINE:, 64 + 2 * GAP :] == 255).all()


def test_case_img_16_captions_in_any_script_are_told_apart():
    first, second = (grid([[RED]], [text], least=96) for text in ("猫と家", "犬と木"))
    assert first.shape == second.shape and (first != second).any()
