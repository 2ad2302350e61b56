"""The paged cache: `append` writes the rows of new tokens, `gather` reads a batch's pages as one array.

A cache is [p, page, d]: p pages of `page` tokens each, shared by all requests of a server. Token t of request i lives
in row t % page of page block_table[i, t // page].
"""

import jax
import jax.numpy as jnp

from jaxkern import reference
from jaxkern._check import FLOATS, INT32, Sizes


def append(cache: jax.Array, rows: jax.Array, block_table: jax.Array, positions: jax.Array) -> jax.Array:
    """The cache with `rows` written at the tokens `positions` of their requests.

    Shapes and dtypes: cache float32 or bfloat16 [p, page, d]; rows float32 or bfloat16 [b, s, d], rounded to the
        cache's dtype; block_table int32 [b, pages]; positions int32 [b, s].
    Units: a position is a token's index in its request. A row is dropped if its position is negative or beyond the
        table, or if its page is none of the cache's. Two rows of one slot: either may win.
    Sharding: shard_map, with whole requests and their pages on one device. Under jit, donate the cache
        (donate_argnums) and XLA writes in place.
    Gradient: JAX's own, of a scatter.
    Implementations: plain JAX.
    Errors: TypeError for a dtype, ValueError for a shape.
    Source: vLLM, "PagedAttention", 2023.
    """
    sizes = Sizes("kv_cache.append")
    cache = sizes.check("cache", cache, FLOATS, "p page d")
    rows = sizes.check("rows", rows, FLOATS, "b s d")
    block_table = sizes.check("block_table", block_table, INT32, "b pages")
    positions = sizes.check("positions", positions, INT32, "b s")
    p, page, pages = sizes["p"], sizes["page"], sizes["pages"]
    inside = (positions >= 0) & (positions < pages * page)
    entries = jnp.where(inside, positions // page, 0)
    targets = jnp.take_along_axis(block_table, entries, axis=1, mode="fill", fill_value=-1)
    targets = jnp.where(inside & (targets >= 0), targets, p)  # p is no page: dropped; -1 would be the last one
    return cache.at[targets, positions % page].set(rows.astype(cache.dtype), mode="drop")


def gather(cache: jax.Array, block_table: jax.Array) -> jax.Array:
    """The pages of each request, one after the other: [b, pages * page, d].

    Shapes and dtypes: cache float32 or bfloat16 [p, page, d]; block_table int32 [b, pages]; result as cache.
    Units: rows of a page that is none of the cache's are zero; rows past a request's length are whatever they hold.
    Sharding: shard_map, with whole requests and their pages on one device.
    Gradient: JAX's own, of a gather.
    Implementations: plain JAX.
    Errors: TypeError for a dtype, ValueError for a shape.
    Source: vLLM, "PagedAttention", 2023.
    """
    sizes = Sizes("kv_cache.gather")
    cache = sizes.check("cache", cache, FLOATS, "p page d")
    block_table = sizes.check("block_table", block_table, INT32, "b pages")
    return reference.gather_pages(cache, block_table)
