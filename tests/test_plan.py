"""`moe.plan`: against closed forms, against counts of a real routing, and against what was published."""

import math
import pathlib
import time

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from benchmarks import plan as published
from jaxkern.moe import plan

V3 = {"tokens": 4096, "hidden": 7168, "num_experts": 256, "top_k": 8}


@pytest.mark.parametrize(
    "ranks, rows, fp8_megabytes, bf16_megabytes", [(8, 21_686, 142, 274), (4, 14_803, 83, 160), (2, 8_163, 31, 59)]
)
def test_even_routing_on_one_host(ranks, rows, fp8_megabytes, bf16_megabytes):
    """The figures of DeepEP's own count: 4096 tokens a rank, hidden 7168, 8 of 256 experts."""
    p = plan(hosts=1, gpus_per_host=ranks, quantize="fp8", **V3)
    assert abs(p.rows - rows) <= 1 and p.rows == p.most_rows
    assert p.nvlink_dispatch == pytest.approx(fp8_megabytes * 1e6, rel=0.02)
    assert plan(hosts=1, gpus_per_host=ranks, **V3).nvlink_dispatch == pytest.approx(bf16_megabytes * 1e6, rel=0.02)
    assert p.network_dispatch == p.host_network_combine == 0
    assert p.ranks_of_token == pytest.approx(ranks * (1 - math.comb(256 - 256 // ranks, 8) / math.comb(256, 8)))


def test_a_sample_of_even_routing_is_near_the_closed_form():
    even = plan(hosts=2, gpus_per_host=4, **V3)
    drawn = plan(hosts=2, gpus_per_host=4, histogram=np.full(256, 7), **V3)
    assert drawn.rows == pytest.approx(even.rows, rel=0.01) and drawn.rows != even.rows
    assert drawn.host_network_dispatch == pytest.approx(even.host_network_dispatch, rel=0.01)


def test_it_counts_what_dispatch_receives():
    """Routing by `route` from logits whose noise is Gumbel's: experts in proportion to the histogram."""
    rng, histogram = np.random.default_rng(1), np.linspace(1, 9, 64)
    logits = np.log(histogram) + rng.gumbel(size=(8 * 512, 64))
    ids = np.argsort(-logits, 1)[:, :4].astype(np.int32)
    p = plan(hosts=1, gpus_per_host=8, tokens=512, hidden=256, num_experts=64, top_k=4, histogram=histogram)
    _, handle = jaxkern.dispatch(jnp.zeros((8 * 512, 1)), ids, jnp.ones(ids.shape), num_experts=64)
    assignments = np.asarray(handle.group_sizes).reshape(8, 8).sum(1)
    rows = [(ids // 8 == rank).any(1).sum() for rank in range(8)]
    assert p.assignments == assignments.mean()
    assert p.most_assignments == pytest.approx(assignments.max(), rel=0.03)
    assert p.rows == pytest.approx(np.mean(rows), rel=0.02) and p.most_rows == pytest.approx(np.max(rows), rel=0.03)


def test_node_limited_routing_bounds_the_hosts():
    free = plan(hosts=8, gpus_per_host=8, **V3)
    limited = plan(hosts=8, gpus_per_host=8, num_groups=8, topk_groups=4, **V3)
    assert limited.hosts_of_token <= 4 < free.hosts_of_token
    assert limited.host_network_dispatch < free.host_network_dispatch < free.network_dispatch


def test_all_tokens_to_one_rank():
    histogram = np.zeros(256)
    histogram[:32] = 1
    p = plan(hosts=1, gpus_per_host=8, histogram=histogram, **V3)
    assert p.ranks_of_token == 1 and p.most_rows == 8 * 4096 and p.most_assignments == 8 * 8 * 4096


def test_memory_is_the_worst_case_or_the_capacity():
    p = plan(hosts=2, gpus_per_host=4, **V3)
    assert p.received_bytes == 8 * 4096 * 8 * 2 * 7168 and p.slab_bytes == 8 * 4096 * (2 * 7168 + 64)
    small = plan(hosts=2, gpus_per_host=4, capacity=50_000, wire_capacity=1024, **V3)
    assert small.received_bytes == 50_000 * 2 * 7168 and small.slab_bytes == p.slab_bytes / 4


def test_2048_ranks_take_seconds():
    start = time.perf_counter()
    p = plan(hosts=256, gpus_per_host=8, tokens=128, hidden=7168, num_experts=2048, top_k=8)
    assert time.perf_counter() - start < 60 and p.ranks_of_token == pytest.approx(8)  # an expert a rank


@pytest.mark.parametrize(
    "change, error",
    [
        ({"hosts": 300}, r"hosts \* gpus_per_host must be in 1..2048, got 2400"),
        ({"hosts": 3}, "the 24 ranks must divide num_experts=256"),
        ({"top_k": 40, "num_groups": 8}, r"top_k=40 must be in 1..32, what 1 groups hold"),
        ({"histogram": np.ones(8)}, r"histogram must be \[num_experts=256\], got \(8,\)"),
        ({"histogram": np.arange(256) < 4}, "histogram must have at least top_k=8 experts"),
    ],
    ids=lambda v: "" if isinstance(v, str) else ",".join(v),
)
def test_errors(change, error):
    with pytest.raises(ValueError, match=f"plan: {error}"):
        plan(**{"hosts": 1, "gpus_per_host": 8, **V3, **change})


def test_the_manual_shows_the_table_of_the_published_settings():
    manual = pathlib.Path(__file__).parent.parent / "docs" / "experts.md"
    assert published.table() in manual.read_text()
