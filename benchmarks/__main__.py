"""Runs every family's benchmark: `python -m benchmarks [--quick] [families ...]`."""

import argparse
import importlib
import pkgutil

import jax

import benchmarks
from benchmarks import common

parser = argparse.ArgumentParser(prog="python -m benchmarks")
parser.add_argument("--quick", action="store_true", help="fewer shapes")
parser.add_argument("families", nargs="*", help="which families; all of them by default")
options = parser.parse_args()

found = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
for family in options.families or [name for name in found if name not in ("common", "__main__")]:
    module = importlib.import_module(f"benchmarks.{family}")
    common.run(family, module.rows, options.quick, common.RESULTS / f"{family}.{jax.default_backend()}.json")
