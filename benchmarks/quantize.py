"""quantize and dequantize against the same definition in plain JAX."""

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


if __name__ == "__main__":
    common.main("quantize", rows)
