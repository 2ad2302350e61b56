"""Multi-head latent attention: `mla_decode` over a paged cache of latents, `mla_prefill` of a sequence to itself."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi, reference
from jaxkern._check import FLOATS, INT32, Sizes, describe

MAX_SPLITS = 1024  # partial results are kept for each
ATTENDED = (*FLOATS, np.dtype(np.float16))  # what the ops here take
HALVES = (np.dtype(jnp.bfloat16), np.dtype(np.float16))
PACKED = np.dtype(np.uint8)


def mla_decode(
    q: jax.Array,
    cache: jax.Array,
    block_table: jax.Array,
    seq_lens: jax.Array,
    *,
    softmax_scale: float,
    latent_dim: int = 512,
    causal: bool = True,
    num_splits: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of new tokens to a paged cache that all heads share: a key is a row of the cache, its value the row's
    first latent_dim numbers.

    Shapes and dtypes: q float32, bfloat16 or float16 [b, s, h, d]; cache float32, bfloat16 or float16 [p, page, d], or
        uint8 [p, page, bytes]; block_table int32 [b, pages]; seq_lens int32 [b]; out [b, s, h, latent_dim] in q's
        dtype; lse float32 [b, s, h]. DeepSeek-V3 has d = 576 = 512 + 64. A row of bytes is latent_dim e4m3, a float32
        scale for each 128 of them, then d - latent_dim bfloat16: 656 bytes for 512 + 64, as FlashMLA has them.
        latent_dim is then a multiple of 4, so that the scales are aligned; a number is its e4m3 times its scale, which
        may be any.
    Units: seq_lens counts tokens, the s new ones included; they must be in the cache already (`kv_cache.append`). With
        causal, query i of s sees the keys [0, seq_len - (s - 1 - i)); without it, [0, seq_len). A page that is none of
        the cache's holds no keys, a length beyond the table is the table's, a negative one is 0. A query without keys
        has out 0 and lse -inf. Rows of the cache that are no key, and entries of the table past a request's length,
        may hold anything. lse is the natural logarithm of the sum of exp(softmax_scale * q . key). Sums are float32; so
        are the weights of the values, unless q is bfloat16 and the cache bfloat16 or packed: then a weight may be
        rounded to bfloat16, with its value's scale. On Hopper a weight is rounded to q's dtype, and the numbers of a
        packed row are first rounded to bfloat16, each once: the result has the bits of one over bfloat16 pages of
        `kv_cache.unpack(cache)`.
    num_splits: how many parts of equal length a request is cut into, to be computed in parallel and merged in order.
        Then, and on the CPU always, a request's result depends neither on the rest of the batch nor on the number of
        threads. None cuts by the request's own length on the CPU; on a GPU the lengths of all requests decide.
    Sharding: shard_map, over b (with whole requests and their pages on one device), over h, and over the pages of a
        request: with -1 in the table for a page that is on another device, the parts are what `merge_attention` joins.
    Gradient: none.
    Implementations: cpu, xla; cuda and sim for d 576 and latent_dim 512, of bfloat16 or float16 q and cache with pages
        of whole 16s of rows, and of a bfloat16 q with packed pages of any size. There a NaN in a key that only some
        queries of a request see may reach the others.
    Errors: TypeError for a dtype, ValueError for a shape, a latent_dim beyond d or num_splits outside 1..1024.
    Source: DeepSeek-V2 report, section 2.1; FlashMLA.
    """
    sizes = Sizes("mla_decode")
    q = sizes.check("q", q, ATTENDED, "b s h d")
    latent_dim = sizes.require_integer("latent_dim", latent_dim)
    sizes.require(0 < latent_dim <= sizes["d"], f"latent_dim must be from 1 to d={sizes['d']}, got {latent_dim}")
    cache = _check_cache(sizes, cache, latent_dim)
    block_table = sizes.check("block_table", block_table, INT32, "b pages")
    seq_lens = sizes.check("seq_lens", seq_lens, INT32, "b")
    num_splits = None if num_splits is None else sizes.require_integer("num_splits", num_splits)
    allowed = num_splits is None or 1 <= num_splits <= MAX_SPLITS
    sizes.require(allowed, f"num_splits must be None or in 1..{MAX_SPLITS}, got {num_splits}")
    return _ffi.call(
        MLA_DECODE,
        q,
        cache,
        block_table,
        seq_lens,
        implementation=implementation,
        softmax_scale=float(softmax_scale),
        latent_dim=latent_dim,
        causal=bool(causal),
        num_splits=num_splits or 0,
    )


def merge_attention(
    outs: jax.Array | Sequence[jax.Array],
    lses: jax.Array | Sequence[jax.Array],
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to all keys from the attention to each of n disjoint sets of them: context parallelism.

    Shapes and dtypes: outs float32, bfloat16 or float16 [n, ..., d]; lses float32 [n, ...], natural logarithms; or n
        arrays each. out [..., d] in outs' dtype; lse float32 [...].
    Units: lse is the logarithm of the sum of exp(lses[i]), out the sum of exp(lses[i] - lse) * outs[i], in float32 and
        in order. A part with the lse -inf has no keys and no effect, whatever its out holds; without any that has keys,
        out is 0 and lse -inf.
    Sharding: shard_map, over all axes but the first and the last. For a cache whose pages are spread over an axis, each
        device decodes with a table in which the pages of others are -1, and then:

            out, lse = jaxkern.mla_decode(q, cache, block_table, seq_lens, softmax_scale=scale)
            outs, lses = jax.lax.all_gather((out, lse), "context")
            out, lse = jaxkern.merge_attention(outs, lses)

        A page that is -1 costs no time. Partial results in float32, from a float32 q, keep a rounding out of the sum.
    Gradient: of out and lse, with respect to outs and lses.
    Implementations: cpu, xla, cuda, sim.
    Errors: TypeError for a dtype, ValueError for a shape.
    Source: FlashAttention-2; FlashMLA's combine kernel.
    """
    sizes = Sizes("merge_attention")
    outs, lses = _stacked(sizes, "outs", outs), _stacked(sizes, "lses", lses)
    dims = ["n", *(f"b{axis}" for axis in range(outs.ndim - 2))]
    expected = f"outs must be {' or '.join(d.name for d in ATTENDED)} [n, ..., d], got {describe(outs)}"
    sizes.require(outs.dtype in ATTENDED, expected, TypeError)
    sizes.require(outs.ndim >= 2 and outs.shape[0] >= 1, expected)
    outs = sizes.check("outs", outs, ATTENDED, " ".join([*dims, "d"]))
    lses = sizes.check("lses", lses, (np.dtype(np.float32),), " ".join(dims))
    outs, lses = _ffi.align(outs, lses)
    return _merge(_ffi.resolve(MERGE_ATTENTION, implementation), outs, lses)


def mla_prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    softmax_scale: float,
    causal: bool = True,
    seq_lens: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of sequences to themselves, with keys and values of their own for each head.

    Shapes and dtypes: q, k [b, t, h, dk] and v [b, t, h, dv], each float32, bfloat16 or float16, with seq_lens int32
        [b] if the sequences are shorter than t; or several sequences packed into one, q, k [t, h, dk] and v [t, h, dv]
        with cu_seqlens int32 [b + 1], sequence i being the tokens [cu_seqlens[i], cu_seqlens[i + 1]). out as v in q's
        dtype; lse float32 [b, t, h] or [t, h]. DeepSeek-V3 has dk = 192, dv = 128.
    Units: with causal, a query sees the keys up to its own position; without it, all of its sequence. Tokens outside
        the sequences may hold anything; they have out 0, lse -inf and no gradient. lse is the natural logarithm of the
        sum of exp(softmax_scale * q . k). Weights and sums are float32; on Hopper a weight is rounded to q's dtype.
        Memory is linear in t, and time in the pairs of a query and a key that it sees.
    Sharding: shard_map, over b and over h.
    Gradient: of out and lse, with respect to q, k and v. Results and gradients have the same bits on every run and on
        any number of threads.
    Implementations: cpu, xla; cuda and sim for dk 192 or 128 and dv 128, of q, k and v all bfloat16 or all float16.
        There the gradient of float16 is xla's, block by block. With any of them a NaN or an infinity may reach tokens
        that do not see its own, if they see any. (cuDNN's kernel, as jax.nn.dot_product_attention offers it, takes keys
        and values of one width, returns lse rounded to 16 bits and drops the gradient of lse.)
    Errors: TypeError for a dtype, ValueError for a shape or for both seq_lens and cu_seqlens.
    Source: DeepSeek-V2 report, section 2.1; FlashAttention-2.
    """
    sizes = Sizes("mla_prefill")
    sizes.require(seq_lens is None or cu_seqlens is None, "seq_lens and cu_seqlens exclude each other")
    packed = cu_seqlens is not None
    dims = "t h" if packed else "b t h"
    q = sizes.check("q", q, ATTENDED, f"{dims} dk")
    k = sizes.check("k", k, ATTENDED, f"{dims} dk")
    v = sizes.check("v", v, ATTENDED, f"{dims} dv")
    # The sequence of each token, [first, end) of its row of the batch, and of it the keys that the token sees.
    token = jnp.arange(sizes["t"], dtype=jnp.int32)
    if packed:
        starts = sizes.check("cu_seqlens", cu_seqlens, INT32, "sequences+1")
        sequence = (token[:, None] >= starts).sum(axis=1, dtype=jnp.int32) - 1
        first, end = (starts.at[sequence + i].get(mode="fill", fill_value=0)[None] for i in (0, 1))
        first = jnp.maximum(first, 0)
        q, k, v = q[None], k[None], v[None]
    elif seq_lens is not None:
        end = sizes.check("seq_lens", seq_lens, INT32, "b")[:, None]
        first = jnp.zeros_like(end)
    else:
        first, end = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), sizes["t"], jnp.int32)
    last = jnp.minimum(end, token + 1 if causal else sizes["t"])
    inside = (token >= first) & (token < end)  # the others see none
    spans = (jnp.broadcast_to(jnp.where(inside, x, 0), q.shape[:2]) for x in (first, last))
    static = (float(softmax_scale), _ffi.resolve(MLA_PREFILL, implementation))
    out, lse = _prefill(static, *_ffi.align(q, k, v, *spans))
    return (out[0], lse[0]) if packed else (out, lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _prefill(static, q, k, v, first, last):
    softmax_scale, implementation = static
    return _ffi.call(MLA_PREFILL, q, k, v, first, last, implementation=implementation, softmax_scale=softmax_scale)


def _prefill_forward(static, *arrays):
    out, lse = _prefill(static, *arrays)
    return (out, lse), (*arrays, out, lse)


def _prefill_backward(static, residuals, cotangents):
    softmax_scale, implementation = static
    q, k, v, first, last, out, lse = residuals
    arrays = _ffi.align(q, k, v, out, lse, *cotangents, first, last)
    if implementation in ("cuda", "sim") and _hopper_refuses_prefill_backward(*arrays):
        implementation = "xla"
    gradients = _ffi.call(MLA_PREFILL_BACKWARD, *arrays, implementation=implementation, softmax_scale=softmax_scale)
    return *(d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), None, None


_prefill.defvjp(_prefill_forward, _prefill_backward)


def _check_cache(sizes: Sizes, cache, latent_dim: int) -> jax.Array:
    """The cache: rows of d numbers, or packed ones."""
    dims = "p page d"
    cache = sizes.array("cache", cache)
    if cache.dtype == PACKED:
        sizes.require(latent_dim % 4 == 0, f"latent_dim of a packed cache must be a multiple of 4, got {latent_dim}")
        sizes.known["bytes"] = reference.row_bytes(latent_dim, sizes["d"] - latent_dim)
        dims = "p page bytes"
    return sizes.check("cache", cache, (*ATTENDED, PACKED), dims)


def _stacked(sizes: Sizes, argument: str, parts) -> jax.Array:
    """One array of the parts, which are alike: jnp.stack would take any dtypes together."""
    if not isinstance(parts, list | tuple):
        return sizes.array(argument, parts)
    sizes.require(parts, f"{argument} must have a part, got none")
    parts = [sizes.array(f"{argument}[{i}]", part) for i, part in enumerate(parts)]
    for i, part in enumerate(parts):
        unlike = f"{argument}[{i}] must be {describe(parts[0])} as {argument}[0] is, got {describe(part)}"
        sizes.require(part.dtype == parts[0].dtype, unlike, TypeError)
        sizes.require(part.shape == parts[0].shape, unlike)
    return jnp.stack(parts)


def _decode_results(q, cache, block_table, seq_lens, *, latent_dim, **_):
    return [((*q.shape[:3], latent_dim), q.dtype), (q.shape[:3], jnp.float32)]


def _fold_batch(size, arrays, is_batched, **params):
    """vmap: the new axis joins the batch; caches of their own become parts of one."""
    q, cache, block_table, seq_lens = arrays
    many = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, is_batched, strict=True)]
    if is_batched[1]:
        p = cache.shape[1]
        first = p * jnp.arange(size, dtype=jnp.int32)[:, None, None]
        many[2] = jnp.where((many[2] >= 0) & (many[2] < p), many[2] + first, -1)
        cache = cache.reshape(size * p, *cache.shape[2:])
    inner = many[0].shape[1]
    q, block_table, seq_lens = (x.reshape(size * inner, *x.shape[2:]) for x in (many[0], many[2], many[3]))
    return [q, cache, block_table, seq_lens], params, lambda i, r: r.reshape(size, inner, *r.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merge(implementation, outs, lses):
    n, *rest, d = outs.shape
    t = math.prod(rest)
    out, lse = _ffi.call(MERGE_ATTENTION, outs.reshape(n, t, d), lses.reshape(n, t), implementation=implementation)
    return out.reshape(*rest, d), lse.reshape(rest)


def _merge_forward(implementation, outs, lses):
    return _merge(implementation, outs, lses), (outs, lses)


def _merge_backward(implementation, residuals, cotangents):
    return jax.vjp(reference.merge_attention, *residuals)[1](cotangents)


_merge.defvjp(_merge_forward, _merge_backward)


def _fold_parts(size, arrays, is_batched):
    """vmap: the new axis joins the rows."""
    outs, lses = (
        jnp.moveaxis(x if b else jnp.broadcast_to(x, (size, *x.shape)), 0, 1)
        for x, b in zip(arrays, is_batched, strict=True)
    )
    n, _, t, d = outs.shape
    arrays = [outs.reshape(n, size * t, d), lses.reshape(n, size * t)]
    return arrays, {}, lambda i, r: r.reshape(size, t, *r.shape[1:])


def _fold_all(size, arrays, is_batched, **params):
    """vmap: the new axis joins the batch, which all operands have."""
    many = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, is_batched, strict=True)]
    inner = many[0].shape[1]
    folded = [x.reshape(size * inner, *x.shape[2:]) for x in many]
    return folded, params, lambda i, r: r.reshape(size, inner, *r.shape[1:])


def _hopper_refuses_decode(q, cache, *_, latent_dim, **__):
    if (q.shape[3], latent_dim) != (576, 512):
        return f"d must be 576 and latent_dim 512, got {q.shape[3]} and {latent_dim}"
    packed = cache.dtype == PACKED
    if q.dtype not in HALVES or cache.dtype != q.dtype and not (packed and q.dtype == HALVES[0]):
        return (
            "q and cache must both be bfloat16 or both float16, or the cache packed and q bfloat16, "
            f"got {q.dtype} and {cache.dtype}"
        )
    if cache.shape[0] == 0 or cache.shape[1] == 0 or (not packed and cache.shape[1] % 16 != 0):
        return f"the cache must have pages, of a multiple of 16 rows unless it is packed, got {describe(cache)}"
    return ""


def _hopper_workspaces(q, *_, num_splits, **__):
    """Where requests start, and partial results in groups of 64 rows: see cuda/mla/mla.h."""
    b, s, h, _ = q.shape
    groups = -(-(s * h) // 64)
    parts = 160  # most_mla_parts
    slots = 1 if num_splits == 1 else b * groups * num_splits if num_splits else b * groups + max(groups, parts)
    return [((b + 2,), jnp.int32), ((slots, 64, 512), jnp.float32), ((slots, 64), jnp.float32)]


MLA_DECODE = _ffi.Op(
    "mla_decode",
    _decode_results,
    reference.mla_decode,
    batch=_fold_batch,
    hopper=_ffi.Kernel(
        layouts=lambda **_: ((None,) * 4, (None, None)),
        attributes=("softmax_scale", "causal", "num_splits"),
        refuses=_hopper_refuses_decode,
        workspaces=_hopper_workspaces,
    ),
)
MERGE_ATTENTION = _ffi.Op(
    "merge_attention",
    lambda outs, lses: [(outs.shape[1:], outs.dtype), (lses.shape[1:], lses.dtype)],
    reference.merge_attention,
    batch=_fold_parts,
    hopper=_ffi.Kernel(layouts=lambda **_: ((None, None), (None, None))),
)


def _hopper_refuses_prefill(q, k, v, *_, **__):
    if q.shape[3] not in (128, 192) or v.shape[3] != 128:
        return f"dk must be 128 or 192 and dv 128, got {q.shape[3]} and {v.shape[3]}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in HALVES:
        return f"q, k and v must be all bfloat16 or all float16, got {q.dtype}, {k.dtype} and {v.dtype}"
    return ""


MLA_PREFILL = _ffi.Op(
    "mla_prefill",
    lambda q, k, v, *spans, **_: [(v.shape, q.dtype), (q.shape[:3], jnp.float32)],
    reference.mla_prefill,
    batch=_fold_all,
    hopper=_ffi.Kernel(
        layouts=lambda **_: ((None,) * 5, (None, None)),
        attributes=("softmax_scale",),
        refuses=_hopper_refuses_prefill,
    ),
)


def _hopper_refuses_prefill_backward(q, k, v, *_, **__):
    if q.dtype == HALVES[1]:
        return "of float16 there is none"
    return _hopper_refuses_prefill(q, k, v)


PREFILL_TILE, PREFILL_BLOCK = 128, 64  # rows


def _hopper_backward_operands(q, k, v, out, lse, d_out, d_lse, first, last, **_):
    """What each query needs beside its row, and what blocks of them see: cuda/mla_prefill/mla_prefill.h."""
    b, t = first.shape
    # Without the barrier XLA may make one fusion of the sum and the transposition, which takes six times as long.
    delta = jax.lax.optimization_barrier((d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)) - d_lse
    first, last = jnp.maximum(first, 0), jnp.minimum(last, t)
    sees = first < last
    lse, delta = (jnp.swapaxes(x, 1, 2) for x in (lse * math.log2(math.e), delta))
    rows = lse, delta, jnp.where(sees, jnp.stack([first, last]), 0)
    lse, delta, spans = (jnp.pad(x, [(0, 0), (0, 0), (0, -t % PREFILL_TILE)]) for x in rows)
    first, last = spans.reshape(2, b, spans.shape[2] // PREFILL_BLOCK, PREFILL_BLOCK)
    most = jnp.iinfo(jnp.int32).max
    exists = jnp.arange(spans.shape[2]).reshape(-1, PREFILL_BLOCK) < t
    bounds = (
        jnp.where(first < last, first, most).min(axis=-1),
        last.max(axis=-1),
        first.max(axis=-1),
        jnp.where(exists, last, most).min(axis=-1),
    )
    return q, k, v, d_out, lse, delta, spans, jnp.stack(bounds, axis=-1)


MLA_PREFILL_BACKWARD = _ffi.Op(
    "mla_prefill_backward",
    lambda q, k, v, *rest, **_: [(x.shape, jnp.float32) for x in (q, k, v)],
    reference.mla_prefill_backward,
    part_of="mla_prefill",
    batch=_fold_all,
    hopper=_ffi.Kernel(
        layouts=lambda **_: ((None,) * 8, (None,) * 3),
        attributes=("softmax_scale",),
        operands=_hopper_backward_operands,
        dtypes=lambda q, k, v, *_, **__: (q.dtype, k.dtype, v.dtype),
        refuses=_hopper_refuses_prefill_backward,
    ),
)
