"""Where FP8 training ends: the demo's model, trained on the same batches in bfloat16 and in FP8.

    python -m benchmarks.training [--steps 300] [--json PATH]

Both keep float32 parameters and bfloat16 activations. An end is the loss on a play that the model has not seen, and the
mean training loss of the last tenth of the steps. Those of FP8 are no more than half a percent higher, or it exits with
1; they may well be lower, as float32's may be higher: any other rounding is another path, a percent or two apart.
"""

import argparse
import json
import pathlib
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
    parser.add_argument("--json", type=pathlib.Path, help="write the ends to this file")
    options = parser.parse_args()

    ends = {name: train(name, name == "fp8", options.steps) for name in ("bfloat16", "fp8")}
    print(f"\n{'':20}{'bfloat16':>10}{'fp8':>10}{'fp8 / bfloat16':>16}")
    reached = True
    for what, plain in ends["bfloat16"].items():
        ratio = ends["fp8"][what] / plain
        reached &= ratio <= 1 + TOLERANCE
        print(f"{what:20}{plain:10.4f}{ends['fp8'][what]:10.4f}{ratio:16.4f}")
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, **ends}, indent=1) + "\n")
    sys.exit(0 if reached else 1)


def train(name: str, fp8: bool, steps: int) -> dict[str, float]:
    text, held_out = shakespeare.split(shakespeare.DATA / "tragedies.txt")
    mesh = jax.make_mesh((jax.device_count(),), ("expert",))
    model = deepseek.DeepseekForCausalLM(shakespeare.CONFIG, rngs=nnx.Rngs(0), mesh=mesh, dtype=jnp.bfloat16)
    model.fp8 = fp8
    losses = shakespeare.train(model, text, steps, 3e-3, f"tragedies in {name}")["loss"]
    return {
        "held-out loss": shakespeare.held_out_loss(model, held_out),
        "last training loss": float(losses[-max(1, steps // 10) :].mean()),
    }


if __name__ == "__main__":
    main()
