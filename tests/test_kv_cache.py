"""Paged caches against loops: rows packed as FP8, where `append` writes, and that it writes in place."""

import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from contract import HOPPER_IMPLEMENTATION
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_contract import pretend

import jaxkern
from jaxkern import kv_cache

E4M3, BFLOAT16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
NUMBERS = [np.float32, BFLOAT16, np.float16]
WIDTHS = [(512, 64), (132, 3), (4, 0), (256, 8)]  # latent and rope numbers of a row
IMPLEMENTATIONS = ["cpu", "xla", *[HOPPER_IMPLEMENTATION] * (HOPPER_IMPLEMENTATION != "none")]


def operands(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    cache = rng.standard_normal((7, 4, 3)).astype(dtype)
    rows = rng.standard_normal((2, 3, 3)).astype(np.float32)
    return cache, rows, np.array([[5, 2, 0], [6, 1, 3]], np.int32)


def random_rows(*shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.normal(0, 2, shape))).astype(dtype)


def pack_loop(row, latent):
    """One row, byte by byte."""
    row = row.astype(np.float32)
    values, scales = b"", b""
    for begin in range(0, latent, 128):
        block = row[begin : min(begin + 128, latent)]
        mantissa, exponent = np.frexp(np.maximum(np.abs(block).max(), np.float32(1e-4)) / np.float32(448))
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))  # a power of two, not below
        values += (block / scale).astype(E4M3).tobytes()
        scales += struct.pack("<f", scale)
    return np.frombuffer(values + scales + row[latent:].astype(BFLOAT16).tobytes(), np.uint8)


def append_loop(cache, rows, table, positions, latent=None):
    cache, page = cache.copy(), cache.shape[1]
    for i, request in enumerate(positions):
        for row, position in zip(rows[i], request, strict=True):
            if 0 <= position < table.shape[1] * page and 0 <= (entry := table[i, position // page]) < len(cache):
                cache[entry, position % page] = row.astype(cache.dtype) if latent is None else pack_loop(row, latent)
    return cache


# Packed rows.


@pytest.mark.parametrize("latent, rope", WIDTHS)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_pack_to_the_bit(dtype, latent, rope):
    rows = random_rows(3, 5, latent + rope, dtype=dtype)
    rows[0, 0], rows[0, 1] = 0, -rows[0, 1]
    rows[1, 2, : latent // 2] *= np.float32(1e-6).astype(dtype)
    got = jax.jit(lambda x: kv_cache.pack(x, latent_dim=latent))(rows)
    expected = np.stack([pack_loop(row, latent) for row in rows.reshape(15, -1)]).reshape(3, 5, -1)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.uint8 and got.shape[-1] == kv_cache.row_bytes(latent, rope)


def test_the_row_of_flashmla():
    assert kv_cache.row_bytes() == 656
    row = np.zeros(576, np.float32)
    row[0], row[200], row[511], row[512], row[575] = 448, -896, 1, 1.5, -2
    packed = np.asarray(kv_cache.pack(row))
    assert packed[:512].view(E4M3)[[0, 200, 511]].tolist() == [448, -448, 256]
    np.testing.assert_array_equal(packed[512:528].view("<f4"), np.float32([1, 2, 2.0**-22, 2.0**-8]))
    assert packed[528:].view(BFLOAT16)[[0, 63]].tolist() == [1.5, -2]


@pytest.mark.parametrize("latent, rope", WIDTHS)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_unpack_to_the_bit(dtype, latent, rope):
    packed = np.asarray(kv_cache.pack(random_rows(9, latent + rope), latent_dim=latent))
    got = jax.jit(lambda x: kv_cache.unpack(x, latent_dim=latent, rope_dim=rope, dtype=dtype))(packed)
    assert got.dtype == dtype
    for row, bytes_ in zip(np.asarray(got), packed, strict=True):
        values, scales = bytes_[:latent].view(E4M3).astype(np.float32), bytes_[latent:][: 4 * -(-latent // 128)]
        expected = (values * np.repeat(scales.copy().view("<f4"), 128)[:latent]).astype(dtype)
        np.testing.assert_array_equal(row[:latent], expected)
        np.testing.assert_array_equal(row[latent:], bytes_[len(bytes_) - 2 * rope :].view(BFLOAT16).astype(dtype))


def test_all_codes_unpack():
    packed = np.asarray(kv_cache.pack(np.full(256, 448 * 2.0**-8, np.float32), latent_dim=256)).copy()
    packed[:256] = np.arange(256)
    got = kv_cache.unpack(packed, latent_dim=256, rope_dim=0, dtype=np.float32)
    np.testing.assert_array_equal(got, np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32) * 2.0**-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_becomes_nan(bad, implementation):
    rows = random_rows(1, 2, 576)
    clean = np.array(kv_cache.pack(rows))
    rows[0, 1, 130], rows[0, 1, 570] = bad, bad
    packed = np.asarray(kv_cache.pack(rows))
    appended = kv_cache.append(
        np.zeros((1, 2, 656), np.uint8),
        rows,
        np.zeros((1, 1), np.int32),
        np.arange(2, dtype=np.int32)[None],
        implementation=implementation,
    )
    got = np.asarray(kv_cache.unpack(packed, dtype=np.float32))
    np.testing.assert_array_equal(kv_cache.unpack(appended, dtype=np.float32), got)
    assert (packed[0, 1, 128:256] == 0x7F).all() and (np.asarray(appended)[0, 1, 128:256] == 0x7F).all()
    assert np.isnan(got[0, 1, 128:256]).all() and np.isnan(packed[0, 1, 516:520].copy().view("<f4"))
    np.testing.assert_array_equal(got[0, 1, 570], np.float32(bad))
    clean[0, 1, 128:256], clean[0, 1, 516:520] = packed[0, 1, 128:256], packed[0, 1, 516:520]
    clean[0, 1, -12:-10] = packed[0, 1, -12:-10]
    np.testing.assert_array_equal(packed, clean)  # nothing else has changed


# Where rows go.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows_dtype", NUMBERS)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_append_writes_where_the_table_says(dtype, rows_dtype, implementation):
    cache, rows, table = operands(dtype)
    rows = rows.astype(rows_dtype)
    positions = np.array([[0, 5, 11], [3, 4, 8]], np.int32)
    expected = append_loop(cache, rows, table, positions)
    run = jax.jit(lambda *a: kv_cache.append(*a, implementation=implementation), donate_argnums=0)
    got = run(jnp.array(cache), rows, table, positions)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("latent, rope", WIDTHS)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_append_packs_on_the_way(dtype, latent, rope, implementation):
    rows = random_rows(2, 3, latent + rope, dtype=dtype)
    cache = np.random.default_rng(1).integers(0, 256, (7, 4, kv_cache.row_bytes(latent, rope)), np.uint8)
    table, positions = operands()[2], np.array([[0, 5, 12], [3, 4, 8]], np.int32)

    def append():
        return kv_cache.append(cache, rows, table, positions, latent_dim=latent, implementation=implementation)

    if implementation == HOPPER_IMPLEMENTATION and cache.shape[2] % 4:
        with pytest.raises(NotImplementedError, match=r"packed rows must have a multiple of 4 bytes, got uint8\[7,4,"):
            append()
        return
    np.testing.assert_array_equal(append(), append_loop(cache, rows, table, positions, latent))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_append_drops_what_has_no_slot(implementation):
    def append(*args):
        return kv_cache.append(*args, implementation=implementation)

    cache, rows, table = operands()
    table[0, 1], table[1, 0], table[1, 1] = -1, 7, 2**31 - 1
    positions = np.array([[-1, 12, 4], [0, 7, 2**31 - 1]], np.int32)
    np.testing.assert_array_equal(append(cache, rows, table, positions), cache)
    positions[0, 0] = -(2**31)
    positions[0, 1] = 11
    expected = cache.copy()
    expected[table[0, 2], 3] = rows[0, 1]
    np.testing.assert_array_equal(append(cache, rows, table, positions), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [20, 600])
def test_of_two_rows_for_one_slot_the_last_one_wins(tokens, packed, implementation):
    """Enough rows for several threads, on few slots, with pages that requests share."""
    rng = np.random.default_rng(0)
    rows = random_rows(4, tokens, 576)
    table = np.array([[1, 9, 4], [4, -1, 6], [2, 2, 1], [0, 5, 12]], np.int32)
    positions = rng.integers(-8, 24 + 8, (4, tokens)).astype(np.int32)
    cache = np.zeros((12, 8, 656), np.uint8) if packed else np.zeros((12, 8, 576), np.float32)
    got = kv_cache.append(cache, rows, table, positions, implementation=implementation)
    np.testing.assert_array_equal(got, append_loop(cache, rows, table, positions, 512 if packed else None))


def test_a_long_prompt_in_order():
    """Several threads, every row a slot of its own."""
    rows = random_rows(3, 700, 576)
    table = np.random.default_rng(1).permutation(66).astype(np.int32).reshape(3, 22)
    positions = np.broadcast_to(np.arange(700, dtype=np.int32), (3, 700))
    cache = kv_cache.append(np.zeros((66, 32, 656), np.uint8), rows, table, positions)
    np.testing.assert_array_equal(kv_cache.gather(cache, table)[:, :700], kv_cache.pack(rows))
    plain = kv_cache.append(np.zeros((66, 32, 576), np.float32), rows, table, positions)
    np.testing.assert_array_equal(kv_cache.gather(plain, table)[:, :700], rows)


def test_append_then_gather_is_the_sequence():
    cache, _, table = operands()
    tokens = np.random.default_rng(1).standard_normal((2, 12, 3)).astype(np.float32)
    for first, last in ((0, 5), (5, 6), (6, 12)):
        positions = np.broadcast_to(np.arange(first, last, dtype=np.int32), (2, last - first))
        cache = kv_cache.append(cache, tokens[:, first:last], table, positions)
    np.testing.assert_array_equal(kv_cache.gather(cache, table), tokens)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("p, page, b, s, pages", [(0, 4, 2, 3, 2), (3, 4, 0, 3, 2), (3, 4, 2, 0, 2), (3, 4, 2, 3, 0)])
def test_zero_sizes(p, page, b, s, pages, implementation):
    cache = np.ones((p, page, 5), np.float32)
    table, positions = np.zeros((b, pages), np.int32), np.zeros((b, s), np.int32)
    run = jax.jit(lambda *a: kv_cache.append(*a, implementation=implementation))
    np.testing.assert_array_equal(run(cache, np.zeros((b, s, 5), np.float32), table, positions), cache)
    np.testing.assert_array_equal(kv_cache.gather(cache, table), np.full((b, pages * page, 5), float(p > 0)))


@pytest.mark.parametrize("dtype", [*NUMBERS, np.uint8])
def test_gather_is_zero_outside_the_cache(dtype):
    cache, _, table = operands()
    cache = (cache * 50).astype(dtype)
    table[0, 1], table[1, 2] = -1, 7
    got = np.asarray(kv_cache.gather(cache, table)).reshape(2, 3, 4, 3)
    expected = cache[np.clip(table, 0, 6)]
    expected[0, 1] = expected[1, 2] = 0
    np.testing.assert_array_equal(got, expected)


# In place.


def compiled(call, *shapes, donate=(0,)):
    shapes = [jax.ShapeDtypeStruct(*x) for x in shapes]
    return jax.jit(call, donate_argnums=donate).lower(*shapes).compile()


CACHES = {"bfloat16": ((500, 64, 576), jnp.bfloat16), "packed": ((500, 64, 656), jnp.uint8)}
REST = ((8, 2, 576), jnp.bfloat16), ((8, 4), jnp.int32), ((8, 2), jnp.int32)


def test_gather_of_sharded_pages():
    """Along Explicit mesh axes, outside shard_map: gathered first; the gradient is sharded as the pages are."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    cache, table = jnp.arange(4 * 16 * 8, dtype=jnp.float32).reshape(4, 16, 8), jnp.array([[3, 1], [0, -1]], jnp.int32)
    expected, gradient = jax.value_and_grad(lambda c: (kv_cache.gather(c, table) ** 2).sum())(cache)
    with jax.set_mesh(mesh):
        split = jax.device_put(cache, NamedSharding(mesh, P("x")))
        got, split_gradient = jax.value_and_grad(lambda c: (kv_cache.gather(c, table) ** 2).sum())(split)
    assert got == expected and jax.typeof(split_gradient).sharding.spec == P("x", None, None)
    np.testing.assert_array_equal(split_gradient, gradient)


@pytest.mark.parametrize("kind", CACHES)
def test_append_writes_in_place(kind):
    """A donated cache is updated where it lies, also as what a loop carries; XLA copies others."""
    shape, dtype = CACHES[kind]
    size = np.prod(shape) * np.dtype(dtype).itemsize

    def loop(cache, rows, table, positions):
        def body(cache, i):
            cache = kv_cache.append(cache, rows, table, positions + i)
            return cache, cache[0, 0, 0]

        return jax.lax.scan(body, cache, jnp.arange(3))

    for call in (kv_cache.append, loop):
        memory = compiled(call, CACHES[kind], *REST).memory_analysis()
        assert memory.alias_size_in_bytes == size and memory.temp_size_in_bytes < 10_000
    memory = compiled(kv_cache.append, CACHES[kind], *REST, donate=()).memory_analysis()
    assert memory.alias_size_in_bytes == 0 and memory.output_size_in_bytes == size
    assert memory.temp_size_in_bytes < 10_000
    text = compiled(kv_cache.append, CACHES[kind], *REST).as_text()
    assert "output_to_operand_aliasing={{}: (0, {})}" in text and "copy(" not in text


def test_a_decode_step_copies_no_cache():
    def step(cache, q, rows, table, positions):
        cache = kv_cache.append(cache, rows, table, positions)
        lengths = positions[:, -1] + 1
        return cache, jaxkern.mla_decode(q, cache, table, lengths, softmax_scale=0.1)

    memory = compiled(step, CACHES["bfloat16"], ((8, 2, 16, 576), jnp.bfloat16), *REST).memory_analysis()
    assert memory.alias_size_in_bytes == 500 * 64 * 576 * 2 and memory.temp_size_in_bytes < 10_000


def test_a_cache_that_is_not_donated_stays():
    cache, rows, table = operands()
    before, positions = jnp.array(cache), np.zeros((2, 3), np.int32)
    after = jax.jit(kv_cache.append)(before, rows, table, positions)
    np.testing.assert_array_equal(before, cache)
    assert (np.asarray(after) != cache).any()


def test_the_reference_is_in_place_too():
    call = jax.jit(lambda *a: kv_cache.append(*a, implementation="xla"), donate_argnums=0)
    shapes = [jax.ShapeDtypeStruct(*x) for x in (((500, 64, 576), jnp.float32), *REST)]
    memory = call.lower(*shapes).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 500 * 64 * 576 * 4 and memory.temp_size_in_bytes < 100_000


@pytest.mark.skipif(HOPPER_IMPLEMENTATION != "sim", reason="bytes are counted on the simulator")
def test_the_hopper_kernel_writes_the_rows_alone(simulator):
    """A cache that is donated, or carried through a loop, is written in place, in any order of blocks."""
    cache, rows, table = np.zeros((40, 64, 656), np.uint8), random_rows(8, 2, 576), np.arange(32).reshape(8, 4)
    table, positions = table.astype(np.int32), np.array([[0, 1], [63, 64]] * 4, np.int32)
    run = jax.jit(lambda *a: kv_cache.append(*a, implementation="sim"), donate_argnums=0)
    memory = run.lower(cache, rows, table, positions).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes and memory.temp_size_in_bytes < 10_000
    expected = append_loop(cache, rows, table, positions, 512)
    for seed in range(8):
        simulator.configure(seed=seed)
        np.testing.assert_array_equal(run(jnp.array(cache), rows, table, positions), expected)


def test_the_hopper_kernel_is_in_place_on_a_gpu_too(monkeypatch):
    """Aliases reach the targets of GPUs: lowering needs neither the GPU nor the kernel."""
    pretend(monkeypatch, "9.0")
    shapes = [jax.ShapeDtypeStruct(*x) for x in (CACHES["bfloat16"], *REST)]
    call = jax.jit(lambda *a: kv_cache.append(*a, implementation="cuda"))
    checks = jaxkern.DISABLE_JAX_EXPORT_CHECKS
    module = jax.export.export(call, platforms=["cuda"], disabled_checks=checks)(*shapes).mlir_module()
    (line,) = [line for line in module.splitlines() if "custom_call @jaxkern.kv_cache_append.v1" in line]
    assert "output_operand_alias<output_tuple_indices = [], operand_index = 0" in line


# Errors.


def test_errors():
    cache, rows, table = operands()
    positions = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"kv_cache.append: rows must be .* \[b, s, d=3\], got float32\[2,3,2\]"):
        kv_cache.append(cache, rows[..., 1:], table, positions)
    with pytest.raises(TypeError, match=r"kv_cache.append: positions must be int32 \[b=2, s=3\], got float32\[2,3\]"):
        kv_cache.append(cache, rows, table, positions.astype(np.float32))
    with pytest.raises(TypeError, match=r"kv_cache.gather: block_table must be int32 \[b, pages\], got float32"):
        kv_cache.gather(cache, table.astype(np.float32))


def test_errors_of_packed_rows():
    cache, rows, table = np.zeros((7, 4, 656), np.uint8), np.zeros((2, 3, 576), np.float32), operands()[2]
    positions = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"cache must have rows of 652 bytes for 512 \+ 62, got uint8\[7,4,656\]"):
        kv_cache.append(cache, rows[..., 2:], table, positions)
    with pytest.raises(ValueError, match="append: latent_dim of a packed row must be a positive multiple of 4"):
        kv_cache.append(cache, rows, table, positions, latent_dim=510)
    with pytest.raises(ValueError, match="kv_cache.append: latent_dim=512 is more than a row's 500 numbers"):
        kv_cache.append(cache, rows[..., :500], table, positions)
    with pytest.raises(TypeError, match=r"kv_cache.pack: rows must be float32 or .* \[b0, d\], got int32\[2,3\]"):
        kv_cache.pack(positions)
    with pytest.raises(ValueError, match=r"unpack: packed must have rows of 656 bytes for 512 \+ 64, got uint8\[655\]"):
        kv_cache.unpack(cache[0, 0, 1:])
    with pytest.raises(TypeError, match="kv_cache.unpack: dtype must be float32 or bfloat16 or float16, got int32"):
        kv_cache.unpack(cache, dtype=np.int32)
    with pytest.raises(ValueError, match="kv_cache.row_bytes: latent_dim of a packed row must be .* got 0"):
        kv_cache.row_bytes(0, 64)


def test_a_target_that_is_called_without_its_alias_refuses():
    """Only a caller of the target itself can leave it out; writing into a result that holds nothing would lose rows."""
    cache, rows, table = operands()
    call = jax.ffi.ffi_call("jaxkern.kv_cache_append.v1", jax.ShapeDtypeStruct(cache.shape, cache.dtype))
    with pytest.raises(jax.errors.JaxRuntimeError, match="kv_cache_append: the result must be an alias of the cache"):
        call(cache, rows, table, np.zeros((2, 3), np.int32), latent_dim=np.int64(512)).block_until_ready()
