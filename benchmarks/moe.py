"""route, dispatch, combine and the whole expert layer against plain XLA: argsort and take, segment_sum, ragged_dot."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxkern
from benchmarks import common

F32 = jnp.float32


def rows(quick: bool):
    shapes = ((1024, 512, 16, 4),) if quick else ((256, 2048, 64, 8), (4096, 2048, 64, 8), (1024, 512, 16, 4))
    for tokens, hidden, experts, top_k in shapes:
        yield _route(tokens, max(experts, 64), top_k)
        yield _dispatch_combine(tokens, hidden, experts, top_k)
    for tokens in (256,) if quick else (256, 1024):
        yield _layer(tokens, 512, 512, 16, 4)


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


def _dispatch_combine(tokens, hidden, experts, top_k):
    x = common.normal((tokens, hidden))
    ids, weights = _skewed_routing(tokens, experts, top_k)

    def ours(x, ids, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, num_experts=experts)
        return jaxkern.combine(received, handle)

    # Both read and write every assignment's row twice, and the tokens once.
    moved = 2 * tokens * top_k * hidden * 4 + 2 * common.nbytes(x)
    return common.compare(
        "dispatch + combine",
        f"t={tokens} h={hidden} e={experts} k={top_k}",
        ours,
        {
            "segment_sum": lambda *a: _xla_combine_by_segments(*_xla_dispatch(*a, experts), a),
            "inverse take": lambda *a: _xla_combine_by_take(*_xla_dispatch(*a, experts), a),
        },
        (x, ids, weights),
        flops=2 * tokens * top_k * hidden,
        bytes=moved,
    )


def _xla_dispatch(x, ids, weights, experts):
    order = jnp.argsort(ids.reshape(-1), stable=True)
    return x[order // ids.shape[1]], jnp.bincount(ids.reshape(-1), length=experts), order


def _xla_combine_by_segments(rows, _, order, arrays):
    x, ids, weights = arrays
    scaled = rows * weights.reshape(-1)[order][:, None]
    return jax.ops.segment_sum(scaled, order // ids.shape[1], num_segments=x.shape[0])


def _xla_combine_by_take(rows, _, order, arrays):
    x, ids, weights = arrays
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    return jnp.einsum("tkh,tk->th", rows[back].reshape(*ids.shape, -1), weights)


def _layer(tokens, hidden, width, experts, top_k):
    x = common.normal((tokens, hidden))
    ids, weights = _skewed_routing(tokens, experts, top_k)
    gate, up = (common.normal((experts, width, hidden), seed=s) / 20 for s in (1, 2))
    down = common.normal((experts, hidden, width), seed=3) / 20

    def ours(x, ids, weights, gate, up, down):
        received, handle = jaxkern.dispatch(x, ids, weights, num_experts=experts)

        def product(a, b):
            return jaxkern.grouped_gemm(a, b, handle.group_sizes)

        y = product(jax.nn.silu(product(received, gate)) * product(received, up), down)
        return jaxkern.combine(y, handle)

    def xla(x, ids, weights, gate, up, down):
        received, sizes, order = _xla_dispatch(x, ids, weights, experts)

        def product(a, b):
            return jax.lax.ragged_dot(a, b, sizes)

        y = product(jax.nn.silu(product(received, gate)) * product(received, up), down)
        return _xla_combine_by_take(y, sizes, order, (x, ids, weights))

    arrays = (x, ids, weights, gate, up, down)
    return common.compare(
        "expert layer f32",
        f"t={tokens} h={hidden} i={width} e={experts} k={top_k}",
        ours,
        {"ragged_dot": xla},
        arrays,
        flops=6 * tokens * top_k * hidden * width,
        bytes=common.nbytes(arrays) + common.nbytes(x),
        xla_args=(x, ids, weights, *(w.swapaxes(1, 2) for w in (gate, up, down))),
    )


if __name__ == "__main__":
    common.main("moe", rows)
