"""fp8_linear, forward and backward, against the plain linear in bfloat16 and in float32; and the memory of a layer.

`python -m benchmarks.linear --memory` prints what the forward and backward pass of one layer with a frozen FP8 weight
needs at most, ours beside the plain version that dequantises the weight first: XLA's own account of both programs, in
which the few MiB a thread that our kernels work in do not appear.
"""

import sys

import jax
import jax.numpy as jnp

import jaxkern
from benchmarks import common

BF16, F32 = jnp.bfloat16, jnp.float32


def rows(quick: bool):
    for n, k in ((2048, 2048),) if quick else ((2048, 2048), (4096, 7168)):
        for m in (256,) if quick else (16, 256, 1024):
            x, w, g = common.normal((m, k), BF16), common.normal((n, k), seed=1), common.normal((m, n), BF16, seed=2)
            yield common.compare(
                "fp8_linear + gradients",
                f"{m}x{n}x{k}",
                with_gradients(jaxkern.fp8_linear),
                {"bf16": with_gradients(plain_in(BF16)), "f32": with_gradients(plain_in(F32))},
                (x, w, g),
                flops=6 * m * n * k,
                bytes=common.nbytes(x, w, g) + common.nbytes(x, w, g),
            )


def plain_in(dtype):
    """The linear that multiplies in `dtype`, as fp8_linear multiplies in FP8."""
    return lambda x, w: jnp.einsum("mk,nk->mn", x.astype(dtype), w.astype(dtype)).astype(x.dtype)


def dequantised(x, w):
    return plain_in(BF16)(x, jaxkern.dequantize(w, BF16, implementation="xla"))


def with_gradients(linear):
    """(x, w, g) -> the product and the gradients of x and w for the cotangent g."""

    def f(x, w, g):
        out, backward = jax.vjp(linear, x, w)
        return out, *backward(g)

    return f


def layer_bytes(linear, m: int, n: int, k: int) -> int:
    """The most that forward and backward of a layer hold at once beside its arguments: results and temporaries."""

    def f(x, w, g):
        out, backward = jax.vjp(lambda x: linear(x, w), x)
        return out, *backward(g)

    w = jaxkern.ScaledArray(
        jax.ShapeDtypeStruct((n, k), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((-(-n // 128), -(-k // 128)), F32),
        (128, 128),
    )
    x, g = jax.ShapeDtypeStruct((m, k), BF16), jax.ShapeDtypeStruct((m, n), BF16)
    memory = jax.jit(f).lower(x, w, g).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def print_memory():
    print(f"{'layer':18} {'weight MiB':>10} {'ours MiB':>9} {'plain MiB':>9}")
    for m, n, k in ((16, 4096, 7168), (256, 4096, 7168), (256, 7168, 2048)):
        ours, theirs = (layer_bytes(linear, m, n, k) / 2**20 for linear in (jaxkern.fp8_linear, dequantised))
        print(f"{f'{m}x{n}x{k}':18} {n * k / 2**20:10.1f} {ours:9.1f} {theirs:9.1f}")


if __name__ == "__main__":
    print_memory() if "--memory" in sys.argv else common.main("linear", rows)
