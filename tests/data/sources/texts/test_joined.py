"""Joined records: the records of each part and their places, in order."""

import json

from jaxft.data.sources.texts.joined import JoinedRecords, locate
from jaxft.data.sources.texts.json_files import JsonRecords


def test_each_part_keeps_its_records_and_places(tmp_path):
    parts = []
    for name, count in (("a", 2), ("b", 1), ("c", 3)):
        file = tmp_path / name
        file.write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(count)))
        parts.append(JsonRecords(name, file))
    records = JoinedRecords("all", parts)
    texts = ["a0", "a1", "b0", "c0", "c1", "c2"]
    assert [records[i]["text"] for i in range(len(records))] == texts
    assert [records.where(i)[-3:] for i in range(6)] == ["a:1", "a:2", "b:1", "c:1", "c:2", "c:3"]
    assert repr(records) == "JoinedRecords('all', 6 records)"


def test_locate():
    assert [locate([2, 3, 6], i) for i in range(6)] == [
        (0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip
