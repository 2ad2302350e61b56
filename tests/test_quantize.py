"""Block-scaled FP8 against ml_dtypes and the definitions in NumPy."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from contract import HOPPER_IMPLEMENTATION
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxkern

E4M3 = ml_dtypes.float8_e4m3fn
ALL_CODES = np.arange(256, dtype=np.uint8)
INPUTS = [np.float32, ml_dtypes.bfloat16, np.float16]
FORMATS = ("float32", "power_of_two", "ue8m0")


def define(x, block_shape, scale_format):
    """quantize, written as its docstring says it."""
    x = x.astype(np.float32)
    (m, k), (bm, bk) = x.shape, block_shape
    scales = np.zeros((-(-m // bm), -(-k // bk)), np.float32)
    values = np.zeros((m, k), E4M3)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = np.s_[i * bm : (i + 1) * bm, j * bk : (j + 1) * bk]
            amax = np.abs(x[block]).max()
            scale = np.maximum(amax, np.float32(1e-4)) / np.float32(448) if np.isfinite(amax) else np.float32(np.nan)
            if scale_format != "float32" and np.isfinite(scale):
                mantissa, exponent = np.frexp(scale)
                scale = np.float32(np.ldexp(1.0, exponent - (mantissa == 0.5)))
            scales[i, j] = scale
            with np.errstate(invalid="ignore"):
                values[block] = (x[block] / scale).astype(E4M3)
    return values, scales.astype(ml_dtypes.float8_e8m0fnu) if scale_format == "ue8m0" else scales


def assert_same_codes(got, expected):
    """Bit for bit, but that one NaN is as good as another."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    number = ~np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), ~number)
    unsigned = np.dtype(f"u{got.dtype.itemsize}")
    np.testing.assert_array_equal(got.view(unsigned)[number], expected.view(unsigned)[number])


@pytest.mark.parametrize("implementation", ["cpu", "xla", HOPPER_IMPLEMENTATION])
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("block_shape", [(1, 128), (128, 128)])
def test_definition(implementation, scale_format, block_shape):
    rng = np.random.default_rng(0)
    for dtype in INPUTS:
        x = (rng.standard_normal((150, 300)) * np.exp(rng.normal(0, 2, (150, 300)))).astype(dtype)
        x[3, 5], x[140, 290], x[0, 130:256] = np.nan, -np.inf, 0
        a = jaxkern.quantize(x, block_shape, scale_format=scale_format, implementation=implementation)
        values, scales = define(x, block_shape, scale_format)
        assert_same_codes(a.scales, scales)
        assert_same_codes(a.values, values)


@pytest.mark.parametrize("implementation", ["cpu", "xla", HOPPER_IMPLEMENTATION])
def test_every_code_survives_and_every_tie_goes_to_even(implementation):
    """With 448 in the block the scale is one, so codes and the points between them are seen as they are."""
    codes = ALL_CODES.view(E4M3).astype(np.float32)
    finite = np.sort(codes[np.isfinite(codes)])
    middles = (finite[1:] + finite[:-1]) / 2
    points = np.concatenate(
        [finite, middles, np.nextafter(middles, np.float32(-9e9)), np.nextafter(middles, np.float32(9e9)), [-0.0, 0.0]]
    ).astype(np.float32)
    rows = np.zeros((-(-points.size // 127), 128), np.float32)
    rows[:, 0] = 448
    rows[:, 1:].flat[: points.size] = points
    a = jaxkern.quantize(rows, implementation=implementation)
    np.testing.assert_array_equal(a.scales, 1)
    assert_same_codes(a.values, rows.astype(E4M3))


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("dtype", INPUTS)
def test_dequantize_every_code_with_every_scale(implementation, dtype):
    values = np.tile(ALL_CODES.view(E4M3), (256, 1))[:, :256]
    exponents = np.tile(ALL_CODES[:, None], (1, 2)).view(ml_dtypes.float8_e8m0fnu)
    normal = np.s_[1:]  # 2^-127 is a float32 denormal, which XLA may flush
    for scales in (exponents, np.random.default_rng(1).standard_normal((256, 2)).astype(np.float32)):
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            exact = values.astype(np.float32) * np.repeat(scales.astype(np.float32), 128, 1)
            tiny = np.abs(exact) < (2.0**-126 if dtype != np.float16 else 0)
            expected = np.where(tiny, 0, exact).astype(dtype)
        got = jaxkern.dequantize(jaxkern.ScaledArray(values, scales), dtype, implementation=implementation)
        got = np.where(tiny, 0, np.asarray(got)).astype(dtype)
        assert_same_codes(np.abs(got[normal]), np.abs(expected[normal]))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=2).flatmap(
        lambda batch: st.tuples(st.just(batch), st.sampled_from([0, 1, 127, 129]), st.sampled_from([0, 1, 130, 256]))
    ),
    block_shape=st.sampled_from([(1, 128), (128, 128)]),
    implementation=st.sampled_from({"sim": ["cpu", "sim"], "none": ["cpu"]}.get(HOPPER_IMPLEMENTATION, ["cuda"])),
)
def test_any_shape(shape, block_shape, implementation):
    batch, m, k = shape
    x = np.random.default_rng(m + k).standard_normal((*batch, m, k)).astype(np.float32)
    a = jaxkern.quantize(x, block_shape, implementation=implementation)
    assert a.scales.shape == (*batch, -(-m // block_shape[0]), -(-k // block_shape[1]))
    y = np.asarray(jaxkern.dequantize(a))
    assert y.shape == x.shape
    # Half a step of a 3-bit mantissa, or of the smallest code of a block.
    scales = np.repeat(np.repeat(a.scales, block_shape[0], -2), block_shape[1], -1)[..., :m, :k]
    assert (np.abs(y - x) <= np.maximum(np.abs(x) * 2.0**-4, scales * 2.0**-10) * 1.0001).all()


# ---- along tokens ----


def define_along_tokens(x, sizes, alignment, scale_format):
    """quantize_along_tokens, written as its docstring says it."""
    t, m = x.shape
    tokens = -(-t // 128) * 128 + (0 if alignment % 128 == 0 else 128 * (len(sizes) - 1))
    laid, begin, to = np.zeros((tokens, m), x.dtype), 0, 0
    for size in sizes:
        size = min(max(size, 0), t - begin)
        laid[to : to + size] = x[begin : begin + size]
        begin, to = min(-(-(begin + size) // alignment) * alignment, t), -(-(to + size) // 128) * 128
    return define(laid.T, (1, 128), scale_format)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(INPUTS),
    t=st.sampled_from([0, 1, 128, 300, 513]),
    m=st.sampled_from([1, 15, 130, 300]),
    sizes=st.one_of(
        st.none(),
        st.lists(st.sampled_from([0, 0, 1, 7, 60, 128, 130, 600, -5, 2**31 - 1, -(2**31)]), min_size=1, max_size=5),
    ),
    alignment=st.sampled_from([1, 8, 100, 128, 256]),
    scale_format=st.sampled_from(FORMATS),
    implementation=st.sampled_from(["cpu", "cpu", "xla"]),
)
def test_along_tokens(dtype, t, m, sizes, alignment, scale_format, implementation):
    rng = np.random.default_rng(t + m)
    x = (rng.standard_normal((t, m)) * np.exp(rng.normal(0, 2, (t, m)))).astype(dtype)
    if t > 1:
        x[0, 0], x[t // 2, m // 2] = np.nan, np.inf
    a = jaxkern.quantize_along_tokens(
        x,
        None if sizes is None else jnp.asarray(sizes, jnp.int32),
        group_alignment=alignment,
        scale_format=scale_format,
        implementation=implementation,
    )
    values, scales = define_along_tokens(x, [t] if sizes is None else sizes, alignment, scale_format)
    assert a.block_shape == (1, 128)
    assert_same_codes(a.scales, scales)
    assert_same_codes(a.values, values)


@pytest.mark.parametrize("implementation", ["cpu", "xla", HOPPER_IMPLEMENTATION])
def test_along_tokens_without_groups(implementation):
    a = jaxkern.quantize_along_tokens(jnp.ones((70, 3)), jnp.zeros(0, jnp.int32), implementation=implementation)
    assert a.shape == (3, 128) and not np.asarray(a.values, np.float32).any()
    np.testing.assert_array_equal(a.scales, np.float32(1e-4) / np.float32(448))


# ---- swiglu ----


def check_swiglu(a, gate, up, weights, scale_format):
    """The closed form in float64: scales to an exp's last bits, values within half a step of their code and that."""
    gate, up = (np.asarray(x).astype(np.float64) for x in (gate, up))
    with np.errstate(over="ignore"):
        exact = gate / (1 + np.exp(-gate)) * up * np.asarray(weights, np.float64)[..., None]
    *batch, width = exact.shape
    padded = np.zeros((*batch, -(-width // 128) * 128))
    padded[..., :width] = np.abs(exact)
    ideal = np.maximum(padded.reshape(*batch, -(-width // 128), 128).max(-1), 1e-4) / 448
    scales = np.asarray(a.scales).astype(np.float64)
    assert a.shape == exact.shape and scales.shape == ideal.shape
    if scale_format == "float32":
        np.testing.assert_allclose(scales, ideal, rtol=2e-6)
    else:  # rounded up to a power of two, never down
        assert (np.frexp(scales)[0] == 0.5).all()
        assert (scales >= ideal * (1 - 2e-6)).all() and (scales < 2 * ideal * (1 + 2e-6)).all()
    scales = scales.repeat(128, -1)[..., :width]
    error = np.abs(np.asarray(a.values).astype(np.float64) * scales - exact)
    assert (error <= np.maximum(np.abs(exact) * 2.0**-4, scales * 2.0**-10) * (1 + 1e-4)).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(INPUTS),
    batch=st.sampled_from([(), (3,), (2, 2), (0,)]),
    m=st.sampled_from([0, 1, 5]),
    i=st.sampled_from([0, 1, 17, 128, 300]),
    paired=st.booleans(),
    weighted=st.booleans(),
    scale_format=st.sampled_from(FORMATS),
    implementation=st.sampled_from(["cpu", "cpu", "xla"]),
)
def test_swiglu(dtype, batch, m, i, paired, weighted, scale_format, implementation):
    rng = np.random.default_rng(i)
    gate_up = (rng.standard_normal((*batch, m, 2 * i)) * np.exp(rng.normal(0, 2, (*batch, m, 2 * i)))).astype(dtype)
    weights = rng.standard_normal((*batch, m)).astype(np.float32)
    gate, up = gate_up[..., :i], gate_up[..., i:]
    a = jaxkern.swiglu_quantize(
        (gate, up) if paired else gate_up,
        weights if weighted else None,
        scale_format=scale_format,
        implementation=implementation,
    )
    check_swiglu(a, gate, up, weights if weighted else np.ones_like(weights), scale_format)


@pytest.mark.parametrize("implementation", ["cpu", "xla", HOPPER_IMPLEMENTATION])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_swiglu_of_some_rows(batch, scale_format, implementation):
    """The first rows come out as ever; what the others hold has no effect on them."""
    m, i = 45, 200
    rng = np.random.default_rng(0)
    gate_up, weights = rng.standard_normal((*batch, m, 2 * i)), rng.standard_normal((*batch, m)).astype(np.float32)
    num_rows = np.resize([20, 0, 2**31 - 1, -7], batch).astype(np.int32)
    counted = np.arange(m) < num_rows[..., None]
    some = np.where(counted[..., None], gate_up, np.nan).astype(jnp.bfloat16)
    options = {"scale_format": scale_format, "implementation": implementation}
    want = jaxkern.swiglu_quantize(gate_up.astype(jnp.bfloat16), weights, **options)
    for got in (
        jaxkern.swiglu_quantize(some, weights, num_rows=num_rows, **options),
        jaxkern.swiglu_quantize((some[..., :i], some[..., i:]), weights, num_rows=num_rows, **options),
    ):
        assert_same_codes(got.values[counted], want.values[counted])
        assert_same_codes(got.scales[counted], want.scales[counted])


@pytest.mark.skipif(HOPPER_IMPLEMENTATION != "sim", reason="a GPU does not count")
def test_rows_that_do_not_count_move_nothing(simulator):
    def moved(m, num_rows):
        simulator.clear_statistics()
        x = jnp.ones((m, 256), jnp.bfloat16)
        jax.block_until_ready(jaxkern.swiglu_quantize(x, num_rows=num_rows, implementation="sim"))
        (counts,) = json.loads(simulator.statistics())["kernels"].values()
        return counts["moved_bytes"]

    rows = moved(32, None)
    assert moved(320, jnp.int32(32)) - rows <= 10 * 256 * 4  # the number of rows, read by every thread


@pytest.mark.parametrize("implementation", ["cpu", HOPPER_IMPLEMENTATION])
def test_swiglu_over_all_gates(implementation):
    """silu far to both sides, where exp overflows and where it vanishes."""
    gate = np.concatenate([-np.geomspace(1e-8, 3e38, 4000), [0.0], np.geomspace(1e-8, 1e30, 4000)]).astype(np.float32)
    rows = np.zeros((-(-gate.size // 8), 8), np.float32)
    rows.flat[: gate.size] = np.sort(gate)
    a = jaxkern.swiglu_quantize((rows, np.ones_like(rows)), implementation=implementation)
    check_swiglu(a, rows, np.ones_like(rows), np.ones(len(rows)), "float32")


@pytest.mark.parametrize("implementation", ["cpu", "xla", HOPPER_IMPLEMENTATION])
def test_swiglu_of_bad_data(implementation):
    gate, up = np.ones((7, 256), np.float32), np.ones((7, 256), np.float32)
    weights = np.asarray([1, 0, 1, 1, 0, 1, np.nan], np.float32)
    gate[0, 3], up[2, 200], gate[3, 200] = np.nan, np.inf, -np.inf
    gate[5, 130] = up[5, 130] = 3e38  # finite, but their product is not
    a = jaxkern.swiglu_quantize((gate, up), weights, implementation=implementation)
    bad = np.zeros((7, 2), bool)
    bad[0, 0] = bad[2, 1] = bad[3, 1] = bad[5, 1] = bad[6, 0] = bad[6, 1] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(a.scales)), bad)
    np.testing.assert_array_equal(np.isnan(np.asarray(a.values, np.float32)), bad.repeat(128, 1))
    for row in (1, 4):  # a weight of zero is a block of zeros
        assert not np.asarray(a.values[row], np.float32).any()
        np.testing.assert_array_equal(a.scales[row], np.float32(1e-4) / np.float32(448))


def test_errors_name_what_is_wrong():
    x = jnp.ones((4, 256))
    with pytest.raises(ValueError, match="quantize_along_tokens: scale_format must be one of"):
        jaxkern.quantize_along_tokens(x, scale_format="int8")
    with pytest.raises(ValueError, match=r"quantize_along_tokens: group_alignment must be in 1..2\*\*31 - 1, got 0"):
        jaxkern.quantize_along_tokens(x, group_alignment=0)
    with pytest.raises(ValueError, match=r"swiglu_quantize: gate_up must have an even last axis, got float32\[4,255\]"):
        jaxkern.swiglu_quantize(x[:, :255])
    with pytest.raises(ValueError, match=r"swiglu_quantize: gate_up must be one array or a pair \(gate, up\)"):
        jaxkern.swiglu_quantize((x, x, x))
    with pytest.raises(TypeError, match=r"swiglu_quantize: gate_up\[1\] must be float32 \[m=4, i=256\], got bfloat16"):
        jaxkern.swiglu_quantize((x, x.astype(jnp.bfloat16)))
    with pytest.raises(ValueError, match=r"swiglu_quantize: weights must be float32 \[m=4\], got float32\[5\]"):
        jaxkern.swiglu_quantize(x, jnp.ones(5))
    with pytest.raises(ValueError, match=r"swiglu_quantize: num_rows must be int32 \[\], got int32\[4\]"):
        jaxkern.swiglu_quantize(x, num_rows=jnp.ones(4, jnp.int32))
    with pytest.raises(ValueError, match="quantize: block_shape must be one of"):
        jaxkern.quantize(x, (1, 64))
    with pytest.raises(ValueError, match="quantize: scale_format must be one of"):
        jaxkern.quantize(x, scale_format="int8")
    with pytest.raises(ValueError, match=r"quantize: x must be \[..., m, k\], got float32\[4\]"):
        jaxkern.quantize(x[:, 0])
    with pytest.raises(TypeError, match="dequantize: a must be a ScaledArray, got ArrayImpl"):
        jaxkern.dequantize(x)
    with pytest.raises(TypeError, match=r"dequantize: a.values must be float8_e4m3fn"):
        jaxkern.dequantize(jaxkern.ScaledArray(x, x))


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_along_no_tokens(implementation):
    a = jaxkern.quantize_along_tokens(jnp.ones((0, 4)), jnp.zeros(3, jnp.int32), implementation=implementation)
    assert a.shape == (4, 256) and (jaxkern.dequantize(a) == 0).all()


def test_dtypes_and_shapes_that_are_none():
    a = jaxkern.quantize(jnp.ones((4, 128)))
    with pytest.raises(ValueError, match=r"quantize: block_shape must be one of .*, got 128"):
        jaxkern.quantize(jnp.ones((4, 128)), 128)
    for dtype in (None, "foo", jnp.float8_e4m3fn):
        with pytest.raises(TypeError, match="dequantize: dtype must be float32 or bfloat16 or float16, got "):
            jaxkern.dequantize(a, dtype)
    with pytest.raises(TypeError, match="quantize: x must be an array, got ScaledArray"):
        jaxkern.quantize(a)
