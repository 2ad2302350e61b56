"""dispatch, combine and replay over meshes: against loops over tokens, and against themselves on other meshes.

Every layout, transport and number of levels must bring the same rows to the same places, and the same bits back.
"""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import HOPPER_IMPLEMENTATION
from jax.sharding import PartitionSpec as P
from moe_tools import random_routing

import jaxkern

TOKENS, HIDDEN, EXPERTS, TOP_K = 48, 136, 24, 4
RANKS = next(n for n in (8, 4, 2, 1) if n <= jax.device_count())  # 8 on CPUs; on GPUs as many as there are
HALF = max(1, RANKS // 2)
ONE_LEVEL, TWO_LEVELS = (RANKS,), (2, HALF)
ON_CPUS = jax.default_backend() == "cpu"


def axes(shape):
    return ("expert",) if len(shape) == 1 else ("host", "device")


def on_mesh(shape, f, *arrays):
    """`f` of each rank's part of the arrays: results with a leading axis of ranks."""
    mesh = jax.make_mesh(shape, axes(shape))
    spec = P(axes(shape))
    mapped = jax.shard_map(
        lambda *parts: jax.tree.map(lambda r: r[None], f(*parts)), mesh=mesh, in_specs=spec, out_specs=spec
    )
    arrays = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in arrays]
    return jax.tree.map(np.asarray, jax.jit(mapped)(*arrays))


def options(shape, **more):
    name = axes(shape)
    return {"num_experts": EXPERTS, "axis_name": name[0] if len(shape) == 1 else name} | more


def example(seed=0, dtype=np.float32):
    ids, weights = random_routing(TOKENS, EXPERTS, TOP_K, seed)
    x = np.random.default_rng(seed).standard_normal((TOKENS, HIDDEN)).astype(dtype)
    ids[: TOKENS // 8] = 5  # a rank whose every choice is one expert
    ids[TOKENS // 8 : TOKENS // 4] = -1  # and one whose tokens go nowhere
    ids[: TOKENS // 8, 1:] = -1
    return x, ids, weights


# What arrives, by hand


def arriving(x, ids, weights, ranks, wire_capacity=None):
    """For each rank the tokens that reach it: (source rank, row, ids there, weights); the choices lost on the way."""
    local, t = EXPERTS // ranks, TOKENS // ranks
    lost = np.zeros(EXPERTS, np.int32)
    result = [[] for _ in range(ranks)]
    for source in range(ranks):
        sent = [0] * ranks
        for token in range(source * t, (source + 1) * t):
            for rank in range(ranks):
                there = (ids[token] >= rank * local) & (ids[token] < (rank + 1) * local)
                if not there.any():
                    continue
                if wire_capacity is not None and sent[rank] == wire_capacity:
                    np.add.at(lost, ids[token][there], 1)
                    continue
                sent[rank] += 1
                mine = np.where(there, ids[token] - rank * local, -1)
                result[rank].append((source, x[token], mine, np.where(there, weights[token], 0)))
    return result, lost


def sorted_by_expert(tokens, experts, rows, masked):
    """One rank's received rows, sizes and drops, for layouts "expert" and "masked"."""
    groups = [[row for _, row, ids, _ in tokens for i in ids if i == e] for e in range(experts)]
    if masked:
        received = np.zeros((experts, rows, HIDDEN), np.float32)
        for e, group in enumerate(groups):
            for i, row in enumerate(group[:rows]):
                received[e, i] = row
        sizes = [min(len(group), rows) for group in groups]
    else:
        received = np.zeros((rows, HIDDEN), np.float32)
        sizes, start = [], 0
        for group in groups:
            kept = group[: max(rows - start, 0)]
            received[start : start + len(kept)] = kept if kept else 0
            start += len(group)
            sizes.append(len(kept))
    return received, sizes, [len(group) - size for group, size in zip(groups, sizes, strict=True)]


ARRIVALS = [
    (ONE_LEVEL, {}),
    (ONE_LEVEL, {"transport": "all_to_all"}),
    (ONE_LEVEL, {"transport": "all_to_all", "capacity": 20}),
    (ONE_LEVEL, {"wire_capacity": 2}),
    (ONE_LEVEL, {"layout": "masked"}),
    (ONE_LEVEL, {"layout": "masked", "capacity": 3, "wire_capacity": 2}),
    (TWO_LEVELS, {}),
    (TWO_LEVELS, {"transport": ("all_to_all", "gather"), "layout": "masked"}),
    (TWO_LEVELS, {"transport": "all_to_all", "wire_capacity": (TOKENS // RANKS, 2 * TOKENS // RANKS), "capacity": 12}),
    ((1,), {"transport": "all_to_all"}),
]


@pytest.mark.parametrize("shape, how", ARRIVALS, ids=str)
@pytest.mark.parametrize("implementation", ["cpu", "xla", *[HOPPER_IMPLEMENTATION] * (HOPPER_IMPLEMENTATION != "none")])
def test_received_rows(shape, how, implementation):
    x, ids, weights = example()
    ranks = math.prod(shape)

    def f(x, ids, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, **options(shape, **how), implementation=implementation)
        return received, handle.group_sizes, handle.dropped

    def without_zeros(x, ids, weights):
        how_else = options(shape, **how, zero_gaps=False)
        received, handle = jaxkern.dispatch(x, ids, weights, **how_else, implementation=implementation)
        return jnp.where((handle.source >= 0).reshape(received.shape[:-1])[..., None], received, 0)

    received, sizes, dropped = on_mesh(shape, f, x, ids, weights)
    np.testing.assert_array_equal(on_mesh(shape, without_zeros, x, ids, weights), received)
    masked = how.get("layout") == "masked"
    wire_capacity = how.get("wire_capacity") if len(shape) == 1 else None  # in two levels: room for all here
    tokens, lost = arriving(x, ids, weights, ranks, wire_capacity)
    for rank in range(ranks):
        rows, kept, over = sorted_by_expert(tokens[rank], EXPERTS // ranks, received.shape[2 if masked else 1], masked)
        np.testing.assert_array_equal(received[rank], rows)
        np.testing.assert_array_equal(sizes[rank], kept)
        np.testing.assert_array_equal(dropped[rank], np.split(lost, ranks)[rank] + over)
    if "capacity" in how or wire_capacity:
        assert dropped.sum() > 0


@pytest.mark.parametrize("transport", ["gather", "all_to_all"])
@pytest.mark.parametrize("wire_capacity", [None, 2])
def test_received_rows_of_layout_rank(transport, wire_capacity):
    x, ids, weights = example()

    def f(x, ids, weights):
        how = options(ONE_LEVEL, layout="rank", transport=transport, wire_capacity=wire_capacity)
        received, handle = jaxkern.dispatch(x, ids, weights, **how)
        return received, handle.expert_ids, handle.weights, handle.group_sizes, handle.dropped

    def without_zeros(x, ids, weights):
        how = options(ONE_LEVEL, layout="rank", transport=transport, wire_capacity=wire_capacity, zero_gaps=False)
        received, handle = jaxkern.dispatch(x, ids, weights, **how)
        return jnp.where((handle.expert_ids >= 0).any(1, keepdims=True), received, 0)

    received, local_ids, local_weights, sizes, dropped = on_mesh(ONE_LEVEL, f, x, ids, weights)
    np.testing.assert_array_equal(on_mesh(ONE_LEVEL, without_zeros, x, ids, weights), received)
    tokens, lost = arriving(x, ids, weights, RANKS, wire_capacity)
    share = wire_capacity or TOKENS // RANKS
    np.testing.assert_array_equal(dropped.reshape(-1), lost)
    for rank in range(RANKS):
        for source in range(RANKS):
            expected = [token[1:] for token in tokens[rank] if token[0] == source]
            assert sizes[rank, source] == len(expected)
            padding = [(np.zeros(HIDDEN), np.full(TOP_K, -1), np.zeros(TOP_K))] * (share - len(expected))
            for got, wanted in zip(
                (received, local_ids, local_weights), zip(*expected, *padding, strict=True), strict=True
            ):
                np.testing.assert_array_equal(got[rank, source * share : (source + 1) * share], np.stack(wanted))


# What comes back


def layer(shape, how, back, x, ids, weights, w):
    """Every expert its own matrix, which its rank alone holds."""
    received, handle = jaxkern.dispatch(x, ids, weights, **options(shape, **how))
    rows = received.reshape(-1, HIDDEN)
    if handle.layout == "rank":
        if ON_CPUS:
            each = jnp.tanh(jnp.einsum("rh,ehk->erk", rows, w, precision="highest"))
        else:
            each = jnp.tanh(rows[None, :, : w.shape[-1]] * w[:, :1])
        chosen = handle.expert_ids[None] == jnp.arange(w.shape[0])[:, None, None]
        y = (each * (chosen * handle.weights).sum(-1)[..., None]).sum(0)
    else:
        if handle.layout == "masked":
            expert = jnp.repeat(jnp.arange(w.shape[0]), received.shape[1])
        else:
            expert = jnp.repeat(jnp.arange(w.shape[0]), handle.group_sizes, total_repeat_length=rows.shape[0])
        if ON_CPUS:
            y = jnp.tanh(jnp.einsum("rh,rhk->rk", rows, w[expert], precision="highest"))
        else:  # a product there may have other bits for other numbers of rows
            y = jnp.tanh(rows[:, : w.shape[-1]] * w[expert, 0])
    return jaxkern.combine(y.reshape(*received.shape[:-1], -1), handle, **back)


def result_and_gradients(shape, how, back):
    x, ids, weights = example(1)
    w = np.random.default_rng(2).standard_normal((EXPERTS, HIDDEN, 24)).astype(np.float32) / 9
    mesh = jax.make_mesh(shape, axes(shape))
    spec = P(axes(shape))
    f = jax.shard_map(functools.partial(layer, shape, how, back), mesh=mesh, in_specs=spec, out_specs=spec)

    def objective(x, weights, w, ids):
        y = f(x, ids, weights, w)
        return (y * jnp.cos(y.astype(jnp.float32))).sum(), y

    arrays = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in (x, weights, w, ids)]
    (_, y), gradients = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(a) for a in (y, *gradients)]


@functools.cache
def on_one_device():
    return result_and_gradients((1,), {}, {})


BY_EXPERT = {"reduction": "expert"}
SAME_BITS = [
    (ONE_LEVEL, {"transport": "all_to_all"}, {}),
    ((HALF,), {"layout": "masked"}, {}),
    (TWO_LEVELS, {}, {}),
    ((HALF, 2), {"transport": ("all_to_all", "gather"), "layout": "masked"}, {}),
    (ONE_LEVEL, {}, BY_EXPERT),
    (TWO_LEVELS, {"transport": "all_to_all"}, BY_EXPERT),
]


@pytest.mark.parametrize("shape, how, back", SAME_BITS, ids=str)
def test_same_bits_as_on_one_device(shape, how, back):
    """The result, and the gradients to tokens, weights and experts. XLA scatters the last, on a GPU in any order."""
    *got, got_experts = result_and_gradients(shape, how, back)
    *expected, expected_experts = on_one_device()
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(got_experts, expected_experts, rtol=0 if ON_CPUS else 1e-4, atol=0 if ON_CPUS else 1e-5)


@pytest.mark.parametrize("shape, how", [((3,), {}), ((2, 3), {"transport": "all_to_all"})], ids=str)
def test_same_sums_by_expert_on_any_number_of_ranks(shape, how):
    """No power of two: only the sums that are made at the token."""
    np.testing.assert_array_equal(result_and_gradients(shape, how, BY_EXPERT)[0], on_one_device()[0])


@pytest.mark.parametrize("shape, how, back", [((3,), {}, {}), (TWO_LEVELS, {"layout": "rank"}, {})], ids=str)
def test_same_sums_as_on_one_device(shape, how, back):
    for got, expected in zip(result_and_gradients(shape, how, back), on_one_device(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_on_the_wire_rounds_each_ranks_sum_once():
    """Two ranks' sums, 257 and 1: bfloat16 has 256 or 258 for the first."""
    x = np.ones((8, HIDDEN), np.float32)
    ids = np.tile(np.array([[0, 1, 12]], np.int32), (8, 1))
    weights = np.tile(np.array([[256.0, 1.0, 1.0]], np.float32), (8, 1))

    def f(x, ids, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, **options((2,)))
        return [jaxkern.combine(received, handle, wire_dtype=dtype) for dtype in (None, jnp.bfloat16)]

    exact, rounded = on_mesh((2,), f, x, ids, weights)
    assert (exact == 258).all() and (rounded == 257).all()


@pytest.mark.parametrize("shape", [(1,), ONE_LEVEL, TWO_LEVELS], ids=str)
def test_bias_is_added_before_the_one_rounding(shape):
    """256 + 1 + 1 is exact; 256 + 1 is not, in bfloat16."""
    x, _, _ = example(dtype=jnp.bfloat16)
    ids = np.full((TOKENS, TOP_K), -1, np.int32)
    ids[:, 0] = 3
    bias = jnp.ones((TOKENS, HIDDEN), jnp.bfloat16)

    def f(x, ids, bias):
        received, handle = jaxkern.dispatch(x, ids, jnp.full(ids.shape, 257.0), **options(shape))
        ones = jnp.ones_like(received)
        value, vjp = jax.vjp(lambda bias: jaxkern.combine(ones, handle, bias=bias), bias)
        return value, vjp(value)[0]

    y, d_bias = on_mesh(shape, f, x, ids, bias)
    assert y.dtype == jnp.bfloat16 and (y == 258).all() and (d_bias == 258).all()


@pytest.mark.parametrize("shape, how", [((1,), {}), (ONE_LEVEL, {"wire_capacity": 3}), (TWO_LEVELS, {})], ids=str)
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_fp8_rows_are_the_quantised_rows(shape, how, scale_format):
    """Quantised on the way, and quantised before: the same bytes as quantising what arrives."""
    x, ids, weights = example()

    def f(x, ids, weights):
        dispatch = functools.partial(jaxkern.dispatch, expert_ids=ids, weights=weights, **options(shape, **how))
        plain, handle = dispatch(x)
        before = dispatch(jaxkern.quantize(x, scale_format=scale_format))[0]
        on_the_way = dispatch(x, quantize="fp8", scale_format=scale_format)[0]
        again = jaxkern.replay(x, handle, quantize="fp8", scale_format=scale_format)
        holds = (handle.source >= 0)[:, None]
        rows = [jaxkern.quantize(plain, scale_format=scale_format), before, on_the_way, again]
        bits = [jax.lax.bitcast_convert_type(r.scales, jnp.uint8).reshape(holds.shape[0], -1) for r in rows]
        return [[r.values.astype(jnp.float32), jnp.where(holds, b, 0)] for r, b in zip(rows, bits, strict=True)], bits

    (expected, *others), (_, *bits) = on_mesh(shape, f, x, ids, weights)
    largest = np.abs(expected[0]).max()
    assert largest == 448 or (not ON_CPUS and scale_format == "ue8m0" and 224 < largest)
    for b in bits[1:]:  # rows of no token too: zero bytes
        np.testing.assert_array_equal(b, bits[0])
    for got in others:
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])


# Replay, and the transformations of JAX


@pytest.mark.parametrize("shape, how", [((1,), {}), (ONE_LEVEL, {"layout": "rank"}), (TWO_LEVELS, {})], ids=str)
def test_replay_is_the_same_dispatch(shape, how):
    x, ids, weights = example()

    def f(x, ids, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, **options(shape, **how))
        again = jaxkern.replay(2 * x, handle)
        weighted = again if handle.layout == "rank" else jaxkern.replay(x, handle, weighted=True)
        return received, again, weighted, handle.weights, handle.source

    received, again, weighted, weights, source = on_mesh(shape, f, x, ids, weights)
    np.testing.assert_array_equal(again, 2 * received)
    if source is not None:
        for rank in range(len(received)):
            scale = np.where(source[rank] < 0, 0, weights[rank].reshape(-1)[source[rank]])
            np.testing.assert_array_equal(weighted[rank], received[rank] * scale[:, None])


def test_combine_and_weighted_replay_are_transposes():
    """<combine(y), g> = <y, replay(g)>, and each is the other's gradient."""
    x, ids, weights = example()
    y_seed = np.random.default_rng(5).standard_normal((RANKS, 300, HIDDEN)).astype(np.float32)

    def f(x, ids, weights, y):
        received, handle = jaxkern.dispatch(x, ids, weights, **options(ONE_LEVEL))
        y = y[0, : received.shape[0]]
        combined, combine_vjp = jax.vjp(lambda y: jaxkern.combine(y, handle), y)
        replayed, replay_vjp = jax.vjp(lambda x: jaxkern.replay(x, handle, weighted=True), x)
        return combined, replayed, y, combine_vjp(x)[0], replay_vjp(y)[0]

    combined, replayed, y, d_combine, d_replay = on_mesh(ONE_LEVEL, f, x, ids, weights, y_seed)
    np.testing.assert_allclose((combined.reshape(x.shape) * x).sum(), (y * replayed).sum(), rtol=1e-4)
    np.testing.assert_array_equal(d_combine, replayed)
    np.testing.assert_array_equal(d_replay, combined)


def test_remat_scan_and_vmap_change_nothing():
    """Two layers under scan and remat, for two batches under vmap: gradients as without."""
    x, ids, weights = example()
    xs = np.stack([x, 2 - x], 1)

    def gradients(wrap, x, ids, weights):
        def one(x):
            def step(x, _):
                received, handle = jaxkern.dispatch(x, ids, weights, **options(ONE_LEVEL))
                return jaxkern.combine(jnp.sin(received), handle), None

            if wrap:
                return jax.lax.scan(jax.checkpoint(step), x, None, length=2)[0]
            return step(step(x, None)[0], None)[0]

        def loss(x):
            y = jax.vmap(one, 1, 1)(x) if wrap else jnp.stack([one(x[:, i]) for i in range(2)], 1)
            return (y * y).sum()

        return jax.grad(loss)(x)

    wrapped, plain = (
        on_mesh(ONE_LEVEL, functools.partial(gradients, wrap), xs, ids, weights) for wrap in (True, False)
    )
    np.testing.assert_allclose(wrapped, plain, rtol=1e-6, atol=1e-6)
    assert np.abs(plain).max() > 0


# What crosses the mesh

COLLECTIVE = re.compile(r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(")
TYPE = re.compile(r"(\w+)\[([\d,]*)\]")
BYTES = {"f32": 4, "s32": 4, "u16": 2, "u8": 1}


def collectives(shape, f, *arrays):
    """[(name, number of ranks that take part, bytes of each rank's result)] of the compiled program, largest first."""
    mesh = jax.make_mesh(shape, axes(shape))
    spec = P(axes(shape))
    arrays = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in arrays]
    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))
    found = []
    for line in mapped.lower(*arrays).compile().as_text().splitlines():
        if match := COLLECTIVE.search(line):
            size = sum(BYTES[t] * math.prod(map(int, dims.split(","))) for t, dims in TYPE.findall(match[1]))
            found.append((match[2], members(line), size))
    return sorted(found, key=lambda c: -c[2])


def members(line):
    """How many ranks exchange with each other: {{0,4},{1,5}}, [2,4]<=[8] or mesh['host'=2,'device'=4] {'host'}."""
    groups = line.split("replica_groups=")[1]
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups.split("] {")[1].split("}")[0]))
    listed = re.match(r"\{\{([\d,]+)\}", groups)
    return len(listed[1].split(",")) if listed else int(re.match(r"\[\d+,(\d+)\]", groups)[1])


T8 = TOKENS // 8  # tokens of a rank, of eight
ROW, META, PLACE = 4 * HIDDEN, 4 * TOP_K, 4  # bytes of a token's float32 row, of its ids or weights, of its number
SCALES = 4 * -(-HIDDEN // 128)
CROSSES = [
    # [(collective, bytes)] of dispatch, then of combine
    (ONE_LEVEL, {}, {}, [("all-gather", 8 * T8 * b) for b in (ROW, META, META)] + [("all-to-all", 8 * T8 * ROW)]),
    (
        ONE_LEVEL,
        {"wire_capacity": 2},
        {},
        # the last: the choices of each expert that found no room
        [("all-to-all", 16 * b) for b in (ROW, META, META, ROW)] + [("all-to-all", 4 * EXPERTS)],
    ),
    (
        ONE_LEVEL,
        {"wire_capacity": 2, "quantize": "fp8"},
        {"wire_dtype": jnp.bfloat16},
        [("all-to-all", 16 * b) for b in (HIDDEN, SCALES, META, META, ROW // 2)] + [("all-to-all", 4 * EXPERTS)],
    ),
    (
        ONE_LEVEL,
        {"wire_capacity": 2},
        BY_EXPERT,  # the weights stay where they are
        [("all-to-all", 16 * b) for b in (ROW, META, TOP_K * ROW)] + [("all-to-all", 4 * EXPERTS)],
    ),
]


@pytest.mark.skipif(not ON_CPUS, reason="XLA joins the collectives of GPUs, and starts them elsewhere")
@pytest.mark.parametrize("shape, how, back, expected", CROSSES, ids=lambda v: "" if isinstance(v, list) else str(v))
def test_what_crosses_one_axis(shape, how, back, expected):
    """A token once for each rank, whatever it carries; nothing else crosses."""
    x, ids, weights = example()

    def f(x, ids, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, **options(shape, **how))
        y = jaxkern.dequantize(received) if how.get("quantize") else received
        return jaxkern.combine(y, handle, **back), handle.dropped

    found = [(name, size) for name, _, size in collectives(shape, f, x, ids, weights)]
    assert collections.Counter(found) == collections.Counter(expected)


@pytest.mark.skipif(not ON_CPUS, reason="as above")
def test_what_crosses_hosts():
    """Node-limited routing bounds the tokens that cross hosts, and only they do; devices exchange inside a host."""
    x, ids, weights = example()
    how = {"wire_capacity": (3, None), "transport": ("all_to_all", "gather")}

    def f(x, ids, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, **options(TWO_LEVELS, **how))
        return jaxkern.combine(received, handle), handle.dropped

    found = collectives(TWO_LEVELS, f, x, ids, weights)
    outer = collections.Counter((name, size) for name, ranks, size in found if ranks == 2)
    inner = collections.Counter((name, size) for name, ranks, size in found if ranks == 4)
    assert sum(outer.values()) + sum(inner.values()) == len(found)
    rows = 2 * 3  # hosts x wire_capacity
    assert outer == collections.Counter(
        [("all-to-all", rows * b) for b in (ROW, META, META, PLACE, ROW)] + [("all-to-all", 4 * EXPERTS)]
    )
    assert inner == collections.Counter(
        [("all-gather", 4 * rows * b) for b in (ROW, META, META, PLACE)]
        + [("all-to-all", 4 * rows * ROW), ("all-to-all", 4 * EXPERTS // 2)]
    )


@pytest.mark.skipif(ON_CPUS or RANKS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", [{}, {"layout": "rank"}, {"layout": "masked", "wire_capacity": 9}], ids=str)
def test_ragged_brings_what_slabs_bring(how):
    """Rows, what combine makes of them, and the gradients of both."""
    x, ids, weights = example()

    def f(transport, x, ids, weights):
        def through(x, weights):
            received, handle = jaxkern.dispatch(x, ids, weights, **options(ONE_LEVEL, transport=transport, **how))
            back = [{}] if handle.layout == "rank" else [{}, BY_EXPERT]
            return received, [jaxkern.combine(jnp.sin(received), handle, **b) for b in back], handle.dropped

        value, vjp = jax.vjp(through, x, weights)
        ones = jax.tree.map(lambda v: v if v.dtype == jnp.float32 else np.zeros(v.shape, jax.dtypes.float0), value)
        fp8 = jaxkern.dispatch(
            x, ids, weights, quantize="fp8", scale_format="ue8m0", **options(ONE_LEVEL, transport=transport, **how)
        )[0]
        return value, vjp(ones), fp8.values.astype(jnp.float32), fp8.scales.astype(jnp.float32)

    results = [
        on_mesh(ONE_LEVEL, functools.partial(f, transport), x, ids, weights) for transport in ("all_to_all", "ragged")
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


# Errors


def test_ragged_needs_a_gpu():
    if not ON_CPUS:
        pytest.skip("it has one")
    x, ids, weights = example()
    with pytest.raises(NotImplementedError, match="transport 'ragged' does not run on a CPU, only on cuda, rocm, tpu"):
        f = functools.partial(jaxkern.dispatch, **options(ONE_LEVEL, transport="ragged"))
        on_mesh(ONE_LEVEL, lambda *a: f(*a)[0], x, ids, weights)


@pytest.mark.parametrize(
    "how, error",
    [
        ({"layout": "slab"}, r"layout must be one of \('expert', 'rank', 'masked'\), got 'slab'"),
        ({"quantize": "int8"}, "quantize must be None or 'fp8', got 'int8'"),
        ({"transport": "nvlink"}, "transport must be None or one of .*, got 'nvlink'"),
        ({"transport": "gather", "wire_capacity": 3}, "'gather' has no slabs that wire_capacity could bound"),
        ({"layout": "rank", "capacity": 3}, "wire_capacity bounds it, not capacity"),
        ({"layout": "masked", "expert_alignment": 8}, "expert_alignment needs layout 'expert'"),
        ({"wire_capacity": 0}, "wire_capacity must be in 1"),
        ({"wire_capacity": (3, 3)}, r"wire_capacity must be one for each of 1 levels, got \(3, 3\)"),
    ],
    ids=str,
)
def test_dispatch_refuses(how, error):
    x, ids, weights = example()
    with pytest.raises(ValueError, match=f"dispatch: .*{error}"):
        on_mesh((2,), lambda *a: jaxkern.dispatch(*a, **options((2,), **how))[0], x, ids, weights)


def test_combine_refuses():
    x, ids, weights = example()
    received, handle = jaxkern.dispatch(x, ids, weights, num_experts=EXPERTS, layout="rank")
    with pytest.raises(ValueError, match="combine: the rows of layout 'rank' are sums already"):
        jaxkern.combine(received, handle, weighted=True)
    with pytest.raises(ValueError, match="combine: layout 'rank' has no rows of experts"):
        jaxkern.combine(received, handle, reduction="expert")
    with pytest.raises(ValueError, match="combine: reduction must be one of"):
        jaxkern.combine(received, handle, reduction="source")
    with pytest.raises(TypeError, match="combine: wire_dtype must be float32 or bfloat16, got float16"):
        jaxkern.combine(received, handle, wire_dtype=jnp.float16)
    with pytest.raises(ValueError, match="replay: weighted needs rows of experts that are not quantised"):
        jaxkern.replay(x, handle, weighted=True)
    masked, handle = jaxkern.dispatch(x, ids, weights, num_experts=EXPERTS, layout="masked")
    with pytest.raises(ValueError, match=r"combine: y must be .* \[experts=24, rows=48, h\], got float32\[24,47,136\]"):
        jaxkern.combine(masked[:, 1:], handle)
    with pytest.raises(ValueError, match=r"combine: bias must be .* \[t=48, h=136\], got float32\[1,136\]"):
        jaxkern.combine(masked, handle, bias=jnp.zeros((1, HIDDEN)))
