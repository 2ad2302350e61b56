"""Block-scaled FP8: `ScaledArray`, `quantize`, `dequantize`."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi, reference
from jaxkern._check import Sizes, as_array, describe

BLOCK_SHAPES = ((1, 128), (128, 128))
SCALE_FORMATS = ("float32", "power_of_two", "ue8m0")
BY_COLUMN = (0, 2, 1)  # major to minor: how the scales of (1, 128) blocks lie in a GPU's memory, m contiguous
_INPUTS = (jnp.float32, jnp.bfloat16, jnp.float16)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["block_shape"])
class ScaledArray:
    """An FP8 array with one scale a block: element = value * scale of its block.

    values: float8_e4m3fn [..., m, k]
    scales: float32 or float8_e8m0fnu [..., ceil(m / bm), ceil(k / bk)]
    block_shape: (bm, bk), static; (1, 128) for activations, (128, 128) for weights. Blocks at the edge may be partial.

    A pytree, so it passes through jit, scan, vmap and checkpoints.
    """

    def __init__(self, values, scales, block_shape: tuple[int, int] = (1, 128)):
        self.values, self.scales, self.block_shape = values, scales, tuple(block_shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self):
        return self.values.dtype

    def __repr__(self):
        scales = describe(self.scales) if hasattr(self.scales, "shape") else self.scales
        values = describe(self.values) if hasattr(self.values, "shape") else self.values
        return f"ScaledArray(values={values}, scales={scales}, block_shape={self.block_shape})"


def quantize(
    x: jax.Array,
    block_shape: tuple[int, int] = (1, 128),
    *,
    scale_format: Literal["float32", "power_of_two", "ue8m0"] = "float32",
    implementation: str | None = None,
) -> ScaledArray:
    """Quantises to FP8 with one scale a block.

    Shapes and dtypes: x float32, bfloat16 or float16 [..., m, k]; any m and k.
    Units: scale = max(amax, 1e-4) / 448 with amax the block's largest magnitude, rounded up to a power of two in the
        formats "power_of_two" (stored as float32) and "ue8m0" (stored as float8_e8m0fnu); value = x / scale, rounded to
        the nearest e4m3, ties to even. A block that holds a NaN or an infinity becomes NaN, scale and all.
    Sharding: shard_map, along any axis that does not cut a block.
    Gradient: none.
    Implementations: cpu, xla, cuda, sim.
    Errors: TypeError for another dtype, ValueError for a rank below 2 or an unknown block shape or scale format.
    Source: DeepSeek-V3 report, section 3.3.2.
    """
    x = as_array(x)
    sizes = Sizes("quantize")
    sizes.require(scale_format in SCALE_FORMATS, f"scale_format must be one of {SCALE_FORMATS}, got {scale_format!r}")
    _check_block_shape(sizes, block_shape)
    sizes.require(x.ndim >= 2, f"x must be [..., m, k], got {describe(x)}")
    *batch, m, k = x.shape
    x3 = sizes.check("x", x.reshape(math.prod(batch), m, k), _INPUTS, "b m k")
    values, scales = _ffi.call(
        QUANTIZE, x3, implementation=implementation, block_shape=tuple(block_shape), scale_format=scale_format
    )
    return ScaledArray(values.reshape(x.shape), scales.reshape(*batch, *scales.shape[1:]), block_shape)


def dequantize(a: ScaledArray, dtype=jnp.float32, *, implementation: str | None = None) -> jax.Array:
    """The array that `a` stands for: value * scale in float32, rounded once to `dtype`.

    Shapes and dtypes: a as in `ScaledArray`; result float32, bfloat16 or float16 of a.shape.
    Sharding: shard_map, along any axis that does not cut a block.
    Gradient: none.
    Implementations: cpu, xla.
    Errors: TypeError and ValueError where values and scales do not fit together.
    Source: DeepSeek-V3 report, section 3.3.2.
    """
    sizes = Sizes("dequantize")
    sizes.require(isinstance(a, ScaledArray), f"a must be a ScaledArray, got {type(a).__name__}", TypeError)
    sizes.require(np.dtype(dtype) in [np.dtype(d) for d in _INPUTS], f"dtype {np.dtype(dtype)} is no float", TypeError)
    sizes.require(a.ndim >= 2, f"a.values must be [..., m, k], got {describe(a.values)}")
    batch = a.shape[:-2]
    values = a.values.reshape(math.prod(batch), *a.shape[-2:])
    scales = as_array(a.scales)
    fits = scales.ndim == a.ndim and scales.shape[:-2] == batch
    sizes.require(
        fits, f"a.scales must be a matrix for each matrix of a.values, {describe(a.values)}, got {describe(scales)}"
    )
    scales = scales.reshape(math.prod(batch), *scales.shape[-2:])
    check_scaled(sizes, "a", values, scales, a.block_shape, "b m k")
    (x,) = _ffi.call(
        DEQUANTIZE, values, scales, implementation=implementation, block_shape=a.block_shape, dtype=np.dtype(dtype).name
    )
    return x.reshape(a.shape)


def check_scaled(sizes: Sizes, argument: str, values, scales, block_shape, dims: str):
    """Checks the two arrays of a ScaledArray whose dimensions are `dims`, the last two being the blocked ones."""
    _check_block_shape(sizes, block_shape)
    values = sizes.check(f"{argument}.values", values, (jnp.float8_e4m3fn,), dims)
    *batch, m, k = dims.split()
    blocks = [blocks_of(sizes[d], b) for d, b in zip((m, k), block_shape, strict=True)]
    row, column = f"ceil({m}/{block_shape[0]})", f"ceil({k}/{block_shape[1]})"
    sizes.known.update({row: blocks[0], column: blocks[1]})
    dims = " ".join([*batch, row, column])
    return values, sizes.check(f"{argument}.scales", scales, (jnp.float32, jnp.float8_e8m0fnu), dims)


def blocks_of(size, block: int):
    return -(-size // block)


def _check_block_shape(sizes: Sizes, block_shape):
    allowed = tuple(block_shape) in BLOCK_SHAPES
    sizes.require(allowed, f"block_shape must be one of {BLOCK_SHAPES}, got {tuple(block_shape)}")


def _quantize_results(x, *, block_shape, scale_format):
    b, m, k = x.shape
    scale_dtype = jnp.float8_e8m0fnu if scale_format == "ue8m0" else jnp.float32
    scales = (b, blocks_of(m, block_shape[0]), blocks_of(k, block_shape[1]))
    return [(x.shape, jnp.float8_e4m3fn), (scales, scale_dtype)]


def _fold_batch(size, arrays, is_batched, **params):
    """vmap: the batch joins the operands' own leading axis."""
    arrays = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, is_batched, strict=True)]
    inner = arrays[0].shape[1]
    folded = [x.reshape(size * inner, *x.shape[2:]) for x in arrays]
    return folded, params, lambda i, r: r.reshape(size, inner, *r.shape[1:])


def _hopper_quantize_layouts(*, block_shape, **_):
    return (None,), (None, BY_COLUMN if block_shape == (1, 128) else None)


QUANTIZE = _ffi.Op(
    "quantize",
    _quantize_results,
    reference.quantize,
    batch=_fold_batch,
    hopper=_ffi.Kernel(layouts=_hopper_quantize_layouts, attributes=("block_shape", "scale_format")),
)
DEQUANTIZE = _ffi.Op(
    "dequantize",
    lambda values, scales, *, block_shape, dtype: [(values.shape, dtype)],
    reference.dequantize,
    batch=_fold_batch,
)
