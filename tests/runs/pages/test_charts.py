"""Curves as SVG: what is in range, what is thinned, and what is left out."""

import re
from xml.etree import ElementTree

import pytest

from jaxft.runs.pages.charts import HEIGHT, POINTS, WIDTH, Series, chart, short, smoothed


def numbers(figure):
    return [float(x) for d in re.findall(r' d="M([^"]*)"', figure) for x in re.split("[LHM ]", d)]


def test_a_chart_is_whole_xml_with_points_inside_the_drawing():
    steps = list(range(1, 2001))
    losses = [5 / step for step in steps]
    losses[1000] = 1e6  # one step that must not flatten the others
    figure = chart("<Loss> & more", [*smoothed("training", steps, losses[:500] + losses[500:])])
    tree = ElementTree.fromstring(figure)
    assert tree.find("figcaption").text == "<Loss> & more"
    assert all(0 <= x <= max(WIDTH, HEIGHT) for x in numbers(figure))
    for path in tree.iter("path"):
        assert path.get("d").count("L") <= POINTS


def test_dots_have_their_step_and_value():
    figure = chart("Loss", [Series("held out", [0, 10], [2.0, 1.0], "dots")])
    titles = [one.text for one in ElementTree.fromstring(figure).iter("title")]
    assert titles == ["step 0: 2", "step 10: 1"]


@pytest.mark.parametrize(
    "series", [[], [Series("a", [], [])], [Series("a", [1], [1.0])]], ids=["none", "empty", "one"]
)
def test_fewer_than_two_points_are_no_curve(series):
    assert chart("Loss", series) == ""


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [-3.0, -3.0], [1e-9, 1e9]])
def test_any_range_can_be_drawn(values):
    ElementTree.fromstring(chart("a", [Series("a", [0, 1], values)]))


def test_the_average_of_a_constant_is_the_constant():
    average, single = smoothed("training", list(range(40)), [2.0] * 40)
    assert set(average.values) == {2.0} and single.look == "faint"
    assert len(smoothed("training", [0, 1], [1.0, 2.0])) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234, "1234"), (12345, "12.3k"), (2.5e6, "2.5M"), (0.25, "0.25"),
     (1.5e-4, "1.5e-4"), (1e-5, "1e-5"), (-3e-4, "-3e-4")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short(value) == text
