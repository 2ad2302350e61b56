"""Matrix products in plain JAX. An operand is values and scales; its block shape is (0, 0) if it has no scales."""

import jax
import jax.numpy as jnp

from jaxkern.reference.quantize import expand_blocks


def gemm(a, a_scales, b, b_scales, accumulator, *, a_block, b_block, transpose_a, transpose_b, accumulate, out_dtype):
    """a [batch, m, k], b [batch or 1, n, k], or each stored the other way round -> [batch, m, n]."""
    a, b = _plain(a, a_scales, a_block), _plain(b, b_scales, b_block)
    a = a.swapaxes(1, 2) if transpose_a else a
    b = b.swapaxes(1, 2) if transpose_b else b
    b = jnp.broadcast_to(b, (a.shape[0], *b.shape[1:]))
    out = jnp.einsum("bmk,bnk->bmn", a, b, precision="highest")
    if accumulate:
        out += accumulator.astype(jnp.float32)
    return (out.astype(out_dtype),)


def grouped_gemm(a, a_scales, b, b_scales, group_sizes, *, a_block, b_block, transpose_b, group_alignment, out_dtype):
    """a [1, m, k], b [g, n, k] or, transposed, [g, k, n] -> [m, n]."""
    a, b = _plain(a, a_scales, a_block)[0], _plain(b, b_scales, b_block)
    b = b if transpose_b else b.swapaxes(1, 2)
    starts, sizes, owner = groups_of(group_sizes, group_alignment, a.shape[0])
    a = jnp.where(owner[:, None] >= 0, a, 0)
    spans = jnp.diff(starts, append=a.shape[0])  # the gap after a group counts as its own: it is zero
    out = jax.lax.ragged_dot(a, b, spans, precision="highest")
    return (jnp.where(owner[:, None] >= 0, out, 0).astype(out_dtype),)


def k_grouped_gemm(a, b, group_sizes, accumulator, *, group_alignment, accumulate):
    """a [t, m], b [t, n] -> [g, m, n]."""
    _, _, owner = groups_of(group_sizes, group_alignment, a.shape[0])
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)

    def one(group):
        mine = (owner == group)[:, None]
        return jnp.einsum("tm,tn->mn", jnp.where(mine, a, 0), jnp.where(mine, b, 0), precision="highest")

    out = jax.lax.map(one, jnp.arange(group_sizes.shape[0], dtype=jnp.int32))
    return (out + accumulator if accumulate else out,)


def groups_of(group_sizes, alignment, rows):
    """Each group's start [g] and size [g], cut to what `rows` holds, and each row's group [rows], -1 for no group."""

    def place(start, size):
        size = jnp.clip(size, 0, rows - start)
        end = start + size
        return jnp.minimum(end + (-end) % alignment, rows), (start, size)

    first = jax.lax.full_like(group_sizes, 0, shape=())
    _, (starts, sizes) = jax.lax.scan(place, first, group_sizes)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    inside = (row >= starts) & (row < starts + sizes)
    owner = jnp.where(inside.any(1), jnp.argmax(inside, axis=1).astype(jnp.int32), -1)
    return starts, sizes, owner


def _plain(values, scales, block):
    values = values.astype(jnp.float32)
    return values if tuple(block) == (0, 0) else values * expand_blocks(scales.astype(jnp.float32), block, values.shape)
