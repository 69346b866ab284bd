"""docs/api.md is what tools/api.py writes from the docstrings."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_the_api_is_that_of_the_docstrings():
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "tools" / "api.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text() == tool.page(), "run python tools/api.py"
    for name in ("jaxft.finetune(config", "### generate", "### sample", "### metrics"):
        assert name in tool.page()
