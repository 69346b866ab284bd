"""docs/compatibility.md is what the published configs give today."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import compatibility


def test_the_page_is_what_its_tool_makes():
    rows = [*compatibility.language_models(), *compatibility.pipelines()]
    assert compatibility.PAGE.read_text() == compatibility.page(rows), (
        "run python tools/compatibility.py"
    )
    assert {row.works for row in rows} == {"opens, trains, exports", "opens", "refused"}
