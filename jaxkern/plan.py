"""`plan`: what expert parallelism sends and keeps, before there is a cluster."""

import dataclasses
import math

import numpy as np

from jaxkern._check import Sizes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one rank sends, receives and keeps in one dispatch and one combine. Means over ranks, unless they say most.

    rows, most_rows: the tokens that a rank receives, each once, its own among them; of the busiest rank
    assignments, most_assignments: the rows of its experts, one for each token and expert
    ranks_of_token, hosts_of_token: on how many ranks and hosts a token's experts are
    nvlink_dispatch, nvlink_combine: bytes that a rank receives over NVLink, from the other ranks of its host
    network_dispatch, network_combine: bytes that a rank receives over the network, each token crossing once for each
        rank that needs it; host_network_*: once for each host, as axis_name=(host, device) sends it
    received_bytes, slab_bytes: what `dispatch` keeps: the rows of its experts, and the slabs of the exchange, for the
        worst case of routing
    """

    hosts: int
    gpus_per_host: int
    rows: float
    most_rows: float
    assignments: float
    most_assignments: float
    ranks_of_token: float
    hosts_of_token: float
    nvlink_dispatch: float
    nvlink_combine: float
    network_dispatch: float
    network_combine: float
    host_network_dispatch: float
    host_network_combine: float
    received_bytes: int
    slab_bytes: int


def plan(
    *,
    hosts: int,
    gpus_per_host: int,
    tokens: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    histogram=None,
    num_groups: int = 1,
    topk_groups: int = 1,
    quantize: str | None = None,
    capacity: int | None = None,
    wire_capacity: int | None = None,
    samples: int = 16384,
    seed: int = 0,
) -> Plan:
    """The bytes over each kind of link and the memory of each rank, from a histogram of the routing.

    Shapes and dtypes: tokens of each rank, bfloat16 rows of `hidden`, in FP8 with 1 x 128 float32 scales on the way out
        if quantize="fp8"; histogram float [num_experts], how often each expert is chosen, None for all alike. Groups
        as in `jaxkern.route`: a token's experts are in topk_groups of num_groups groups.
    Units: bytes a rank. A choice adds 8 bytes, its id and its weight, on the way out. `samples` tokens are drawn, with
        `seed`: top_k distinct experts each, in proportion to the histogram, of the groups that are drawn likewise. The
        means of even routing without groups are exact: ranks * (1 - C(e - e / ranks, k) / C(e, k)).
    Errors: ValueError for sizes that do not divide, or a histogram with too few experts in it.
    Source: DeepEP's README and its model of traffic.
    """
    sizes, ranks = Sizes("plan"), hosts * gpus_per_host
    sizes.require(1 <= ranks <= 2048, f"hosts * gpus_per_host must be in 1..2048, got {ranks}")
    sizes.require(num_experts % ranks == 0, f"the {ranks} ranks must divide num_experts={num_experts}")
    sizes.require(num_groups >= 1 and num_experts % num_groups == 0, f"num_groups={num_groups} must divide num_experts")
    limit = topk_groups * num_experts // num_groups
    sizes.require(1 <= top_k <= limit, f"top_k={top_k} must be in 1..{limit}, what {topk_groups} groups hold")
    load = np.ones(num_experts) if histogram is None else np.asarray(histogram, np.float64)
    sizes.require(load.shape == (num_experts,), f"histogram must be [num_experts={num_experts}], got {load.shape}")
    sizes.require(
        (load >= 0).all() and (load > 0).sum() >= top_k, f"histogram must have at least top_k={top_k} experts"
    )

    ids = _draw(load, top_k, num_groups, topk_groups, samples, np.random.default_rng(seed))
    on_rank = _places(ids, num_experts // ranks, ranks)
    on_host = _places(ids, num_experts // hosts, hosts)
    scale = ranks * tokens  # of a share of all tokens: how many reach one place
    rows, host_rows = on_rank * scale, on_host * scale
    if histogram is None and num_groups == topk_groups == 1:
        rows[:] = tokens * ranks * _share(num_experts, num_experts // ranks, top_k)
        host_rows[:] = tokens * ranks * _share(num_experts, num_experts // hosts, top_k)
    assignments = np.bincount(ids.reshape(-1) // (num_experts // ranks), minlength=ranks) / samples * scale
    out_bytes = hidden + 4 * -(-hidden // 128) if quantize == "fp8" else 2 * hidden
    out_bytes, back_bytes = out_bytes + 8 * top_k, 2 * hidden

    # Sources are alike, so of what a rank receives this share comes from itself, its host, and other hosts.
    nvlink = rows.mean() * (gpus_per_host - 1) / ranks
    network = rows.mean() * (hosts - 1) / hosts
    # Once for each host: each of its ranks takes what the ranks of its own place in other hosts send here, and passes
    # it on.
    host_network = host_rows.mean() / gpus_per_host * (hosts - 1) / hosts
    kept = capacity or ranks * tokens * min(top_k, num_experts // ranks)
    slab = ranks * (wire_capacity or tokens)
    return Plan(
        hosts,
        gpus_per_host,
        rows.mean(),
        rows.max(),
        assignments.mean(),
        assignments.max(),
        rows.mean() / tokens,
        host_rows.mean() / tokens / gpus_per_host,
        nvlink * out_bytes,
        nvlink * back_bytes,
        network * out_bytes,
        network * back_bytes,
        host_network * out_bytes,
        host_network * back_bytes,
        kept * (out_bytes - 8 * top_k),
        slab * out_bytes,
    )


def _draw(load, top_k, num_groups, topk_groups, samples, rng):
    """int [samples, top_k]: distinct experts in proportion to `load`, by Gumbel's trick, in groups drawn by theirs."""
    with np.errstate(divide="ignore"):
        keys = np.log(load) + rng.gumbel(size=(samples, len(load)))
    if topk_groups < num_groups:
        groups = keys.reshape(samples, num_groups, -1)
        best = np.argpartition(-np.logaddexp.reduce(groups, -1), topk_groups - 1, axis=1)[:, :topk_groups]
        kept = np.zeros((samples, num_groups), bool)
        np.put_along_axis(kept, best, True, 1)
        keys = np.where(kept[:, :, None], groups, -np.inf).reshape(samples, -1)
    return np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k]


def _places(ids, experts, places):
    """float [places]: the share of the tokens that have an expert in each place of so many experts."""
    here = np.sort(ids // experts, 1)
    first = np.concatenate([np.ones((len(ids), 1), bool), here[:, 1:] != here[:, :-1]], 1)
    return np.bincount(here[first], minlength=places) / len(ids)


def _share(num_experts, experts, top_k):
    return 1 - math.comb(num_experts - experts, top_k) / math.comb(num_experts, top_k)
