"""MLA attention against loops in float64 and against plain attention's own gradients."""

import functools
import os
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
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern import reference

IMPLEMENTATIONS = ["cpu", "xla"]
BF16, F16, E4M3 = ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn
FP8 = np.uint8  # the dtype of packed rows
ROUNDING = {np.float32: 2.0**-24, BF16: 2.0**-8, np.float16: 2.0**-11}  # relative, at most

mla_decode = jax.jit(
    jaxkern.mla_decode, static_argnames=["softmax_scale", "latent_dim", "causal", "num_splits", "implementation"]
)


# ---- decode ----


def decode_by_hand(
    q, cache, block_table, seq_lens, *, softmax_scale, latent_dim, causal=True, num_splits=None, values=np.asarray
):
    """mla_decode, written as its docstring says it, in float64; `values` is of the values."""
    b, s, h, width = q.shape
    cache = unpacked(cache, latent_dim, width) if cache.dtype == FP8 else cache
    p, page, _ = cache.shape
    out, lse = np.zeros((b, s, h, latent_dim)), np.full((b, s, h), -np.inf)
    for request in range(b):
        length = min(max(int(seq_lens[request]), 0), block_table.shape[1] * page)
        for query in range(s):
            end = length - (s - 1 - query) if causal else length
            slots = [(block_table[request, t // page], t % page) for t in range(max(end, 0))]
            keys = np.array([cache[at, row] for at, row in slots if 0 <= at < p], np.float64)
            if len(keys) == 0:
                continue
            logits = softmax_scale * q[request, query].astype(np.float64) @ keys.T
            largest = logits.max(axis=1, keepdims=True)
            weights = np.exp(logits - largest)
            total = weights.sum(axis=1, keepdims=True)
            out[request, query] = weights @ values(keys[:, :latent_dim]) / total
            lse[request, query] = (largest + np.log(total))[:, 0]
    return out, lse


def packed(rows, latent, factor=1.0, power_of_two=False):
    """Rows of a packed cache, byte by byte; their scales are `factor` times as large as they must be."""
    rows = np.asarray(rows, np.float32)
    *lead, width = rows.shape
    parts = []
    scales = np.stack([np.abs(rows[..., k : min(k + 128, latent)]).max(-1) for k in range(0, latent, 128)], axis=-1)
    scales = (np.maximum(scales, np.float32(1e-4)) / np.float32(448) * factor).astype(np.float32)
    if power_of_two:
        mantissas, exponents = np.frexp(scales)
        scales = np.ldexp(np.float32(1), exponents - (mantissas == 0.5))
    parts.append((rows[..., :latent] / scales.repeat(128, -1)[..., :latent]).astype(E4M3))
    parts += [scales, rows[..., latent:].astype(BF16)]
    return np.concatenate([np.ascontiguousarray(x).view(np.uint8).reshape(*lead, -1) for x in parts], axis=-1)


def unpacked(rows, latent, width):
    ends = [latent, latent + 4 * -(-latent // 128)]
    values, scales, rope = (np.ascontiguousarray(x) for x in np.split(rows, ends, axis=-1))
    values = values.view(E4M3).astype(np.float64) * scales.view(np.float32).repeat(128, -1)[..., :latent]
    return np.concatenate([values, rope.view(BF16).astype(np.float64)], axis=-1)


def paged(seed, b, s, h, page, width, lengths, *, q_dtype=np.float32, dtype=np.float32, pages=None, latent=None):
    """Random operands whose unused rows are NaN and whose unused table entries are garbage."""
    rng = np.random.default_rng(seed)
    pages = pages or max(1, -(-max(lengths) // page))
    used = [-(-max(n, 0) // page) for n in lengths]
    p = sum(min(u, pages) for u in used) + 2
    q = np.clip(rng.standard_normal((b, s, h, width)), -1, 1).astype(q_dtype)
    rows = (rng.standard_normal((p, page, width)) / 2).astype(np.float32)
    factor = rng.uniform(1, 3, (p, page, -(-latent // 128))) if dtype == FP8 else None
    cache = packed(rows, latent, factor) if dtype == FP8 else rows.astype(dtype)
    unused = np.ones((p, page), bool)
    table = rng.choice([2147480000, -1, p, -(2**31)], (b, pages)).astype(np.int32)
    free = iter(rng.permutation(p))
    for request, length in enumerate(lengths):
        for i in range(min(used[request], pages)):
            table[request, i] = at = next(free)
            unused[at, : min(page, length - i * page)] = False
    cache[unused] = 255 if dtype == FP8 else np.nan  # 255 is NaN in each part of a packed row
    return q, cache, table, np.array(lengths, np.int32)


def flash_mla_accepts(got, expected, absolute, relative, cosine):
    """FlashMLA's own criterion: each element by one of two tolerances, and all of them by angle."""
    got, expected = np.asarray(got).astype(np.float64), np.asarray(expected).astype(np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    g, e = got[finite], expected[finite]
    error = np.abs(g - e)
    assert ((error < absolute) | (error / (np.abs(e) + 1e-6) < relative)).all(), error.max()
    if (e != 0).any():
        assert 1 - 2 * (g * e).sum() / (g * g + e * e).sum() <= cosine


def assert_decodes(arrays, implementation, rtol=1e-5, **kwargs):
    out, lse = mla_decode(*arrays, implementation=implementation, **kwargs)
    assert out.dtype == arrays[0].dtype and lse.dtype == np.float32
    expected_out, expected_lse = decode_by_hand(*arrays, **kwargs)
    flash_mla_accepts(lse, expected_lse, 1e-6, rtol, 1e-9)
    if out.dtype == np.float32:
        flash_mla_accepts(out, expected_out, rtol / 10, rtol, 1e-9)
    elif out.dtype == F16:
        flash_mla_accepts(out, expected_out, 1e-5, 1 / 1000, 1e-6)  # one rounding
    elif arrays[1].dtype in (BF16, FP8):  # a rounding of each weight, and one of the result
        magnitude, _ = decode_by_hand(*arrays, **kwargs, values=np.abs)
        assert (np.abs(np.asarray(out).astype(np.float64) - expected_out) <= 2.0**-7 * 1.01 * magnitude + 1e-6).all()
        flash_mla_accepts(out, expected_out, np.inf, 0, 5e-6)
    else:
        flash_mla_accepts(out, expected_out, 1e-5, 1 / 250, 5e-6)  # one rounding


SHAPES = [  # b, s, h, page, pages, width, latent, dtype of q, of the cache
    (3, 1, 16, 64, 10, 576, 512, BF16, BF16),
    (2, 2, 3, 16, 40, 80, 64, np.float32, np.float32),
    (2, 4, 33, 16, 4, 72, 64, np.float32, BF16),
    (1, 3, 128, 256, 3, 96, 64, BF16, np.float32),
    (4, 1, 1, 32, 5, 83, 61, np.float32, np.float32),
    (2, 1, 20, 24, 7, 37, 37, BF16, BF16),
    (2, 1, 16, 64, 10, 576, 512, BF16, FP8),
    (2, 2, 9, 16, 30, 320, 256, np.float32, FP8),
    (2, 3, 43, 7, 31, 80, 64, BF16, FP8),
    (1, 1, 4, 32, 9, 205, 204, F16, FP8),
    (2, 2, 17, 16, 20, 320, 256, F16, F16),
    (1, 1, 3, 1, 50, 512, 512, BF16, F16),
    (2, 1, 5, 64, 5, 80, 64, F16, BF16),
    (1, 8, 7, 16, 9, 512, 512, BF16, FP8),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_decode(shape, implementation, data):
    b, s, h, page, pages, width, latent, q_dtype, dtype = shape
    length = st.one_of(st.sampled_from([0, 1, s, page, pages * page]), st.integers(0, pages * page))
    lengths = data.draw(st.lists(length, min_size=b, max_size=b))
    causal = data.draw(st.booleans()) if implementation == "cpu" else s != 4  # a draw less to compile
    dtypes = dict(q_dtype=q_dtype, dtype=dtype, latent=latent)
    arrays = paged(sum(lengths), b, s, h, page, width, lengths, pages=pages, **dtypes)
    assert_decodes(arrays, implementation, softmax_scale=width**-0.55, latent_dim=latent, causal=causal)


FLASH_MLA = [  # b, s, h, longest, causal, dtype of the cache
    (1, 1, 128, 4096, True, BF16),
    (2, 2, 63, 140, True, BF16),
    (6, 4, 3, 140, True, BF16),
    (64, 1, 9, 140, False, BF16),
    (128, 2, 1, 20, True, BF16),
    (6, 2, 126, 140, False, BF16),
    (2, 1, 64, 4096, True, FP8),
    (6, 4, 9, 140, True, FP8),
    (2, 2, 128, 20, False, FP8),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", FLASH_MLA, ids=str)
def test_decode_as_flash_mla_tests_it(case, implementation):
    """Its shapes with their corner cases, its data, its tolerances; about half of the requests are empty."""
    b, s, h, longest, causal, dtype = case
    rng = np.random.default_rng([b, s, h, longest])
    lengths = [int(rng.integers(s, longest + 1)) if i % 2 == 0 else 0 for i in range(b)]
    dtypes = dict(q_dtype=BF16, dtype=dtype, latent=512)
    q, cache, table, seq_lens = paged(b, b, s, h, 64, 576, lengths, pages=-(-longest // 64), **dtypes)
    table[np.arange(table.shape[1]) >= -(-seq_lens[:, None] // 64)] = 2147480000
    q = np.clip(rng.standard_normal(q.shape) / 10, -1, 1).astype(BF16)
    if dtype == BF16:
        cache = np.clip(cache.astype(np.float32) / 5, -1, 1).astype(BF16)
    else:
        cache[..., 512:528] = (np.ascontiguousarray(cache[..., 512:528]).view(np.float32) / 5).view(np.uint8)
    kwargs = dict(softmax_scale=576**-0.5, latent_dim=512, causal=causal)
    out, lse = mla_decode(q, cache, table, seq_lens, implementation=implementation, **kwargs)
    expected_out, expected_lse = decode_by_hand(q, cache, table, seq_lens, **kwargs)
    flash_mla_accepts(out, expected_out, 8e-4, 2.01 / 128, 5e-6)
    flash_mla_accepts(lse, expected_lse, 1e-6, 8.01 / 65536, 1e-7)


def test_decode_of_packed_rows_that_pack_rows_wrote():
    """The layout of the writer is that of the reader; the writer's scales are powers of two, as FlashMLA's."""
    q, cache, table, seq_lens = paged(12, 2, 1, 5, 16, 200, [40, 33], q_dtype=BF16)
    cache = np.nan_to_num(cache)
    rows = reference.pack_rows(jnp.asarray(cache), 136)
    assert rows.shape[-1] == reference.row_bytes(136, 64) == 136 + 2 * 4 + 64 * 2
    np.testing.assert_array_equal(rows, packed(cache, 136, power_of_two=True))
    np.testing.assert_array_equal(
        reference.unpack_rows(rows, 136, 64, jnp.float32), unpacked(np.asarray(rows), 136, 200).astype(np.float32)
    )
    for implementation in IMPLEMENTATIONS:
        assert_decodes((q, np.asarray(rows), table, seq_lens), implementation, softmax_scale=0.07, latent_dim=136)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode_of_rows_without_keys(implementation):
    """Empty requests, requests shorter than their new tokens, and negative lengths."""
    q, cache, table, _ = paged(0, 5, 3, 2, 16, 24, [20, 20, 20, 20, 20])
    seq_lens = np.array([0, 1, 2, 3, -7], np.int32)
    out, lse = mla_decode(q, cache, table, seq_lens, softmax_scale=0.3, latent_dim=16, implementation=implementation)
    keys = np.maximum(np.maximum(seq_lens, 0)[:, None] - np.array([2, 1, 0]), 0)
    np.testing.assert_array_equal(np.isneginf(lse).all(axis=2), keys == 0)
    np.testing.assert_array_equal((np.asarray(out) == 0).all(axis=(2, 3)), keys == 0)
    assert_decodes((q, cache, table, seq_lens), implementation, softmax_scale=0.3, latent_dim=16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode_of_one_key_is_its_value(implementation):
    q, cache, table, seq_lens = paged(0, 2, 1, 20, 16, 48, [1, 1], dtype=BF16)
    out, lse = mla_decode(q, cache, table, seq_lens, softmax_scale=0.5, latent_dim=32, implementation=implementation)
    keys = cache[table[:, 0], 0].astype(np.float32)
    np.testing.assert_array_equal(out, np.broadcast_to(keys[:, None, None, :32], out.shape))
    np.testing.assert_allclose(lse[:, 0], 0.5 * np.einsum("bhd,bd->bh", q[:, 0], keys), rtol=1e-5, atol=1e-6)


PAIRS = [(np.float32, np.float32), (BF16, BF16), (BF16, FP8), (np.float32, FP8)]


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode_masks_pages_outside_the_cache(implementation, dtypes):
    q_dtype, dtype = dtypes
    q, cache, table, seq_lens = paged(1, 2, 2, 5, 16, 40, [700, 90], q_dtype=q_dtype, dtype=dtype, latent=32)
    table[0, [0, 7, 30, 43]] = [-1, len(cache), 2**31 - 1, -(2**31)]
    table[1, :] = 10**6
    assert_decodes((q, cache, table, seq_lens), implementation, softmax_scale=0.3, latent_dim=32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode_clamps_lengths_to_the_table(implementation):
    q, cache, table, seq_lens = paged(2, 2, 2, 5, 16, 40, [64, 64])
    for beyond in (65, 1000, 2**31 - 1):
        arrays = (q, cache, table, np.array([beyond, 64], np.int32))
        assert_decodes(arrays, implementation, softmax_scale=0.3, latent_dim=32)


@pytest.mark.parametrize("latent", [32, 160])  # less than what is converted at a time, and a scale's block and more
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode_shows_a_nan_to_those_that_attend_to_it_only(implementation, dtypes, latent):
    q_dtype, dtype = dtypes
    lengths, options = [50, 50, 700, 30], dict(softmax_scale=0.3, latent_dim=latent)
    q, cache, table, seq_lens = paged(3, 4, 2, 3, 16, latent + 8, lengths, q_dtype=q_dtype, dtype=dtype, latent=latent)
    clean = decode_by_hand(q, cache, table, seq_lens, **options)
    rope = latent + 4 * -(-latent // 128)  # where a packed row's begins, after the scales

    def spoil(request, token, column, number):
        row = cache[table[request, token // 16], token % 16]
        if dtype != FP8:
            row[column] = number
        elif column < latent:
            row[column] = 0x7F  # NaN; there is no infinity
        else:
            row[rope + 2 * (column - latent) :][:2] = np.array(number, BF16).reshape(1).view(np.uint8)

    spoil(0, 20, 5, np.nan)  # a value
    spoil(1, 49, latent + 3, np.nan)  # not a value; key of the last query only
    spoil(2, 699, 3, np.inf)
    if dtype == FP8:
        cache[table[3, 29 // 16], 29 % 16, latent : latent + 4] = 255  # a scale
    else:
        spoil(3, 29, latent - 1, np.nan)
    out, lse = mla_decode(q, cache, table, seq_lens, **options, implementation=implementation)
    touched = np.array([[True, True], [False, True], [False, True], [False, True]])
    nan = np.array([0, 1, 3])
    np.testing.assert_array_equal(np.isnan(np.asarray(out, np.float32)[nan]).any(axis=(2, 3)), touched[nan])
    np.testing.assert_array_equal(np.isnan(np.asarray(lse)[nan]).any(axis=2), touched[nan])
    tolerance = dict(rtol=1e-5, atol=1e-5) if q_dtype == np.float32 else dict(rtol=1 / 128, atol=2e-3)
    np.testing.assert_allclose(np.asarray(out, np.float64)[~touched], clean[0][~touched], **tolerance)
    np.testing.assert_allclose(np.asarray(lse)[~touched], clean[1][~touched], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode_of_large_logits_neither_overflows_nor_vanishes(implementation):
    arrays = paged(4, 2, 1, 5, 16, 40, [600, 33])
    assert_decodes((arrays[0] * 40, *arrays[1:]), implementation, 1e-3, softmax_scale=5.0, latent_dim=32)


def test_decode_splits_agree_to_rounding():
    arrays = paged(5, 3, 2, 18, 64, 96, [1500, 0, 700])
    kwargs = dict(softmax_scale=0.2, latent_dim=64)
    whole = mla_decode(*arrays, num_splits=1, **kwargs)
    for num_splits in (None, 2, 3, 7, 1000):
        for got, expected in zip(mla_decode(*arrays, num_splits=num_splits, **kwargs), whole, strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_decode_of_a_request_has_the_same_bits_alone_and_in_a_batch(dtypes, num_splits):
    q_dtype, dtype = dtypes
    kwargs = dict(softmax_scale=0.2, latent_dim=64, num_splits=num_splits)
    lengths = [1300, 70, 0, 513]
    q, cache, table, seq_lens = paged(6, 4, 2, 20, 16, 72, lengths, q_dtype=q_dtype, dtype=dtype, latent=64)
    batch = mla_decode(q, cache, table, seq_lens, **kwargs)
    for i in range(4):
        one = (q[i : i + 1], cache, table[i : i + 1], seq_lens[i : i + 1])
        for got, expected in zip(mla_decode(*one, **kwargs), batch, strict=True):
            np.testing.assert_array_equal(got[0], expected[i])


def test_decode_of_more_requests_than_have_partial_results_at_a_time():
    """Their partial results would be 300 MB."""
    q, cache, table, seq_lens = paged(13, 1, 1, 128, 64, 80, [1536], q_dtype=BF16, dtype=BF16)
    one = mla_decode(q, cache, table, seq_lens, softmax_scale=0.2, latent_dim=64)
    many = [np.repeat(x, 3000, axis=0) for x in (q, table, seq_lens)]
    many[2][1::2] = 0
    out, lse = mla_decode(many[0], cache, *many[1:], softmax_scale=0.2, latent_dim=64)
    for got, expected in ((out, one[0]), (lse, one[1])):
        np.testing.assert_array_equal(got[::2], np.broadcast_to(expected, got[::2].shape))
    assert (np.asarray(out[1::2]) == 0).all() and np.isneginf(lse[1::2]).all()


def many_splits():
    arrays = paged(7, 2, 2, 70, 16, 72, [1300, 613], q_dtype=BF16, dtype=BF16)
    out, lse = mla_decode(*arrays, softmax_scale=0.2, latent_dim=64)
    return {"out": np.asarray(out).astype(np.float32), "lse": np.asarray(lse)}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a way to pin a process to one core")
def test_decode_has_the_same_bits_on_one_core(tmp_path):
    path = str(tmp_path / "one_core.npz")
    code = f"import os; os.sched_setaffinity(0, {{0}}); import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); "
    code += f"import numpy as np, test_mla as t; np.savez({path!r}, **t.many_splits())"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name, expected in many_splits().items():
        np.testing.assert_array_equal(np.load(path)[name], expected)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_decode_at_every_simd_level(level):
    """Whole results in a process of that level; a machine without it runs the best that it has."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_mla as t; t.check_shapes()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAXKERN_SIMD": level})


def check_shapes():
    for i, (b, s, h, page, pages, width, latent, q_dtype, dtype) in enumerate(SHAPES):
        lengths = [pages * page - 1 - 3 * j for j in range(b)]
        arrays = paged(i, b, s, h, page, width, lengths, q_dtype=q_dtype, dtype=dtype, latent=latent)
        assert_decodes(arrays, "cpu", softmax_scale=width**-0.55, latent_dim=latent)


@pytest.mark.parametrize("in_axes", [(0, None, None, None), (0, 0, None, None), (None, 0, 0, None), (1, 0, 0, 0)])
def test_decode_vmap(in_axes):
    cases = [paged(seed, 2, 1, 3, 16, 40, [33, 20]) for seed in (8, 9)]
    arrays = [
        cases[0][i] if axis is None else np.stack([c[i] for c in cases], axis=axis) for i, axis in enumerate(in_axes)
    ]

    def call(*arrays):
        return jaxkern.mla_decode(*arrays, softmax_scale=0.3, latent_dim=32)

    got = jax.vmap(call, in_axes)(*arrays)
    for n in range(2):
        one = call(*[x if axis is None else np.take(x, n, axis) for x, axis in zip(arrays, in_axes, strict=True)])
        for g, e in zip(got, one, strict=True):
            np.testing.assert_array_equal(g[n], e)


def test_decode_errors():
    q, cache, table, seq_lens = paged(0, 4, 1, 2, 16, 40, [20, 20, 20, 20], pages=8)
    call = jax.jit(lambda *a, **k: jaxkern.mla_decode(*a, **{"softmax_scale": 1.0, "latent_dim": 32, **k}))
    with pytest.raises(TypeError, match=r"mla_decode: block_table must be int32 \[b=4, pages\], got float32\[4,8\]"):
        call(q, cache, table.astype(np.float32), seq_lens)
    with pytest.raises(
        TypeError, match=r"mla_decode: q must be float32 or bfloat16 or float16 \[b, s, h, d\], got int32"
    ):
        call(q.astype(np.int32), cache, table, seq_lens)
    with pytest.raises(ValueError, match=r"mla_decode: cache must be .* \[p, page, d=40\], got float32\[\d+,16,39\]"):
        call(q, cache[..., 1:], table, seq_lens)
    with pytest.raises(ValueError, match=r"mla_decode: seq_lens must be int32 \[b=4\], got int32\[3\]"):
        call(q, cache, table, seq_lens[1:])
    for latent_dim in (0, 41):
        with pytest.raises(ValueError, match=f"mla_decode: latent_dim must be from 1 to d=40, got {latent_dim}"):
            jaxkern.mla_decode(q, cache, table, seq_lens, softmax_scale=1.0, latent_dim=latent_dim)
    with pytest.raises(ValueError, match=r"mla_decode: num_splits must be None or in 1\.\.1024, got 0"):
        jaxkern.mla_decode(q, cache, table, seq_lens, softmax_scale=1.0, latent_dim=32, num_splits=0)
    rows = np.zeros((2, 16, 52), np.uint8)
    with pytest.raises(
        ValueError, match=r"mla_decode: cache must be .* or uint8 \[p, page, bytes=52\], got uint8\[2,16,51\]"
    ):
        call(q, rows[..., 1:], table, seq_lens)
    with pytest.raises(ValueError, match="mla_decode: latent_dim of a packed cache must be a multiple of 4, got 30"):
        jaxkern.mla_decode(q, rows, table, seq_lens, softmax_scale=1.0, latent_dim=30)


# ---- parts of attention, merged ----


def merge_by_hand(outs, lses):
    """merge_attention in float64."""
    outs, lses = np.asarray(outs).astype(np.float64), np.asarray(lses, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = lses.max(axis=0)
        weights = np.where(np.isneginf(lses), 0, np.exp(lses - np.where(np.isneginf(largest), 0, largest)))
        total = weights.sum(axis=0)
        shares = np.where(total == 0, 0, weights / total)
        out = (shares[..., None] * np.where(np.isneginf(lses)[..., None], 0, outs)).sum(axis=0)
        return out, np.where(total == 0, -np.inf, largest + np.log(total))


MERGED_BY = [*IMPLEMENTATIONS, *[HOPPER_IMPLEMENTATION] * (HOPPER_IMPLEMENTATION != "none")]


@pytest.mark.parametrize("implementation", MERGED_BY)
@pytest.mark.parametrize("dtype", [np.float32, BF16, F16])
def test_merge(dtype, implementation):
    rng = np.random.default_rng(0)
    for n, lead, d in [(1, (3,), 5), (2, (), 64), (7, (3, 2, 5), 61), (4, (0, 3), 8), (3, (41,), 1032)]:
        outs = rng.standard_normal((n, *lead, d)).astype(dtype)
        lses = (20 * rng.standard_normal((n, *lead))).astype(np.float32)
        empty = rng.random(lses.shape) < 0.4
        outs[empty], lses[empty] = np.nan, -np.inf
        out, lse = jaxkern.merge_attention(outs, lses, implementation=implementation)
        expected_out, expected_lse = merge_by_hand(outs, lses)
        assert out.dtype == dtype and lse.dtype == np.float32
        rtol = {np.float32: 1e-5, BF16: 1 / 250, F16: 1 / 2000}[dtype]
        np.testing.assert_allclose(np.asarray(out, np.float64), expected_out, rtol=rtol, atol=rtol / 10)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-6)
        listed = jaxkern.merge_attention(list(outs), tuple(lses), implementation=implementation)
        np.testing.assert_array_equal(listed[0], out)
        np.testing.assert_array_equal(listed[1], lse)


@pytest.mark.parametrize("implementation", MERGED_BY)
def test_merge_of_nan_and_infinity(implementation):
    """Of a part with keys they reach the row, of one without nothing does; one part alone is itself, to the bit."""
    outs = np.random.default_rng(2).standard_normal((2, 6, 8)).astype(np.float32)
    lses = np.random.default_rng(3).standard_normal((2, 6)).astype(np.float32)
    outs[0, 0, 1], outs[1, 1, 2], outs[0, 2, 3], outs[0, 5] = np.nan, np.inf, np.nan, np.nan
    lses[0, 2], lses[1, 3], lses[0, 4], lses[:, 5] = -np.inf, np.nan, np.inf, -np.inf
    out, lse = (np.array(x) for x in jaxkern.merge_attention(outs, lses, implementation=implementation))
    assert np.isnan(out[[0, 3, 4], [1, 0, 7]]).all() and np.isnan(out[3:5]).all() and np.isposinf(out[1, 2])
    assert np.isnan(lse[3:5]).all() and np.isneginf(lse[5]) and (out[5] == 0).all()
    np.testing.assert_array_equal(out[2], outs[1, 2])
    out[0, 1] = out[1, 2] = 0
    assert np.isfinite(out[:3]).all() and np.isfinite(lse[:3]).all()


def test_merge_of_parts_without_keys_has_gradients():
    """Those of the parts with keys as if the others were not there, and zero for the others."""
    outs = np.random.default_rng(1).standard_normal((3, 4, 6)).astype(np.float32)
    lses = np.array([[0.1, 2, -1, -np.inf], [-np.inf, 0.5, -np.inf, -np.inf], [0.3, 1, 0.7, -np.inf]], np.float32)
    empty = np.isneginf(lses)
    outs[empty] = np.nan

    def loss(outs, lses):
        out, lse = jaxkern.merge_attention(outs, lses)
        return (out * jnp.cos(jnp.arange(6.0))).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    d_outs, d_lses = jax.grad(loss, (0, 1))(outs, lses)
    assert (np.asarray(d_outs)[empty] == 0).all() and (np.asarray(d_lses)[empty] == 0).all()
    for row in range(3):
        has = ~empty[:, row]
        expected = jax.grad(loss, (0, 1))(outs[has, row : row + 1], lses[has, row : row + 1])
        np.testing.assert_allclose(d_outs[has, row], expected[0][:, 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(d_lses[has, row], expected[1][:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_decode_of_a_cache_whose_pages_are_spread_over_devices(dtypes):
    """Context parallelism: each device decodes the pages that it holds, and the parts are merged."""
    q_dtype, dtype = dtypes
    lengths = [700, 0, 33, 3]
    q, cache, table, seq_lens = paged(14, 4, 2, 5, 16, 72, lengths, q_dtype=q_dtype, dtype=dtype, latent=64)
    cache = np.concatenate([cache, cache[: -len(cache) % 4]])
    kwargs = dict(softmax_scale=0.3, latent_dim=64)
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))

    def decode(q, cache, block_table, seq_lens):
        first = jax.lax.axis_index("context") * cache.shape[0]
        held = (block_table >= first) & (block_table < first + cache.shape[0])
        local = jnp.where(held, block_table - first, -1)
        part = jaxkern.mla_decode(q.astype(jnp.float32), cache, local, seq_lens, **kwargs)
        outs, lses = jax.lax.all_gather(part, "context")
        return jax.tree.map(lambda x: x[None], jaxkern.merge_attention(outs, lses))

    spread = jax.shard_map(
        decode, mesh=mesh, in_specs=(P(), P("context"), P(), P()), out_specs=(P("context"), P("context"))
    )
    outs, lses = jax.jit(spread)(q, cache, table, seq_lens)
    expected = decode_by_hand(q, cache, table, seq_lens, **kwargs)
    for device in range(4):
        flash_mla_accepts(outs[device], expected[0], 1e-6, 1e-5, 1e-9)
        flash_mla_accepts(lses[device], expected[1], 1e-6, 1e-5, 1e-9)


def test_merge_errors():
    outs, lses = jnp.zeros((3, 2, 8)), jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"merge_attention: lses must be float32 \[n=3, b0=2\], got float32\[3,4\]"):
        jaxkern.merge_attention(outs, jnp.zeros((3, 4)))
    with pytest.raises(TypeError, match=r"merge_attention: lses must be float32 \[n=3, b0=2\], got bfloat16\[3,2\]"):
        jaxkern.merge_attention(outs, lses.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"merge_attention: outs must be .* \[n, ..., d\], got float32\[0,2,8\]"):
        jaxkern.merge_attention(outs[:0], lses[:0])


# ---- prefill ----


def attention(q, k, v, softmax_scale, causal=True, segments=None):
    """Plain attention with the whole matrix of probabilities; queries without keys have out 0 and lse -inf."""
    t = q.shape[1]
    sees = jnp.tril(jnp.ones((1, 1, t, t), bool)) if causal else jnp.ones((1, 1, t, t), bool)
    if segments is not None:
        same = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, None, :]
        sees = sees & same[:, None]
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * softmax_scale
    logits = jnp.where(sees, logits, -1e30)
    lse = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.where(sees, jnp.exp(logits - lse[..., None]), 0)
    out = jnp.einsum("bhqk,bkhd->bqhd", p, v, precision="highest")
    return out, jnp.swapaxes(jnp.where(sees.any(-1), lse, -jnp.inf), 1, 2)


def weighted_sum(results):
    """A scalar in which every element of out, and lse where it is finite, has a weight of its own."""
    out, lse = results
    weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return (out.astype(jnp.float32) * weights).sum() + jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0).sum()


def prefill_by_hand(q, k, v, sees, softmax_scale, d_out, d_lse):
    """out, lse and the gradients of q, k and v in float64; sees [b, t, t] tells which keys a query sees."""
    q, k, v, d_out, d_lse = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_out, d_lse))
    with np.errstate(divide="ignore"):
        logits = np.where(sees[:, None], softmax_scale * np.einsum("bqhd,bkhd->bhqk", q, k), -np.inf)
        largest = np.maximum(logits.max(axis=-1, keepdims=True, initial=-np.inf), -1e300)
        lse = (largest + np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True)))[..., 0]
    p = np.where(sees[:, None], np.exp(logits - np.maximum(lse, -1e300)[..., None]), 0)
    out = np.einsum("bhqk,bkhd->bqhd", p, v)
    delta = np.einsum("bqhd,bqhd->bhq", d_out, out) - np.swapaxes(d_lse, 1, 2)
    d_logits = softmax_scale * p * (np.einsum("bqhd,bkhd->bhqk", d_out, v) - delta[..., None])
    dq, dk = np.einsum("bhqk,bkhd->bqhd", d_logits, k), np.einsum("bhqk,bqhd->bkhd", d_logits, q)
    return out, np.swapaxes(lse, 1, 2), dq, dk, np.einsum("bhqk,bqhd->bkhd", p, d_out)


@functools.partial(jax.jit, static_argnames=["softmax_scale", "causal", "implementation"])
def prefill_and_gradients(q, k, v, d_out, d_lse, **kwargs):
    (out, lse), backward = jax.vjp(lambda *a: jaxkern.mla_prefill(*a, **kwargs), q, k, v)
    return out, lse, *backward((d_out, d_lse))


def sequences(seed, b, t, h, dk, dv, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((b, t, h, d)).astype(dtype)) for d in (dk, dk, dv)]


def cotangents(q, v):
    rng = np.random.default_rng(99)
    return rng.standard_normal(v.shape).astype(q.dtype), rng.standard_normal(q.shape[:-1]).astype(np.float32)


def assert_close(got, expected, rtol=1e-5):
    """Tolerances are relative to the largest of an array."""
    got, expected = np.asarray(got).astype(np.float64), np.asarray(expected).astype(np.float64)
    assert got.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    limit = rtol * max(1, np.abs(expected[finite]).max(initial=0))
    np.testing.assert_allclose(got[finite], expected[finite], rtol=0, atol=limit)


def assert_prefills(call, expected_call, arrays, rtol=1e-5):
    """Results and gradients."""

    def both(call):
        return jax.jit(lambda *a: (call(*a), jax.grad(lambda *a: weighted_sum(call(*a)), (0, 1, 2))(*a)))(*arrays)

    for got, expected in zip(*(jax.tree.leaves(both(c)) for c in (call, expected_call)), strict=True):
        assert_close(got, expected, rtol)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("t,dk,dv", [(1, 24, 16), (20, 24, 16), (600, 24, 16), (900, 7, 35), (200, 192, 128)], ids=str)
def test_prefill(t, dk, dv, causal, implementation):
    scale = 0.3 * (24 / dk) ** 0.5
    assert_prefills(
        lambda *a: jaxkern.mla_prefill(*a, softmax_scale=scale, causal=causal, implementation=implementation),
        lambda *a: attention(*a, scale, causal),
        sequences(t, 2, t, 3, dk, dv),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("t", [33, 600])
def test_prefill_of_padded_sequences(t, implementation):
    seq_lens = jnp.array([t, t // 2, 0, 1], jnp.int32)
    segments = jnp.where(jnp.arange(t) < seq_lens[:, None], 0, -1)
    inside = (segments >= 0)[..., None, None]
    arrays = sequences(t, 4, t, 2, 24, 16)
    kwargs = dict(softmax_scale=0.3, causal=t < 100, seq_lens=seq_lens, implementation=implementation)
    assert_prefills(
        lambda *a: jaxkern.mla_prefill(*a, **kwargs), lambda *a: attention(*a, 0.3, t < 100, segments), arrays
    )
    # What lies past the end may be anything, cotangents too, and gets no gradient.
    arrays += cotangents(arrays[0], arrays[2])
    poisoned = [jnp.where(inside if x.ndim == 4 else inside[..., 0], x, jnp.nan) for x in arrays]
    results, expected = (prefill_and_gradients(*a, **kwargs) for a in (poisoned, arrays))
    for got, e in zip(results, expected, strict=True):
        np.testing.assert_array_equal(got, e)
    for gradient in results[2:]:
        assert (jnp.where(inside, 0, gradient) == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("t", [33, 600])
def test_a_nan_reaches_nothing_that_is_no_token(t, implementation):
    arrays = sequences(t, 2, t, 2, 24, 16)
    arrays = [x.at[0, t // 3].set(jnp.nan) for x in (*arrays, *map(jnp.asarray, cotangents(arrays[0], arrays[2])))]
    kwargs = dict(softmax_scale=0.3, seq_lens=jnp.array([t // 2, t], jnp.int32), implementation=implementation)
    out, lse, *gradients = prefill_and_gradients(*arrays, **kwargs)
    assert np.isnan(out[0, t // 3]).all() and (lse[0, t // 2 :] == -jnp.inf).all()
    for x in (out, *gradients):
        assert not x[0, t // 2 :].any() and np.isfinite(x[1]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("t", [40, 600])
def test_prefill_of_packed_sequences(t, implementation):
    cu_seqlens = [2, 9, 9, t // 2, t - 3]  # one is empty; five tokens, which may be anything, belong to none
    arrays = [x[0].at[:2].set(jnp.nan).at[t - 3 :].set(jnp.nan) for x in sequences(t, 1, t, 2, 24, 16)]
    packed = jnp.array(cu_seqlens, jnp.int32)

    def one_by_one(*arrays):
        parts = [
            attention(*[x[None, i:j] for x in arrays], 0.3)
            for i, j in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)
            if j > i
        ]
        out, lse = (jnp.concatenate([p[i][0] for p in parts]) for i in (0, 1))
        return jnp.pad(out, [(2, 3), (0, 0), (0, 0)]), jnp.pad(lse, [(2, 3), (0, 0)], constant_values=-jnp.inf)

    def call(*a):
        return jaxkern.mla_prefill(*a, softmax_scale=0.3, cu_seqlens=packed, implementation=implementation)

    assert_prefills(call, one_by_one, arrays)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_prefill_any_shape(implementation, data):
    packed, causal = data.draw(st.booleans()), data.draw(st.booleans())
    b, h = 1 if packed else data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    t = data.draw(st.one_of(st.sampled_from([0, 1, 95, 96, 97, 256, 400]), st.integers(0, 300)))
    dk, dv = data.draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
    dtypes = [data.draw(st.sampled_from([np.float32, BF16, np.float16])) for _ in range(3)]
    q, k, v = (x.astype(d) for x, d in zip(sequences(t, b, t, h, dk, dv), dtypes, strict=True))
    if packed:
        ends = sorted(data.draw(st.lists(st.integers(0, t), min_size=1, max_size=5)))
        sequence = np.searchsorted(ends, np.arange(t), side="right") - 1
        sequence = np.where(sequence < len(ends) - 1, sequence, -1)[None]
        lengths = {"cu_seqlens": np.array(ends, np.int32)}
    else:
        seq_lens = data.draw(st.lists(st.integers(-1, t + 1), min_size=b, max_size=b))
        sequence = np.where(np.arange(t) < np.reshape(seq_lens, (b, 1)), 0, -1)
        lengths = {"seq_lens": np.array(seq_lens, np.int32)}
    sees = (sequence[:, :, None] == sequence[:, None]) & (sequence >= 0)[:, None]
    if causal:
        sees &= np.tri(t, dtype=bool)
    arrays = q, k, v, *cotangents(q, v)
    kwargs = dict(softmax_scale=dk**-0.5, causal=causal, implementation=implementation)
    got = prefill_and_gradients(*[x[0] if packed else x for x in arrays], **lengths, **kwargs)
    expected = prefill_by_hand(q, k, v, sees, dk**-0.5, *arrays[3:])
    for i, (g, e, dtype) in enumerate(zip(got, expected, (dtypes[0], np.float32, *dtypes), strict=True)):
        assert g.dtype == dtype
        # Each result is rounded once; the gradients are made from a rounded out, too.
        assert_close(g, e[0] if packed else e, 1e-5 + ROUNDING[dtype] + (4 * ROUNDING[dtypes[0]] if i > 1 else 0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [BF16, np.float16])
def test_prefill_in_16_bits_is_float32_rounded_once(dtype, implementation):
    arrays = sequences(0, 2, 280, 2, 48, 32, dtype)
    d_out, d_lse = cotangents(arrays[0], arrays[2])
    sees = np.broadcast_to(np.tri(280, dtype=bool), (2, 280, 280))
    got = prefill_and_gradients(*arrays, d_out, d_lse, softmax_scale=0.2, implementation=implementation)
    expected = prefill_by_hand(*arrays, sees, 0.2, d_out, d_lse)
    flash_mla_accepts(got[0], expected[0], 1e-6, 1 / 255, 5e-6)
    flash_mla_accepts(got[1], expected[1], 1e-6, 1e-5, 1e-9)
    for g, e, x in zip(got[2:], expected[2:], arrays, strict=True):
        assert g.dtype == x.dtype
        flash_mla_accepts(g, e, 4e-3 * np.abs(e).max(), 1 / 128, 7e-6)  # out was rounded before it went into delta


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prefill_gradient_of_lse_alone(implementation):
    q, k, v = sequences(5, 1, 130, 2, 24, 16)

    def gradient(call):
        return jax.jit(jax.grad(lambda *a: jnp.sin(call(*a)[1]).sum(), (0, 1, 2)))(q, k, v)

    got = gradient(lambda *a: jaxkern.mla_prefill(*a, softmax_scale=0.3, implementation=implementation))
    for g, e in zip(got, gradient(lambda *a: attention(*a, 0.3)), strict=True):
        assert_close(g, e)
    assert not got[2].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prefill_of_large_logits_neither_overflows_nor_vanishes(implementation):
    q, k, v = sequences(6, 1, 300, 2, 24, 16)
    arrays = 40 * q, k, v, *cotangents(q, v)  # logits of some hundreds
    got = prefill_and_gradients(*arrays, softmax_scale=3.0, causal=False, implementation=implementation)
    expected = prefill_by_hand(*arrays[:3], np.ones((1, 300, 300), bool), 3.0, *arrays[3:])
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, 1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_prefill_clamps_lengths_to_the_tokens(causal, implementation):
    arrays = sequences(7, 1, 300, 2, 24, 16)
    kwargs = dict(softmax_scale=0.3, causal=causal, implementation=implementation)
    whole = jaxkern.mla_prefill(*arrays, **kwargs)
    for beyond in (301, 2**31 - 1):
        for got, expected in zip(
            jaxkern.mla_prefill(*arrays, seq_lens=jnp.array([beyond], jnp.int32), **kwargs), whole, strict=True
        ):
            np.testing.assert_array_equal(got, expected)
        cu_seqlens = jnp.array([-9, beyond], jnp.int32)
        for got, expected in zip(
            jaxkern.mla_prefill(*[x[0] for x in arrays], cu_seqlens=cu_seqlens, **kwargs), whole, strict=True
        ):
            np.testing.assert_array_equal(got, expected[0])
    out, lse = jaxkern.mla_prefill(*arrays, seq_lens=jnp.array([-3], jnp.int32), **kwargs)
    assert not out.any() and jnp.isneginf(lse).all()


def many_ranges():
    """Results and gradients of a call that is cut into several ranges of tokens, whole and packed."""
    arrays = sequences(8, 1, 1700, 2, 72, 40, BF16)
    arrays += cotangents(arrays[0], arrays[2])
    whole = prefill_and_gradients(*arrays, softmax_scale=0.2)
    cu_seqlens = jnp.array([0, 100, 1300, 1690], jnp.int32)
    packed = prefill_and_gradients(*[x[0] for x in arrays], softmax_scale=0.2, cu_seqlens=cu_seqlens)
    return {str(i): np.asarray(x).astype(np.float32) for i, x in enumerate((*whole, *packed))}


def test_prefill_has_the_same_bits_every_time():
    first = many_ranges()
    for _ in range(3):
        for name, got in many_ranges().items():
            np.testing.assert_array_equal(got, first[name])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a way to pin a process to one core")
def test_prefill_has_the_same_bits_on_one_core(tmp_path):
    path = str(tmp_path / "one_core.npz")
    code = f"import os; os.sched_setaffinity(0, {{0}}); import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); "
    code += f"import numpy as np, test_mla as t; np.savez({path!r}, **t.many_ranges())"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name, expected in many_ranges().items():
        np.testing.assert_array_equal(np.load(path)[name], expected)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_prefill_at_every_simd_level(level):
    """Whole results in a process of that level; a machine without it runs the best that it has."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_mla as t; t.check_prefills()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAXKERN_SIMD": level})


def check_prefills():
    for t, dk, dv, dtypes in [
        (900, 24, 16, (np.float32,) * 3),
        (130, 192, 128, (np.float32, np.float16, BF16)),
        (200, 7, 35, (np.float32, BF16, np.float16)),
    ]:
        q, k, v = (x.astype(d) for x, d in zip(sequences(t, 1, t, 2, dk, dv), dtypes, strict=True))
        arrays = q, k, v, *cotangents(q, v)
        got = prefill_and_gradients(*arrays, softmax_scale=dk**-0.5, implementation="cpu")
        expected = prefill_by_hand(q, k, v, np.tri(t, dtype=bool)[None], dk**-0.5, *arrays[3:])
        for g, e in zip(got, expected, strict=True):
            assert_close(g, e, 1e-5 if g.dtype == np.float32 else 2.0**-8)


@pytest.mark.parametrize("in_axes", [(0, 0, 0, 0), (1, None, None, None), (None, 2, 0, None), (None, None, None, 0)])
def test_prefill_vmap(in_axes):
    cases = [[*sequences(seed, 2, 33, 3, 24, 16), jnp.array([33, seed], jnp.int32)] for seed in (8, 9)]
    arrays = [cases[0][i] if axis is None else jnp.stack([c[i] for c in cases], axis) for i, axis in enumerate(in_axes)]

    def gradients(q, k, v, seq_lens):
        def loss(q, k, v):
            return weighted_sum(jaxkern.mla_prefill(q, k, v, softmax_scale=0.3, seq_lens=seq_lens))

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    got = jax.jit(jax.vmap(gradients, in_axes))(*arrays)
    for n in range(2):
        one = gradients(*[x if axis is None else jnp.take(x, n, axis) for x, axis in zip(arrays, in_axes, strict=True)])
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(one), strict=True):
            assert_close(g[n], e)


def test_prefill_skips_what_is_masked():
    """32 sequences of 256 tokens are a 32nd of the work of one of 8192."""
    arrays = [x[0] for x in sequences(0, 1, 8192, 2, 64, 64)]
    call = jax.jit(lambda *a: jaxkern.mla_prefill(*a[:3], softmax_scale=0.2, causal=False, cu_seqlens=a[3]))

    def seconds(cu_seqlens):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(call(*arrays, cu_seqlens))
            times.append(time.perf_counter() - start)
        return min(times[1:])

    whole, parts = (seconds(jnp.arange(0, 8193, step, dtype=jnp.int32)) for step in (8192, 256))
    assert parts < whole / 5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prefill_memory_is_linear(implementation):
    """Four times the sequence may take four times the memory, where probabilities would take sixteen."""

    def temporaries(t):
        shapes = [jax.ShapeDtypeStruct((1, t, 1, 32), np.float32)] * 3
        call = functools.partial(jaxkern.mla_prefill, softmax_scale=0.2, implementation=implementation)
        loss = jax.grad(lambda *a: weighted_sum(call(*a)))
        return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 4.5 * temporaries(4096)
    assert temporaries(4096) < 4.5 * temporaries(1024)


def test_prefill_and_decode_agree():
    """The last token of a sequence, by either: keys of all heads alike, values their first columns."""
    q, cache, table, seq_lens = paged(11, 3, 1, 4, 16, 40, [40, 7, 1])
    decoded = jaxkern.mla_decode(q, cache, table, seq_lens, softmax_scale=0.3, latent_dim=32)
    k = jaxkern.kv_cache.gather(cache, table)[:, :, None, :].repeat(4, axis=2)
    queries = jnp.zeros(k.shape).at[np.arange(3), seq_lens - 1].set(q[:, 0])
    prefill = jax.jit(lambda *a: jaxkern.mla_prefill(*a, softmax_scale=0.3, seq_lens=seq_lens))
    out, lse = prefill(queries, k, k[..., :32])
    np.testing.assert_allclose(out[np.arange(3), seq_lens - 1], decoded[0][:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse[np.arange(3), seq_lens - 1], decoded[1][:, 0], rtol=1e-5, atol=1e-6)


def test_prefill_errors():
    q, k, v = sequences(0, 2, 8, 2, 24, 16)
    with pytest.raises(ValueError, match="mla_prefill: seq_lens and cu_seqlens exclude each other"):
        jaxkern.mla_prefill(q, k, v, softmax_scale=1.0, seq_lens=jnp.ones(2, int), cu_seqlens=jnp.ones(2, int))
    with pytest.raises(
        ValueError, match=r"mla_prefill: k must be .* \[b=2, t=8, h=2, dk=24\], got float32\[2,8,2,23\]"
    ):
        jaxkern.mla_prefill(q, k[..., 1:], v, softmax_scale=1.0)
    with pytest.raises(TypeError, match=r"mla_prefill: seq_lens must be int32 \[b=2\], got float32\[2\]"):
        jaxkern.mla_prefill(q, k, v, softmax_scale=1.0, seq_lens=jnp.ones(2))
    with pytest.raises(ValueError, match=r"mla_prefill: q must be .* \[t, h, dk\], got float32\[2,8,2,24\]"):
        jaxkern.mla_prefill(q, k, v, softmax_scale=1.0, cu_seqlens=jnp.array([0, 8], jnp.int32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode_without_any_page(implementation):
    q, cache = jnp.ones((2, 1, 3, 40)), jnp.ones((0, 16, 40))
    table, lens = jnp.zeros((2, 2), jnp.int32), jnp.full(2, 5, jnp.int32)
    out, lse = jaxkern.mla_decode(
        q, cache, table, lens, softmax_scale=0.2, latent_dim=32, implementation=implementation
    )
    assert (out == 0).all() and (lse == -jnp.inf).all()


def test_parts_that_are_not_alike():
    lses = [jnp.zeros(3)] * 2
    with pytest.raises(ValueError, match="merge_attention: outs must have a part, got none"):
        jaxkern.merge_attention([], [])
    with pytest.raises(
        ValueError, match=r"merge_attention: outs\[1\] must be float32\[3,8\] as .*, got float32\[2,8\]"
    ):
        jaxkern.merge_attention([jnp.ones((3, 8)), jnp.ones((2, 8))], lses)
    with pytest.raises(
        TypeError, match=r"merge_attention: outs\[1\] must be float32\[3,8\] as .*, got bfloat16\[3,8\]"
    ):
        jaxkern.merge_attention([jnp.ones((3, 8)), jnp.ones((3, 8), jnp.bfloat16)], lses)
    with pytest.raises(TypeError, match=r"merge_attention: lses\[0\] must be an array, got None"):
        jaxkern.merge_attention([jnp.ones((3, 8))], [None])
