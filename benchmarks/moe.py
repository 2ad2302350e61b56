"""route, dispatch, combine and the whole expert layer against plain XLA: argsort and take, segment_sum, ragged_dot.

`python -m benchmarks.moe --scaling` prints how time and memory of dispatch + combine grow with the tokens.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxkern
from benchmarks import common

BF16, F32 = jnp.bfloat16, jnp.float32


def rows(quick: bool):
    shapes = ((1024, 512, 16, 4),) if quick else ((256, 2048, 64, 8), (4096, 2048, 64, 8), (1024, 512, 16, 4))
    for tokens, hidden, experts, top_k in shapes:
        yield _route(tokens, max(experts, 64), top_k)
        for dtype in (F32, BF16):
            yield _dispatch_combine(tokens, hidden, experts, top_k, dtype, bar=3 if tokens == 4096 else None)
    for tokens, bar in ((256, 8),) if quick else ((256, 8), (4096, 5)):
        yield _layer(tokens, 1024, 512, 16, 4, "fp8", bar)
        yield _layer(tokens, 1024, 512, 16, 4, "bfloat16", None)


def _route(tokens, experts, top_k):
    logits, bias = common.normal((tokens, experts)), common.normal((experts,))
    options = {"top_k": top_k, "num_groups": 8, "topk_groups": 4}
    return common.compare(
        "route",
        f"t={tokens} e={experts} k={top_k}",
        lambda *a: jaxkern.route(*a, **options),
        lambda *a: jaxkern.route(*a, **options, implementation="xla"),
        (logits, bias),
        flops=tokens * experts * top_k,
        bytes=common.nbytes(logits, bias) + tokens * top_k * 8,
    )


def _skewed_routing(tokens, experts, top_k):
    """Distinct experts a token, the popular ones ten times as likely as the others."""
    rng = np.random.default_rng(0)
    keys = rng.gumbel(size=(tokens, experts)) + np.linspace(np.log(10), 0, experts)
    ids = np.argsort(-keys, axis=1)[:, :top_k].astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(rng.random((tokens, top_k)), F32)


def _dispatch_combine(tokens, hidden, experts, top_k, dtype, bar):
    x = common.normal((tokens, hidden), dtype)
    ids, weights = _skewed_routing(tokens, experts, top_k)

    # Both read and write every assignment's row twice, and the tokens once.
    moved = 2 * (top_k + 1) * common.nbytes(x)
    return common.compare(
        f"dispatch + combine {jnp.dtype(dtype).name}",
        f"t={tokens} h={hidden} e={experts} k={top_k}",
        functools.partial(_our_pair, experts=experts),
        {
            "segment_sum": lambda *a: _xla_combine_by_segments(*_xla_dispatch(*a, experts), a),
            "inverse take": lambda *a: _xla_combine_by_take(*_xla_dispatch(*a, experts), a),
        },
        (x, ids, weights),
        flops=2 * tokens * top_k * hidden,
        bytes=moved,
        bar=bar,
    )


def _our_pair(x, ids, weights, *, experts):
    received, handle = jaxkern.dispatch(x, ids, weights, num_experts=experts)
    return jaxkern.combine(received, handle)


def _xla_dispatch(x, ids, weights, experts):
    order = jnp.argsort(ids.reshape(-1), stable=True)
    return x[order // ids.shape[1]], jnp.bincount(ids.reshape(-1), length=experts), order


def _xla_combine_by_segments(rows, _, order, arrays):
    x, ids, weights = arrays
    scaled = rows * weights.reshape(-1)[order][:, None]
    return jax.ops.segment_sum(scaled, order // ids.shape[1], num_segments=x.shape[0]).astype(x.dtype)


def _xla_combine_by_take(rows, _, order, arrays):
    x, ids, weights = arrays
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    return jnp.einsum("tkh,tk->th", rows[back].reshape(*ids.shape, -1), weights).astype(x.dtype)


def _layer(tokens, hidden, width, experts, top_k, stored, bar):
    """The whole layer with its shared expert. XLA multiplies in float32, or in bfloat16 if that is what is stored."""
    x = common.normal((tokens, hidden), BF16)
    router, bias = common.normal((experts, hidden)) / hidden**0.5, jnp.linspace(0.1, 0, experts)  # skewed
    dtypes = {"fp8": [F32], "bfloat16": [F32, BF16]}[stored]

    def weights(*lead):
        pair = (2 * width, hidden), (hidden, width)
        return [(common.normal((*lead, *shape), seed=s) / 20).astype(dtypes[-1]) for s, shape in enumerate(pair)]

    ours = plain = [weights(experts), weights()]
    if stored == "fp8":
        ours = [[jaxkern.quantize(w, (128, 128)) for w in pair] for pair in plain]
    transposed = [[w.swapaxes(-1, -2) for w in pair] for pair in plain]  # as ragged_dot is fastest
    choice = {"top_k": top_k, "num_groups": 4, "topk_groups": 2, "scale": 2.5}
    # Each assignment's three products, and the shared expert's three.
    flops = 6 * tokens * (top_k + 1) * hidden * width
    return common.compare(
        f"MoE layer {stored}",
        f"t={tokens} h={hidden} i={width} e={experts} k={top_k}",
        functools.partial(_our_layer, choice=choice),
        {
            f"ragged_dot, {jnp.dtype(dtype).name}": functools.partial(_xla_layer, choice=choice, dtype=dtype)
            for dtype in dtypes
        },
        (x, router, bias, *ours),
        xla_args=(x, router, bias, *transposed),
        flops=flops,
        bytes=common.nbytes(x, router, ours) + common.nbytes(x),
        bar=bar,
    )


def _our_layer(x, router, bias, routed, shared, *, choice):
    def mlp(x, weights, group_sizes=None):
        groups = () if group_sizes is None else (group_sizes,)
        product = jaxkern.grouped_gemm if groups else jaxkern.gemm
        gate_up, down = weights
        if not isinstance(down, jaxkern.ScaledArray):
            gate, up = jnp.split(product(x, gate_up, *groups, out_dtype=BF16), 2, axis=-1)
            return product(jax.nn.silu(gate) * up, down, *groups, out_dtype=BF16)
        x = x if isinstance(x, jaxkern.ScaledArray) else jaxkern.quantize(x, (1, 128))
        gate_up = product(x, gate_up, *groups, out_dtype=BF16)
        return product(jaxkern.swiglu_quantize(gate_up), down, *groups, out_dtype=BF16)

    ids, weights = jaxkern.route(jaxkern.gemm(x.astype(F32), router), bias, **choice)
    quantize = "fp8" if isinstance(routed[0], jaxkern.ScaledArray) else None
    received, handle = jaxkern.dispatch(x, ids, weights, num_experts=len(bias), quantize=quantize)
    return jaxkern.combine(mlp(received, routed, handle.group_sizes), handle, bias=mlp(x, shared))


def _xla_layer(x, router, bias, routed, shared, *, choice, dtype):
    def mlp(product, x, weights):
        gate_up, down = (w.astype(dtype) for w in weights)
        gate, up = jnp.split(product(x.astype(dtype), gate_up), 2, axis=-1)
        return product(jax.nn.silu(gate) * up, down)

    logits = x.astype(F32) @ router.T
    ids, weights = jaxkern.route(logits, bias, **choice, implementation="xla")
    received, sizes, order = _xla_dispatch(x, ids, weights, len(bias))
    y = mlp(lambda a, b: jax.lax.ragged_dot(a, b, sizes), received, routed)
    return _xla_combine_by_take(y, sizes, order, (x, ids, weights)) + mlp(jnp.matmul, x, shared).astype(x.dtype)


def print_scaling():
    """What dispatch + combine take of time and memory for more and more tokens; XLA's own account of the memory."""
    hidden, experts, top_k = 2048, 64, 8
    print(f"dispatch + combine, bfloat16, h={hidden} e={experts} k={top_k}")
    print(f"{'tokens':>8} {'ms':>8} {'us a token':>11} {'MiB':>8} {'KiB a token':>12}")
    for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        arrays = common.normal((tokens, hidden), BF16), *_skewed_routing(tokens, experts, top_k)
        compiled = jax.jit(functools.partial(_our_pair, experts=experts)).lower(*arrays).compile()
        (ms,) = common.medians([lambda f=compiled, a=arrays: jax.block_until_ready(f(*a))], 0.5)
        memory = compiled.memory_analysis()
        size = memory.temp_size_in_bytes + memory.output_size_in_bytes
        print(f"{tokens:8} {ms:8.2f} {ms * 1e3 / tokens:11.2f} {size / 2**20:8.0f} {size / 2**10 / tokens:12.1f}")


if __name__ == "__main__":
    print_scaling() if "--scaling" in sys.argv else common.main("moe", rows)
