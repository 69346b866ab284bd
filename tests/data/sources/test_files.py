"""Files of a data set: what systems leave behind is not in it, and splits are not mixed."""

import os
from pathlib import Path, PurePath

import pytest

from jaxft.core.errors import UserError
from jaxft.data.sources.files import (
    SPLIT_KEYWORDS,
    find_files,
    is_hidden,
    refuse_mixed_files,
    refuse_mixed_folders,
    repeat_folders,
    split_of,
    visible_files,
    visible_member,
)

HIDDEN = [
    "._a.png", ".hidden/a.png", "__MACOSX/a.png", ".ipynb_checkpoints/a-checkpoint.png",
    "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "Thumbs.db", ".thumbnails/a.png", ".cache/a.png",
    "@Recycle/a.png", "#recycle/a.png", "lost+found/a.png", "x/y/.a.png", ".DS_Store",
    "$RECYCLE.BIN/a.png", "System Volume Information/a.png", "__pycache__/a.png", "desktop.ini",
]  # fmt: skip
VISIBLE = ["a.png", "x/y/a.png", "../a.png", "__a/b.png", "eaDir/a.png", "a.b/c.png"]


@pytest.mark.parametrize("name", HIDDEN)
def test_case_img_06_what_systems_leave_behind_is_hidden(tmp_path, name):
    assert is_hidden(PurePath(name)) and not visible_member(name)
    write(tmp_path, [name, "b.png"])
    assert visible_files(tmp_path) == [tmp_path / "b.png"]
    assert find_files(str(tmp_path), (".png",)) == (tmp_path, [tmp_path / "b.png"])
    assert find_files(f"{tmp_path}/**/*", ())[1] == [tmp_path / "b.png"]
    assert find_files(f"{tmp_path}/**/.*", ())[1] == []


@pytest.mark.parametrize("name", VISIBLE)
def test_other_names_are_visible(name):
    assert not is_hidden(PurePath(name)) and visible_member(f"./{name}")


def test_a_set_may_stand_in_a_hidden_folder(tmp_path):
    root = tmp_path / ".cache" / "set"
    write(root, ["a.png", "b/c.png"])
    assert visible_files(root) == [root / "a.png", root / "b/c.png"]
    assert find_files(f"{root}/*.png", ()) == (root, [root / "a.png"])
    write(root, [".one.png"])
    assert find_files(f"{root}/.one.png", ())[1] == [root / ".one.png"]  # named itself


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path, ["other/a.png", "set/b.png"])
    os.symlink(tmp_path / "other", tmp_path / "set" / "c")
    os.symlink(tmp_path / "set", tmp_path / "set" / "loop")
    assert visible_files(tmp_path / "set") == [tmp_path / "set/b.png", tmp_path / "set/c/a.png"]


def write(root: Path, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


WORDS = [(word, split) for split, words in SPLIT_KEYWORDS.items() for word in words]


@pytest.mark.parametrize("word, split", WORDS)
def test_case_img_04_every_keyword_of_datasets_is_a_split(word, split):
    for name in (word, f"{word}-00000-of-00001", f"my_{word}", f"{word}2017", f"my.{word.upper()}"):
        assert split_of(name) == split
    for name in (f"{word}x", f"x{word}", "data", "retrieval", "latest", "constrain"):
        assert split_of(name) is None


def refused(check, root, names, scheme="hf"):
    files = sorted(p for p in write(root, names).rglob("*") if p.is_file())
    try:
        check(f"{scheme}:{root}", root, files)
    except UserError as error:
        assert "\n" not in str(error) and "name one, such as" in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.parquet", "eval-0.parquet"),
        ("train/0.parquet", "test/0.parquet"),
        ("training/0.parquet", "dev/0.parquet"),
        ("0.parquet", "val.parquet"),
        ("en/train/0.parquet", "en/testing/0.parquet"),
        ("split=train/0.parquet", "split=validation/0.parquet"),
    ],
)
def test_case_img_04_tables_of_several_splits_are_refused(tmp_path, names):
    assert "mixes the splits" in refused(refuse_mixed_files, tmp_path, names)


@pytest.mark.parametrize(
    "names",
    [
        ("0.parquet", "1.parquet"),
        ("test-0.parquet", "test-1.parquet"),
        ("train-0.parquet", "more.parquet"),
        ("train/eval-set.parquet",),
        ("val2014/0.parquet", "val2017/0.parquet"),
    ],
)
def test_tables_of_one_split_are_read(tmp_path, names):
    assert refused(refuse_mixed_files, tmp_path, names) == ""


def test_a_split_to_name_is_an_example(tmp_path):
    error = refused(refuse_mixed_files, tmp_path, ("train-0.parquet", "val-0.parquet"))
    assert f"hf:{tmp_path}/train*" in error
    error = refused(refuse_mixed_folders, tmp_path, ("train/0.png", "val/0.png"), "folder")
    assert f"folder:{tmp_path}/train;" in error


@pytest.mark.parametrize(
    "names",
    [
        ("train/a.png", "test/a.png"),
        ("train/cat/a.png", "val/cat/a.png"),
        ("images/train2017/a.jpg", "images/val2017/a.jpg"),
        ("cat/train/a.png", "cat/test/a.png", "dog/train/a.png"),
        ("a.png", "val/b.png"),
        ("images/a.png", "validation/b.png"),
        ("one/a.png", "test/a.png"),
        ("cat/a.png", "dog/a.png", "val/a.png"),
        ("train_001.png", "train_002.png", "test_001.png"),
    ],
)
def test_case_img_04_folders_of_several_splits_are_refused(tmp_path, names):
    assert "mixes the splits" in refused(refuse_mixed_folders, tmp_path, names, "folder")


@pytest.mark.parametrize(
    "names",
    [
        ("train/a.png", "bus/a.png"),  # classes
        ("test.png", "train station.png", "cat.png"),
        ("10_test/a.png", "20_train/a.png"),  # kohya's concepts
        ("test/a.png", "test/b.png"),
        ("train/a.png", "a.png"),
    ],
)
def test_folders_of_classes_are_read(tmp_path, names, capsys):
    assert refused(refuse_mixed_folders, tmp_path, names, "folder") == ""
    assert capsys.readouterr().out == ""


def test_a_class_named_test_is_read_and_said(tmp_path, capsys):
    names = ("quiz/a.png", "exam/a.png", "test/a.png")
    assert refused(refuse_mixed_folders, tmp_path, names, "folder") == ""
    assert "test is read as a class" in capsys.readouterr().out


def test_folders_with_repeats(tmp_path):
    files = [tmp_path / name for name in ("10_cat x/a.png", "b/3_dog/c.png", "4/d.png", "5_e.png")]
    assert repeat_folders(tmp_path, files) == ["10_cat x", "3_dog"]
