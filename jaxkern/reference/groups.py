"""Where the groups of rows lie that grouped products take."""

import jax
import jax.numpy as jnp


def groups_of(group_sizes, rows, alignment, stride=0):
    """Each group's start [g] and size [g], cut to what `rows` holds, and each row's group [rows], -1 for no group.

    A group starts where the one before it ends, rounded up to `alignment`; with a stride group i starts at i * stride
    and is cut at `stride` rows.
    """

    def place(start, size):
        size = jnp.clip(size, 0, rows - start)
        end = start + size
        return jnp.minimum(end + (-end) % alignment, rows), (start, size)

    groups = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
    if stride:
        starts, sizes = groups * stride, jnp.clip(group_sizes, 0, stride)
    else:
        _, (starts, sizes) = jax.lax.scan(place, jax.lax.full_like(group_sizes, 0, shape=()), group_sizes)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    inside = (row >= starts) & (row < starts + sizes)
    return starts, sizes, jnp.where(inside, groups, -1).max(1, initial=-1)
