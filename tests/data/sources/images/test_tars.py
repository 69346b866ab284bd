"""Webdataset tars as people make them: repeated keys, foreign files, other endings, splits."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_images


def png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), seed, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def one_line_error(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_repeated_member_is_refused_by_name(tmp_path):
    members = [("a.png", png(0)), ("a.txt", b"x"), ("b.png", png(1)), ("b.txt", b"y")]
    write_tar(tmp_path / "s.tar", [*members, ("a.png", png(2)), ("b.txt", b"z")])
    error = one_line_error(lambda: open_images(f"wds:{tmp_path}/s.tar"))
    assert error.startswith("2 samples are bad: ")
    assert "s.tar:a.png: two members have this name" in error and "s.tar:b.txt: two" in error


def test_a_sample_with_two_pictures_is_refused_by_name(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.png", png()), ("a.jpg", png()), ("a.txt", b"x")])
    error = one_line_error(lambda: open_images(f"wds:{tmp_path}/s.tar"))
    assert "s.tar:a.jpg and a.png are two pictures of one sample" in error
    write_tar(tmp_path / "s.tar", [("a.png", png()), ("a.mask.png", png(1)), ("a.txt", b"x")])
    assert open_images(f"wds:{tmp_path}/s.tar")[0].content == png()


def test_one_key_in_two_tars_is_two_samples(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", [("000.png", png(i)), ("000.txt", b"x")])
    assert len(open_images(f"wds:{tmp_path}/*.tar")) == 2
    assert len(open_images(f"wds:{tmp_path}")) == 2  # a folder of tars


def test_case_img_06_foreign_members_are_no_samples(tmp_path):
    foreign = ["._a.png", "__MACOSX/._a.png", "__MACOSX/b.png", "@eaDir/a.png"]
    foreign += [".ipynb_checkpoints/a-checkpoint.png"]
    members = [("./x/a.png", png()), ("./x/a.txt", b"x"), *((name, png(1)) for name in foreign)]
    write_tar(tmp_path / "s.tar", members)
    write_tar(tmp_path / "._s.tar", [])
    records = open_images(f"wds:{tmp_path}/*.tar")
    assert len(records) == 1 and records.name(0).endswith("s.tar:./x/a.png")


def test_case_img_11_endings_in_tars(tmp_path, capsys):
    members = [
        ("a.jfif", png()),
        ("a.txt", b"x"),
        ("b.heic", b"x"),
        ("b.txt", b"x"),
        ("c.cls", b"1"),
    ]
    write_tar(tmp_path / "s.tar", members)
    records = open_images(f"wds:{tmp_path}/s.tar")
    assert len(records) == 1 and records.left_out[0].name.endswith("s.tar:b.heic")
    assert "1 in formats that are not read (1 .heic" in capsys.readouterr().out


def test_case_img_04_tars_of_several_splits_are_refused(tmp_path):
    for name in ("train-0", "train-1", "dev-0"):
        write_tar(tmp_path / f"{name}.tar", [("a.png", png()), ("a.txt", b"x")])
    error = one_line_error(lambda: open_images(f"wds:{tmp_path}/*.tar"))
    assert "mixes the splits train, validation" in error and "train*" in error
    assert len(open_images(f"wds:{tmp_path}/train-*.tar")) == 2


def test_all_samples_without_a_caption_are_named_at_once(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.png", png()), ("b.png", png()), ("c.png", png())])
    write_tar(tmp_path / "t.tar", [("d.png", png()), ("d.caption", b"fine"), ("e.png", png())])
    error = one_line_error(lambda: open_images(f"wds:{tmp_path}/*.tar"))
    assert error.startswith("4 samples are bad") and "t.tar:e.png has no caption" in error
    assert "d.png" not in error
