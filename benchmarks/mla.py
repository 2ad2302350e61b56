"""mla_decode against what plain JAX offers: gather the pages, two products, a softmax between them. mla_prefill, alone
and with its gradients, against the same without pages.

A bar counts against the batched einsums, in float32 or as stored, whichever is faster; the row without a bar has the
other forms as well. A packed cache is compared with what XLA does with the bfloat16 one.

`python -m benchmarks.mla --memory` prints what mla_prefill with its gradients needs at most beside its arguments, ours
beside the plain form: XLA's own account of both programs, in which the few MiB a thread that our kernels work in do not
appear.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxkern
from benchmarks import common
from jaxkern import reference

WIDTH, LATENT, PAGE = 576, 512, 64
SCALE = 0.1352
KEY, VALUE = 192, 128  # widths of mla_prefill
PREFILL_SCALE = KEY**-0.5


def rows(quick: bool):
    cases = [  # b, h, length, dtype, bar
        (4, 16, 4096, jnp.bfloat16, 8),
        (32, 16, 2048, jnp.bfloat16, 8),
        (8, 128, 1024, jnp.bfloat16, 2.5),
        (1, 128, 4096, jnp.bfloat16, 1.5),
        (4, 16, 4096, jnp.float32, None),
    ]
    for b, h, length, dtype, bar in cases[::4] if quick else cases:
        pages = b * length // PAGE
        q = common.normal((b, 1, h, WIDTH), dtype)
        cache = common.normal((pages, PAGE, WIDTH), dtype, seed=1)
        table = np.random.default_rng(2).permutation(pages).astype(np.int32).reshape(b, -1)
        rest = (jnp.asarray(table), jnp.full(b, length, jnp.int32))
        caches = {jnp.dtype(dtype).name: cache}
        if dtype == jnp.bfloat16:
            caches["fp8"] = jax.jit(reference.pack_rows, static_argnums=1)(cache, LATENT)
        for name, stored in caches.items():
            yield common.compare(
                f"mla_decode {name}",
                f"b{b} h{h} len{length}",
                functools.partial(jaxkern.mla_decode, softmax_scale=SCALE),
                BATCHED if bar else XLA_FORMS,
                (q, stored, *rest),
                xla_args=(q, cache, *rest),
                flops=2 * b * h * length * (WIDTH + LATENT),
                bytes=common.nbytes(q, stored) + b * h * LATENT * q.dtype.itemsize,
                bar=bar,
            )
    yield from prefill_rows(quick)


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


BATCHED = {
    "batched einsum, float32": batched,
    "batched einsum, as stored": functools.partial(batched, dtype=None),
}
XLA_FORMS = {
    **BATCHED,
    "one by one, float32": one_by_one,
    "one by one, as stored": functools.partial(one_by_one, dtype=None),
    "unrolled, float32": unrolled,
}


def prefill_rows(quick: bool):
    for t, h, dtype in [(2048, 16, jnp.float32), (2048, 16, jnp.bfloat16)][: 1 if quick else 2]:
        widths = (KEY, KEY, VALUE)
        q, k, v = (common.normal((1, t, h, width), dtype, seed=i) for i, width in enumerate(widths))
        cotangents = common.normal((1, t, h, VALUE), dtype, seed=3), common.normal((1, t, h), seed=4)
        pairs = h * t * (t + 1) // 2
        once = common.nbytes(q, k, v, cotangents)
        compare = functools.partial(common.compare, shape=f"b1 s{t} h{h} {jnp.dtype(dtype).name}", bar=1.5)
        yield compare(
            "mla_prefill",
            ours=prefill,
            xla=PREFILL_XLA_FORMS,
            args=(q, k, v),
            flops=2 * pairs * (KEY + VALUE),
            bytes=once,
        )
        yield compare(
            "mla_prefill + gradients",
            ours=with_gradients(prefill),
            xla={name: with_gradients(form) for name, form in PREFILL_XLA_FORMS.items()},
            args=(q, k, v, cotangents),
            flops=2 * pairs * (4 * KEY + 3 * VALUE),
            bytes=2 * once + common.nbytes(q, k, v),
        )


prefill = functools.partial(jaxkern.mla_prefill, softmax_scale=PREFILL_SCALE)


def whole_matrix(q, k, v, dtype=jnp.float32):
    """Causal attention through the matrix of all logits, with operands of `dtype`; None keeps theirs."""
    wide = [x.astype(dtype or x.dtype) for x in (q, k, v)]
    logits = PREFILL_SCALE * jnp.einsum("bqhd,bkhd->bhqk", *wide[:2], preferred_element_type=jnp.float32)
    logits = jnp.where(jnp.tril(jnp.ones(logits.shape[2:], bool)), logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.exp(logits - lse[..., None]).astype(wide[2].dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", p, wide[2], preferred_element_type=jnp.float32)
    return out.astype(q.dtype), jnp.swapaxes(lse, 1, 2)


PREFILL_XLA_FORMS = {
    "einsum, float32": whole_matrix,
    "einsum, as stored": functools.partial(whole_matrix, dtype=None),
}


def with_gradients(attention):
    """(q, k, v, cotangents of out and lse) -> out, lse and the gradients of q, k and v."""

    def f(q, k, v, cotangents):
        results, backward = jax.vjp(attention, q, k, v)
        return results, backward(cotangents)

    return f


def prefill_bytes(attention, t: int, h: int, dtype) -> int:
    """The most that forward and backward hold at once beside their arguments: results and temporaries."""
    q, v = (jax.ShapeDtypeStruct((1, t, h, width), dtype) for width in (KEY, VALUE))
    cotangents = v, jax.ShapeDtypeStruct((1, t, h), jnp.float32)
    memory = jax.jit(with_gradients(attention)).lower(q, q, v, cotangents).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def print_memory():
    print(f"{'mla_prefill + gradients':26} {'arguments MiB':>13} {'ours MiB':>9} {'einsum MiB':>10}")
    for dtype in (jnp.float32, jnp.bfloat16):
        for t in (1024, 2048, 4096, 8192):
            ours, theirs = (prefill_bytes(f, t, 16, dtype) / 2**20 for f in (prefill, whole_matrix))
            arguments = t * 16 * 2 * (KEY + VALUE) * jnp.dtype(dtype).itemsize / 2**20
            name = f"{jnp.dtype(dtype).name} b1 s{t} h16"
            print(f"{name:26} {arguments:13.0f} {ours:9.0f} {theirs:10.0f}")


if __name__ == "__main__":
    print_memory() if "--memory" in sys.argv else common.main("mla", rows)
