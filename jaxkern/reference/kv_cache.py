"""Rows of a paged cache in plain JAX: packed as FP8, and written to their pages."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern.reference.quantize import dequantize, quantize

BLOCK = 128  # numbers of the latent that share a scale


def row_bytes(latent: int, rope: int) -> int:
    return latent + 4 * -(-latent // BLOCK) + 2 * rope


def pack_rows(rows, latent_dim):
    """rows [..., d] -> uint8 [..., bytes]: the latent as e4m3, its scales as float32, the rest as bfloat16."""
    values, scales = quantize(rows[..., None, :latent_dim], block_shape=(1, BLOCK), scale_format="power_of_two")
    values = _bytes(values[..., 0, :])
    values = jnp.where(values & 0x7F == 0x7F, jnp.uint8(0x7F), values)  # one code for NaN, whatever its sign was
    rope = rows[..., latent_dim:].astype(jnp.bfloat16)
    return jnp.concatenate([values, _bytes(scales[..., 0, :]), _bytes(rope)], axis=-1)


def unpack_rows(packed, latent_dim, rope_dim, dtype):
    """uint8 [..., bytes] -> [..., latent_dim + rope_dim]; each number is rounded once, to dtype."""
    values, scales, rope = jnp.split(packed, [latent_dim, row_bytes(latent_dim, 0)], axis=-1)
    values, scales = _from_bytes(values, jnp.float8_e4m3fn), _from_bytes(scales, jnp.float32)
    (latent,) = dequantize(values[..., None, :], scales[..., None, :], block_shape=(1, BLOCK), dtype=dtype)
    return jnp.concatenate([latent[..., 0, :], _from_bytes(rope, jnp.bfloat16).astype(dtype)], axis=-1)


def kv_cache_append(cache, rows, block_table, positions, *, latent_dim):
    """cache [p, page, d or bytes], rows [b, s, d], positions [b, s] -> the cache with the rows in it."""
    p, page, _ = cache.shape
    pages = block_table.shape[1]
    rows = pack_rows(rows, latent_dim) if cache.dtype == jnp.uint8 else rows.astype(cache.dtype)
    inside = (positions >= 0) & (positions < pages * page)
    entries = jnp.where(inside, positions // page, 0)
    targets = jnp.take_along_axis(block_table, entries, axis=1, mode="fill", fill_value=-1)
    inside &= (targets >= 0) & (targets < p)
    slots = jnp.where(inside, targets * page + positions % page, p * page).reshape(-1)  # the last is none: dropped
    # A scatter may write the rows of one slot in any order, so all but the last of them are dropped.
    order = jnp.argsort(slots, stable=True)
    ordered = slots[order]
    overwritten = ordered == jnp.append(ordered[1:], -1)
    slots = slots.at[order].set(jnp.where(overwritten, p * page, ordered))
    return (cache.at[slots // page, slots % page].set(rows.reshape(-1, rows.shape[-1]), mode="drop"),)


def _bytes(x):
    """[..., n] -> uint8 [..., n * size], little-endian."""
    *batch, n = x.shape
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*batch, n * x.dtype.itemsize)


def _from_bytes(x, dtype):
    """uint8 [..., n * size] -> [..., n] of dtype."""
    *batch, n = x.shape
    size = np.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(x.reshape(*batch, n // size, size) if size > 1 else x, dtype)
