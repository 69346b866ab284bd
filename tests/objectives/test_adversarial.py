"""Two losses of one image: their pulls, the adaptive weight, and what flows where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives.adversarial import MOST_WEIGHT, adaptive_weight, hinge, pull, steer

X = jax.random.normal(jax.random.key(0), (2, 3, 3, 2))


def test_steer_is_nothing_with_a_gradient():
    slope = jax.random.normal(jax.random.key(1), X.shape)
    value, gradient = jax.value_and_grad(lambda x: steer(2 * x, slope))(X)
    assert value == 0
    np.testing.assert_allclose(gradient, 2 * slope, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda s: steer(X, s))(slope), 0)


def test_pull_keeps_the_terms_and_lets_nothing_back():
    def loss(y):
        return {"a": jnp.sum(y**2), "b": 3 * jnp.sum(y)}

    made = pull(loss, X)
    np.testing.assert_allclose(made.gradient, 2 * X + 3, rtol=1e-6)
    np.testing.assert_allclose(made.value, made.terms["a"] + made.terms["b"])
    np.testing.assert_array_equal(jax.grad(lambda x: pull(loss, x).value)(X), 0)


def test_steering_by_a_pull_is_the_gradient_of_the_loss():
    def make(w):
        return jnp.tanh(w * X)

    def loss(y):
        return jnp.sum(jnp.sin(y))

    made = jax.grad(lambda w: steer(make(w), pull(lambda y: {"a": loss(y)}, make(w)).gradient))
    np.testing.assert_allclose(made(0.7), jax.grad(lambda w: loss(make(w)))(0.7), rtol=1e-6)


@pytest.mark.parametrize(("rec", "adv", "wanted"), [(3.0, 1.5, 2.0), (1.0, 0.0, MOST_WEIGHT)])
def test_adaptive_weight_is_a_bounded_ratio(rec, adv, wanted):
    kernel = jnp.ones((2, 2))
    weight = adaptive_weight(lambda k: X @ k, kernel, rec * 1e4 * X, adv * 1e4 * X, jnp.float32(1))
    np.testing.assert_allclose(weight, wanted, rtol=1e-5)


def test_adaptive_weight_is_of_means():
    """taming's 1e-4 joins the norm of a mean's gradient, however many rows the sums have."""
    slope, kernel = 1e-5 * X, jnp.ones((2, 2))
    one = adaptive_weight(lambda k: X @ k, kernel, slope, slope, jnp.float32(1))
    four = adaptive_weight(lambda k: X @ k, kernel, 4 * slope, 4 * slope, jnp.float32(4))
    assert one < 0.9
    np.testing.assert_allclose(one, four, rtol=1e-6)


def test_hinge_by_hand():
    real, fake = jnp.array([[[2.0, 0.5]]]), jnp.array([[[-3.0, 1.0]]])
    np.testing.assert_allclose(hinge(real, fake), [0.5 * (0.25 + 1.0)])
