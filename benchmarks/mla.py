"""mla_decode against what plain JAX offers: gather the pages, two products, a softmax between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxkern
from benchmarks import common

WIDTH, LATENT, PAGE = 576, 512, 64
SCALE = 0.1352


def rows(quick: bool):
    cases = [
        (4, 16, 4096, jnp.bfloat16),
        (32, 16, 2048, jnp.bfloat16),
        (8, 128, 1024, jnp.bfloat16),
        (1, 128, 4096, jnp.bfloat16),
        (4, 16, 4096, jnp.float32),
    ]
    for b, h, length, dtype in cases[::4] if quick else cases:
        pages = b * length // PAGE
        q = common.normal((b, 1, h, WIDTH), dtype)
        cache = common.normal((pages, PAGE, WIDTH), dtype, seed=1)
        table = np.random.default_rng(2).permutation(pages).astype(np.int32).reshape(b, -1)
        seq_lens = jnp.full(b, length, jnp.int32)
        yield common.compare(
            f"mla_decode {jnp.dtype(dtype).name}",
            f"b{b} h{h} len{length}",
            functools.partial(jaxkern.mla_decode, softmax_scale=SCALE),
            XLA_FORMS,
            (q, cache, jnp.asarray(table), seq_lens),
            flops=2 * b * h * length * (WIDTH + LATENT),
            bytes=common.nbytes(q, cache) + b * h * LATENT * q.dtype.itemsize,
        )


def batched(q, cache, table, seq_lens, dtype=jnp.float32):
    """The einsums that one would write first, with operands of `dtype`; None keeps the cache's."""
    keys = cache[table].reshape(len(table), -1, WIDTH).astype(dtype or cache.dtype)
    logits = jnp.einsum("bshd,btd->bsht", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
    p, lse = softmax(logits, seq_lens[:, None, None, None])
    values = keys[..., :LATENT]
    out = jnp.einsum("bsht,btd->bshd", p.astype(keys.dtype), values, preferred_element_type=jnp.float32)
    return out.astype(q.dtype), lse


def one_by_one(q, cache, table, seq_lens, dtype=jnp.float32):
    """One request after the other, so that each product is a plain matrix product of `dtype`."""

    def attend(request):
        q, table, length = request
        keys = cache[table].reshape(-1, WIDTH).astype(dtype or cache.dtype)
        q = q.reshape(-1, WIDTH)
        logits = jnp.dot(q.astype(keys.dtype), keys.T, preferred_element_type=jnp.float32)
        p, lse = softmax(logits, length)
        out = jnp.dot(p.astype(keys.dtype), keys[:, :LATENT], preferred_element_type=jnp.float32)
        return out.astype(q.dtype)[None], lse[None]

    return jax.lax.map(attend, (q, table, seq_lens))


def unrolled(q, cache, table, seq_lens):
    """`one_by_one` without the loop."""
    parts = [one_by_one(q[i : i + 1], cache, table[i : i + 1], seq_lens[i : i + 1]) for i in range(len(q))]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def softmax(logits, lengths):
    logits = jnp.where(jnp.arange(logits.shape[-1]) < lengths, logits * SCALE, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(logits - lse[..., None]), lse


XLA_FORMS = {
    "batched einsum, float32": batched,
    "batched einsum, as stored": functools.partial(batched, dtype=None),
    "one by one, float32": one_by_one,
    "one by one, as stored": functools.partial(one_by_one, dtype=None),
    "unrolled, float32": unrolled,
}

if __name__ == "__main__":
    common.main("mla", rows)
