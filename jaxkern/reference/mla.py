"""MLA attention in plain JAX."""

import functools

import jax
import jax.numpy as jnp

BLOCK = 256  # tokens in a block of queries or keys of mla_prefill; its probabilities are all that it holds at once

_einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def mla_decode(q, cache, block_table, seq_lens, *, softmax_scale, latent_dim, causal, num_splits=0):
    """q [b, s, h, d], cache [p, page, d] -> out [b, s, h, latent_dim], lse [b, s, h]."""
    s = q.shape[1]
    page = cache.shape[1]
    keys = gather_pages(cache, block_table).astype(jnp.float32)
    exists = jnp.repeat((block_table >= 0) & (block_table < cache.shape[0]), page, axis=1)
    token = jnp.arange(keys.shape[1])
    limits = jnp.clip(seq_lens, 0, keys.shape[1])[:, None] - (jnp.arange(s)[::-1] if causal else jnp.zeros(s, int))
    counts = exists[:, None] & (token < limits[:, :, None])  # [b, s, t]: is t a key of query s?
    # A row that is nobody's key may hold anything. One that is a key of some queries only must not reach the others
    # through 0 * NaN; theirs it reaches through its logit.
    keys = jnp.where(counts.any(axis=1)[..., None], keys, 0)
    values = keys[..., :latent_dim]
    values = jnp.where(counts.all(axis=1)[..., None] | jnp.isfinite(values), values, 0)
    logits = softmax_scale * _einsum("bshd,btd->bsht", q.astype(jnp.float32), keys)
    p, lse = softmax(jnp.where(counts[:, :, None], logits, -jnp.inf))
    return _einsum("bsht,btd->bshd", p, values).astype(q.dtype), lse


def gather_pages(cache, block_table):
    """cache [p, page, d], block_table [b, pages] -> [b, pages * page, d]; pages outside the cache are zero."""
    p, page, d = cache.shape
    b, pages = block_table.shape
    entries = jnp.where(block_table < 0, p, block_table)  # a negative index would count from the end
    return cache.at[entries].get(mode="fill", fill_value=0).reshape(b, pages * page, d)


def softmax(logits):
    """Probabilities and the logarithm of the sum of exponentials; a row of nothing but -inf has 0 and -inf."""
    largest = no_minus_inf(jnp.max(logits, axis=-1, initial=-jnp.inf))
    p = jnp.exp(logits - largest[..., None])
    total = p.sum(axis=-1)
    return p / jnp.where(total == 0, 1, total)[..., None], largest + jnp.log(total)


def no_minus_inf(x):
    return jnp.where(x == -jnp.inf, 0, x)


# ---- prefill: attention of a sequence to itself, block by block, so that memory is linear in the sequence ----
#
# q, k [b, h, t, dk], v [b, h, t, dv]; segments int32 [b, t] or None: a query sees the keys of its own segment, and
# nothing if that is negative. All tokens that the masks leave out hold finite numbers.


def mla_prefill(q, k, v, *segments, softmax_scale, causal):
    """-> out [b, h, t, dv] in q's dtype, lse float32 [b, h, t]."""
    t = q.shape[2]
    if _one_block(t):
        p, lse = softmax(_masked_logits(q, k, _mask(0, 0, t, *segments, causal=causal), softmax_scale))
        return _einsum("bhqk,bhkd->bhqd", p, v.astype(jnp.float32)).astype(q.dtype), lse

    (queries, keys, values), segments = _blocks(q, k, v), _segment_blocks(*segments, like=q)

    def query_block(_, i):
        def key_block(j, state):
            largest, total, acc = state
            mask = _mask(i, j, BLOCK, segments[i], segments[j], causal=causal)
            logits = _masked_logits(queries[i], keys[j], mask, softmax_scale)
            larger = jnp.maximum(largest, logits.max(axis=-1))
            p = jnp.exp(logits - no_minus_inf(larger)[..., None])
            shrink = jnp.exp(largest - no_minus_inf(larger))
            acc = acc * shrink[..., None] + _einsum("bhqk,bhkd->bhqd", p, values[j].astype(jnp.float32))
            return larger, total * shrink + p.sum(axis=-1), acc

        zero = jnp.zeros_like(queries[0, ..., 0], dtype=jnp.float32)
        state = (zero - jnp.inf, zero, jnp.zeros_like(values[0], dtype=jnp.float32))
        largest, total, acc = jax.lax.fori_loop(0, i + 1 if causal else len(queries), key_block, state)
        out = acc / jnp.where(total == 0, 1, total)[..., None]
        return None, (out.astype(q.dtype), no_minus_inf(largest) + jnp.log(total))

    _, (out, lse) = jax.lax.scan(query_block, None, jnp.arange(len(queries)))
    return _unblock(out, t), _unblock(lse, t)


def mla_prefill_backward(q, k, v, out, lse, d_out, d_lse, *segments, softmax_scale, causal):
    """-> dq, dk, dv as q, k, v. The probabilities are computed again from lse."""
    t = q.shape[2]
    # d logits = p * (d p - delta): through the softmax, and through lse, whose derivative is p.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - d_lse
    delta = jnp.where(lse == -jnp.inf, 0, delta)

    def gradients(q, k, v, lse, d_out, delta, mask):
        q, k, v, d_out = (x.astype(jnp.float32) for x in (q, k, v, d_out))
        p = jnp.exp(_masked_logits(q, k, mask, softmax_scale) - no_minus_inf(lse)[..., None])
        d_logits = softmax_scale * p * (_einsum("bhqd,bhkd->bhqk", d_out, v) - delta[..., None])
        dq = _einsum("bhqk,bhkd->bhqd", d_logits, k)
        return dq, _einsum("bhqk,bhqd->bhkd", d_logits, q), _einsum("bhqk,bhqd->bhkd", p, d_out)

    if _one_block(t):
        mask = _mask(0, 0, t, *segments, causal=causal)
        d_qkv = gradients(q, k, v, lse, d_out, delta, mask)
        return tuple(d.astype(x.dtype) for d, x in zip(d_qkv, (q, k, v), strict=True))

    arrays, segments = _blocks(q, k, v, lse, d_out, delta), _segment_blocks(*segments, like=q)
    queries, keys, values, lses, d_outs, deltas = arrays

    def key_block(dq, j):
        def query_block(i, state):
            dq, dk, dv = state
            mask = _mask(i, j, BLOCK, segments[i], segments[j], causal=causal)
            more = gradients(queries[i], keys[j], values[j], lses[i], d_outs[i], deltas[i], mask)
            return dq.at[i].add(more[0]), dk + more[1], dv + more[2]

        state = (dq, *(jnp.zeros_like(x[0], dtype=jnp.float32) for x in (keys, values)))
        dq, dk, dv = jax.lax.fori_loop(j if causal else 0, len(queries), query_block, state)
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = jax.lax.scan(key_block, jnp.zeros_like(queries, dtype=jnp.float32), jnp.arange(len(queries)))
    return _unblock(dq.astype(q.dtype), t), _unblock(dk, t), _unblock(dv, t)


def _one_block(t) -> bool:
    return not isinstance(t, int) or t <= BLOCK  # a symbolic length cannot be counted in blocks


def _masked_logits(q, k, mask, softmax_scale):
    logits = softmax_scale * _einsum("bhqd,bhkd->bhqk", q.astype(jnp.float32), k.astype(jnp.float32))
    return logits if mask is None else jnp.where(mask, logits, -jnp.inf)


def _mask(i, j, block, own=None, keys=None, *, causal):
    """Which keys of block j the queries of block i see: [b or 1, 1, block, block], or None for all."""
    mask = None
    if causal:
        token = jnp.arange(block)
        mask = (i * block + token[:, None] >= j * block + token)[None, None]
    if own is not None:
        keys = own if keys is None else keys
        same = ((own[:, :, None] == keys[:, None, :]) & (keys >= 0)[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


def _blocks(*arrays):
    """[b, h, t, ...] -> [ceil(t / BLOCK), b, h, BLOCK, ...], padded with zeros."""

    def split(x):
        b, h, t, *rest = x.shape
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -t % BLOCK), *[(0, 0)] * len(rest)])
        return jnp.moveaxis(x.reshape(b, h, -1, BLOCK, *rest), 2, 0)

    return [split(x) for x in arrays]


def _segment_blocks(segments=None, *, like):
    """segments [b, t] -> [ceil(t / BLOCK), b, BLOCK]; the padding belongs to none."""
    t = like.shape[2]
    if segments is None:
        segments = jnp.zeros_like(like[:, 0, :, 0], dtype=jnp.int32)
    padded = jnp.pad(segments, [(0, 0), (0, -t % BLOCK)], constant_values=-1)
    return jnp.moveaxis(padded.reshape(segments.shape[0], -1, BLOCK), 1, 0)


def _unblock(x, t):
    """[n, b, h, BLOCK, ...] -> [b, h, t, ...]."""
    n, b, h, block, *rest = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(b, h, n * block, *rest)[:, :, :t]
