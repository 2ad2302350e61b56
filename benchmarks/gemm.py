"""gemm and grouped_gemm against einsum and ragged_dot."""

import jax
import jax.numpy as jnp

import jaxkern
from benchmarks import common

BF16, F32 = jnp.bfloat16, jnp.float32


def rows(quick: bool):
    for n, k in ((2048, 2048),) if quick else ((2048, 2048), (7168, 2048), (4096, 7168)):
        for m in (1, 16, 256) if quick else (1, 16, 64, 256, 1024):
            yield from _dense(m, n, k)
    for g, n, k in ((16, 1024, 1024),) if quick else ((16, 1024, 1024), (64, 2048, 1408)):
        for m in (64, 1024):
            yield from _grouped(m, n, k, g)


def _product(a, b):
    return jnp.einsum("mk,nk->mn", a, b)


def _product_upcast(a, b):
    return _product(a.astype(F32), b.astype(F32)).astype(a.dtype)


def _dense(m, n, k):
    a, b = common.normal((m, k)), common.normal((n, k), seed=1)
    a16, b16 = a.astype(BF16), b.astype(BF16)
    a8, b8 = jaxkern.quantize(a), jaxkern.quantize(b, (128, 128))
    shape, flops = f"{m}x{n}x{k}", 2 * m * n * k
    kinds = {
        "f32": ((a, b), (a, b), {"einsum": _product}),
        "bf16": ((a16, b16), (a16, b16), {"einsum": _product, "einsum f32": _product_upcast}),
        "bf16 x fp8": ((a16, b8), (a, b), {"einsum f32": _product}),
        "fp8 x fp8": ((a8, b8), (a, b), {"einsum f32": _product}),
    }
    for kind, (ours, theirs, forms) in kinds.items():
        out = m * n * (4 if kind == "f32" else 2)
        yield common.compare(
            f"gemm {kind}",
            shape,
            jaxkern.gemm,
            forms,
            ours,
            flops=flops,
            bytes=common.nbytes(ours) + out,
            xla_args=theirs,
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
    kinds = {"f32": (a, b), "bf16 x fp8": (a.astype(BF16), b8), "fp8 x fp8": (jaxkern.quantize(a), b8)}
    for kind, (x, w) in kinds.items():
        yield common.compare(
            f"grouped_gemm {kind}",
            f"{m}x{n}x{k} g={g}",
            jaxkern.grouped_gemm,
            {"ragged_dot": jax.lax.ragged_dot},
            (x, w, sizes),
            flops=2 * m * n * k,
            bytes=common.nbytes(x) + common.nbytes(w) * used // g + m * n * (4 if kind == "f32" else 2),
            xla_args=(a, b_kn, sizes),
        )


if __name__ == "__main__":
    common.main("gemm", rows)
