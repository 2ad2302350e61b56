"""Trains a small DeepSeek-V3-style model on Shakespeare's tragedies, byte by byte, with its experts spread over four
CPU devices; saves it, loads it back, fine-tunes it on the sonnets, and lets both write.

    python examples/shakespeare.py [--steps 420] [--out out/shakespeare]
"""

import argparse
import pathlib
import time

import jax

jax.config.update("jax_num_cpu_devices", 4)  # before anything else asks for a device

import matplotlib  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tqdm  # noqa: E402
from flax import nnx  # noqa: E402

import jaxkern  # noqa: E402
from jaxkern.models import deepseek  # noqa: E402

DATA = pathlib.Path(__file__).parent / "data"
CONTEXT, BATCH = 128, 16
CONFIG = deepseek.Config(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=384,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    max_position_embeddings=512,
    rope=deepseek.Rope(),  # plain: the context is short
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=420, help="training steps on the tragedies")
    parser.add_argument("--tune-steps", type=int, default=90, help="fine-tuning steps on the sonnets")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/shakespeare"))
    options = parser.parse_args()
    if min(options.steps, options.tune_steps) < 1:
        parser.error("--steps and --tune-steps must be at least 1")
    options.out.mkdir(parents=True, exist_ok=True)

    tragedies, tragedies_held_out = split(DATA / "tragedies.txt")
    sonnets, sonnets_held_out = split(DATA / "sonnets.txt")
    mesh = jax.make_mesh((4,), ("expert",))
    model = deepseek.DeepseekForCausalLM(CONFIG, rngs=nnx.Rngs(0), mesh=mesh)
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"A DeepSeek-V3-style model: {parameters / 1e6:.2f} M parameters, 8 routed experts and a shared one in 3 of")
    print(
        f"4 layers, latent attention, experts spread over {mesh.size} devices; {len(tragedies):,} bytes to learn from\n"
    )

    bigram = bigram_loss(tragedies, tragedies_held_out)
    before = held_out_loss(model, tragedies_held_out)
    history = train(model, tragedies, options.steps, 3e-3, "tragedies")
    after = held_out_loss(model, tragedies_held_out)
    print("\nLoss on a play it has not seen, nats a byte")
    print(f"  untrained       {before:.3f}")
    print(f"  bigram model    {bigram:.3f}")
    print(f"  this model      {after:.3f}\n")

    model.save_pretrained(options.out / "tragedies")
    tuned = deepseek.from_pretrained(options.out / "tragedies", mesh=mesh)
    assert held_out_loss(tuned, tragedies_held_out) == after, "a checkpoint must give the model that was saved"
    print(f"Saved to {options.out / 'tragedies'} and loaded back: the same loss, to the bit.\n")

    before_tuning = held_out_loss(tuned, sonnets_held_out)
    tuning = train(tuned, sonnets, options.tune_steps, 1e-3, "sonnets")
    after_tuning = held_out_loss(tuned, sonnets_held_out)
    tuned.save_pretrained(options.out / "sonnets")
    print(f"\nLoss on sonnets it has not seen: {before_tuning:.3f} before fine-tuning, {after_tuning:.3f} after\n")

    for name, writer, prompts in (
        ("tragedies", model, ["HAMLET.\n", "Enter the King", "O, my"]),
        ("sonnets", tuned, ["When I", "Thy love", "Shall I compare"]),
    ):
        texts, speed = write(writer, prompts)
        print(f"=== after the {name}, {speed:.0f} tokens/s")
        print("\n---\n".join(texts) + "\n")

    picture = options.out / "training.png"
    plot(picture, history, tuning, bigram, after, (before_tuning, after_tuning))
    print(f"Plot: {picture}\n\nWhat ran each op:")
    for op, implementations in jaxkern.implementations_used().items():
        print(f"  {op:<22}{', '.join(implementations)}")


def split(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to learn from, and the last tenth, held out."""
    text = np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32)
    return np.split(text, [len(text) * 9 // 10])


def bigram_loss(text: np.ndarray, held_out: np.ndarray) -> float:
    """The loss of the best guess from the byte before, counted on `text` and smoothed a little."""
    counts = np.full((256, 256), 0.01)
    np.add.at(counts, (text[:-1], text[1:]), 1)
    return float(-np.log(counts / counts.sum(1, keepdims=True))[held_out[:-1], held_out[1:]].mean())


def held_out_loss(model, text: np.ndarray) -> float:
    rows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    rows = rows[:: max(1, len(rows) // 256)][:256]  # at most 256 windows from all over the text
    batches = np.array_split(rows[: len(rows) // BATCH * BATCH], len(rows) // BATCH)
    return deepseek.evaluate(model, [{"input_ids": batch} for batch in batches])


def train(model, text: np.ndarray, steps: int, learning_rate: float, name: str) -> dict[str, np.ndarray]:
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10 + 1, max(2, steps), learning_rate / 20)
    optimizer = nnx.Optimizer(model, deepseek.adamw(schedule), wrt=nnx.Param)
    step = deepseek.make_train_step(balance_factor=1e-3, bias_update_speed=1e-3)
    rng = np.random.default_rng(0)
    history = []
    start = None
    with tqdm.trange(steps, desc=f"train on the {name}", unit="step") as bar:
        for i in bar:
            starts = rng.integers(0, len(text) - CONTEXT - 1, BATCH)
            batch = text[starts[:, None] + np.arange(CONTEXT + 1)]
            history.append(jax.device_get(step(model, optimizer, {"input_ids": batch})))
            start = start or time.perf_counter()  # after the first step, which compiles
            speed = i * BATCH * CONTEXT / (time.perf_counter() - start + 1e-9)
            bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", tokens_per_s=f"{speed:,.0f}", refresh=False)
    dropped = sum(float(h["dropped"]) for h in history)
    print(f"{speed:,.0f} tokens/s; {dropped:.0f} tokens dropped; busiest expert {history[-1]['max_violation']:+.0%}")
    return {key: np.stack([h[key] for h in history]) for key in ("loss", "expert_load")}


def write(model, prompts: list[str]) -> tuple[list[str], float]:
    """Continues the prompts together, as far as the context reaches that the model has learnt."""
    width = max(map(len, prompts))
    ids = np.array([list(p.rjust(width).encode()) for p in prompts], np.int32)
    mask = np.array([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    length = CONTEXT - width
    options = {"max_new_tokens": length, "temperature": 0.6, "top_p": 0.95, "seed": 1, "eos_token_id": ()}
    deepseek.generate(model, ids, attention_mask=mask, **options)  # compiles
    start = time.perf_counter()
    rows = deepseek.generate(model, ids, attention_mask=mask, **options, progress=True)
    speed = rows.size / (time.perf_counter() - start)
    return [p + bytes(row.tolist()).decode("utf-8", "replace") for p, row in zip(prompts, rows, strict=True)], speed


def plot(path, history, tuning, bigram, after, tuned):
    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps, tune_steps = len(history["loss"]), len(tuning["loss"])
    left.plot(history["loss"], lw=0.8, label="training, tragedies")
    left.plot(range(steps, steps + tune_steps), tuning["loss"], lw=0.8, label="fine-tuning, sonnets")
    left.axhline(bigram, color="gray", ls="--", lw=1, label=f"bigram model, held out: {bigram:.2f}")
    left.plot(steps, after, "o", color="tab:blue", label=f"held-out play: {after:.2f}")
    left.plot(steps + tune_steps, tuned[1], "o", color="tab:orange", label=f"held-out sonnets: {tuned[1]:.2f}")
    left.set(xlabel="step", ylabel="loss, nats a byte", title="Loss", ylim=(1, 4))
    left.legend(frameon=False)

    load = history["expert_load"]
    share = load / load.sum(-1, keepdims=True) * load.shape[-1]
    image = right.imshow(
        share.reshape(steps, -1).T, aspect="auto", interpolation="nearest", cmap="coolwarm", vmin=0, vmax=2
    )
    for layer in range(1, load.shape[1]):
        right.axhline(layer * load.shape[2] - 0.5, color="black", lw=1)
    right.set(xlabel="step", ylabel="expert (3 layers of 8)", title="Expert load: 1 is an even share")
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
