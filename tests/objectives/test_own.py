"""A loss of the user's own keeps the units of the task, and must have the form of a loss."""

import jax.numpy as jnp
import pytest

from jaxft.core.errors import UserError
from jaxft.objectives.next_token import NextToken
from jaxft.objectives.own import OwnLoss

TASK = NextToken(jnp.float32, 8, 8, token_flops=5.0)
ONE = jnp.float32(1)


def made(value):
    return OwnLoss(TASK, lambda *_: value)


def test_units_and_flops_are_those_of_the_task():
    own = made(((ONE, ONE), {}))
    assert own.unit == "tokens" and own.flops({}) == TASK.flops({})
    assert own.units({"segment_ids": jnp.array([[1, 1, 0]])}) == 2
    assert own.loss(None, {}, None, None) == ((ONE, ONE), {})


def test_the_function_has_the_objective_with_the_remat_of_the_step():
    own = OwnLoss(TASK, lambda task, *_: ((ONE, ONE), {task.remat: ONE}), remat="full")
    assert own.loss(None, {}, None, None)[1] == {"full": ONE}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (ONE, r"it returned an array of shape \(\)"),
        ((ONE, ONE), r"it returned \(an array of shape \(\), an array of shape \(\)\)"),
        (((jnp.ones(3), ONE), {}), r"\(\(an array of shape \(3,\), an array"),
        (((ONE, 1.0), {}), r"float\), dict\)"),
        (None, "it returned NoneType"),
    ],
    ids=["scalar", "pair", "per row", "float", "none"],
)
def test_another_form_is_refused(value, told):
    with pytest.raises(UserError, match=r"must return \(\(sum, weight\), metrics\).*" + told):
        made(value).loss(None, {}, None, None)
