"""The Hopper kernels that move rows: against loops, to the bit where rows are copied, quantised or summed."""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from contract import HOPPER_IMPLEMENTATION

import jaxkern
from jaxkern import _ffi, moe

pytestmark = pytest.mark.skipif(HOPPER_IMPLEMENTATION == "none", reason="no implementation to test")

BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu


def run(op, *arrays, **params):
    return [np.asarray(x) for x in _ffi.call(op, *arrays, implementation=HOPPER_IMPLEMENTATION, **params)]


def run_in_any_order(simulator, *args, **params):
    """The results of one seed of the simulator, after they have been found to be those of others."""
    first = run(*args, **params)
    for seed in range(1, 8 if HOPPER_IMPLEMENTATION == "sim" else 2):
        simulator.configure(seed=seed, multiprocessors=1 + 3 * seed)
        for again, result in zip(run(*args, **params), first, strict=True):
            np.testing.assert_array_equal(bits(again), bits(result))
    return first


def bits(x):
    return x.view(f"u{x.dtype.itemsize}")


def normal(*shape, dtype=np.float32, seed=0):
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * 40).astype(np.float32).astype(dtype)


def integers(low, high, *shape, seed=0):
    return np.random.default_rng([seed, *shape]).integers(low, high, shape).astype(np.int32)


def route_by_hand(scores, bias, num_groups, topk_groups, top_k):
    """Of one token. Sorting is stable, so that ties go to the lower index."""
    with np.errstate(invalid="ignore"):
        biased = (scores + bias).reshape(num_groups, -1)
        biased = np.where(np.isnan(biased), -np.inf, biased)
        groups = np.sort(biased, axis=1)[:, -2:].sum(1)
    best = np.argsort(np.where(np.isnan(groups), np.inf, -groups), kind="stable")[:topk_groups]
    rest = np.setdiff1d(np.arange(num_groups), best)
    excluded = np.zeros_like(biased)
    excluded[rest] = 1
    return np.lexsort((-biased.reshape(-1), excluded.reshape(-1)))[:top_k]


@pytest.mark.parametrize(
    "experts, num_groups, topk_groups, top_k",
    [
        (256, 8, 4, 8),
        (256, 1, 1, 8),
        (1024, 32, 3, 64),
        (24, 24, 5, 5),
        (7, 1, 1, 7),
        (72, 3, 2, 40),
        (1000, 250, 9, 9),
    ],
)
def test_route(experts, num_groups, topk_groups, top_k, simulator):
    scores, bias = normal(37, experts) / 40, np.round(normal(experts) / 20) / 4
    scores[1], scores[2] = 0.25, -0.0  # ties
    scores[3] = np.round(scores[3])
    scores[4:9][np.random.default_rng(0).random((5, experts)) < 0.7] = np.nan
    scores[9:13][np.random.default_rng(1).random((4, experts)) < 0.5] = -np.inf
    scores[13, ::3], scores[14], scores[15, : experts // 2] = np.inf, np.nan, -np.inf
    bias[: 2 * experts // num_groups] = 0
    options = {"num_groups": num_groups, "topk_groups": topk_groups, "top_k": top_k}
    (got,) = run_in_any_order(simulator, moe.ROUTE, scores, bias, **options)
    np.testing.assert_array_equal(got, [route_by_hand(row, bias, num_groups, topk_groups, top_k) for row in scores])


def assign_by_hand(ids, groups, rows, slabs, alignment):
    chosen = [np.flatnonzero(ids.reshape(-1) == group) for group in range(groups)]
    slots, source, sizes, dropped, start = np.full(ids.size, -1), np.full(rows, -1), [], [], 0
    for group, assignments in enumerate(chosen):
        start, end = (group * (rows // groups), (group + 1) * (rows // groups)) if slabs else (min(start, rows), rows)
        kept = assignments[: end - start]
        slots[kept] = start + np.arange(len(kept))
        source[start : start + len(kept)] = kept
        sizes.append(len(kept))
        dropped.append(len(assignments) - len(kept))
        start += -(-len(assignments) // alignment) * alignment
    return slots.reshape(ids.shape), source, sizes, dropped


@pytest.mark.parametrize(
    "tokens, top_k, groups, rows, slabs, alignment",
    [
        (33, 3, 6, 120, False, 1),
        (33, 3, 6, 120, False, 8),
        (300, 8, 256, 2000, False, 1),
        (700, 8, 256, 5000, False, 64),  # three blocks of threads, and not room for all
        (700, 8, 40, 40 * 150, True, 1),
        (600, 8, 1024, 40000, False, 16),
        (5000, 8, 8, 8 * 5000, True, 1),  # more than a step for each warp
        (0, 2, 3, 7, False, 1),
        (5, 2, 7, 3, True, 1),  # slabs of no rows
        (300, 2, 1, 500, False, 1),
        (5, 1, 4, 8, False, 2**31 - 1),
        (1, 1, 2, 10**5, False, 2**31 - 1),
        (9, 2, 3, 0, False, 1),
    ],
)
def test_assign_slots(tokens, top_k, groups, rows, slabs, alignment, simulator):
    ids = integers(-2, groups + 1, tokens, top_k)
    ids[1::7] = groups // 2
    ids[::11, :1] = [[2**31 - 1]]
    options = {"num_groups": groups, "rows": rows, "slabs": slabs, "alignment": alignment}
    got = run_in_any_order(simulator, moe.ASSIGN_SLOTS, ids, **options)
    for result, expected in zip(got, assign_by_hand(ids, groups, rows, slabs, alignment), strict=True):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("hidden", [1, 2, 6, 8, 77, 136, 1032])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int32, np.uint8, E4M3, E8M0])
def test_gather_rows(dtype, hidden, simulator):
    x = integers(0, 256, 9, hidden * np.dtype(dtype).itemsize).astype(np.uint8).view(dtype)  # any bits
    source = integers(-4, 9 * 3 + 4, 40)
    source[:2] = -(2**31), 2**31 - 1
    none = jnp.zeros((0, 0))
    there = (source >= 0) & (source < 27)
    rows = bits(x)[np.where(there, source // 3, 0)]
    options = {"top_k": 3, "weighted": False}
    (got,) = run_in_any_order(simulator, moe.GATHER_ROWS, x, source, none, zero_gaps=True, **options)
    np.testing.assert_array_equal(bits(got), np.where(there[:, None], rows, 0))
    (got,) = run(moe.GATHER_ROWS, x, source, none, zero_gaps=False, **options)
    np.testing.assert_array_equal(bits(got)[there], rows[there])


@pytest.mark.parametrize("hidden", [1, 8, 77, 1032])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_gather_rows_with_weights(dtype, hidden, simulator):
    x, weights, source = normal(9, hidden, dtype=dtype), normal(9, 3), integers(-4, 31, 40)
    weights[integers(0, 9, 2)] = 0
    x[0, 0] = np.nan  # of rows that nobody takes, too
    options = {"top_k": 3, "weighted": True, "zero_gaps": True}
    (got,) = run_in_any_order(simulator, moe.GATHER_ROWS, x, source, weights, **options)
    there = (source >= 0) & (source < 27)
    index = np.where(there, source, 0)
    rows = (x[index // 3].astype(np.float32) * weights.reshape(-1)[index, None]).astype(dtype)
    np.testing.assert_array_equal(got.astype(np.float32), np.where(there[:, None], rows, 0).astype(np.float32))


def quantize_by_hand(x, scale_format):
    blocks = [x[:, i : i + 128].astype(np.float32) for i in range(0, x.shape[1], 128)]
    scales = np.stack([np.maximum(np.abs(b).max(1), np.float32(1e-4)) / np.float32(448) for b in blocks], 1)
    if scale_format != "float32":
        scales = np.exp2(np.ceil(np.log2(scales.astype(np.float64)))).astype(np.float32)
    values = np.concatenate([(b / scales[:, i : i + 1]).astype(E4M3) for i, b in enumerate(blocks)], 1)
    return values, scales.astype(E8M0) if scale_format == "ue8m0" else scales


@pytest.mark.parametrize("told", ["slots", "wrong slots"])
@pytest.mark.parametrize("scale_format", ["float32", "power_of_two", "ue8m0"])
@pytest.mark.parametrize("hidden", [1, 24, 77, 640, 1160])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_gather_quantize_rows(dtype, hidden, scale_format, told, simulator):
    x, ids = normal(12, hidden, dtype=dtype), integers(-1, 6, 12, 3)
    x[3] *= 0
    slots, source, *_ = assign_by_hand(ids, 6, 56, False, 8)
    if told == "wrong slots":
        slots = integers(-3, 60, 12, 3)
        source[5], source[9], source[:2] = source[20], 3, (-(2**31), 2**31 - 1)
    source, slots = source.astype(np.int32), slots.astype(np.int32)
    options = {"top_k": 3, "scale_format": scale_format}
    zeroed = run_in_any_order(simulator, moe.GATHER_QUANTIZE_ROWS, x, source, slots, zero_gaps=True, **options)
    left_alone = run(moe.GATHER_QUANTIZE_ROWS, x, source, slots, zero_gaps=False, **options)
    there = (source >= 0) & (source < 36)
    for with_zeros, without, token in zip(zeroed, left_alone, quantize_by_hand(x, scale_format), strict=True):
        rows = bits(token)[np.where(there, source // 3, 0)]
        np.testing.assert_array_equal(bits(with_zeros), np.where(there[:, None], rows, 0))
        np.testing.assert_array_equal(bits(without)[there], rows[there])


def sum_by_hand(leaves, low, high):
    """leaves: (key, row), sorted by key: halves of the keys to halves, the rows of one key from left to right."""
    if len(leaves) == 1:
        return leaves[0][1]
    if high - low == 1:
        return functools.reduce(np.add, [row for _, row in leaves])
    middle = low + (high - low) // 2
    left, right = [leaf for leaf in leaves if leaf[0] < middle], [leaf for leaf in leaves if leaf[0] >= middle]
    halves = [sum_by_hand(part, *keys) for part, *keys in ((left, low, middle), (right, middle, high)) if part]
    return functools.reduce(np.add, halves)


def keys_of(tokens, top_k, num_keys):
    keys = integers(-1, min(num_keys + 1, 2**31 - 1), tokens, top_k)
    deep = 2 ** integers(0, int(num_keys).bit_length(), tokens, top_k, seed=1).astype(np.int64) - 1  # few of one depth
    keys[::3] = np.minimum(deep, 2**31 - 1)[::3]
    return keys


@pytest.mark.parametrize("bias", [None, np.float32, BF16])
@pytest.mark.parametrize(
    "hidden, top_k, num_keys",
    [(24, 3, 8), (1032, 8, 256), (513, 1, 3), (136, 9, 1000), (300, 12, 100), (132, 64, 2**31 - 1), (77, 40, 1)],
)
@pytest.mark.parametrize("out_dtype", [np.float32, BF16])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_sum_rows(dtype, out_dtype, hidden, top_k, num_keys, bias, simulator):
    tokens, rows = 7, normal(40, hidden, dtype=dtype)
    slots, keys = integers(-1, 41, tokens, top_k), keys_of(tokens, top_k, num_keys)
    slots[4] = -1  # nothing to sum
    weights = normal(tokens, top_k, seed=2)
    bias = np.zeros((0, 0), np.float32) if bias is None else normal(tokens, hidden, dtype=bias)
    options = {"num_keys": num_keys, "out_dtype": np.dtype(out_dtype).name}
    (got,) = run_in_any_order(simulator, moe.SUM_ROWS, rows, slots, keys, weights, bias, **options)
    expected = np.zeros((tokens, hidden), np.float32)
    for t in range(tokens):
        there = [j for j in range(top_k) if 0 <= slots[t, j] < 40 and 0 <= keys[t, j] < num_keys]
        leaves = [(keys[t, j], rows[slots[t, j]].astype(np.float32) * weights[t, j]) for j in there]
        if leaves:
            expected[t] = sum_by_hand(sorted(leaves, key=lambda leaf: leaf[0]), 0, num_keys)
    if bias.size:
        expected = expected + bias.astype(np.float32)
    np.testing.assert_array_equal(bits(got), bits(expected.astype(out_dtype)))


@pytest.mark.parametrize("hidden, top_k", [(24, 3), (1032, 8), (513, 1), (2100, 12)])
@pytest.mark.parametrize("x_dtype", [np.float32, BF16])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_dot_rows(dtype, x_dtype, hidden, top_k, simulator):
    rows, x, slots = normal(20, hidden, dtype=dtype), normal(9, hidden, dtype=x_dtype), integers(-1, 21, 9, top_k)
    (got,) = run_in_any_order(simulator, moe.DOT_ROWS, rows, slots, x)
    there = (slots >= 0) & (slots < 20)
    products = rows[np.where(there, slots, 0)].astype(np.float64) * x[:, None].astype(np.float64)
    error = np.abs(got - np.where(there, products.sum(-1), 0))
    assert (error <= 1e-5 * np.abs(products).sum(-1)).all() and (got[~there] == 0).all()


def test_too_many_experts_are_refused():
    with pytest.raises(NotImplementedError, match="route: .* at most 1024 experts, got 1025"):
        jaxkern.route(jnp.zeros((4, 1025)), jnp.zeros(1025), top_k=2, implementation=HOPPER_IMPLEMENTATION)
    with pytest.raises(NotImplementedError, match="route: .* num_groups must be at most 256, got 500"):
        options = {"top_k": 2, "num_groups": 500, "topk_groups": 5}
        jaxkern.route(jnp.zeros((4, 1000)), jnp.zeros(1000), **options, implementation=HOPPER_IMPLEMENTATION)


def test_too_many_groups_are_refused():
    ids, ones = jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 2))
    with pytest.raises(NotImplementedError, match="assign_slots: .* at most 1024 groups, got 1025"):
        jaxkern.dispatch(jnp.ones((4, 8)), ids, ones, num_experts=1025, implementation=HOPPER_IMPLEMENTATION)
