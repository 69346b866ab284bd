"""Specs of mixtures: parts and shares, or one line for weights that mean nothing."""

import pytest

from jaxft.core.errors import UserError
from jaxft.data.sources.mixtures import Mixture, read_mixture


@pytest.mark.parametrize(
    ("spec", "specs", "shares"),
    [
        ("jsonl:a.jsonl", ("jsonl:a.jsonl",), ()),
        ("a/*.jsonl", ("a/*.jsonl",), ()),
        ("2*.csv", ("2*.csv",), ()),
        ("0.7*jsonl:a.jsonl + 0.3*hf:b", ("jsonl:a.jsonl", "hf:b"), (0.7, 0.3)),
        ("3 * a.csv  +  1 * b/*.csv", ("a.csv", "b/*.csv"), (0.75, 0.25)),
        ("1e-1*a + .3*b", ("a", "b"), (0.25, 0.75)),
        ("a.csv + *.json + dir/*.csv", ("a.csv", "*.json", "dir/*.csv"), ()),
        ("a+b.csv", ("a+b.csv",), ()),
    ],
)
def test_parts_and_shares(spec, specs, shares):
    mixture = read_mixture(spec)
    assert mixture.specs == specs and mixture.shares == pytest.approx(shares)


def test_a_file_with_a_plus_in_its_name_is_one_source(tmp_path):
    file = tmp_path / "a + b.csv"
    file.write_text("x")
    assert read_mixture(str(file)) == Mixture((str(file),))


@pytest.mark.parametrize("spec", ["0*a + 1*b", "-1*a + 2*b", "0.5*a + b", "1..2*a + 1*b"])
def test_weights_are_positive_numbers_of_all_parts(spec):
    with pytest.raises(UserError, match="needs a positive weight, as in"):
        read_mixture(spec)
