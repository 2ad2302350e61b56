"""Generation with random weights: one step of an FP8 checkpoint against its bfloat16 copy, and prompts that share their
tokens against whole ones."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common
from jaxkern.models import deepseek

# Layers so large that their weights are what a step reads.
CONFIG = deepseek.Config(
    vocab_size=1024,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=1024,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=768,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    max_position_embeddings=512,
    rope=deepseek.Rope(),
    eos_token_id=None,
    quantized=True,
)
STEPS = 8  # of a timed call, after the prompt's pass
SHARING, PREFIX, OWN = 4, 192, 64  # rows that share the first tokens of their prompts, and those that they do not share


def rows(quick: bool):
    models = checkpoints()
    seconds = 1.0 if quick else 3.0
    for batch in (1,) if quick else (1, 8):
        ms = dict(zip(models, step_ms(list(models.values()), batch, seconds), strict=True))
        for name in ("fp8", "weight only"):
            work = _work(models[name], batch)
            shape = f"b={batch} {work['bytes'] / 1e6:.0f} MB of weights"
            yield common.row(f"generate, {name}", shape, ms[name], ms["bfloat16"], "bfloat16 copy", **work)
    rng = np.random.default_rng(0)
    shared, own = (rng.integers(0, CONFIG.vocab_size, shape) for shape in ((1, PREFIX), (SHARING, OWN)))
    model = models["fp8"]

    def first_token(prompts, **options):
        return lambda: deepseek.generate(model, prompts, max_new_tokens=1, **options)

    whole = np.concatenate([np.repeat(shared, SHARING, axis=0), own], axis=1)
    repeated = np.repeat(whole[:1], SHARING, axis=0)
    for name, shape, ours, alternative, form, tokens in (
        (
            "prompts, prefix_ids",
            f"{PREFIX} + {SHARING} x {OWN} tokens",
            first_token(own, prefix_ids=shared[0]),
            first_token(whole),
            "whole prompts",
            PREFIX + SHARING * OWN,
        ),
        (
            "prompts, num_samples",
            f"{SHARING} of {PREFIX + OWN} tokens",
            first_token(whole[:1], num_samples=SHARING),
            first_token(repeated),
            "repeated prompts",
            PREFIX + OWN,
        ),
    ):
        yield common.row(name, shape, *common.medians([ours, alternative], seconds), form, **_work(model, tokens))


def checkpoints() -> dict[str, deepseek.DeepseekForCausalLM]:
    """One FP8 checkpoint as it is, with plain activations, and dequantised: as `from_pretrained` reads it."""
    with tempfile.TemporaryDirectory() as folder:
        deepseek.DeepseekForCausalLM(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(folder)
        models = {
            name: deepseek.from_pretrained(folder, dtype=jnp.bfloat16, quantized=name != "bfloat16")
            for name in ("fp8", "weight only", "bfloat16")
        }
    models["weight only"].fp8 = False
    return models


def step_ms(models: list[deepseek.DeepseekForCausalLM], batch: int, seconds: float) -> list[float]:
    """The median milliseconds of one step of each model, the models taking turns; about `seconds` for each."""
    prompt = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, 16), dtype=np.int32)

    def generating(model, tokens):
        return lambda: deepseek.generate(model, prompt, max_new_tokens=tokens)

    calls = [generating(model, tokens) for model in models for tokens in (1, 1 + STEPS)]
    ms = common.medians(calls, seconds / 2)
    return [(whole - prompt) / STEPS for prompt, whole in zip(ms[::2], ms[1::2], strict=True)]


def _work(model: deepseek.DeepseekForCausalLM, tokens: int) -> dict[str, int]:
    """The bytes of weights that a pass over so many tokens reads, if no two choose one expert, and its operations."""
    chosen = CONFIG.num_experts_per_tok / CONFIG.n_routed_experts
    size = operations = 0
    for path, x in jax.tree_util.tree_flatten_with_path(nnx.state(model.model.layers))[0]:
        spread = any(getattr(key, "key", None) == "experts" for key in path)
        size += x.nbytes * (min(1, tokens * chosen) if spread else 1)
        operations += 2 * tokens * x.size * (chosen if spread else 1)
    return {"bytes": int(size), "flops": int(operations)}


if __name__ == "__main__":
    common.main("model", rows)
