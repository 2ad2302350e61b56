"""Sums in an order that does not depend on how many there are."""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def sum_in_order(x: jax.Array) -> jax.Array:
    """x [..., n] -> [..., 1]: the halves of each row added, then the halves of that.

    XLA:CPU cuts a row into other parts for its own reduction when the number of rows is another. It never changes the
    order of additions that are written out.
    """
    if x.shape[-1] == 0:
        return jnp.zeros_like(x, shape=(*x.shape[:-1], 1))
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        x = x[..., :half] + jnp.pad(x[..., half:], [(0, 0)] * (x.ndim - 1) + [(0, n % 2)])
    return x


@sum_in_order.defjvp
def _(primals, tangents):
    # Transposed it is a broadcast, which has no order.
    return sum_in_order(*primals), tangents[0].sum(-1, keepdims=True)
