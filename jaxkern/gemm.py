"""Matrix products: `gemm`, `grouped_gemm`, `masked_grouped_gemm`, `k_grouped_gemm`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi, reference
from jaxkern._check import FLOATS, INT32, Sizes, describe
from jaxkern.quantize import BY_COLUMN, ScaledArray, check_scaled, too_many_groups

UNSCALED = (0, 0)  # the block shape of an operand without scales


def gemm(
    a: jax.Array | ScaledArray,
    b: jax.Array | ScaledArray,
    *,
    accumulator: jax.Array | None = None,
    out_dtype=None,
    implementation: str | None = None,
) -> jax.Array:
    """a b^T + accumulator.

    Shapes and dtypes: a [m, k], b [n, k] -> [m, n]; any sizes, zero included. Both float32; both bfloat16; b a
        ScaledArray with blocks (128, 128) or (1, 128) and a a ScaledArray with blocks (1, 128), or plain (weight only).
        out_dtype float32 or bfloat16: by default float32 for a float32 a and bfloat16 for any other.
        accumulator [m, n] of out_dtype.
    Units: products and sums in float32, scales included; the accumulator joins before the one rounding to out_dtype.
        vmap is one call.
    Sharding: shard_map, along any axis; along k the shards' results are still to be summed, and a scale block must not
        be cut.
    Gradient: of a, b and accumulator; with a ScaledArray b, of a (b is frozen: zeros, but 2^-127 for the scales of
        "ue8m0", whose dtype has no zero). None with a ScaledArray a.
    Implementations: cpu, xla; cuda and sim for two ScaledArrays, n and k multiples of 16. The GPU's sums within 128 of
        k keep the 13 bits of its tensor cores.
    Errors: TypeError for dtypes that do not go together, ValueError for shapes, NotImplementedError for the gradient of
        a ScaledArray a.
    Source: DeepSeek-V3 report, section 3.3.2; DeepGEMM.
    """
    sizes = Sizes("gemm")
    a = _operand(sizes, "a", a, "m k", blocks=((1, 128),))
    b = _operand(sizes, "b", b, "n k", blocks=((1, 128), (128, 128)))
    out_dtype = _out_dtype(sizes, a, b, out_dtype)
    if accumulator is not None:
        accumulator = sizes.check("accumulator", accumulator, (out_dtype,), "m n")[None]
    arrays = [a[0][None], a[1][None], b[0][None], b[1][None], _or_absent(accumulator)]
    static = _Static("gemm", a[2], b[2], out_dtype.name, accumulator is not None, implementation=implementation)
    return _gemm(static, *_ffi.align(*arrays))[0]


def grouped_gemm(
    a: jax.Array | ScaledArray,
    b: jax.Array | ScaledArray,
    group_sizes: jax.Array,
    *,
    group_alignment: int = 1,
    zero_gaps: bool = True,
    out_dtype=None,
    implementation: str | None = None,
) -> jax.Array:
    """The rows of group i of a, times b[i]^T.

    Shapes and dtypes: a [m, k], b [g, n, k], group_sizes int32 [g] -> [m, n]; dtypes as in `gemm`.
    Units: group i starts where group i - 1 ends, rounded up to a multiple of group_alignment. Rows in no group come out
        zero whatever a holds there; without zero_gaps nobody writes them, and they hold anything. Sizes that are
        negative or go past m are cut. Time follows the sum of the sizes, but for the zeros.
    Sharding: shard_map, along n, along k as in `gemm`, or with the groups' rows.
    Gradient: of a and b, as in `gemm`.
    Implementations: cpu, xla; cuda and sim as in `gemm` and for bfloat16 a and b, for at most 1024 groups and 2^26 - 1
        rows; weight gradients of bfloat16 as in `k_grouped_gemm`.
    Errors: as `gemm`, and ValueError for a group_alignment below 1.
    Source: DeepGEMM, m-grouped contiguous layout.
    """
    sizes = Sizes("grouped_gemm")
    a = _operand(sizes, "a", a, "m k", blocks=((1, 128),))
    b = _operand(sizes, "b", b, "g n k", blocks=((1, 128), (128, 128)))
    out_dtype = _out_dtype(sizes, a, b, out_dtype)
    group_sizes = sizes.check("group_sizes", group_sizes, INT32, "g")
    group_alignment = sizes.require_size("group_alignment", group_alignment)
    arrays = [a[0][None], a[1][None], b[0], b[1], group_sizes]
    static = _Static(
        "grouped_gemm",
        a[2],
        b[2],
        out_dtype.name,
        group_alignment=group_alignment,
        zero_gaps=bool(zero_gaps),
        implementation=implementation,
    )
    return _grouped_gemm(static, *_ffi.align(*arrays))


def masked_grouped_gemm(
    a: jax.Array | ScaledArray,
    b: jax.Array | ScaledArray,
    group_sizes: jax.Array,
    *,
    zero_gaps: bool = True,
    out_dtype=None,
    implementation: str | None = None,
) -> jax.Array:
    """The first group_sizes[i] rows of a[i], times b[i]^T: groups of a fixed capacity, filled in part.

    Shapes and dtypes: a [g, m, k], b [g, n, k], group_sizes int32 [g] -> [g, m, n]; dtypes as in `gemm`.
    Units: the other rows come out zero whatever a holds there; without zero_gaps nobody writes them, and they hold
        anything. Sizes below 0 count as 0, sizes above m as m. Time follows the sum of the sizes, but for the zeros.
    Sharding: shard_map, along g, along n, or along k as in `gemm`.
    Gradient: of a and b, as in `grouped_gemm`; rows that do not count get zeros.
    Implementations: as `grouped_gemm`.
    Errors: as `gemm`.
    Source: DeepGEMM, m-grouped masked layout.
    """
    sizes = Sizes("masked_grouped_gemm")
    a, a_scales, a_block = _operand(sizes, "a", a, "g m k", blocks=((1, 128),))
    b = _operand(sizes, "b", b, "g n k", blocks=((1, 128), (128, 128)))
    out_dtype = _out_dtype(sizes, (a, a_scales, a_block), b, out_dtype)
    group_sizes = sizes.check("group_sizes", group_sizes, INT32, "g")
    groups, capacity, n = sizes["g"], sizes["m"], sizes["n"]

    def rows(x):
        return x.reshape(1, groups * capacity, x.shape[-1])

    arrays = [rows(a), a_scales if a_block == UNSCALED else rows(a_scales), b[0], b[1], group_sizes]
    static = _Static(
        "masked_grouped_gemm",
        a_block,
        b[2],
        out_dtype.name,
        group_stride=capacity,
        zero_gaps=bool(zero_gaps),
        implementation=implementation,
    )
    return _grouped_gemm(static, *_ffi.align(*arrays)).reshape(groups, capacity, n)


def k_grouped_gemm(
    a: jax.Array | ScaledArray,
    b: jax.Array | ScaledArray,
    group_sizes: jax.Array,
    *,
    group_alignment: int = 1,
    accumulator: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """a_i^T b_i + accumulator[i] for the rows a_i and b_i of each group: the weight gradient of `grouped_gemm`.

    Shapes and dtypes: a [t, m], b [t, n], each float32 or bfloat16, group_sizes int32 [g] -> float32 [g, m, n];
        accumulator float32 [g, m, n]. Or ScaledArrays a [m, t], b [n, t], both with blocks (1, 128) along t, as
        `quantize_along_tokens` makes them.
    Units: groups of t as in `grouped_gemm`; products and sums in float32, scales included. An empty group gives zeros,
        or its accumulator; what is in no group has no effect, whatever it holds. With ScaledArrays group_alignment is a
        multiple of 128, so that no two groups share a scale.
    Sharding: shard_map, along m and n, or with the groups' rows.
    Gradient: of a, b and accumulator; none with ScaledArrays.
    Implementations: cpu, xla; cuda and sim for ScaledArrays, n and t multiples of 16, and for bfloat16 a and b, m and n
        multiples of 8; groups as in `grouped_gemm`. Gradients multiply bfloat16 by float32 and have none: they are
        then xla's, or an error if asked for by name.
    Errors: TypeError for dtypes that do not go together, ValueError for shapes and for such a group_alignment,
        NotImplementedError for the gradient of ScaledArrays.
    Source: DeepSeek-V3 report, section 3.3.2; DeepGEMM, k-grouped layout.
    """
    sizes = Sizes("k_grouped_gemm")
    is_scaled = isinstance(a, ScaledArray)
    sizes.require(
        isinstance(b, ScaledArray) == is_scaled,
        f"a and b must be both ScaledArrays or neither, got a {_kind(sizes, a)} and b {_kind(sizes, b)}",
        TypeError,
    )
    a = _operand(sizes, "a", a, "m t" if is_scaled else "t m", blocks=((1, 128),))
    b = _operand(sizes, "b", b, "n t" if is_scaled else "t n", blocks=((1, 128),))
    group_sizes = sizes.check("group_sizes", group_sizes, INT32, "g")
    group_alignment = sizes.require_size("group_alignment", group_alignment)
    sizes.require(
        not is_scaled or group_alignment % 128 == 0,
        f"group_alignment must be a multiple of 128 with ScaledArrays, got {group_alignment}",
    )
    if accumulator is not None:
        accumulator = sizes.check("accumulator", accumulator, (jnp.float32,), "g m n")
    static = _Static(
        "k_grouped_gemm",
        a[2],
        b[2],
        accumulate=accumulator is not None,
        group_alignment=group_alignment,
        implementation=implementation,
    )
    return _k_grouped_gemm(static, *_ffi.align(*a[:2], *b[:2], group_sizes, _or_absent(accumulator)))


# ---- arguments ----


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is static in one call."""

    op: str
    a_block: tuple[int, int] = UNSCALED
    b_block: tuple[int, int] = UNSCALED
    out_dtype: str = ""
    accumulate: bool = False
    group_alignment: int = 1
    group_stride: int = 0
    zero_gaps: bool = True
    implementation: str | None = None


def _operand(sizes: Sizes, argument: str, x, dims: str, blocks):
    """Values, scales and block shape of one operand."""
    if not isinstance(x, ScaledArray):
        return sizes.check(argument, x, FLOATS, dims), jnp.zeros((0,) * len(dims.split()), jnp.float32), UNSCALED
    allowed = " or ".join(map(str, blocks))
    sizes.require(x.block_shape in blocks, f"{argument} must have blocks {allowed}, got {x.block_shape}")
    values, scales = check_scaled(sizes, argument, x.values, x.scales, x.block_shape, dims)
    return values, scales, x.block_shape


def _out_dtype(sizes: Sizes, a, b, out_dtype) -> np.dtype:
    """Checks that the operands' dtypes go together; the result's dtype."""
    (a, _, a_block), (b, _, b_block) = a, b
    sizes.require(
        b_block != UNSCALED or (a_block == UNSCALED and a.dtype == b.dtype),
        f"a and b must be both float32 or both bfloat16, or b a ScaledArray, got a {describe(a)} and b {describe(b)}",
        TypeError,
    )
    if out_dtype is None:
        return np.dtype(jnp.float32 if a.dtype == jnp.float32 else jnp.bfloat16)
    return sizes.require_dtype("out_dtype", out_dtype, FLOATS)


def _kind(sizes: Sizes, x) -> str:
    return "a ScaledArray" if isinstance(x, ScaledArray) else describe(sizes.array("a and b", x))


def _or_absent(accumulator):
    return jnp.zeros((0, 0, 0), jnp.float32) if accumulator is None else accumulator


def frozen(x, like):
    """The zero cotangent of x, varying over the mesh as `like` does; 2^-127 for float8_e8m0fnu, which has no zero."""
    zeros = jnp.zeros(x.shape, x.dtype)
    if x.dtype == jnp.float8_e8m0fnu:
        zeros = jax.lax.bitcast_convert_type(jnp.zeros(x.shape, jnp.uint8), x.dtype)
    return _ffi.align(zeros, like)[0]


def no_tangent(x):
    """The cotangent of integers."""
    return np.zeros(x.shape, jax.dtypes.float0)


def _no_gradient(static: _Static):
    raise NotImplementedError(
        f"{static.op}: no gradient with a ScaledArray a: its rounding has none; use stop_gradient, or a plain a"
    )


# ---- gemm ----


def _call_gemm(static, a, a_scales, b, b_scales, accumulator, *, transpose_a=False, transpose_b=False):
    (out,) = _ffi.call(
        GEMM,
        a,
        a_scales,
        b,
        b_scales,
        accumulator,
        implementation=static.implementation,
        a_block=static.a_block,
        b_block=static.b_block,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        accumulate=static.accumulate,
        out_dtype=static.out_dtype,
    )
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gemm(static, a, a_scales, b, b_scales, accumulator):
    return _call_gemm(static, a, a_scales, b, b_scales, accumulator)


def _gemm_forward(static, a, a_scales, b, b_scales, accumulator):
    if static.a_block != UNSCALED:
        _no_gradient(static)
    return _gemm(static, a, a_scales, b, b_scales, accumulator), (a, a_scales, b, b_scales, accumulator)


def _gemm_backward(static, saved, g):
    a, a_scales, b, b_scales, accumulator = saved
    absent = _or_absent(None)

    def product(b_block, dtype, *operands, **transposes):
        return _call_gemm(
            _Static("gemm", UNSCALED, b_block, dtype.name, implementation=static.implementation),
            *operands,
            **transposes,
        )

    da = product(static.b_block, a.dtype, g, absent, b, b_scales, absent, transpose_b=True)
    if static.b_block == UNSCALED:
        db = product(UNSCALED, b.dtype, g, absent, a, absent, absent, transpose_a=True, transpose_b=True)
    else:
        db = frozen(b, g)
    daccumulator = g if static.accumulate else frozen(accumulator, g)
    return da, frozen(a_scales, g), db, frozen(b_scales, g), daccumulator


_gemm.defvjp(_gemm_forward, _gemm_backward)


def _gemm_results(a, a_scales, b, b_scales, accumulator, *, transpose_a, transpose_b, out_dtype, **_):
    m, n = a.shape[2 if transpose_a else 1], b.shape[2 if transpose_b else 1]
    return [((a.shape[0], m, n), out_dtype)]


def _fold_gemm(size, arrays, is_batched, *, transpose_a, **params):
    """vmap: rows that share b join m; any other batch joins the operands' own leading axis."""
    a, a_scales, b, b_scales, accumulator = arrays
    params = {**params, "transpose_a": transpose_a}
    shares_b = not (is_batched[2] or is_batched[3])

    def broadcast(x, batched):
        return x if batched else jnp.broadcast_to(x, (size, *x.shape))

    def stack(x, batched, present):
        if not present:
            return x[0] if batched else x
        x = broadcast(x, batched)
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    has_a_scales, has_b_scales = params["a_block"] != UNSCALED, params["b_block"] != UNSCALED
    if shares_b and not transpose_a and a.shape[-3] == 1:

        def to_rows(x, batched, present):
            x = stack(x, batched, present)
            return x.reshape(1, x.shape[0] * x.shape[1], x.shape[2]) if present else x

        m = a.shape[-2]
        folded = [
            to_rows(a, is_batched[0], True),
            to_rows(a_scales, is_batched[1], has_a_scales),
            b,
            b_scales,
            to_rows(accumulator, is_batched[4], params["accumulate"]),
        ]
        return folded, params, lambda i, r: r.reshape(size, 1, m, r.shape[-1])
    batch = a.shape[-3]
    keep_b = shares_b and b.shape[-3] == 1
    if not keep_b and b.shape[-3] != batch:
        b = jnp.broadcast_to(b, (*b.shape[:-3], batch, *b.shape[-2:]))
        if has_b_scales:
            b_scales = jnp.broadcast_to(b_scales, (*b_scales.shape[:-3], batch, *b_scales.shape[-2:]))
    folded = [
        stack(a, is_batched[0], True),
        stack(a_scales, is_batched[1], has_a_scales),
        b if keep_b else stack(b, is_batched[2], True),
        b_scales if keep_b else stack(b_scales, is_batched[3], has_b_scales),
        stack(accumulator, is_batched[4], params["accumulate"]),
    ]
    return folded, params, lambda i, r: r.reshape(size, batch, *r.shape[1:])


def _hopper_refuses(a, a_scales, b, *_, a_block, b_block, transpose_a=False, transpose_b=False, **__):
    if a_block == UNSCALED:
        return "a and b must both be ScaledArrays"
    return _hopper_refuses_form(b, b_block, transpose_a, transpose_b)


def _hopper_refuses_form(b, b_block, transpose_a, transpose_b):
    """The kernels read both operands along k; of b a transpose can be made, but for scales that lie along n."""
    if transpose_a or (transpose_b and b_block == (1, 128)):
        return "both operands must have k as their last axis"
    return _not_multiples(n=b.shape[2 if transpose_b else 1], k=b.shape[1 if transpose_b else 2])


def _not_multiples(of: int = 16, **sizes) -> str:
    """Why the copy engine cannot work on rows of such sizes; empty if it can."""
    odd = [f"{name} must be a multiple of {of}, got {size}" for name, size in sizes.items() if size % of != 0]
    return odd[0] if odd else ""


def _hopper_layouts(*, a_block, b_block, **_):
    # Not of empty arrays: XLA divides by zero where it compiles a change of their layout.
    by_column = [BY_COLUMN if block == (1, 128) else None for block in (a_block, b_block)]
    return (None, by_column[0], None, by_column[1], None), (None,)


def _hopper_operands(a, a_scales, b, b_scales, last, *, transpose_b, **_):
    """The blocks of a transposed b are those of b, transposed."""
    if transpose_b:
        b, b_scales = b.swapaxes(1, 2), b_scales.swapaxes(1, 2)
    return a, a_scales.astype(jnp.float32), b, b_scales.astype(jnp.float32), last


GEMM = _ffi.Op(
    "gemm",
    _gemm_results,
    reference.gemm,
    batch=_fold_gemm,
    hopper=_ffi.Kernel(
        layouts=_hopper_layouts,
        attributes=("b_block", "accumulate"),
        operands=_hopper_operands,
        refuses=_hopper_refuses,
    ),
)


# ---- grouped_gemm ----


def _call_grouped_gemm(static, a, a_scales, b, b_scales, group_sizes, *, transpose_b=False):
    (out,) = _ffi.call(
        GROUPED_GEMM,
        a,
        a_scales,
        b,
        b_scales,
        group_sizes,
        implementation=static.implementation,
        a_block=static.a_block,
        b_block=static.b_block,
        transpose_b=transpose_b,
        group_alignment=static.group_alignment,
        group_stride=static.group_stride,
        zero_gaps=static.zero_gaps,
        out_dtype=static.out_dtype,
    )
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_gemm(static, a, a_scales, b, b_scales, group_sizes):
    return _call_grouped_gemm(static, a, a_scales, b, b_scales, group_sizes)


def _grouped_gemm_forward(static, a, a_scales, b, b_scales, group_sizes):
    if static.a_block != UNSCALED:
        _no_gradient(static)
    return _grouped_gemm(static, a, a_scales, b, b_scales, group_sizes), (a, a_scales, b, b_scales, group_sizes)


def _grouped_gemm_backward(static, saved, g):
    a, a_scales, b, b_scales, group_sizes = saved
    absent = _or_absent(None)
    back = _on_the_groups_of("grouped_gemm", static, b_block=static.b_block, out_dtype=a.dtype.name)
    da = _call_grouped_gemm(back, g[None], absent, b, b_scales, group_sizes, transpose_b=True)[None]
    if static.b_block == UNSCALED:
        weights = _on_the_groups_of("k_grouped_gemm", static)
        no_scales = absent.reshape(0, 0)
        db = _call_k_grouped_gemm(weights, g, no_scales, a[0], no_scales, group_sizes, absent).astype(b.dtype)
    else:
        db = frozen(b, g)
    return da, frozen(a_scales, g), db, frozen(b_scales, g), no_tangent(group_sizes)


def _on_the_groups_of(op: str, static: _Static, **kwargs) -> _Static:
    same = {name: getattr(static, name) for name in ("group_alignment", "group_stride", "implementation")}
    return _Static(op, **same, **kwargs)


_grouped_gemm.defvjp(_grouped_gemm_forward, _grouped_gemm_backward)


def _grouped_gemm_results(a, a_scales, b, b_scales, group_sizes, *, transpose_b, out_dtype, **_):
    return [((a.shape[1], b.shape[2 if transpose_b else 1]), out_dtype)]


def _hopper_refuses_grouped(a, a_scales, b, *_, a_block, b_block, transpose_b, **__):
    if a_block == UNSCALED and not (b_block == UNSCALED and a.dtype == b.dtype == jnp.bfloat16):
        return "a and b must be both ScaledArrays or both bfloat16"
    return _hopper_refuses_form(b, b_block, False, transpose_b) or too_many_groups(b.shape[0], a.shape[1])


# Groups follow one another, each start rounded up to group_alignment, where group_stride is 0; with a group_stride s
# group i starts at row i * s and is cut at s rows.
GROUPED_GEMM = _ffi.Op(
    "grouped_gemm",
    _grouped_gemm_results,
    reference.grouped_gemm,
    cpu=2,
    hopper=_ffi.Kernel(
        layouts=_hopper_layouts,
        attributes=("b_block", "group_alignment", "group_stride", "zero_gaps"),
        operands=_hopper_operands,
        refuses=_hopper_refuses_grouped,
        version=2,
    ),
)


# ---- k_grouped_gemm ----


def _call_k_grouped_gemm(static, a, a_scales, b, b_scales, group_sizes, accumulator):
    (out,) = _ffi.call(
        K_GROUPED_GEMM,
        a,
        a_scales,
        b,
        b_scales,
        group_sizes,
        accumulator,
        implementation=static.implementation,
        a_block=static.a_block,
        b_block=static.b_block,
        group_alignment=static.group_alignment,
        group_stride=static.group_stride,
        accumulate=static.accumulate,
    )
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _k_grouped_gemm(static, a, a_scales, b, b_scales, group_sizes, accumulator):
    return _call_k_grouped_gemm(static, a, a_scales, b, b_scales, group_sizes, accumulator)


def _k_grouped_gemm_forward(static, *operands):
    if static.a_block != UNSCALED:
        _no_gradient(static)
    return _k_grouped_gemm(static, *operands), operands


def _k_grouped_gemm_backward(static, saved, g):
    a, a_scales, b, b_scales, group_sizes, accumulator = saved
    absent = _or_absent(None)

    def rows(x, dtype, transpose_b):
        back = _on_the_groups_of("grouped_gemm", static, out_dtype=dtype.name)
        return _call_grouped_gemm(back, x[None], absent, g, absent, group_sizes, transpose_b=transpose_b)

    da, db = rows(b, a.dtype, False), rows(a, b.dtype, True)
    daccumulator = g if static.accumulate else frozen(accumulator, g)
    return da, frozen(a_scales, g), db, frozen(b_scales, g), no_tangent(group_sizes), daccumulator


_k_grouped_gemm.defvjp(_k_grouped_gemm_forward, _k_grouped_gemm_backward)


def _k_grouped_gemm_results(a, a_scales, b, b_scales, group_sizes, accumulator, *, a_block, **_):
    rows = 1 if a_block == UNSCALED else 0
    return [((group_sizes.shape[0], a.shape[rows], b.shape[rows]), jnp.float32)]


def _hopper_refuses_k_grouped(a, a_scales, b, b_scales, group_sizes, *_, a_block, **__):
    if a_block != UNSCALED:
        n, t = b.shape
        odd = _not_multiples(n=n, t=t)
    elif a.dtype == b.dtype == jnp.bfloat16:
        t, n = b.shape
        odd = _not_multiples(8, m=a.shape[1], n=n)
    else:
        return "a and b must be both ScaledArrays or both bfloat16"
    return odd or too_many_groups(group_sizes.shape[0], t)


def _hopper_k_grouped_layouts(*, a_block, **_):
    by_column = None if a_block == UNSCALED else (1, 0)
    return (None, by_column, None, by_column, None, None), (None,)


def _hopper_k_grouped_operands(a, a_scales, b, b_scales, *rest, **_):
    return a, a_scales.astype(jnp.float32), b, b_scales.astype(jnp.float32), *rest


# a [t, m] and b [t, n]; with scales a [m, t] and b [n, t]. Groups of t as in GROUPED_GEMM.
K_GROUPED_GEMM = _ffi.Op(
    "k_grouped_gemm",
    _k_grouped_gemm_results,
    reference.k_grouped_gemm,
    hopper=_ffi.Kernel(
        layouts=_hopper_k_grouped_layouts,
        attributes=("group_alignment", "group_stride", "accumulate"),
        operands=_hopper_k_grouped_operands,
        refuses=_hopper_refuses_k_grouped,
    ),
)
