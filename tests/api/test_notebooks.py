"""The notebooks of docs/examples run from the first cell to the last, as in a Jupyter kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS_ALONE = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")  # variables of tests/conftest.py
NOTEBOOKS = sorted((ROOT / "docs" / "examples").glob("*.ipynb"))


def test_there_are_four_and_the_page_of_the_api_names_them():
    page = (ROOT / "docs" / "api.md").read_text()
    assert len(NOTEBOOKS) == 4 and all(f"examples/{one.name}" in page for one in NOTEBOOKS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_loss_falls(notebook, tmp_path):
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    env = {name: value for name, value in os.environ.items() if name not in TESTS_ALONE}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert shown.returncode == 0, shown.stderr
    (run,) = (one for one in (tmp_path / "runs").iterdir() if one.name != "cache")
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    losses = [record["loss"] for record in records if "loss" in record]
    count = len(losses) // 3
    assert sum(losses[-count:]) < sum(losses[:count])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(notebook):
    """They hold no path of a machine, and no error."""
    cells = [one for one in json.loads(notebook.read_text())["cells"] if one["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    text = json.dumps([output for output in outputs if "image/png" not in output.get("data", {})])
    assert not {"/tmp/", "/home/", "/root/"} & set(text.split("'")) and "/tmp/" not in text
    assert notebook.stat().st_size < 500_000
