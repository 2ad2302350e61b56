"""Runs every family's benchmark: `python -m benchmarks [--quick] [--commit] [families ...]`."""

import argparse
import importlib
import pathlib

import jax

from benchmarks import common, report

FAMILIES = ["gemm", "linear", "mla", "model", "moe", "quantize"]

parser = argparse.ArgumentParser(prog="python -m benchmarks")
parser.add_argument("--quick", action="store_true", help="fewer shapes")
parser.add_argument("--commit", action="store_true", help="write to benchmarks/results, and the README's table anew")
parser.add_argument("families", nargs="*", default=FAMILIES, help=f"which of {', '.join(FAMILIES)}; all by default")
options = parser.parse_args()
if unknown := [family for family in options.families if family not in FAMILIES]:
    parser.error(f"there is no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")

folder = report.RESULTS if options.commit else pathlib.Path("out/bench")
for family in options.families:
    rows = importlib.import_module(f"benchmarks.{family}").rows
    common.run(family, rows, options.quick, folder / f"{family}.{jax.default_backend()}.json")
if options.commit:
    report.README.write_text(report.with_summary(report.README.read_text()))
print(f"Results: {folder}")
