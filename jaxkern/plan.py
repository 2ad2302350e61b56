"""`plan`: what an exchange of tokens between experts moves and holds, before there is a cluster to measure it on.

Everything follows from how likely a token is to need each rank and each host. Without groups that is exact: the chosen
experts are taken as the fixed-size sample of largest entropy with each expert's observed share (Chen, Dempster and Liu
1994), whose probabilities are ratios of elementary symmetric polynomials; for even shares they are the hypergeometric
1 - C(E - E/R, k) / C(E, k). With groups they are counted on a sample that is routed as `route` does it.
"""

import dataclasses
from typing import Literal

import numpy as np

from jaxkern._check import Sizes

SCALE_BLOCK = 128  # numbers that share a float32 scale
SAMPLED_NUMBERS = 1 << 23  # scores drawn for a plan with groups: a second, whatever the number of experts


@dataclasses.dataclass(frozen=True)
class Load:
    """Rows of a rank, in expectation: the mean over ranks, and those of the rank that has most."""

    mean: float
    most: float


@dataclasses.dataclass(frozen=True)
class Link:
    """Bytes that one kind of link carries for a rank, in one direction, in expectation.

    mean: over the ranks; as many leave as arrive
    most_in, most_out: of the rank that receives, or sends, most
    """

    mean: float
    most_in: float
    most_out: float

    @property
    def most(self) -> float:
        return max(self.most_in, self.most_out)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One dispatch or one combine.

    seconds: a lower bound, of the rank with most bytes, both kinds of link at work at once
    """

    nvlink: Link
    network: Link
    seconds: float


@dataclasses.dataclass(frozen=True)
class Levels:
    """An exchange over all ranks at once, or in two levels: between hosts, then within each.

    dispatch_buffer, combine_buffer: bytes of the static buffers that a rank sends from and receives into
    memory: bytes of a rank at the fuller of the two moments: the buffers of dispatch, or those of combine, with the
        received rows
    """

    dispatch: Exchange
    combine: Exchange
    dispatch_buffer: int
    combine_buffer: int
    memory: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found; prints as a table.

    ranks_per_token, hosts_per_token: distinct ones that a token needs, its own included
    arrivals: tokens that arrive at a rank, a token once for each rank, or each expert, that it is sent to
    assignments: (token, expert) pairs of a rank's experts
    dropped: the part of all assignments that `capacity` has no row for, at the expected loads
    dispatch_bytes, combine_bytes: of one token on a link
    rows, rows_bytes: the received rows of a rank, in `layout`, as static shapes must provide for them
    one_level: every copy crosses from its source rank to its rank
    two_levels: a token crosses between hosts once for each other host that needs it, from a device to the device of the
        same number, which sends it on within the host; combine sums within the host first
    """

    hosts: int
    gpus_per_host: int
    tokens: int
    layout: str
    ranks_per_token: float
    hosts_per_token: float
    arrivals: Load
    assignments: Load
    dropped: float
    dispatch_bytes: int
    combine_bytes: int
    rows: int
    rows_bytes: int
    one_level: Levels
    two_levels: Levels

    def __str__(self) -> str:
        lines = [
            f"{self.hosts} hosts x {self.gpus_per_host} GPUs, {self.tokens:,} tokens a rank: a token needs "
            f"{self.ranks_per_token:.2f} ranks on {self.hosts_per_token:.2f} hosts",
            f"tokens that arrive at a rank    {self.arrivals.mean:12,.0f}   most {self.arrivals.most:12,.0f}",
            f"assignments of its experts      {self.assignments.mean:12,.0f}   most {self.assignments.most:12,.0f}"
            + (f"   dropped {self.dropped:.2%}" if self.dropped else ""),
            f"rows provided, layout {self.layout:<9} {self.rows:12,}   {self.rows_bytes / 1e9:.3f} GB",
            "",
            "MB a rank and direction         NVLink    most   network    most   at least us",
        ]
        for name, levels in (("one level", self.one_level), ("two levels", self.two_levels)):
            for op, exchange in (("dispatch", levels.dispatch), ("combine", levels.combine)):
                numbers = [exchange.nvlink.mean, exchange.nvlink.most, exchange.network.mean, exchange.network.most]
                nvlink, nvlink_most, network, network_most = (f"{x / 1e6:.1f}" for x in numbers)
                lines.append(
                    f"{op + ', ' + name:<28}{nvlink:>10}{nvlink_most:>8}{network:>10}{network_most:>8}"
                    f"{exchange.seconds * 1e6:14,.0f}"
                )
        lines += ["", "GB of a rank                  dispatch buffers   combine buffers   in all"]
        for name, levels in (("one level", self.one_level), ("two levels", self.two_levels)):
            numbers = levels.dispatch_buffer, levels.combine_buffer, levels.memory
            lines.append("{:<28}{:>18.3f}{:>18.3f}{:>9.3f}".format(name, *(x / 1e9 for x in numbers)))
        return "\n".join(lines)


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
    layout: Literal["expert", "rank", "masked"] = "expert",
    quantize: Literal["fp8"] | None = None,
    capacity: int | None = None,
    transport: Literal["ragged", "all_to_all", "gather"] = "ragged",
    copies: Literal["rank", "expert"] = "rank",
    itemsize: int = 2,
    dispatch_bytes: int | None = None,
    combine_bytes: int | None = None,
    nvlink_gbs: float = 450.0,
    network_gbs: float = 50.0,
    seed: int = 0,
) -> Plan:
    """The rows, the bytes over each kind of link, and the memory of a `dispatch` and a `combine` on hosts of GPUs.

    >>> print(jaxkern.plan(hosts=4, gpus_per_host=8, tokens=4096, hidden=7168, num_experts=256, top_k=8))

    Shapes and dtypes: each of hosts * gpus_per_host ranks has `tokens` tokens of `hidden` numbers of `itemsize` bytes,
        and num_experts / ranks experts, in order. histogram [num_experts]: how often each expert was chosen, in any
        unit; or [layers, num_experts], as the training metric "expert_load" has it, whose layers are added up; None:
        all alike. num_groups and topk_groups as in `route`.
    Units: layout "expert" groups the received rows by expert, "rank" has one for each token and rank, "masked" a slab
        for each expert; capacity is their number, None the worst case. transport "ragged" sends the tokens that are
        needed, the least that any must; "all_to_all" and "gather", which `dispatch` chooses between, the whole static
        slabs, every token to every rank. copies "rank" sends a token
        once to each rank that needs it; "expert" once for each of its experts, as low-latency kernels do.
        dispatch_bytes and combine_bytes are of one token on a link; None is what `dispatch` sends (the row, a float32
        scale for each 128 numbers of FP8, 8 bytes a choice for its id and its weight) and `combine` returns (float32).
        Rates are in 1e9 bytes a second, a rank and direction: the defaults are those of an H100's NVLink and of a
        400 Gb/s adapter for each GPU. seed is of the sample that groups need.
    Errors: ValueError for a size that is not positive, ranks or groups that do not divide the experts, top_k experts
        that topk_groups groups do not hold, or a histogram that no routing gives: another length, negative numbers, or
        an expert that has more than one choice of each token.
    Source: DeepEP's buffer sizes and its model of traffic; DeepSeek-V3 report, section 3.2.2, for the two levels.
    """
    sizes = Sizes("plan")
    hosts, gpus_per_host, tokens, hidden, num_experts, itemsize = (
        sizes.require_size(name, size)
        for name, size in (
            ("hosts", hosts),
            ("gpus_per_host", gpus_per_host),
            ("tokens", tokens),
            ("hidden", hidden),
            ("num_experts", num_experts),
            ("itemsize", itemsize),
        )
    )
    capacity, dispatch_bytes, combine_bytes = (
        sizes.optional_size(name, size)
        for name, size in (
            ("capacity", capacity),
            ("dispatch_bytes", dispatch_bytes),
            ("combine_bytes", combine_bytes),
        )
    )
    num_groups, topk_groups, top_k = (
        sizes.require_integer(name, value)
        for name, value in (("num_groups", num_groups), ("topk_groups", topk_groups), ("top_k", top_k))
    )
    ranks = hosts * gpus_per_host
    sizes.require(num_experts % ranks == 0, f"the {ranks} ranks must divide num_experts={num_experts}")
    divides = num_groups >= 1 and num_experts % num_groups == 0
    sizes.require(divides, f"num_groups={num_groups} must divide num_experts={num_experts}")
    sizes.require(1 <= topk_groups <= num_groups, f"topk_groups={topk_groups} must be in 1..num_groups={num_groups}")
    limit = topk_groups * (num_experts // num_groups)
    sizes.require(1 <= top_k <= limit, f"top_k={top_k} must be in 1..{limit}, what {topk_groups} groups hold")
    for name, value, values in (
        ("layout", layout, ("expert", "rank", "masked")),
        ("quantize", quantize, (None, "fp8")),
        ("transport", transport, ("ragged", "all_to_all", "gather")),
        ("copies", copies, ("rank", "expert")),
    ):
        sizes.require(value in values, f"{name} must be one of {values}, got {value!r}")
    for name, rate in (("nvlink_gbs", nvlink_gbs), ("network_gbs", network_gbs)):
        sizes.require(rate > 0, f"{name} must be positive, got {rate}")
    shares = _shares(sizes, histogram, num_experts, top_k)

    of_experts = shares.reshape(ranks, -1).sum(1)  # choices of a token that go to each rank
    of_ranks, of_hosts = _reach(shares, ranks, hosts, top_k, num_groups, topk_groups, histogram is None, seed)
    sent = of_ranks if copies == "rank" else of_experts  # copies of a token that go to each rank

    local_experts = num_experts // ranks
    worst = {
        "expert": ranks * tokens * min(top_k, local_experts),
        "rank": ranks * tokens,
        "masked": ranks * tokens * local_experts,
    }[layout]
    rows = worst if capacity is None else capacity
    payload = itemsize * hidden if quantize is None else hidden + 4 * -(-hidden // SCALE_BLOCK)
    dispatch_bytes = payload + 8 * top_k if dispatch_bytes is None else dispatch_bytes
    combine_bytes = 4 * hidden if combine_bytes is None else combine_bytes
    load = ranks * tokens * (of_ranks if layout == "rank" else of_experts)
    rates = nvlink_gbs * 1e9, network_gbs * 1e9

    def levels(number: int) -> Levels:
        links = (_one_level if number == 1 else _two_levels)(sent, of_hosts, tokens)
        slots = 1 if copies == "rank" else local_experts  # that a slab has for each token
        if transport != "ragged":
            links = _whole_slabs(number, hosts, gpus_per_host, tokens * slots)
        forwarded = hosts * tokens if number == 2 and hosts > 1 else 0
        buffers = [(2 * ranks * tokens * slots + forwarded) * size for size in (dispatch_bytes, combine_bytes)]
        return Levels(
            _exchange(links, dispatch_bytes, rates),
            _exchange([(out, into) for into, out in links], combine_bytes, rates),
            *buffers,
            max(buffers[0] + rows * payload, buffers[1] + rows * itemsize * hidden),
        )

    return Plan(
        hosts,
        gpus_per_host,
        tokens,
        layout,
        float(of_ranks.sum()),
        float(of_hosts.sum()),
        _load(ranks * tokens * sent),
        _load(ranks * tokens * of_experts),
        float(np.maximum(load - rows, 0).sum() / load.sum()) if capacity is not None else 0.0,
        dispatch_bytes,
        combine_bytes,
        rows,
        rows * payload,
        levels(1),
        levels(2),
    )


def _shares(sizes: Sizes, histogram, num_experts: int, top_k: int) -> np.ndarray:
    """The probability of each expert to be among a token's choices, float64 [num_experts]: they sum to top_k."""
    if histogram is None:
        return np.full(num_experts, top_k / num_experts)
    counts = np.asarray(histogram, np.float64)
    sizes.require(
        counts.ndim in (1, 2) and counts.shape[-1] == num_experts,
        f"histogram must be [{num_experts}] or [layers, {num_experts}], got {list(counts.shape)}",
    )
    holds = bool(np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0)
    sizes.require(holds, "histogram must hold counts: finite, not negative, and not all zero")
    counts = counts.reshape(-1, num_experts).sum(0)
    shares = counts * (top_k / counts.sum())
    most = int(shares.argmax())
    sizes.require(
        shares[most] <= 1 + 1e-9,
        f"histogram: expert {most} has {shares[most]:.3f} choices of each token, and a token chooses an expert once",
    )
    return np.minimum(shares, 1.0)


# Rows over NVLink and over the network, each as (into every rank, out of every rank).


def _one_level(sent, of_hosts, tokens):
    hosts, ranks = len(of_hosts), len(sent)
    gpus = ranks // hosts
    on_host = sent.reshape(hosts, gpus).sum(1).repeat(gpus)
    nvlink = tokens * (gpus - 1) * sent, tokens * (on_host - sent)
    network = tokens * (ranks - gpus) * sent, tokens * (sent.sum() - on_host)
    return nvlink, network


def _two_levels(sent, of_hosts, tokens):
    hosts, ranks = len(of_hosts), len(sent)
    gpus = ranks // hosts
    on_host = sent.reshape(hosts, gpus).sum(1).repeat(gpus)
    host = of_hosts.repeat(gpus)
    # A device sends on what came to its host through it: its own tokens and those of the devices of its number.
    nvlink = tokens * hosts * (gpus - 1) * sent, tokens * hosts * (on_host - sent)
    network = tokens * (hosts - 1) * host, tokens * (of_hosts.sum() - host)
    return nvlink, network


def _whole_slabs(number: int, hosts: int, gpus: int, tokens: int):
    every = np.ones(hosts * gpus)
    nvlink = (gpus - 1) * tokens * (1 if number == 1 else hosts) * every
    network = (hosts - 1) * tokens * (gpus if number == 1 else 1) * every
    return (nvlink, nvlink), (network, network)


def _exchange(rows, size: int, rates: tuple[float, float]) -> Exchange:
    links = [Link(*(float(x) * size for x in (into.mean(), into.max(), out.max()))) for into, out in rows]
    return Exchange(*links, max(link.most / rate for link, rate in zip(links, rates, strict=True)))


def _load(rows: np.ndarray) -> Load:
    return Load(float(rows.mean()), float(rows.max()))


# How likely a token is to need each rank and each host.


def _reach(shares, ranks, hosts, top_k, num_groups, topk_groups, even, seed):
    if topk_groups < num_groups:
        return _sampled_reach(shares, ranks, hosts, top_k, num_groups, topk_groups, even, seed)
    odds = _fit(shares, top_k)
    return tuple(_touched(odds, parts, top_k) for parts in (ranks, hosts))


def _fit(shares, top_k: int, iterations: int = 100) -> np.ndarray:
    """Independent probabilities that, given that top_k experts are chosen, choose each with its share."""
    free = (shares > 0) & (shares < 1)
    target = shares[free] / (1 - shares[free])
    odds, chosen = target.copy(), shares.copy()
    for _ in range(iterations):
        chosen[free] = odds / (1 + odds)
        found = _touched(chosen, len(shares), top_k)[free]
        if np.abs(found - shares[free]).max(initial=0.0) < 1e-12:
            break
        odds *= target * (1 - found) / np.maximum(found, 1e-300)
    return chosen


def _touched(chosen, parts: int, top_k: int) -> np.ndarray:
    """The probability that a token has an expert in each of `parts` equal parts, given that it chooses top_k.

    Polynomials in x, of the probabilities of 0..top_k choices, of each part, multiplied up a binary tree; down it goes
    the product of all other parts. All terms are positive, so nothing cancels.
    """
    leaves = np.zeros((len(chosen), top_k + 1))
    leaves[:, 0], leaves[:, 1] = 1 - chosen, chosen
    below = leaves.reshape(parts, -1, top_k + 1)
    while below.shape[1] > 1:
        below = _times(*_halves(below, 1))
    level = below[:, 0]
    levels = [level]
    while len(levels[-1]) > 1:
        levels.append(_times(*_halves(levels[-1], 0)))
    total = levels.pop()[0, top_k]
    others = np.eye(1, top_k + 1)
    while levels:
        level = levels.pop()
        first, second = _halves(level, 0)
        pair = np.stack([_times(others, second), _times(others, first)], 1)
        others = pair.reshape(-1, top_k + 1)[: len(level)]
    return np.minimum((level[:, 1:] * others[:, top_k - 1 :: -1]).sum(1) / total, 1)


def _halves(x, axis: int):
    """The even and the odd elements of an axis, the last odd one being 1 if there is none."""
    even, odd = (np.take(x, np.arange(i, x.shape[axis], 2), axis) for i in range(2))
    if x.shape[axis] % 2:
        one = np.zeros_like(np.take(x, [0], axis))
        one[..., 0] = 1
        odd = np.concatenate([odd, one], axis)
    return even, odd


def _times(a, b):
    """The product of polynomials [..., n], without the terms of x^n and above."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape))
    n = out.shape[-1]
    for i in range(n):
        out[..., i:] += a[..., i : i + 1] * b[..., : n - i]
    return out


def _sampled_reach(shares, ranks, hosts, top_k, num_groups, topk_groups, even, seed, rounds: int = 6):
    """As `route` chooses, scores being Gumbel noise plus an offset of each expert, which the shares give.

    What is counted is how often a part has a second expert of a token, and a third: the first follows from the shares.
    """
    experts = len(shares)
    samples = min(16384, max(2048, SAMPLED_NUMBERS // experts))
    noise = np.random.default_rng(seed).gumbel(size=(samples, experts)).astype(np.float32)
    with np.errstate(divide="ignore"):
        offsets = np.log(shares)
    for _ in range(0 if even else rounds):
        found = np.bincount(_choose(noise + offsets, top_k, num_groups, topk_groups).ravel(), minlength=experts)
        offsets += np.log((shares * samples + 1) / (found + 1))
    ids = _choose(noise + offsets, top_k, num_groups, topk_groups)
    reach = []
    for parts in (ranks, hosts):
        part = np.arange(samples)[:, None] * parts + ids // (experts // parts)
        counts = np.bincount(part.ravel(), minlength=samples * parts).reshape(samples, parts)
        repeated = np.maximum(counts - 1, 0).mean(0)
        if even and (parts % num_groups == 0 or num_groups % parts == 0):
            repeated[:] = repeated.mean()  # all parts are alike
        reach.append(np.clip(shares.reshape(parts, -1).sum(1) - repeated, 0, 1))
    return tuple(reach)


def _choose(scores, top_k: int, num_groups: int, topk_groups: int) -> np.ndarray:
    """The experts of each token [samples, top_k], in no order."""
    grouped = scores.reshape(len(scores), num_groups, -1)
    best = np.partition(grouped, -min(2, grouped.shape[-1]), axis=-1)[..., -2:].sum(-1)
    kept = np.argpartition(-best, topk_groups - 1, axis=1)[:, :topk_groups]
    inside = np.take_along_axis(grouped, kept[..., None], axis=1).reshape(len(scores), -1)
    chosen = np.argpartition(-inside, top_k - 1, axis=1)[:, :top_k]
    width = grouped.shape[-1]
    return np.take_along_axis(kept, chosen // width, axis=1) * width + chosen % width
