"""Generation: golden tokens, what stops and what is drawn, and that nothing is compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deepseek_tools import GOLDEN, expected, mesh, small_model, tokens
from jax.sharding import AxisType

from jaxkern.models import deepseek
from jaxkern.models.deepseek.generate import sample
from jaxkern.models.deepseek.model import Program

CASES = ["v3-tiny", "v3-latent512", "v3-padded", "v3-fp8", "v3-mtp"]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.parametrize(
    "case, implementation, devices",
    [(case, None, None) for case in CASES]
    + [pytest.param(case, "xla", None, marks=pytest.mark.slow) for case in CASES]
    + [("v3-padded", None, 4), ("v3-fp8", None, 4), ("v3-tiny", None, 1)],
)
def test_golden_tokens(case, implementation, devices):
    want = expected(case)
    on = {None: None, 1: mesh(1), 4: mesh(4, AxisType.Explicit, (2, 2), ("hosts", "devices"))}[devices]
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
    np.testing.assert_array_equal(draw(temperature=1e-4), greedy)


def test_draws_do_not_depend_on_the_mesh(model):
    ids = tokens(3, 9)
    options = {"max_new_tokens": 4, "temperature": 0.7, "seed": 5, "page_size": 16}
    spread = deepseek.generate(small_model(mesh(2)), ids, **options)
    np.testing.assert_array_equal(spread, deepseek.generate(model, ids, **options))


def test_distribution_of_sample():
    """Frequencies against probabilities, with top_k and top_p cutting the tail."""
    probabilities = np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)
    rows = jnp.arange(20000)
    logits = jnp.broadcast_to(2.0 * jnp.log(probabilities), (rows.size, 5))

    def frequencies(top_k, top_p):
        scalars = np.uint32(0), np.float32(2.0), np.float32(top_p or 1)
        drawn = jax.jit(sample, static_argnums=3)(logits, rows, jnp.int32(3), (top_k, top_p is not None), *scalars)
        return np.bincount(drawn, minlength=5) / rows.size

    np.testing.assert_allclose(frequencies(5, None), probabilities, atol=0.015)
    np.testing.assert_allclose(frequencies(2, None), [0, 4 / 7, 0, 3 / 7, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(5, 0.8), [0, 8 / 17, 0, 6 / 17, 3 / 17], atol=0.015)
    np.testing.assert_allclose(frequencies(5, 0.69), [0, 4 / 7, 0, 3 / 7, 0], atol=0.015)


def test_nothing_is_compiled_twice(model):
    from jaxkern.models.deepseek.generate import _programs

    def run(**options):
        return deepseek.generate(model, tokens(2, 9), max_new_tokens=5, temperature=0.5, page_size=16, **options)

    run()
    _programs.cache_clear()
    run(seed=1)
    prefill, decode = _programs(Program.of(model)[0], (64, False), 16)
    assert _programs.cache_info().misses == 1  # the same functions
    run(seed=2)
    deepseek.generate(model, tokens(2, 12), max_new_tokens=4, temperature=0.9, page_size=16)
    assert _programs.cache_info().misses == 1
    assert prefill._cache_size() == 1 and decode._cache_size() == 1


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
    with pytest.raises(ValueError, match="every row needs a real token"):
        deepseek.generate(model, ids, max_new_tokens=1, attention_mask=np.array([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match="row 0 has holes"):
        deepseek.generate(model, ids, max_new_tokens=1, attention_mask=np.array([[1, 0, 1], [1, 1, 1]]))
