"""The simulator: every instruction against its meaning, and every planted bug reported, in words that name its place.

Both programs are in tests/sim. conformance.cu is for nvcc too: what passes here and on a GPU means the same on both."""

import fcntl
import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The simulator switches stacks, which fortified longjmp takes for an attack; what a kernel leaves unset must show.
FLAGS = "-std=c++20 -DJAXKERN_SIM -I. -U_FORTIFY_SOURCE -fno-omit-frame-pointer -Wno-unknown-pragmas -Wno-psabi".split()
PATTERN = "-ftrivial-auto-var-init=pattern"

SWIZZLES = ["no swizzle", "32-byte swizzle", "64-byte swizzle", "128-byte swizzle"]
LAYOUTS = [*SWIZZLES[1:3], "64-byte swizzle, A in registers", "no swizzle", "no swizzle, by columns"]
PRODUCTS = ["e4m3", "e4m3, A in registers"]
PRODUCTS += [
    kind + how
    for kind, how in product(
        ["bf16", "f16"],
        [
            *("", ", A in registers", ", B MN-major", ", A in registers, B MN-major"),
            *(", A MN-major", ", A and B MN-major"),
        ],
    )
]
CONFORMANCE = [
    *("indices", "shfl, ballot, elect", "setmaxnreg", "loads and stores"),
    *(f"ldmatrix, stmatrix x{count}{how}" for count, how in product([1, 2, 4], ["", " transposed"])),
    *("cvt_e4m3x2", "cvt_bf16x2", "cvt_f16x2", "cvt_f16x2_e4m3x2", "to_float"),
    *("ex2", "lg2", "div", "rcp", "mul", "fma", "popc", "max_u16x2"),
    "counts of the simulator",
    *("mbarrier phases", "mbarrier bytes", "bar.sync, bar.arrive", "cluster", "cp.async.bulk"),
    *(f"cp.async {size}{how}" for size, how in product([4, 8, 16], ["", ", mbarrier"])),
    *(f"tensor {what} {rank}D, {s}" for what, rank, s in product(["load", "store", "add"], [2, 3], SWIZZLES)),
    *("tensor load, multicast 2D", "tensor load, multicast 3D"),
    *(f"wgmma {kind}, n {n}" for kind, n in product(PRODUCTS, [8, 16, 24, 64, 96, 128, 192, 256])),
    *(f"wgmma {kind}, {layout}" for kind, layout in product(["e4m3", "bf16"], LAYOUTS)),
    *(f"wgmma bf16, {swizzle}, {which} MN-major" for swizzle, which in product(SWIZZLES[1:3], ["B", "A and B"])),
]
SOURCE = (ROOT / "tests/sim/bugs.cu").read_text()
LINES = SOURCE.splitlines()
PLANTED = [
    name + (", cluster of 2" if cluster == "2" else "")
    for cluster, name in re.findall(r"^ +(?:PIPELINE\((\d), |SMALL\(|CLUSTER\()(\w+), \"", SOURCE, re.M)
]


def compile_and_run(folder):
    """What conformance and bugs print."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    probe = [*compiler, PATTERN, "-fsyntax-only", "-x", "c++", os.devnull]
    pattern = [PATTERN] if subprocess.run(probe, capture_output=True).returncode == 0 else []

    def compile(source):
        object = folder / (source.stem + ".o")
        flags = ["-O1", *pattern, "-x", "c++"] if source.suffix == ".cu" else ["-O2"]
        subprocess.run([*compiler, *FLAGS, *flags, "-c", str(source), "-o", str(object)], cwd=ROOT, check=True)
        return str(object)

    def run(program):
        subprocess.run([*compiler, str(folder / f"{program}.o"), *simulator, "-o", str(folder / program)], check=True)
        done = subprocess.run([folder / program, "no"], capture_output=True, text=True, timeout=300)
        crash = "" if done.returncode in (0, 1) else f"FAILED {program} ended with {done.returncode}: {done.stderr}"
        return done.stdout + crash

    with ThreadPoolExecutor(2) as pool:
        programs = [ROOT / "tests/sim" / name for name in ("conformance.cu", "bugs.cu")]
        _, _, *simulator = pool.map(compile, programs + sorted((ROOT / "cuda/sim").glob("*.cc")))
        return list(pool.map(run, ("conformance", "bugs")))


@pytest.fixture(scope="session")
def outputs(tmp_path_factory):
    """Of both programs; pytest's workers share them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    printed = [folder / "conformance.txt", folder / "bugs.txt"]
    with open(folder / "sim.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed[1].exists():
            for file, text in zip(printed, compile_and_run(folder), strict=True):
                file.write_text(text)
    return [file.read_text().splitlines() for file in printed]


@pytest.mark.parametrize("name", CONFORMANCE)
def test_conformance(name, outputs):
    of_this = [line for line in outputs[0] if line == f"ok {name}" or line.startswith(f"FAILED {name}:")]
    assert of_this == [f"ok {name}"], outputs[0][-1]


def test_conformance_has_no_other_cases(outputs):
    assert sorted(outputs[0]) == sorted(f"ok {name}" for name in CONFORMANCE)


def names_at(line):
    """The bugs that may be reported at a line: after an @ on it, or in the comments right above."""
    names = re.findall(r"@(\w+)", LINES[line - 1])
    while LINES[line - 2].strip().startswith("// @"):
        line -= 1
        names += re.findall(r"@(\w+)", LINES[line - 1])
    return names


@pytest.mark.parametrize("name", PLANTED)
def test_bug_is_reported(name, outputs):
    """The program itself looks for the words, in every report; here, that each says where."""
    fields = [line.split("|") for line in outputs[1] if line.split("|")[1:2] == [name]]
    assert len(fields) == 1, outputs[1][-1]
    outcome, _, _, words, seeds, places, report = fields[0]
    assert outcome == "ok", report
    assert seeds
    if words != "wrong result":
        assert re.match(r"\w+: block \d+, warp \d+, lane \d+: bugs\.cu:\d+: ", report)
        assert all(name.split(",")[0] in names_at(int(line)) for line in places.split()), report


def test_manual_lists_the_planted_bugs():
    """docs/simulator.md has the table of bugs.cu: each bug and what is said of it."""
    rows = re.findall(r'^ +(?:PIPELINE\(\d, |SMALL\(|CLUSTER\()\w+, "(.*)", "(.*)"\)', SOURCE, re.M)
    manual = (ROOT / "docs/simulator.md").read_text()
    want = [f"| {what} | {', '.join(f'`{w}`' for w in reports.split(' / '))} |" for what, reports in rows]
    assert [line for line in manual.splitlines() if line.startswith("| ") and "`" in line] == want
