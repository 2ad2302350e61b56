"""For people with their own jax.jit model code: one mixture-of-experts layer from jaxkern's ops, its experts spread
over four devices, with gradients, and the same layer on one device.

    python examples/layer.py
"""

import jax

jax.config.update("jax_num_cpu_devices", 4)  # on GPUs: leave this out

import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jaxkern  # noqa: E402

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 1024, 256, 512, 16, 4


def layer(params, x, axis_name=None):
    """x [tokens, hidden] -> [tokens, hidden]. On a mesh: this device's tokens, this device's experts."""
    logits = jaxkern.gemm(x, params["router"])
    bias = jnp.zeros(EXPERTS)
    expert_ids, weights = jaxkern.route(logits, bias, top_k=TOP_K, num_groups=4, topk_groups=2)
    received, handle = jaxkern.dispatch(x, expert_ids, weights, num_experts=EXPERTS, axis_name=axis_name)

    def experts(rows, weight):
        return jaxkern.grouped_gemm(rows, weight, handle.group_sizes)

    hidden = jax.nn.silu(experts(received, params["gate"])) * experts(received, params["up"])
    return jaxkern.combine(experts(hidden, params["down"]), handle)


def main():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "router": jax.random.normal(keys[0], (EXPERTS, HIDDEN)) / 16,
        "gate": jax.random.normal(keys[1], (EXPERTS, WIDTH, HIDDEN)) / 16,
        "up": jax.random.normal(keys[2], (EXPERTS, WIDTH, HIDDEN)) / 16,
        "down": jax.random.normal(keys[3], (EXPERTS, HIDDEN, WIDTH)) / 16,
    }
    x = jax.random.normal(keys[4], (TOKENS, HIDDEN))

    mesh = jax.make_mesh((4,), ("expert",))
    specs = {"router": P(), "gate": P("expert"), "up": P("expert"), "down": P("expert")}
    spread = jax.shard_map(
        lambda params, x: layer(params, x, axis_name="expert"),
        mesh=mesh,
        in_specs=(specs, P("expert")),
        out_specs=P("expert"),
    )

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda params, x: (f(params, x) ** 2).mean()))

    on_one, gradients = loss(layer)(params, x)
    placed = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, specs)
    on_four, spread_gradients = loss(spread)(placed, jax.device_put(x, NamedSharding(mesh, P("expert"))))
    print(f"loss on one device   {on_one:.7f}")
    print(f"loss on four         {on_four:.7f}")
    for name, g in gradients.items():
        difference = jnp.abs(g - jax.device_get(spread_gradients[name])).max() / jnp.abs(g).max()
        print(f"gradient of {name:<7}  differs by {difference:.1e} of its largest")


if __name__ == "__main__":
    main()
