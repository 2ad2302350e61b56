"""gemm and its grouped, masked and k-grouped forms against exact products in float64."""

import functools
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from contract import HOPPER_IMPLEMENTATION
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern import (
    ScaledArray,
    dequantize,
    fp8_grouped_linear,
    gemm,
    grouped_gemm,
    k_grouped_gemm,
    masked_grouped_gemm,
    quantize,
    quantize_along_tokens,
)

KINDS = ("f32", "bf16", "f32 x fp8", "bf16 x fp8", "f32 x fp8 rows", "fp8 x fp8", "fp8 x fp8 rows", "fp8 x fp8 ue8m0")
few = settings(max_examples=20, deadline=None, derandomize=True)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def exact(x):
    """The float64 array that an operand stands for."""
    if isinstance(x, ScaledArray):
        bm, bk = x.block_shape
        scales = np.asarray(x.scales).astype(np.float64).repeat(bm, -2).repeat(bk, -1)
        return np.asarray(x.values).astype(np.float64) * scales[..., : x.shape[-2], : x.shape[-1]]
    return np.asarray(x).astype(np.float64)


def operands(kind, a, b):
    """a and b as the operand kind that the name says."""
    a_kind, _, b_kind = kind.partition(" x ")
    if not b_kind:
        dtype = jnp.float32 if kind == "f32" else jnp.bfloat16
        return a.astype(dtype), b.astype(dtype)
    scale_format = "ue8m0" if "ue8m0" in b_kind else "float32"
    b = quantize(b, (1, 128) if "rows" in b_kind else (128, 128), scale_format=scale_format)
    if a_kind == "fp8":
        return quantize(a, scale_format=scale_format), b
    return a.astype(jnp.float32 if a_kind == "f32" else jnp.bfloat16), b


def assert_close(got, want, magnitude, sums=1e-5):
    """float32 to `sums` of the sum of the products' magnitudes; bfloat16 within one rounding of that."""
    got = np.asarray(got)
    tolerance = sums * magnitude + 1e-30
    if got.dtype == ml_dtypes.bfloat16:
        tolerance = tolerance + 2.0**-8 * np.abs(want)
    assert got.shape == want.shape
    error = np.abs(got.astype(np.float64) - want)
    assert (error <= tolerance).all(), f"off by {(error / tolerance).max():.3g} tolerances"


def check_gemm(a, b, got, accumulator=0.0, sums=1e-5):
    a, b = exact(a), exact(b)
    assert_close(got, a @ b.T + accumulator, np.abs(a) @ np.abs(b).T + np.abs(accumulator), sums)


def calc_diff(x, y):
    """DeepGEMM's measure: 0 where they agree."""
    x, y = exact(x), exact(y)
    return 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum())


# ---- gemm ----


@few
@given(
    kind=st.sampled_from(KINDS),
    m=st.sampled_from([1, 2, 5, 8, 9, 16, 17, 40, 97]),
    n=st.sampled_from([1, 7, 96, 130, 257]),
    k=st.sampled_from([1, 31, 128, 200, 641]),
    out_dtype=st.sampled_from([None, jnp.float32, jnp.bfloat16]),
    accumulate=st.booleans(),
)
def test_gemm(kind, m, n, k, out_dtype, accumulate):
    a, b = operands(kind, normal(m, k), normal(n, k, seed=1))
    out_dtype = out_dtype or (jnp.float32 if kind.startswith("f32") else jnp.bfloat16)
    accumulator = normal(m, n, seed=2, dtype=out_dtype) if accumulate else None
    got = gemm(a, b, accumulator=accumulator, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    check_gemm(a, b, got, exact(accumulator) if accumulate else 0.0)


@pytest.mark.parametrize("kind", ["f32", "fp8 x fp8"])
def test_many_rows_are_cut_into_segments(kind):
    a, b = operands(kind, normal(1100, 300), normal(150, 300, seed=1))
    check_gemm(a, b, gemm(a, b, out_dtype=jnp.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [3, 40])
def test_reference(kind, m):
    a, b = operands(kind, normal(m, 200), normal(130, 200, seed=1))
    check_gemm(a, b, gemm(a, b, out_dtype=jnp.float32, implementation="xla"))


def test_default_out_dtype():
    a, b = normal(2, 128), normal(3, 128)
    for kind in KINDS:
        expected = jnp.float32 if kind.startswith("f32") else jnp.bfloat16
        assert gemm(*operands(kind, a, b)).dtype == expected


@pytest.mark.parametrize(
    "kind,implementation", [("f32", "cpu"), ("fp8 x fp8", "cpu"), ("fp8 x fp8", HOPPER_IMPLEMENTATION)]
)
@pytest.mark.parametrize("m,n,k", [(0, 16, 32), (3, 0, 16), (3, 16, 0), (20, 16, 0)])
def test_zero_sizes(kind, implementation, m, n, k):
    a, b = operands(kind, normal(m, k), normal(n, k))
    accumulator = normal(m, n, dtype=jnp.float32)
    product = functools.partial(gemm, a, b, out_dtype=jnp.float32, implementation=implementation)
    np.testing.assert_array_equal(product(), np.zeros((m, n)))
    np.testing.assert_array_equal(product(accumulator=accumulator), accumulator)


@pytest.mark.parametrize("kind", ["fp8 x fp8", "fp8 x fp8 rows"])
@pytest.mark.parametrize("m", [4, 64])
def test_close_to_the_unquantised_product(kind, m):
    a, b = normal(m, 1024), normal(200, 1024, seed=1)
    assert calc_diff(gemm(*operands(kind, a, b)), exact(a) @ exact(b).T) < 1e-3


@pytest.mark.parametrize("m", [1, 16])
def test_every_fp8_code(m):
    """A product with ones at k = 0 is the code itself, for values that sit in any lane."""
    codes = np.tile(np.arange(256, dtype=np.uint8), 2)[:300].reshape(300, 1).repeat(40, 1)
    values = codes.view(ml_dtypes.float8_e4m3fn)
    for column in (0, 37):
        a = np.zeros((m, 40), np.float32)
        a[:, column] = 1
        only = np.where(np.arange(40) == column, values, np.zeros((), values.dtype))
        b = ScaledArray(jnp.asarray(only), jnp.full((3, 1), 2.0), (128, 128))
        want = np.tile(2 * values[:, 0].astype(np.float32), (m, 1))
        np.testing.assert_array_equal(gemm(jnp.asarray(a), b), want)
    a = ScaledArray(jnp.asarray(values), jnp.full((300, 1), 1.0), (1, 128))
    unit = quantize(jnp.asarray(np.eye(1, 40, dtype=np.float32)))
    clean = np.flatnonzero(~np.isnan(values[:, 0].astype(np.float32)))
    got = np.asarray(gemm(a, unit, out_dtype=jnp.float32))[:, 0]
    np.testing.assert_allclose(got[clean], values[clean, 0].astype(np.float32), rtol=1e-6)
    assert np.isnan(np.delete(got, clean)).all()


@pytest.mark.parametrize("m", [1, 16])
def test_rows_of_any_magnitude(m):
    """The blocks of a row lie apart by up to 2^210; the weights include the smallest of FP8."""
    b = ScaledArray((normal(40, 384) * 2.0**-9).astype(jnp.float8_e4m3fn), jnp.ones((1, 3)), (128, 128))
    assert (np.abs(exact(b)) < 2.0**-6).all()
    for exponents in ((0, 0, 0), (8, 0, -8), (-90, -100, -95), (100, -110, 90), (120, 119, 118)):
        blocks = [np.asarray(normal(m, 128, seed=i)) * np.float32(2.0**e) for i, e in enumerate(exponents)]
        a = jnp.asarray(np.concatenate(blocks, axis=1))
        check_gemm(a, b, gemm(a, b, out_dtype=jnp.float32))
    a = a.at[0, 130].set(jnp.inf)
    got = np.asarray(gemm(a, b, out_dtype=jnp.float32))
    assert not np.isfinite(got[0]).any() and np.isfinite(got[1:]).all()


@pytest.mark.parametrize("implementation", ["cpu", HOPPER_IMPLEMENTATION])
@pytest.mark.parametrize("m", [3, 20])
def test_nan_reaches_its_row_and_column_only(m, implementation):
    a, b = operands("fp8 x fp8", normal(m, 208), normal(48, 208, seed=1))
    a.values = a.values.at[1, 150].set(jnp.nan)
    b.values = b.values.at[33, 199].set(jnp.nan)
    expected = np.zeros((m, 48), bool)
    expected[1], expected[:, 33] = True, True
    np.testing.assert_array_equal(np.isnan(np.asarray(gemm(a, b, implementation=implementation), np.float32)), expected)
    a, b = operands("fp8 x fp8 ue8m0", normal(m, 208), normal(304, 208, seed=1))
    b.scales = b.scales.at[1, 1].set(jnp.nan)
    expected = np.broadcast_to((np.arange(304) >= 128) & (np.arange(304) < 256), (m, 304))
    np.testing.assert_array_equal(np.isnan(np.asarray(gemm(a, b, implementation=implementation), np.float32)), expected)


@pytest.mark.parametrize("kind", ["f32", "bf16", "fp8 x fp8"])
def test_vmap_is_one_call(kind):
    a, b, accumulator = normal(3, 4, 130), normal(3, 5, 130, seed=1), normal(3, 4, 5, seed=2)
    a, b = operands(kind, a, b)

    def one(a, b, accumulator):
        return gemm(a, b, accumulator=accumulator, out_dtype=jnp.float32)

    def pick(x, i):
        return jax.tree.map(lambda v: v[i], x)

    for axes in ((0, 0, 0), (0, None, 0), (None, 0, 0), (0, 0, None), (0, None, None)):
        args = [x if axis == 0 else pick(x, 0) for x, axis in zip((a, b, accumulator), axes, strict=True)]
        mapped = jax.vmap(one, axes)
        got = mapped(*args)
        for i in range(3):
            x, y, z = [pick(v, i) if axis == 0 else v for v, axis in zip(args, axes, strict=True)]
            check_gemm(x, y, got[i], exact(z))
        text = jax.jit(mapped).lower(*args).as_text()
        assert text.count("jaxkern.gemm.v1") == 1 and "while" not in text
    # Two batch axes, the inner one of a alone.
    got = jax.vmap(jax.vmap(gemm, (0, None)), (0, 0))(normal(2, 3, 4, 9), normal(2, 5, 9, seed=1))
    want = np.einsum("xymk,xnk->xymn", exact(normal(2, 3, 4, 9)), exact(normal(2, 5, 9, seed=1)))
    np.testing.assert_allclose(got, want, atol=1e-4)


# ---- the Hopper kernel, on the simulator ----

SEEDS = 8  # each runs the simulated threads and copies in another order
HOPPER_KINDS = [  # operands, result, with an accumulator
    ("fp8 x fp8", jnp.bfloat16, False),
    ("fp8 x fp8 rows", jnp.float32, False),
    ("fp8 x fp8 rows", jnp.float32, True),
]


def hopper(kind, out_dtype, accumulate, m, n, k):
    a, b, accumulator = hopper_operands(kind, out_dtype, accumulate, m, n, k)
    return np.asarray(gemm(a, b, accumulator=accumulator, out_dtype=out_dtype, implementation=HOPPER_IMPLEMENTATION))


@functools.cache
def hopper_operands(kind, out_dtype, accumulate, m, n, k):
    return *operands(kind, normal(m, k), normal(n, k, seed=1)), normal(
        m, n, seed=2, dtype=out_dtype
    ) if accumulate else None


def check_hopper(kind, out_dtype, accumulate, m, n, k):
    got = hopper(kind, out_dtype, accumulate, m, n, k)
    assert got.dtype == out_dtype
    a, b, accumulator = hopper_operands(kind, out_dtype, accumulate, m, n, k)
    # The simulator's sums are float32 here; a GPU's tensor cores keep 13 bits of those within 128 of k.
    sums = 1e-5 if HOPPER_IMPLEMENTATION == "sim" else 2.0**-12
    check_gemm(a, b, got, exact(accumulator) if accumulate else 0.0, sums)
    return got


@pytest.mark.parametrize("m", [1, 7, 64, 65, 128, 300])
@pytest.mark.parametrize(
    "n,k",
    [
        (192, 1024),
        *(pytest.param(*size, marks=pytest.mark.slow) for size in [(64, 4352), (576, 512), (2112, 256), (128, 7168)]),
    ],
)
@pytest.mark.parametrize("kind,out_dtype,accumulate", HOPPER_KINDS)
def test_hopper_in_any_order(kind, out_dtype, accumulate, n, k, m, simulator):
    simulator.configure(seed=0)
    first = check_hopper(kind, out_dtype, accumulate, m, n, k)
    for seed in range(1, SEEDS):
        simulator.configure(seed=seed)
        np.testing.assert_array_equal(hopper(kind, out_dtype, accumulate, m, n, k), first)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("kind", ["fp8 x fp8", "fp8 x fp8 rows", "fp8 x fp8 ue8m0"])
def test_hopper_with_partial_blocks(kind, out_dtype, accumulate):
    for m, n, k in [(65, 208, 272), (3, 16, 16)]:
        check_hopper(kind, out_dtype, accumulate, m, n, k)


@pytest.mark.parametrize("m,n,k", [(768, 496, 1296), (300, 2112, 256)])  # tiles of 256 x 128, and of 128 x 192
@pytest.mark.parametrize(
    "kind,out_dtype,accumulate",
    [
        ("fp8 x fp8", jnp.bfloat16, False),
        ("fp8 x fp8", jnp.float32, True),
        ("fp8 x fp8 rows", jnp.bfloat16, True),
        ("fp8 x fp8 rows", jnp.float32, False),
    ],
)
def test_hopper_with_large_tiles(kind, out_dtype, accumulate, m, n, k):
    check_hopper(kind, out_dtype, accumulate, m, n, k)


@pytest.mark.skipif(HOPPER_IMPLEMENTATION != "sim", reason="a GPU does not count")
def test_what_the_simulator_counts_of_a_hopper_gemm(simulator):
    """One tile, 2 x 128 of k: four instructions of k 32 for each, by each of four warps; every byte once."""
    m, n, k = 16, 16, 256
    simulator.clear_statistics()
    check_hopper("fp8 x fp8", jnp.float32, False, m, n, k)
    (counts,) = json.loads(simulator.statistics())["kernels"].values()
    assert counts["wgmma"] == k // 32 * 4
    assert counts["moved_bytes"] == m * k + n * k + (m + 1) * 2 * 4 + m * n * 4
    assert counts["least_bytes"] == counts["moved_bytes"] + 8  # counted in whole 16s
    assert 0 < counts["tensor_busy"] < 1 and 0 < counts["idle"]["warpgroup 0"] < 1


def test_hopper_on_every_fp8_code():
    """A product with the unit matrix is the code itself."""
    codes = np.arange(256, dtype=np.uint8).reshape(256, 1).repeat(16, 1).view(ml_dtypes.float8_e4m3fn)
    a = ScaledArray(jnp.asarray(codes), jnp.full((256, 1), 2.0))
    unit = ScaledArray(jnp.eye(16).astype(jnp.float8_e4m3fn), jnp.ones((1, 1)), (128, 128))
    np.testing.assert_array_equal(
        gemm(a, unit, out_dtype=jnp.float32, implementation=HOPPER_IMPLEMENTATION), 2 * codes.astype("f")
    )


@pytest.mark.parametrize("b_block", [(1, 128), (128, 128)])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_scales_go_from_quantize_to_gemm_as_they_lie(b_block, scale_format):
    def f(a, b):
        how = {"scale_format": scale_format, "implementation": HOPPER_IMPLEMENTATION}
        return gemm(quantize(a, **how), quantize(b, b_block, **how), implementation=HOPPER_IMPLEMENTATION)

    compiled = jax.jit(f).lower(normal(70, 272), normal(48, 272)).compile().as_text()
    assert len(re.findall(r'custom_call_target="jaxkern\.', compiled)) == 3
    assert not re.search(r"= \S+ (copy|transpose)\(", compiled)


# ---- groups ----


def spans(sizes, alignment, rows):
    """Each group's [begin, end)."""
    result, begin = [], 0
    for size in sizes:
        end = begin + min(max(size, 0), rows - begin)
        result.append((begin, end))
        begin = min(-(-end // alignment) * alignment, rows)
    return result


group_cases = {
    "sizes": st.lists(st.sampled_from([0, 0, 1, 3, 8, 9, 20, 60, -5, 2**31 - 1, -(2**31)]), min_size=4, max_size=4),
    "alignment": st.sampled_from([1, 1, 4, 16]),
    "implementation": st.sampled_from([None, None, "xla"]),
}


@few
@given(kind=st.sampled_from(KINDS), **group_cases)
def test_grouped_gemm(kind, sizes, alignment, implementation):
    m, n, k = 70, 130, 200
    a, b = operands(kind, normal(m, k), normal(4, n, k, seed=1))
    inside = np.zeros(m, bool)
    for begin, end in spans(sizes, alignment, m):
        inside[begin:end] = True
    # Whatever no group owns must not matter.
    if isinstance(a, ScaledArray):
        a = ScaledArray(a.values, jnp.where(inside[:, None], a.scales, jnp.nan), a.block_shape)
    else:
        a = jnp.where(inside[:, None], a, jnp.nan)
    out = grouped_gemm(
        a,
        b,
        jnp.asarray(sizes, jnp.int32),
        group_alignment=alignment,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    out, a, b = np.asarray(out), exact(a), exact(b)
    for group, (begin, end) in enumerate(spans(sizes, alignment, m)):
        x, y = a[begin:end], b[group]
        assert_close(out[begin:end], x @ y.T, np.abs(x) @ np.abs(y).T)
    assert not out[~inside].any()


@few
@given(
    dtypes=st.sampled_from([(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.float32)]),
    accumulate=st.booleans(),
    **group_cases,
)
def test_k_grouped_gemm(dtypes, accumulate, sizes, alignment, implementation):
    t, m, n = 70, 37, 130
    inside = np.zeros((t, 1), bool)
    for begin, end in spans(sizes, alignment, t):
        inside[begin:end] = True
    a = jnp.where(inside, normal(t, m, dtype=dtypes[0]), jnp.nan)
    b = jnp.where(inside, normal(t, n, seed=1, dtype=dtypes[1]), jnp.inf)
    accumulator = normal(4, m, n, seed=2) if accumulate else None
    out = k_grouped_gemm(
        a,
        b,
        jnp.asarray(sizes, jnp.int32),
        group_alignment=alignment,
        accumulator=accumulator,
        implementation=implementation,
    )
    assert out.dtype == jnp.float32
    for group, (begin, end) in enumerate(spans(sizes, alignment, t)):
        x, y = exact(a)[begin:end].T, exact(b)[begin:end]
        start = exact(accumulator)[group] if accumulate else 0.0
        assert_close(out[group], x @ y + start, np.abs(x) @ np.abs(y) + np.abs(start))


masked_sizes = st.lists(st.sampled_from([0, 0, 1, 7, 129, 130, 131, -5, 2**31 - 1, -(2**31)]), min_size=4, max_size=4)


@few
@given(
    kind=st.sampled_from(KINDS),
    m=st.sampled_from([0, 1, 7, 130]),
    sizes=masked_sizes,
    implementation=st.sampled_from([None, None, "xla"]),
)
def test_masked_grouped_gemm(kind, m, sizes, implementation):
    n, k = 130, 200
    a, b = operands(kind, normal(4, m, k), normal(4, n, k, seed=1))
    counts = np.arange(m) < np.clip(sizes, 0, m)[:, None]
    if isinstance(a, ScaledArray):  # whatever does not count must not matter
        a = ScaledArray(a.values, jnp.where(counts[..., None], a.scales, jnp.nan), a.block_shape)
    else:
        a = jnp.where(counts[..., None], a, jnp.nan)
    sizes = jnp.asarray(sizes, jnp.int32)
    out = masked_grouped_gemm(a, b, sizes, out_dtype=jnp.float32, implementation=implementation)
    assert out.shape == (4, m, n) and not np.asarray(out)[~counts].any()
    out, a, b = np.asarray(out), exact(a), exact(b)
    for group, rows in enumerate(counts):
        x = a[group][rows]
        assert_close(out[group][rows], x @ b[group].T, np.abs(x) @ np.abs(b[group]).T)


@few
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 7, 128, 130, 200, 600, -5, 2**31 - 1, -(2**31)]), min_size=4, max_size=4),
    alignment=st.sampled_from([128, 256]),
    t=st.sampled_from([0, 100, 600, 640]),
    scale_format=st.sampled_from(["float32", "power_of_two", "ue8m0"]),
    accumulate=st.booleans(),
    implementation=st.sampled_from([None, None, "xla"]),
)
def test_k_grouped_gemm_of_scaled_arrays(sizes, alignment, t, scale_format, accumulate, implementation):
    m, n = 37, 130
    a, b = (quantize(normal(rows, t, seed=rows), scale_format=scale_format) for rows in (m, n))
    inside, groups = np.zeros(t, bool), spans(sizes, alignment, t)
    for begin, end in groups:
        inside[begin:end] = True
    for x in (a, b):  # what is in no group must not matter
        x.values = jnp.where(inside, x.values, jnp.asarray(np.nan, x.values.dtype))
        blocks = np.pad(inside, (0, -t % 128)).reshape(-1, 128).any(1)
        x.scales = jnp.where(blocks, x.scales, jnp.asarray(np.nan, x.scales.dtype))
    accumulator = normal(4, m, n, seed=2) if accumulate else None
    out = k_grouped_gemm(
        a,
        b,
        jnp.asarray(sizes, jnp.int32),
        group_alignment=alignment,
        accumulator=accumulator,
        implementation=implementation,
    )
    assert out.dtype == jnp.float32
    for group, (begin, end) in enumerate(groups):
        x, y = exact(a)[:, begin:end], exact(b)[:, begin:end].T
        start = exact(accumulator)[group] if accumulate else 0.0
        if begin == end:
            np.testing.assert_array_equal(out[group], np.broadcast_to(start, (m, n)))
        assert_close(out[group], x @ y + start, np.abs(x) @ np.abs(y) + np.abs(start))


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two", "ue8m0"])
def test_groups_are_close_to_the_unquantised_products(scale_format):
    """Over the whole way, from plain arrays."""
    quantized = functools.partial(quantize, scale_format=scale_format)
    a, b, sizes = normal(300, 768), normal(3, 200, 768, seed=1), jnp.asarray([170, 0, 130], jnp.int32)
    w = quantized(b, (128, 128))
    assert calc_diff(grouped_gemm(quantized(a), w, sizes), grouped_gemm(a, b, sizes)) < 1e-3
    a3 = a.reshape(3, 100, 768)
    assert calc_diff(masked_grouped_gemm(quantized(a3), w, sizes), masked_grouped_gemm(a3, b, sizes)) < 1e-3
    x, y = (quantize_along_tokens(z, sizes, scale_format=scale_format) for z in (a, a[:, :100] + 1))
    got = k_grouped_gemm(x, y, sizes, group_alignment=128)
    assert calc_diff(got, k_grouped_gemm(a, a[:, :100] + 1, sizes)) < 1e-3


def test_time_follows_the_rows_that_count():
    """A capacity of 64 times the rows, against one that holds just them; n is small, so that zeros cost little."""
    rows, n, k = 64, 64, 2048
    b, sizes = normal(4, n, k, seed=1), jnp.full(4, rows, jnp.int32)
    exactly = jnp.ones((4, rows, k))
    run = jax.jit(masked_grouped_gemm)

    def seconds(a):
        times = []
        for _ in range(8):
            begin = time.perf_counter()
            run(a, b, sizes).block_until_ready()
            times.append(time.perf_counter() - begin)
        return min(times)

    assert seconds(jnp.ones((4, 64 * rows, k))) < 8 * seconds(exactly)


@pytest.mark.parametrize("implementation", ["cpu", "xla", HOPPER_IMPLEMENTATION])
@pytest.mark.parametrize("masked", [False, True])
def test_gaps_may_be_left_alone(masked, implementation):
    """The rows of groups and the gradients are the same to the bit; the rows of none may hold anything."""
    capacity, k, n = 460, 144, 48
    sizes = np.asarray([3, 0, 450, 70], np.int32)
    starts = np.arange(4) * capacity if masked else np.asarray([0, 8, 8, 464])
    mine = np.concatenate([start + np.arange(size) for start, size in zip(starts, sizes, strict=True)])
    a, b = normal(4 * capacity, k, dtype=jnp.bfloat16), normal(4, n, k, seed=1, dtype=jnp.bfloat16)
    a, weights = a.at[np.setdiff1d(np.arange(len(a)), mine)].set(jnp.nan), normal(len(mine), n, seed=2)

    def rows(a, b, zero_gaps):
        options = {"zero_gaps": zero_gaps, "implementation": implementation}
        if not masked:
            return grouped_gemm(a, b, sizes, group_alignment=8, **options)[mine]
        if isinstance(a, ScaledArray):
            a = ScaledArray(a.values.reshape(4, capacity, k), a.scales.reshape(4, capacity, -1))
        else:
            a = a.reshape(4, capacity, k)
        return masked_grouped_gemm(a, b, sizes, **options).reshape(-1, n)[mine]

    def gradients(zero_gaps):
        return jax.grad(lambda a, b: (rows(a, b, zero_gaps) * weights).sum(), (0, 1))(a, b)

    scaled = quantize(a), quantize(b, (128, 128))
    np.testing.assert_array_equal(rows(*scaled, False), rows(*scaled, True))
    np.testing.assert_array_equal(rows(a, b, False), rows(a, b, True))
    for got, want in zip(gradients(False), gradients(True), strict=True):
        np.testing.assert_array_equal(got, want)
        assert not np.isnan(np.asarray(got, np.float32)).any()


def test_one_group_has_everything():
    a, b = normal(600, 96), normal(3, 40, 96, seed=1)
    out = grouped_gemm(a, b, jnp.asarray([0, 600, 0], jnp.int32))
    check_gemm(a, b[1], out)


def test_no_rows_and_no_groups():
    sizes = jnp.zeros(2, jnp.int32)
    assert grouped_gemm(normal(0, 8), normal(2, 3, 8), sizes).shape == (0, 3)
    assert not np.asarray(grouped_gemm(normal(5, 0), normal(2, 3, 0), sizes + 2)).any()
    assert not np.asarray(grouped_gemm(normal(5, 8), normal(0, 3, 8), sizes[:0])).any()
    assert not np.asarray(k_grouped_gemm(normal(0, 8), normal(0, 3), sizes)).any()


def test_vmap_of_groups():
    a, b, sizes = normal(2, 20, 16), normal(3, 5, 16, seed=1), jnp.asarray([[3, 0, 9], [1, 18, 1]], jnp.int32)
    got = jax.vmap(grouped_gemm, (0, None, 0))(a, b, sizes)
    for i in range(2):
        np.testing.assert_array_equal(got[i], grouped_gemm(a[i], b, sizes[i]))


# ---- gradients ----


def assert_gradients(ours, theirs, args, tolerance):
    got = jax.grad(lambda *x: jnp.sum(jnp.sin(ours(*x).astype(jnp.float32))), tuple(range(len(args))))(*args)
    wide = [x.astype(jnp.float32) for x in args]
    want = jax.grad(lambda *x: jnp.sum(jnp.sin(theirs(*x))), tuple(range(len(args))))(*wide)
    for x, g, w in zip(args, got, want, strict=True):
        assert g.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(g, np.float32), w, atol=tolerance * np.abs(w).max())


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("m", [3, 37])
def test_gemm_gradients(dtype, tolerance, m):
    args = normal(m, 150, dtype=dtype), normal(33, 150, seed=1, dtype=dtype), normal(m, 33, seed=2, dtype=dtype)
    args = [x / 8 for x in args]
    assert_gradients(
        lambda a, b, c: gemm(a, b, accumulator=c),
        lambda a, b, c: jnp.matmul(a, b.T, precision="highest") + c,
        args,
        tolerance,
    )


@pytest.mark.parametrize("blocks", [(1, 128), (128, 128)])
@pytest.mark.parametrize("m", [3, 37])
def test_gradient_of_a_frozen_fp8_weight(blocks, m):
    a, b = normal(m, 150) / 8, quantize(normal(200, 150, seed=1) / 8, blocks)
    wide = dequantize(b)
    assert_gradients(lambda a: gemm(a, b), lambda a: jnp.matmul(a, wide.T, precision="highest"), [a], 1e-5)
    sizes = jnp.asarray([m - 1, 1], jnp.int32)
    two = jax.tree.map(lambda x: jnp.stack([x, x]), b)
    assert_gradients(
        lambda a: grouped_gemm(a, two, sizes), lambda a: jnp.matmul(a, wide.T, precision="highest"), [a], 1e-5
    )
    zeros = jax.grad(lambda b: gemm(a, b).sum(), allow_int=True)(b)
    assert not np.asarray(zeros.scales).any() and not np.asarray(zeros.values, np.float32).any()


def test_no_gradient_of_an_fp8_a():
    a, b = operands("fp8 x fp8", normal(3, 128), normal(4, 128))
    with pytest.raises(NotImplementedError, match="gemm: no gradient with a ScaledArray a"):
        jax.grad(lambda s: gemm(ScaledArray(a.values, s), b, out_dtype=jnp.float32).sum())(a.scales)


def test_no_gradient_of_scaled_operands_in_groups():
    a, sizes = quantize(normal(4, 256)), jnp.asarray([100], jnp.int32)

    def loss(scales):
        x = ScaledArray(a.values, scales)
        return k_grouped_gemm(x, a, sizes, group_alignment=128).sum()

    with pytest.raises(NotImplementedError, match="k_grouped_gemm: no gradient with a ScaledArray a"):
        jax.grad(loss)(a.scales)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_masked_gradients(dtype, tolerance):
    sizes = np.asarray([9, 0, 12, 40])
    member = jnp.asarray(np.arange(12) < sizes[:, None], jnp.float32)
    a, b = normal(4, 12, 40, dtype=dtype) / 8, normal(4, 24, 40, seed=1, dtype=dtype) / 8
    assert_gradients(
        lambda a, b: masked_grouped_gemm(a, b, jnp.asarray(sizes, jnp.int32)),
        lambda a, b: jnp.einsum("gmk,gnk,gm->gmn", a, b, member, precision="highest"),
        [a, b],
        tolerance,
    )


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_grouped_gradients(dtype, tolerance):
    sizes, alignment = [9, 0, 20, 1], 8
    owner = np.full(64, -1)
    for group, (begin, end) in enumerate(spans(sizes, alignment, 64)):
        owner[begin:end] = group
    member = jnp.asarray(owner[:, None] == np.arange(4), jnp.float32)
    sizes = jnp.asarray(sizes, jnp.int32)
    a, b, c = normal(64, 40, dtype=dtype) / 8, normal(4, 24, 40, seed=1, dtype=dtype) / 8, normal(64, 24, seed=2) / 8
    assert_gradients(
        lambda a, b: grouped_gemm(a, b, sizes, group_alignment=alignment),
        lambda a, b: jnp.einsum("mk,gnk,mg->mn", a, b, member, precision="highest"),
        [a, b],
        tolerance,
    )
    assert_gradients(
        lambda a, c, s: k_grouped_gemm(a, c, sizes, group_alignment=alignment, accumulator=s),
        lambda a, c, s: jnp.einsum("tm,tn,tg->gmn", a, c, member, precision="highest") + s,
        [a, c.astype(dtype), normal(4, 40, 24, seed=3)],
        tolerance,
    )


# ---- under JAX's transformations ----


def test_shard_map_gradient_of_a_replicated_weight():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    a, b = normal(8, 40), normal(6, 40, seed=1)

    def loss(a, b):
        def local(a, b):
            return jax.lax.psum(jnp.sum(jnp.sin(gemm(a, b))), "x")

        return jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P()), out_specs=P())(a, b)

    got = jax.jit(jax.grad(loss, (0, 1)))(a, b)
    want = jax.grad(lambda a, b: jnp.sum(jnp.sin(jnp.matmul(a, b.T, precision="highest"))), (0, 1))(a, b)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4)


def test_export_with_a_symbolic_m():
    (m,) = jax.export.symbolic_shape("m")
    b = quantize(normal(40, 200, seed=1), (128, 128))
    sizes = jnp.asarray([1, 2], jnp.int32)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), b)

    def f(a):
        return gemm(a, b), grouped_gemm(a, both, sizes)

    exported = jax.export.export(jax.jit(f), disabled_checks=jaxkern.DISABLE_JAX_EXPORT_CHECKS)(
        jax.ShapeDtypeStruct((m, 200), jnp.float32)
    )
    run = jax.export.deserialize(exported.serialize()).call
    for rows in (5, 20):
        dense, grouped = run(normal(rows, 200))
        check_gemm(normal(rows, 200), b, dense)
        check_gemm(normal(rows, 200)[:3], b, grouped[:3])
        assert not np.asarray(grouped[3:]).any()


def digest() -> str:
    """The bits of results that take every path of the kernels."""
    bits = hashlib.sha256()
    for kind in KINDS:
        for m in (3, 12, 150):
            a, b = operands(kind, normal(m, 700), normal(250, 700, seed=1))
            out = gemm(a, b, out_dtype=jnp.float32)
            check_gemm(a, b, out)
            bits.update(np.asarray(out).tobytes())
    a, b, sizes = normal(150, 300), normal(3, 250, 300, seed=1), jnp.asarray([3, 40, 100], jnp.int32)
    out, gradient = jax.vjp(lambda a, b: grouped_gemm(a, b, sizes), a, b)
    w = jnp.stack([b[0], b[1] + 1])
    masked = masked_grouped_gemm(quantize(a.reshape(2, 75, 300)), quantize(w, (128, 128)), sizes[:2])
    linear, linear_gradient = jax.vjp(lambda a, b: fp8_grouped_linear(a, b, sizes), a, b)
    g = normal(150, 250)
    for x in (out, *gradient(g), masked, linear, *linear_gradient(g)):
        bits.update(np.asarray(x).tobytes())
    for m in (1, 16):
        test_every_fp8_code(m)
        test_rows_of_any_magnitude(m)
        test_nan_reaches_its_row_and_column_only(m + 2, "cpu")
    return f"{jaxkern._ffi.CPU.simd_level()} {bits.hexdigest()}"


def digest_in_a_process(**environment) -> str:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}) if os.environ.get('ONE_CPU') else 0\n"
    code += "import test_gemm; print(test_gemm.digest())"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), **environment}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_every_simd_level(level):
    """Below the best level, which all other tests run at."""
    best = jaxkern._ffi.CPU.simd_level()
    assert digest_in_a_process(JAXKERN_SIMD=level).split()[0] in (level, best)


def test_bits_do_not_depend_on_the_number_of_threads():
    assert digest_in_a_process(ONE_CPU="1") == digest()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads have no affinity here")
def test_threads_may_run_where_they_might_before():
    """Those of XLA's pool leave their caller's core, and stay free to come back."""
    tasks = pathlib.Path("/proc/self/task")
    before = {task.name: os.sched_getaffinity(int(task.name)) for task in tasks.iterdir()}
    product = jax.jit(gemm)
    for _ in range(200):
        product(normal(1, 512), normal(512, 512)).block_until_ready()
    time.sleep(0.1)  # for a helper that came late
    assert all(os.sched_getaffinity(int(task)) == cores for task, cores in before.items() if (tasks / task).exists())


# ---- errors ----


@pytest.mark.parametrize(
    "error,match,call",
    [
        (ValueError, r"gemm: b must be .*k=4\], got float32\[3,5\]", lambda: gemm(normal(2, 4), normal(3, 5))),
        (ValueError, r"gemm: a must be .*, got float32\[4\]", lambda: gemm(normal(4), normal(3, 4))),
        (TypeError, r"gemm: a must be .*, got int32\[2,4\]", lambda: gemm(jnp.zeros((2, 4), jnp.int32), normal(3, 4))),
        (TypeError, r"gemm: a and b must be both", lambda: gemm(normal(2, 4), normal(3, 4, dtype=jnp.bfloat16))),
        (TypeError, r"gemm: a and b must be both", lambda: gemm(quantize(normal(2, 4)), normal(3, 4))),
        (ValueError, r"gemm: a must have blocks", lambda: gemm(quantize(normal(2, 4), (128, 128)), normal(3, 4))),
        (TypeError, r"gemm: out_dtype", lambda: gemm(normal(2, 4), normal(3, 4), out_dtype=jnp.float16)),
        (
            TypeError,
            r"gemm: accumulator must be bfloat16",
            lambda: gemm(normal(2, 4), normal(3, 4), accumulator=normal(2, 3), out_dtype=jnp.bfloat16),
        ),
        (
            ValueError,
            r"gemm: b.scales must be .* got float32\[2,1\]",
            lambda: gemm(normal(2, 4), ScaledArray(quantize(normal(3, 4)).values, jnp.ones((2, 1)), (1, 128))),
        ),
        (
            ValueError,
            r"grouped_gemm: group_sizes must be int32 \[g=2\], got int32\[3\]",
            lambda: grouped_gemm(normal(2, 4), normal(2, 3, 4), jnp.zeros(3, jnp.int32)),
        ),
        (
            TypeError,
            r"grouped_gemm: group_sizes must be int32",
            lambda: grouped_gemm(normal(2, 4), normal(2, 3, 4), jnp.zeros(2)),
        ),
        (
            ValueError,
            r"grouped_gemm: group_alignment must be in 1..2\*\*31 - 1, got 0",
            lambda: grouped_gemm(normal(2, 4), normal(2, 3, 4), jnp.zeros(2, jnp.int32), group_alignment=0),
        ),
        (
            ValueError,
            r"k_grouped_gemm: b must be .*t=2, n\], got float32\[3,4\]",
            lambda: k_grouped_gemm(normal(2, 4), normal(3, 4), jnp.zeros(2, jnp.int32)),
        ),
        (
            ValueError,
            r"masked_grouped_gemm: b must be .* \[g=2, n, k=4\], got float32\[3,3,4\]",
            lambda: masked_grouped_gemm(normal(2, 5, 4), normal(3, 3, 4), jnp.zeros(2, jnp.int32)),
        ),
        (
            TypeError,
            r"k_grouped_gemm: a and b must be both ScaledArrays or neither, got a a ScaledArray and b float32\[4,128\]",
            lambda: k_grouped_gemm(quantize(normal(4, 128)), normal(4, 128), jnp.zeros(2, jnp.int32)),
        ),
        (
            ValueError,
            r"k_grouped_gemm: group_alignment must be a multiple of 128 with ScaledArrays, got 1",
            lambda: k_grouped_gemm(quantize(normal(4, 128)), quantize(normal(4, 128)), jnp.zeros(2, jnp.int32)),
        ),
        (
            ValueError,
            r"k_grouped_gemm: b.values must be float8_e4m3fn \[n, t=128\], got float8_e4m3fn\[4,256\]",
            lambda: k_grouped_gemm(quantize(normal(4, 128)), quantize(normal(4, 256)), jnp.zeros(2, jnp.int32)),
        ),
        (
            NotImplementedError,
            r"gemm: implementation 'sim' cannot run this call: a and b must both be ScaledArrays",
            lambda: gemm(normal(2, 16), normal(16, 16), implementation="sim"),
        ),
        (
            NotImplementedError,
            r"gemm: implementation 'sim' cannot run this call: n must be a multiple of 16, got 30",
            lambda: gemm(quantize(normal(2, 16)), quantize(normal(30, 16)), implementation="sim"),
        ),
        (
            NotImplementedError,
            r"gemm: implementation 'sim' cannot run this call: k must be a multiple of 16, got 40",
            lambda: gemm(quantize(normal(2, 40)), quantize(normal(16, 40)), implementation="sim"),
        ),
        (
            NotImplementedError,
            r"grouped_gemm: implementation 'sim' cannot run this call: a and b must be both ScaledArrays or both",
            lambda: grouped_gemm(normal(2, 4), normal(2, 3, 4), jnp.zeros(2, jnp.int32), implementation="sim"),
        ),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("out_dtype", ["foo", jnp.float16])
def test_out_dtypes_that_are_none(out_dtype):
    with pytest.raises(TypeError, match="gemm: out_dtype must be float32 or bfloat16, got '?f"):
        jaxkern.gemm(jnp.ones((2, 4)), jnp.ones((3, 4)), out_dtype=out_dtype)
