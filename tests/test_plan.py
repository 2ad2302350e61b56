"""`plan`: against closed forms, what `dispatch` does with random tokens, and DeepEP's figures."""

import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkern
from benchmarks import plan as published
from jaxkern import plan

SMALL = {"hosts": 2, "gpus_per_host": 4, "tokens": 64, "hidden": 128, "num_experts": 32, "top_k": 4}


def small(**changes) -> jaxkern.Plan:
    return plan(**SMALL | changes)


def reached(parts, experts, top_k):
    return parts * (1 - math.comb(experts - experts // parts, top_k) / math.comb(experts, top_k))


@pytest.mark.parametrize(
    "hosts, gpus, experts, top_k",
    [(1, 1, 8, 2), (1, 8, 256, 8), (2, 8, 256, 8), (3, 2, 12, 5), (32, 8, 256, 8), (2, 2, 8, 8)],
)
def test_even_routing_has_a_closed_form(hosts, gpus, experts, top_k):
    tokens, ranks = 100, hosts * gpus
    got = plan(hosts=hosts, gpus_per_host=gpus, tokens=tokens, hidden=128, num_experts=experts, top_k=top_k)
    np.testing.assert_allclose(got.ranks_per_token, reached(ranks, experts, top_k), rtol=1e-12)
    np.testing.assert_allclose(got.hosts_per_token, reached(hosts, experts, top_k), rtol=1e-12)
    for load, mean in ((got.arrivals, got.ranks_per_token * tokens), (got.assignments, tokens * top_k)):
        np.testing.assert_allclose([load.mean, load.most], mean, rtol=1e-9)
    copies, size = got.ranks_per_token * tokens / ranks, got.dispatch_bytes
    one, two = got.one_level.dispatch, got.two_levels.dispatch
    np.testing.assert_allclose(one.nvlink.mean, copies * (gpus - 1) * size, rtol=1e-9)
    np.testing.assert_allclose(one.network.mean, copies * (ranks - gpus) * size, rtol=1e-9)
    np.testing.assert_allclose(two.nvlink.mean, copies * hosts * (gpus - 1) * size, rtol=1e-9)
    np.testing.assert_allclose(two.network.mean, got.hosts_per_token * tokens / hosts * (hosts - 1) * size, rtol=1e-9)
    same = plan(
        hosts=hosts,
        gpus_per_host=gpus,
        tokens=tokens,
        hidden=128,
        num_experts=experts,
        top_k=top_k,
        histogram=np.full(experts, 7),
    )
    np.testing.assert_allclose(same.ranks_per_token, got.ranks_per_token, rtol=1e-12)


def choose(tokens, skew, top_k, groups=1, kept=1, seed=1):
    """Random tokens through `route`: logits of experts that are unlike, as the offsets `skew` make them."""
    logits = np.random.default_rng(seed).gumbel(size=(tokens, len(skew))) + skew
    bias = np.zeros(len(skew), np.float32)
    # Sigmoids keep the order as long as they do not saturate, and are near enough to linear for sums of two.
    ids, _ = jaxkern.route(
        (logits / 16).astype(np.float32), bias, top_k=top_k, num_groups=groups, topk_groups=kept, normalize=False
    )
    return np.asarray(ids)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("groups, kept", [(1, 1), (8, 3), (2, 1)])
def test_counts_of_routed_tokens(groups, kept, skewed):
    """Distinct ranks and hosts counted one by one, the plan having only the histogram."""
    tokens, experts = 40_000, 32
    ids = choose(tokens, np.linspace(2, 0, experts) if skewed else np.zeros(experts), 4, groups, kept)
    histogram = np.bincount(ids.ravel(), minlength=experts) if skewed else None
    got = small(tokens=5000, histogram=histogram, num_groups=groups, topk_groups=kept)
    on_rank, on_host = ((ids[..., None] // (experts // parts) == np.arange(parts)).any(1) for parts in (8, 2))
    np.testing.assert_allclose(got.ranks_per_token, on_rank.sum() / tokens, rtol=0.02)
    np.testing.assert_allclose(got.hosts_per_token, on_host.sum() / tokens, rtol=0.02)
    np.testing.assert_allclose(got.arrivals.most, on_rank.sum(0).max(), rtol=0.03)
    counts = np.bincount(ids.ravel() // 4, minlength=8)
    np.testing.assert_allclose(got.assignments.most, counts.max(), rtol=1e-9 if skewed else 0.03)
    # Over the links: the tokens of each rank, sent to where they are needed; in two levels through the same device.
    source = np.arange(tokens) // 5000
    away = on_rank & (np.arange(8) != source[:, None])
    near = away & (np.arange(8) // 4 == source[:, None] // 4)
    link = got.one_level.dispatch
    np.testing.assert_allclose(link.nvlink.mean, near.sum() / 8 * got.dispatch_bytes, rtol=0.03)
    np.testing.assert_allclose(link.network.mean, (away & ~near).sum() / 8 * got.dispatch_bytes, rtol=0.03)
    crossing = on_host & (np.arange(2) != source[:, None] // 4)
    np.testing.assert_allclose(got.two_levels.dispatch.network.mean, crossing.sum() / 8 * got.dispatch_bytes, rtol=0.03)
    forwarded = on_rank & (np.arange(8) % 4 != source[:, None] % 4)
    np.testing.assert_allclose(got.two_levels.dispatch.nvlink.mean, forwarded.sum() / 8 * got.dispatch_bytes, rtol=0.03)


def test_rows_that_dispatch_receives():
    ids = choose(8 * 256, np.linspace(1, 0, 32), 4)
    mesh = jax.make_mesh((8,), ("expert",))
    split = NamedSharding(mesh, P("expert"))
    arrays = np.ones((len(ids), 8), np.float32), ids, np.ones(ids.shape, np.float32)

    def layer(x, ids, weights):
        received, handle = jaxkern.dispatch(x, ids, weights, num_experts=32, axis_name="expert")
        return handle.group_sizes, (handle.slots >= 0).any(1).sum()[None], jnp.full(1, received.shape[0])

    run = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    sizes, arrived, rows = map(np.asarray, run(*[jax.device_put(a, split) for a in arrays]))
    got = small(tokens=256, histogram=sizes)
    assert got.rows == rows[0]
    np.testing.assert_allclose(got.assignments.mean, sizes.sum() / 8)
    np.testing.assert_allclose(got.assignments.most, sizes.reshape(8, 4).sum(1).max())
    np.testing.assert_allclose(got.arrivals.mean, arrived.mean(), rtol=0.02)
    np.testing.assert_allclose(got.arrivals.most, arrived.max(), rtol=0.05)


def test_one_expert_for_all():
    """Every token needs expert 5 and nothing else: its rank gets all tokens, and the way in is the way back out."""
    got = small(top_k=1, histogram=np.eye(32)[5])
    assert got.ranks_per_token == got.hosts_per_token == 1
    assert got.arrivals.most == 8 * 64 and got.arrivals.mean == 64
    link = got.one_level.dispatch
    assert link.network.most_in == 4 * 64 * got.dispatch_bytes and link.network.most_out == 64 * got.dispatch_bytes
    assert got.one_level.combine.network.most_out == 4 * 64 * got.combine_bytes
    assert got.two_levels.dispatch.nvlink.most_in == 2 * 3 * 64 * got.dispatch_bytes
    assert got.two_levels.dispatch.network.most_in == 64 * got.dispatch_bytes
    assert small(top_k=1, histogram=np.eye(32)[5], capacity=384).dropped == 0.25


def test_any_histogram_gives_its_own_shares():
    """The choices of largest entropy have the shares that they are to have, however uneven."""
    rng = np.random.default_rng(0)
    for skew in (1, 4, 16):
        weights = np.exp(rng.normal(0, skew, 32))
        histogram = np.minimum(weights, np.sort(weights)[-5])  # five have the most, none a choice of each token
        got = small(gpus_per_host=16, histogram=histogram)  # an expert a rank: a rank's share is the expert's
        np.testing.assert_allclose(got.arrivals.most, got.assignments.most, rtol=1e-6)
        np.testing.assert_allclose(got.ranks_per_token, 4, rtol=1e-6)


def test_the_layers_of_a_histogram_are_added_up():
    """The training metric "expert_load" as it is."""
    load = np.random.default_rng(0).integers(1, 9, (3, 32))
    assert small(histogram=load) == small(histogram=load.sum(0)) != small(histogram=load[0])


def test_more_is_not_less():
    def increases(f, values):
        found = [f(v) for v in values]
        return all(a < b for a, b in zip(found, found[1:], strict=False))

    assert increases(lambda k: small(top_k=k).ranks_per_token, (1, 2, 4, 8, 16))
    assert increases(lambda n: small(gpus_per_host=n).ranks_per_token, (1, 2, 4, 8, 16))
    assert increases(lambda n: small(num_groups=8, topk_groups=n).hosts_per_token, (1, 2, 8))
    assert increases(lambda s: small(histogram=np.linspace(1 + s, 1, 32)).arrivals.most, (0, 0.5, 1, 2))
    assert increases(lambda n: small(num_groups=4, topk_groups=n, hosts=4).two_levels.dispatch.network.mean, (1, 2, 3))
    assert small(quantize="fp8").dispatch_bytes < small().dispatch_bytes < small(itemsize=4).dispatch_bytes
    assert increases(lambda c: -small(histogram=np.linspace(3, 1, 32), capacity=c).dropped, (100, 200, 300))
    assert small().two_levels.dispatch.network.mean < small().one_level.dispatch.network.mean
    slow, fast = small(network_gbs=1.0), small(network_gbs=2.0)
    assert slow.one_level.dispatch.seconds == 2 * fast.one_level.dispatch.seconds


def test_static_shapes():
    """Slabs hold every token of every rank; what whole slabs move is the same for both static transports."""
    got = small(quantize="fp8")
    assert got.dispatch_bytes == 128 + 4 + 8 * 4 and got.combine_bytes == 4 * 128
    assert got.one_level.dispatch_buffer == 2 * 8 * 64 * got.dispatch_bytes
    assert got.one_level.combine_buffer == 2 * 8 * 64 * got.combine_bytes
    assert got.two_levels.dispatch_buffer == (2 * 8 * 64 + 2 * 64) * got.dispatch_bytes
    assert [small(layout=layout).rows for layout in ("rank", "expert", "masked")] == [512, 2048, 2048]
    assert small(layout="masked", top_k=2).rows == 2 * small(layout="expert", top_k=2).rows
    assert got.one_level.memory == got.one_level.combine_buffer + 2048 * 2 * 128
    assert small(capacity=10).rows == 10 and small(capacity=10).rows_bytes == 10 * 256
    for transport in ("all_to_all", "gather"):
        whole = small(transport=transport)
        assert whole.one_level.dispatch.nvlink.most == 3 * 64 * whole.dispatch_bytes
        assert whole.one_level.dispatch.network.mean == 4 * 64 * whole.dispatch_bytes
        assert whole.two_levels.dispatch.nvlink.mean == 2 * 3 * 64 * whole.dispatch_bytes
        assert whole.two_levels.combine.network.mean == 64 * whole.combine_bytes
        assert whole.one_level.dispatch.nvlink.mean > small().one_level.dispatch.nvlink.mean
    each = small(copies="expert")
    assert each.arrivals == each.assignments and each.one_level.dispatch_buffer == 4 * small().one_level.dispatch_buffer


@pytest.mark.parametrize("options", [{}, {"num_groups": 8, "topk_groups": 4}], ids=["all", "groups"])
def test_2048_ranks_take_seconds(options):
    start = time.perf_counter()
    histogram = 1 / np.arange(200, 2248)
    got = plan(
        hosts=256, gpus_per_host=8, tokens=128, hidden=7168, num_experts=2048, top_k=8, histogram=histogram, **options
    )
    assert time.perf_counter() - start < 20
    np.testing.assert_allclose(got.ranks_per_token, 8, rtol=1e-9)  # an expert a rank
    np.testing.assert_allclose(got.arrivals.most / got.arrivals.mean, histogram.max() / histogram.mean())
    assert 7 < got.hosts_per_token < reached(256, 2048, 8)  # a skew meets more often
    again = plan(
        hosts=256, gpus_per_host=8, tokens=128, hidden=7168, num_experts=2048, top_k=8, histogram=histogram, **options
    )
    assert again == got


def test_prints_a_table():
    text = str(small())
    assert "2 hosts x 4 GPUs, 64 tokens a rank" in text and "dispatch, two levels" in text and "dropped" not in text
    assert "dropped" in str(small(capacity=10))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hosts": 0}, "hosts must be in 1"),
        ({"gpus_per_host": 3}, "the 6 ranks must divide num_experts=32"),
        ({"num_groups": 5}, "num_groups=5 must divide num_experts=32"),
        ({"num_groups": 4, "topk_groups": 5}, "topk_groups=5 must be in 1..num_groups=4"),
        ({"num_groups": 16, "topk_groups": 1}, r"top_k=4 must be in 1\.\.2, what 1 groups hold"),
        ({"histogram": np.ones(31)}, r"histogram must be \[32\] or \[layers, 32\], got \[31\]"),
        ({"histogram": -np.ones(32)}, "histogram must hold counts"),
        ({"histogram": np.zeros(32)}, "histogram must hold counts"),
        ({"histogram": np.eye(32)[3]}, "histogram: expert 3 has 4.000 choices of each token"),
        ({"layout": "flat"}, "layout must be one of"),
        ({"quantize": "int8"}, "quantize must be one of"),
        ({"transport": "nccl"}, "transport must be one of"),
        ({"copies": "token"}, "copies must be one of"),
        ({"capacity": 0}, "capacity must be in 1"),
        ({"network_gbs": 0.0}, "network_gbs must be positive"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=f"plan: {message}"):
        small(**changes)


# DeepEP's figures, and the manual's tables


def test_targets_on_one_host():
    """Its record of a token at 360 to 400 GB/s of NVLink."""
    for ranks, arrivals, fp8, bf16 in ((8, 21_686, 142, 274), (4, 14_803, 83, 160), (2, 8_163, 31, 59)):
        plans = [published.one_host(ranks, size) for size in (published.V2_FP8, published.V2_BF16)]
        assert int(plans[0].arrivals.mean) == arrivals
        assert [round(p.one_level.dispatch.nvlink.mean / 1e6) for p in plans] == [fp8, bf16]
    for size, least, most in ((published.V2_FP8, 355, 395), (published.V2_BF16, 685, 761)):
        seconds = [published.one_host(8, size, rate).one_level.dispatch.seconds for rate in (400.0, 360.0)]
        assert [round(s * 1e6) for s in seconds] == [least, most]


def test_published_rates():
    """Low latency: bytes over time is the rate that is published with it. All: no faster than the links allow."""
    for row, i, us, least in published.bounds():
        assert us > least, (row.kernels, row.plan.hosts)
        if row.microseconds:
            np.testing.assert_allclose(row.bytes()[i] / us / 1e3, row.rates[i], rtol=0.025)
    first = published.PUBLISHED[4]
    assert first.bytes()[0] == 1024 * 7408 and round(first.bytes()[0] / 77 / 1e3, 1) == 98.5


def test_buffers():
    assert published.low_latency_buffer(256) == 1_908_410_496
    assert published.low_latency_buffer(288) == 2_146_961_792
    for ranks, tokens, size in ((8, 4096, 452), (8, 8192, 904), (4, 4096, 226), (8, 128, 16)):
        assert published.v2_buffer(ranks, tokens, published.BF16) == size * 2**20
    assert published.v2_buffer(8, 4096, 7168 + 7168 // 32 * 4) == 256 * 2**20


def test_the_manual_has_the_tables_that_the_command_prints(capsys):
    page = (published.ROOT / "docs" / "plan.md").read_text()
    assert re.findall(r"\{\{ plan (\S+) \}\}", page) == list(published.TABLES)
    published.main()
    printed = capsys.readouterr().out
    for table in published.TABLES.values():
        assert table() in printed
    numbers = re.sub(r"```.*?```", "", page, flags=re.S)
    assert not re.search(r"^\|", numbers, flags=re.M), "a table of the page comes from benchmarks/plan.py"
