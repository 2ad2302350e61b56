"""What the Hopper kernels do on a Hopper GPU, in one run: `python -m benchmarks.gpu`.

First that they are right: the value tests on the device, and the conformance program of the hardware layer. Then how
fast they are, each against every alternative at hand. Without such a GPU it prints the plan (`--plan`).
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

# Before JAX takes most of the GPU's memory: the tests and torch need some too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental.layout import Format, Layout  # noqa: E402

import jaxkern  # noqa: E402
from benchmarks import common, kernels  # noqa: E402
from jaxkern import _ffi, moe  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"  # gpu.json, or gpu.<family>.json of a run of one
FAMILIES = (
    "gemm",
    "gemm_hopper",
    "quantize",
    "linear",
    "mla",
    "mla_hopper",
    "kv_cache",
    "moe",
    "moe_hopper",
    "contract",
)
TESTS = [f"tests/test_{name}.py" for name in FAMILIES]
THROUGH_KERNELS = "(cuda or hopper) and not (implementation or falls_back or without)"
CONFORMANCE = "tests/sim/conformance.cu"

HOPPER = "9.0"  # compute capability
FLUSH_BYTES = 1 << 30  # written before every call: past any L2, and long enough for the host to run ahead
INPUTS = 3  # sets of random inputs, in turn
SAMPLES = 25
UNTUNED = {"xla_gpu_autotune_level": 0}  # where a program's layouts and results are asked for, not its time
MOST_DIFFERENCE = 1e-3  # of `difference`, between our product and the dequantised one
BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to compute a case. `pick` takes its arguments from the case's tensors, for torch too."""

    run: Callable
    pick: Callable[[dict], tuple]
    fp8: bool = True  # its product runs at the FP8 rate, twice that of bfloat16
    torch: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    family: str
    name: str
    shape: str
    flops: int
    tensors: Callable[[int], dict]  # random, by seed
    forms: dict[str, Form]  # "ours" first
    plain: str  # the form whose result ours must be
    bytes: int | None = None  # what must be moved, where that is not all of its operands and results
    counted: Callable = lambda result: result  # what of a result must be right


@dataclasses.dataclass(frozen=True)
class Row:
    """One form of one case. gain, on ours alone: the best alternative's time over ours, so more is better."""

    name: str
    shape: str
    form: str
    us: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    copy_fraction: float | None = None
    matrix_fraction: float | None = None
    gain: float | None = None
    best_alternative: str | None = None
    difference: float | None = None
    skipped: str | None = None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--plan", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("--family", choices=["gemm", "grouped", "mla", "moe", "quantize"], help="time this one alone")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--no-tests", action="store_true", help="timings alone")
    parser.add_argument("--json", type=pathlib.Path, help="write the results to this file")
    parser.add_argument("--commit", action="store_true", help="write the results to benchmarks/results")
    options = parser.parse_args(argv)
    plan = cases(options.family, options.quick)

    why_not = why_no_hopper()
    if options.plan or why_not:
        if why_not:
            print(f"Nothing can be measured here: {why_not}. This is what would run on a Hopper GPU.")
        print_plan(plan, not options.no_tests)
        return 0

    record = {"machine": machine(), "checks": {}, "rows": []}
    if not options.no_tests:
        record["checks"] = {"value tests": value_tests(), "conformance": conformance()}
        for name, outcome in record["checks"].items():
            print(f"{name}: {outcome}")
    clock = Clock()
    record["machine"] |= speed(clock)
    print(json.dumps(record["machine"], indent=1))
    print_rows(heading=True)
    result = RESULTS / (f"gpu.{options.family}.json" if options.family else "gpu.json")
    for case in plan:
        rows = measure(case, clock, record["machine"])
        print_rows(rows)
        record["rows"] += map(dataclasses.asdict, rows)
        for path in [options.json] * bool(options.json) + [result] * options.commit:  # a run may be cut short
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")

    wrong = [f"{name}: {outcome}" for name, outcome in record["checks"].items() if outcome.startswith("failed")]
    wrong += [
        f"{row['name']} {row['shape']}: differs by {row['difference']:.2g}"
        for row in record["rows"]
        if row["difference"] is not None and not row["difference"] < MOST_DIFFERENCE
    ]
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


def why_no_hopper() -> str:
    try:
        found = jax.devices("cuda")
    except RuntimeError:
        return f"JAX {jax.__version__} sees no NVIDIA GPU"
    if found[0].compute_capability != HOPPER:
        return f"{found[0].device_kind} has compute capability {found[0].compute_capability}, and Hopper is {HOPPER}"
    return ""


# ---- what runs ----


def cases(family: str | None, quick: bool) -> list[Case]:
    found = []
    if family in (None, "gemm"):
        weights = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
        for n, k in weights[5:6] if quick else weights:
            found += [gemm_case(m, n, k) for m in ((64, 4096) if quick else (1, 16, 64, 128, 4096))]
    if family in (None, "grouped"):
        weights = [(4096, 7168)] if quick else [(4096, 7168), (7168, 2048)]
        for n, k in weights:
            found += [grouped_case(g, m, n, k) for g, m in ((4, 8192), (8, 4096), (32, 128), (32, 16), (8, 64))]
            found += [grouped_bf16_case(g, m, n, k) for g, m in ((8, 4096), (32, 128), (32, 16))]
            found += [masked_case(g, m, 4096, n, k) for g, m in ((6, 1024), (32, 192), (6, 20), (32, 20))]
            found += [k_grouped_case(g, m, n, k) for g, m in ((4, 8192), (8, 4096))]
            found += [k_grouped_bf16_case(g, m, n, k) for g, m in ((4, 8192), (8, 4096), (32, 128))]
    if family in (None, "mla"):
        lengths = [(128, 1, 128, 4096), (128, 1, 16, 4096)]
        if not quick:
            lengths += [
                (128, 1, 64, 4096),
                (128, 2, 128, 4096),
                (128, 1, 128, 8192),
                (16, 1, 16, 32768),
                (1, 1, 128, 32768),
            ]
        found += [mla_case(*size, varied=False) for size in lengths]
        found += [] if quick else [mla_case(128, 1, 128, 4096, varied=True), mla_case(128, 1, 16, 4096, varied=True)]
        packed = lengths[:2] if quick else [*lengths[:2], lengths[3], lengths[5]]
        found += [mla_case(*size, varied=False, cache="fp8") for size in packed]
        found += [] if quick else [mla_case(*size, varied=False, cache="fp16") for size in lengths[:2]]
        prefills = [(1, 4096, 128)] if quick else [(1, 4096, 128), (4, 1024, 128), (1, 16384, 16)]
        found += [prefill_case(*size, causal=True) for size in prefills]
        found += [] if quick else [prefill_case(*prefills[0], causal=False)]
        found += [prefill_case(*size, causal=True, gradients=True) for size in prefills[:2]]
    if family in (None, "moe"):
        for tokens in (4096,) if quick else (4096, 128):
            found += moe_cases(tokens, 7168, 256, 8)
    if family in (None, "quantize"):
        found += [quantize_case(4096, 7168, block_shape) for block_shape in ((1, 128), (128, 128))]
    return found


def gemm_case(m: int, n: int, k: int) -> Case:
    def tensors(seed):
        key_a, key_b = jax.random.split(jax.random.key(seed))
        return scaled_pair(jax.random.normal(key_a, (m, k), BF16), jax.random.normal(key_b, (n, k), BF16))

    def scaled(t):
        return t["a8"], t["b8"]

    def values(t):
        return t["a8"].values, t["b8"].values

    ours = functools.partial(jaxkern.gemm, implementation="cuda")
    return Case(
        "gemm",
        "gemm fp8 x fp8",
        f"{m}x{n}x{k}",
        2 * m * n * k,
        tensors,
        {
            "ours": Form(ours, scaled),
            "dequantise, bf16 dot": Form(dequantised(product), scaled, fp8=False),
            "jax.nn.scaled_matmul": Form(scaled_matmul, scaled),
            "XLA fp8 dot, no scales": Form(product, values),
            "XLA bf16 dot": Form(product, lambda t: (t["a"], t["b"]), fp8=False),
            "torch fp8, one scale": Form(torch_per_tensor, values, torch=True),
            "torch fp8, block scales": Form(torch_blocks, scaled, torch=True),
        },
        "dequantise, bf16 dot",
    )


# Groups of one size, so that a batched product is an alternative.


def grouped_case(groups: int, rows: int, n: int, k: int) -> Case:
    m = groups * rows

    def tensors(seed):
        key_a, key_b = jax.random.split(jax.random.key(seed))
        t = scaled_pair(jax.random.normal(key_a, (m, k), BF16), jax.random.normal(key_b, (groups, n, k), BF16))
        return t | {"b_kn": t["b"].swapaxes(1, 2), "sizes": jnp.full(groups, rows, jnp.int32)}

    def batched(a, b):
        return jnp.einsum("gmk,gnk->gmn", a.reshape(groups, rows, k), b).reshape(m, n)

    return Case(
        "grouped",
        "grouped_gemm fp8",
        f"{groups}x{rows}x{n}x{k}",
        2 * m * n * k,
        tensors,
        {
            "ours": Form(functools.partial(jaxkern.grouped_gemm, implementation="cuda"), scaled_groups),
            "dequantise, bf16 batched": Form(dequantised(batched), lambda t: (t["a8"], t["b8"]), fp8=False),
            "XLA bf16 batched": Form(batched, lambda t: (t["a"], t["b"]), fp8=False),
            "ragged_dot bf16": Form(jax.lax.ragged_dot, lambda t: (t["a"], t["b_kn"], t["sizes"]), fp8=False),
        },
        "dequantise, bf16 batched",
    )


def grouped_bf16_case(groups: int, rows: int, n: int, k: int) -> Case:
    m = groups * rows

    def tensors(seed):
        key_a, key_b = jax.random.split(jax.random.key(seed))
        b = jax.random.normal(key_b, (groups, n, k), BF16)
        sizes = jnp.full(groups, rows, jnp.int32)
        return {"a": jax.random.normal(key_a, (m, k), BF16), "b": b, "b_kn": b.swapaxes(1, 2), "sizes": sizes}

    def batched(a, b, _):
        return jnp.einsum("gmk,gnk->gmn", a.reshape(groups, rows, k), b).reshape(m, n)

    def plain(t):
        return t["a"], t["b"], t["sizes"]

    return Case(
        "grouped",
        "grouped_gemm bf16",
        f"{groups}x{rows}x{n}x{k}",
        2 * m * n * k,
        tensors,
        {
            "ours": Form(functools.partial(jaxkern.grouped_gemm, implementation="cuda"), plain, fp8=False),
            "XLA bf16 batched": Form(batched, plain, fp8=False),
            "ragged_dot bf16": Form(jax.lax.ragged_dot, lambda t: (t["a"], t["b_kn"], t["sizes"]), fp8=False),
        },
        "XLA bf16 batched",
    )


def masked_case(groups: int, rows: int, capacity: int, n: int, k: int) -> Case:
    """Without zero_gaps: as DeepGEMM, which leaves the other rows alone, and counting bytes as it does."""

    def tensors(seed):
        key_a, key_b = jax.random.split(jax.random.key(seed))
        a = jax.random.normal(key_a, (groups, capacity, k), BF16)
        filled = jnp.arange(capacity)[None, :, None] < rows
        t = scaled_pair(jnp.where(filled, a, 0), jax.random.normal(key_b, (groups, n, k), BF16))
        return t | {"sizes": jnp.full(groups, rows, jnp.int32)}

    def batched(a, b):
        return jnp.einsum("gmk,gnk->gmn", a, b)

    return Case(
        "grouped",
        "masked fp8",
        f"{groups}x{rows}/{capacity}x{n}x{k}",
        2 * groups * rows * n * k,
        tensors,
        {
            "ours": Form(
                functools.partial(jaxkern.masked_grouped_gemm, zero_gaps=False, implementation="cuda"), scaled_groups
            ),
            "dequantise, bf16 batched": Form(dequantised(batched), lambda t: (t["a8"], t["b8"]), fp8=False),
        },
        "dequantise, bf16 batched",
        groups * (rows * (k + k // 32 + 2 * n) + n * k),
        counted=lambda out: out[:, :rows],
    )


def k_grouped_case(groups: int, rows: int, m: int, n: int) -> Case:
    t = groups * rows

    def tensors(seed):
        key_a, key_b = jax.random.split(jax.random.key(seed))
        a, b = jax.random.normal(key_a, (m, t), BF16), jax.random.normal(key_b, (n, t), BF16)
        return scaled_pair(a, b, (1, 128)) | {"sizes": jnp.full(groups, rows, jnp.int32)}

    def batched(a, b):
        a, b = a.reshape(m, groups, rows), b.reshape(n, groups, rows)
        return jnp.einsum("mgt,ngt->gmn", a, b, preferred_element_type=jnp.float32)

    ours = functools.partial(jaxkern.k_grouped_gemm, group_alignment=128, implementation="cuda")
    return Case(
        "grouped",
        "k_grouped_gemm fp8",
        f"{groups}x{rows}x{m}x{n}",
        2 * t * m * n,
        tensors,
        {
            "ours": Form(ours, scaled_groups),
            "dequantise, bf16 batched": Form(dequantised(batched), lambda t: (t["a8"], t["b8"]), fp8=False),
            "XLA bf16 batched": Form(batched, lambda t: (t["a"], t["b"]), fp8=False),
        },
        "dequantise, bf16 batched",
    )


def k_grouped_bf16_case(groups: int, rows: int, m: int, n: int) -> Case:
    t = groups * rows

    def tensors(seed):
        key_a, key_b = jax.random.split(jax.random.key(seed))
        return {
            "a": jax.random.normal(key_a, (t, m), BF16),
            "b": jax.random.normal(key_b, (t, n), BF16),
            "sizes": jnp.full(groups, rows, jnp.int32),
        }

    def batched(a, b, _):
        a, b = a.reshape(groups, rows, m), b.reshape(groups, rows, n)
        return jnp.einsum("gtm,gtn->gmn", a, b, preferred_element_type=jnp.float32)

    along_rows = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])

    def ragged(a, b, sizes):
        return jax.lax.ragged_dot_general(a, b, sizes, along_rows, preferred_element_type=jnp.float32)

    def pick(t):
        return t["a"], t["b"], t["sizes"]

    return Case(
        "grouped",
        "k_grouped_gemm bf16",
        f"{groups}x{rows}x{m}x{n}",
        2 * t * m * n,
        tensors,
        {
            "ours": Form(functools.partial(jaxkern.k_grouped_gemm, implementation="cuda"), pick, fp8=False),
            "XLA bf16 batched": Form(batched, pick, fp8=False),
            "ragged_dot bf16": Form(ragged, pick, fp8=False),
        },
        "XLA bf16 batched",
    )


def mla_case(b: int, s: int, h: int, length: int, varied: bool, cache: str = "bf16") -> Case:
    """varied: lengths of a normal distribution around `length`, half as wide. Bytes are those of keys that count. q is
    bfloat16, but for a cache of float16."""
    page, d, latent = 64, 576, 512
    dtype = jnp.float16 if cache == "fp16" else BF16
    lengths = np.random.default_rng(0).normal(length, length / 2, b) if varied else np.full(b, length)
    lengths = np.clip(lengths, s, 2 * length).astype(np.int32)
    pages = -(-int(lengths.max()) // page)

    def tensors(seed):
        key_q, key_cache = jax.random.split(jax.random.key(seed))
        table = np.random.default_rng(seed).permutation(b * pages).reshape(b, pages)
        rows = jax.random.normal(key_cache, (b * pages, page, d), dtype) / 10
        return {
            "q": jnp.clip(jax.random.normal(key_q, (b, s, h, d), dtype), -1, 1),
            "cache": jax.jit(jaxkern.kv_cache.pack)(rows) if cache == "fp8" else rows,
            "table": jnp.asarray(table, jnp.int32),
            "lengths": jnp.asarray(lengths),
        }

    def ours(*args):
        return jaxkern.mla_decode(*args, softmax_scale=d**-0.55, implementation="cuda")[0]

    def einsums(q, pages, table, lengths):
        keys = pages[table].reshape(b, -1, pages.shape[-1])
        if cache == "fp8":
            keys = jaxkern.kv_cache.unpack(keys)
        logits = jnp.einsum("bshd,btd->bsht", q, keys, preferred_element_type=jnp.float32) * d**-0.55
        limits = lengths[:, None] - jnp.arange(s)[::-1]
        logits = jnp.where(jnp.arange(keys.shape[1]) < limits[:, :, None, None], logits, -jnp.inf)
        return jnp.einsum("bsht,btd->bshd", jax.nn.softmax(logits).astype(dtype), keys[..., :latent])

    def pick(t):
        return t["q"], t["cache"], t["table"], t["lengths"]

    keys = int(lengths.sum())
    return Case(
        "mla",
        f"mla_decode {cache}",
        f"b{b} s{s} h{h} {'~' if varied else ''}{length}",
        2 * s * h * keys * (d + latent),
        tensors,
        {"ours": Form(ours, pick, fp8=False), "gather, einsum": Form(einsums, pick, fp8=False)},
        "gather, einsum",
        keys * (jaxkern.kv_cache.row_bytes() if cache == "fp8" else 2 * d) + 2 * b * s * h * (d + latent),
    )


def prefill_case(b: int, t: int, h: int, causal: bool, gradients: bool = False) -> Case:
    dk, dv = 192, 128
    scale = dk**-0.5

    def tensors(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        widths = {"q": dk, "k": dk, "v": dv, "d_out": dv}
        return {
            name: jax.random.normal(key, (b, t, h, d), BF16)
            for key, (name, d) in zip(keys, widths.items(), strict=True)
        }

    def ours(q, k, v):
        return jaxkern.mla_prefill(q, k, v, softmax_scale=scale, causal=causal, implementation="cuda")[0]

    def einsums(q, k, v):
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
        if causal:
            logits = jnp.where(jnp.tri(t, dtype=bool), logits, -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits).astype(BF16), v)

    def cudnn(q, k, v):
        v = jnp.pad(v, [(0, 0)] * 3 + [(0, dk - dv)])  # it takes keys and values of one width
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation="cudnn")[..., :dv]

    def with_gradients(run):
        return lambda q, k, v, d_out: jax.vjp(run, q, k, v)[1](d_out)

    def form(run):
        names = ("q", "k", "v", "d_out") if gradients else ("q", "k", "v")
        return Form(with_gradients(run) if gradients else run, lambda x: tuple(x[name] for name in names), fp8=False)

    pairs = b * h * (t * (t + 1) // 2 if causal else t * t)
    return Case(
        "mla",
        "mla_prefill + gradients" if gradients else "mla_prefill",
        f"b{b} s{t} h{h}{' causal' if causal else ''}",
        2 * pairs * (dk + dv + gradients * (3 * dk + 2 * dv)),
        tensors,
        {"ours": form(ours), "einsum": form(einsums), "cuDNN, padded": form(cudnn)},
        "einsum",
    )


def scaled_pair(a, b, b_block=(128, 128)) -> dict:
    """Plain and scaled, by the reference: what is measured must not depend on another of our kernels."""
    a8, b8 = (jaxkern.quantize(x, block, implementation="xla") for x, block in ((a, (1, 128)), (b, b_block)))
    return {"a": a, "b": b, "a8": a8, "b8": b8}


def scaled_groups(t: dict) -> tuple:
    return t["a8"], t["b8"], t["sizes"]


def dequantised(run: Callable) -> Callable:
    return lambda *scaled: run(*(jaxkern.dequantize(x, BF16, implementation="xla") for x in scaled))


def quantize_case(m: int, k: int, block_shape: tuple[int, int]) -> Case:
    def form(implementation):
        run = functools.partial(jaxkern.quantize, block_shape=block_shape, implementation=implementation)
        return Form(run, lambda t: (t["x"],), fp8=False)

    return Case(
        "quantize",
        f"quantize {block_shape[0]}x{block_shape[1]}",
        f"{m}x{k}",
        3 * m * k,
        lambda seed: {"x": jax.random.normal(jax.random.key(seed), (m, k), BF16)},
        {"ours": form("cuda"), "XLA": form("xla")},
        "XLA",
    )


def moe_cases(tokens: int, hidden: int, experts: int, top_k: int) -> list[Case]:
    """Routing and the moves of rows on one device, with DeepEP's sizes; tokens draw distinct experts, evenly."""
    rows = tokens * top_k

    def tensors(seed, **arrays):
        random = np.random.default_rng(seed)
        ids = jnp.asarray(np.argsort(random.random((tokens, experts)), axis=1)[:, :top_k], jnp.int32)
        options = {"num_groups": experts, "rows": rows, "slabs": False, "alignment": 1}
        slots, source, *_ = _ffi.call(moe.ASSIGN_SLOTS, ids, implementation="xla", **options)
        shared = {"ids": ids, "slots": slots, "source": source, "none": jnp.zeros((0, 0))}
        shared["weights"] = jnp.asarray(random.random((tokens, top_k)), jnp.float32)
        shared["scores"] = jnp.asarray(random.random((tokens, experts)), jnp.float32)
        shared["bias"] = jnp.asarray(random.random(experts) / 4, jnp.float32)
        return shared | {name: jax.random.normal(jax.random.key(seed), shape, BF16) for name, shape in arrays.items()}

    def case(name, op, names, flops=0, plain=None, results=1, arrays=None, **options):
        def pick(t):
            return tuple(t[name] for name in names.split())

        def form(implementation):
            run = functools.partial(_ffi.call, op, implementation=implementation, **options)
            return Form(lambda *a: run(*a)[:results], pick, fp8=False)

        forms = {"ours": form("cuda"), "XLA": form("xla")}
        forms |= {label: Form(run, pick, fp8=False) for label, run in (plain or {}).items()}
        shape = f"t{tokens} h{hidden} e{experts} k{top_k}"
        return Case("moe", name, shape, flops, functools.partial(tensors, **(arrays or {})), forms, "XLA")

    def take(x, source, _):
        return (x[source // top_k],)

    def take_and_sum(y, slots, keys, weights, _):
        return (jnp.einsum("tkh,tk->th", y[slots].astype(jnp.float32), weights).astype(BF16),)

    x, y, assign = {"x": (tokens, hidden)}, {"y": (rows, hidden)}, {"slabs": False, "alignment": 1, "rows": rows}
    products = 2 * rows * hidden
    return [
        case("route", moe.ROUTE, "scores bias", num_groups=8, topk_groups=4, top_k=top_k),
        case("assign_slots", moe.ASSIGN_SLOTS, "ids", results=3, num_groups=experts, **assign),
        case(
            "gather_rows",
            moe.GATHER_ROWS,
            "x source none",
            plain={"take": take},
            arrays=x,
            top_k=top_k,
            weighted=False,
            zero_gaps=True,
        ),
        case(
            "gather_quantize_rows",
            moe.GATHER_QUANTIZE_ROWS,
            "x source slots",
            results=2,
            arrays=x,
            top_k=top_k,
            zero_gaps=True,
            scale_format="float32",
        ),
        case(
            "sum_rows",
            moe.SUM_ROWS,
            "y slots ids weights none",
            products,
            plain={"take, einsum": take_and_sum},
            arrays=y,
            num_keys=experts,
            out_dtype="bfloat16",
        ),
        case("dot_rows", moe.DOT_ROWS, "y slots x", products, arrays=x | y),
    ]


def product(a, b):
    contract_k = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, contract_k, preferred_element_type=BF16)


def scaled_matmul(a, b):
    b_scales = jnp.repeat(b.scales, 128, axis=0)[: b.shape[0]]
    arrays = (a.values, b.values, a.scales, b_scales)
    return jax.nn.scaled_matmul(*(x[None] for x in arrays), preferred_element_type=BF16)[0]


def torch_per_tensor(a, b):
    import torch

    one = torch_one()
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def torch_blocks(a, a_scales, b, b_scales):
    import torch

    return torch._scaled_mm(a, b.t(), scale_a=a_scales, scale_b=b_scales.t(), out_dtype=torch.bfloat16)


# ---- the clock ----


class Clock:
    """Times a call on the GPU: flush, event, call, event.

    The events and the call are one program, so that nothing of an execution is between them: the first event hands on
    the call's operands, the second takes its results. While the GPU flushes, the host launches that program; a sample
    for which it was too late, so that the GPU may have waited inside the interval, does not count.
    """

    def __init__(self):
        from jaxkern import _cuda

        jax.ffi.register_ffi_target("jaxkern.event.v1", _cuda.event_handler(), platform="CUDA")
        self.elapsed_ms = _cuda.elapsed_ms
        # In place, and written anew each time.
        self.flush = jax.jit(lambda x: x + np.uint8(1), donate_argnums=0)
        self.dirty = jnp.zeros(FLUSH_BYTES, jnp.uint8)
        before, after = (jax.jit(lambda x, i=i: self.record_event(i, [x])) for i in range(2))
        for _ in range(3):
            began = before(self.dirty)
            self.dirty = self.flush(self.dirty)
            jax.block_until_ready((began, after(self.dirty)))
            self.flush_ms = self.elapsed_ms(0, 1)
        self.samples_late = 0

    def jax(self, run: Callable, inputs: list[tuple]) -> tuple[Callable[[int], float | None], object]:
        """A function of the sample's number that gives its milliseconds, None if the host was late; run's result."""
        # In the layouts that the program wants, whoever's program it is: a transposition is not what is compared.
        plain = jax.jit(run, in_shardings=Format(Layout.AUTO), keep_unused=True).lower(*map(shapes_of, inputs[0]))
        plain = plain.compile(UNTUNED if jax.default_backend() == "gpu" else None)
        formats = jax.tree.leaves(plain.input_formats[0])
        tree = jax.tree.structure(inputs[0])
        copies = [
            [
                jax.device_put(x, format, may_alias=False)
                for x, format in zip(jax.tree.leaves(args), formats, strict=True)
            ]
            for args in inputs
        ]
        result = plain(*jax.tree.unflatten(tree, copies[0]))

        def timed(dirty, *arrays):
            _, *arrays = self.record_event(0, [dirty], arrays, [format.layout.major_to_minor for format in formats])
            (end,) = self.record_event(1, jax.tree.leaves(run(*jax.tree.unflatten(tree, arrays))))
            return end, arrays

        program = jax.jit(
            timed,
            in_shardings=(None, *formats),
            out_shardings=(None, formats),
            donate_argnums=range(1, 1 + len(formats)),
            keep_unused=True,
        )

        def sample(i):
            arrays = copies[i % len(copies)]
            begin = time.perf_counter()
            self.dirty = self.flush(self.dirty)
            end, copies[i % len(copies)] = program(self.dirty, *arrays)
            launched_ms = (time.perf_counter() - begin) * 1e3
            jax.block_until_ready(end)
            return self._counted(launched_ms, self.elapsed_ms(0, 1))

        return sample, result

    @staticmethod
    def record_event(index: int, after: list, before: list = (), layouts: list = ()) -> list:
        """Records an event once all of `after` is there: a token, and `before`, in place, for what is to wait."""
        call = jax.ffi.ffi_call(
            "jaxkern.event.v1",
            [jax.ShapeDtypeStruct((1,), jnp.uint8), *map(shapes_of, before)],
            has_side_effect=True,
            input_layouts=[None] * len(after) + layouts if before else None,
            output_layouts=[None, *layouts] if before else None,
            input_output_aliases={len(after) + i: 1 + i for i in range(len(before))},
        )
        return call(*after, *before, index=np.int64(index))

    def torch(self, run: Callable, inputs: list[tuple]) -> tuple[Callable[[int], float | None], None]:
        import torch

        inputs = [tuple(map(to_torch, jax.tree.leaves(args))) for args in inputs]
        if len(inputs[0]) == 4:  # the scales of a with m contiguous, as cuBLAS asks for them
            inputs = [(a, a_scales.t().contiguous().t(), b, b_scales) for a, a_scales, b, b_scales in inputs]
        dirty = torch_dirty()
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample(i):
            args = inputs[i % len(inputs)]
            begin = time.perf_counter()
            dirty.add_(1)
            begin_event.record()
            run(*args)
            end_event.record()
            launched_ms = (time.perf_counter() - begin) * 1e3
            end_event.synchronize()
            return self._counted(launched_ms, begin_event.elapsed_time(end_event))

        return sample, None

    def _counted(self, launched_ms, ms):
        if launched_ms < self.flush_ms:
            return ms
        self.samples_late += 1
        return None


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def medians(samplers: dict[str, Callable], count: int = SAMPLES) -> dict[str, float | None]:
    """Median milliseconds, the functions taking turns; None where the host was late too often."""
    times = {name: [] for name in samplers}
    for sample in samplers.values():
        for i in range(INPUTS):
            sample(i)
    for i in range(4 * count):
        for name, sample in samplers.items():
            if len(times[name]) < count and (ms := sample(i)) is not None:
                times[name].append(ms)
    return {name: statistics.median(t) if len(t) == count else None for name, t in times.items()}


def measure(case: Case, clock: Clock, machine: dict) -> list[Row]:
    tensors = [case.tensors(seed) for seed in range(INPUTS)]
    samplers, skipped, moved, results = {}, {}, {}, {}
    for label, form in case.forms.items():
        inputs = [form.pick(t) for t in tensors]
        try:
            samplers[label], out = (clock.torch if form.torch else clock.jax)(form.run, inputs)
            samplers[label](0)
        except Exception as error:  # an alternative that this machine has not got must not end the run
            samplers.pop(label, None)
            skipped[label] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            continue
        results[label] = out
        out_bytes = common.nbytes(out) if out is not None else moved_out(case)
        moved[label] = case.bytes or common.nbytes(inputs[0]) + out_bytes
    ms = medians(samplers)
    skipped |= {label: "the host was late too often" for label, t in ms.items() if t is None}
    ms = {label: t for label, t in ms.items() if t is not None}
    others = {label: t for label, t in ms.items() if label != "ours"}
    best = min(others, key=others.__getitem__, default=None)
    rows = []
    for label, form in case.forms.items():
        if label in skipped:
            rows.append(Row(case.name, case.shape, label, skipped=skipped[label]))
            continue
        seconds, is_ours = ms[label] * 1e-3, label == "ours"
        rows.append(
            Row(
                name=case.name,
                shape=case.shape,
                form=label,
                us=seconds * 1e6,
                tflops=case.flops / seconds / 1e12,
                gbytes=moved[label] / seconds / 1e9,
                copy_fraction=moved[label] / seconds / machine["copy_bytes_per_s"],
                matrix_fraction=case.flops / seconds / (machine["bf16_flops_per_s"] * (2 if form.fp8 else 1)),
                gain=ms[best] / ms[label] if is_ours and best else None,
                best_alternative=best if is_ours else None,
                difference=compare(case, results) if is_ours else None,
            )
        )
    return rows


def moved_out(case: Case) -> int:
    m, n, _ = map(int, case.shape.split("x"))
    return m * n * 2


def compare(case: Case, results: dict) -> float | None:
    """The difference of ours from the plainest form."""
    other = results.get(case.plain)
    if other is None:
        return None
    pair = case.counted(results["ours"]), case.counted(other)
    if case.family == "quantize":
        pair = [jaxkern.dequantize(x, implementation="xla") for x in pair]
    return max(float(difference(x, y)) for x, y in zip(*map(jax.tree.leaves, pair), strict=True))


@jax.jit
def difference(x, y):
    """0 where they agree: DeepGEMM's measure."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return 1 - 2 * (x * y).sum() / (x * x + y * y).sum()


# ---- torch ----


def to_torch(x: jax.Array):
    """The same bytes as a tensor on torch's GPU; through the host, as DLPack has no FP8 everywhere."""
    import torch

    dtype = {"float8_e4m3fn": torch.float8_e4m3fn, "float32": torch.float32}[x.dtype.name]
    return torch.from_numpy(np.asarray(x).view(np.uint8).copy()).cuda().view(dtype)


@functools.cache
def torch_dirty():
    import torch

    return torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


@functools.cache
def torch_one():
    import torch

    return torch.ones((), device="cuda")


# ---- the machine ----


def machine() -> dict:
    device = jax.devices("cuda")[0]
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    try:
        import torch

        torch_version = torch.__version__
    except ImportError:
        torch_version = None
    return {
        "device": device.device_kind,
        "driver": driver,
        "platform": device.client.platform_version.strip(),
        "jax": jax.__version__,
        "jaxkern": jaxkern.__version__,
        "torch": torch_version,
        "date": datetime.date.today().isoformat(),
    }


def speed(clock: Clock) -> dict:
    """What this GPU reaches, as the rows are measured: memory copy (bytes read + written), bfloat16 matrix product."""
    size, n = 1 << 28, 8192
    floats = [(jnp.full(size, seed, jnp.float32),) for seed in range(2)]
    square = [tuple(jax.random.normal(jax.random.key(2 * s + i), (n, n), BF16) for i in range(2)) for s in range(2)]
    nothing = [(jnp.zeros(1),)]
    samplers = {
        "copy": clock.jax(lambda x: x * 2, floats)[0],
        "product": clock.jax(product, square)[0],
        "nothing": clock.jax(lambda x: x + 1, nothing)[0],
    }
    ms = medians(samplers)
    return {
        "copy_bytes_per_s": 2 * size * 4 / (ms["copy"] * 1e-3),
        "bf16_flops_per_s": 2 * n**3 / (ms["product"] * 1e-3),
        "smallest_kernel_us": ms["nothing"] * 1e3,  # what the method itself adds, in every row
        "flush_us": clock.flush_ms * 1e3,
    }


# ---- whether it is right ----


def value_tests() -> str:
    """The value tests and the contract suite of the ops that have a kernel, through it."""
    env = {**os.environ, "JAXKERN_TEST_IMPLEMENTATION": "cuda"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", THROUGH_KERNELS, *TESTS],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:])
    lines = done.stdout.strip().splitlines() or ["no output"]
    return f"{'failed' if done.returncode else 'passed'}: {lines[-1]}"


def conformance() -> str:
    """Every function of the hardware layer against what the simulator says of it: a program that returns 0 if so."""
    if not (ROOT / CONFORMANCE).exists():
        return f"not run: there is no {CONFORMANCE}"
    nvcc, why_not = kernels.find_nvcc()
    if why_not:
        return f"not run: {why_not}"
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/conformance"
        for command in ([nvcc, *kernels.FLAGS.split(), CONFORMANCE, "-o", program], [program]):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                print(done.stdout[-4000:], done.stderr[-4000:])
                return f"failed: {os.path.basename(command[0])} returned {done.returncode}"
    lines = done.stdout.strip().splitlines() or ["no output"]
    return f"passed: {lines[-1]}"


# ---- what is printed ----


def print_plan(plan: list[Case], tests: bool):
    if tests:
        print(f"value tests: {' '.join(TESTS)}, on the GPU")
        print(f"conformance: {CONFORMANCE}, compiled by nvcc, on the GPU")
    for case in plan:
        print(f"{case.name:24} {case.shape:22} {' | '.join(case.forms)}")
    calls = sum(len(case.forms) for case in plan)
    print(f"{len(plan)} cases, {calls} rows: each the median of {SAMPLES}, {FLUSH_BYTES >> 20} MiB written before each")


def print_rows(rows: list[Row] = (), heading: bool = False):
    if heading:
        numbers = f"{'us':>9} {'TFLOP/s':>8} {'GB/s':>6} {'copy':>5} {'matrix':>6} {'gain':>5}"
        print(f"{'op':24} {'shape':22} {'form':24} {numbers}")
    for row in rows:
        start = f"{row.name:24} {row.shape:22} {row.form:24}"
        if row.skipped:
            print(f"{start} skipped: {row.skipped}")
            continue
        numbers = (
            f"{row.us:9.1f} {row.tflops:8.1f} {row.gbytes:6.0f} {row.copy_fraction:5.2f} {row.matrix_fraction:6.2f}"
        )
        gain = f"{row.gain:5.2f} {row.best_alternative}" if row.gain else ""
        print(f"{start} {numbers} {gain}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
