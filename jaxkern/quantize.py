"""Block-scaled FP8: `ScaledArray`, `quantize`, `quantize_along_tokens`, `swiglu_quantize`, `dequantize`."""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi, reference
from jaxkern._check import INT32, Sizes, describe

BLOCK_SHAPES = ((1, 128), (128, 128))
MOST_GROUPS, MOST_GROUPED = 1024, 2**26 - 1  # what the Hopper kernels hold: groups, and rows of all of them
BY_COLUMN = (0, 2, 1)  # major to minor: how the scales of (1, 128) blocks lie in a GPU's memory, m contiguous
ScaleFormat = Literal["float32", "power_of_two", "ue8m0"]
SCALE_FORMATS = get_args(ScaleFormat)
TOKEN_BLOCK = 128  # tokens that share a scale in `quantize_along_tokens`, and the alignment of its groups
_INPUTS = tuple(map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


@_ffi.exportable
@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["block_shape"])
class ScaledArray:
    """An FP8 array with one scale a block: element = value * scale of its block.

    values: float8_e4m3fn [..., m, k]
    scales: float32 or float8_e8m0fnu [..., ceil(m / bm), ceil(k / bk)]
    block_shape: (bm, bk), static; (1, 128) for activations, (128, 128) for weights. Blocks at the edge may be partial.

    A pytree, so it passes through jit, scan, vmap, exports and checkpoints.
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
    scale_format: ScaleFormat = "float32",
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
    sizes = Sizes("quantize")
    x = sizes.array("x", x)
    check_scale_format(sizes, scale_format)
    block_shape = _check_block_shape(sizes, block_shape)
    sizes.require(x.ndim >= 2, f"x must be [..., m, k], got {describe(x)}")
    *batch, m, k = x.shape
    x3 = sizes.check("x", x.reshape(math.prod(batch), m, k), _INPUTS, "b m k")
    values, scales = _ffi.call(
        QUANTIZE, x3, implementation=implementation, block_shape=block_shape, scale_format=scale_format
    )
    return ScaledArray(values.reshape(x.shape), scales.reshape(*batch, *scales.shape[1:]), block_shape)


def quantize_along_tokens(
    x: jax.Array,
    group_sizes: jax.Array | None = None,
    *,
    group_alignment: int = 1,
    scale_format: ScaleFormat = "float32",
    implementation: str | None = None,
) -> ScaledArray:
    """Transposes x and quantises it in blocks of 128 tokens: an operand of a weight gradient, `k_grouped_gemm`.

    Shapes and dtypes: x float32, bfloat16 or float16 [t, m], group_sizes int32 [g], None for one group of all t ->
        values [m, T], scales [m, T / 128]; T is t rounded up to a multiple of 128, plus 128 * (g - 1) unless
        group_alignment is a multiple of 128.
    Units: scales and values as in `quantize`. The groups of x are laid out as in `grouped_gemm`, with group_alignment;
        those of the result start at multiples of 128, so that no two share a block: what `k_grouped_gemm` takes with
        the same group_sizes and group_alignment=128. Tokens in no group do not appear. What is left of the result is
        blocks of zeros, and zeros that end a group's last block.
    Sharding: shard_map, along m, or with the groups' rows.
    Gradient: none.
    Implementations: cpu, xla; cuda and sim for at most 1024 groups and 2^26 - 1 tokens.
    Errors: TypeError for another dtype, ValueError for shapes, a group_alignment below 1, or an unknown scale format.
    Source: DeepSeek-V3 report, section 3.3.2: activations are requantised along tokens for the weight gradient.
    """
    sizes = Sizes("quantize_along_tokens")
    check_scale_format(sizes, scale_format)
    x = sizes.check("x", x, _INPUTS, "t m")
    everything = jnp.full(1, np.iinfo(np.int32).max, jnp.int32)  # cut to the t that there are
    group_sizes = everything if group_sizes is None else sizes.check("group_sizes", group_sizes, INT32, "g")
    group_alignment = sizes.require_size("group_alignment", group_alignment)
    tokens = blocks_of(sizes["t"], TOKEN_BLOCK) * TOKEN_BLOCK
    if group_alignment % TOKEN_BLOCK != 0:
        tokens += TOKEN_BLOCK * max(group_sizes.shape[0] - 1, 0)
    values, scales = _ffi.call(
        QUANTIZE_ALONG_TOKENS,
        x,
        group_sizes,
        implementation=implementation,
        group_alignment=group_alignment,
        scale_format=scale_format,
        tokens=tokens,
    )
    return ScaledArray(values, scales)


def swiglu_quantize(
    gate_up: jax.Array | tuple[jax.Array, jax.Array],
    weights: jax.Array | None = None,
    *,
    num_rows: jax.Array | None = None,
    scale_format: ScaleFormat = "float32",
    implementation: str | None = None,
) -> ScaledArray:
    """silu(gate) * up * weights, quantised: what lies between the two products of an expert.

    Shapes and dtypes: gate_up float32, bfloat16 or float16 [..., m, 2i], the gate first, or a pair (gate, up) of
        [..., m, i]; weights float32 [..., m], or None for ones; num_rows int32 [...], or None for m -> ScaledArray
        [..., m, i] with blocks (1, 128).
    Units: silu(x) = x / (1 + exp(-x)); products in float32, within 1e-6 of the exact one, and one rounding, to e4m3, as
        in `quantize`: a block in which a product is NaN or infinite becomes NaN. Only the first num_rows rows of each
        matrix count: time follows their number, and what the others come out as is undefined. For what a grouped
        product gives, num_rows is where its last group ends, which with a group_alignment of 1 is the sum of the
        group_sizes; for a masked one it is the group_sizes themselves.
    Sharding: shard_map, along m (not with num_rows) and the axes before it; along i a pair, where that does not cut a
        block.
    Gradient: none.
    Implementations: cpu, xla, cuda, sim.
    Errors: TypeError for another dtype, ValueError for shapes, an odd 2i, or an unknown scale format.
    Source: DeepSeek-V3 report, sections 2.1.2 and 3.3.2; DeepGEMM, the activation between its two expert products.
    """
    sizes = Sizes("swiglu_quantize")
    check_scale_format(sizes, scale_format)
    paired = isinstance(gate_up, (tuple, list))
    sizes.require(not paired or len(gate_up) == 2, "gate_up must be one array or a pair (gate, up)")
    gate = sizes.array("gate_up", gate_up[0] if paired else gate_up)
    sizes.require(gate.ndim >= 2, f"gate_up must be [..., m, {'i' if paired else '2i'}], got {describe(gate)}")
    *batch, m, width = gate.shape
    names = [f"b{axis}" for axis in range(len(batch))] + ["m"]
    gate = sizes.check("gate_up", gate, _INPUTS, " ".join([*names, "i" if paired else "2i"]))
    sizes.require(paired or width % 2 == 0, f"gate_up must have an even last axis, got {describe(gate)}")
    rows = math.prod(batch), m
    up = jnp.zeros((rows[0], 0, 0), gate.dtype)
    if paired:
        up = sizes.check("gate_up[1]", gate_up[1], (gate.dtype,), " ".join([*names, "i"])).reshape(*rows, width)
    weighted = weights is not None
    weights = sizes.check("weights", weights, (jnp.float32,), " ".join(names)) if weighted else None
    weights = weights.reshape(rows) if weighted else jnp.zeros((rows[0], 0))
    counted = num_rows is not None
    num_rows = sizes.check("num_rows", num_rows, INT32, " ".join(names[:-1])) if counted else jnp.zeros(0, jnp.int32)
    values, scales = _ffi.call(
        SWIGLU_QUANTIZE,
        gate.reshape(*rows, width),
        up,
        weights,
        num_rows.reshape(rows[0], int(counted)),
        implementation=implementation,
        paired=paired,
        weighted=weighted,
        counted=counted,
        scale_format=scale_format,
    )
    return ScaledArray(*[x.reshape(*batch, *x.shape[1:]) for x in (values, scales)])


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
    dtype = sizes.require_dtype("dtype", dtype, _INPUTS)
    values, scales = sizes.array("a.values", a.values), sizes.array("a.scales", a.scales)
    sizes.require(a.ndim >= 2, f"a.values must be [..., m, k], got {describe(values)}")
    batch = a.shape[:-2]
    values = values.reshape(math.prod(batch), *a.shape[-2:])
    fits = scales.ndim == a.ndim and scales.shape[:-2] == batch
    sizes.require(
        fits, f"a.scales must be a matrix for each matrix of a.values, {describe(a.values)}, got {describe(scales)}"
    )
    scales = scales.reshape(math.prod(batch), *scales.shape[-2:])
    check_scaled(sizes, "a", values, scales, a.block_shape, "b m k")
    (x,) = _ffi.call(
        DEQUANTIZE, values, scales, implementation=implementation, block_shape=a.block_shape, dtype=dtype.name
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


def too_many_groups(groups, rows) -> str:
    """Why a Hopper kernel cannot take these groups; empty if it can, or if only the handler will see their sizes."""
    if isinstance(groups, int) and groups > MOST_GROUPS:
        return f"there must be at most {MOST_GROUPS} groups, got {groups}"
    if isinstance(rows, int) and rows > MOST_GROUPED:
        return f"groups must be of at most {MOST_GROUPED} rows together, got {rows}"
    return ""


def blocks_of(size, block: int):
    return -(-size // block)


def check_scale_format(sizes: Sizes, scale_format):
    sizes.require(scale_format in SCALE_FORMATS, f"scale_format must be one of {SCALE_FORMATS}, got {scale_format!r}")


def _check_block_shape(sizes: Sizes, block_shape) -> tuple[int, int]:
    same = [b for b in BLOCK_SHAPES if isinstance(block_shape, tuple | list) and tuple(block_shape) == b]
    sizes.require(same, f"block_shape must be one of {BLOCK_SHAPES}, got {block_shape}")
    return same[0]


def scaled(*shape, block_shape, scale_format):
    """Shapes and dtypes of values and scales."""
    *batch, m, k = shape
    scale_dtype = jnp.float8_e8m0fnu if scale_format == "ue8m0" else jnp.float32
    scales = (*batch, blocks_of(m, block_shape[0]), blocks_of(k, block_shape[1]))
    return [(shape, jnp.float8_e4m3fn), (scales, scale_dtype)]


def _swiglu_quantize_results(gate, up, weights, num_rows, *, paired, scale_format, **_):
    b, m, width = gate.shape
    return scaled(b, m, width if paired else width // 2, block_shape=(1, 128), scale_format=scale_format)


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
    lambda x, **params: scaled(*x.shape, **params),
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
QUANTIZE_ALONG_TOKENS = _ffi.Op(
    "quantize_along_tokens",
    lambda x, group_sizes, *, tokens, scale_format, **_: scaled(
        x.shape[1], tokens, block_shape=(1, TOKEN_BLOCK), scale_format=scale_format
    ),
    reference.quantize_along_tokens,
    sizes=("tokens",),
    hopper=_ffi.Kernel(
        layouts=lambda **_: ((None, None), (None, (1, 0))),
        attributes=("group_alignment", "scale_format"),
        refuses=lambda x, group_sizes, **_: too_many_groups(group_sizes.shape[0], x.shape[0]),
    ),
)
# gate [b, m, i] and up [b, m, i] if `paired`, or [b, m, 2i] and [b, 0, 0]; weights [b, m] if `weighted`, or [b, 0];
# num_rows [b, 1] if `counted`, or [b, 0].
SWIGLU_QUANTIZE = _ffi.Op(
    "swiglu_quantize",
    _swiglu_quantize_results,
    reference.swiglu_quantize,
    batch=_fold_batch,
    cpu=2,
    hopper=_ffi.Kernel(
        layouts=lambda **_: ((None,) * 4, (None, BY_COLUMN)),
        attributes=("paired", "weighted", "counted", "scale_format"),
        version=2,
    ),
)
