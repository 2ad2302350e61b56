"""Generation: golden tokens, what stops and what is drawn, and that nothing is compiled twice."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deepseek_tools import GOLDEN, expected, mesh, small_model, tokens
from jax.sharding import AxisType

from jaxkern import kv_cache
from jaxkern.models import deepseek
from jaxkern.models.deepseek.generate import _programs, join_prefix, reserve_pages, sample
from jaxkern.models.deepseek.model import Program, fetch, head

CASES = ["v3-tiny", "v3-latent512", "v3-padded", "v3-fp8", "v3-mtp"]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.parametrize(
    "case, implementation, devices",
    [(case, None, None) for case in CASES]
    + [pytest.param(case, "xla", None, marks=pytest.mark.slow) for case in CASES]
    + [("v3-padded", None, 4), ("v3-fp8", None, 4), ("v3-padded", None, 2), ("v3-tiny", None, 1)],
)
def test_golden_tokens(case, implementation, devices):
    want = expected(case)
    on = {
        None: lambda: None,
        1: lambda: mesh(1),
        2: lambda: mesh(2),
        4: lambda: mesh(4, AxisType.Explicit, (2, 2), ("hosts", "devices")),
    }[devices]()
    model = deepseek.from_pretrained(GOLDEN / case, dtype=jnp.float32, mesh=on)
    model.implementation = implementation
    model.fp8 = False  # the golden tokens of v3-fp8 are of plain activations
    mask = want["attention_mask"]
    mask = mask if (mask == 0).any() else None
    got = deepseek.generate(model, want["input_ids"], max_new_tokens=12, attention_mask=mask)
    np.testing.assert_array_equal(got, want["generated"])


def test_padded_rows_are_rows_alone(model):
    ids = tokens(3, 9)
    mask = np.array([[0] * 4 + [1] * 5, [1] * 9, [0, 0] + [1] * 5 + [0] * 2])
    got = deepseek.generate(model, ids, max_new_tokens=5, attention_mask=mask, page_size=16)
    for row, alone in enumerate([ids[0, 4:], ids[1], ids[2, 2:7]]):
        want = deepseek.generate(model, alone[None], max_new_tokens=5, page_size=16)
        np.testing.assert_array_equal(got[row], want[0])


def test_greedy_is_the_full_forward_pass(model):
    """Over several pages, with a page boundary in the prompt and in the new tokens."""
    ids = tokens(2, 19)
    got = deepseek.generate(model, ids, max_new_tokens=15, page_size=16)
    whole = np.concatenate([ids, got], axis=1)
    logits = np.asarray(model(whole))
    np.testing.assert_array_equal(logits[:, 18:-1].argmax(-1), got)


def test_stop_tokens(model):
    ids = tokens(2, 9)
    free = deepseek.generate(model, ids, max_new_tokens=6, page_size=16)
    stop = int(free[0, 2])
    assert stop not in free[0, :2]
    other = next(int(t) for t in free[1] if t != stop)
    got = deepseek.generate(model, ids, max_new_tokens=6, eos_token_id=[stop, other], page_size=16)
    for row in range(2):
        at = next(i for i, t in enumerate(free[row]) if t in (stop, other))
        np.testing.assert_array_equal(got[row, : at + 1], free[row, : at + 1])
        assert (got[row, at:] == free[row, at]).all()
    first = deepseek.generate(model, ids[:1], max_new_tokens=6, eos_token_id=int(free[0, 0]), page_size=16)
    assert (first == free[0, 0]).all() and first.shape == (1, 6)


@pytest.mark.parametrize("devices, progress", [(None, False), (None, True), (2, False)])
def test_stopping_ends_early(model, devices, progress, monkeypatch):
    """Steps are launched ahead of the check: a few too many, which change nothing."""
    on = small_model(mesh(devices)) if devices else model
    ids, options = tokens(3, 9), {"max_new_tokens": 40, "page_size": 16}  # three rows do not fill two devices
    free = deepseek.generate(on, ids, eos_token_id=(), **options)
    stops = {int(row[2 * i]) for i, row in enumerate(free)}
    ends = [next(i for i, token in enumerate(row) if token in stops) for row in free.tolist()]
    want = np.array([[*row[:end], *[row[end]] * (40 - end)] for row, end in zip(free.tolist(), ends, strict=True)])
    calls, fetched = [], []

    def counted(*args):
        prefill, decode = _programs(*args)
        return prefill, lambda *args: calls.append(1) or decode(*args)

    monkeypatch.setitem(deepseek.generate.__globals__, "_programs", counted)
    monkeypatch.setitem(deepseek.generate.__globals__, "fetch", lambda x: fetched.append(1) or fetch(x))
    got = deepseek.generate(on, ids, eos_token_id=sorted(stops), progress=progress, **options)
    np.testing.assert_array_equal(got, want)
    assert max(ends) <= len(calls) <= max(ends) + (1 if progress else 8)
    assert len(fetched) == 40  # the result's tokens alone: across processes each is a collective


def test_the_config_stops(model):
    ids = tokens(1, 9)
    free = deepseek.generate(model, ids, max_new_tokens=6, page_size=16)
    stopping = small_model(eos_token_id=[int(free[0, 1])])
    got = deepseek.generate(stopping, ids, max_new_tokens=6, page_size=16)
    at = int(np.argmax(free[0] == free[0, 1]))
    assert (got[0, at:] == free[0, 1]).all()
    np.testing.assert_array_equal(
        deepseek.generate(stopping, ids, max_new_tokens=6, eos_token_id=(), page_size=16), free
    )


def test_sampling(model):
    ids = np.repeat(tokens(1, 9), 4, axis=0)

    def draw(**options):
        options = {"max_new_tokens": 6, "temperature": 1.5, "page_size": 16} | options
        return deepseek.generate(model, ids, **options)

    a, b, c = draw(seed=1), draw(seed=1), draw(seed=2)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert len({tuple(row) for row in a}) > 1  # equal rows draw differently
    greedy = draw(temperature=0.0)
    np.testing.assert_array_equal(draw(top_k=1), greedy)
    np.testing.assert_array_equal(draw(top_p=1e-6), greedy)
    np.testing.assert_array_equal(draw(seed=1, prefix_ids=[]), a)
    for temperature in (1e-4, 1.2e-38, 1e-38, 1e-300):  # the last two are 0 in float32
        np.testing.assert_array_equal(draw(temperature=temperature), greedy)
    np.testing.assert_array_equal(draw(seed=1, top_p=1.0, top_k=64), a)  # they drop nothing


def test_draws_do_not_depend_on_the_mesh(model):
    ids = tokens(3, 9)
    options = {"max_new_tokens": 4, "temperature": 0.7, "seed": 5, "page_size": 16}
    spread = deepseek.generate(small_model(mesh(2)), ids, **options)
    np.testing.assert_array_equal(spread, deepseek.generate(model, ids, **options))


@pytest.mark.parametrize(
    "prefix, samples, devices, cache_dtype",
    [(0, 3, None, None), (5, None, 2, None), (16, 1, None, "fp8"), (37, 2, 2, None), (37, 2, None, "fp8")],
)
def test_a_prefix_and_samples_are_whole_prompts_repeated(prefix, samples, devices, cache_dtype):
    """Of rows whose prompts end within a page, at the end of one, and after one token."""
    model = small_model(mesh(devices) if devices else None)
    before, ids, lengths = tokens(prefix, seed=1), tokens(3, 11), np.array([4, 11, 1])
    real = np.arange(11) >= 11 - lengths[:, None]
    options = {"max_new_tokens": 14, "temperature": 1.0, "seed": 3, "page_size": 16, "cache_dtype": cache_dtype}
    got = deepseek.generate(
        model, ids, attention_mask=real, prefix_ids=before, num_samples=samples, eos_token_id=7, **options
    )
    assert got.shape == ((3, 14) if samples is None else (3, samples, 14))
    whole = [np.concatenate([tokens(11 - n), before, row[11 - n :]]) for n, row in zip(lengths, ids, strict=True)]
    mask = np.arange(11 + prefix) >= 11 - lengths[:, None]
    whole, mask = (np.repeat(x, samples or 1, axis=0) for x in (whole, mask))
    want = deepseek.generate(model, whole, attention_mask=mask, eos_token_id=7, **options)
    np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_whole_pages_of_a_prefix_are_shared(model):
    """The rest comes before each row's own tokens, which move to its start."""
    before, ids, mask = tokens(37, seed=1), tokens(2, 4), np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    for page_size, shared in ((16, 32), (37, 37), (64, 0)):
        prefix, joined, real = join_prefix(model.config, before, ids, mask, page_size)
        np.testing.assert_array_equal(before[:0] if prefix is None else prefix, before[:shared])
        assert joined.shape == real.shape == (2, 37 - shared + 4)
        for row, own in enumerate((ids[0, 2:], ids[1])):
            np.testing.assert_array_equal(joined[row][real[row] == 1], np.concatenate([before[shared:], own]))


def test_a_prefix_is_computed_once(model):
    """The prompt's pass over it has one row, whatever the batch."""

    def products(prefix, prompt):
        program, leaves = Program.of(model, inference=True)
        prefill, _ = _programs(program, None, 16)
        table, pages = reserve_pages(np.full(8, prefix + prompt), 9, 16, 1, prefix=prefix)
        fixed = np.zeros(1, np.int32), (np.uint32(0), np.float32(0), np.float32(1))
        options = {"prefix": tokens(prefix) if prefix else None, "pages": pages, "packed": False}
        made = jax.make_jaxpr(lambda *x: prefill(*x, **options))(
            leaves, tokens(8, prompt), np.ones((8, prompt), int), table, *fixed
        )
        return made.pretty_print(use_color=False)

    assert f"[{8 * 128},32]" in products(0, 128)  # the hidden states of all tokens
    shared = products(112, 16)
    assert f"[{8 * 128},32]" not in shared and "[112,32]" in shared and f"[{8 * 16},32]" in shared


def test_distribution_of_sample():
    """Frequencies against probabilities, with top_k and top_p cutting the tail."""
    probabilities = np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)
    rows = jnp.arange(20000)
    logits = jnp.broadcast_to(2.0 * jnp.log(probabilities), (rows.size, 5))

    def frequencies(top_k, top_p):
        scalars = np.uint32(0), np.float32(2.0), np.float32(top_p or 1)
        drawn = jax.jit(sample, static_argnums=3)(logits, rows, jnp.int32(3), (top_k, top_p is not None), *scalars)
        return np.bincount(drawn, minlength=5) / rows.size

    np.testing.assert_allclose(frequencies(None, None), probabilities, atol=0.015)
    np.testing.assert_allclose(frequencies(5, None), probabilities, atol=0.015)
    np.testing.assert_allclose(frequencies(2, None), [0, 4 / 7, 0, 3 / 7, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(None, 0.8), [0, 8 / 17, 0, 6 / 17, 3 / 17], atol=0.015)
    np.testing.assert_allclose(frequencies(5, 0.69), [0, 4 / 7, 0, 3 / 7, 0], atol=0.015)


@pytest.mark.parametrize("temperature", [1e-37, 1.2e-38])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    logits = jnp.array([[10.0, 30.0, 29.9, -5.0], [-7.0, -9.0, -8.0, -7.1]])
    for sampling in ((None, False), (3, False), (None, True)):
        scalars = np.uint32(0), np.float32(temperature), np.float32(0.9)
        drawn = jax.jit(sample, static_argnums=3)(logits, jnp.arange(2), jnp.int32(0), sampling, *scalars)
        np.testing.assert_array_equal(drawn, [1, 0])


@pytest.mark.parametrize(
    "options, sorts", [({}, False), ({"top_p": 1.0}, False), ({"top_k": 8}, True), ({"top_p": 0.9}, True)]
)
def test_what_drops_nothing_sorts_nothing(model, options, sorts, monkeypatch):
    calls = []
    top_k = jax.lax.top_k
    monkeypatch.setattr(jax.lax, "top_k", lambda x, k: calls.append(x.shape) or top_k(x, k))
    _programs.cache_clear()
    deepseek.generate(model, tokens(2, 9), max_new_tokens=2, temperature=0.7, page_size=16, **options)
    assert any(shape == (2, 64) for shape in calls) == sorts


def test_nothing_is_compiled_twice(model):
    def run(**options):
        return deepseek.generate(model, tokens(2, 9), max_new_tokens=5, temperature=0.5, page_size=16, **options)

    run()
    _programs.cache_clear()
    run(seed=1)
    prefill, decode = _programs(Program.of(model, inference=True)[0], (None, False), 16)
    assert _programs.cache_info().misses == 1  # the same functions
    run(seed=2)
    deepseek.generate(model, tokens(2, 12), max_new_tokens=4, temperature=0.9, page_size=16)
    assert _programs.cache_info().misses == 1
    assert prefill._cache_size() == 1 and decode._cache_size() == 1


# The cache.


def test_each_row_has_the_pages_of_its_own_tokens():
    table, pages = reserve_pages(np.array([33, 16, 1, 40]), 4, 16, devices=1)
    np.testing.assert_array_equal(table, [[0, 1, 2, -1], [3, -1, -1, -1], [4, -1, -1, -1], [5, 6, 7, -1]])
    assert pages == 8
    assert reserve_pages(np.array([33, 1, 1, 40]), 4, 16, devices=1)[1] == 8  # the same program for one page more
    assert reserve_pages(np.array([33, 1, 1, 17]), 4, 16, devices=1)[1] == 8
    assert reserve_pages(np.array([16, 1, 1, 16]), 4, 16, devices=1)[1] == 4


def test_rows_share_the_prefix_and_samples_the_full_pages_of_their_prompt():
    prompts = np.array([33, 48, 33])
    table, pages = reserve_pages(prompts + 10, 4, 16, devices=2, prompts=prompts, prefix=16, samples=2)
    first = [[0, 1, 2, -1], [0, 1, 3, -1], [0, 4, 5, 6], [0, 4, 5, 7]]
    np.testing.assert_array_equal(table, [*first, [0, 1, 2, -1], [0, 1, 3, -1], [-1] * 4, [-1] * 4])
    assert pages == 8


def test_pages_are_numbered_within_a_device():
    table, pages = reserve_pages(np.array([33, 16, 1]), 3, 16, devices=2)
    np.testing.assert_array_equal(table, [[0, 1, 2], [3, -1, -1], [0, -1, -1], [-1, -1, -1]])
    assert pages == 4


@pytest.mark.parametrize("devices", [None, 2])
def test_an_fp8_cache_is_one_of_rounded_rows(devices, monkeypatch):
    model = small_model(mesh(devices) if devices else None)
    ids, mask = tokens(3, 19), np.tri(3, 19, 16, dtype=int)
    options = {"max_new_tokens": 12, "attention_mask": mask, "page_size": 16}
    got = deepseek.generate(model, ids, cache_dtype="fp8", **options)

    def append_rounded(cache, rows, *where, latent_dim, **options):
        packed = kv_cache.pack(rows, latent_dim=latent_dim)
        sizes = {"latent_dim": latent_dim, "rope_dim": rows.shape[-1] - latent_dim}
        return append(cache, kv_cache.unpack(packed, dtype=rows.dtype, **sizes), *where, **options)

    append = kv_cache.append
    monkeypatch.setattr(kv_cache, "append", append_rounded)
    _programs.cache_clear()
    want = deepseek.generate(model, ids, **options)
    _programs.cache_clear()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_copies_no_cache(model, packed):
    program, leaves = Program.of(model)
    prefill, decode = _programs(program, None, 16)
    table = np.arange(4, dtype=np.int32).reshape(2, 2)
    fixed = np.zeros(0, np.int32), (np.uint32(0), np.float32(0), np.float32(1))
    prompt = tokens(2, 16), np.ones((2, 16), int), table
    token, state, _, absorbed = prefill(leaves, *prompt, *fixed, pages=5000, packed=packed)
    size = sum(x.nbytes for x in state["cache"])
    assert size == 2 * 5000 * 16 * (kv_cache.row_bytes(16, 8) if packed else 24 * 4)
    memory = decode.lower(leaves, absorbed, token, state, *fixed).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < size / 10


def logits_of_steps(dtype=jnp.float32, fp8=False, **config):
    """(lengths of prompts, seeds of their tokens) -> logits [b, 1 + 20, vocab]: after each row's prompt, and after each
    of the next tokens."""
    model = small_model(hidden_size=96, kv_lora_rank=64, **config)
    model.dtype, model.fp8 = np.dtype(dtype), fp8
    program, leaves = Program.of(model)
    new, page_size, rows = 20, 16, program.rows
    at = functools.partial(jnp.take_along_axis, axis=1)

    @jax.jit
    @functools.partial(program.map, in_specs=(rows,) * 3, out_specs=(rows, rows))
    def prefill(parts, ids, lengths, table):
        x, rows_of_layers, _ = parts["model"](ids, lengths, program.run)
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)
        positions = jnp.where(positions < lengths[:, None], positions, -1)
        empty = jnp.zeros((table.size, page_size, model.config.latent_width), dtype)
        cache = [kv_cache.append(empty, r, table, positions) for r in rows_of_layers]
        return head(parts, at(x, lengths[:, None, None] - 1), program.run), cache

    @jax.jit
    @functools.partial(program.map, in_specs=(rows,) * 4, out_specs=(rows, rows))
    def decode(parts, token, cache, table, seq_lens):
        absorbed = parts["model"].absorbed(program.run)
        x, cache = parts["model"].decode(token, cache, absorbed, table, seq_lens, seq_lens > 0, program.run)
        return head(parts, x, program.run), cache

    def run(lengths, seeds):
        lengths = np.array(lengths, np.int32)
        table, _ = reserve_pages(lengths + new, 3, page_size, devices=1)
        ids = np.stack([tokens(40, seed=seed) for seed in seeds])
        step, cache = prefill(leaves, ids[:, :-new], lengths, table)
        steps = [step]
        for i in range(new):
            token = np.take_along_axis(ids, lengths[:, None] + i, axis=1)
            step, cache = decode(leaves, token, cache, table, lengths + i + 1)
            steps.append(step)
        return np.concatenate(steps, axis=1)

    return run


def test_a_row_has_the_same_bits_whatever_the_others_are():
    """Of layers without experts: how many rows an expert gets depends on the others, and with it the order of sums."""
    run = logits_of_steps(first_k_dense_replace=2)
    first = run([20, 20, 20, 20], [0, 1, 2, 3])
    assert first.shape == (4, 21, 64) and (first[0, 0] != first[1, 0]).any()
    others = ([20, 20, 20, 20], [0, 4, 5, 6]), ([20, 13, 1, 20], [0, 1, 2, 3]), ([20, 4, 20, 7], [0, 4, 5, 6])
    for lengths, seeds in others:
        np.testing.assert_array_equal(run(lengths, seeds)[0], first[0])


@pytest.mark.parametrize("dtype, fp8", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_a_prompt_has_the_same_bits_alone_and_in_a_batch(dtype, fp8):
    """In a process whose products have one order of sums for any number of rows, and where what XLA compiles itself is
    the same code for a row in a vector and for one in the remainder of a loop."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); "
    code += f"import test_deepseek_generate as t; t.check_batch_invariance({dtype!r}, {fp8})"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_max_isa=AVX2"
    env = {**os.environ, "JAXKERN_BATCH_INVARIANT": "1", "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_norms_are_compiled_without_an_approximate_root():
    """Whose bits XLA:CPU lets depend on the number of rows."""
    model = small_model()
    text = jax.jit(model.model.norm).lower(jnp.ones((4, 1, model.config.hidden_size))).compile().as_text()
    assert "sqrt(" in text and "rsqrt(" not in text


def check_batch_invariance(dtype, fp8):
    run = logits_of_steps(dtype, fp8)
    lengths = np.array([20, 13, 1, 7, 20, 2, 16, 19])
    alone = [run([length], [seed])[0] for seed, length in enumerate(lengths)]
    for batch in ([1, 0], [4, 5, 2], [3, 0, 2, 1], [6, 4, 7, 1, 3, 0, 2, 5]):
        for row, logits in zip(batch, run(lengths[batch], batch), strict=True):
            np.testing.assert_array_equal(logits, alone[row], f"row {row} of {batch}")


def test_progress(model, capsys):
    deepseek.generate(model, tokens(2, 9), max_new_tokens=5, page_size=16, progress=True)
    assert "5/5" in capsys.readouterr().err


def test_errors(model):
    ids = tokens(2, 3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        deepseek.generate(model, ids, max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature"):
        deepseek.generate(model, ids, max_new_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match="top_k"):
        deepseek.generate(model, ids, max_new_tokens=1, top_k=0)
    with pytest.raises(ValueError, match="top_p"):
        deepseek.generate(model, ids, max_new_tokens=1, top_p=0.0)
    with pytest.raises(ValueError, match="cache_dtype must be None or 'fp8', got 'int8'"):
        deepseek.generate(model, ids, max_new_tokens=1, cache_dtype="int8")
    with pytest.raises(ValueError, match="latent_dim of a packed row must be a positive multiple of 4, got 18"):
        deepseek.generate(small_model(kv_lora_rank=18), ids, max_new_tokens=1, cache_dtype="fp8")
    with pytest.raises(ValueError, match="every row needs a real token"):
        deepseek.generate(model, ids, max_new_tokens=1, attention_mask=np.array([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        deepseek.generate(model, ids, max_new_tokens=1, num_samples=0)
    with pytest.raises(ValueError, match=r"generate: prefix_ids must be \[p\], got \[2, 3\]"):
        deepseek.generate(model, ids, max_new_tokens=1, prefix_ids=ids)
    with pytest.raises(ValueError, match=r"generate: prefix_ids must be in 0..63, got 1..64"):
        deepseek.generate(model, ids, max_new_tokens=1, prefix_ids=[1, 64])
    for options in (
        {"max_new_tokens": 2.0},
        {"num_samples": 2.0},
        {"prefix_ids": [1.0]},
        {"top_k": 2.5},
        {"page_size": 64.0},
        {"seed": None},
        {"eos_token_id": 1.7},
    ):
        with pytest.raises(TypeError, match=f"generate: {[*options][0]} must be (an integer|integers), got "):
            deepseek.generate(model, ids, **{"max_new_tokens": 1, "temperature": 1.0} | options)
    with pytest.raises(ValueError, match="input_ids must have rows of one length"):
        deepseek.generate(model, [[1, 2, 3], [1, 2]], max_new_tokens=1)
    with pytest.raises(ValueError, match="row 0 has holes"):
        deepseek.generate(model, ids, max_new_tokens=1, attention_mask=np.array([[1, 0, 1], [1, 1, 1]]))
