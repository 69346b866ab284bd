"""Five steps of every task, their exports and their samples are what they were, bit for bit."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import golden
from golden_figures import differences, tensor_figures
from safetensors.numpy import save_file

STORED = golden.read_figures()
HERE = golden.machine()
EXACT = STORED["machine"] == HERE


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Processes that live as long as there are cases; each pytest worker has its own."""
    with golden.Workers(tmp_path_factory.mktemp("golden")) as made:
        yield made


def test_every_case_is_stored():
    assert STORED["cases"].keys() == golden.CASES.keys()


def test_the_figures_are_of_this_kind_of_machine():
    """Shows in the summary that nothing was compared bit for bit."""
    if not EXACT:
        pytest.skip(f"within tolerances: stored on {STORED['machine']}, this is {HERE}")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if case.slow else [])
        for name, case in golden.CASES.items()
    ],
)
def test_the_figures_are_as_stored(workers, name):
    made = workers.run(name).figures
    lines = differences(STORED["cases"][name], made, EXACT, name)
    assert not lines, "\n".join(lines)


# ---- the comparison can fail --------------------------------------------------------------------

FIGURES = {
    "losses": [(1.0).hex(), (2.0).hex()],
    "exports": {"model.safetensors": {"tensors": 2, "norm": (8.0).hex(), "sha256": "a"}},
    "samples": {"printed": "stone", "sample-000.png": {"shape": [4, 4, 3], "sha256": "b"}},
}
TENSORS = ("exports", "model.safetensors")
PICTURE = ("samples", "sample-000.png")


def changed(keys, value):
    """A copy of FIGURES with another value under these keys, or without it."""
    figures = copy.deepcopy(FIGURES)
    node = figures
    for key in keys[:-1]:
        node = node[key]
    if value is None:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    return figures


def test_equal_figures_have_no_difference():
    for exact in (True, False):
        assert differences(FIGURES, copy.deepcopy(FIGURES), exact) == []


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("losses",), [(1.0).hex()]),
        (("losses", 1), (2.00001).hex()),
        (("losses", 1), float("nan").hex()),
        ((*TENSORS, "tensors"), 3),
        ((*TENSORS, "norm"), (8.002).hex()),
        (("exports", "config.json"), {"sha256": "c"}),
        (TENSORS, None),
        (PICTURE, None),
        ((*PICTURE, "shape"), [4, 8, 3]),
        (("samples", "printed"), None),
    ],
)
def test_these_differ_on_every_machine(keys, value, exact):
    assert len(differences(FIGURES, changed(keys, value), exact)) == 1


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("losses", 1), np.nextafter(2.0, 3.0).item().hex()),
        ((*TENSORS, "norm"), (8.0001).hex()),
        ((*TENSORS, "sha256"), "b"),
        ((*PICTURE, "sha256"), "a"),
        (("samples", "printed"), "river"),
    ],
)
def test_these_differ_on_the_same_kind_of_machine_alone(keys, value):
    assert len(differences(FIGURES, changed(keys, value), exact=True)) == 1
    assert differences(FIGURES, changed(keys, value), exact=False) == []


def test_a_checksum_covers_names_shapes_and_bytes(tmp_path):
    def checksum(tensors):
        save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
        return tensor_figures(tmp_path / "a.safetensors")

    x = np.arange(6, dtype=np.float32)
    whole = {"a": x, "b": 2 * x}
    figures = checksum(whole)
    assert figures["tensors"] == 2 and float.fromhex(figures["norm"]) == np.sqrt(5 * 55.0)
    assert checksum({"b": 2 * x, "a": x}) == figures, "the order in the file does not count"
    others = [{"a": x, "c": 2 * x}, {"a": x.reshape(2, 3), "b": 2 * x}, {"a": x, "b": 2 * x + 1}]
    assert all(checksum(other)["sha256"] != figures["sha256"] for other in others)
