"""The Hopper kernels of MLA decoding: against loops in float64, in any order of what runs at the same time."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from contract import HOPPER_IMPLEMENTATION
from test_mla import decode_by_hand, flash_mla_accepts, paged

from jaxkern import mla_decode

pytestmark = pytest.mark.skipif(HOPPER_IMPLEMENTATION == "none", reason="no implementation to test")

BF16 = ml_dtypes.bfloat16
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


def operands(queries, heads, page, lengths):
    """Of FlashMLA's own sizes: keys of a tenth."""
    arrays = paged(sum(lengths), len(lengths), queries, heads, page, 576, lengths, q_dtype=BF16, dtype=BF16)
    q, cache, table, seq_lens = map(jnp.asarray, arrays)
    return [q, cache / 5, table, seq_lens]


def decode(arrays, **kwargs):
    out, lse = mla_decode(*arrays, softmax_scale=576**-0.55, implementation=HOPPER_IMPLEMENTATION, **kwargs)
    return np.asarray(out).astype(np.float32), np.asarray(lse)


def check(arrays, got, causal):
    host = [np.asarray(x) for x in arrays]
    out, lse = decode_by_hand(*host, softmax_scale=576**-0.55, latent_dim=512, causal=causal)
    flash_mla_accepts(got[0], out, 8e-4, 2.01 / 128, 5e-6)
    flash_mla_accepts(got[1], lse, 1e-6, 8.01 / 65536, 1e-7)


@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries,heads,page,lengths", CASES, ids=str)
def test_decode(queries, heads, page, lengths, causal, num_splits, simulator):
    arrays = operands(queries, heads, page, lengths)
    got = decode(arrays, causal=causal, num_splits=num_splits)
    check(arrays, got, causal)
    if HOPPER_IMPLEMENTATION == "sim":
        for seed in range(1, 8):
            simulator.configure(seed=seed)
            for again, first in zip(decode(arrays, causal=causal, num_splits=num_splits), got, strict=True):
                np.testing.assert_array_equal(again, first)


def test_pages_outside_the_cache_hold_no_keys():
    q, cache, table, seq_lens = operands(2, 5, 16, [200, 90])
    table = table.at[0, jnp.asarray([0, 7, 11])].set(jnp.asarray([-1, len(cache), 2**31 - 1]))
    table = table.at[1].set(10**6)
    arrays = q, cache, table, seq_lens
    check(arrays, decode(arrays), True)


@pytest.mark.parametrize("length", [65, 1000, 2**31 - 1, -3])
def test_lengths_are_clamped_to_the_table(length):
    q, cache, table, _ = operands(2, 5, 16, [64, 64])
    arrays = q, cache, table, jnp.asarray([length, 64], jnp.int32)
    check(arrays, decode(arrays), True)


def test_a_request_has_the_same_bits_alone_and_in_a_batch():
    """With num_splits; without it the cuts depend on all requests."""
    q, cache, table, seq_lens = operands(2, 40, 64, [700, 70, 0, 513])
    for num_splits in (1, 4):
        out, lse = decode((q, cache, table, seq_lens), num_splits=num_splits)
        for i in range(4):
            one = decode((q[i : i + 1], cache, table[i : i + 1], seq_lens[i : i + 1]), num_splits=num_splits)
            np.testing.assert_array_equal(one[0][0], out[i])
            np.testing.assert_array_equal(one[1][0], lse[i])


@pytest.mark.skipif(HOPPER_IMPLEMENTATION != "sim", reason="a GPU has the multiprocessors that it has")
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_work_is_shared_by_any_number_of_multiprocessors(multiprocessors, simulator):
    arrays = operands(1, 70, 64, [900, 0, 64, 65])
    simulator.configure(multiprocessors=multiprocessors)
    check(arrays, decode(arrays), True)


def test_large_logits_neither_overflow_nor_vanish():
    q, cache, table, seq_lens = operands(1, 5, 16, [600, 33])
    arrays = (q * 64, cache, table, seq_lens)
    got = decode(arrays)
    assert np.isfinite(got[0]).all() and np.isfinite(got[1]).all()
    check(arrays, got, True)


def test_what_the_kernel_refuses():
    q, cache, table, seq_lens = operands(1, 2, 16, [20])
    call = functools.partial(mla_decode, softmax_scale=1.0, implementation=HOPPER_IMPLEMENTATION)
    for arrays, kwargs, why in (
        ((q, cache.reshape(-1, 8, 576), table, seq_lens), {}, "a multiple of 16 rows"),
        ((q, cache, table, seq_lens), {"latent_dim": 500}, "d must be 576 and latent_dim 512, got 576 and 500"),
        ((q.astype(jnp.float32), cache, table, seq_lens), {}, "q and cache must be bfloat16"),
    ):
        with pytest.raises(NotImplementedError, match=f"mla_decode: .* cannot run this call: .*{why}"):
            jax.eval_shape(functools.partial(call, **kwargs), *arrays)
