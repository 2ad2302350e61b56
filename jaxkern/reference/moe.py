"""Routing, and the moves of rows between tokens and experts, in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern.reference.quantize import quantize
from jaxkern.reference.rows import take_rows


def route(scores, bias, *, num_groups, topk_groups, top_k):
    """scores [t, e], bias [e] -> the ids of the chosen experts [t, top_k]."""
    t, experts = scores.shape
    biased = _nan_last(scores + bias)
    groups = biased.reshape(t, num_groups, experts // num_groups)
    group_scores = _nan_last(jax.lax.top_k(groups, min(2, groups.shape[-1]))[0].sum(-1))
    best = jax.lax.top_k(group_scores, topk_groups)[1]
    excluded = (best[:, :, None] != jnp.arange(num_groups)).all(1).repeat(experts // num_groups, axis=1)
    order = jnp.lexsort((-biased, excluded))  # an expert of the best groups, minus infinity or not, before all others
    return (order[:, :top_k].astype(jnp.int32),)


def assign_slots(ids, *, num_groups, rows, slabs, alignment):
    t, k = ids.shape
    ids = ids.reshape(t * k)
    ids = jnp.where((ids >= 0) & (ids < num_groups), ids, num_groups)  # the last group: selected nothing
    counts = jnp.bincount(ids, length=num_groups + 1).astype(jnp.int32)
    ends = jnp.cumsum(counts)
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    group = ids[order]
    rank_in_group = jnp.arange(t * k, dtype=jnp.int32) - (ends - counts)[group]
    counts = counts[:num_groups]
    if slabs:
        starts = jnp.arange(num_groups, dtype=jnp.int32) * (rows // num_groups)
        kept = jnp.minimum(counts, rows // num_groups)
    else:
        aligned = jnp.minimum(-(-counts // alignment) * alignment, rows)  # what starts past the rows never counts
        starts = jnp.cumsum(aligned) - aligned
        kept = jnp.clip(rows - starts, 0, counts)
    pad = jnp.zeros_like(starts, shape=(1,))
    fits = rank_in_group < jnp.concatenate([kept, pad])[group]
    slots = jnp.where(fits, jnp.concatenate([starts, pad])[group] + rank_in_group, -1)
    source = jnp.full_like(slots, -1, shape=(rows,)).at[jnp.where(fits, slots, rows)].set(order, mode="drop")
    slots = jnp.zeros_like(slots).at[order].set(slots)
    return slots.reshape(t, k), source, kept, counts - kept


def gather_rows(x, source, weights, *, top_k, weighted, zero_gaps=True):
    t, h = x.shape
    valid = (source >= 0) & (source < t * top_k)
    index = jnp.where(valid, source, t * top_k)
    # As bits: e8m0 has no other zero, and XLA makes a signalling bfloat16 NaN a quiet one.
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    rows = take_rows(bits, index // top_k)
    rows = jax.lax.bitcast_convert_type(rows, x.dtype)
    if weighted:
        scale = take_rows(weights.reshape(-1), index)
        rows = jnp.where(valid[:, None], rows.astype(jnp.float32) * scale[:, None], 0).astype(x.dtype)
    return (rows,)


def gather_quantize_rows(x, source, slots, *, top_k, zero_gaps, scale_format):
    (rows,) = gather_rows(x, source, None, top_k=top_k, weighted=False)
    values, scales = quantize(rows[None], block_shape=(1, 128), scale_format=scale_format)
    valid = (source >= 0) & (source < x.shape[0] * top_k)
    bits = jnp.uint8 if scales.dtype.itemsize == 1 else jnp.uint32
    scales = jnp.where(valid[:, None], jax.lax.bitcast_convert_type(scales[0], bits), 0)
    return values[0], jax.lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu if bits == jnp.uint8 else jnp.float32)


def sum_rows(rows, slots, keys, weights, bias, *, num_keys, out_dtype):
    """A token's leaves, sorted by key, are joined at their k - 1 boundaries, deepest first: the tree over the keys."""
    c, k = rows.shape[0], slots.shape[1]
    valid = (slots >= 0) & (slots < c) & (keys >= 0) & (keys < num_keys)
    order = jnp.argsort(jnp.where(valid, keys, num_keys), axis=1, stable=True)
    valid, slots, keys, weights = (jnp.take_along_axis(x, order, 1) for x in (valid, slots, keys, weights))
    terms = take_rows(rows, jnp.where(valid, slots, c)).astype(jnp.float32)
    terms = jnp.where(valid[:, :, None], terms * weights[:, :, None], 0)

    codes = jnp.asarray(_tree_codes(num_keys))[jnp.where(valid, keys, 0)]
    depth = jnp.where(valid[:, 1:], jax.lax.clz(codes[:, 1:] ^ codes[:, :-1]), -1)  # the same key twice: deepest
    boundaries = jnp.argsort(-depth, axis=1, stable=True)
    leaf = jnp.arange(k, dtype=boundaries.dtype)
    root = jnp.broadcast_to(leaf, slots.shape)
    for i in range(k - 1):
        left, right = boundaries[:, i : i + 1], boundaries[:, i : i + 1] + 1
        joins = jnp.take_along_axis(valid, right, 1)
        into = jnp.take_along_axis(root, left, 1)
        total = jnp.take_along_axis(terms, into[:, :, None], 1) + jnp.take_along_axis(terms, right[:, :, None], 1)
        terms = jnp.where(((leaf == into) & joins)[:, :, None], total, terms)
        root = jnp.where((root == right) & joins, into, root)
    out = terms[:, 0] if bias.shape == (0, 0) else terms[:, 0] + bias.astype(jnp.float32)
    return (out.astype(out_dtype),)


def _tree_codes(num_keys):
    """The way to each key in the tree that halves [0, num_keys): bit 30 is the first turn, 1 is right."""
    codes = np.zeros(num_keys, np.int32)

    def descend(low, high, bit):
        if high - low > 1:
            middle = low + (high - low) // 2
            codes[middle:high] |= 1 << bit
            descend(low, middle, bit - 1)
            descend(middle, high, bit - 1)

    descend(0, num_keys, 30)
    return codes


def _nan_last(x):
    return jnp.where(jnp.isnan(x), -jnp.inf, x)


def dot_rows(rows, slots, x):
    c, h = rows.shape
    valid = (slots >= 0) & (slots < c)
    taken = take_rows(rows, jnp.where(valid, slots, c)).astype(jnp.float32)
    return (jnp.where(valid, jnp.einsum("tkh,th->tk", taken, x.astype(jnp.float32)), 0),)
