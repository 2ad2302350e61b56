"""What is known of each Hopper kernel without a GPU: `python -m benchmarks.kernels`, or `make kernels`.

From the compiler: registers, shared memory, the instructions that matter. From the simulator: the seeds that a kernel
passed, the bytes that it moved and the least that it could have, bank conflicts. It fails if ptxas repaired a kernel,
which it does in silence (C75xx messages: an injected wait, serialised tensor core instructions, an ignored
setmaxnreg), or if a kernel spills or has a stack frame.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
BUILD = ROOT / "build/kernels"
RESULT = ROOT / "benchmarks/results/kernels.json"
OLDEST_NVCC = (12, 8)
FLAGS = "-std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -I. -Xptxas -v -Xptxas -warn-spills,-warn-lmem-usage"


@dataclasses.dataclass
class Row:
    """One kernel; None where nobody has been asked. Sizes are in bytes; those named as an instruction are counts."""

    kernel: str
    registers: int | None = None
    threads: int | None = None
    spill_stores: int | None = None
    spill_loads: int | None = None
    stack: int | None = None
    shared_memory: int | None = None
    qgmma: int | None = None
    hgmma: int | None = None
    ldl: int | None = None
    stl: int | None = None
    utmaldg: int | None = None
    utmastg: int | None = None
    seeds: list[int] | None = None
    least_bytes: int | None = None
    moved_bytes: int | None = None
    bank_conflicts: int | None = None
    tensor_busy: float | None = None
    idle: dict[str, float] | None = None


COLUMNS = {
    "kernel": lambda row: row.kernel,
    "registers": lambda row: row.registers,
    "threads": lambda row: row.threads,
    "spills": lambda row: _sum(row.spill_stores, row.spill_loads),
    "stack": lambda row: row.stack,
    "shared": lambda row: row.shared_memory,
    "QGMMA": lambda row: row.qgmma,
    "HGMMA": lambda row: row.hgmma,
    "local": lambda row: _sum(row.ldl, row.stl),
    "TMA ld": lambda row: row.utmaldg,
    "TMA st": lambda row: row.utmastg,
    "seeds": lambda row: None if row.seeds is None else len(row.seeds),
    "least bytes": lambda row: row.least_bytes,
    "moved bytes": lambda row: row.moved_bytes,
    "ratio": lambda row: f"{row.moved_bytes / row.least_bytes:.2f}" if row.least_bytes else None,
    "conflicts": lambda row: row.bank_conflicts,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")
    parser.add_argument("--commit", action="store_true", help="write the rows to benchmarks/results")
    options = parser.parse_args(argv)

    nvcc, why_not = find_nvcc()
    sources = [p for p in sorted(ROOT.glob("cuda/*/*.cu")) if p.parent.name not in ("arch", "sim")]
    if why_not and options.commit:
        parser.error(f"--commit: {why_not}")
    refused, rows = [], {}
    if why_not:
        print(f"No kernel was compiled: {why_not}. The columns of the compiler are missing.")
    else:
        refused, rows = compiler_rows(nvcc, sources)
    simulated, why_not_simulated = simulate()
    if why_not_simulated:
        print(f"No kernel was simulated: {why_not_simulated}. The columns of the simulator are missing.")
    elif not why_not:
        refused += [f"{name}: no problem here runs it" for name in sorted({*rows} - {*simulated})]
    rows = merge(rows, simulated)

    print(table(rows))
    for line in refused:
        print(f"REFUSED: {line}", file=sys.stderr)
    if refused:
        return 1
    record = {"nvcc": why_not or nvcc_version(nvcc), "flags": FLAGS, "rows": [dataclasses.asdict(row) for row in rows]}
    for path in [options.json] * bool(options.json) + [RESULT] * options.commit:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


# ---- the compiler ----


def find_nvcc() -> tuple[str, str]:
    """nvcc, or why there is none."""
    homes = [os.environ[name] + "/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(homes))
    if not nvcc:
        return "", "nvcc is neither in PATH nor in CUDA_HOME"
    version = nvcc_version(nvcc)
    if tuple(map(int, version.split("."))) < OLDEST_NVCC:
        return "", f"{nvcc} is of CUDA {version}, and {'.'.join(map(str, OLDEST_NVCC))} is the oldest that will do"
    return nvcc, ""


def nvcc_version(nvcc: str) -> str:
    return re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))[1]


def find_cuobjdump(nvcc: str) -> str | None:
    """From PATH, from beside nvcc, or from the wheel, in whose folder is also the nvdisasm that it runs."""
    beside = pathlib.Path(nvcc).resolve().parent / "cuobjdump"
    spec = importlib.util.find_spec("nvidia")
    wheels = [
        p for place in (spec.submodule_search_locations if spec else []) for p in pathlib.Path(place).glob("*/bin")
    ]
    return shutil.which("cuobjdump") or next(
        (str(p) for p in [beside, *(w / "cuobjdump" for w in wheels)] if p.exists()), None
    )


def compiler_rows(nvcc: str, sources: list[pathlib.Path]) -> tuple[list[str], dict[str, Row]]:
    """What is refused, and a row for each kernel by its short name."""
    cuobjdump = find_cuobjdump(nvcc)
    if not cuobjdump:
        print(
            "No cuobjdump was found (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm): "
            "the columns of instructions and threads are missing."
        )
    refused, rows = [], {}
    # Two at a time: a compilation takes a core, and not little memory.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for source, (cubin, log, seconds, is_new) in zip(
            sources, pool.map(lambda s: build(nvcc, s), sources), strict=True
        ):
            name = source.relative_to(ROOT)
            print(f"{name}: nvcc {seconds:.1f} s{'' if is_new else ', unchanged since'}", flush=True)
            if cubin is None:
                refused.append(f"{name} does not compile:\n{log}")
                continue
            refused += refusals(log)
            counts = {} if not cuobjdump else parse_sass(_cuobjdump(cuobjdump, "-sass", cubin))
            bounds = {} if not cuobjdump else parse_threads(_cuobjdump(cuobjdump, "-elf", cubin))
            for entry, resources in parse_ptxas(log).items():
                if "registers" in resources:
                    row = Row(
                        short_name(demangle(entry)), **resources, **counts.get(entry, {}), threads=bounds.get(entry)
                    )
                    rows[row.kernel] = row
    return refused, rows


def build(nvcc: str, source: pathlib.Path):
    """Compiles `source` unless nothing it depends on has changed: cubin, log, seconds, whether that was now."""
    BUILD.mkdir(parents=True, exist_ok=True)
    stem = BUILD / f"{source.parent.name}.{source.stem}"
    cubin, depfile, stamp = (stem.with_name(stem.name + end) for end in (".cubin", ".d", ".json"))
    command = [nvcc, *FLAGS.split(), "-cubin", "-MD", "-MF", depfile, "-o", cubin, source.relative_to(ROOT)]
    if stamp.exists():
        last = json.loads(stamp.read_text())
        if last["digest"] == _digest(nvcc, depfile):
            return cubin, last["log"], last["seconds"], False
    stamp.unlink(missing_ok=True)
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    seconds, log = time.perf_counter() - begin, done.stdout + done.stderr
    if done.returncode != 0:
        return None, log, seconds, True
    stamp.write_text(json.dumps({"digest": _digest(nvcc, depfile), "seconds": seconds, "log": log}))
    return cubin, log, seconds, True


def _digest(nvcc: str, depfile: pathlib.Path) -> str:
    """Of the compiler, the flags and every file that was read; its time of change says nothing after a checkout."""
    digest = hashlib.sha256(f"{_output(nvcc, '--version')} {FLAGS}".encode())
    for path in depfile.read_text().partition(":")[2].replace("\\\n", " ").split():
        path = ROOT / path
        digest.update(path.read_bytes() if path.exists() else b"gone")
    return digest.hexdigest()


def parse_ptxas(log: str) -> dict[str, dict[str, int]]:
    """What `ptxas -v` tells of each function; only a kernel has "registers"."""
    functions, name = {}, ""
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'|Function properties for (\w+)", line):
            name = m[1] or m[2]
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            sizes = dict(zip(("stack", "spill_stores", "spill_loads"), map(int, m.groups()), strict=True))
            functions.setdefault(name, {}).update(sizes)
        elif m := re.search(r"Used (\d+) registers", line):
            static = re.search(r"(\d+) bytes smem", line)
            functions[name].update(registers=int(m[1]), shared_memory=int(static[1]) if static else 0)
    return functions


def refusals(log: str) -> list[str]:
    """What no kernel may have, one sentence each."""
    found = [demangle(line.strip()) for line in log.splitlines() if re.search(r"\(C75\d\d\)", line)]
    for name, sizes in parse_ptxas(log).items():
        faults = [
            f"{key.replace('_', ' ')} {sizes[key]} bytes"
            for key in ("stack", "spill_stores", "spill_loads")
            if sizes[key]
        ]
        if faults:
            found.append(f"{short_name(demangle(name))}: {', '.join(faults)}")
    return found


def parse_sass(text: str) -> dict[str, dict[str, int]]:
    """The count of each instruction that a Row names, by function, from `cuobjdump -sass`."""
    counted = ("qgmma", "hgmma", "ldl", "stl", "utmaldg", "utmastg")
    functions = {}
    for part in text.split("Function : ")[1:]:
        # A commit_group with no product right before it becomes an HGMMA of nothing.
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)\b(?!\S* RZ, gdesc\[URZ\])", part)
        functions[part.split()[0]] = {name: opcodes.count(name.upper()) for name in counted}
    return functions


def parse_threads(text: str) -> dict[str, int]:
    """The launch bound of each kernel, from `cuobjdump -elf`."""
    bounds = {}
    for part in re.split(r"^\.nv\.info\.", text, flags=re.M)[1:]:
        if m := re.search(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", part.split("\n.")[0]):
            x, y, z = (int(size, 16) for size in m.groups())
            bounds[part.split()[0]] = x * y * z
    return bounds


def demangle(text: str) -> str:
    """Every mangled name in `text`; the text itself where there is no c++filt."""
    if not shutil.which("c++filt"):
        return text
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout.rstrip("\n")


def short_name(name: str) -> str:
    """A kernel's name as tables have it: its struct, without what all of them share.

    void jaxkern::cuda::entry<jaxkern::cuda::gemm::Kernel<64, true> >(...) is Gemm<64, true>.
    """
    name = re.sub(r"\(anonymous namespace\)::|jaxkern::cuda::(kernels::)?", "", name).replace("> >", ">>")
    if m := re.match(r"void entry<(.*)>\(", name):
        name = m[1].rstrip()
    return re.sub(r"^(\w)(\w*)::Kernel\b", lambda m: m[1].upper() + m[2], name.replace("> >", ">>"))


def _cuobjdump(cuobjdump: str, *arguments) -> str:
    path = os.path.dirname(cuobjdump) + os.pathsep + os.environ.get("PATH", "")
    return _output(cuobjdump, *arguments, env={**os.environ, "PATH": path})


def _output(*command, **options) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


# ---- the simulator ----


# Sizes that between them run every kernel on the few multiprocessors that the simulator shows: m, n, k.
GEMMS = [
    (16, 80, 4352),
    (33, 192, 4352),
    (64, 400, 1536),
    (128, 384, 640),
    (300, 192, 1024),
    (768, 512, 1280),
    (300, 2112, 256),
]
# Rows, n, k and sizes of groups: of few rows, of more than a tile, empty, and rows that are nobody's.
GROUPED = [(520, 192, 640, (1, 0, 20, 40, 300, 70)), (500, 336, 384, (130, 64, 200)), (1300, 144, 640, (600, 650))]
# k, m, n: an empty group, one that fills its last block, one that does not, and what is nobody's after it. Then one
# whose m fills tiles of 256 rows.
K_GROUPED = [(896, 200, 144, (0, 256, 130, 0, 1)), (1280, 768, 144, (0, 1100))]
QUANTIZED = (150, 656)
TOKENS = (20, 0, 129)

# Queries, heads, keys in a page, lengths, num_splits: several pieces a block, rows that share keys, an empty request.
DECODED = [(1, 128, 64, (700, 0, 130), None), (2, 20, 16, (300, 65), 3)]
PREFILLED = [(2, 300, 2, 192), (1, 520, 1, 128)]  # sequences, tokens, heads, width of a key
APPENDED = (4, 16, 64)  # requests, their new tokens, keys in a page
MERGED = (3, 50, 512)
ROUTED = (40, 256, 8)  # tokens, experts, groups
# Tokens, width, experts, choices: blocks of threads that share the assignments, no vectors, a deep tree of sums.
MOVED = [(300, 1032, 256, 8), (20, 77, 5, 3), (12, 132, 1 << 20, 40)]


def simulate(seeds: int = 8) -> tuple[dict[str, Row], str]:
    """Every kernel on the simulator, each result against the CPU kernels' under each seed. Why not, if it cannot be."""
    from jaxkern import (
        _ffi,
        gemm,
        grouped_gemm,
        k_grouped_gemm,
        kv_cache,
        merge_attention,
        mla_decode,
        mla_prefill,
        moe,
        quantize,
        quantize_along_tokens,
        swiglu_quantize,
    )

    if _ffi.SIM is None:
        return {}, "this build of jaxkern has no simulator"
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape, np.float32))

    def gradients(call, arrays, cotangents, implementation):
        return jax.vjp(functools.partial(call, implementation=implementation), *arrays)[1](cotangents)

    def check(call, **tolerance):
        want = reference_of(call)
        for seed in range(seeds):
            _ffi.SIM.configure(seed=seed)
            for got, expected in zip(jax.tree.leaves(call(implementation="sim")), want, strict=True):
                np.testing.assert_allclose(got.astype(jnp.float32), expected, **tolerance)

    _ffi.SIM.clear_statistics()
    for m, n, k in GEMMS:
        for block in ((128, 128), (1, 128)):
            a, b = quantize(normal(m, k)), quantize(normal(n, k), block)
            for dtype, step in ((jnp.bfloat16, 2.0**-7), (jnp.float32, 1e-5)):
                check(functools.partial(gemm, a, b, out_dtype=dtype), rtol=step, atol=1e-3)
    for m, n, k, sizes in GROUPED:
        sizes = jnp.asarray(sizes, jnp.int32)
        for block in ((128, 128), (1, 128)):
            a, b = quantize(normal(m, k)), quantize(normal(len(sizes), n, k), block)
            for dtype, step in ((jnp.bfloat16, 2.0**-7), (jnp.float32, 1e-5)):
                check(functools.partial(grouped_gemm, a, b, sizes, out_dtype=dtype), rtol=step, atol=1e-3)
        a, b = normal(m, k).astype(jnp.bfloat16), normal(len(sizes), n, k).astype(jnp.bfloat16)
        for dtype, step in ((jnp.bfloat16, 2.0**-7), (jnp.float32, 1e-5)):
            check(functools.partial(grouped_gemm, a, b, sizes, out_dtype=dtype), rtol=step, atol=1e-3)
    for k, m, n, sizes in K_GROUPED:
        a, b, sizes = quantize(normal(m, k)), quantize(normal(n, k)), jnp.asarray(sizes, jnp.int32)
        check(functools.partial(k_grouped_gemm, a, b, sizes, group_alignment=128), rtol=1e-5, atol=1e-3)
        a, b = normal(k, m).astype(jnp.bfloat16), normal(k, n).astype(jnp.bfloat16)
        check(functools.partial(k_grouped_gemm, a, b, sizes), rtol=1e-5, atol=1e-3)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = normal(*QUANTIZED).astype(dtype)
        for block in ((128, 128), (1, 128)):
            check(functools.partial(quantize, x, block), rtol=0)
        check(functools.partial(quantize_along_tokens, x, jnp.asarray(TOKENS, jnp.int32)), rtol=0)
        check(functools.partial(swiglu_quantize, x), rtol=0.07)  # a step of e4m3, as the last bit of an exp may make it
    for queries, heads, page, lengths, num_splits in DECODED:
        pages = -(-max(lengths) // page)
        q = normal(len(lengths), queries, heads, 576)
        rows = normal(pages * len(lengths), page, 576) / 4
        table = jnp.asarray(random.permutation(pages * len(lengths)).reshape(len(lengths), pages), jnp.int32)
        for dtype in (jnp.bfloat16, jnp.float16, jnp.uint8):
            cache = kv_cache.pack(rows) if dtype == jnp.uint8 else rows.astype(dtype)
            arrays = (
                q.astype(jnp.bfloat16 if dtype == jnp.uint8 else dtype),
                cache,
                table,
                jnp.asarray(lengths, jnp.int32),
            )
            call = functools.partial(mla_decode, *arrays, softmax_scale=576**-0.55, num_splits=num_splits)
            check(call, rtol=2.0**-6, atol=2e-3)
    for b, tokens, heads, width in PREFILLED:
        for dtype in (jnp.bfloat16, jnp.float16):
            arrays = [normal(b, tokens, heads, d).astype(dtype) for d in (width, width, 128)]
            call = functools.partial(mla_prefill, softmax_scale=width**-0.5)
            check(functools.partial(call, *arrays), rtol=2.0**-6, atol=1e-2)
            cotangents = normal(b, tokens, heads, 128).astype(dtype), normal(b, tokens, heads)
            if dtype == jnp.bfloat16:  # the gradients of float16 are the reference's
                check(functools.partial(gradients, call, arrays, cotangents), rtol=2.0**-6, atol=2e-2)
    requests, tokens, page = APPENDED
    table = jnp.asarray(random.permutation(2 * requests).reshape(requests, 2), jnp.int32)
    positions = jnp.asarray(random.integers(0, 2 * page, (requests, tokens)), jnp.int32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        rows = normal(requests, tokens, 576).astype(dtype)
        for to in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.uint8):
            cache = jnp.zeros((2 * requests, page, 656 if to == jnp.uint8 else 576), to)
            check(functools.partial(kv_cache.append, cache, rows, table, positions), rtol=0)
        outs, lses = normal(*MERGED).astype(dtype), normal(*MERGED[:-1])
        check(functools.partial(merge_attention, outs, lses), rtol=2.0**-7, atol=1e-5)
    op = functools.partial(functools.partial, _ffi.call)
    tokens, experts, groups = ROUTED
    route = op(moe.ROUTE, normal(tokens, experts), normal(experts), num_groups=groups, topk_groups=groups // 2, top_k=8)
    check(route, rtol=0)
    for tokens, width, experts, top_k in MOVED:
        groups, rows = min(experts, 1000), tokens * top_k // 2

        ids, keys = (random.integers(-1, n, (tokens, top_k)).astype(np.int32) for n in (groups, experts))
        assign = op(moe.ASSIGN_SLOTS, ids, num_groups=groups, rows=rows, slabs=False, alignment=4)
        check(assign, rtol=0)
        slots, source, *_ = assign(implementation="cpu")
        weights, none = normal(tokens, top_k), jnp.zeros((0, 0))
        for x in (normal(tokens, width), normal(tokens, width).astype(jnp.bfloat16)):
            y = normal(rows, width).astype(x.dtype)
            check(op(moe.GATHER_ROWS, x, source, none, top_k=top_k, weighted=False, zero_gaps=True), rtol=0)
            check(op(moe.GATHER_ROWS, x, source, weights, top_k=top_k, weighted=True, zero_gaps=True), rtol=0)
            check(
                op(moe.GATHER_QUANTIZE_ROWS, x, source, slots, top_k=top_k, zero_gaps=True, scale_format="float32"),
                rtol=0,
            )
            for to in (jnp.float32, jnp.bfloat16):
                bias = normal(tokens, width).astype(to)
                add = op(moe.SUM_ROWS, y, slots, keys, weights, bias, num_keys=experts, out_dtype=bias.dtype.name)
                check(add, rtol=0)
                check(op(moe.DOT_ROWS, y, slots, bias), rtol=1e-5, atol=1e-3)
        bytes_ = random.integers(0, 256, (tokens, width)).astype(np.uint8)
        check(op(moe.GATHER_ROWS, bytes_, source, none, top_k=top_k, weighted=False, zero_gaps=True), rtol=0)
    _ffi.SIM.configure()
    return simulator_rows(json.loads(_ffi.SIM.statistics())), ""


def reference_of(call) -> list:
    return [np.asarray(x).astype(np.float32) for x in jax.tree.leaves(call(implementation="cpu"))]


def simulator_rows(statistics: dict) -> dict[str, Row]:
    """What the simulator counted, bytes and conflicts for one launch."""
    rows = {}
    for name, counts in statistics["kernels"].items():
        each = {
            field: counts[field] // counts["launches"] for field in ("least_bytes", "moved_bytes", "bank_conflicts")
        }
        same = {field: counts[field] for field in ("threads", "seeds", "tensor_busy", "idle")}
        kernel = short_name(name)
        rows[kernel] = Row(kernel, shared_memory=counts["shared_bytes"], **each, **same)
    return rows


# ---- both ----


def merge(compiled: dict[str, Row], simulated: dict[str, Row]) -> list[Row]:
    """One row a kernel. Shared memory is what a block has in all: the compiler knows the static part, which is none."""
    rows = []
    for name in sorted({*compiled, *simulated}):
        row = dataclasses.asdict(compiled.get(name) or Row(name))
        for field, value in dataclasses.asdict(simulated.get(name) or Row(name)).items():
            if row[field] is None or (field == "shared_memory" and value is not None):
                row[field] = value
        rows.append(Row(**row))
    return rows


def table(rows: list[Row]) -> str:
    cells = [list(COLUMNS)] + [["-" if (x := f(row)) is None else str(x) for f in COLUMNS.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        rest = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *rest]))
    return "\n".join(lines)


def _sum(*values: int | None) -> int | None:
    known = [x for x in values if x is not None]
    return sum(known) if known else None


if __name__ == "__main__":
    sys.exit(main())
