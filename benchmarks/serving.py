"""Generation with a model of DeepSeek-V3's layers over all devices: `python -m benchmarks.serving [--json FILE]`.

Every width is DeepSeek-V3's, with FP8 weights; of its 61 layers there are as many as the devices' memory holds, five at
most, and fewer experts where one layer of 256 does not fit. The weights are random and made on the devices, each its
own part. Prefill is `generate` of one token, a step the difference from `generate` of `--steps` more.

With --profile: where the devices' time goes in a prefill and in a decode step, from JAX's own trace of them.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import gzip
import json
import math
import pathlib
import re
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern.models import deepseek
from jaxkern.models.deepseek.generate import _programs, reserve_pages
from jaxkern.models.deepseek.model import Program, is_spread

PAGE = 64
SAMPLES = 5
PROFILED_STEPS = 8
MOST_LAYERS = 5  # each is compiled by itself, and the next says nothing new
DENSE_LAYERS = 1
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "n_routed_experts": 32,
}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the results to this file")
    parser.add_argument("--profile", action="store_true", help="trace the largest batch, and say where the time goes")
    parser.add_argument("--devices", type=int, help="how many; by default all")
    parser.add_argument("--layers", type=int, help="one of them dense; by default as many as fit, five at most")
    parser.add_argument("--experts", type=int, help="of a layer; by default 256, or as many as fit")
    parser.add_argument("--hidden", type=int, help="the width of the model, a multiple of 128; by default 7168")
    parser.add_argument("--small", action="store_true", help="a small model, to try the program on CPUs")
    parser.add_argument("--bytes", type=float, help="of weights a device; by default half of what JAX may allocate")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 128], help="rows on all devices together")
    parser.add_argument("--prompt", type=int, default=256, help=f"tokens of a prompt, a multiple of {PAGE}")
    parser.add_argument("--steps", type=int, default=32, help=f"timed after the first token, below {PAGE}")
    parser.add_argument("--fp8-cache", action="store_true", help="cache pages in FP8")
    options = parser.parse_args(argv)
    # One compiled prefill then serves one token and all steps: their results have the same number of pages.
    if options.prompt % PAGE or not 0 < options.steps < PAGE:
        parser.error(f"--prompt must be a multiple of {PAGE}, --steps in 1..{PAGE - 1}")

    devices = jax.devices()[: options.devices]
    mesh = jax.make_mesh((len(devices),), ("expert",), devices=devices)
    config = choose(options, mesh.size, options.bytes or default_bytes(devices[0]))
    start = time.perf_counter()
    model = random_model(config, mesh)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    record = {"machine": machine(mesh), "model": describe(config, mesh.size), "rows": [], "profiles": []}
    print(json.dumps(record["machine"]))
    print(json.dumps(record["model"]))
    print(f"weights made in {time.perf_counter() - start:.1f} s", flush=True)
    cache_dtype = "fp8" if options.fp8_cache else None
    rates = f"{'prefill ms':>10} {'tokens/s':>9} {'step ms':>8} {'tokens/s':>9} {'weights GB/s':>12}"
    print(f"{'batch':>6} {'first s':>8} {rates}  tokens")
    for batch in options.batches:
        row = measure(model, batch, options.prompt, options.steps, cache_dtype)
        record["rows"].append(dataclasses.asdict(row))
        print_row(row)
        save(record, options.json)
    if options.profile:
        for name, calls, trace in traces(model, max(options.batches), options.prompt, cache_dtype):
            profile = summarize(name, calls, trace)
            record["profiles"].append(profile)
            print_profile(profile)
            save(record, options.json)


def save(record: dict, path: pathlib.Path | None):
    """After every row, so that a run that is cut off leaves something."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def machine(mesh) -> dict:
    device = mesh.devices.flat[0]
    return {
        "devices": mesh.size,
        "device": device.device_kind,
        "platform": device.client.platform_version.strip(),
        "jax": jax.__version__,
        "jaxkern": jaxkern.__version__,
        "date": datetime.date.today().isoformat(),
    }


# ---- the model ----


def default_bytes(device) -> float:
    stats = device.memory_stats() or {}  # a CPU has none
    return stats.get("bytes_limit", 2e9) / 2


def choose(options, devices: int, budget: float) -> deepseek.Config:
    """The most layers, of the most experts, whose weights fit in `budget` bytes on each of so many devices."""
    sizes = SMALL if options.small else {}
    sizes = sizes | ({"hidden_size": options.hidden} if options.hidden else {})
    most = options.experts or sizes.get("n_routed_experts", deepseek.Config.n_routed_experts)

    def config(experts, layers):
        return deepseek.Config(
            **sizes | {"n_routed_experts": experts},
            num_hidden_layers=layers,
            first_k_dense_replace=DENSE_LAYERS,
            eos_token_id=None,  # every row takes every step
            quantized=True,
        )

    def fits(experts, layers):
        return sum(bytes_of(config(experts, layers), devices).values()) <= budget

    least = options.layers or DENSE_LAYERS + 1
    experts = most
    while not options.experts and not fits(experts, least):
        experts //= 2
        if experts < 2 * deepseek.Config.n_group:
            raise SystemExit(f"{least} layers do not fit in {budget / 1e9:.1f} GB a device")
    if experts % devices:
        raise SystemExit(f"{experts} experts cannot be spread over {devices} devices")
    layers = least
    while not options.layers and layers < MOST_LAYERS and fits(experts, layers + 1):
        layers += 1
    return config(experts, layers)


@functools.cache
def variables(config: deepseek.Config) -> tuple:
    """The model's structure without arrays: its graph, tree, and [(path, type of variable, its shape)]."""
    make = functools.partial(deepseek.DeepseekForCausalLM, config, param_dtype=jnp.bfloat16)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    found = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    return graph, jax.tree.structure(state), [(path, type(x), x.get_value()) for path, x in found]


def bytes_of(config: deepseek.Config, devices: int) -> dict[str, float]:
    """The bytes of weights on each of so many devices."""
    found = collections.Counter()
    for path, _, x in variables(config)[2]:
        name = "experts" if is_spread(path) else "embedding" if "embed_tokens" in str(path) else "others"
        found[name] += x.size * x.dtype.itemsize / (devices if name == "experts" else 1)
    return found  # 0 for experts where there are none


def describe(config: deepseek.Config, devices: int) -> dict:
    parameters = sum(x.size for _, kind, x in variables(config)[2] if kind is not deepseek.WeightScale)
    return {
        "layers": config.num_hidden_layers,
        "dense_layers": config.first_k_dense_replace,
        "experts": config.n_routed_experts,
        "hidden": config.hidden_size,
        "parameters": parameters,
        "bytes_per_device": sum(bytes_of(config, devices).values()),
    }


def random_model(config: deepseek.Config, mesh) -> deepseek.DeepseekForCausalLM:
    """As `from_pretrained` of an FP8 checkpoint would leave it on the mesh."""
    graph, tree, found = variables(config)
    arrays = [random_array(i, kind, x, is_spread(path), mesh) for i, (path, kind, x) in enumerate(found)]
    model = nnx.merge(graph, tree.unflatten(arrays))
    model.mesh, model.dtype = mesh, np.dtype(jnp.bfloat16)
    return model


DEVIATION, LARGEST = 0.02, 448 / 4.5  # of a weight; its float8 value, the largest of 128 x 128 being 4.5 deviations


def random_array(seed: int, kind, x, spread: bool, mesh) -> jax.Array:
    if kind in (deepseek.WeightScale, deepseek.RouterBias) or len(x.shape) == 1:
        rng = np.random.default_rng(seed)
        value = {
            deepseek.WeightScale: lambda: DEVIATION / LARGEST * rng.uniform(0.75, 1.25, x.shape),
            deepseek.RouterBias: lambda: np.zeros(x.shape),
            nnx.Param: lambda: np.ones(x.shape),  # of a norm
        }[kind]()
        return jax.device_put(value.astype(x.dtype), jax.NamedSharding(mesh, P(mesh.axis_names) if spread else P()))
    deviation = LARGEST if kind is deepseek.QuantizedWeight else DEVIATION
    return _normal(x.shape, np.dtype(x.dtype), deviation, spread, mesh)(jax.random.key(seed))


@functools.cache
def _normal(shape, dtype, deviation, spread, mesh):
    """Each device draws its own part, some rows at a time: the random bits of a layer's experts are tens of GB."""
    local = (shape[0] // mesh.size, *shape[1:]) if spread else shape
    rows = math.prod(local[:-1])
    block = math.gcd(rows, 1024)

    def draw(key):
        x = jax.random.normal(key, (block, shape[-1]), jnp.float32) * deviation
        return jnp.clip(x, -448, 448).astype(dtype)

    def part(key):
        key = jax.random.fold_in(key, jax.lax.axis_index(mesh.axis_names)) if spread else key
        return jax.lax.map(draw, jax.random.split(key, rows // block)).reshape(local)

    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=P(), out_specs=P(mesh.axis_names) if spread else P()))


# ---- times ----


@dataclasses.dataclass(frozen=True)
class Row:
    """Medians of one batch. Rates are of all devices; weights_gbytes_per_s is what one device reads of its weights in
    a step, if the tokens choose experts evenly, over the step's time."""

    batch: int
    prompt: int
    steps: int
    first_s: float  # the first call, which compiles
    prefill_ms: float
    prefill_tokens_per_s: float
    step_ms: float
    tokens_per_s: float
    weights_gbytes_per_s: float
    distinct_tokens: float  # of a step's rows: equal ones all choose the same experts


def measure(model, batch: int, prompt: int, steps: int, cache_dtype) -> Row:
    prompts = random_prompts(model, batch, prompt)

    def seconds(tokens):
        start = time.perf_counter()
        written = deepseek.generate(model, prompts, max_new_tokens=tokens, page_size=PAGE, cache_dtype=cache_dtype)
        return time.perf_counter() - start, written

    first, written = seconds(1 + steps)
    seconds(1)
    times = [(seconds(1)[0], seconds(1 + steps)[0]) for _ in range(SAMPLES)]
    prefill, whole = (statistics.median(t) for t in zip(*times, strict=True))
    step = (whole - prefill) / steps
    config = model.config
    size = bytes_of(config, model.mesh.size)
    chosen = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    return Row(
        batch=batch,
        prompt=prompt,
        steps=steps,
        first_s=first,
        prefill_ms=prefill * 1e3,
        prefill_tokens_per_s=batch * prompt / prefill,
        step_ms=step * 1e3,
        tokens_per_s=batch / step,
        weights_gbytes_per_s=(size["others"] + size["experts"] * chosen) / step / 1e9,
        distinct_tokens=statistics.mean(len(set(column)) for column in written.T.tolist()),
    )


def print_row(row: Row):
    prefill = f"{row.prefill_ms:10.1f} {row.prefill_tokens_per_s:9.0f}"
    step = f"{row.step_ms:8.2f} {row.tokens_per_s:9.0f} {row.weights_gbytes_per_s:12.0f}"
    distinct = f"{row.distinct_tokens:.0f} distinct a step"
    print(f"{row.batch:6} {row.first_s:8.1f} {prefill} {step}  {distinct}", flush=True)


def random_prompts(model, batch: int, prompt: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, model.config.vocab_size, (batch, prompt), dtype=np.int32)


# ---- where the time goes ----

# By the names of our CUDA kernels, or of our ops where they are thunks of a CPU; the first that matches.
KINDS = {
    "collectives": "nccl|all[-_ ]?gather|all[-_ ]?to[-_ ]?all|all[-_ ]?reduce|reduce[-_ ]?scatter|collective",
    "grouped gemm": "kernels.*(RowGroups|KGroups|Small|Gaps)|jaxkern_(k_)?grouped_gemm",
    "gemm": "kernels.*(Dense|Narrow)|jaxkern_gemm",
    "mla_prefill": "kernels.*MlaPrefill|jaxkern_mla_prefill",
    "mla_decode": "kernels.*(Mla|MergeAttention)|jaxkern_(mla_decode|merge_attention)",
    "route": "kernels.*ChooseExperts|jaxkern_route",
    "rows": "kernels.*(Assignments|TakeRows|TakeQuantizedRows|AddRows|MultiplyRows)|jaxkern_(assign_slots|.*_rows)",
    "kv_cache": "kernels.*AppendRows|jaxkern_kv_cache",
    "quantize": "kernels.*Quantize|jaxkern_.*quantize",
    "copies": "^mem(cpy|set)|^(wrapped_)?copy",
    "XLA products": "nvjet|cutlass|cublas|xmma|gemm|gemv|splitk|_dot|^dot|cudnn",
    "XLA fusions": "",
}


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel of one device, microseconds."""

    device: str
    name: str
    kind: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


def traces(model, batch: int, prompt: int, cache_dtype):
    """(name, number of calls, events) of a prefill and of decode steps: the two programs that `generate` runs, here
    one by one, so that a trace holds one of them alone."""
    program, leaves = Program.of(model, inference=True)
    prefill, decode = _programs(program, None, PAGE)
    prompts, mask = random_prompts(model, batch, prompt), np.ones((batch, prompt), np.int32)
    lengths = np.full(batch, prompt + PAGE - 1)
    table, pages = reserve_pages(lengths, prompt // PAGE + 1, PAGE, program.devices)
    fixed = np.full(1, -1, np.int32), (np.uint32(0), np.float32(0), np.float32(1))

    def first():
        return prefill(leaves, prompts, mask, table, *fixed, pages=pages, packed=cache_dtype == "fp8")

    def steps(token, state, going, absorbed, count):
        for _ in range(count):
            token, state, going = decode(leaves, absorbed, token, state, *fixed)
        return jax.block_until_ready((token, state, going, absorbed))

    decoding = steps(*first(), 2)  # warm
    with Trace() as trace:
        jax.block_until_ready(first())
    yield "prefill", 1, trace.events
    with Trace() as trace:
        steps(*decoding, PROFILED_STEPS)
    yield "decode step", PROFILED_STEPS, trace.events


class Trace:
    """A context that leaves the devices' events in `events`."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it fills the trace, which holds a million events
        jax.profiler.start_trace(self.folder.name, profiler_options=options)
        return self

    def __exit__(self, *_):
        jax.profiler.stop_trace()
        files = pathlib.Path(self.folder.name).rglob("*.trace.json.gz")
        self.events = [event for file in files for event in read_events(json.loads(gzip.open(file).read()))]
        self.folder.cleanup()


def read_events(trace: dict) -> list[Event]:
    """Of a GPU's streams; of a CPU's devices the thunks."""
    names = {}
    for event in trace["traceEvents"]:
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name"):
            names[event["pid"], event.get("tid") if event["name"] == "thread_name" else None] = event["args"]["name"]
    found = []
    for event in trace["traceEvents"]:
        if event.get("ph") != "X":
            continue
        arguments = event.get("args") or {}
        process, thread = names.get((event["pid"], None), ""), names.get((event["pid"], event["tid"]), "")
        if "/device:" in process:
            # The other lines of a device say again what its streams do.
            device = process if thread.startswith("Stream") else None
        else:
            # A loop's thunk holds those of its body.
            loop = re.match("while|call|conditional", event["name"])
            device = f"CPU {arguments.get('device_ordinal')}" if "hlo_op" in arguments and not loop else None
        if device:
            kind = kind_of(event["name"], arguments.get("hlo_op", ""))
            found.append(Event(device, event["name"], kind, event["ts"], event.get("dur", 0)))
    return found


def kind_of(name: str, hlo_op: str) -> str:
    return next(
        kind
        for kind, pattern in KINDS.items()
        if re.search(pattern, name, re.IGNORECASE) or (pattern and re.search(pattern, hlo_op, re.IGNORECASE))
    )


def summarize(name: str, calls: int, events: list[Event]) -> dict:
    """Microseconds of a call on one device, all being means; `idle` is between the first kernel and the last."""
    devices = collections.defaultdict(list)
    for event in events:
        devices[event.device].append(event)
    share = 1 / max(1, len(devices)) / calls
    kinds, kernels = {}, {}
    for event in events:
        for table, key in ((kinds, event.kind), (kernels, f"{event.kind}: {short(event.name)}")):
            row = table.setdefault(key, {"us": 0.0, "count": 0.0})
            row["us"] += event.duration * share
            row["count"] += share
    spans = [max(e.end for e in own) - min(e.start for e in own) for own in devices.values()]
    busy = [union(own) for own in devices.values()]
    longest = sorted(kernels.items(), key=lambda item: -item[1]["us"])[:20]
    return {
        "name": name,
        "devices": len(devices),
        "us": sum(spans) * share,
        "busy_us": sum(busy) * share,
        "idle_us": (sum(spans) - sum(busy)) * share,
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["us"])),
        "longest": dict(longest),
    }


def union(events: list[Event]) -> float:
    """The time in which at least one of them runs."""
    total, until = 0.0, -math.inf
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(until, event.start))
        until = max(until, event.end)
    return total


def short(name: str) -> str:
    """A kernel's name without what all of ours have in common; XLA's without its number."""
    name = re.sub(r"^void |entry<|jaxkern::cuda::|kernels::|\(.*\)$", "", name)
    return re.sub(r"[._]\d+$", "", name)[:72]


def print_profile(profile: dict):
    print(f"{profile['name']}: {profile['us']:.0f} us on each of {profile['devices']} devices")
    if not profile["devices"]:
        print("  the trace holds no kernels")
        return
    idle = {"idle": {"us": profile["idle_us"], "count": 0.0}}
    # Kernels of two streams may run at once: the shares may add up to more than 1.
    for title, rows in (("by kind", profile["kinds"] | idle), ("longest", profile["longest"])):
        print(f"  {title:74} {'us':>9} {'share':>6} {'kernels':>8}")
        for name, row in rows.items():
            print(f"  {name:74} {row['us']:9.1f} {row['us'] / profile['us']:6.1%} {row['count']:8.1f}")


if __name__ == "__main__":
    main()
