"""How every benchmark measures: our op and XLA's best form, interleaved in one process on the same random data.

A family is one file with a generator `rows(quick)` that yields what `compare` returns:

    def rows(quick):
        a, b = common.normal((16, 2048)), common.normal((2048, 2048))
        yield common.compare("gemm f32", "16x2048x2048", jaxkern.gemm, lambda a, b: a @ b.T, (a, b),
                             flops=2 * 16 * 2048 * 2048, bytes=common.nbytes(a, b))

    if __name__ == "__main__":
        common.main("gemm", rows)
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi

TURN = 0.02  # seconds


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. Times are medians in milliseconds; ratio is XLA's time over ours, so more is better.

    bytes: what the op must read and write once; flops: what it must compute. Their rates are given as fractions of
    what this machine's memory copies and of what its float32 matrix product reaches.
    """

    name: str
    shape: str
    ours_ms: float
    xla_ms: float
    xla_form: str
    ratio: float
    bytes: int
    flops: int
    copy_fraction: float
    matrix_fraction: float
    bar: float | None = None  # the ratio that the row must reach


def compare(
    name: str,
    shape: str,
    ours: Callable,
    xla: Callable | Mapping[str, Callable],
    args: tuple,
    *,
    flops: float,
    bytes: float,
    xla_args: tuple | None = None,
    bar: float | None = None,
    seconds: float = 0.6,
) -> Row:
    """Times `ours(*args)` against `xla(*xla_args or *args)`, both jitted.

    xla: one function, or several by label: the fastest counts.
    bar: the ratio that the row must reach, if one is set.
    seconds: about how long to measure each function.
    """
    forms = dict(xla) if isinstance(xla, Mapping) else {"xla": xla}
    args, xla_args = _on_device(args), _on_device(args if xla_args is None else xla_args)
    timed = [_caller(ours, args)] + [_caller(f, xla_args) for f in forms.values()]
    ours_ms, *xla_ms = medians(timed, seconds)
    best = min(range(len(xla_ms)), key=xla_ms.__getitem__)
    return row(name, shape, ours_ms, xla_ms[best], list(forms)[best], bytes=bytes, flops=flops, bar=bar)


def row(
    name: str, shape: str, ours_ms: float, xla_ms: float, xla_form: str, *, bytes: float, flops: float, bar=None
) -> Row:
    """What was timed, with the ratio and the rates that follow."""
    return Row(
        name=name,
        shape=shape,
        ours_ms=ours_ms,
        xla_ms=xla_ms,
        xla_form=xla_form,
        ratio=xla_ms / ours_ms,
        bytes=int(bytes),
        flops=int(flops),
        copy_fraction=bytes / (ours_ms * 1e-3) / machine()["copy_bytes_per_s"],
        matrix_fraction=flops / (ours_ms * 1e-3) / machine()["matrix_flops_per_s"],
        bar=bar,
    )


def medians(timed: list[Callable[[], object]], seconds: float) -> list[float]:
    """The median time of each function in milliseconds, the functions taking turns.

    Between two runs something large is read, by all cores: operands come from memory, as the weights and caches of a
    model do, and no core of a virtual machine sleeps, which would have two threads share one for milliseconds. A turn's
    first TURN seconds are not timed: XLA's threads go on freeing the temporaries of the large program before.
    """
    times = [[] for _ in timed]
    for f in timed:
        f()
        f()
    start = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - start < seconds * len(timed):
        for f, t in zip(timed, times, strict=True):
            take_turn(f)
            t += take_turn(f)
    return [statistics.median(t) * 1e3 for t in times]


def take_turn(f: Callable[[], object]) -> list[float]:
    """The seconds of each run of f for TURN seconds, one at least."""
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < TURN:
        read_other_memory()()
        begin = time.perf_counter()
        f()
        times.append(time.perf_counter() - begin)
    return times


@functools.cache
def read_other_memory() -> Callable[[], object]:
    """A function that reads more than any cache holds, a part on each core."""
    return _caller(lambda x: x.sum(1), (jnp.ones((512, 1 << 16)),))


@functools.cache
def machine() -> dict:
    """What this machine reaches, measured once: memory copy (bytes read + written) and float32 matrix product."""
    big = jnp.ones(1 << 26, jnp.float32)
    x = normal((2048, 2048))
    # In place, so that no fresh pages are counted.
    double = jax.jit(lambda v: v * 2.0, donate_argnums=0)
    held = [big]

    def copy():
        held[0] = jax.block_until_ready(double(held[0]))

    copy_ms, product_ms = medians([copy, _caller(lambda v: v @ v.T, (x,))], 0.5)
    return {
        "cpus": os.cpu_count(),
        "simd": _ffi.CPU.simd_level(),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "copy_bytes_per_s": 2 * big.size * 4 / (copy_ms * 1e-3),
        "matrix_flops_per_s": 2 * 2048**3 / (product_ms * 1e-3),
    }


def normal(shape: tuple[int, ...], dtype=jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def nbytes(*trees) -> int:
    """The bytes of all arrays in `trees`."""
    return sum(x.nbytes for x in jax.tree.leaves(trees))


def main(family: str, rows: Callable[[bool], Iterable[Row]], argv: list[str] | None = None) -> list[Row]:
    """The command line of one family: --quick, --json PATH."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{family}")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")
    options = parser.parse_args(argv)
    return run(family, rows, options.quick, options.json)


def run(family: str, rows: Callable[[bool], Iterable[Row]], quick: bool, path: pathlib.Path | None) -> list[Row]:
    speed = machine()
    print(
        f"{family}: {speed['cpus']} CPUs, {speed['simd']}, copy {speed['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"float32 product {speed['matrix_flops_per_s'] / 1e9:.0f} GFLOP/s"
    )
    columns = f"{'op':28} {'shape':26} {'ours ms':>9} {'xla ms':>9} {'ratio':>6} {'copy':>5} {'matrix':>6}"
    print(f"{columns}  {'bar':11} xla form")
    done = []
    for row in rows(quick):
        done.append(row)
        bar = "" if row.bar is None else f"{row.bar:4.1f} {'met' if row.ratio >= row.bar else 'missed'}"
        print(
            f"{row.name:28} {row.shape:26} {row.ours_ms:9.3f} {row.xla_ms:9.3f} {row.ratio:6.2f} "
            f"{row.copy_fraction:5.2f} {row.matrix_fraction:6.2f}  {bar:11} {row.xla_form}",
            flush=True,
        )
    bars = [row for row in done if row.bar is not None]
    if bars:
        print(f"{family}: {sum(row.ratio >= row.bar for row in bars)} of {len(bars)} bars met")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"family": family, "machine": speed, "rows": [dataclasses.asdict(row) for row in done]}
        path.write_text(json.dumps(record, indent=1) + "\n")
    return done


def _on_device(args: tuple) -> tuple:
    return jax.block_until_ready(jax.tree.map(jnp.asarray, args))


def _caller(f: Callable, args: tuple) -> Callable[[], object]:
    jitted = jax.jit(f)
    return lambda: jax.block_until_ready(jitted(*args))
