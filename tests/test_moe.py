"""Routing, dispatch and combine: against loops over tokens, closed forms, and themselves on more devices."""

import ctypes
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import HOPPER_IMPLEMENTATION
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from moe_tools import random_routing

import jaxkern

IMPLEMENTATIONS = ["cpu", "xla", *[HOPPER_IMPLEMENTATION] * (HOPPER_IMPLEMENTATION != "none")]


# route


def route_by_hand(logits, bias, top_k, num_groups, topk_groups, scale, normalize):
    ids, weights = [], []
    for row in logits:
        scores = np.asarray(jax.nn.sigmoid(row))  # the same bits: a tie must stay a tie
        biased = (scores + bias).reshape(num_groups, -1)
        group_scores = np.sort(biased, axis=1)[:, -2:].sum(1)
        kept = np.argsort(-group_scores, kind="stable")[:topk_groups]
        masked = np.full_like(biased, -np.inf)
        masked[kept] = biased[kept]
        chosen = np.argsort(-masked.reshape(-1), kind="stable")[:top_k]
        w = scores[chosen]
        ids.append(chosen)
        weights.append((w / (w.sum() + 1e-20) if normalize else w) * scale)
    return np.array(ids), np.array(weights)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "experts, groups, topk_groups, top_k, normalize",
    [(256, 8, 4, 8, True), (16, 4, 2, 4, False), (16, 1, 1, 16, True), (8, 8, 3, 2, True), (6, 3, 3, 1, False)],
)
def test_route(implementation, experts, groups, topk_groups, top_k, normalize):
    rng = np.random.default_rng(experts)
    logits = rng.standard_normal((40, experts)).astype(np.float32)
    logits[0] = 0.25  # all tied
    bias = np.round(rng.standard_normal(experts) * 2).astype(np.float32) / 4  # ties, negative values
    ids, weights = jaxkern.route(
        logits,
        bias,
        top_k=top_k,
        num_groups=groups,
        topk_groups=topk_groups,
        scale=2.5,
        normalize=normalize,
        implementation=implementation,
    )
    expected_ids, expected_weights = route_by_hand(logits, bias, top_k, groups, topk_groups, 2.5, normalize)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6)


def test_route_survives_bad_logits():
    logits = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    logits[0, 3], logits[1], logits[2, :8], logits[3, 5] = np.nan, np.nan, -np.inf, np.inf
    bias = np.zeros(16, np.float32)
    bias[7] = -np.inf
    results = [
        jaxkern.route(logits, bias, top_k=6, num_groups=4, topk_groups=2, implementation=i)[0] for i in IMPLEMENTATIONS
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    for row in np.asarray(results[0]):
        assert len(set(row)) == 6 and row.min() >= 0 and row.max() < 16
    assert 3 not in results[0][0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", ["bias", "logits"])
def test_route_stays_in_the_best_groups(bad, implementation):
    """Minus infinity, as a bias that rules experts out, and NaN come last in their group, but before other groups."""
    logits, bias = np.zeros((1, 8), np.float32), np.asarray([0, 0, 0, 0, 1, 1, 0, 0], np.float32)
    if bad == "bias":
        bias[6:] = -np.inf
    else:
        logits[:, 6:] = np.nan
    ids, _ = jaxkern.route(logits, bias, top_k=4, num_groups=2, topk_groups=1, implementation=implementation)
    np.testing.assert_array_equal(ids, [[4, 5, 6, 7]])


def test_route_errors():
    logits, bias = jnp.zeros((4, 16)), jnp.zeros(16)
    with pytest.raises(ValueError, match="route: num_groups=3 must divide e=16"):
        jaxkern.route(logits, bias, top_k=2, num_groups=3)
    with pytest.raises(ValueError, match="route: topk_groups=5 must be in 1..num_groups=4"):
        jaxkern.route(logits, bias, top_k=2, num_groups=4, topk_groups=5)
    with pytest.raises(ValueError, match=r"route: top_k=5 must be in 1\.\.4"):
        jaxkern.route(logits, bias, top_k=5, num_groups=4, topk_groups=1)


# dispatch and combine on one device


def dispatch_by_hand(x, ids, experts, alignment, capacity):
    """Row by row: what is received, the assignment in each row, the sizes and what was dropped."""
    rows, source, sizes, dropped = [], [], [], []
    for e in range(experts):
        start = len(rows)
        chosen = [(t, j) for t, j in itertools.product(*map(range, ids.shape)) if ids[t, j] == e]
        rows += [x[t] for t, _ in chosen]
        source += [t * ids.shape[1] + j for t, j in chosen]
        sizes.append(min(len(chosen), max(0, capacity - start)))
        dropped.append(len(chosen) - sizes[-1])
        padding = -len(chosen) % alignment
        rows += [np.zeros_like(x[0])] * padding
        source += [-1] * padding
    rows, source = rows[:capacity], source[:capacity]
    padding = capacity - len(rows)
    return np.array(rows + [np.zeros_like(x[0])] * padding), np.array(source + [-1] * padding), sizes, dropped


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=8, deadline=None)
@given(
    shape=st.sampled_from([(20, 6, 3), (1, 8, 2), (33, 4, 4), (7, 1, 1)]),
    alignment=st.sampled_from([1, 8]),
    capacity=st.sampled_from([None, 24]),
    one_expert=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dispatch_is_a_stable_sort(shape, alignment, capacity, implementation, one_expert, seed):
    tokens, experts, top_k = shape
    ids, weights = random_routing(tokens, experts, top_k, seed)
    if one_expert:
        ids[:] = experts - 1
    x = np.random.default_rng(seed).standard_normal((tokens, 5)).astype(np.float32)
    received, handle = jaxkern.dispatch(
        x,
        ids,
        weights,
        num_experts=experts,
        capacity=capacity,
        expert_alignment=alignment,
        implementation=implementation,
    )
    rows, source, sizes, dropped = dispatch_by_hand(x, ids, experts, alignment, received.shape[0])
    np.testing.assert_array_equal(received, rows)
    np.testing.assert_array_equal(handle.source, source)
    np.testing.assert_array_equal(handle.group_sizes, sizes)
    np.testing.assert_array_equal(handle.dropped, dropped)
    if capacity is None:
        assert not any(dropped) or one_expert and top_k > experts
    kept = np.isin(np.arange(ids.size), source).reshape(ids.shape)
    expected = (np.where(kept, weights, 0).sum(1, keepdims=True) * x).astype(np.float32)
    np.testing.assert_allclose(jaxkern.combine(received, handle), expected, atol=1e-5)
    counts = kept.sum(1, keepdims=True).astype(np.float32)
    np.testing.assert_allclose(jaxkern.combine(received, handle, weighted=False), counts * x, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["expert", "masked"])
@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_gaps_may_be_left_alone(quantize, layout, implementation):
    """An expert layer of ops that all leave them alone, or with NaN in them, has the bits of one with zeros."""
    t, h, i, experts = 40, 128, 64, 6
    ids, weights = random_routing(t, experts, 2)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((t, h)).astype(jnp.bfloat16)
    up, down = (rng.standard_normal(s).astype(jnp.bfloat16) for s in ((experts, 2 * i, h), (experts, h, i)))

    def layer(x, weights, zero_gaps, spoil):
        received, handle = jaxkern.dispatch(
            x,
            ids,
            weights,
            num_experts=experts,
            layout=layout,
            quantize=quantize,
            zero_gaps=zero_gaps,
            implementation=implementation,
        )
        gap = (handle.source < 0).reshape(received.shape[:-1])[..., None]
        assert gap.sum() > 0
        spoiled = functools.partial(jnp.where, gap, jnp.nan) if spoil else lambda rows: rows
        masked = layout == "masked"
        product = functools.partial(
            jaxkern.masked_grouped_gemm if masked else jaxkern.grouped_gemm,
            group_sizes=handle.group_sizes,
            zero_gaps=zero_gaps,
            implementation=implementation,
        )
        if quantize is None:
            y = spoiled(product(spoiled(received), up))
            y = product(spoiled(jax.nn.silu(y[..., :i]) * y[..., i:]), down)
        else:
            received = jaxkern.ScaledArray(spoiled(received.values), spoiled(received.scales))
            num_rows = handle.group_sizes if masked else handle.group_sizes.sum()
            gate_up = spoiled(product(received, jaxkern.quantize(up, (128, 128))))
            y = jaxkern.swiglu_quantize(
                gate_up, num_rows=None if zero_gaps else num_rows, implementation=implementation
            )
            y = product(y, jaxkern.quantize(down, (128, 128)))
        return jaxkern.combine(spoiled(y), handle, out_dtype=jnp.float32)

    want = layer(x, weights, True, False)
    for zero_gaps, spoil in ((True, True), (False, False), (False, True)):
        np.testing.assert_array_equal(layer(x, weights, zero_gaps, spoil), want)
    if quantize is None:
        gradients = [
            jax.grad(lambda *a, how=how: jnp.sin(layer(*a, *how)).sum(), (0, 1))(x, weights)
            for how in ((True, False), (False, False), (False, True))
        ]
        for other in gradients[1:]:
            jax.tree.map(np.testing.assert_array_equal, other, gradients[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_in_closed_form(implementation):
    """For y = combine(s * dispatch(x)): dy/dx is s times the sum of the weights, dy/dw is s * <x, g>."""
    ids, weights = random_routing(30, 8, 4)
    x, g = (np.random.default_rng(i).standard_normal((30, 40)).astype(np.float32) for i in range(2))

    def layer(x, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, num_experts=8, implementation=implementation)
        return jaxkern.combine(3 * received, handle)

    _, vjp = jax.vjp(layer, x, weights)
    d_x, d_weights = vjp(g)
    chosen = ids >= 0
    np.testing.assert_allclose(d_x, 3 * np.where(chosen, weights, 0).sum(1, keepdims=True) * g, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_weights, np.where(chosen, 3 * (x * g).sum(1, keepdims=True), 0), rtol=1e-4, atol=1e-4)


def test_bfloat16_sums_round_once():
    """Eight equal rows of 1 + 2^-7: exact in float32, not in a running bfloat16 sum."""
    x = jnp.full((3, 24), 1 + 2**-7, jnp.bfloat16)
    ids = jnp.tile(jnp.arange(8, dtype=jnp.int32), (3, 1))
    received, handle = jaxkern.dispatch(x, ids, jnp.ones((3, 8)), num_experts=8)
    np.testing.assert_array_equal(jaxkern.combine(received, handle), jnp.full((3, 24), 8 + 2**-4, jnp.bfloat16))


def test_rows_that_no_token_owns_do_not_matter():
    ids, weights = random_routing(10, 4, 2)
    x = np.ones((10, 16), np.float32)
    received, handle = jaxkern.dispatch(x, ids, weights, num_experts=4)
    poisoned = jnp.where((handle.source < 0)[:, None], jnp.nan, received)
    assert np.isfinite(jaxkern.combine(poisoned, handle)).all()


def test_ids_that_are_no_expert_select_nothing():
    x = np.ones((4, 16), np.float32)
    ids = np.array([[0, 99], [-7, 1], [2**31 - 1, -(2**31)], [4, 3]], np.int32)
    received, handle = jaxkern.dispatch(x, ids, np.ones((4, 2), np.float32), num_experts=4)
    np.testing.assert_array_equal(handle.group_sizes, [1, 1, 0, 1])
    np.testing.assert_array_equal(jaxkern.combine(received, handle)[:, 0], [1, 1, 0, 1])


# over a mesh axis


def experts_by_rank(x, ids, weights, w, axis_name, **kwargs):
    """An expert layer: every expert its own matrix, which it holds alone."""
    received, handle = jaxkern.dispatch(
        x, ids, weights, num_experts=w.shape[0] * jax.lax.axis_size(axis_name), axis_name=axis_name, **kwargs
    )
    expert = jnp.repeat(jnp.arange(w.shape[0]), handle.group_sizes, total_repeat_length=received.shape[0])
    y = jnp.tanh(jnp.einsum("rh,rhk->rk", received, w[expert], precision="highest"))
    return jaxkern.combine(y, handle), handle.dropped


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_same_bits_on_any_number_of_devices(implementation, axis_type):
    """Result and every gradient."""
    ids, weights = random_routing(48, 16, 4)
    x = np.random.default_rng(1).standard_normal((48, 40)).astype(np.float32)
    w = np.random.default_rng(2).standard_normal((16, 40, 40)).astype(np.float32) / 6
    expected = None
    for ranks in [n for n in (1, 2, 4, 8) if n <= jax.device_count()]:
        mesh = jax.make_mesh((ranks,), ("expert",), axis_types=(axis_type,))
        split = jax.NamedSharding(mesh, P("expert"))

        def layer(x, weights, w, ids, mesh=mesh):
            f = jax.shard_map(
                lambda x, weights, w, ids: experts_by_rank(x, ids, weights, w, "expert", implementation=implementation),
                mesh=mesh,
                in_specs=P("expert"),
                out_specs=P("expert"),
            )
            y, dropped = f(x, weights, w, ids)
            return (y * jnp.cos(y)).sum(), (y, dropped)

        arrays = [jax.device_put(a, split) for a in (x, weights, w, ids)]
        (_, results), gradients = jax.jit(jax.value_and_grad(layer, argnums=(0, 1, 2), has_aux=True))(*arrays)
        got = [np.asarray(a) for a in (*results, *gradients)]
        expected = expected or got
        for g, e in zip(got, expected, strict=True):
            np.testing.assert_array_equal(g, e)


def test_two_mesh_axes_act_as_one():
    ids, weights = random_routing(16, 8, 2)
    x = np.random.default_rng(1).standard_normal((16, 24)).astype(np.float32)
    w = np.random.default_rng(2).standard_normal((8, 24, 24)).astype(np.float32) / 5
    results = []
    for shape, names in (((4,), ("x",)), ((2, 2), ("host", "device"))):
        mesh = jax.make_mesh(shape, names)
        spec = P(names)
        arrays = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in (x, ids, weights, w)]
        layer = jax.shard_map(
            lambda *a, names=names: experts_by_rank(*a, names)[0], mesh=mesh, in_specs=spec, out_specs=spec
        )
        results.append(np.asarray(jax.jit(layer)(*arrays)))
    np.testing.assert_array_equal(*results)


def test_overflow_is_counted_where_the_experts_are():
    """Every token to expert 5, which lives on rank 2 with room for 10 rows."""
    mesh = jax.make_mesh((4,), ("expert",))
    split = jax.NamedSharding(mesh, P("expert"))
    ids = np.full((16, 1), 5, np.int32)
    arrays = [jax.device_put(a, split) for a in (np.ones((16, 8), np.float32), ids, np.ones((16, 1), np.float32))]

    def layer(x, ids, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, num_experts=8, axis_name="expert", capacity=10)
        return jaxkern.combine(received, handle), handle.group_sizes, handle.dropped

    f = jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    y, sizes, dropped = jax.jit(f)(*arrays)
    np.testing.assert_array_equal(sizes, [0, 0, 0, 0, 0, 10, 0, 0])
    np.testing.assert_array_equal(dropped, [0, 0, 0, 0, 0, 6, 0, 0])
    np.testing.assert_array_equal(y[:, 0], [1] * 10 + [0] * 6)


def test_an_alignment_beyond_the_rows_drops_what_follows():
    ids = np.arange(4, dtype=np.int32)[:, None]
    options = {"num_experts": 4, "capacity": 8, "expert_alignment": 2**31 - 1}
    received, handle = jaxkern.dispatch(np.ones((4, 8), np.float32), ids, np.ones((4, 1), np.float32), **options)
    np.testing.assert_array_equal(handle.group_sizes, [1, 0, 0, 0])
    np.testing.assert_array_equal(handle.dropped, [0, 1, 1, 1])
    np.testing.assert_array_equal(received[:, 0], [1] + [0] * 7)


def test_dispatch_errors():
    x, ids, weights = jnp.zeros((4, 8)), jnp.zeros((4, 2), jnp.int32), jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="dispatch: expert_alignment must be in 1"):
        jaxkern.dispatch(x, ids, weights, num_experts=4, expert_alignment=0)
    with pytest.raises(ValueError, match="dispatch: capacity must be in 1"):
        jaxkern.dispatch(x, ids, weights, num_experts=4, capacity=0)
    for experts in (0, -8):
        with pytest.raises(ValueError, match=f"dispatch: num_experts must be in 1.*, got {experts}"):
            jaxkern.dispatch(x, ids, weights, num_experts=experts)
    for transport in ("bogus", ["ragged"]):  # though nothing crosses
        with pytest.raises(ValueError, match="dispatch: transport must be None or one of .*, got .*(bogus|ragged)"):
            jaxkern.dispatch(x, ids, weights, num_experts=4, transport=transport)
    with pytest.raises(ValueError, match="dispatch: wire_capacity must be in 1.*, got 0"):
        jaxkern.dispatch(x, ids, weights, num_experts=4, wire_capacity=0)
    with pytest.raises(TypeError, match=r"dispatch: expert_ids must be int32 \[t=4, k\], got float32\[4,2\]"):
        jaxkern.dispatch(x, weights, weights, num_experts=4)
    received, handle = jaxkern.dispatch(x, ids, weights, num_experts=4)
    with pytest.raises(ValueError, match=r"combine: y must be .* \[rows=8, h\], got float32\[4,8\]"):
        jaxkern.combine(x, handle)
    mesh = jax.make_mesh((4,), ("expert",))
    f = jax.shard_map(
        lambda x: jaxkern.dispatch(x, ids, weights, num_experts=6, axis_name="expert")[0],
        mesh=mesh,
        in_specs=P(),
        out_specs=P("expert"),
    )
    with pytest.raises(ValueError, match="dispatch: the 4 ranks must divide num_experts=6"):
        jax.eval_shape(f, x)


def test_copies_are_of_bits():
    """Signalling NaNs, and both zeros, come as they are."""
    bits = np.arange(2**16, dtype=np.uint16).reshape(512, 128)
    ids, ones = np.arange(512, dtype=np.int32)[:, None] % 3, np.ones((512, 1), np.float32)
    for implementation in IMPLEMENTATIONS:
        received, handle = jax.jit(
            lambda x, implementation=implementation: jaxkern.dispatch(
                x, ids, ones, num_experts=3, implementation=implementation
            )
        )(bits.view(jnp.bfloat16))
        np.testing.assert_array_equal(np.asarray(received).view(np.uint16), bits[np.asarray(handle.source)])


@pytest.mark.parametrize("hidden, dtype", [(2048, jnp.float32), (4099, jnp.bfloat16)])
def test_more_rows_than_caches_hold(hidden, dtype):
    """Which go past them on the CPU, where they are aligned; with rows of no token between and after the groups."""
    ids, weights = random_routing(1100, 8, 4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1100, hidden)), dtype)
    fill_memory(0xA5)
    try:
        received, handle = jax.block_until_ready(jaxkern.dispatch(x, ids, weights, num_experts=8, expert_alignment=64))
    finally:
        fill_memory(0)
    source = np.asarray(handle.source)
    assert received.nbytes > 2**25 and (source[: sum(handle.group_sizes)] < 0).any()
    expected = np.where(source[:, None] < 0, 0, np.asarray(x)[source // 4])
    np.testing.assert_array_equal(received, expected)


def fill_memory(byte: int):
    """What is allocated from here on is not zero by luck, where the C library is glibc. 0: as before."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-6, byte)  # M_PERTURB


def test_exports_of_handles_are_files():
    """Of a Handle, its Levels and a ScaledArray, as arguments and results."""
    mesh = jax.make_mesh((2, 2), ("host", "device"), axis_types=(AxisType.Auto,) * 2)
    split, checks = P(("host", "device")), jaxkern.DISABLE_JAX_EXPORT_CHECKS
    x = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    ids, weights = random_routing(16, 8, 2)
    scaled = jaxkern.quantize(x)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=split, out_specs=split)
    def there(x, ids, weights):
        return jaxkern.dispatch(x, ids, weights, num_experts=8, axis_name=("host", "device"), wire_capacity=(4, None))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=split, out_specs=split)
    def back(received, handle):
        return jaxkern.combine(jaxkern.dequantize(received), handle)

    def exported(call, *arrays):
        arrays = [jax.tree.map(lambda a: jax.device_put(a, jax.NamedSharding(mesh, split)), a) for a in arrays]
        file = jax.export.export(call, disabled_checks=checks)(*arrays).serialize()
        return jax.jit(jax.export.deserialize(file).call)(*arrays)

    received, handle = exported(there, scaled, ids, weights)
    assert jax.tree.structure((received, handle)) == jax.tree.structure(there(scaled, ids, weights))
    y = exported(back, received, handle)
    np.testing.assert_array_equal(y, back(*there(scaled, ids, weights)))


def test_indices_are_int32_in_x64_mode():
    mesh = jax.make_mesh((2, 2), ("host", "device"), axis_types=(AxisType.Auto,) * 2)
    ids, weights = random_routing(16, 8, 2)
    x = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)

    def layer(x, ids, weights):
        received, handle = jaxkern.dispatch(
            x, ids, weights, num_experts=8, axis_name=("host", "device"), wire_capacity=(4, None)
        )
        return jaxkern.combine(received, handle), handle.dropped, handle.slots, handle.source

    run = jax.shard_map(layer, mesh=mesh, in_specs=P(("host", "device")), out_specs=P(("host", "device")))
    expected = jax.jit(run)(x, ids, weights)
    with jax.enable_x64(True):
        got = jax.jit(run)(x, ids, weights)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        np.testing.assert_array_equal(g, e)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("t, h", [(0, 8), (4, 0)])
def test_zero_sizes(t, h, implementation):
    def layer(x, weights):
        ids = jnp.zeros((t, 2), jnp.int32)
        received, handle = jaxkern.dispatch(
            x, ids, weights, num_experts=4, capacity=5, layout="masked", implementation=implementation
        )
        return jaxkern.combine(received, handle)

    x, weights = jnp.ones((t, h)), jnp.ones((t, 2))
    y, gradients = jax.vjp(layer, x, weights)
    assert y.shape == (t, h) and [g.shape for g in gradients(y)] == [x.shape, weights.shape]


def test_export_with_symbolic_tokens_and_aligned_experts():
    def layer(x, ids, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, num_experts=8, expert_alignment=4)
        return jaxkern.combine(received, handle)

    arrays = np.ones((5, 8), np.float32), np.arange(10, dtype=np.int32).reshape(5, 2), np.ones((5, 2), np.float32)
    scope = jax.export.SymbolicScope()
    dims = [jax.export.symbolic_shape(f"t, {x.shape[1]}", scope=scope) for x in arrays]
    shapes = [jax.ShapeDtypeStruct(d, x.dtype) for d, x in zip(dims, arrays, strict=True)]
    exported = jax.export.export(jax.jit(layer), disabled_checks=jaxkern.DISABLE_JAX_EXPORT_CHECKS)(*shapes)
    np.testing.assert_array_equal(exported.call(*arrays), layer(*arrays))


@pytest.mark.parametrize("reduction", ["rank", "expert"])
def test_export_of_the_gradient_of_ragged_combines(reduction):
    """Its residuals are arguments of the backward pass: one closed over would be a constant of no program."""
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    def layer(x, ids, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, num_experts=8, axis_name="expert", transport="ragged")
        return jaxkern.combine(jnp.tanh(received), handle, reduction=reduction)

    gradient = jax.jit(jax.grad(lambda x, ids, weights: (layer(x, ids, weights) ** 2).sum(), (0, 2)))
    ids, weights = random_routing(16, 8, 2)
    x = np.ones((16, 24), np.float32)
    checks = [*jaxkern.DISABLE_JAX_EXPORT_CHECKS, jax.export.DisabledSafetyCheck.custom_call("ragged_all_to_all")]
    jax.export.export(gradient, platforms=["cuda"], disabled_checks=checks)(x, ids, weights).serialize()
