"""The sum that has one order: its value and gradients, at widths that halve evenly and others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern import sum_in_order


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 96, 100, 1536])
def test_sum_in_order(width):
    x = np.random.default_rng(width).integers(-1000, 1000, (2, 3, width)).astype(np.float32)  # sums are exact
    np.testing.assert_array_equal(sum_in_order(x), x.sum(-1, keepdims=True))


def test_the_order_is_of_halves():
    x = np.array([1e8, 1.0, 3.0, -1e8, 2.0, 5.0, 0.5], np.float32)
    a, b, c, d = x[0] + x[4], x[1] + x[5], x[2] + x[6], x[3]
    want = np.float32(np.float32(a + c) + np.float32(b + d))
    assert want != np.float32(x.astype(np.float64).sum())  # another order has another sum
    for rows in range(1, 9):
        np.testing.assert_array_equal(jax.jit(sum_in_order)(np.tile(x, (rows, 1))), np.full((rows, 1), want))


def test_gradient():
    x, g = jnp.ones((2, 5)), jnp.array([[2.0], [-3.0]])
    (got,) = jax.vjp(sum_in_order, x)[1](g)
    np.testing.assert_array_equal(got, np.broadcast_to(g, (2, 5)))
    np.testing.assert_array_equal(jax.jvp(sum_in_order, (x,), (x,))[1], np.full((2, 1), 5.0))


def test_a_row_of_none():
    np.testing.assert_array_equal(sum_in_order(jnp.zeros((3, 0))), np.zeros((3, 1)))
    np.testing.assert_array_equal(jax.grad(lambda x: sum_in_order(x).sum())(jnp.zeros((3, 0))), np.zeros((3, 0)))
