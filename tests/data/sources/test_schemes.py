"""The table of schemes: each serves texts, pictures or both, and messages name those that do."""

import pytest

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import SCHEMES, open_images, open_records


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
