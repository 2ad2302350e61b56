"""Generation: the prompt through expanded attention into a paged cache, then one token a step through absorbed MLA."""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import jaxkern
from jaxkern._check import require_integer
from jaxkern.models.deepseek.model import (
    DeepseekForCausalLM,
    Program,
    bounds,
    check_ids,
    check_inputs,
    fetch,
    head,
    integers,
    roll_rows,
)


def generate(
    model: DeepseekForCausalLM,
    input_ids,
    *,
    max_new_tokens: int,
    attention_mask=None,
    prefix_ids=None,
    num_samples: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    page_size: int = 64,
    cache_dtype: Literal["fp8"] | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Continues each row of input_ids.

    Shapes and dtypes: input_ids int [b, s]; attention_mask [b, s] of 0 and 1, the 1s next to each other, padding
        usually on the left; prefix_ids int [p], tokens that come before those of every row, such as a system prompt;
        result int32 [b, max_new_tokens], or with num_samples [b, num_samples, max_new_tokens], on the host, without the
        prompt. After a row's stop token the row is filled with that token.
    Units: temperature 0 (or below float32's 1.2e-38) takes the likeliest token. Otherwise logits are divided by it, all
        but the top_k largest are dropped, then all outside the smallest set whose probability reaches top_p, and one
        token is drawn. A row's draws depend on seed, row and step alone, not on the mesh; sample j of row i is drawn as
        row i * num_samples + j. eos_token_id: the token or tokens that stop a row; None means the config's, () none. A
        row takes the pages of page_size tokens that its own real tokens and max_new_tokens fill, in the activations'
        dtype; with cache_dtype "fp8" packed, in about half the memory of bfloat16 (`kv_cache.pack`): what a token
        attends to is then rounded, except within the prompt. The full pages of the prefix are computed once and shared
        by all rows, those of a row's prompt by its samples.
    Sharding: the model's mesh; each device decodes its own rows, whose pages it holds. Of the inputs: any, also spread
        over the processes.
    Gradient: none.
    Implementations: `model.implementation`.
    Errors: TypeError for what must be an integer and is none; ValueError for an empty row, a max_new_tokens or
        num_samples below 1, a sampling parameter out of range, or packed pages of a kv_lora_rank that is no multiple of
        4.
    Compiled once for each shape: batch, samples, full pages of the prefix, prompt rounded up to pages, pages of the
    longest result, and pages of a row on average, rounded up, on the device that has most.
    """
    # The lengths of rows decide how many pages there are: the whole batch comes to every process.
    input_ids, attention_mask = (fetch(x) if isinstance(x, jax.Array) else x for x in (input_ids, attention_mask))
    input_ids, attention_mask = check_inputs(model.config, input_ids, attention_mask)
    max_new_tokens = require_integer("generate", "max_new_tokens", max_new_tokens)
    page_size = require_integer("generate", "page_size", page_size)
    seed = require_integer("generate", "seed", seed)
    top_k = None if top_k is None else require_integer("generate", "top_k", top_k)
    samples = 1 if num_samples is None else require_integer("generate", "num_samples", num_samples)
    for holds, message in (
        (max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {max_new_tokens}"),
        (samples >= 1, f"num_samples must be at least 1, got {samples}"),
        (temperature >= 0, f"temperature must not be negative, got {temperature}"),
        (top_k is None or top_k >= 1, f"top_k must be at least 1, got {top_k}"),
        (top_p is None or 0 < top_p <= 1, f"top_p must be in (0, 1], got {top_p}"),
        (page_size >= 1, f"page_size must be positive, got {page_size}"),
        (cache_dtype in (None, "fp8"), f"cache_dtype must be None or 'fp8', got {cache_dtype!r}"),
        (attention_mask is None or attention_mask.any(1).all(), "every row needs a real token"),
    ):
        if not holds:
            raise ValueError(f"generate: {message}")
    stops = model.config.eos_token_id if eos_token_id is None else eos_token_id
    stops = np.ravel(() if stops is None else stops)
    stops_early = len(stops) > 0
    if not stops_early:
        stops = np.full(1, -1)  # no token; of an empty array on a mesh JAX 0.11.2 crashes
    stops = integers("generate: eos_token_id", stops).astype(np.int32)
    vocab = model.config.vocab_size
    sampling = None
    if temperature >= np.finfo(np.float32).tiny:  # a smaller one is a float32 zero on the device
        # Of what drops nothing there is no trace in the program: it would sort the vocabulary for it.
        sampling = (None if top_k is None or top_k >= vocab else top_k, top_p is not None and top_p < 1)
    scalars = (np.uint32(seed & 0xFFFFFFFF), np.float32(temperature), np.float32(1.0 if top_p is None else top_p))

    mask = np.ones(input_ids.shape, np.int32) if attention_mask is None else attention_mask
    prefix, ids, mask = join_prefix(model.config, prefix_ids, input_ids, mask, page_size)
    before = 0 if prefix is None else len(prefix)
    b, s = ids.shape
    prompt = -(-s // page_size) * page_size
    ids = np.pad(ids, ((0, 0), (0, prompt - s)))
    mask = np.pad(mask, ((0, 0), (0, prompt - s)))
    program, leaves = Program.of(model, inference=True)
    prefill, decode = _programs(program, sampling, page_size)
    width = -(-(before + s + max_new_tokens) // page_size)
    prompts = before + mask.sum(1)
    table, pages = reserve_pages(
        prompts + max_new_tokens, width, page_size, program.devices, prompts=prompts, prefix=before, samples=samples
    )
    options = {"prefix": prefix, "pages": pages, "packed": cache_dtype == "fp8"}
    token, state, going, absorbed = prefill(leaves, ids, mask, table, stops, scalars, **options)
    tokens, goings = [token], [going]
    # The host waits for an earlier step than the last, so that the devices always have the next one. XLA:CPU lets 32
    # steps be in flight on a device and then blocks its launches, which deadlocks collectives.
    in_flight = 1 if progress else 8
    with tqdm.tqdm(total=max_new_tokens, disable=not progress, unit="token", desc="generate") as bar:
        bar.update()
        for _ in range(1, max_new_tokens):
            if len(goings) >= in_flight:
                going = goings[-in_flight].block_until_ready()
                if stops_early and not going:  # the steps after it only repeated the stop tokens
                    break
            token, state, going = decode(leaves, absorbed, token, state, stops, scalars)
            tokens.append(token)
            goings.append(going)
            bar.update()
    tokens += [token] * (max_new_tokens - len(tokens))
    written = np.stack([fetch(token) for token in tokens], axis=1)[: b * samples]
    return written if num_samples is None else written.reshape(b, samples, -1)


def join_prefix(config, prefix_ids, ids, mask, page_size: int):
    """The whole pages of the prefix, or None; what is left of it comes before the tokens of each row of ids, mask."""
    if prefix_ids is None or np.size(prefix_ids) == 0:
        return None, ids, mask
    prefix = fetch(prefix_ids) if isinstance(prefix_ids, jax.Array) else prefix_ids
    prefix = integers("generate: prefix_ids", prefix)
    if prefix.ndim != 1:
        raise ValueError(f"generate: prefix_ids must be [p], got {list(prefix.shape)}")
    prefix = check_ids("generate: prefix_ids", prefix, config)
    shared = len(prefix) // page_size * page_size
    rest = np.broadcast_to(prefix[shared:], (len(ids), len(prefix) - shared))
    if rest.size:
        order = (np.arange(ids.shape[1]) + mask.argmax(1)[:, None]) % ids.shape[1]
        ids, mask = (np.take_along_axis(x, order, axis=1) for x in (ids, mask))
        ids, mask = np.concatenate([rest, ids], axis=1), np.concatenate([np.ones_like(rest), mask], axis=1)
    return prefix[:shared] if shared else None, ids, mask


def reserve_pages(
    tokens, width: int, page_size: int, devices: int, *, prompts=None, prefix: int = 0, samples: int = 1
) -> tuple[np.ndarray, int]:
    """Pages for `tokens` [b] tokens of each row -> block_table [b * samples, width] for b rounded up to `devices`, and
    the pages that each device's cache must have. A table's pages are numbered within the device that decodes its row.

    The first `prefix` tokens, whole pages, are the same in all rows; the first prompts [b] in a row's samples.
    The rows that fill the mesh have no page, so nothing that they write is kept.
    """
    shared = np.full_like(tokens, prefix) if prompts is None else prompts // page_size * page_size
    tokens, shared = (np.pad(x, (0, -len(x) % devices)).reshape(devices, -1) for x in (tokens, shared))
    rows = tokens.shape[1] * samples
    of_all, of_row, of_sample = prefix // page_size, shared // page_size, -(-tokens // page_size)  # pages
    most = of_all + np.where(tokens > 0, of_row - of_all + samples * (of_sample - of_row), 0).sum(1).max()
    pages = int(-(-most // rows) * rows)  # so that batches of similar lengths share a compiled program
    tables = []
    for device_tokens, device_shared in zip(tokens.tolist(), shared.tolist(), strict=True):
        allocator = jaxkern.PageAllocator(pages, page_size)
        first, requests = allocator.reserve(prefix), []
        for n, full in zip(device_tokens, device_shared, strict=True):
            row = allocator.fork(first, prefix, full)[0] if n else allocator.reserve(0)
            requests += [allocator.fork(row, full, n)[0] for _ in range(samples)]
        tables.append(allocator.block_table(requests, width))
    return np.concatenate(tables), pages


@functools.lru_cache(maxsize=64)
def _programs(program: Program, sampling: tuple | None, page_size: int):
    """The two compiled steps: `prefill`, and `decode`, which owns the state and updates its cache in place."""
    config, run, rows = program.config, program.run, program.rows
    state_specs = {"cache": rows, "block_table": rows, "seq_lens": rows, "active": rows, "rows": rows, "step": jax.P()}
    out_specs = (rows, state_specs, jax.P())

    def next_token(parts, x, previous, state, stops, scalars):
        """x [b, hidden] of each row's last token -> its next token, the state, how many rows of all devices go on."""
        logits = head(parts, x, run)
        token = sample(logits, state["rows"], state["step"], sampling, *scalars)
        token = jnp.where(state["active"], token, previous)
        active = state["active"] & ~(token[:, None] == stops).any(1)
        going = active.sum(dtype=jnp.int32)
        going = going if run.axis_name is None else jax.lax.psum(going, run.axis_name)
        return token, {**state, "active": active, "step": state["step"] + 1}, going

    def prefill_body(parts, prefix, ids, mask, row_ids, block_table, stops, scalars, pages, packed):
        b, s = ids.shape
        samples = len(block_table) // b
        starts, lengths = bounds(mask)
        before, prefix_rows = 0, [None] * config.num_hidden_layers
        if prefix is not None:
            before, prefix_rows = len(prefix), parts["model"].prefix_rows(prefix, run)
        x, rows_of_layers, _ = parts["model"](roll_rows(ids, starts), lengths, run, prefix_rows)
        last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        seq_lens = jnp.where(lengths > 0, before + lengths, 0)
        last, seq_lens, first_rows = (jnp.repeat(x, samples, axis=0) for x in (last, seq_lens, jnp.arange(b)))
        latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
        row = (jaxkern.kv_cache.row_bytes(latent, rope), jnp.uint8) if packed else (latent + rope, run.dtype)
        empty = jnp.zeros((pages, page_size, row[0]), row[1])

        def append(cache, rows, requests, positions):
            positions = jnp.where(positions < seq_lens[requests, None], positions, -1)  # -1: not written
            options = {"latent_dim": latent, "implementation": run.implementation}
            return jaxkern.kv_cache.append(cache, rows, block_table[requests], positions, **options)

        def write(rows, prefix):
            """The cache of a layer."""
            cache = append(empty, rows, slice(None, None, samples), before + jnp.arange(s, dtype=jnp.int32))
            if prefix is not None:
                cache = append(cache, prefix, slice(1), jnp.arange(before, dtype=jnp.int32))
            if samples > 1:  # of a prompt's last page, if it is not full, each sample has its own
                positions = seq_lens[:, None] // page_size * page_size + jnp.arange(page_size, dtype=jnp.int32)
                own = rows.at[first_rows[:, None], positions - before].get(mode="clip")
                cache = append(cache, own, slice(None), positions)
            return cache

        state = {
            "cache": [write(*rows) for rows in zip(rows_of_layers, prefix_rows, strict=True)],
            "block_table": block_table,
            "seq_lens": seq_lens,
            "active": seq_lens > 0,  # a row that only fills the mesh is not
            "rows": row_ids,
            "step": jnp.zeros((), jnp.int32),
        }
        no_token = jnp.zeros_like(seq_lens)
        return *next_token(parts, last, no_token, state, stops, scalars), parts["model"].absorbed(run)

    def decode_body(parts, absorbed, token, state, stops, scalars):
        seq_lens = state["seq_lens"] + 1
        x, cache = parts["model"].decode(
            token[:, None], state["cache"], absorbed, state["block_table"], seq_lens, state["active"], run
        )
        state = {**state, "cache": cache, "seq_lens": seq_lens}
        return next_token(parts, x[:, -1], token, state, stops, scalars)

    @functools.partial(jax.jit, static_argnames=("pages", "packed"))
    def prefill(leaves, ids, mask, block_table, stops, scalars, *, prefix=None, pages, packed):
        row_ids = jnp.arange(len(block_table), dtype=jnp.int32)
        batch = program.place_batch(ids, mask, row_ids, block_table)
        body = functools.partial(prefill_body, pages=pages, packed=packed)
        specs = (prefix if prefix is None else jax.P(), rows, rows, rows, rows, jax.P(), jax.P())
        return program.map(body, specs, (*out_specs, jax.P()))(leaves, prefix, *batch, stops, scalars)

    @functools.partial(jax.jit, donate_argnames="state")
    def decode(leaves, absorbed, token, state, stops, scalars):
        specs = (jax.P(), rows, state_specs, jax.P(), jax.P())
        return program.map(decode_body, specs, out_specs)(leaves, absorbed, token, state, stops, scalars)

    return prefill, decode


def sample(logits, rows, step, sampling, seed, temperature, top_p):
    """One token of each row of logits [b, vocab]; rows [b] and step choose the random numbers.

    sampling: None takes the likeliest, otherwise (how many of the largest stay or None, whether top_p cuts them).
    """
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    top_k, uses_top_p = sampling
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature  # at most 0: no temperature makes it overflow
    tokens = None
    if top_k is not None or uses_top_p:
        logits, tokens = jax.lax.top_k(logits, top_k or logits.shape[-1])  # in falling order
    if uses_top_p:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < top_p, logits, -jnp.inf)

    def draw(row, logits):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), row)
        return jax.random.categorical(key, logits)

    drawn = jax.vmap(draw)(rows, logits)
    drawn = drawn if tokens is None else jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)
