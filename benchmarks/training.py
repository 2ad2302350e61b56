"""Where FP8 training ends: the demo's model, trained on the same batches in bfloat16 and in FP8.

    python -m benchmarks.training [--steps 300] [--seeds 5] [--json PATH]

Both keep float32 parameters and bfloat16 activations. An end is the loss on a play that the model has not seen, and the
mean training loss of the last tenth of the steps. Any other rounding is another path, whose end lies a percent or two
higher or lower; so the ends are means over pairs of runs, each pair from the same weights. Those of FP8 are
no more than half a percent higher, or it exits with 1. The error is the standard error of the ratio over the pairs.
"""

import argparse
import json
import pathlib
import statistics
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from examples import shakespeare  # makes the CPU devices
from jaxkern.models import deepseek

TOLERANCE = 5e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5, help="pairs of runs, each from weights of its own")
    parser.add_argument("--json", type=pathlib.Path, help="write the ends to this file")
    options = parser.parse_args()
    if min(options.steps, options.seeds) < 1:
        parser.error("--steps and --seeds must be at least 1")

    runs = [{name: train(name, options.steps, seed) for name in ("bfloat16", "fp8")} for seed in range(options.seeds)]
    for seed, run in enumerate(runs):
        pairs = ", ".join(f"{what} {plain:.4f} {run['fp8'][what]:.4f}" for what, plain in run["bfloat16"].items())
        print(f"seed {seed}: {pairs}")
    ends = jax.tree.map(lambda *x: statistics.mean(x), *runs)
    print(f"\n{'':20}{'bfloat16':>10}{'fp8':>10}{'fp8 / bfloat16':>16}{'error':>10}")
    reached = True
    for what, plain in ends["bfloat16"].items():
        ratio = ends["fp8"][what] / plain
        ratios = [run["fp8"][what] / run["bfloat16"][what] for run in runs]
        error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
        reached &= ratio <= 1 + TOLERANCE
        print(f"{what:20}{plain:10.4f}{ends['fp8'][what]:10.4f}{ratio:16.4f}{error:10.4f}")
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, "seeds": options.seeds, **ends}, indent=1) + "\n")
    sys.exit(0 if reached else 1)


def train(name: str, steps: int, seed: int) -> dict[str, float]:
    text, held_out = shakespeare.split(shakespeare.DATA / "tragedies.txt")
    mesh = jax.make_mesh((jax.device_count(),), ("expert",))
    model = deepseek.DeepseekForCausalLM(shakespeare.CONFIG, rngs=nnx.Rngs(seed), mesh=mesh, dtype=jnp.bfloat16)
    model.fp8 = name == "fp8"
    losses = shakespeare.train(model, text, steps, 3e-3, f"tragedies in {name}")["loss"]
    return {
        "held-out loss": shakespeare.held_out_loss(model, held_out),
        "last training loss": float(losses[-max(1, steps // 10) :].mean()),
    }


if __name__ == "__main__":
    main()
