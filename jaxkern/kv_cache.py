"""The paged cache: `append` writes the rows of new tokens, `gather` reads a batch's pages as one array, `pack` and
`unpack` turn rows into FP8 and back.

A cache is [p, page, d]: p pages of `page` tokens each, shared by all requests of a server. Token t of request i lives
in row t % page of page block_table[i, t // page]; `jaxkern.PageAllocator` says which pages a request has. A packed
cache is uint8 [p, page, bytes], a row of it being, of a token's latent and rope numbers,

    the latent as e4m3, one float32 scale for each 128 of it (little-endian), the rope numbers as bfloat16:

656 bytes for 512 + 64, FlashMLA's FP8 format.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi, reference
from jaxkern._check import INT32, Sizes, describe

_NUMBERS = (np.dtype(jnp.float32), np.dtype(jnp.bfloat16), np.dtype(jnp.float16))
_UINT8 = np.dtype(np.uint8)


def append(
    cache: jax.Array,
    rows: jax.Array,
    block_table: jax.Array,
    positions: jax.Array,
    *,
    latent_dim: int = 512,
    implementation: str | None = None,
) -> jax.Array:
    """The cache with `rows` written at the tokens `positions` of their requests.

    Shapes and dtypes: cache float32, bfloat16 or float16 [p, page, d], or packed uint8 [p, page, row_bytes(latent_dim,
        d - latent_dim)]; rows float32, bfloat16 or float16 [b, s, d], rounded to the cache's dtype or packed as `pack`
        does it; block_table int32 [b, pages]; positions int32 [b, s]. latent_dim matters to packed caches only.
    Units: a position is a token's index in its request. A row is dropped if its position is negative or beyond the
        table, or if its page is none of the cache's. Of two rows for one slot the last one, in the order (b, s), wins.
        Under jit, donate the cache (donate_argnums) or carry it through a loop, and only the rows are written;
        otherwise XLA copies it first, as it may under vmap.
    Sharding: shard_map, with whole requests and their pages on one device; page numbers are the device's own.
    Gradient: none.
    Implementations: cpu, xla, cuda, sim; packed rows must have a multiple of 4 bytes for the latter two.
    Errors: TypeError for a dtype, ValueError for a shape, or for a packed cache's latent_dim that is no multiple of 4.
    Source: vLLM, "PagedAttention", 2023; FlashMLA, the FP8 cache.
    """
    sizes = Sizes("kv_cache.append")
    cache = sizes.array("cache", cache)
    packed = cache.dtype == _UINT8
    cache = sizes.check("cache", cache, (*_NUMBERS, _UINT8), "p page bytes" if packed else "p page d")
    rows = sizes.check("rows", rows, _NUMBERS, "b s d")
    block_table = sizes.check("block_table", block_table, INT32, "b pages")
    positions = sizes.check("positions", positions, INT32, "b s")
    latent_dim = sizes.require_size("latent_dim", latent_dim)
    if packed:
        _check_packed(sizes, "cache", cache, latent_dim, sizes["d"] - latent_dim)
    (cache,) = _ffi.call(
        KV_CACHE_APPEND,
        cache,
        rows,
        block_table,
        positions,
        implementation=implementation,
        latent_dim=latent_dim,
    )
    return cache


def gather(cache: jax.Array, block_table: jax.Array) -> jax.Array:
    """The pages of each request, one after the other: [b, pages * page, d].

    Shapes and dtypes: cache float32, bfloat16 or float16 [p, page, d], or packed uint8 [p, page, bytes]; block_table
        int32 [b, pages]; result as cache, what is packed stays so: `unpack` it.
    Units: rows of a page that is none of the cache's are zero; rows past a request's length are whatever they hold.
    Sharding: shard_map, with whole requests and their pages on one device.
    Gradient: JAX's own, of a gather.
    Implementations: plain JAX.
    Errors: TypeError for a dtype, ValueError for a shape.
    Source: vLLM, "PagedAttention", 2023.
    """
    sizes = Sizes("kv_cache.gather")
    cache = sizes.check("cache", cache, (*_NUMBERS, _UINT8), "p page d")
    block_table = sizes.check("block_table", block_table, INT32, "b pages")
    return reference.gather_pages(cache, block_table)


def pack(rows: jax.Array, *, latent_dim: int = 512) -> jax.Array:
    """Rows as a packed cache holds them.

    Shapes and dtypes: rows float32, bfloat16 or float16 [..., d], the first latent_dim of d numbers being the latent ->
        uint8 [..., row_bytes(latent_dim, d - latent_dim)].
    Units: scale = max(amax, 1e-4) / 448 of each 128 numbers of the latent, fewer at its end, rounded up to a power of
        two, which kernels that hold it as bfloat16 or ue8m0 take as it is; a block that holds a NaN or an infinity
        becomes NaN, scale and all, as in `jaxkern.quantize`.
    Sharding: any, but along d.
    Gradient: none.
    Implementations: plain JAX.
    Errors: TypeError for a dtype, ValueError for a latent_dim beyond d or no multiple of 4.
    Source: FlashMLA, the FP8 cache; DeepSeek-V3 report, section 3.3.2.
    """
    sizes = Sizes("kv_cache.pack")
    rows = sizes.array("rows", rows)
    sizes.require(rows.ndim >= 1, f"rows must be [..., d], got {describe(rows)}")
    rows = sizes.check("rows", rows, _NUMBERS, _dims(rows, "d"))
    latent_dim = sizes.require_integer("latent_dim", latent_dim)
    _check_row(sizes, latent_dim, sizes["d"] - latent_dim)
    return reference.pack_rows(rows, latent_dim)


def unpack(packed: jax.Array, *, latent_dim: int = 512, rope_dim: int = 64, dtype=jnp.bfloat16) -> jax.Array:
    """The rows that packed ones stand for.

    Shapes and dtypes: packed uint8 [..., row_bytes(latent_dim, rope_dim)] -> [..., latent_dim + rope_dim] in dtype,
        float32, bfloat16 or float16.
    Units: fp8 * scale in float32, rounded once to dtype.
    Sharding: any, but along the bytes.
    Gradient: none.
    Implementations: plain JAX.
    Errors: TypeError for a dtype, ValueError for a row of another length or a latent_dim that is no multiple of 4.
    Source: FlashMLA, the FP8 cache.
    """
    sizes = Sizes("kv_cache.unpack")
    packed = sizes.array("packed", packed)
    sizes.require(packed.ndim >= 1, f"packed must be [..., bytes], got {describe(packed)}")
    packed = sizes.check("packed", packed, (_UINT8,), _dims(packed, "bytes"))
    dtype = sizes.require_dtype("dtype", dtype, _NUMBERS)
    latent_dim, rope_dim = _row(sizes, latent_dim, rope_dim)
    _check_packed(sizes, "packed", packed, latent_dim, rope_dim)
    return reference.unpack_rows(packed, latent_dim, rope_dim, dtype)


def row_bytes(latent_dim: int = 512, rope_dim: int = 64) -> int:
    """The bytes of a packed row: a cache is jnp.zeros((pages, page_size, row_bytes()), jnp.uint8).

    Errors: ValueError for a latent_dim that is no positive multiple of 4, or a negative rope_dim.
    """
    sizes = Sizes("kv_cache.row_bytes")
    latent_dim, rope_dim = _row(sizes, latent_dim, rope_dim)
    _check_row(sizes, latent_dim, rope_dim)
    return reference.row_bytes(latent_dim, rope_dim)


def _dims(x, last: str) -> str:
    return " ".join([*(f"b{axis}" for axis in range(x.ndim - 1)), last])


def _row(sizes: Sizes, latent_dim, rope_dim) -> tuple[int, int]:
    return sizes.require_integer("latent_dim", latent_dim), sizes.require_integer("rope_dim", rope_dim)


def _check_row(sizes: Sizes, latent_dim: int, rope_dim: int):
    allowed = latent_dim > 0 and latent_dim % 4 == 0
    sizes.require(allowed, f"latent_dim of a packed row must be a positive multiple of 4, got {latent_dim}")
    sizes.require(rope_dim >= 0, f"latent_dim={latent_dim} is more than a row's {latent_dim + rope_dim} numbers")


def _check_packed(sizes: Sizes, argument: str, packed, latent_dim: int, rope_dim: int):
    _check_row(sizes, latent_dim, rope_dim)
    expected = reference.row_bytes(latent_dim, rope_dim)
    fits = packed.shape[-1] == expected
    sizes.require(
        fits, f"{argument} must have rows of {expected} bytes for {latent_dim} + {rope_dim}, got {describe(packed)}"
    )


def _fold_batch(size, arrays, is_batched, **params):
    """vmap: the new axis joins the batch, and the caches, of which each becomes one of its own, the pages."""
    cache, rows, block_table, positions = (
        x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, is_batched, strict=True)
    )
    p = cache.shape[1]
    first = p * jnp.arange(size, dtype=jnp.int32)[:, None, None]
    block_table = jnp.where((block_table >= 0) & (block_table < p), block_table + first, -1)
    folded = [x.reshape(size * x.shape[1], *x.shape[2:]) for x in (cache, rows, block_table, positions)]
    return folded, params, lambda i, r: r.reshape(size, p, *r.shape[1:])


def _hopper_refuses(cache, *_, **__):
    if cache.dtype == _UINT8 and cache.shape[2] % 4 != 0:
        return f"packed rows must have a multiple of 4 bytes, got {describe(cache)}"
    return ""


KV_CACHE_APPEND = _ffi.Op(
    "kv_cache_append",
    lambda cache, rows, block_table, positions, **_: [(cache.shape, cache.dtype)],
    reference.kv_cache_append,
    part_of="kv_cache.append",
    batch=_fold_batch,
    hopper=_ffi.Kernel(
        layouts=lambda **_: ((None,) * 4, (None,)),
        attributes=("latent_dim",),
        refuses=_hopper_refuses,
    ),
    aliases={0: 0},
)
