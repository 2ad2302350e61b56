"""The matrix products against XLA's best form of each in float32: einsum, ragged_dot, and einsum of a batch.

Rows of gemm and grouped_gemm have the gain that they must reach (`bar`).
"""

import functools

import jax
import jax.numpy as jnp

import jaxkern
from benchmarks import common

BF16 = jnp.bfloat16
DENSE = ((2112, 7168), (7168, 2048), (4096, 7168), (24576, 1536))  # n, k
GROUPED = ((16, 1024, 1024), (64, 2048, 1408))  # g, n, k
SWEEP = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 4096)
FP8_BARS = {1: 2.5, 16: 2.5, 256: 1.2}  # by m; at any other, never slower
BF16_BARS = {1: 2.0, 256: 0.9}
GROUPED_BARS = {64: 20.0, 1024: 10.0}


def rows(quick: bool):
    for n, k in ((2048, 2048),) if quick else DENSE:
        yield from _dense(n, k, tuple(FP8_BARS) if quick else SWEEP)
    for g, n, k in GROUPED[:1] if quick else GROUPED:
        for m in GROUPED_BARS:
            yield from _grouped(m, n, k, g)
        yield _masked(g, 32, n, k, filled=8)
        yield _k_grouped(g, 128, n, k)


def _product(a, b):
    return jnp.einsum("mk,nk->mn", a, b)


def _dense(n, k, sweep):
    b = common.normal((n, k), seed=1)
    b8, b16 = jaxkern.quantize(b, (128, 128)), b.astype(BF16)
    for m in sweep:
        a = common.normal((m, k))
        kinds = {"fp8 x fp8": (jaxkern.quantize(a), b8)}
        if m in FP8_BARS:
            kinds["bf16 x fp8"] = (a.astype(BF16), b8)
        if m in BF16_BARS:
            kinds["bf16"] = (a.astype(BF16), b16)
        for kind, ours in kinds.items():
            yield common.compare(
                f"gemm {kind}",
                f"{m}x{n}x{k}",
                jaxkern.gemm,
                {"einsum f32": _product},
                ours,
                flops=2 * m * n * k,
                bytes=common.nbytes(ours) + m * n * 2,
                xla_args=(a, b),
                bar=BF16_BARS[m] if kind == "bf16" else FP8_BARS.get(m, 1.0),
                seconds=0.6 if m in FP8_BARS else 0.2,
            )


def _grouped(m, n, k, g):
    a, b = common.normal((m, k)), common.normal((g, n, k), seed=1)
    # Two groups without rows, the others of different sizes.
    sizes = [0, 0] + [1 + i % 3 for i in range(g - 2)]
    sizes = [s * m // sum(sizes) for s in sizes]
    sizes[-1] += m - sum(sizes)
    sizes = jnp.asarray(sizes, jnp.int32)
    b8 = jaxkern.quantize(b, (128, 128))
    used = int((sizes > 0).sum())
    b_kn = jax.block_until_ready(b.swapaxes(1, 2))
    for kind, x in {"bf16 x fp8": a.astype(BF16), "fp8 x fp8": jaxkern.quantize(a)}.items():
        yield common.compare(
            f"grouped_gemm {kind}",
            f"{m}x{n}x{k} g={g}",
            jaxkern.grouped_gemm,
            {"ragged_dot": jax.lax.ragged_dot},
            (x, b8, sizes),
            flops=2 * m * n * k,
            bytes=common.nbytes(x) + common.nbytes(b8) * used // g + m * n * 2,
            xla_args=(a, b_kn, sizes),
            bar=GROUPED_BARS[m],
        )


def _masked(g, capacity, n, k, filled):
    """Slabs of a fixed capacity, a quarter filled; XLA computes all of them."""
    a, b = common.normal((g, capacity, k)), common.normal((g, n, k), seed=1)
    a8, b8 = jaxkern.quantize(a), jaxkern.quantize(b, (128, 128))
    return common.compare(
        "masked_grouped_gemm fp8 x fp8",
        f"{filled}/{capacity}x{n}x{k} g={g}",
        jaxkern.masked_grouped_gemm,
        {"einsum f32": lambda a, b, _: jnp.einsum("gmk,gnk->gmn", a, b)},
        (a8, b8, jnp.full(g, filled, jnp.int32)),
        flops=2 * g * filled * n * k,
        bytes=common.nbytes(a8) * filled // capacity + common.nbytes(b8) + g * capacity * n * 2,
        xla_args=(a, b, None),
    )


def _k_grouped(g, rows, n, k):
    """The weight gradient; groups of one size, so that XLA's can be a batch."""
    a, b = common.normal((g * rows, n)), common.normal((g * rows, k), seed=1)
    a8, b8 = jaxkern.quantize_along_tokens(a), jaxkern.quantize_along_tokens(b)

    def batched(a, b, _):
        return jnp.einsum("gtm,gtn->gmn", a.reshape(g, rows, n), b.reshape(g, rows, k))

    return common.compare(
        "k_grouped_gemm fp8 x fp8",
        f"{g}x{rows}x{n}x{k}",
        functools.partial(jaxkern.k_grouped_gemm, group_alignment=128),
        {"einsum f32": batched},
        (a8, b8, jnp.full(g, rows, jnp.int32)),
        flops=2 * g * rows * n * k,
        bytes=common.nbytes(a8, b8) + g * n * k * 4,
        xla_args=(a, b, None),
    )


if __name__ == "__main__":
    common.main("gemm", rows)
