"""For people with several hosts: one program, started once a process, trains a model over all their devices and writes.

    srun python examples/multihost.py --hosts $SLURM_NNODES          # Slurm; Kubernetes: docs/multihost.md

    python examples/multihost.py --devices 4 --coordinator localhost:9876 --num-processes 2 --process-id 0  # a laptop,
    python examples/multihost.py --devices 4 --coordinator localhost:9876 --num-processes 2 --process-id 1  # two shells

    python examples/multihost.py --gpus 0 --coordinator localhost:9876 --num-processes 2 --process-id 0  # a host with
    python examples/multihost.py --gpus 1 --coordinator localhost:9876 --num-processes 2 --process-id 1  # two GPUs

The processes find each other through Slurm, Open MPI or Kubernetes, or through the three options. A process takes all
GPUs of its host unless --gpus names its own; Slurm and Open MPI give each process one. The experts and the
batch are spread over all devices; a token goes to the experts of at most four hosts, as DeepSeek-V3's do.
"""

import argparse
import pathlib
import socket
import time

import jax
import numpy as np
import optax
from flax import nnx

from jaxkern.models import deepseek

DATA = pathlib.Path(__file__).parent / "data"
PROMPTS = ["HAMLET.\n", "Enter the King", "O, my", "My lord,"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", help="host:port of process 0; only where no cluster tells")
    parser.add_argument("--num-processes", type=int, help="how many processes; 1 needs no coordinator")
    parser.add_argument("--process-id", type=int, help="which of them this is, from 0")
    parser.add_argument(
        "--devices", type=int, help="how many CPU devices each process makes; only where there is no GPU"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="+",
        help="which of its host's GPUs this process takes, from 0; by default all",
    )
    parser.add_argument("--hosts", type=int, help="how many hosts the processes run on; by default each has its own")
    parser.add_argument("--heartbeat", type=int, default=30, help="seconds after which a silent process counts as dead")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, help="rows of all processes together; by default four a device")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--experts-per-device", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=60, help="how many bytes to write")
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the checkpoint, which process 0 writes")
    options = parser.parse_args()
    if min(options.steps, options.tokens) < 1:
        parser.error("--steps and --tokens must be at least 1")

    mesh = join(options)
    rank, first = jax.process_index(), jax.process_index() == 0
    print(
        f"process {rank} of {jax.process_count()} on {socket.gethostname()}: {jax.local_device_count()} of "
        f"{jax.device_count()} {jax.devices()[0].platform} devices",
        flush=True,
    )
    model = deepseek.DeepseekForCausalLM(config(mesh, options.experts_per_device), rngs=nnx.Rngs(0), mesh=mesh)
    if first:
        parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        hosts, devices = mesh.devices.shape
        experts = model.config.n_routed_experts
        print(f"{parameters / 1e6:.2f} M parameters, {experts} experts a layer over {hosts} hosts x {devices} devices")

    text = np.frombuffer((DATA / "tragedies.txt").read_bytes(), np.uint8).astype(np.int32)
    batch = options.batch or 4 * mesh.size
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, options.steps // 10 + 1, max(2, options.steps), 1e-4)
    optimizer = nnx.Optimizer(model, deepseek.adamw(schedule), wrt=nnx.Param)
    step = deepseek.make_train_step(balance_factor=1e-3, bias_update_speed=0.01)
    rng = np.random.default_rng(0)  # every process draws the same rows; each device works on its own of them
    start = None
    for i in range(1, options.steps + 1):
        starts = rng.integers(0, len(text) - options.context - 1, batch)
        metrics = step(model, optimizer, {"input_ids": text[starts[:, None] + np.arange(options.context + 1)]})
        if first and (i == 1 or i % 10 == 0 or i == options.steps):
            print(f"step {i:4}  loss {metrics['loss']:.4f}  busiest expert {metrics['max_violation']:+.0%}", flush=True)
        start = start or time.perf_counter()  # after the first step, which compiles
    jax.block_until_ready(metrics)
    if first:
        speed = (options.steps - 1) * batch * options.context / (time.perf_counter() - start)
        print(f"{speed:,.0f} tokens/s")
    if options.out:
        model.save_pretrained(options.out)

    width = max(map(len, PROMPTS))
    ids = np.array([[0] * (width - len(p)) + list(p.encode()) for p in PROMPTS])
    written = deepseek.generate(
        model, ids, attention_mask=(ids > 0).astype(np.int32), max_new_tokens=options.tokens, temperature=0.7
    )
    if first:
        for prompt, row in zip(PROMPTS, written, strict=True):
            print(f"--- {prompt}{bytes(row.tolist()).decode('utf-8', 'replace')}")
    print(f"process {rank}: done", flush=True)


def join(options) -> jax.sharding.Mesh:
    """This process joins the others -> the mesh of all their devices, hosts x devices of a host."""
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.num_processes != 1:
        # A process that dies takes the others with it: after `heartbeat` seconds of silence, and as long after an error
        # of its own, when it waits for the others to end. JAX's own limits are 100 and 300 seconds.
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            local_device_ids=options.gpus,
            heartbeat_timeout_seconds=options.heartbeat,
            shutdown_timeout_seconds=options.heartbeat,
        )
    hosts = options.hosts or jax.process_count()
    if jax.device_count() % hosts:
        raise SystemExit(f"--hosts {hosts} must divide the {jax.device_count()} devices")
    # jax.devices() is in the order of the processes, and a launcher numbers those of one host in a row.
    return jax.make_mesh((hosts, jax.device_count() // hosts), ("host", "device"), devices=jax.devices())


def config(mesh: jax.sharding.Mesh, experts_per_device: int) -> deepseek.Config:
    """A small DeepSeek-V3 whose groups of experts are the hosts."""
    hosts = mesh.devices.shape[0]
    return deepseek.Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=experts_per_device * mesh.size,
        n_shared_experts=1,
        num_experts_per_tok=min(4, experts_per_device * mesh.size),
        n_group=hosts,
        topk_group=min(4, hosts),
        max_position_embeddings=512,
        rope=deepseek.Rope(),  # plain: the context is short
        eos_token_id=None,
    )


if __name__ == "__main__":
    main()
