"""For people who fine-tune: a checkpoint in the public layout, a text file, and a new checkpoint.

    python examples/finetune.py out/shakespeare/tragedies examples/data/sonnets.txt out/tuned --steps 50

Trains every parameter with AdamW; FP8 weights are dequantised first, and with --fp8 linear layers still multiply in
FP8. Text goes through the folder's tokenizer as in generate.py.
"""

import argparse
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from generate import text_codec

from jaxkern.models import deepseek


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--devices", type=int, help="how many CPU devices to make; only where there is no GPU")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--microbatches", type=int, default=1, help="gradient accumulation")
    parser.add_argument("--fp8", action="store_true", help="bfloat16 activations, products in FP8")
    options = parser.parse_args()
    if min(options.steps, options.batch, options.context, options.microbatches) < 1:
        parser.error("--steps, --batch, --context and --microbatches must be at least 1")
    if options.batch % options.microbatches:
        parser.error(f"--microbatches {options.microbatches} must divide --batch {options.batch}")
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)

    encode, _ = text_codec(options.checkpoint)
    text = np.array(encode(options.text.read_text()), np.int32)
    if len(text) < options.context + 2:
        parser.error(f"{options.text} has {len(text)} tokens; --context {options.context} needs {options.context + 2}")
    mesh = jax.make_mesh((jax.device_count(),), ("expert",))
    model = deepseek.from_pretrained(options.checkpoint, mesh=mesh, dtype=jnp.float32, quantized=False)
    if options.fp8:
        model.dtype, model.fp8 = jnp.bfloat16, True
    optimizer = nnx.Optimizer(model, deepseek.adamw(options.learning_rate), wrt=nnx.Param)
    step = deepseek.make_train_step(microbatches=options.microbatches, remat=True)
    rng = np.random.default_rng(0)
    with tqdm.trange(options.steps, unit="step") as bar:
        for _ in bar:
            starts = rng.integers(0, len(text) - options.context - 1, options.batch)
            rows = text[starts[:, None] + np.arange(options.context + 1)]
            metrics = step(model, optimizer, {"input_ids": rows})
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", dropped=int(metrics["dropped"]))
    model.save_pretrained(options.out)
    if options.out.resolve() != options.checkpoint.resolve():
        for file in [*options.checkpoint.glob("tokenizer*"), *options.checkpoint.glob("generation_config.json")]:
            shutil.copy(file, options.out)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
