"""Trainable FP8 products: `fp8_linear`, `fp8_grouped_linear`."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxkern import _ffi
from jaxkern._check import FLOATS, INT32, Sizes, describe
from jaxkern.gemm import GEMM, GROUPED_GEMM, frozen, gemm, k_grouped_gemm, no_tangent
from jaxkern.quantize import (
    TOKEN_BLOCK,
    ScaledArray,
    ScaleFormat,
    check_scale_format,
    check_scaled,
    quantize,
    quantize_along_tokens,
)

WEIGHT_BLOCK = (128, 128)


def fp8_linear(
    x: jax.Array,
    w: jax.Array | ScaledArray,
    *,
    scale_format: ScaleFormat = "float32",
    out_dtype=None,
    implementation: str | None = None,
) -> jax.Array:
    """x w^T in FP8, trainable: forward product, input gradient and weight gradient all multiply e4m3.

    Shapes and dtypes: x float32 or bfloat16 [..., k]; w [n, k], the float32 or bfloat16 weight that is trained, or a
        frozen ScaledArray with blocks (128, 128) -> [..., n] of out_dtype, float32 or bfloat16, by default x's.
    Units: x is quantised in blocks (1, 128) along k and w in blocks (128, 128), see `quantize`; sums are float32,
        rounded once. The input gradient quantises the result's gradient in blocks (1, 128) along n and takes the same
        quantised w, whose blocks are those of its transpose. The weight gradient quantises both sides anew in blocks
        of 128 tokens. Kept for the backward pass: x as it came, and the quantised w, one byte an element.
    Sharding: shard_map, over tokens or along n; along k the shards' results are still to be summed, and a block must
        not be cut.
    Gradient: of x in its dtype, of w in its, from float32 sums; roundings count as none. A ScaledArray w gets zeros.
    Implementations: those of `quantize`, `gemm` and `quantize_along_tokens`.
    Errors: TypeError for dtypes, ValueError for shapes, other blocks or an unknown scale format.
    Source: DeepSeek-V3 report, section 3.3.
    """
    sizes = Sizes("fp8_linear")
    x = sizes.array("x", x)
    sizes.require(x.ndim >= 1, f"x must be [..., k], got {describe(x)}")
    *batch, k = x.shape
    x = sizes.check("x", x, FLOATS, " ".join([*(f"b{axis}" for axis in range(len(batch))), "k"]))
    w, w_scales, static = _weight(sizes, w, "n k", x, scale_format, out_dtype, implementation)
    rows = x.reshape(math.prod(batch), k)
    out = _linear(static, *_ffi.align(rows, w[None], w_scales[None], jnp.zeros(0, jnp.int32)))
    return out.reshape(*batch, sizes["n"])


def fp8_grouped_linear(
    x: jax.Array,
    w: jax.Array | ScaledArray,
    group_sizes: jax.Array,
    *,
    group_alignment: int = 1,
    scale_format: ScaleFormat = "float32",
    out_dtype=None,
    implementation: str | None = None,
) -> jax.Array:
    """The rows of group i of x, times w[i]^T, as `fp8_linear` does it: the products of experts in training.

    Shapes and dtypes: x float32 or bfloat16 [m, k]; w [g, n, k], the float32 or bfloat16 weights that are trained, or a
        frozen ScaledArray with blocks (128, 128); group_sizes int32 [g] -> [m, n] of out_dtype, float32 or bfloat16, by
        default x's.
    Units: roundings as in `fp8_linear`, groups as in `grouped_gemm`. Rows in no group come out zero and have no effect,
        whatever they hold.
    Sharding: shard_map, along n, along k as in `fp8_linear`, or with the groups' rows.
    Gradient: of x and w as in `fp8_linear`; group_sizes has none.
    Implementations: those of `quantize`, `grouped_gemm`, `quantize_along_tokens` and `k_grouped_gemm`.
    Errors: as `fp8_linear`, and ValueError for a group_alignment below 1.
    Source: DeepSeek-V3 report, section 3.3.
    """
    sizes = Sizes("fp8_grouped_linear")
    x = sizes.check("x", x, FLOATS, "m k")
    w, w_scales, static = _weight(sizes, w, "g n k", x, scale_format, out_dtype, implementation)
    group_sizes = sizes.check("group_sizes", group_sizes, INT32, "g")
    group_alignment = sizes.require_size("group_alignment", group_alignment)
    static = dataclasses.replace(static, grouped=True, group_alignment=group_alignment)
    return _linear(static, *_ffi.align(x, w, w_scales, group_sizes))


# ---- arguments ----


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is static in one call. w_dtype is None where w is frozen."""

    x_dtype: str
    w_dtype: str | None
    out_dtype: str
    scale_format: str
    implementation: str | None
    grouped: bool = False
    group_alignment: int = 1


def _weight(sizes: Sizes, w, dims: str, x, scale_format, out_dtype, implementation):
    """Values and scales of the weight, without scales where it is still to be quantised; what is static."""
    check_scale_format(sizes, scale_format)
    out_dtype = x.dtype if out_dtype is None else sizes.require_dtype("out_dtype", out_dtype, FLOATS)
    if isinstance(w, ScaledArray):
        sizes.require(w.block_shape == WEIGHT_BLOCK, f"w must have blocks {WEIGHT_BLOCK}, got {w.block_shape}")
        values, scales = check_scaled(sizes, "w", w.values, w.scales, w.block_shape, dims)
        w_dtype = None
    else:
        values, scales = sizes.check("w", w, FLOATS, dims), jnp.zeros((0,) * len(dims.split()), jnp.float32)
        w_dtype = values.dtype.name
    return values, scales, _Static(x.dtype.name, w_dtype, out_dtype.name, scale_format, implementation)


# ---- the product and its gradients ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static, x, w, w_scales, group_sizes):
    """x [m, k], w [g, n, k] -> [m, n]; not grouped, g is 1 and group_sizes [0]."""
    return _linear_forward(static, x, w, w_scales, group_sizes)[0]


def _linear_forward(static, x, w, w_scales, group_sizes):
    scaled = ScaledArray(w, w_scales, WEIGHT_BLOCK) if static.w_dtype is None else _quantize(static, w, WEIGHT_BLOCK)
    out = _product(static, _quantize(static, x), scaled, group_sizes, static.out_dtype, transpose_b=False)
    return out, (x, scaled, w_scales, group_sizes)


def _linear_backward(static, saved, g):
    x, w, w_scales, group_sizes = saved
    dx = _product(static, _quantize(static, g), w, group_sizes, static.x_dtype, transpose_b=True)
    dw = frozen(w.values, g) if static.w_dtype is None else _weight_gradient(static, g, x, group_sizes)
    return dx, dw, frozen(w_scales, g), no_tangent(group_sizes)


_linear.defvjp(_linear_forward, _linear_backward)


def _weight_gradient(static, g, x, group_sizes):
    """g^T x for each group, [groups, n, k]."""
    along_tokens = functools.partial(
        quantize_along_tokens,
        group_sizes=group_sizes if static.grouped else None,
        group_alignment=static.group_alignment,
        scale_format=static.scale_format,
        implementation=static.implementation,
    )
    g, x = along_tokens(g), along_tokens(x)
    if static.grouped:
        dw = k_grouped_gemm(g, x, group_sizes, group_alignment=TOKEN_BLOCK, implementation=static.implementation)
    else:
        dw = gemm(g, x, out_dtype=jnp.float32, implementation=static.implementation)[None]
    return dw.astype(static.w_dtype)


def _product(static, a: ScaledArray, b: ScaledArray, group_sizes, out_dtype, *, transpose_b):
    """a b^T, or a b where b is transposed."""
    params = {"a_block": a.block_shape, "b_block": b.block_shape, "transpose_b": transpose_b, "out_dtype": out_dtype}
    operands = [a.values[None], a.scales[None], b.values, b.scales]
    if static.grouped:
        params |= {"group_alignment": static.group_alignment, "group_stride": 0, "zero_gaps": True}
        return _ffi.call(GROUPED_GEMM, *operands, group_sizes, implementation=static.implementation, **params)[0]
    params |= {"transpose_a": False, "accumulate": False}
    absent = jnp.zeros((0, 0, 0), jnp.float32)
    return _ffi.call(GEMM, *operands, absent, implementation=static.implementation, **params)[0][0]


def _quantize(static, x, block_shape=(1, 128)) -> ScaledArray:
    return quantize(x, block_shape, scale_format=static.scale_format, implementation=static.implementation)
