"""Keys of the image-token task that no run could use."""

import pytest

from jaxft.core.errors import UserError
from jaxft.tasks.image_tokens.options import TokenSample


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [("temperature", -1.0, "at least 0"), ("top_k", -1, "at least 0"), ("top_p", 0.0, "above 0")],
)
def test_a_number_out_of_range_is_named(key, value, limit):
    with pytest.raises(UserError, match=f"sample.{key}={value} must be {limit}"):
        TokenSample((), 1.0, **{key: value})
