"""What `jaxkern.moe.plan` says of DeepEP's published settings: `python -m benchmarks.plan` prints the table."""

import dataclasses

from jaxkern.moe import plan

HIDDEN = 7168
ROW, SUM = HIDDEN + HIDDEN // 128 * 4, 2 * HIDDEN  # bytes of a token as DeepEP counts them: FP8 there, bfloat16 back


@dataclasses.dataclass(frozen=True)
class Setting:
    """A published measurement of DeepEP: GB/s as its authors count them, and over which link."""

    name: str
    hosts: int
    options: dict
    link: str
    dispatch: float
    combine: float


V3 = {"hidden": HIDDEN, "num_experts": 256, "top_k": 8, "quantize": "fp8", "gpus_per_host": 8}
SETTINGS = [
    Setting("V1, EP 8", 1, {"tokens": 4096}, "NVLink", 153, 158),
    Setting("V1, EP 16", 2, {"tokens": 4096, "num_groups": 8, "topk_groups": 4}, "RDMA", 43, 43),
    Setting("V1, EP 32", 4, {"tokens": 4096, "num_groups": 8, "topk_groups": 4}, "RDMA", 58, 57),
    Setting("V1, EP 64", 8, {"tokens": 4096, "num_groups": 8, "topk_groups": 4}, "RDMA", 51, 50),
    Setting("V2, EP 8 x 2", 2, {"tokens": 8192}, "RDMA", 90, 81),
    Setting("V2, EP 8 x 4", 4, {"tokens": 8192}, "RDMA", 61, 61),
]


def table() -> str:
    """What a rank receives, and how long that takes at the rates that were published."""
    lines = [
        "| setting | tokens a rank | rows a rank | ranks, hosts of a token | NVLink in | network in | at | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in SETTINGS:
        p = plan(hosts=s.hosts, **V3, **s.options)
        # DeepEP counts what a rank or host sends itself: rows received, or tokens once for each host.
        rows = p.hosts_of_token * s.options["tokens"] if s.link == "RDMA" else p.rows
        seconds = rows * ROW / s.dispatch / 1e9, rows * SUM / s.combine / 1e9
        cells = [
            s.name,
            f"{s.options['tokens']}",
            f"{p.rows:,.0f}",
            f"{p.ranks_of_token:.2f}, {p.hosts_of_token:.2f}",
            f"{p.nvlink_dispatch / 1e6:.0f} + {p.nvlink_combine / 1e6:.0f} MB",
            f"{p.host_network_dispatch / 1e6:.0f} + {p.host_network_combine / 1e6:.0f} MB",
            f"{s.dispatch:.0f}, {s.combine:.0f} GB/s {s.link}",
            f"{seconds[0] * 1e3:.2f} + {seconds[1] * 1e3:.2f} ms",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
