"""Renamed fields: new names for those in the file, and one line for what cannot be renamed."""

import json

import pytest

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_records


@pytest.fixture
def spec(tmp_path):
    rows = [{"question": "q", "answer": "a", "text": "t"}, {"question": "r", "text": "u"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl")


def test_fields_get_new_names(spec):
    records = open_records(spec, "prompt=question, completion = answer")
    assert records[0] == {"text": "t", "prompt": "q", "completion": "a"}
    assert records[1] == {"text": "u", "prompt": "r"}
    assert len(records) == 2 and records.where(1).endswith(":2")


def test_a_new_name_replaces_a_field_and_names_may_swap(spec):
    assert open_records(spec, "text=answer")[0] == {"question": "q", "text": "a"}
    swapped = open_records(spec, "question=answer,answer=question")
    assert swapped[0] == {"text": "t", "question": "a", "answer": "q"}


def test_a_set_with_none_of_the_fields_stays_as_it_is(spec):
    """It may be the other part of a mixture."""
    assert open_records(spec, "prompt=body,text=body")[0]["text"] == "t"


@pytest.mark.parametrize("columns", ["prompt", "prompt=", "=a", "a=b,a=c"])
def test_a_list_in_another_form_is_refused(spec, columns):
    with pytest.raises(UserError, match="expected pairs of a new name"):
        open_records(spec, columns)


def test_an_unknown_field_is_named_with_those_found(spec):
    with pytest.raises(UserError, match=r"a.jsonl:1: .*'body'; found 'question', 'answer', 'text'"):
        open_records(spec, "prompt=body,completion=answer")
