"""Block-scaled FP8 in plain JAX."""

import jax
import jax.numpy as jnp

from jaxkern.reference.groups import groups_of
from jaxkern.reference.rows import take_rows

FP8_MAX = 448.0
MIN_AMAX = 1e-4


def quantize(x, *, block_shape, scale_format):
    """x [b, m, k] -> values [b, m, k], scales [b, blocks, blocks]."""
    x = x.astype(jnp.float32)
    amax = block_amax(jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf), block_shape)  # max itself may drop a NaN
    # Not a constant divisor: XLA would multiply by 1 / 448 instead, which is one ulp off.
    scales = jnp.maximum(amax, MIN_AMAX) / jnp.where(jnp.isfinite(amax), FP8_MAX, jnp.nan)
    if scale_format != "float32":
        scales = ceil_power_of_two(scales)
    values = (x / expand_blocks(scales, block_shape, x.shape)).astype(jnp.float8_e4m3fn)
    # Otherwise XLA, which may keep excess precision, drops the rounding where the values are dequantised at once.
    values = jax.lax.optimization_barrier(values)
    return values, scales.astype(jnp.float8_e8m0fnu) if scale_format == "ue8m0" else scales


def dequantize(values, scales, *, block_shape, dtype=jnp.float32):
    scales = expand_blocks(scales.astype(jnp.float32), block_shape, values.shape)
    return ((values.astype(jnp.float32) * scales).astype(dtype),)


def quantize_along_tokens(x, group_sizes, *, group_alignment, scale_format, tokens):
    """x [t, m] -> values [m, tokens], scales [m, tokens / 128]."""
    starts, sizes, _ = groups_of(group_sizes, x.shape[0], group_alignment)
    new_starts, _, owner = groups_of(sizes, tokens, 128)
    shift = jnp.append(starts - new_starts, 0)  # the last for tokens of no group, which are -1
    row = shift[owner] + jnp.arange(tokens, dtype=jnp.int32)
    x = jnp.where(owner[:, None] >= 0, take_rows(x, row), 0)
    values, scales = quantize(x.T[None], block_shape=(1, 128), scale_format=scale_format)
    return values[0], scales[0]


def swiglu_quantize(gate, up, weights, num_rows, *, paired, weighted, counted, scale_format):
    """gate and up [b, m, i], or both beside each other in the first [b, m, 2i]; weights [b, m] -> as quantize.

    All rows are computed, whether they count or not.
    """
    gate, up = (gate, up) if paired else jnp.split(gate, 2, axis=-1)
    y = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    y = y * weights[..., None] if weighted else y
    return quantize(y, block_shape=(1, 128), scale_format=scale_format)


def block_amax(x, block_shape):
    """The largest of each block of the last two axes; edge blocks may be partial."""
    *batch, m, k = x.shape
    bm, bk = block_shape
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, -m % bm), (0, -k % bk)])
    return x.reshape(*batch, x.shape[-2] // bm, bm, x.shape[-1] // bk, bk).max(axis=(-3, -1))


def expand_blocks(scales, block_shape, shape):
    """Repeats each scale over its block and crops to `shape`."""
    bm, bk = block_shape
    scales = jnp.repeat(jnp.repeat(scales, bm, axis=-2), bk, axis=-1)
    return scales[..., : shape[-2], : shape[-1]]


def ceil_power_of_two(x):
    """The smallest power of two that is not below the positive, normal x; NaN stays NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & jnp.uint32(0x7F800000), jnp.float32)
    return jnp.where(jnp.isnan(x), x, rounded)
