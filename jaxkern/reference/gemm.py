"""Matrix products in plain JAX. An operand is values and scales; its block shape is (0, 0) if it has no scales."""

import jax
import jax.numpy as jnp

from jaxkern.reference.groups import groups_of
from jaxkern.reference.quantize import expand_blocks

SHORT = 512  # of k


def gemm(a, a_scales, b, b_scales, accumulator, *, a_block, b_block, transpose_a, transpose_b, accumulate, out_dtype):
    """a [batch, m, k], b [batch or 1, n, k], or each stored the other way round -> [batch, m, n]."""
    halves = a.dtype == b.dtype and a.dtype.itemsize == 2  # of these a GPU has products, with sums in float32
    if not halves:
        a, b = _plain(a, a_scales, a_block), _plain(b, b_scales, b_block)
    a = a.swapaxes(1, 2) if transpose_a else a
    b = b.swapaxes(1, 2) if transpose_b else b
    b = jnp.broadcast_to(b, (a.shape[0], *b.shape[1:]))
    out = jnp.einsum("bmk,bnk->bmn", a, b, precision="highest", preferred_element_type=jnp.float32)
    # Or XLA may add parts of a sum in bfloat16; a short one it does not split, and rounds it where it multiplies.
    short = isinstance(a.shape[2], int) and a.shape[2] <= SHORT  # a symbolic one cannot be compared
    out = jax.lax.optimization_barrier(out) if halves and not short else out
    if accumulate:
        out += accumulator.astype(jnp.float32)
    return (out.astype(out_dtype),)


def grouped_gemm(
    a,
    a_scales,
    b,
    b_scales,
    group_sizes,
    *,
    a_block,
    b_block,
    transpose_b,
    group_alignment,
    group_stride,
    zero_gaps,
    out_dtype,
):
    """a [1, m, k], b [g, n, k] or, transposed, [g, k, n] -> [m, n]; rows in no group are zero anyway."""
    a, b = _plain(a, a_scales, a_block)[0], _plain(b, b_scales, b_block)
    b = b if transpose_b else b.swapaxes(1, 2)
    starts, _, owner = groups_of(group_sizes, a.shape[0], group_alignment, group_stride)
    a = jnp.where(owner[:, None] >= 0, a, 0)
    spans = jnp.diff(starts, append=a.shape[0])  # the gap after a group counts as its own: it is zero
    everywhere = jax.typeof(a).sharding.update(spec=jax.sharding.PartitionSpec(None, None))  # it infers none
    out = jax.lax.ragged_dot(a, b, spans, precision="highest", out_sharding=everywhere)
    return (jnp.where(owner[:, None] >= 0, out, 0).astype(out_dtype),)


def k_grouped_gemm(
    a, a_scales, b, b_scales, group_sizes, accumulator, *, a_block, b_block, group_alignment, group_stride, accumulate
):
    """a [t, m], b [t, n] or, with scales, a [m, t], b [n, t] -> [g, m, n]."""
    a, b = _plain(a, a_scales, a_block), _plain(b, b_scales, b_block)
    if tuple(a_block) != (0, 0):
        a, b = a.T, b.T
    _, _, owner = groups_of(group_sizes, a.shape[0], group_alignment, group_stride)

    def one(group):
        mine = (owner == group)[:, None]
        return jnp.einsum("tm,tn->mn", jnp.where(mine, a, 0), jnp.where(mine, b, 0), precision="highest")

    out = jax.lax.map(one, jnp.arange(group_sizes.shape[0], dtype=jnp.int32))
    return (out + accumulator if accumulate else out,)


def _plain(values, scales, block):
    values = values.astype(jnp.float32)
    return values if tuple(block) == (0, 0) else values * expand_blocks(scales.astype(jnp.float32), block, values.shape)
