"""quantize, dequantize, quantize_along_tokens and swiglu_quantize against the same definitions in plain JAX."""

import functools

import jax.numpy as jnp

import jaxkern
from benchmarks import common

BF16 = jnp.bfloat16


def rows(quick: bool):
    for m, k in ((1024, 2048),) if quick else ((16, 7168), (1024, 2048), (4096, 7168)):
        x = common.normal((m, k), BF16)
        for block_shape in ((1, 128), (128, 128)):
            a = jaxkern.quantize(x, block_shape)
            yield common.compare(
                f"quantize {block_shape[0]}x{block_shape[1]}",
                f"{m}x{k}",
                lambda x, block_shape=block_shape: jaxkern.quantize(x, block_shape),
                lambda x, block_shape=block_shape: jaxkern.quantize(x, block_shape, implementation="xla"),
                (x,),
                flops=3 * m * k,
                bytes=common.nbytes(x, a),
            )
            yield common.compare(
                f"dequantize {block_shape[0]}x{block_shape[1]}",
                f"{m}x{k}",
                lambda a: jaxkern.dequantize(a, BF16),
                lambda a: jaxkern.dequantize(a, BF16, implementation="xla"),
                (a,),
                flops=m * k,
                bytes=common.nbytes(x, a),
            )
        transposed = {"xla": lambda x: jaxkern.quantize(x.T, implementation="xla")}
        yield _against_xla("quantize_along_tokens", jaxkern.quantize_along_tokens, (x,), 3 * m * k, transposed)
        # Two groups without tokens, and two that share a block of 128 tokens of x.
        sizes = jnp.asarray([0, m // 3, 0, m - m // 3 - m // 5], jnp.int32)
        yield _against_xla("quantize_along_tokens g=4", jaxkern.quantize_along_tokens, (x, sizes), 3 * m * k)
    for m, i in ((1024, 2048),) if quick else ((16, 2048), (1024, 2048), (4096, 2048)):
        gate_up, weights = common.normal((m, 2 * i), BF16), common.normal((m,))
        yield _against_xla("swiglu_quantize", jaxkern.swiglu_quantize, (gate_up, weights), 12 * m * i)


def _against_xla(name, op, args, flops, forms=None):
    m, k = args[0].shape
    forms = forms or {"xla": functools.partial(op, implementation="xla")}
    return common.compare(name, f"{m}x{k}", op, forms, args, flops=flops, bytes=common.nbytes(args, op(*args)))


if __name__ == "__main__":
    common.main("quantize", rows)
