"""Markdown tables of the committed results, for the README and the manual."""

import json
import pathlib
import re

RESULTS = pathlib.Path(__file__).parent / "results"
README = pathlib.Path(__file__).parent.parent / "README.md"


def table(family: str) -> str:
    """Every row of one family."""
    record = json.loads((RESULTS / f"{family}.cpu.json").read_text())
    machine = record["machine"]
    lines = [
        f"{machine['cpus']} CPUs, SIMD level {machine['simd']}, JAX {machine['jax']}; "
        f"copies {machine['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"float32 product {machine['matrix_flops_per_s'] / 1e9:.0f} GFLOP/s.",
        "",
        "| op | shape | ours, ms | XLA, ms | XLA's form | gain | copy | matrix |",
        "|---|---|--:|--:|---|--:|--:|--:|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['name']} | {row['shape']} | {row['ours_ms']:.3g} | {row['xla_ms']:.3g} | {row['xla_form']} | "
            f"{row['ratio']:.1f} | {row['copy_fraction']:.2f} | {row['matrix_fraction']:.2f} |"
        )
    return "\n".join(lines)


def gpu_table() -> str:
    """The committed runs on a GPU."""
    return "\n\n".join(_gpu_run(json.loads(path.read_text())) for path in sorted(RESULTS.glob("gpu*.json")))


def _gpu_run(record: dict) -> str:
    """Ours, the form with scales that a user would write, and the best of all others."""
    machine = record["machine"]
    lines = [
        f"{machine['device']}, driver {machine['driver']}, JAX {machine['jax']}, torch {machine['torch']}, "
        f"{machine['date']}; copies {machine['copy_bytes_per_s'] / 1e12:.2f} TB/s, bfloat16 product "
        f"{machine['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s, smallest kernel {machine['smallest_kernel_us']:.1f} us.",
        "",
        "| op | shape | ours, us | TFLOP/s | GB/s | dequantise first, us | best other, us | which |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    cases = {}
    for row in record["rows"]:
        if not row["skipped"]:
            cases.setdefault((row["name"], row["shape"]), {})[row["form"]] = row
    for (name, shape), forms in cases.items():
        ours = forms["ours"]
        plain = next((row for form, row in forms.items() if form.startswith("dequantise")), None)
        best = forms[ours["best_alternative"]]
        lines.append(
            f"| {name} | {shape} | {ours['us']:.1f} | {ours['tflops']:.0f} | {ours['gbytes']:.0f} | "
            f"{format(plain['us'], '.1f') if plain else ''} | {best['us']:.1f} | {ours['best_alternative']} |"
        )
    return "\n".join(lines)


def exchange_table() -> str:
    """The committed runs over several GPUs."""
    return "\n\n".join(_exchange_run(json.loads(path.read_text())) for path in sorted(RESULTS.glob("exchange*.json")))


def _exchange_run(record: dict) -> str:
    machine = record["machine"]
    lines = [
        f"{machine['devices']} x {machine['device']}, JAX {machine['jax']}.",
        "",
        "| | tokens | us | GB/s a rank |",
        "|---|---|--:|--:|",
        *(f"| {r['name']} | {r['shape']} | {r['us']:.0f} | {r['gbytes']:.1f} |" for r in record["rows"]),
    ]
    return "\n".join(lines)


def serving_table() -> str:
    """The committed runs of generation, and where the time of the largest batch goes."""
    return "\n\n".join(_serving_run(json.loads(path.read_text())) for path in sorted(RESULTS.glob("serving*.json")))


def _serving_run(record: dict) -> str:
    machine, model = record["machine"], record["model"]
    lines = [
        f"{machine['devices']} x {machine['device']}, JAX {machine['jax']}, {machine['date']}; "
        f"{model['layers']} layers, {model['dense_layers']} of them dense, {model['experts']} experts, "
        f"{model['parameters'] / 1e9:.1f} G parameters, {model['bytes_per_device'] / 1e9:.1f} GB of weights a device.",
        "",
        "| batch | prompt | prefill, ms | tokens/s | step, ms | tokens/s |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for r in record["rows"]:
        lines.append(
            f"| {r['batch']} | {r['prompt']} | {r['prefill_ms']:.1f} | {r['prefill_tokens_per_s']:.0f} | "
            f"{r['step_ms']:.2f} | {r['tokens_per_s']:.0f} |"
        )
    for profile in record["profiles"]:
        shares = {kind: row["us"] / profile["us"] for kind, row in profile["kinds"].items()}
        shares["idle"] = profile["idle_us"] / profile["us"]
        listed = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.01)
        lines += ["", f"A {profile['name']} of the largest batch, {profile['us'] / 1e3:.1f} ms: {listed}."]
    return "\n".join(lines)


def summary() -> str:
    """One line a family: its rows' smallest, median and largest gain."""
    lines = ["| ops | rows | least gain over XLA | median | most |", "|---|--:|--:|--:|--:|"]
    for path in sorted(RESULTS.glob("*.cpu.json")):
        record = json.loads(path.read_text())
        ratios = sorted(row["ratio"] for row in record["rows"])
        middle = ratios[len(ratios) // 2]
        family = record["family"]
        lines.append(f"| {family} | {len(ratios)} | {ratios[0]:.2f} | {middle:.1f} | {ratios[-1]:.3g} |")
    return "\n".join(lines)


def with_summary(readme: str) -> str:
    return re.sub(
        r"(<!-- results -->\n).*?(\n<!-- end -->)", lambda m: m[1] + summary() + m[2], readme, flags=re.DOTALL
    )
