"""Sheets of pictures: places, enlargement, captions, and floats as grey levels."""

import numpy as np

from jaxft.core.pictures import GAP, LINE, grid, to_pixels

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
    captioned = grid([[RED]], ["a red square, and much more text than fits"], ["made"], 64)
    assert captioned.shape[0] == plain.shape[0] + 2 * LINE and captioned.shape[1] == plain.shape[1]
    assert (captioned[:LINE] < 255).any() and (captioned[LINE : 2 * LINE] < 255).any()


def test_any_letter_can_stand_in_a_caption():
    assert grid([[RED]], ["日本 ♥"], least=64).size


def test_floats_become_grey_levels_and_nan_black():
    found = to_pixels(np.array([-1.0, 0.0, 1.0, 2.0, -9.0, np.nan]))
    assert found.tolist() == [0, 128, 255, 255, 0, 0]
