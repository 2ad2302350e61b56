"""The Hopper kernels of MLA: against loops in float64, in any order of what runs at the same time."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from contract import HOPPER_IMPLEMENTATION
from test_mla import FP8, cotangents, decode_by_hand, flash_mla_accepts, paged, prefill_by_hand, sequences

from jaxkern import _ffi, kv_cache, mla_decode, mla_prefill
from jaxkern.mla import MLA_PREFILL_BACKWARD

pytestmark = pytest.mark.skipif(HOPPER_IMPLEMENTATION == "none", reason="no implementation to test")

BF16, F16 = ml_dtypes.bfloat16, np.float16
# Queries, heads, rows of a page, lengths. A group of 64 rows that is not full, several groups, a group of two queries,
# empty requests, a block of 64 keys in one, two or four pages, keys that only some queries see.
CASES = [
    (1, 16, 64, [64]),
    (1, 1, 64, [1, 0, 200]),
    (2, 3, 16, [130, 2, 65]),
    (1, 128, 64, [300, 129]),
    (4, 33, 256, [0, 520, 4, 70]),
    (2, 63, 32, [100, 0, 0, 257, 31]),
    (8, 9, 48, [97, 8]),
]


def operands(queries, heads, page, lengths, dtype=BF16):
    """Of FlashMLA's own sizes: keys of a tenth. dtype is the cache's."""
    q_dtype = BF16 if dtype == FP8 else dtype
    dtypes = dict(q_dtype=q_dtype, dtype=dtype, latent=512)
    q, cache, table, seq_lens = paged(sum(lengths), len(lengths), queries, heads, page, 576, lengths, **dtypes)
    if dtype == FP8:
        scales = np.ascontiguousarray(cache[..., 512:528]).view(np.float32)
        cache[..., 512:528] = (scales / 5).view(np.uint8)
        cache[..., 528:] = (np.ascontiguousarray(cache[..., 528:]).view(BF16) / BF16(5)).view(np.uint8)
    else:
        cache = cache / dtype(5)
    return [jnp.asarray(x) for x in (q, cache, table, seq_lens)]


def numbers(cache):
    """The cache that a packed one stands for, in bfloat16, as which the kernel takes it."""
    return kv_cache.unpack(cache) if cache.dtype == FP8 else cache


def decode(arrays, **kwargs):
    out, lse = mla_decode(*arrays, softmax_scale=576**-0.55, implementation=HOPPER_IMPLEMENTATION, **kwargs)
    return np.asarray(out).astype(np.float32), np.asarray(lse)


def check(arrays, got, causal):
    q, cache, table, seq_lens = arrays
    host = [np.asarray(x) for x in (q, numbers(cache), table, seq_lens)]
    out, lse = decode_by_hand(*host, softmax_scale=576**-0.55, latent_dim=512, causal=causal)
    flash_mla_accepts(got[0], out, 8e-4, 2.01 / 128, 5e-6)
    flash_mla_accepts(got[1], lse, 1e-6, 8.01 / 65536, 1e-7)


def assert_same_bits_in_any_order(arrays, got, simulator, **kwargs):
    if HOPPER_IMPLEMENTATION == "sim":
        for seed in range(1, 8):
            simulator.configure(seed=seed)
            for again, first in zip(decode(arrays, **kwargs), got, strict=True):
                np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("causal,num_splits", [(True, None), (True, 1), (True, 3), (False, None)])
@pytest.mark.parametrize("queries,heads,page,lengths", CASES, ids=str)
def test_decode(queries, heads, page, lengths, causal, num_splits, simulator):
    arrays = operands(queries, heads, page, lengths)
    got = decode(arrays, causal=causal, num_splits=num_splits)
    check(arrays, got, causal)
    assert_same_bits_in_any_order(arrays, got, simulator, causal=causal, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("queries,heads,page,lengths", CASES, ids=str)
def test_decode_float16(queries, heads, page, lengths, num_splits, simulator):
    arrays = operands(queries, heads, page, lengths, F16)
    got = decode(arrays, num_splits=num_splits)
    check(arrays, got, True)
    out, _ = decode_by_hand(*map(np.asarray, arrays), softmax_scale=576**-0.55, latent_dim=512)
    flash_mla_accepts(got[0], out, 1e-4, 1 / 500, 1e-6)  # eight times the bits of bfloat16
    assert_same_bits_in_any_order(arrays, got, simulator, num_splits=num_splits)


def test_small_float16_weights_count():
    """Each is less than half of float16's least number, together they are a part in 1600 of the sum."""
    keys = 40000
    q = jnp.zeros((1, 1, 1, 576), F16).at[..., 0].set(1)
    cache = jnp.zeros((keys // 16, 16, 576), F16).at[..., 0].set(-18).at[0, 0, 0].set(0).at[..., 1].set(1)
    cache = cache.at[0, 0, 1].set(0)
    arrays = q, cache, jnp.arange(keys // 16, dtype=jnp.int32)[None], jnp.asarray([keys], jnp.int32)
    out, _ = mla_decode(*arrays, softmax_scale=1.0, implementation=HOPPER_IMPLEMENTATION)
    small = (keys - 1) * np.exp(-18.0)
    np.testing.assert_allclose(out[0, 0, 0, 1], small / (1 + small), rtol=0.02)


# Of pages of any size; and many pieces of one block of keys, of groups of rows that share them.
PACKED = [*CASES, (1, 5, 7, [100, 3, 0]), (2, 2, 1, [70]), (1, 128, 100, [230, 500])]
PACKED += [(1, 128, 64, [40, 64, 1, 0, 63, 20, 64, 30, 5, 9, 64, 2])]


@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("queries,heads,page,lengths", PACKED, ids=str)
def test_decode_packed(queries, heads, page, lengths, num_splits, simulator):
    """The same bits as of the bfloat16 that the rows stand for, where there are pages of these."""
    arrays = operands(queries, heads, page, lengths, FP8)
    got = decode(arrays, num_splits=num_splits)
    check(arrays, got, True)
    if page % 16 == 0:
        q, cache, table, seq_lens = arrays
        for x, expected in zip(got, decode((q, numbers(cache), table, seq_lens), num_splits=num_splits), strict=True):
            np.testing.assert_array_equal(x, expected)
    assert_same_bits_in_any_order(arrays, got, simulator, num_splits=num_splits)


def test_packed_codes_and_scales_may_be_any():
    """Every code but NaN; scales that are negative, tiny or no power of two."""
    rng = np.random.default_rng(0)
    q, cache, table, seq_lens = operands(1, 16, 32, [96], FP8)
    rows = np.asarray(cache).reshape(-1, 656)[:, :528].copy()
    rows[:, :512] = np.where((codes := rng.integers(0, 256, (len(rows), 512))) % 128 == 127, 0, codes)
    rows[:, 512:] = (rng.choice([-3e-3, 1e-4, 2.0**-9, 1e-30], (len(rows), 4)).astype(np.float32)).view(np.uint8)
    cache = cache.at[..., :528].set(jnp.asarray(rows).reshape(*cache.shape[:2], 528))
    got, expected = (decode((q, x, table, seq_lens), num_splits=1) for x in (cache, numbers(cache)))
    assert np.isfinite(expected[0]).all()
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize("heads", [3, 128])
@pytest.mark.parametrize("dtype", [BF16, F16, FP8])
def test_a_key_that_is_nan_makes_its_request_nan(dtype, heads):
    q, cache, table, seq_lens = operands(1, heads, 16, [70, 40], dtype)
    page = int(table[0, 2])
    cache = cache.at[page, 5, 100].set(127 if dtype == FP8 else jnp.nan)  # a code whose scale is none
    out, lse = decode((q, cache, table, seq_lens))
    assert np.isnan(out[0]).all() and np.isnan(lse[0]).all()
    assert np.isfinite(out[1]).all() and np.isfinite(lse[1]).all()


def test_decode_of_what_append_packed():
    q, _, table, seq_lens = operands(1, 7, 64, [150, 64])
    rows = jax.random.normal(jax.random.key(0), (2, 150, 576), jnp.bfloat16) / 10
    positions = jnp.where(jnp.arange(150) < seq_lens[:, None], jnp.arange(150), -1)
    empty = jnp.full((6, 64, kv_cache.row_bytes()), 255, jnp.uint8)
    cache = kv_cache.append(empty, rows, table, positions, implementation=HOPPER_IMPLEMENTATION)
    arrays = q, cache, table, seq_lens
    got = decode(arrays)
    check(arrays, got, True)
    out, _ = decode_by_hand(  # what was packed, to the precision of three bits
        *map(np.asarray, (q, rows, jnp.arange(2)[:, None], seq_lens)), softmax_scale=576**-0.55, latent_dim=512
    )
    assert np.abs(got[0] - out).max() < 2.0**-4 * np.abs(rows.astype(jnp.float32)).max()


@pytest.mark.parametrize("heads", [5, 60])
@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_pages_outside_the_cache_hold_no_keys(dtype, heads):
    q, cache, table, seq_lens = operands(2, heads, 16, [200, 90], dtype)
    table = table.at[0, jnp.asarray([0, 7, 11])].set(jnp.asarray([-1, len(cache), 2**31 - 1]))
    table = table.at[1].set(10**6)
    arrays = q, cache, table, seq_lens
    check(arrays, decode(arrays), True)


@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize("length", [65, 1000, 2**31 - 1, -3])
def test_lengths_are_clamped_to_the_table(length, dtype):
    q, cache, table, _ = operands(2, 5, 16, [64, 64], dtype)
    arrays = q, cache, table, jnp.asarray([length, 64], jnp.int32)
    check(arrays, decode(arrays), True)


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_a_request_has_the_same_bits_alone_and_in_a_batch(dtype):
    """With num_splits; without it the cuts depend on all requests."""
    q, cache, table, seq_lens = operands(2, 40, 64, [700, 70, 0, 513], dtype)
    for num_splits in (1, 4):
        out, lse = decode((q, cache, table, seq_lens), num_splits=num_splits)
        for i in range(4):
            one = decode((q[i : i + 1], cache, table[i : i + 1], seq_lens[i : i + 1]), num_splits=num_splits)
            np.testing.assert_array_equal(one[0][0], out[i])
            np.testing.assert_array_equal(one[1][0], lse[i])


@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize(
    "heads,lengths",
    [
        pytest.param(70, [192] * 12, id="whole requests, four a block"),
        pytest.param(16, [1 + 37 * i % 300 for i in range(40)], id="more than a warp has lanes"),
        pytest.param(1, [i % 4 * 5 for i in range(1100)], id="more than threads", marks=pytest.mark.slow),
    ],
)
def test_a_block_takes_many_pieces(heads, lengths, dtype, simulator):
    """Of whole requests and of parts; and each request has the bits that it has alone."""
    simulator.configure(multiprocessors=6)
    arrays = operands(1, heads, 64, lengths, dtype)
    check(arrays, decode(arrays), True)
    q, cache, table, seq_lens = arrays
    out, lse = decode(arrays, num_splits=1)
    for i in range(3, len(lengths), max(4, len(lengths) // 3)):
        one = decode((q[i : i + 1], cache, table[i : i + 1], seq_lens[i : i + 1]), num_splits=1)
        np.testing.assert_array_equal(one[0][0], out[i])
        np.testing.assert_array_equal(one[1][0], lse[i])


@pytest.mark.parametrize("heads", [3, 70])
def test_requests_are_dealt_so_that_none_is_cut(heads, simulator):
    """Long and short ones that fill equal stretches in some order, not in the one in which they come. A GPU of other
    size than an H100 may cut them, and must only be right."""
    simulator.configure(multiprocessors=6)
    stretches = (6 if HOPPER_IMPLEMENTATION == "sim" else 132) // -(-heads // 64)
    long = 4 + np.arange(stretches) % 3
    blocks = np.random.default_rng(0).permutation(np.concatenate([long, 7 - long]))
    arrays = operands(1, heads, 64, [int(n) for n in blocks * 64 - 5])
    got = decode(arrays)
    check(arrays, got, True)
    if HOPPER_IMPLEMENTATION == "sim":
        for dealt, whole in zip(got, decode(arrays, num_splits=1), strict=True):
            np.testing.assert_array_equal(dealt, whole)


MANY = [(400, [], 7), (448, [40] * 7, 7), (449, [40] * 7, 7), (1100, [150], 20)]


@pytest.mark.parametrize("many,long,multiprocessors", MANY, ids=["whole", "most dealt", "one more", "too many"])
def test_more_requests_than_a_block_has_threads(many, long, multiprocessors, simulator):
    """`long`: blocks of keys. 64 requests are dealt to each stretch, and 1024 in all: with more they are cut."""
    simulator.configure(multiprocessors=multiprocessors)
    arrays = operands(1, 3, 16, [many % 64 + 1] * (many - len(long)) + [blocks * 64 for blocks in long])
    got = decode(arrays)
    check(arrays, got, True)
    if HOPPER_IMPLEMENTATION == "sim":
        assert all(map(np.array_equal, got, decode(arrays, num_splits=1))) == (many < 449)


@pytest.mark.skipif(HOPPER_IMPLEMENTATION != "sim", reason="a GPU has the multiprocessors that it has")
@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize(
    "queries,lengths,multiprocessors",
    [(1, [900, 0, 64, 65], 1), (1, [900, 0, 64, 65], 3), (1, [900, 0, 64, 65], 132), (3, [70, 0], 6), (7, [70, 0], 6)],
    ids=str,
)
def test_work_is_shared_by_any_number_of_multiprocessors(queries, lengths, multiprocessors, dtype, simulator):
    """Also by some of them, four groups of rows by six; and of eight groups more than one by each."""
    arrays = operands(queries, 70, 64, lengths, dtype)
    simulator.configure(multiprocessors=multiprocessors)
    check(arrays, decode(arrays), True)


def test_large_logits_neither_overflow_nor_vanish():
    q, cache, table, seq_lens = operands(1, 5, 16, [600, 33])
    arrays = (q * 64, cache, table, seq_lens)
    got = decode(arrays)
    assert np.isfinite(got[0]).all() and np.isfinite(got[1]).all()
    check(arrays, got, True)


@pytest.mark.parametrize("num_splits", [1, 18])  # more parts than are merged at once
@pytest.mark.parametrize("slope", [0.25, 0.02, -0.25])
@pytest.mark.parametrize("dtype", [BF16, F16, FP8])
def test_logits_that_grow_from_block_to_block(dtype, slope, num_splits):
    """By so much that what was summed before must be multiplied, by so little that it need not, and falling; in a run
    of blocks, and from part to part."""
    q, cache, table, seq_lens = operands(1, 5, 64, [1090, 33], dtype)  # the steepest ends at 272, exact in bfloat16
    tokens = jnp.arange(table.shape[1] * 64).reshape(1, -1, 64)
    rows = numbers(cache).at[table, :, 0].set((slope * tokens).astype(numbers(cache).dtype))
    cache = kv_cache.pack(rows) if dtype == FP8 else rows
    arrays = q.at[..., 0].set(32), cache, table, seq_lens
    check(arrays, decode(arrays, num_splits=num_splits), True)


def test_what_the_kernel_refuses():
    q, cache, table, seq_lens = operands(1, 2, 16, [20])
    packed = kv_cache.pack(cache)
    call = functools.partial(mla_decode, softmax_scale=1.0, implementation=HOPPER_IMPLEMENTATION)
    for arrays, kwargs, why in (
        ((q, cache.reshape(-1, 8, 576), table, seq_lens), {}, "a multiple of 16 rows"),
        ((q, cache, table, seq_lens), {"latent_dim": 500}, "d must be 576 and latent_dim 512, got 576 and 500"),
        ((q.astype(jnp.float32), cache, table, seq_lens), {}, "q and cache must both be bfloat16 or both float16"),
        ((q.astype(F16), cache, table, seq_lens), {}, "got float16 and bfloat16"),
        ((q.astype(F16), packed, table, seq_lens), {}, "the cache packed and q bfloat16, got float16 and uint8"),
        ((q, packed[:0], table, seq_lens), {}, "the cache must have pages"),
    ):
        with pytest.raises(NotImplementedError, match=f"mla_decode: .* cannot run this call: .*{why}"):
            jax.eval_shape(functools.partial(call, **kwargs), *arrays)


# ---- prefill ----

# Tokens, heads, width of keys, causal: less than a tile of queries, a block of keys that is not full, several blocks.
PREFILLS = [(1, 1, 192, True), (130, 2, 192, True), (256, 3, 128, False), (300, 1, 192, False), (520, 2, 128, True)]


def prefill(arrays, dk, **kwargs):
    out, lse = mla_prefill(*arrays, softmax_scale=dk**-0.5, implementation=HOPPER_IMPLEMENTATION, **kwargs)
    return np.asarray(out), np.asarray(lse)


def check_prefill(arrays, got, sees, dk):
    """Each weight is rounded once to the numbers' type, and each result."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in arrays)
    rest = (sees, dk**-0.5, *cotangents(q, v))
    out, lse, *_ = prefill_by_hand(q, k, v, *rest)
    magnitude, *_ = prefill_by_hand(q, k, np.abs(v), *rest)
    rounding = 2.0**-8 if arrays[0].dtype == BF16 else 2.0**-11
    assert (np.abs(got[0].astype(np.float64) - out) <= rounding * (magnitude + np.abs(out)) + 1e-6).all()
    flash_mla_accepts(got[0], out, np.inf, 0, 5e-6)
    flash_mla_accepts(got[1], lse, 2e-6, 1e-5, 1e-9)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("tokens,heads,dk,causal", PREFILLS, ids=str)
def test_prefill(tokens, heads, dk, causal, dtype, simulator):
    arrays = sequences(tokens, 2, tokens, heads, dk, 128, dtype)
    got = prefill(arrays, dk, causal=causal)
    sees = np.tri(tokens, dtype=bool) if causal else np.ones((tokens, tokens), bool)
    check_prefill(arrays, got, np.broadcast_to(sees, (2, tokens, tokens)), dk)
    if HOPPER_IMPLEMENTATION == "sim":
        for seed in range(1, 8):
            simulator.configure(seed=seed)
            for again, first in zip(prefill(arrays, dk, causal=causal), got, strict=True):
                np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("causal", [True, False])
def test_prefill_of_padded_sequences(causal):
    """What lies past the end may be anything."""
    t, lengths = 290, np.array([290, 131, 0, 1, 128])
    inside = np.arange(t) < lengths[:, None]
    arrays = sequences(3, 5, t, 3, 192, 128, BF16)  # an odd number of heads, taken two at a time
    sees = inside[:, None, :] & inside[:, :, None] & (np.tri(t, dtype=bool) | (not causal))
    seq_lens = jnp.asarray(lengths, jnp.int32)
    got = prefill(arrays, 192, causal=causal, seq_lens=seq_lens)
    check_prefill(arrays, got, sees, 192)
    poisoned = [jnp.where(inside[..., None, None], x, jnp.nan) for x in arrays]
    for again, first in zip(prefill(poisoned, 192, causal=causal, seq_lens=seq_lens), got, strict=True):
        np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("causal", [True, False])
def test_prefill_of_packed_sequences(causal):
    """Several in a tile, one over many, an empty one; tokens that belong to none."""
    t, ends = 600, [3, 40, 40, 100, 480, 597]
    q, k, v = sequences(4, 1, t, 2, 192, 128, BF16)
    sequence = np.searchsorted(ends, np.arange(t), side="right") - 1
    sequence = np.where(sequence < len(ends) - 1, sequence, -1)
    sees = (sequence[:, None] == sequence) & (sequence >= 0) & (np.tri(t, dtype=bool) | (not causal))
    outside = jnp.asarray(sequence < 0)[:, None, None]
    packed = [jnp.where(outside, jnp.inf, x[0]) for x in (q, k, v)]
    out, lse = prefill(packed, 192, causal=causal, cu_seqlens=jnp.asarray(ends, jnp.int32))
    assert not out[sequence < 0].any()
    check_prefill((q, k, v), (out[None], lse[None]), sees[None], 192)


def test_prefill_of_large_logits_neither_overflows_nor_vanishes():
    for dtype in (BF16, F16):
        q, k, v = sequences(6, 1, 300, 2, 128, 128, dtype)
        arrays = q * dtype(20), k, v
        check_prefill(arrays, prefill(arrays, 128, causal=False), np.ones((1, 300, 300), bool), 128)


@pytest.mark.skipif(HOPPER_IMPLEMENTATION == "sim", reason="for a GPU's number of multiprocessors")
def test_prefill_of_more_tiles_than_multiprocessors():
    arrays = sequences(8, 2, 600, 45, 192, 128, BF16)
    check_prefill(arrays, prefill(arrays, 192), np.broadcast_to(np.tri(600, dtype=bool), (2, 600, 600)), 192)


def test_prefill_of_nothing():
    for b, h in ((0, 2), (2, 0)):
        out, lse = prefill(sequences(0, b, 130, h, 192, 128, BF16), 192)
        assert out.shape == (b, 130, h, 128) and lse.shape == (b, 130, h)


def test_a_value_that_is_nan_reaches_who_sees_it():
    """And neither other sequences nor what is no token."""
    q, k, v = sequences(9, 3, 200, 2, 192, 128, BF16)
    seq_lens = jnp.asarray([200, 150, 200], jnp.int32)
    expected = prefill((q, k, v), 192, seq_lens=seq_lens)
    out, lse = prefill((q, k, v.at[1, 70].set(jnp.nan)), 192, seq_lens=seq_lens)
    assert np.isnan(out[1, 70:150]).all() and not out[1, 150:].any()
    np.testing.assert_array_equal(lse, expected[1])
    np.testing.assert_array_equal(out[[0, 2]], expected[0][[0, 2]])


def gradients(arrays, cotangents, dk, implementation=HOPPER_IMPLEMENTATION, **kwargs):
    call = functools.partial(mla_prefill, softmax_scale=dk**-0.5, implementation=implementation, **kwargs)
    return [np.asarray(x) for x in jax.vjp(call, *arrays)[1](tuple(map(jnp.asarray, cotangents)))]


def check_gradients(arrays, cotangents, got, sees, dk):
    """Weights are rounded once, derivatives of logits once, out, which they are from, was, and each result is."""
    q, k, v, d_out = (np.asarray(x).astype(np.float64) for x in (*arrays, cotangents[0]))
    out, lse, *expected = prefill_by_hand(q, k, v, sees, dk**-0.5, d_out, cotangents[1])
    logits = np.where(sees[:, None], np.einsum("bqhd,bkhd->bhqk", q, k) * dk**-0.5, -np.inf)
    weights = np.exp(logits - np.swapaxes(np.maximum(lse, -1e300), 1, 2)[..., None])
    delta = (np.abs(out * d_out).sum(axis=-1) + np.abs(cotangents[1])).swapaxes(1, 2)[..., None]
    d_logits = weights * (np.abs(np.einsum("bqhd,bkhd->bhqk", d_out, v)) + delta) * dk**-0.5
    magnitudes = (
        2 * np.einsum("bhqk,bkhd->bqhd", d_logits, np.abs(k)),
        2 * np.einsum("bhqk,bqhd->bkhd", d_logits, np.abs(q)),
        np.einsum("bhqk,bqhd->bkhd", weights, np.abs(d_out)),
    )
    for g, e, magnitude in zip(got, expected, magnitudes, strict=True):
        assert g.dtype == BF16
        assert (np.abs(g.astype(np.float64) - e) <= 2.0**-8 * (magnitude + np.abs(e)) + 1e-6).all()
        if (e != 0).any():
            flash_mla_accepts(g, e, np.inf, 0, 2e-5)


@pytest.mark.parametrize("tokens,heads,dk,causal", PREFILLS, ids=str)
def test_prefill_gradients(tokens, heads, dk, causal, simulator):
    arrays = sequences(tokens, 2, tokens, heads, dk, 128, BF16)
    d = cotangents(arrays[0], arrays[2])
    got = gradients(arrays, d, dk, causal=causal)
    sees = np.tri(tokens, dtype=bool) if causal else np.ones((tokens, tokens), bool)
    check_gradients(arrays, d, got, np.broadcast_to(sees, (2, tokens, tokens)), dk)
    for seed in range(1, 8):
        simulator.configure(seed=seed)
        for again, first in zip(gradients(arrays, d, dk, causal=causal), got, strict=True):
            np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("causal", [True, False])
def test_prefill_gradients_of_padded_sequences(causal):
    """What lies past the end, of operands and of cotangents, may be anything."""
    t, lengths = 290, np.array([290, 131, 0, 1, 128])
    inside = np.arange(t) < lengths[:, None]
    arrays = sequences(3, 5, t, 3, 192, 128, BF16)
    d = cotangents(arrays[0], arrays[2])
    sees = inside[:, None, :] & inside[:, :, None] & (np.tri(t, dtype=bool) | (not causal))
    kwargs = {"causal": causal, "seq_lens": jnp.asarray(lengths, jnp.int32)}
    got = gradients(arrays, d, 192, **kwargs)
    check_gradients(arrays, [np.where(inside.reshape(5, t, *[1] * (x.ndim - 2)), x, 0) for x in d], got, sees, 192)
    q, k, v, *d = (jnp.where(inside.reshape(5, t, *[1] * (x.ndim - 2)), x, jnp.nan) for x in (*arrays, *d))
    for again, first in zip(gradients((q, k, v), d, 192, **kwargs), got, strict=True):
        np.testing.assert_array_equal(again, first)
        assert not again[~inside].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("t, ends", [(600, [3, 40, 40, 100, 480, 597]), (600, [70, 333]), (2200, [2040, 2140, 2199])])
def test_prefill_gradients_of_packed_sequences(t, ends, causal):
    arrays = sequences(4, 1, t, 1 if t > 600 else 2, 192, 128, BF16)
    d = cotangents(arrays[0], arrays[2])
    sequence = np.searchsorted(ends, np.arange(t), side="right") - 1
    sequence = np.where(sequence < len(ends) - 1, sequence, -1)
    sees = (sequence[:, None] == sequence) & (sequence >= 0) & (np.tri(t, dtype=bool) | (not causal))
    outside = jnp.asarray(sequence < 0)[:, None, None]
    packed = [jnp.where(outside, jnp.inf, x[0]) for x in arrays]
    got = gradients(packed, [x[0] for x in d], 192, causal=causal, cu_seqlens=jnp.asarray(ends, jnp.int32))
    d = [np.where((sequence < 0).reshape(1, t, *[1] * (x.ndim - 2)), 0, x) for x in d]
    check_gradients(arrays, d, [x[None] for x in got], sees[None], 192)


def test_prefill_gradients_of_large_logits_and_of_lse_alone():
    q, k, v = sequences(6, 1, 300, 2, 128, 128, BF16)
    arrays = q * BF16(20), k, v
    d_out, d_lse = cotangents(q, v)
    for d in ((d_out, d_lse), (np.zeros_like(d_out), d_lse)):
        check_gradients(arrays, d, gradients(arrays, d, 128, causal=False), np.ones((1, 300, 300), bool), 128)


@pytest.mark.skipif(HOPPER_IMPLEMENTATION == "sim", reason="for a GPU's number of multiprocessors")
def test_prefill_gradients_of_more_tiles_than_multiprocessors():
    arrays = sequences(8, 2, 600, 45, 192, 128, BF16)
    d = cotangents(arrays[0], arrays[2])
    sees = np.broadcast_to(np.tri(600, dtype=bool), (2, 600, 600))
    got = gradients(arrays, d, 192)
    check_gradients(arrays, d, got, sees, 192)
    for again, first in zip(gradients(arrays, d, 192), got, strict=True):
        np.testing.assert_array_equal(again, first)


def test_prefill_gradients_of_any_spans():
    """Beyond both ends, and with keys after the query; six tokens that see nothing and that nobody sees."""
    t = 200
    q, k, v = sequences(5, 1, t, 2, 128, 128, BF16)
    rng, token = np.random.default_rng(5), np.arange(t)
    first, last = rng.integers(-250, 150, (1, t)), rng.integers(100, 400, (1, t))
    first, last = np.minimum(first, token), np.maximum(last, token + 1)  # each sees itself
    first, last = np.where(token < 66, first, np.maximum(first, 66)), np.where(token < 66, np.minimum(last, 60), last)
    first[:, 60:66] = last[:, 60:66] = 65
    sees = (first[..., None] <= token) & (token < last[..., None])
    d = cotangents(q, v)
    out, lse, *expected = prefill_by_hand(q, k, v, sees, 0.1, *d)
    spans = first.astype(np.int32), last.astype(np.int32)
    arrays = (q, k, v, out.astype(BF16), lse.astype(np.float32), *d, *spans)
    got = _ffi.call(MLA_PREFILL_BACKWARD, *arrays, implementation=HOPPER_IMPLEMENTATION, softmax_scale=0.1)
    for g, e in zip(got, expected, strict=True):
        flash_mla_accepts(g, e, 1e-2 * np.abs(e).max(), 1 / 64, 2e-5)


@pytest.mark.parametrize("scale", [-0.1, 0.0])
def test_prefill_gradients_of_any_scale(scale):
    arrays = sequences(5, 1, 70, 2, 192, 128, BF16)
    d = cotangents(arrays[0], arrays[2])
    expected = prefill_by_hand(*arrays, np.tri(70, dtype=bool)[None], scale, *d)[2:]
    call = functools.partial(mla_prefill, softmax_scale=scale, implementation=HOPPER_IMPLEMENTATION)
    for got, e in zip(jax.vjp(call, *arrays)[1](tuple(map(jnp.asarray, d))), expected, strict=True):
        flash_mla_accepts(got, e, 1e-2 * np.abs(e).max(), 1 / 64, 2e-5)


def test_prefill_gradients_of_a_nan():
    """It reaches nothing that is no token, and no other sequence."""
    q, k, v = sequences(9, 2, 200, 2, 192, 128, BF16)
    d_out, d_lse = map(jnp.asarray, cotangents(q, v))
    q, k, d_out = (x.at[0, 70].set(jnp.nan) for x in (q, k, d_out))
    seq_lens = jnp.asarray([150, 200], jnp.int32)
    for x in gradients((q, k, v), (d_out, d_lse), 192, seq_lens=seq_lens):
        assert np.isnan(x[0, 70]).all() and not x[0, 150:].any() and np.isfinite(x[1].astype(np.float32)).all()


def test_prefill_gradients_of_nothing():
    for b, h in ((0, 2), (2, 0)):
        arrays = sequences(0, b, 130, h, 192, 128, BF16)
        for got, x in zip(gradients(arrays, cotangents(arrays[0], arrays[2]), 192), arrays, strict=True):
            assert got.shape == x.shape


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_prefill_gradients_by_environment(dtype, monkeypatch):
    """Of float16 they are the reference's, of bfloat16 the kernels'."""
    monkeypatch.setenv("JAXKERN_IMPLEMENTATION", HOPPER_IMPLEMENTATION)
    arrays = sequences(7, 1, 200, 2, 192, 128, dtype)
    d = cotangents(arrays[0], arrays[2])
    prefix = "jaxkern.sim." if HOPPER_IMPLEMENTATION == "sim" else "jaxkern."
    program = jax.jit(lambda *a: jax.vjp(functools.partial(mla_prefill, softmax_scale=0.1), *a[:3])[1](a[3:]))
    assert (f"{prefix}mla_prefill_backward.v" in program.lower(*arrays, *d).as_text()) == (dtype == BF16)
    expected = prefill_by_hand(*arrays, np.tri(200, dtype=bool)[None], 192**-0.5, *d)[2:]
    for got, e in zip(gradients(arrays, d, 192, implementation=None), expected, strict=True):
        assert got.dtype == dtype
        flash_mla_accepts(got, e, 1e-2 * np.abs(e).max(), 1 / 64, 2e-5)


def test_prefill_refuses_other_widths_and_types():
    q, k, v = sequences(0, 1, 8, 1, 64, 128, BF16)
    with pytest.raises(NotImplementedError, match="mla_prefill: .* dk must be 128 or 192 and dv 128, got 64 and 128"):
        prefill((q, k, v), 64)
    q, k, v = sequences(0, 1, 8, 1, 192, 128)
    with pytest.raises(NotImplementedError, match="mla_prefill: .* must be all bfloat16 or all float16, got float32"):
        prefill((q, k, v), 192)
