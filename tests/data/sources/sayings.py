"""Files of bytes, and the one line of a refusal, for the tests of sources."""

from pathlib import Path

import pytest

from jaxft.core.errors import UserError


def one_line_error(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)
