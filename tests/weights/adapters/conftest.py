"""The base and the adapter that most tests of PEFT folders read."""

import pytest

from tests.weights.adapters.peft_adapters import ATTENTION, adapted, hf


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder()


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """An adapter of the attention's projections."""
    place = tmp_path_factory.mktemp("plain")
    adapted(hf(folder), ATTENTION).save_pretrained(place)
    return place
