"""Block-scaled FP8 against ml_dtypes and the definition in NumPy."""

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
@pytest.mark.parametrize("scale_format", ["float32", "power_of_two", "ue8m0"])
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


def test_errors_name_what_is_wrong():
    x = jnp.ones((4, 256))
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
