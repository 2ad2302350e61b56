"""Paged caches against loops."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxkern import kv_cache


def operands(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    cache = rng.standard_normal((7, 4, 3)).astype(dtype)
    rows = rng.standard_normal((2, 3, 3)).astype(np.float32)
    return cache, rows, np.array([[5, 2, 0], [6, 1, 3]], np.int32)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_append_writes_where_the_table_says(dtype):
    cache, rows, table = operands(dtype)
    positions = np.array([[0, 5, 11], [3, 4, 8]], np.int32)
    expected = cache.copy()
    for request in range(2):
        for row, position in zip(rows[request], positions[request], strict=True):
            expected[table[request, position // 4], position % 4] = row.astype(dtype)
    got = jax.jit(kv_cache.append, donate_argnums=0)(jnp.array(cache), rows, table, positions)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)


def test_append_drops_what_has_no_slot():
    cache, rows, table = operands()
    table[0, 1], table[1, 0], table[1, 1] = -1, 7, 2**31 - 1
    positions = np.array([[-1, 12, 4], [0, 7, 2**31 - 1]], np.int32)
    np.testing.assert_array_equal(kv_cache.append(cache, rows, table, positions), cache)
    positions[0, 0] = -(2**31)
    positions[0, 1] = 11
    expected = cache.copy()
    expected[table[0, 2], 3] = rows[0, 1]
    np.testing.assert_array_equal(kv_cache.append(cache, rows, table, positions), expected)


def test_append_then_gather_is_the_sequence():
    cache, _, table = operands()
    tokens = np.random.default_rng(1).standard_normal((2, 12, 3)).astype(np.float32)
    for first, last in ((0, 5), (5, 6), (6, 12)):
        positions = np.broadcast_to(np.arange(first, last, dtype=np.int32), (2, last - first))
        cache = kv_cache.append(cache, tokens[:, first:last], table, positions)
    np.testing.assert_array_equal(kv_cache.gather(cache, table), tokens)


def test_append_writes_in_place_when_donated():
    cache, rows, table = operands()
    positions = np.zeros((2, 3), np.int32)
    shapes = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in (np.zeros((500, 64, 3), np.float32), rows)]
    compiled = jax.jit(kv_cache.append, donate_argnums=0).lower(*shapes, table, positions).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 500 * 64 * 3 * 4
    assert memory.temp_size_in_bytes < 10_000


def test_gather_is_zero_outside_the_cache():
    cache, _, table = operands()
    table[0, 1], table[1, 2] = -1, 7
    got = np.asarray(kv_cache.gather(cache, table)).reshape(2, 3, 4, 3)
    expected = cache[np.clip(table, 0, 6)]
    expected[0, 1] = expected[1, 2] = 0
    np.testing.assert_array_equal(got, expected)


def test_errors():
    cache, rows, table = operands()
    positions = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"kv_cache.append: rows must be .* \[b, s, d=3\], got float32\[2,3,2\]"):
        kv_cache.append(cache, rows[..., 1:], table, positions)
    with pytest.raises(TypeError, match=r"kv_cache.append: positions must be int32 \[b=2, s=3\], got float32\[2,3\]"):
        kv_cache.append(cache, rows, table, positions.astype(np.float32))
    with pytest.raises(TypeError, match=r"kv_cache.gather: block_table must be int32 \[b, pages\], got float32"):
        kv_cache.gather(cache, table.astype(np.float32))
