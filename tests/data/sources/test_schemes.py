"""The table of schemes: each serves texts, pictures or both, and messages name those that do."""

import pytest

from jaxft.core.configs.files import PACKAGE
from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import SCHEMES, open_images, open_records
from jaxft.demo import DEMOS
from tests.data.sources.sayings import one_line_error, write


@pytest.mark.parametrize("name", SCHEMES)
def test_a_message_names_the_schemes_of_its_kind(name):
    """A scheme of the other kind is refused as an unknown one is."""
    scheme = SCHEMES[name]
    assert scheme.form.startswith(f"{name}:") and (scheme.texts or scheme.images)
    for opener, serves in ((open_records, scheme.texts), (open_images, scheme.images)):
        with pytest.raises(UserError, match="unknown") as caught:
            opener("nothing:at-all")
        assert (scheme.form in str(caught.value)) == bool(serves)
        if not serves:
            with pytest.raises(UserError, match=f"unknown .* source '{name}:x': expected "):
                opener(f"{name}:x")


def test_a_demo_of_texts_is_no_demo_of_pictures():
    assert len(open_records("demo:supersense/valid")) and len(open_images("demo:stickers/valid"))
    with pytest.raises(UserError, match="unknown demo images 'demo:supersense/valid'"):
        open_images("demo:supersense/valid")


@pytest.mark.parametrize(
    "spec",
    ["jsonl:{}/none.jsonl", "jsonl:{}", "text:{}/none.txt", "text:{}", "text:{}/zero.md"],
)
def test_missing_and_empty_sets_name_what_was_asked(tmp_path, spec):
    write(tmp_path / "zero.md", b"")
    spec = spec.format(tmp_path)
    assert spec.partition(":")[2] in one_line_error(lambda: open_records(spec))


@pytest.mark.parametrize("spec", ["", "jsonl:", "csv:a.csv", "tfds:", "tfds:@d"])
def test_unknown_specs_list_the_known_ones(spec):
    assert "tfds:NAME[:SPLIT]" in one_line_error(lambda: open_records(spec))


def test_a_bare_path_is_read_by_its_extension(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "x"}')
    assert open_records(path)[0] == open_records(f"jsonl:{path}")[0] == {"text": "x"}


def test_demo_sets_hold_what_their_names_say():
    train, valid = (open_records(f"demo:supersense/{split}") for split in ("train", "valid"))
    assert (len(train), len(valid)) == (6_000, 600)
    rows = [[records[i] for i in range(len(records))] for records in (train, valid)]
    assert all(set(row) == {"text", "label"} and row["text"] for part in rows for row in part)
    labels = [{row["label"] for row in part} for part in rows]
    assert len(labels[0]) == 25 and labels[1] <= labels[0]
    assert not {row["text"] for row in rows[0]} & {row["text"] for row in rows[1]}
    # Shuffled: the first rows are not of one class, as they are in the source's order.
    assert len({row["label"] for row in rows[0][:64]}) > 10
    novel = [open_records(f"demo:novel/{split}")[0]["text"] for split in ("train", "valid")]
    assert novel[0].startswith("Persuasion") and novel[1].rstrip().endswith("Finis")
    assert 0.85 < len(novel[0]) / sum(map(len, novel)) < 0.95


def test_demo_names_are_listed_and_the_folder_stays_small():
    message = one_line_error(lambda: open_records("demo:supersense"))
    assert all(f"demo:{name.partition('.')[0]}" in message for name in DEMOS["texts"])
    text_parts = [PACKAGE / "demo" / name for name in ("supersense", "novel")]
    assert sum(p.stat().st_size for part in text_parts for p in part.iterdir()) < 2_000_000
    notice = (PACKAGE / "demo" / "NOTICE.md").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice
    assert "public domain" in notice
