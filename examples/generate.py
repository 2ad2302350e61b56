"""For people who serve: loads a DeepSeek-V3 checkpoint in the public layout onto all devices and continues prompts.

    python examples/generate.py out/shakespeare/tragedies "HAMLET." "My lord,"

The experts and the prompts are spread over the devices. Text goes through the folder's tokenizer.json if it has one
(and the package `tokenizers` is installed), byte by byte otherwise, as the demo's models want it.
"""

import argparse
import json
import pathlib

import jax
import numpy as np

from jaxkern.models import deepseek


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--devices", type=int, help="how many CPU devices to make; only where there is no GPU")
    parser.add_argument("--prefix", default="", help="comes before every prompt; computed once")
    parser.add_argument("--samples", type=int, default=1, help="how often to continue each prompt")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weight-only", action="store_true", help="plain activations for FP8 weights")
    parser.add_argument("--fp8-cache", action="store_true", help="cache pages in FP8, in about half the memory")
    options = parser.parse_args()
    if min(options.tokens, options.samples) < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        parser.error("--tokens and --samples must be at least 1, --temperature at least 0, --top-p in (0, 1]")
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)

    encode, decode = text_codec(options.checkpoint)
    prefix = encode(options.prefix) if options.prefix else []
    begin = len(encode("")) if prefix else 0  # the token that a text begins with is the prefix's
    prompts = [encode(prompt)[begin:] for prompt in options.prompts]
    if not all(prompts):
        parser.error("every prompt needs a token")
    mesh = jax.make_mesh((jax.device_count(),), ("expert",))
    model = deepseek.from_pretrained(options.checkpoint, mesh=mesh)
    model.fp8 &= not options.weight_only
    longest = max(map(len, prompts))
    ids = np.array([[0] * (longest - len(p)) + p for p in prompts])
    mask = np.array([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    tokens = deepseek.generate(
        model,
        ids,
        attention_mask=mask,
        prefix_ids=prefix,
        num_samples=options.samples,
        max_new_tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        cache_dtype="fp8" if options.fp8_cache else None,
        progress=True,
    )
    for prompt, samples in zip(options.prompts, tokens.tolist(), strict=True):
        for sample in samples:
            print(f"\n--- {prompt}{decode(sample)}")


def text_codec(folder: pathlib.Path):
    """(text -> ids, ids -> text). A text begins with the token that tokenizer_config.json wants there."""
    config = deepseek.Config.from_hf(folder)
    if (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = folder / "tokenizer_config.json"
        adds_bos = settings.exists() and json.loads(settings.read_text()).get("add_bos_token")
        bos = [config.source["bos_token_id"]] if adds_bos else []

        def encode(text):
            ids = tokenizer.encode(text).ids
            return ids if ids[:1] == bos else bos + ids  # some tokenizer.json add it themselves

        return encode, tokenizer.decode
    if config.vocab_size > 256:
        raise SystemExit(
            f"{folder} has no tokenizer.json, and a vocabulary of {config.vocab_size}, which is more than bytes"
        )
    return lambda text: list(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace")


if __name__ == "__main__":
    main()
