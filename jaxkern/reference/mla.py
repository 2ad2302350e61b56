"""MLA attention in plain JAX."""

import functools

import jax
import jax.numpy as jnp

from jaxkern.reference.kv_cache import unpack_rows
from jaxkern.reference.rows import take_rows

BLOCK = 256  # tokens in a block of queries or keys of mla_prefill; its probabilities are all that it holds at once

_einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def mla_decode(q, cache, block_table, seq_lens, *, softmax_scale, latent_dim, causal, num_splits=0):
    """q [b, s, h, d], cache [p, page, d] or uint8 [p, page, bytes] -> out [b, s, h, latent_dim], lse [b, s, h]."""
    s = q.shape[1]
    page = cache.shape[1]
    keys = gather_pages(cache, block_table)
    packed = keys.dtype == jnp.uint8
    keys = unpack_rows(keys, latent_dim, q.shape[3] - latent_dim, jnp.float32) if packed else keys.astype(jnp.float32)
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


def merge_attention(outs, lses):
    """outs [n, t, d], lses [n, t] -> out [t, d] in outs' dtype, lse [t]."""
    empty = lses == -jnp.inf
    largest = jax.lax.stop_gradient(no_minus_inf(lses.max(axis=0)))
    weights = jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, lses - largest)))
    total = weights.sum(axis=0)
    nothing = total == 0
    shares = weights / jnp.where(nothing, 1, total)
    out = (shares[..., None] * jnp.where(empty[..., None], 0, outs.astype(jnp.float32))).sum(axis=0)
    lse = jnp.where(nothing, -jnp.inf, largest + jnp.log(jnp.where(nothing, 1, total)))
    return out.astype(outs.dtype), lse


def gather_pages(cache, block_table):
    """cache [p, page, d], block_table [b, pages] -> [b, pages * page, d]; pages outside the cache are zero."""
    p, page, d = cache.shape
    b, pages = block_table.shape
    entries = jnp.where(block_table < 0, p, block_table)  # a negative index would count from the end
    return take_rows(cache, entries).reshape(b, pages * page, d)


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
# q, k [b, t, h, dk], v [b, t, h, dv]; first, last int32 [b, t]: a query sees the keys [first, last) of its row of the
# batch. A token that sees none is nobody's key, and may hold anything.


def mla_prefill(q, k, v, first, last, *, softmax_scale):
    """-> out [b, t, h, dv] in q's dtype, lse float32 [b, t, h]."""
    t = q.shape[1]
    queries, keys, values = (_heads_first(x, first, last) for x in (q, k, v))
    if _one_block(t):
        p, lse = softmax(_masked_logits(queries, keys, _mask(0, t, first, last), softmax_scale))
        out = _einsum("bhqk,bhkd->bhqd", p, values).astype(q.dtype)
        return _no_others(_tokens_first(out), first, last), _tokens_first(lse)

    (queries, keys, values), spans = _blocks(queries, keys, values), _span_blocks(first, last)

    def query_block(_, i):
        def key_block(j, state):
            largest, total, acc = state
            mask = _mask(j, BLOCK, *(x[i] for x in spans))
            logits = _masked_logits(queries[i], keys[j], mask, softmax_scale)
            larger = jnp.maximum(largest, logits.max(axis=-1))
            p = jnp.exp(logits - no_minus_inf(larger)[..., None])
            shrink = jnp.exp(largest - no_minus_inf(larger))
            acc = acc * shrink[..., None] + _einsum("bhqk,bhkd->bhqd", p, values[j])
            return larger, total * shrink + p.sum(axis=-1), acc

        zero = jnp.zeros_like(queries[0, ..., 0])
        state = (zero - jnp.inf, zero, jnp.zeros_like(values[0]))
        largest, total, acc = jax.lax.fori_loop(*_key_blocks(*(x[i] for x in spans)), key_block, state)
        out = acc / jnp.where(total == 0, 1, total)[..., None]
        return None, (out.astype(q.dtype), no_minus_inf(largest) + jnp.log(total))

    _, (out, lse) = jax.lax.scan(query_block, None, jnp.arange(len(queries)))
    return _no_others(_tokens_first(_unblock(out, t)), first, last), _tokens_first(_unblock(lse, t))


def mla_prefill_backward(q, k, v, out, lse, d_out, d_lse, first, last, *, softmax_scale):
    """-> dq, dk, dv in float32. The probabilities are computed again from lse."""
    t = q.shape[1]
    # d logits = p * (d p - delta): through the softmax, and through lse, whose derivative is p.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - d_lse
    delta = jnp.where(lse == -jnp.inf, 0, delta)
    arrays = [_heads_first(x, first, last) for x in (q, k, v, no_minus_inf(lse), d_out, delta)]

    def gradients(q, k, v, lse, d_out, delta, mask):
        p = jnp.exp(_masked_logits(q, k, mask, softmax_scale) - lse[..., None])
        d_logits = softmax_scale * p * (_einsum("bhqd,bhkd->bhqk", d_out, v) - delta[..., None])
        dq = _einsum("bhqk,bhkd->bhqd", d_logits, k)
        return dq, _einsum("bhqk,bhqd->bhkd", d_logits, q), _einsum("bhqk,bhqd->bhkd", p, d_out)

    if _one_block(t):
        return tuple(_no_others(_tokens_first(d), first, last) for d in gradients(*arrays, _mask(0, t, first, last)))

    (queries, keys, values, lses, d_outs, deltas), spans = _blocks(*arrays), _span_blocks(first, last)

    def query_block(state, i):
        def key_block(j, state):
            dq, dk, dv = state
            mask = _mask(j, BLOCK, *(x[i] for x in spans))
            more = gradients(queries[i], keys[j], values[j], lses[i], d_outs[i], deltas[i], mask)
            return dq + more[0], dk.at[j].add(more[1]), dv.at[j].add(more[2])

        state = (jnp.zeros_like(queries[0]), *state)
        dq, *state = jax.lax.fori_loop(*_key_blocks(*(x[i] for x in spans)), key_block, state)
        return tuple(state), dq

    state = tuple(jnp.zeros_like(x) for x in (keys, values))
    (dk, dv), dq = jax.lax.scan(query_block, state, jnp.arange(len(queries)))
    return tuple(_no_others(_tokens_first(_unblock(d, t)), first, last) for d in (dq, dk, dv))


def _one_block(t) -> bool:
    return not isinstance(t, int) or t <= BLOCK  # a symbolic length cannot be counted in blocks


def _heads_first(x, first, last):
    """[b, t, h, ...] -> float32 [b, h, t, ...], zero where a token sees nothing."""
    return jnp.swapaxes(_no_others(x, first, last).astype(jnp.float32), 1, 2)


def _no_others(x, first, last):
    """Zeros in place of what sees nothing; in results too: 0 * NaN of a token is NaN."""
    return jnp.where((first < last).reshape(*first.shape, *[1] * (x.ndim - 2)), x, 0)


def _tokens_first(x):
    return jnp.swapaxes(x, 1, 2)


def _masked_logits(q, k, mask, softmax_scale):
    return jnp.where(mask, softmax_scale * _einsum("bhqd,bhkd->bhqk", q, k), -jnp.inf)


def _mask(j, block, first, last):
    """Which keys of block j the queries see that have these spans: [b, 1, queries, block]."""
    key = j * block + jnp.arange(block)
    return ((first[..., None] <= key) & (key < last[..., None]))[:, None]


def _key_blocks(first, last):
    """The first and the end of the blocks of keys that any query sees."""
    sees = first < last
    begin = jnp.min(first, where=sees, initial=jnp.iinfo(jnp.int32).max) // BLOCK
    return begin, (jnp.max(last, where=sees, initial=0) + BLOCK - 1) // BLOCK


def _blocks(*arrays):
    """[b, h, t, ...] -> [ceil(t / BLOCK), b, h, BLOCK, ...], padded with zeros."""

    def split(x):
        b, h, t, *rest = x.shape
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -t % BLOCK), *[(0, 0)] * len(rest)])
        return jnp.moveaxis(x.reshape(b, h, (t + BLOCK - 1) // BLOCK, BLOCK, *rest), 2, 0)

    return [split(x) for x in arrays]


def _span_blocks(*spans):
    """[b, t] -> [ceil(t / BLOCK), b, BLOCK]; the padding sees nothing."""
    return [x[:, :, 0] for x in _blocks(*(x[:, None] for x in spans))]


def _unblock(x, t):
    """[n, b, h, BLOCK, ...] -> [b, h, t, ...]."""
    n, b, h, block, *rest = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(b, h, n * block, *rest)[:, :, :t]
