"""`jaxkern.plan` beside the figures that DeepEP publishes: `python -m benchmarks.plan` prints the manual's tables."""

import dataclasses
import functools
import pathlib

import jaxkern

ROOT = pathlib.Path(__file__).parent.parent
MODEL = functools.partial(jaxkern.plan, hidden=7168, num_experts=256, top_k=8)
H800 = {"nvlink_gbs": 160.0, "network_gbs": 50.0}  # as DeepEP's README has them
MIB = 2**20

# Bytes of a token as DeepEP counts them: row, scales and, in V2, 8 bytes an expert id and 4 a weight.
V1_FP8, BF16 = 7168 + 224, 2 * 7168
V2_FP8, V2_BF16, V2_COMBINE = 7168 + 224 + 96, BF16 + 96, BF16 + 32
LOW_LATENCY_FP8, LOW_LATENCY_COMBINE = 7168 + 224 + 16, BF16 + 224


@dataclasses.dataclass(frozen=True)
class Published:
    """Rates in GB/s and, of the low-latency kernels, times in microseconds: (dispatch, combine)."""

    kernels: str
    plan: jaxkern.Plan
    counted: str  # what a rate counts: "arrivals", "hosts" (a token once a host), "assignments"
    rates: tuple[float, float]
    microseconds: tuple[float, float] | None = None

    def bytes(self) -> tuple[float, float]:
        """Of a rank, as DeepEP's tests count them: its own traffic is in them."""
        rows = {
            "arrivals": self.plan.arrivals.mean,
            "hosts": self.plan.tokens * self.plan.hosts_per_token,
            "assignments": self.plan.assignments.mean,
        }[self.counted]
        combine = BF16 if self.counted == "assignments" else self.plan.combine_bytes
        return rows * self.plan.dispatch_bytes, rows * combine


def v1(hosts, *rates):
    plan = MODEL(
        hosts=hosts,
        gpus_per_host=8,
        tokens=4096,
        num_groups=hosts,
        topk_groups=min(4, hosts),
        dispatch_bytes=V1_FP8,
        combine_bytes=BF16,
        **H800,
    )
    return Published("V1 normal, H800", plan, "arrivals" if hosts == 1 else "hosts", rates)


def low_latency(hosts, *numbers):
    plan = MODEL(
        hosts=hosts,
        gpus_per_host=8,
        tokens=128,
        copies="expert",
        layout="masked",
        dispatch_bytes=LOW_LATENCY_FP8,
        combine_bytes=BF16,
        **H800,
    )
    (dispatch_us, dispatch), (combine_us, combine) = numbers
    return Published("V1 low latency, H800", plan, "assignments", (dispatch, combine), (dispatch_us, combine_us))


def v2(hosts, *rates):
    options = {"dispatch_bytes": V2_FP8, "combine_bytes": V2_COMBINE}
    if hosts == 1:
        options |= {"nvlink_gbs": 900.0}  # SM100
    plan = MODEL(hosts=hosts, gpus_per_host=8, tokens=8192, **options)
    name = "V2, SM100" if hosts == 1 else "V2, SM90"
    return Published(name, plan, "arrivals" if hosts == 1 else "hosts", rates)


PUBLISHED = [
    v1(1, 153, 158),
    v1(2, 43, 43),
    v1(4, 58, 57),
    v1(8, 51, 50),
    low_latency(1, (77, 98), (114, 127)),
    low_latency(2, (118, 63), (195, 74)),
    low_latency(4, (155, 48), (273, 53)),
    low_latency(8, (173, 43), (314, 46)),
    low_latency(16, (192, 39), (369, 39)),
    low_latency(32, (194, 39), (360, 40)),
    v2(1, 726, 740),
    v2(2, 90, 81),
    v2(4, 61, 61),
]


def bounds() -> list[tuple[Published, int, float, float]]:
    """(setting, 0 for dispatch or 1 for combine, the published microseconds, the plan's least)."""
    rows = []
    for published in PUBLISHED:
        levels = published.plan.one_level if published.counted == "assignments" else published.plan.two_levels
        for i, exchange in enumerate((levels.dispatch, levels.combine)):
            us = published.microseconds or [
                b / rate / 1e3 for b, rate in zip(published.bytes(), published.rates, strict=True)
            ]
            rows.append((published, i, us[i], exchange.seconds * 1e6))
    return rows


def published_table() -> str:
    lines = [
        "| DeepEP | ranks | tokens | arrivals | hosts a token | op | MB counted | GB/s published | µs | at least µs |",
        "|---|--:|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for published, i, us, least in bounds():
        plan, ranks = published.plan, published.plan.hosts * published.plan.gpus_per_host
        lines.append(
            f"| {published.kernels} | {ranks} | {plan.tokens:,} | {plan.arrivals.mean:,.0f} | "
            f"{plan.hosts_per_token:.2f} | {('dispatch', 'combine')[i]} | {published.bytes()[i] / 1e6:.1f} | "
            f"{published.rates[i]} | {us:,.0f} | {least:,.0f} |"
        )
    return "\n".join(lines)


def one_host(ranks: int, dispatch_bytes: int, nvlink_gbs: float = 400.0) -> jaxkern.Plan:
    """4096 tokens a rank over NVLink alone."""
    return MODEL(hosts=1, gpus_per_host=ranks, tokens=4096, dispatch_bytes=dispatch_bytes, nvlink_gbs=nvlink_gbs)


def one_host_table() -> str:
    lines = [
        "| ranks | arrivals | FP8, MB from others | BF16, MB | FP8, µs at 400 GB/s | BF16, µs at 400 GB/s |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for ranks in (2, 4, 8):
        plans = [one_host(ranks, size) for size in (V2_FP8, V2_BF16)]
        moved = " | ".join(f"{p.one_level.dispatch.nvlink.mean / 1e6:.0f}" for p in plans)
        least = " | ".join(f"{p.one_level.dispatch.seconds * 1e6:.0f}" for p in plans)
        lines.append(f"| {ranks} | {plans[0].arrivals.mean:,.0f} | {moved} | {least} |")
    return "\n".join(lines)


def v2_buffer(ranks: int, tokens: int, row_bytes: int) -> int:
    """The receive area of DeepEP V2: a slab of each rank, records padded to 32 bytes, up to a multiple of 2 MiB."""
    record = row_bytes + _ceil_to(100, 32)  # 8 ids, 8 weights, the source, 8 list entries, 4 bytes each
    levels = MODEL(hosts=1, gpus_per_host=ranks, tokens=tokens, dispatch_bytes=record).one_level
    return _ceil_to(levels.dispatch_buffer // 2, 2 * MIB)  # half: `plan` counts what is sent from as well


def low_latency_buffer(num_experts: int) -> int:
    """DeepEP V1's: two sets of send and receive slabs, a row for each expert and token, and their counters."""
    plan = MODEL(
        hosts=1,
        gpus_per_host=8,
        tokens=128,
        num_experts=num_experts,
        copies="expert",
        combine_bytes=LOW_LATENCY_COMBINE,
    )
    return (2 * (plan.one_level.combine_buffer + _ceil_to(4 * num_experts, 128)) + 128) // 128 * 128


def _ceil_to(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def buffer_table() -> str:
    """Beside what DeepEP logs (issue 368)."""
    lines = ["| experts | bytes by the plan | DeepEP |", "|--:|--:|--:|"]
    reported = {256: 1_908_410_496, 288: 2_146_961_792}
    lines += [f"| {experts} | {low_latency_buffer(experts):,} | {size:,} |" for experts, size in reported.items()]
    return "\n".join(lines)


def cluster() -> str:
    """A plan as it prints."""
    return f"```\n{MODEL(hosts=8, gpus_per_host=8, tokens=4096, num_groups=8, topk_groups=4, quantize='fp8')}\n```"


TABLES = {"cluster": cluster, "one_host": one_host_table, "published": published_table, "buffers": buffer_table}


def main():
    for name, table in TABLES.items():
        print(f"{name}\n\n{table()}\n")


if __name__ == "__main__":
    main()
