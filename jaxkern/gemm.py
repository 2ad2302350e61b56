"""Matrix products: `gemm`, `grouped_gemm`, `k_grouped_gemm`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi, reference
from jaxkern._check import FLOATS, INT32, Sizes, as_array, describe
from jaxkern.quantize import BY_COLUMN, ScaledArray, check_scaled

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
    Gradient: of a, b and accumulator; with a ScaledArray b, of a (b is frozen: zeros). None with a ScaledArray a.
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
    out_dtype=None,
    implementation: str | None = None,
) -> jax.Array:
    """The rows of group i of a, times b[i]^T.

    Shapes and dtypes: a [m, k], b [g, n, k], group_sizes int32 [g] -> [m, n]; dtypes as in `gemm`.
    Units: group i starts where group i - 1 ends, rounded up to a multiple of group_alignment. Rows in no group come out
        zero whatever a holds there. Sizes that are negative or go past m are cut. Time follows the sum of the sizes.
    Sharding: shard_map, along n, along k as in `gemm`, or with the groups' rows.
    Gradient: of a and b, as in `gemm`.
    Implementations: cpu, xla.
    Errors: as `gemm`, and ValueError for a group_alignment below 1.
    Source: DeepGEMM, m-grouped contiguous layout.
    """
    sizes = Sizes("grouped_gemm")
    a = _operand(sizes, "a", a, "m k", blocks=((1, 128),))
    b = _operand(sizes, "b", b, "g n k", blocks=((1, 128), (128, 128)))
    out_dtype = _out_dtype(sizes, a, b, out_dtype)
    group_sizes = sizes.check("group_sizes", group_sizes, INT32, "g")
    sizes.require_size("group_alignment", group_alignment)
    arrays = [a[0][None], a[1][None], b[0], b[1], group_sizes]
    static = _Static(
        "grouped_gemm", a[2], b[2], out_dtype.name, group_alignment=group_alignment, implementation=implementation
    )
    return _grouped_gemm(static, *_ffi.align(*arrays))


def k_grouped_gemm(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    *,
    group_alignment: int = 1,
    accumulator: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """a_i^T b_i + accumulator[i] for the rows a_i and b_i of each group: the weight gradient of `grouped_gemm`.

    Shapes and dtypes: a [t, m], b [t, n], each float32 or bfloat16, group_sizes int32 [g] -> float32 [g, m, n];
        accumulator float32 [g, m, n].
    Units: groups of rows as in `grouped_gemm`; products and sums in float32. An empty group gives zeros, or its
        accumulator; rows in no group have no effect, whatever they hold.
    Sharding: shard_map, along m and n, or with the groups' rows.
    Gradient: of a, b and accumulator.
    Implementations: cpu, xla.
    Errors: TypeError, ValueError.
    Source: DeepGEMM, k-grouped layout.
    """
    sizes = Sizes("k_grouped_gemm")
    a = sizes.check("a", a, FLOATS, "t m")
    b = sizes.check("b", b, FLOATS, "t n")
    group_sizes = sizes.check("group_sizes", group_sizes, INT32, "g")
    sizes.require_size("group_alignment", group_alignment)
    if accumulator is not None:
        accumulator = sizes.check("accumulator", accumulator, (jnp.float32,), "g m n")
    static = _Static(
        "k_grouped_gemm",
        accumulate=accumulator is not None,
        group_alignment=group_alignment,
        implementation=implementation,
    )
    return _k_grouped_gemm(static, *_ffi.align(a, b, group_sizes, _or_absent(accumulator)))


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
    implementation: str | None = None


def _operand(sizes: Sizes, argument: str, x, dims: str, blocks):
    """Values, scales and block shape of one operand."""
    if not isinstance(x, ScaledArray):
        return sizes.check(argument, x, FLOATS, dims), jnp.zeros((0,) * len(dims.split()), jnp.float32), UNSCALED
    allowed = " or ".join(map(str, blocks))
    sizes.require(x.block_shape in blocks, f"{argument} must have blocks {allowed}, got {x.block_shape}")
    values, scales = check_scaled(sizes, argument, as_array(x.values), x.scales, x.block_shape, dims)
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
    out_dtype = np.dtype(out_dtype)
    sizes.require(out_dtype in FLOATS, f"out_dtype must be float32 or bfloat16, got {out_dtype}", TypeError)
    return out_dtype


def _or_absent(accumulator):
    return jnp.zeros((0, 0, 0), jnp.float32) if accumulator is None else accumulator


def _frozen(x, like):
    """The zero cotangent of x, varying over the mesh as `like` does."""
    return _ffi.align(jnp.zeros(x.shape, x.dtype), like)[0]


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
        db = _frozen(b, g)
    daccumulator = g if static.accumulate else _frozen(accumulator, g)
    return da, _frozen(a_scales, g), db, _frozen(b_scales, g), daccumulator


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


def _hopper_refuses_gemm(a, a_scales, b, *_, a_block, **__):
    if a_block == UNSCALED:
        return "a and b must both be ScaledArrays"
    for name, size in (("n", b.shape[1]), ("k", b.shape[2])):
        if size % 16 != 0:
            return f"{name} must be a multiple of 16, got {size}"
    return ""


def _hopper_gemm_layouts(*, b_block, **_):
    return (None, BY_COLUMN, None, BY_COLUMN if b_block == (1, 128) else None, None), (None,)


def _hopper_gemm_operands(a, a_scales, b, b_scales, accumulator, **_):
    return a, a_scales.astype(jnp.float32), b, b_scales.astype(jnp.float32), accumulator


GEMM = _ffi.Op(
    "gemm",
    _gemm_results,
    reference.gemm,
    batch=_fold_gemm,
    hopper=_ffi.Kernel(
        layouts=_hopper_gemm_layouts,
        attributes=("b_block", "accumulate"),
        operands=_hopper_gemm_operands,
        refuses=_hopper_refuses_gemm,
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
    groups = {"group_alignment": static.group_alignment, "implementation": static.implementation}
    back = _Static("grouped_gemm", UNSCALED, static.b_block, a.dtype.name, **groups)
    da = _call_grouped_gemm(back, g[None], absent, b, b_scales, group_sizes, transpose_b=True)[None]
    if static.b_block == UNSCALED:
        weights = _Static("k_grouped_gemm", **groups)
        db = _call_k_grouped_gemm(weights, g, a[0], group_sizes, absent).astype(b.dtype)
    else:
        db = _frozen(b, g)
    return da, _frozen(a_scales, g), db, _frozen(b_scales, g), _no_tangent(group_sizes)


def _no_tangent(x):
    return np.zeros(x.shape, jax.dtypes.float0)


_grouped_gemm.defvjp(_grouped_gemm_forward, _grouped_gemm_backward)


def _grouped_gemm_results(a, a_scales, b, b_scales, group_sizes, *, transpose_b, out_dtype, **_):
    return [((a.shape[1], b.shape[2 if transpose_b else 1]), out_dtype)]


GROUPED_GEMM = _ffi.Op("grouped_gemm", _grouped_gemm_results, reference.grouped_gemm)


# ---- k_grouped_gemm ----


def _call_k_grouped_gemm(static, a, b, group_sizes, accumulator):
    (out,) = _ffi.call(
        K_GROUPED_GEMM,
        a,
        b,
        group_sizes,
        accumulator,
        implementation=static.implementation,
        group_alignment=static.group_alignment,
        accumulate=static.accumulate,
    )
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _k_grouped_gemm(static, a, b, group_sizes, accumulator):
    return _call_k_grouped_gemm(static, a, b, group_sizes, accumulator)


def _k_grouped_gemm_forward(static, a, b, group_sizes, accumulator):
    return _k_grouped_gemm(static, a, b, group_sizes, accumulator), (a, b, group_sizes, accumulator)


def _k_grouped_gemm_backward(static, saved, g):
    a, b, group_sizes, accumulator = saved
    absent = _or_absent(None)

    def rows(x, dtype, transpose_b):
        back = _Static(
            "grouped_gemm",
            out_dtype=dtype.name,
            group_alignment=static.group_alignment,
            implementation=static.implementation,
        )
        return _call_grouped_gemm(back, x[None], absent, g, absent, group_sizes, transpose_b=transpose_b)

    da, db = rows(b, a.dtype, False), rows(a, b.dtype, True)
    return da, db, _no_tangent(group_sizes), g if static.accumulate else _frozen(accumulator, g)


_k_grouped_gemm.defvjp(_k_grouped_gemm_forward, _k_grouped_gemm_backward)


def _k_grouped_gemm_results(a, b, group_sizes, accumulator, **_):
    return [((group_sizes.shape[0], a.shape[1], b.shape[1]), jnp.float32)]


K_GROUPED_GEMM = _ffi.Op("k_grouped_gemm", _k_grouped_gemm_results, reference.k_grouped_gemm)
