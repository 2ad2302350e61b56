"""What several processes compute together, and one of them: multihost_worker.py ADDRESS NUMBER INDEX DEVICES TASK ...

Each of NUMBER processes makes DEVICES CPU devices, or takes as many GPUs of this host, by its INDEX. The tests import
`chosen_cases` to compute the same on the devices of one process; JAXKERN_TEST_CASES=REGEX chooses some. TASK is "cases
FOLDER", which leaves CASE.npz in the folder, or "loop STEPS", collectives until something ends them: process 1 fails
after STEPS.
"""

import dataclasses
import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from deepseek_tools import small_model, tokens
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern.models import deepseek
from jaxkern.models.deepseek.model import Program

EXPERTS, TOP_K, HIDDEN, TOKENS = 16, 4, 40, 48
SMALL = {"n_routed_experts": 16, "num_experts_per_tok": 4}  # two experts a device


@dataclasses.dataclass(frozen=True)
class Case:
    """A computation, and how far it may be from the same on one process of as many devices and on one device: in
    parts of an array's largest value, 0 being the same bits and None nothing to compare with."""

    compute: Callable[[int], dict[str, jax.Array]]  # on so many devices
    to_one_process: float = 0
    to_one_device: float | None = 0
    on_cpus: bool = True


def mesh_of(devices: int, names: tuple[str, ...]) -> jax.sharding.Mesh:
    """Two names are two levels: hosts, and the devices of each."""
    shape = {1: (devices,), 2: (2, devices // 2) if devices > 1 else (1, 1)}[len(names)]
    return jax.make_mesh(shape, names, devices=jax.devices()[:devices])


def exchange(devices: int, *, names, dtype, back=None, **options):
    """Dispatch, every expert its own matrix, combine; and all gradients."""
    mesh = mesh_of(devices, names)
    axis_name = names if len(names) > 1 else names[0]
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    weights = rng.standard_normal(ids.shape).astype(np.float32)
    x, g = (rng.standard_normal((TOKENS, HIDDEN)).astype(dtype) for _ in range(2))
    w = (rng.standard_normal((EXPERTS, HIDDEN, HIDDEN)) / 6).astype(dtype)

    def layer(x, weights, w, ids):
        received, handle = jaxkern.dispatch(x, ids, weights, num_experts=EXPERTS, axis_name=axis_name, **options)
        alignment = options.get("expert_alignment", 1)
        if handle.layout == "rank":
            each = jnp.tanh(jnp.einsum("rh,ehk->erk", received, w, precision="highest"))
            chosen = handle.expert_ids == jnp.arange(w.shape[0])[:, None, None]
            y = (each * (chosen * handle.weights).sum(-1, keepdims=True)).sum(0)
        else:
            if handle.layout == "masked":
                expert = jnp.repeat(jnp.arange(w.shape[0]), received.shape[1])
            else:
                ends = jnp.cumsum(-(-handle.group_sizes // alignment) * alignment)
                expert = jnp.searchsorted(ends, jnp.arange(received.shape[0]), side="right")  # past the last: none's
            y = jnp.tanh(jnp.einsum("rh,rhk->rk", received.reshape(-1, HIDDEN), w[expert], precision="highest"))
        return jaxkern.combine(y.reshape(received.shape), handle, **back or {}), (handle.group_sizes, handle.dropped)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(names), out_specs=P(names))
    def run(x, weights, w, ids, g):
        y, vjp, (sizes, dropped) = jax.vjp(lambda *a: layer(*a, ids), x, weights, w, has_aux=True)
        return {"y": y, "sizes": sizes, "dropped": dropped} | dict(
            zip(("d_x", "d_weights", "d_w"), vjp(g), strict=True)
        )

    return run(*[jax.device_put(a, NamedSharding(mesh, P(names))) for a in (x, weights, w, ids, g)])


def moe_layer(devices: int, *, names):
    """The model's: router, experts by grouped products, shared experts."""
    mesh = mesh_of(devices, names)
    program, leaves = Program.of(small_model(mesh, **SMALL))
    x = np.random.default_rng(1).standard_normal((8, 6, 32)).astype(np.float32)

    def body(parts, x):
        y, routing = parts["model"].layers[1].mlp(x, None, program.run)
        return y, jax.lax.psum(routing.load, names)

    run = jax.jit(program.map(body, (program.rows,), (program.rows, P())))
    y, load = run(leaves, jax.device_put(x, NamedSharding(mesh, program.rows)))
    return {"y": y, "load": load}


def training_step(devices: int, *, names):
    """One of plain descent: what it takes off the parameters is the gradient."""
    model = small_model(mesh_of(devices, names), **SMALL)
    before = leaves_of(model)
    batch = {"input_ids": tokens(6, 13)}  # fewer rows than devices
    step = deepseek.make_train_step(balance_factor=0.5, bias_update_speed=0.01)
    metrics = step(model, nnx.Optimizer(model, SGD, wrt=nnx.Param), batch)
    after = leaves_of(model)
    arrays = {f"parameter {name}": x for name, x in after.items()}
    arrays |= {f"gradient {name}": before[name] - x for name, x in after.items()}
    return arrays | {name: x for name, x in metrics.items() if name != "tokens_per_second"}


SGD = optax.sgd(1.0)


def generation(devices: int, *, names):
    model = small_model(mesh_of(devices, names), **SMALL)
    ids = tokens(6, 9)
    mask = (np.arange(9) >= np.arange(6)[:, None]).astype(np.int32)
    options = {"attention_mask": mask, "max_new_tokens": 8, "page_size": 8}
    return {
        "logits": model(ids, mask)[:, -1],
        "likeliest": deepseek.generate(model, ids, **options),
        "drawn": deepseek.generate(model, ids, temperature=1.0, top_p=0.9, seed=3, **options),
    }


def leaves_of(model) -> dict[str, np.ndarray]:
    """Copies: the step donates its own."""
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))[0]
    return {jax.tree_util.keystr(path): np.array(fetch(x)) for path, x in leaves}


FLAT, LEVELS = ("expert",), ("host", "device")

# A layout or a transport of dispatch is one more row; each runs on a mesh of one axis and on one of two levels.
EXCHANGES = {
    "float32": Case(functools.partial(exchange, dtype=np.float32)),
    "bfloat16": Case(functools.partial(exchange, dtype=jnp.bfloat16)),
    "masked": Case(functools.partial(exchange, dtype=np.float32, layout="masked")),
    "rank": Case(functools.partial(exchange, dtype=np.float32, layout="rank"), to_one_device=None),  # sizes of ranks
    "slabs": Case(functools.partial(exchange, dtype=np.float32, transport="all_to_all", back={"reduction": "expert"})),
    "ragged": Case(functools.partial(exchange, dtype=np.float32, transport="ragged"), on_cpus=False),
    "aligned": Case(functools.partial(exchange, dtype=np.float32, expert_alignment=8)),
    "small capacity": Case(functools.partial(exchange, dtype=np.float32, capacity=20), to_one_device=None),
    "layer": Case(moe_layer, to_one_device=1e-5),
}
CASES = {
    f"{name} over {' x '.join(names)}": dataclasses.replace(case, compute=functools.partial(case.compute, names=names))
    for name, case in EXCHANGES.items()
    for names in (FLAT, LEVELS)
} | {
    "training step": Case(functools.partial(training_step, names=LEVELS), 1e-5, 1e-5),
    "generation": Case(functools.partial(generation, names=LEVELS), 0, 1e-5),
}


def chosen_cases() -> dict[str, Case]:
    on_cpus, wanted = jax.default_backend() == "cpu", os.environ.get("JAXKERN_TEST_CASES", "")
    found = {name: c for name, c in CASES.items() if re.search(wanted, name) and (c.on_cpus or not on_cpus)}
    assert found, "JAXKERN_TEST_CASES chooses none"
    return found


def fetch(x) -> np.ndarray:
    """The whole array, in every process. bfloat16 as the float32 of the same value: an .npz would lose the type."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x


def results(case: Case, devices: int) -> dict[str, np.ndarray]:
    return {name: fetch(x) for name, x in case.compute(devices).items()}


def compute_cases(folder: str):
    for name, case in chosen_cases().items():
        print(name, flush=True)
        path = pathlib.Path(folder) / f"{name}.{jax.process_index()}.npz"
        np.savez(path, **results(case, jax.device_count()))


def loop(steps: str):
    mesh = mesh_of(jax.device_count(), FLAT)
    arrays = np.ones((16, 8), np.float32), np.zeros((16, 1), np.int32), np.ones((16, 1), np.float32)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(FLAT), out_specs=P(FLAT))
    def step(x, ids, weights):
        return jaxkern.combine(*jaxkern.dispatch(x, ids, weights, num_experts=8, axis_name="expert"))

    x, *routing = [jax.device_put(a, NamedSharding(mesh, P(FLAT))) for a in arrays]
    count = 0
    while True:
        x = step(x, *routing).block_until_ready()
        count += 1
        if count == 10:
            print("in the loop", flush=True)
        if jax.process_index() == 1 and count == int(steps):
            raise RuntimeError("this process has had enough")


if __name__ == "__main__":
    address, number, index, devices, task, argument = sys.argv[1:]
    first, devices = int(index) * int(devices), int(devices)
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address,
        int(number),
        int(index),
        local_device_ids=list(range(first, first + devices)),  # of GPUs; without it each process takes all
        heartbeat_timeout_seconds=10,
        shutdown_timeout_seconds=10,
    )
    {"cases": compute_cases, "loop": loop}[task](argument)
