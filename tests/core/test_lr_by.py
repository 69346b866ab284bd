"""Learning rates by regex: factors of the first match, and refusals."""

import numpy as np
import pytest

from jaxft.core import optim
from jaxft.core.errors import UserError
from tests.core.test_optim import LEAVES, arrays, run


def test_the_first_regex_that_matches_a_path_gives_its_factor():
    factors = optim.lr_factors(r"layers\.[qo]_proj.kernel=0.1,layers.*=1e-2, .*embedding=2", LEAVES)
    assert factors.keys() == LEAVES.keys()
    assert factors["layers.q_proj.kernel"] == 0.1 and factors["layers.norm.scale"] == 0.01
    assert factors["embed_tokens.embedding"] == 2 and factors["norm.scale"] == 1
    assert optim.lr_factors(r"(?=l)l.{1,9}\.kernel=3", LEAVES)["lm_head.kernel"] == 3
    assert optim.lr_factors("", LEAVES) == {}


@pytest.mark.parametrize("text", ["layers.*", "layers.*=fast", "=3", ","])
def test_another_form_is_refused(text):
    with pytest.raises(UserError, match=r"is not of the form REGEX=0\.1, REGEX=2"):
        optim.lr_factors(text, LEAVES)


def test_a_regex_without_a_parameter_lists_paths():
    with pytest.raises(UserError, match=r"optim.lr_by='head' matches no .* like: embed_tokens.emb"):
        optim.lr_factors("layers.*=2, head=3", LEAVES)
    with pytest.raises(UserError, match=r"optim.lr_by='\(' is not a regular expression"):
        optim.lr_factors("(=3", LEAVES)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "lion", "muon"])
def test_each_parameter_moves_by_its_own_rate(name):
    """Weight decay is multiplied too, as in a parameter group of torch."""
    params, grads, found = arrays(0), [arrays(1)], []
    factors = optim.lr_factors("layers.*=0.5, .*embedding=0", LEAVES)
    for given in (optim.NO_FACTORS, factors):
        tx = optim.make_optimizer(
            name, lambda k: 1e-2, b1=0.9, b2=0.99, weight_decay=0.1, clip=1.0, leaves=LEAVES,
            factors=given,
        )  # fmt: skip
        found.append(run(tx, params, grads))
    for path, x in params.items():
        whole, own = (after[path] - x for after in found)
        np.testing.assert_allclose(own, factors[path] * whole, atol=5e-7, err_msg=path)


def test_prodigy_has_one_rate():
    keys = {"schedule": "constant", "warmup": "0_steps", "weight_decay": 0.0, "clip": 1.0}
    with pytest.raises(UserError, match="prodigy finds one step size"):
        optim.check_optimizer(optim.Optim("prodigy", 1.0, lr_by="a=2", **keys), "float32")
