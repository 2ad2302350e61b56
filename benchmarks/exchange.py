"""dispatch and combine over the GPUs of one host: `python -m benchmarks.exchange [--json FILE]`.

DeepEP's measurement: 4096 and 128 tokens a rank, hidden 7168, 8 of 256 experts, FP8 there and bfloat16 back; each
transport, beside an all-gather of the tokens and a reduce-scatter of their sums, which is what plain JAX would do.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxkern

HIDDEN, EXPERTS, TOP_K = 7168, 256, 8
FORWARD, BACK = HIDDEN + HIDDEN // 128 * 4 + 12 * TOP_K, 2 * HIDDEN + 4 * TOP_K  # bytes of a row as DeepEP counts them
CALLS, SAMPLES = 10, 7


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="where to leave the rows")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 128])
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        parser.error(f"this needs GPUs, JAX has {device.platform} devices; benchmarks.moe measures a CPU")
    mesh = jax.make_mesh((jax.device_count(),), ("expert",))
    print(f"{mesh.size} x {device.device_kind}, JAX {jax.__version__}")
    rows = [row for tokens in options.tokens for skewed in (False, True) for row in measure(mesh, tokens, skewed)]
    if options.json:
        machine = {"devices": mesh.size, "device": device.device_kind, "jax": jax.__version__}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def measure(mesh, tokens, skewed):
    ranks = mesh.size
    rng = np.random.default_rng(0)
    popularity = np.linspace(np.log(10), 0, EXPERTS) if skewed else 0
    keys = rng.gumbel(size=(ranks * tokens, EXPERTS)) + popularity
    ids = np.argpartition(-keys, TOP_K, axis=1)[:, :TOP_K].astype(np.int32)
    received = sum((ids * ranks // EXPERTS == rank).any(1).sum() for rank in range(ranks)) / ranks
    split = jax.NamedSharding(mesh, P("expert"))
    x = jax.device_put(rng.standard_normal((ranks * tokens, HIDDEN)).astype(jnp.bfloat16), split)
    ids, weights = (jax.device_put(a, split) for a in (ids, rng.random(ids.shape, np.float32)))
    shape = f"{tokens} tokens a rank, {'skewed' if skewed else 'even'}"

    def over(f):
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))

    found = []
    for transport in ("gather", "all_to_all", "ragged"):
        how = {"num_experts": EXPERTS, "axis_name": "expert", "layout": "rank", "transport": transport}

        def send(x, ids, weights, how=how):
            return jaxkern.dispatch(x, ids, weights, quantize="fp8", **how)

        def back(y, handle):
            return jaxkern.combine(y, handle, wire_dtype=jnp.bfloat16)

        _, handle = over(send)(x, ids, weights)
        y = over(lambda x, ids, weights, how=how: jaxkern.dispatch(x, ids, weights, **how)[0])(x, ids, weights)
        for name, f, arrays, size in (
            ("dispatch", over(lambda *a, send=send: send(*a)[0]), (x, ids, weights), FORWARD),
            ("combine", over(back), (y, handle), BACK),
        ):
            found.append(row(f"{name}, {transport}", shape, f, arrays, received * size))
    gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    whole = over(gather)(x)
    scatter = functools.partial(jax.lax.psum_scatter, axis_name="expert", tiled=True)
    found.append(row("plain all_gather", shape, over(gather), (x,), ranks * tokens * 2 * HIDDEN))
    found.append(row("plain psum_scatter", shape, over(scatter), (whole,), ranks * tokens * 2 * HIDDEN))
    return found


def row(name, shape, f, arrays, size):
    """Median time of a call, many in flight, and the bytes that a rank receives in it, its own share included."""
    jax.block_until_ready([f(*arrays) for _ in range(2)])
    times = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        jax.block_until_ready([f(*arrays) for _ in range(CALLS)][-1])
        times.append((time.perf_counter() - start) / CALLS)
    seconds = statistics.median(times)
    print(f"{name:24} {shape:32} {seconds * 1e6:10.1f} us {size / seconds / 1e9:8.1f} GB/s", flush=True)
    return {"name": name, "shape": shape, "us": seconds * 1e6, "gbytes": size / seconds / 1e9}


if __name__ == "__main__":
    main()
